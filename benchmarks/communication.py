"""What several processes send each other in a step, and what that would cost on 1 to 64 GPUs.

The bytes are counted: two processes on this machine train by DistributedDataParallel, a hook tells how much that sends, and what the
callback hands to `torch.distributed` is added up. The time on GPUs is an estimate by the formula above the table, from these bytes and
from times of a plain step that are assumed, not measured. The formula is compared with what two processes here take. From the
repository root:

    python benchmarks/communication.py
"""
import os, platform, signal, tempfile, time, traceback
from functools import partial
from pathlib import Path

import numpy as np, torch, torchvision
from fastai.basics import Callback, DataLoaders, Learner, SGD, set_seed
from fastai.callback.progress import ProgressCallback
from fastcore.script import call_parse
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader, TensorDataset

from fastai_l2rw.all import MetaReweightCallback

torch.set_num_threads(1)
models = torchvision.models
MODELS = { # a model, the name of its head, and seconds of a plain step with 64 images on one GPU, an assumption
    'ResNet-18': (lambda: models.resnet18(num_classes=10), 'fc', 0.03),
    'ResNet-50': (lambda: models.resnet50(num_classes=10), 'fc', 0.08),
    'ResNet-50 with 1000 classes': (lambda: models.resnet50(), 'fc', 0.08),
    'ViT-B': (lambda: models.vit_b_16(image_size=32, num_classes=10), 'heads', 0.2)}
OPTIONS = {'plain': None, 'full look-ahead': dict(), 'every=4': dict(every=4), 'head': dict(params='head')}

def head(name, model): return getattr(model, name).parameters()

class Times(Callback):
    "The time of each step but the first two."
    order,run_valid = 10**6,False
    def before_fit(self): self.at = []
    def after_batch(self): self.at.append(time.perf_counter())
    @property
    def median(self): return float(np.median(np.diff(self.at[1:])))

def train(model, option, rank, size, steps, bs=8, m=4):
    "Bytes in a step that DDP sends and that we do, and the time of a step, of a training with `bs` images in each process."
    make,name,_ = MODELS[model]
    x,y = torch.randn(bs*steps + m*size, 3, 32, 32), torch.arange(bs*steps + m*size) % 10
    kwargs = OPTIONS[option]
    cbs = [times := Times()]
    if kwargs is not None:
        if 'params' in kwargs: kwargs = dict(params=partial(head, name))
        cbs.append(MetaReweightCallback(DataLoader(TensorDataset(x[-m*size:], y[-m*size:]), m*size), record=False, **kwargs))
    set_seed(0)
    net = make()
    if size > 1: net = nn.parallel.DistributedDataParallel(net)
    ddp,sent,original = [],[],distributed.all_reduce
    def hook(_, bucket):
        ddp.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(None, bucket)
    def counting(t, *args, **kwargs):
        sent.append(t.nbytes)
        return original(t, *args, **kwargs)
    if size > 1: net.register_comm_hook(None, hook)
    load = DataLoader(TensorDataset(x[:bs*steps], y[:bs*steps]), bs)
    learn = Learner(DataLoaders(load, load), net, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=cbs)
    learn.remove_cbs(ProgressCallback)
    learn.validate = lambda *args, **kwargs: None
    distributed.all_reduce = counting
    try:
        with learn.no_logging(): learn.fit(1, 1e-3)
    finally: distributed.all_reduce = original
    few = len([o for o in sent if o < 2**14 and o not in ddp])
    return dict(ddp=sum(ddp)/steps, ours=(sum(sent) - sum(ddp))/steps, messages=few/steps, seconds=times.median)

def all_reduce_seconds(n_bytes):
    "What a sum over the processes takes here."
    t,taken = torch.zeros(int(n_bytes)//4),[]
    for _ in range(4):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(t)
        taken.append(time.perf_counter() - start)
    return min(taken)

def in_processes(n, f):
    "What `f(rank, n)` gives in the first of `n` processes."
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(n):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    signal.alarm(600)
                    if n > 1: distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=n)
                    found = f(rank, n)
                    if rank == 0: torch.save(found, f'{folder}/found')
                    if n > 1: distributed.barrier()
                    status = 0
                except BaseException: traceback.print_exc()
                finally: os._exit(status)
            pids.append(pid)
        failed = any([os.waitpid(pid, 0)[1] for pid in pids])
        if failed: raise SystemExit('a process has failed')
        return torch.load(f'{folder}/found')

# ---- the estimate

def step_seconds(
    seconds, # of a plain step of one GPU
    ratio, # m/n: trusted images of a step, for each training image
    ddp, ours, # bytes in a step
    n, # number of GPUs
    gigabits, # of bandwidth
    every=1, own=True, # of the look-ahead; is there one?
    head=False, # along the head only: no tangents in the body
    latency=30e-6, n_messages=4, # of small messages
    overlap=True, # Do messages go on while a GPU computes?
):
    "Seconds of a step on `n` GPUs: what the docs' page explains."
    def ring(n_bytes): return 2*(n - 1)/n*n_bytes*8/(gigabits*1e9) if n > 1 else 0.
    forward,backward = seconds/3,2*seconds/3
    hidden = max if overlap else lambda a, b: a + b
    plain = hidden(backward, ring(ddp))
    if not own: return forward + plain
    trusted = ratio*(forward if head else seconds)/every # of a head, the backward pass is nothing
    tangents = 0 if head else 2*seconds/3
    sent = (hidden(forward, ring(ours)) + (every - 1)*forward)/every # every k-th step sends
    small = n_messages*2*np.log2(n)*latency if n > 1 else 0.
    return trusted + sent + tangents + small + plain

def measured(models, steps):
    "Rows of the first table, and the bytes by model and option."
    rows,found = [],{}
    for model in models:
        options = [o for o in OPTIONS if o != 'plain']
        counts = in_processes(2, lambda rank, size: {o: train(model, o, rank, size, steps, bs=2, m=2) for o in options})
        for option,o in counts.items():
            found[model, option] = o
            bytes_ = f"{o['ddp']/1e6:.1f} | {o['ours']/1e6:.3f} | {o['ours']/o['ddp']:.4f}"
            rows.append(f"| {model} | {option} | {bytes_} | {o['messages']:.1f} |")
            print(rows[-1], flush=True)
    return rows,found

def estimates(found):
    "Rows of the second table: plain DDP's efficiency, and a step with weights over a plain one, on as many GPUs."
    rows = []
    for model in ('ResNet-50', 'ViT-B'):
        seconds,volume = MODELS[model][2],found[model, 'full look-ahead']['ddp']
        for gigabits in (10, 25, 100):
            for n in (1, 2, 4, 8, 16, 32, 64):
                at = lambda **kwargs: step_seconds(seconds, 0.5, volume, **dict(ours=volume, n=n, gigabits=gigabits) | kwargs)
                plain = at(own=False)
                cells = [at(), at(every=4), at(every=16), at(ours=found[model, 'head']['ours'], head=True)]
                alone = step_seconds(seconds, 0.5, volume, volume, 1, gigabits)
                ratios = ' | '.join(f'{o/plain:.2f}' for o in cells)
                rows.append(f'| {model} | {gigabits} | {n} | {(seconds/plain):.0%} | {alone/cells[0]:.0%} | {ratios} |')
    return rows

def check(model, steps):
    "Rows of the third table: what the formula makes of times in one process, and what two take."
    rows,bs = [],8
    one = in_processes(1, lambda rank, size: {o: train(model, o, rank, size, steps) for o in OPTIONS})
    two,sum_ = in_processes(2, lambda rank, size: ({o: train(model, o, rank, size, steps) for o in OPTIONS}, all_reduce_seconds(45e6)))
    gigabits = 45e6*8/sum_/1e9
    for option in OPTIONS:
        o = two[option]
        wire = (o['ddp'] + (o['ours'] if option != 'plain' else 0))*8/(gigabits*1e9) # a gloo sum takes a core, so nothing overlaps
        expected = one[option]['seconds'] + wire
        times = f"{one[option]['seconds']:.3f} | {expected:.3f} | {o['seconds']:.3f} | {o['seconds']/expected:.2f}"
        rows.append(f"| {model} | {option} | {times} |")
        print(rows[-1], flush=True)
    return rows,gigabits

@call_parse
def main(
    out:Path=Path('results/communication.md'), # Where the tables go
    steps:int=4, # Number of steps of each count
    check_steps:int=12, # Number of steps of each training that is timed
):
    "Count what is sent in a step, and estimate what it costs."
    rows,found = measured(list(MODELS), steps)
    checked,gigabits = check('ResNet-18', check_steps)
    nl = chr(10)
    out.write_text(f"""# What several processes send each other

Made by `python benchmarks/communication.py`, which says how; {os.cpu_count()} CPU cores, shared with other work, {platform.machine()},
Python {platform.python_version()}, torch {torch.__version__}.

## Counted: bytes in a step

Two processes, DistributedDataParallel, gloo. *DDP* is what plain training sends (the gradient), *ours* what the callback adds. Bytes are
those that a process hands to a sum over all; a ring of R processes sends 2(R-1)/R times as many.

| model | option | DDP, MB | ours, MB | ours / DDP | small messages in a step |
|---|---|---|---|---|---|
{nl.join(rows)}

## Estimated: 1 to 64 GPUs

No GPU was at hand: this is arithmetic. A plain step of 64 images takes {MODELS['ResNet-50'][2]} s (ResNet-50) or {MODELS['ViT-B'][2]} s
(ViT-B) on one GPU, an assumption, of which the forward pass is a third. c is the time of a sum of all gradients, 2(R-1)/R × bytes × 8 /
bandwidth, and L = 4 small messages × 2 log2(R) × 30 µs. There are half as many trusted images as training images (m/n = 0.5) on each GPU;
a trusted batch that does not grow with the number of GPUs costs less. Then a step takes

- plain: t/3 + max(2t/3, c), as DDP sends while it goes backward;
- weighted: (m/n) t + max(t/3, c) + 2t/3 + max(2t/3, c) + L: the trusted gradient, the Learner's forward pass while that gradient
  is sent, the tangents, the backward pass. With `every=k`, the first two are so in one step of k; in the others they are t/3;
- along the head: (m/n) t/3 + max(t/3, c_head) + max(2t/3, c) + L.

*Efficiency* is the time of a step on one GPU over that on R, with 64 images on each.

| model | Gbit/s | GPUs | efficiency, plain | efficiency, weighted | weighted / plain | every=4 | every=16 | head |
|---|---|---|---|---|---|---|---|---|
{nl.join(estimates(found))}

## Checked: two processes here

The same formula without overlap, since a sum takes a core here: the time in one process, plus the bytes over {gigabits:.1f} Gbit/s, which
is what a sum of 45 MB by itself reaches between two processes on this machine. Seconds of a step, medians of {check_steps - 2}; other work
on the machine moves them by a third and more.

| model | option | one process | two, expected | two, measured | measured / expected |
|---|---|---|---|---|---|
{nl.join(checked)}
""")
    print(out)
