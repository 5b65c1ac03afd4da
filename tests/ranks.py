"Run by test_ranks.py: the same trainings in one, two and four processes, which are forked from this one. Writes what came out into a folder."
import os, sys, time, traceback, warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, torch, torchvision
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, noop, set_seed
from fastai.callback.all import GradientAccumulation
from fastai.callback.training import BnFreeze
from fastai.distributed import DistributedDL
from fastai.optimizer import SGD
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset

from fastai_l2rw.all import MetaReweightCallback, MetaWeightNetCallback

torch.set_num_threads(1)
rank,size = 0,1

def broadcast(self, t, rank):
    "What fastai's loader does by a GPU."
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = broadcast

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
def resnet(norm): return torchvision.models.resnet18(num_classes=4, norm_layer=norm)
def group_norm(): return resnet(partial(nn.GroupNorm, 8))
class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True), 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)
    def forward(self, x): return self.head(self.layers(self.embed(x)).mean(1))

def frozen_batch_norm():
    model = resnet(nn.BatchNorm2d)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.requires_grad_(False)
    return model

SHAPES = {mlp: (6,), Words: (5, 6), group_norm: (3, 16, 16), frozen_batch_norm: (3, 16, 16)}

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
    "A transform: the last quarter of each batch of 16 gets no weight."
    def __call__(self, u, step): return torch.where(step.items % 16 >= 12, -1, u)

# ---- a training

def learner(model, cb, cbs=(), bs=16, n=320, m=24, meta_bs=8, opt=partial(SGD, mom=0.), loss_func=None, path=None):
    x,given,right = make_data(n + m, SHAPES[model])
    bs //= size
    dls = DataLoaders(Ordered(list(zip(x[:n], given[:n])), bs=bs, num_workers=0), DataLoader(list(zip(x[n:], right[n:])), bs=bs, num_workers=0))
    dls.n_inp = 1
    meta = TorchLoader(TensorDataset(x[n:], right[n:]), meta_bs)
    set_seed(0)
    net = model()
    cb = cb(meta)
    return Learner(dls, net, loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=opt, cbs=[cb, *cbs, Note()], path=path),cb

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
        weigher.transforms.append(Zeros())
        return weigher
    cb.make_weigher = make_weigher
    return cb

EVERYWHERE = { # in one, two and four processes
    'MLP': lambda: trained(mlp),
    'MLP, accumulated': lambda: trained(mlp, cbs=accumulate),
    'MLP, accumulated without sync': lambda: trained(mlp, cbs=without_sync),
    'ResNet-18 with group norm': lambda: trained(group_norm, bs=8),
    'ResNet-18 with frozen batch norm': lambda: trained(frozen_batch_norm, cbs=lambda: [BnFreeze()], bs=8),
    'transformer': lambda: trained(Words),
    'fewer trusted examples than processes': lambda: trained(mlp, m=3, meta_bs=2),
    'a process with zeros only': lambda: trained(mlp, zeros),
}
HERE = { # in one and two
    'relative': lambda: trained(mlp, reweight(relative=True)),
    'margin': lambda: trained(mlp, reweight(margin=0.5)),
    'smooth': lambda: trained(mlp, reweight(smooth=0.5), epochs=2, steps=10),
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
    'Meta-Weight-Net': lambda: trained(mlp, MetaWeightNetCallback),
    'Meta-Weight-Net, separate pass': lambda: trained(mlp, lambda meta: MetaWeightNetCallback(meta, engine='forward')),
    'Meta-Weight-Net, class weights': lambda: trained(mlp, MetaWeightNetCallback, loss_func=class_weighted()),
}

# ---- processes

def in_process(out, cases):
    "What one of the processes does."
    if size > 1:
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
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
            try: in_process(out, cases)
            except BaseException: traceback.print_exc()
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(0) # threads that gloo leaves behind can make an orderly end abort on a busy machine
        children.append(pid)
    for pid in children: os.waitpid(pid, 0)

if __name__ == '__main__':
    out,*names = sys.argv[1:]
    warnings.simplefilter('ignore')
    if names: EVERYWHERE,HERE = [{k: v for k,v in o.items() if k in names} for o in (EVERYWHERE, HERE)]
    for n in (1, 2, 4):
        start = time.perf_counter()
        fork(n, out, EVERYWHERE | (HERE if n < 4 else {}))
        print(n, f'{time.perf_counter() - start:.0f} s', flush=True)
