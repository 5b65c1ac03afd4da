"Run by test_ranks.py: the same trainings in one, two and four processes, which are forked from this one. Writes what came out."
import os, signal, sys, time, traceback, warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, torch, torchvision
from fastai.basics import CancelFitException, CastToTensor, Callback, DataLoader, DataLoaders, Learner, TrainEvalCallback, set_seed
from fastai.callback.all import CSVLogger, GradientAccumulation, SaveModelCallback
from fastai.callback.training import BnFreeze
from fastai.distributed import DistributedDL
from fastai.optimizer import SGD
from accelerate import DistributedDataParallelKwargs
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader as TorchLoader, TensorDataset

from fastai_l2rw.all import MetaReweightCallback, MetaWeightNetCallback
from fastai_l2rw.ranks import synced_batch_norm

torch.set_num_threads(1)
rank,size = 0,1

def broadcast(self, t, rank):
    "What fastai's loader does by a GPU."
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = broadcast
nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None # it refuses SyncBatchNorm on a CPU

# ---- data, models and loaders

def make_data(n, shape, n_classes=4, wrong=0.3):
    "Inputs that tell their class, and labels of which some are wrong."
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(n_classes, (n,), generator=generator)
    means = torch.randn(n_classes, *shape, generator=generator)
    x = means[right] + torch.randn(n, *shape, generator=generator)
    given = torch.where(torch.rand(n, generator=generator) < wrong, torch.randint(n_classes, (n,), generator=generator), right)
    return x,given,right

class Ordered(DataLoader):
    "Gives items in an order in which each process's part of a batch is that of the batch of one process."
    def get_idxs(self):
        batches = np.arange(self.n).reshape(-1, self.bs*size)
        return [int(i) for part in np.split(batches, size, 1) for i in part.flatten()]

def mlp(): return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
class Slim(torchvision.models.ResNet):
    "A ResNet with a quarter of the channels."
    def _make_layer(self, block, planes, *args, **kwargs): return super()._make_layer(block, planes//4, *args, **kwargs)
def resnet(norm):
    model = Slim(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], norm_layer=norm)
    model.fc = nn.Linear(128, 4)
    return model.double() # in float32, a unit at the kink of its ReLU comes out on the other side by rounding, every few steps
def group_norm(): return resnet(partial(nn.GroupNorm, 4))
class Synced(nn.SyncBatchNorm):
    "PyTorch's own is for GPUs only; this takes our computation for the Learner's pass, too."
    def forward(self, x): return synced_batch_norm(self, x)
def batch_norm(): return nn.Sequential(nn.Linear(6, 16), Synced(16), nn.Tanh(), nn.Linear(16, 16), Synced(16), nn.ReLU(), nn.Linear(16, 4))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)
    def forward(self, x): return self.head(self.layers(self.embed(x)).mean(1))

def frozen_batch_norm():
    model = resnet(nn.BatchNorm2d)
    with torch.no_grad(): # it has seen data before
        for _ in range(20): model(torch.randn(8, 3, 16, 16).double())
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.requires_grad_(False)
    return model

SHAPES = {mlp: (6,), batch_norm: (6,), Words: (5, 6), group_norm: (3, 16, 16), frozen_batch_norm: (3, 16, 16)}

# ---- callbacks

class Note(Callback):
    "Keeps the weights of this process."
    order,run_valid = 300,False
    def before_fit(self): self.weights,self.routes = [],set()
    def after_loss(self):
        step = next(cb for cb in self.learn.cbs if isinstance(cb, MetaReweightCallback)).step
        self.weights.append(step.weights.detach().clone())
        self.routes.add(step.route)

class NoSync(Callback):
    "Lets DDP add gradients up only in every second batch."
    order,run_valid,inside = -50,False,None
    def before_batch(self):
        if self.iter % 2 == 0 and hasattr(self.model, 'no_sync'):
            self.inside = self.model.no_sync()
            self.inside.__enter__()
    def after_backward(self): self.leave()
    def leave(self):
        if self.inside: self.inside.__exit__(None, None, None)
        self.inside = None

class Zeros:
    "Weights of which the last quarter of each batch of 16 gets none."
    def __init__(self, weights): self.weights = weights
    def __call__(self, u, step, fit): return self.weights(torch.where(step.items % 16 >= 12, -1, u), step, fit)

# ---- a training

def learner(model, cb, cbs=(), bs=16, n=320, m=24, meta_bs=8, opt=partial(SGD, mom=0.), loss_func=None, path=None):
    x,given,right = make_data(n + m, SHAPES[model])
    if model in (group_norm, frozen_batch_norm): x = x.double()
    bs //= size
    load = Ordered(list(zip(x[:n], given[:n])), bs=bs, num_workers=0)
    dls = DataLoaders(load, DataLoader(list(zip(x[n:], right[n:])), bs=bs, num_workers=0))
    dls.n_inp = 1
    meta = TorchLoader(TensorDataset(x[n:], right[n:]), meta_bs)
    set_seed(0)
    net = model()
    cb = cb(meta)
    double = next(net.parameters()).dtype is torch.float64
    default = [TrainEvalCallback(), CastToTensor()] if double else [] # fastai's Recorder can't log a loss in float64
    return Learner(dls, net, loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=opt, cbs=[cb, *cbs, Note(), *default], path=path,
        default_cbs=not double),cb

def context(learn, **kwargs): return learn.distrib_ctx(sync_bn=False, cpu=True, **kwargs) if size > 1 else nullcontext()

def fit(learn, epochs=1, lr=0.05, **kwargs):
    with learn.no_bar(), learn.no_logging(), context(learn, **kwargs): learn.fit(epochs, lr)

def parameters(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def of_all(t):
    "Rows of all processes, in their order."
    if size == 1: return t
    parts = [None]*size
    torch.distributed.all_gather_object(parts, t)
    return torch.cat(parts)

def trained(model, cb=MetaReweightCallback, cbs=lambda: (), epochs=1, steps=20, lr=0.05, ddp={}, **kwargs):
    "Weights of all steps, parameters, what the ledger has, and what is the same in all processes."
    bs = kwargs.pop('bs', 16)
    learn,cb = learner(model, cb, cbs(), bs=bs, n=bs*steps, **kwargs)
    fit(learn, epochs, lr, **ddp)
    assert not isinstance(learn.model, nn.parallel.DistributedDataParallel)
    weights = torch.stack([of_all(w) for w in learn.note.weights])
    figures = torch.tensor([list(o.values()) for o in cb.record_of_items.figures.values()])
    found = dict(weights=weights, parameters=parameters(learn), figures=figures, routes=learn.note.routes,
        item_weights=torch.tensor(cb.item_weights().to_numpy()), evidence=torch.tensor(cb.item_evidence().to_numpy(dtype=float)))
    if isinstance(cb, MetaWeightNetCallback): found['net'] = torch.cat([p.detach().flatten() for p in cb.weight_net.parameters()])
    if cb.calibrate: found['quality'] = torch.tensor(cb.label_quality().to_numpy())
    return found

reweight = lambda **kwargs: lambda meta: MetaReweightCallback(meta, **kwargs)
class_weighted = lambda: nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 0.5, 1.]))
accumulate = lambda: [GradientAccumulation(2*16//size)]
without_sync = lambda: [GradientAccumulation(2*16//size), NoSync()]
def zeros(meta):
    cb = MetaReweightCallback(meta)
    make = cb.make_weigher
    def make_weigher(searching):
        weigher = make(searching)
        weigher.weights = Zeros(weigher.weights)
        return weigher
    cb.make_weigher = make_weigher
    return cb

EVERYWHERE = { # in one, two and four processes
    'MLP': lambda: trained(mlp),
    'MLP, accumulated': lambda: trained(mlp, cbs=accumulate),
    'MLP, accumulated without sync': lambda: trained(mlp, cbs=without_sync),
    'ResNet-18 with group norm': lambda: trained(group_norm, bs=8, lr=0.01),
    'ResNet-18 with frozen batch norm': lambda: trained(frozen_batch_norm, cbs=lambda: [BnFreeze()], bs=8, lr=0.01),
    'transformer': lambda: trained(Words),
    'synchronised batch norm': lambda: trained(batch_norm, epochs=1),
    'fewer trusted examples than processes': lambda: trained(mlp, m=3, meta_bs=2),
    'a process with zeros only': lambda: trained(mlp, zeros),
    'uneven parts': lambda: uneven(),
}
HERE = { # in one and two
    'relative': lambda: trained(mlp, reweight(relative=True)),
    'margin': lambda: trained(mlp, reweight(margin=0.5)),
    'every=2': lambda: trained(mlp, reweight(every=2)),
    'params': lambda: trained(mlp, reweight(params=lambda m: m[-1].parameters())),
    'skip_zeros': lambda: trained(mlp, reweight(skip_zeros=True)),
    'forward': lambda: trained(mlp, reweight(engine='forward')),
    'reverse': lambda: trained(mlp, reweight(engine='reverse')),
    'uniform': lambda: trained(mlp, reweight(on_zero='uniform')),
    'opt': lambda: trained(mlp, reweight(lookahead='opt'), opt=partial(SGD, mom=0.9)),
    'opt, accumulated without sync': lambda: trained(mlp, reweight(lookahead='opt'), without_sync, opt=partial(SGD, mom=0.9)),
    'class weights': lambda: trained(mlp, loss_func=class_weighted()),
    'calibrate': lambda: trained(mlp, reweight(calibrate=True), epochs=2, steps=10),
    'Meta-Weight-Net': lambda: trained(mlp, lambda meta: MetaWeightNetCallback(meta, net_lr=0.05)),
    'Meta-Weight-Net, separate pass': lambda: trained(mlp, lambda meta: MetaWeightNetCallback(meta, engine='forward')),
    'Meta-Weight-Net, class weights': lambda: trained(mlp, MetaWeightNetCallback, loss_func=class_weighted()),
}

# ---- what is not one training

def parts_of(batches): return [b[len(b)*rank//size:len(b)*(rank + 1)//size] for b in batches]

def uneven():
    "Batches of 11, 11, ... and 5, of which the processes have parts of different sizes; DDP without fastai's help."
    n,m = 16*11 + 5,24
    x,given,right = make_data(n + m, SHAPES[mlp])
    load = TorchLoader(TensorDataset(x[:n], given[:n]), batch_sampler=parts_of(np.split(np.arange(n), range(11, n, 11))))
    meta = TorchLoader(TensorDataset(x[n:], right[n:]), 7)
    set_seed(0)
    net = mlp()
    learn = Learner(DataLoaders(load, load), nn.parallel.DistributedDataParallel(net) if size > 1 else net, loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(SGD, mom=0.), cbs=[MetaReweightCallback(meta, record=False, on_zero='uniform'), Note()])
    learn.validate = lambda *args, **kwargs: None
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.05)
    return dict(weights=torch.cat([of_all(w) for w in learn.note.weights]), parameters=parameters(learn), routes=learn.note.routes)

def resumed(out):
    "Two epochs, of which the first may be another number of processes' work."
    def new(): return learner(mlp, reweight(calibrate=True), n=160, opt=partial(SGD, mom=0.9), path=Path(out))
    learn,cb = new()
    before = dict(parameters=torch.zeros(0), item_weights=torch.zeros(0))
    if size == 1: fit(learn, 2)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.load(f'from{size//2}')
        with learn.no_bar(), learn.no_logging(), context(learn): learn.fit(2, 0.05, start_epoch=1)
    found = dict(weights=torch.stack([of_all(w) for w in learn.note.weights])[-10:], parameters=parameters(learn), routes=learn.note.routes,
        item_weights=torch.tensor(cb.item_weights().to_numpy()), evidence=torch.tensor(cb.item_evidence().to_numpy(dtype=float)))
    learn,_ = new()
    with learn.no_bar(), learn.no_logging(), context(learn): learn.fit(2, 0.05, cbs=Until())
    learn.save(f'from{size}')
    return found

class Until(Callback):
    "Ends after the first epoch, as an interruption would."
    order = 1000
    def after_epoch(self): raise CancelFitException

class Broken(OSError): "An error of a data set."

class BrokenSet(torch.utils.data.Dataset):
    "Can't be read any more after a while, in the second process."
    def __init__(self, data, after): self.data,self.after,self.broken = data,after,True
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        self.after -= 1
        if self.broken and self.after < 0 and rank == 1: raise Broken('the disk is gone')
        return self.data[i]

class Poison(Callback):
    "A value that is not finite, in the second process."
    order,run_valid,active = -1000,False,True
    def before_batch(self):
        if self.active and rank == 1 and self.iter == 3: self.learn.xb = (self.xb[0].index_fill(0, torch.tensor([2]), torch.nan),)

def fails(how):
    "What each process hears of an error of the second one, and how it trains after that."
    data = []
    def make(meta):
        data.append(BrokenSet(meta.dataset, 0 if how == 'at once' else 30 if how == 'data' else 10**6))
        return MetaReweightCallback(TorchLoader(data[0], 8))
    learn,cb = learner(mlp, make, [poison := Poison()])
    poison.active = how == 'nan'
    before,start = parameters(learn),time.perf_counter()
    try:
        fit(learn)
        said = 'nothing'
    except Exception as e: said = f'{type(e).__name__}: {e}'
    seconds,steps = time.perf_counter() - start,len(learn.note.weights)
    same = torch.equal(before, parameters(learn))
    poison.active = data[0].broken = False
    fit(learn)
    return dict(said=said, took=seconds, steps=steps, same=same, parameters=parameters(learn), loss_func=type(learn.loss_func).__name__)

def warned():
    "What is said of a trusted set that lacks classes."
    def make(meta):
        x,y = meta.dataset.tensors
        return MetaReweightCallback(TorchLoader(TensorDataset(x[y < 2], y[y < 2]), 8))
    learn,_ = learner(mlp, make)
    learn.dls.c = 4
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(learn)
    return dict(said=[str(o.message) for o in said if 'fastai_l2rw' in o.filename])

def shares():
    "Which trusted examples each process takes, in two fits that are alike."
    found = []
    for _ in range(2):
        learn,cb = learner(mlp, MetaReweightCallback)
        seen = []
        with learn.no_bar(), learn.no_logging(), context(learn):
            learn.fit(1, 0.05, cbs=Callback(after_loss=lambda self: seen.append(cb.step.meta_batch[0][0]) if self.training else None))
        found.append(torch.stack(seen))
    assert torch.equal(*found)
    return dict(seen=found[0])

class Counted:
    "Counts the bytes that this process hands to `torch.distributed`, but for those of DDP itself, which does not go through Python."
    def __enter__(self):
        self.bytes,self.original = 0,{k: getattr(torch.distributed, k) for k in ('all_reduce', 'all_gather', 'broadcast')}
        def counting(f, place):
            def counted(*args, **kwargs):
                self.bytes += args[place].nbytes
                return f(*args, **kwargs)
            return counted
        for k,f in self.original.items(): setattr(torch.distributed, k, counting(f, int(k == 'all_gather')))
        return self
    def __exit__(self, *_):
        for k,f in self.original.items(): setattr(torch.distributed, k, f)

def volume(model=lambda: torchvision.models.resnet18(num_classes=4, norm_layer=partial(nn.GroupNorm, 8)), n_steps=2, **kwargs):
    "Bytes in a step: those of DDP, as a hook is given them, and ours, with what fastai's Recorder takes."
    SHAPES[model] = (3, 16, 16)
    learn,_ = learner(model, reweight(**kwargs), n=16*n_steps)
    ddp = []
    def hook(_, bucket):
        ddp.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(None, bucket) # which is counted, too
    def register(self): self.model.register_comm_hook(None, hook)
    with Counted() as counted, learn.no_bar(), learn.no_logging(), context(learn): learn.fit(1, 0.01, cbs=Callback(before_train=register))
    return dict(ddp=sum(ddp)/n_steps, ours=(counted.bytes - sum(ddp))/n_steps)

def sharded():
    "What is said of a model of which each process keeps a part."
    learn,_ = learner(mlp, MetaReweightCallback)
    fully_shard(learn.model, mesh=init_device_mesh('cpu', (size,)))
    with learn.no_bar(), learn.no_logging(): learn.validate() # can be done
    try: learn.fit(1)
    except ValueError as e: return dict(said=str(e))

def with_ddp(**kwargs): return dict(kwargs_handlers=[DistributedDataParallelKwargs(**kwargs)])

TWO = { # in two
    'sharded': sharded,
    'NaN': lambda: fails('nan'),
    'broken data': lambda: fails('data'),
    'broken at once': lambda: fails('at once'),
    'warnings': warned,
    'shares': shares,
    'unused parameters are looked for': lambda: trained(mlp, ddp=with_ddp(find_unused_parameters=True)),
    'static graph': lambda: trained(mlp, ddp=with_ddp(static_graph=True)),
    'bytes': volume,
    'bytes, head': lambda: volume(params=lambda m: m.fc.parameters()),
}

# ---- processes

def in_process(out, cases):
    "What one of the processes does."
    if size > 1:
        here = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size, MASTER_ADDR='127.0.0.1', MASTER_PORT=0)
        os.environ |= {k: str(v) for k,v in here.items()}
        torch.distributed.init_process_group('gloo', init_method=f'file://{out}/store{size}', rank=rank, world_size=size)
    found = {}
    for name,case in cases.items():
        start = time.perf_counter()
        try: found[name] = case()
        except BaseException: found[name] = dict(error=traceback.format_exc())
        if not isinstance(found[name], dict): found[name] = dict(value=found[name])
        found[name]['seconds'] = time.perf_counter() - start
        torch.save(found, f'{out}/{size}-{rank}.pt')
        if 'error' in found[name]: break # the others may be elsewhere
    if size > 1: torch.distributed.barrier()

def fork(n, out, cases):
    "Run in `n` processes, and wait for them."
    global rank,size
    children = []
    for r in range(n):
        if (pid := os.fork()) == 0:
            rank,size = r,n
            signal.alarm(150) # none outlives a test
            try: in_process(out, cases)
            except BaseException: traceback.print_exc()
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(0) # threads that gloo leaves behind can make an orderly end abort on a busy machine
        children.append(pid)
    for pid in children: os.waitpid(pid, 0)

def train_long(out):
    "A training that is killed: a checkpoint after each epoch, results in a file, and this process's number in another one."
    global rank,size
    rank,size = int(os.environ['RANK']),int(os.environ['WORLD_SIZE'])
    torch.distributed.init_process_group('gloo')
    (out/f'pid{rank}').write_text(str(os.getpid()))
    learn,cb = learner(mlp, reweight(calibrate=True), [SaveModelCallback(every_epoch=True, with_opt=True, fname='each')], path=out)
    with learn.no_bar(), context(learn): learn.fit(10**6, 0.01, cbs=CSVLogger() if rank == 0 else None)

if __name__ == '__main__':
    out,*names = sys.argv[1:]
    warnings.simplefilter('ignore')
    if names == ['killed']: sys.exit(train_long(Path(out)))
    EVERYWHERE |= dict(resumed=lambda: resumed(out))
    for n in (1, 2, 4):
        start = time.perf_counter()
        cases = EVERYWHERE | (HERE if n < 4 else {}) | (TWO if n == 2 else {})
        fork(n, out, {k: v for k,v in cases.items() if k in names or not names})
        print(n, f'{time.perf_counter() - start:.0f} s', flush=True)
