"""Memory and time of what grows with the number of items: the ledger, its checkpoints, splits, samplers and tables, for synthetic items.

Each figure comes from a process of its own, so that the peak of its memory is its own, less what was in use before. Run from the
repository root:

    python benchmarks/large.py

writes results/large.md and results/large.json. A part by itself prints its figures:

    python benchmarks/large.py --part ledger --n 1000000
"""
import json, os, platform, subprocess, sys, tempfile, threading, time
from pathlib import Path
from types import SimpleNamespace

import fastai, numpy as np, torch
from fastai.basics import Callback, Categorize, DataLoader, DataLoaders, Datasets, Learner, TfmdDL, noop, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.losses import CrossEntropyLossFlat
from fastcore.script import call_parse
from torch import nn

from fastai_l2rw.all import MetaInterpretation, MetaReweightCallback, MetaSplitter, hold_out_meta, weighted_sampler
from fastai_l2rw.fit import Fit
from fastai_l2rw.ledger import BatchItems, Ledger, evidence_of
from fastai_l2rw.schemes import class_counts
from fastai_l2rw.trusted import TrustedBatches

n_classes = 10

def resident():
    "Memory of this process, in bytes."
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')

class Measured:
    "Seconds of the body, and by how many bytes an item the memory of the process grew at most."
    def __init__(self, n): self.n = n
    def __enter__(self):
        self.before = self.most = resident()
        self.done = threading.Event()
        def watch():
            while not self.done.wait(0.005): self.most = max(self.most, resident())
        self.thread = threading.Thread(target=watch)
        self.thread.start()
        self.start = time.perf_counter()
        return self
    def __exit__(self, *args):
        self.seconds = time.perf_counter() - self.start
        self.most = max(self.most, resident())
        self.done.set()
        self.thread.join()
    def row(self, what, **more):
        return dict(what=what, n=self.n, seconds=round(self.seconds, 3), peak_mb=round((self.most - self.before)/1e6), **more)

def batches(n, n_steps, bs=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        items = torch.randint(0, n, (bs,), generator=rng)
        z,y = torch.randn(bs, n_classes, generator=rng),items % n_classes
        loss = nn.functional.cross_entropy(z, y, reduction='none')
        yield items,torch.rand(bs, generator=rng),dict(loss=loss) | evidence_of(z, y)

def full_ledger(n, n_epochs=12, n_steps=320):
    "A ledger that has seen each item in an epoch, and some of them in eleven more; and seconds for a batch in the last."
    ledger = Ledger(n)
    for start in range(0, n, 100_000): # in large pieces, since only what comes out is of interest
        items = torch.arange(start, min(start + 100_000, n))
        z,y = torch.randn(len(items), n_classes),items % n_classes
        ledger.add(items, torch.rand(len(items)), loss=nn.functional.cross_entropy(z, y, reduction='none'), **evidence_of(z, y))
        ledger.begin_epoch(0) # which counts what waits
    for epoch in range(1, n_epochs):
        steps = list(batches(n, n_steps, seed=epoch))
        ledger.begin_epoch(epoch)
        start = time.perf_counter()
        for items,weights,seen in steps: ledger.add(items, weights, **seen)
        ledger.begin_epoch(epoch) # counts what waits
        seconds = (time.perf_counter() - start)/n_steps
    return ledger,seconds

def part_ledger(n):
    with Measured(n) as m: ledger,per_batch = full_ledger(n)
    n_bytes = sum(o.nbytes for o in ledger.state().values())
    yield m.row('ledger, filled over 12 epochs', ledger_mb=round(n_bytes/1e6, 1), bytes_an_item=round(n_bytes/n, 1),
        ms_a_batch=round(1e3*per_batch, 3))
    for name in ('item_weights', 'item_evidence', 'class_weights', 'copy'):
        with Measured(n) as m: found = getattr(ledger, name)()
        yield m.row(f'Ledger.{name}')
        del found

def part_keys(n):
    "Items called by texts, whose number is not known."
    ledger = Ledger(None, compact=True)
    with Measured(n) as m:
        for start in range(0, n, 10_000):
            k = min(10_000, n - start)
            z,y = torch.randn(k, n_classes),torch.arange(k) % n_classes
            loss,names = nn.functional.cross_entropy(z, y, reduction='none'),[f'{o:08d}' for o in range(start, start + k)]
            ledger.add(names, torch.rand(k), loss=loss, **evidence_of(z, y))
    yield m.row('ledger of keys (texts), compact, filled in batches of 10,000')
    with Measured(n) as m: ledger.item_weights()
    yield m.row('Ledger.item_weights, of keys')

class Numbers:
    "Items that are made when they are asked for."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((4,), float(i)),int(i) % n_classes

def small_learner(n, tmp):
    rng = np.random.default_rng(0)
    train = DataLoader(Numbers(n), bs=32, num_workers=0, get_idxs=lambda: rng.integers(0, n, 320).tolist(), n=320)
    dls = DataLoaders(train, DataLoader(Numbers(64), bs=32, num_workers=0))
    learn = Learner(dls, nn.Linear(4, n_classes), loss_func=CrossEntropyLossFlat(), lr=1e-6, path=tmp,
        cbs=MetaReweightCallback(DataLoader(Numbers(32), bs=32, num_workers=0)))
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def part_checkpoint(n):
    with tempfile.TemporaryDirectory() as tmp:
        learn = small_learner(n, tmp)
        learn.fit(2)
        with Measured(n) as m: learn.save('model')
        yield m.row('learn.save, with the ledger', file_mb=round((Path(tmp)/'models/model.pth').stat().st_size/1e6, 1))
        learn = small_learner(n, tmp)
        with Measured(n) as m: learn.load('model', with_opt=True)
        yield m.row('learn.load')
        with Measured(n) as m: learn.fit(3, start_epoch=2)
        yield m.row('going on with what was loaded, for ten steps')

def as_input(i): return torch.full((4,), float(i))
def as_label(i): return int(i) % n_classes

def some_dls(n):
    ds = Datasets(range(n), [[as_input], [as_label, Categorize(vocab=list(range(n_classes)))]], splits=[range(n), range(64)])
    return DataLoaders(*[TfmdDL(ds.subset(i), bs=32, num_workers=0, shuffle=i == 0, do_setup=False) for i in (0, 1)])

def part_data(n):
    labels = np.arange(n) % n_classes
    def splitter(items): return range(n//10, n),range(n//10)
    with Measured(n) as m: parts = MetaSplitter(splitter, 10, labels, checked=True)(range(n))
    assert len(parts[2]) == 10*n_classes
    yield m.row('MetaSplitter, labels as an array')
    del parts
    with Measured(n) as m: parts = MetaSplitter(splitter, 10, as_label, checked=True)(range(n))
    yield m.row('MetaSplitter, labels by a function')
    del parts
    many = np.arange(n) % 1000
    with Measured(n) as m: parts = MetaSplitter(splitter, 3, many, checked=True)(range(n))
    yield m.row('MetaSplitter, 1,000 classes')
    del parts
    with Measured(n) as m: dls = some_dls(n)
    yield m.row('(fastai: Datasets and DataLoaders)')
    with Measured(n) as m: held,meta_dl = hold_out_meta(dls, 10, checked=True)
    assert len(held.train_ds) == n - 10*n_classes and meta_dl.n == 10*n_classes
    yield m.row('hold_out_meta')
    del held
    with Measured(n) as m: counts = class_counts(dls)
    assert sum(counts) == n
    yield m.row('class_counts, for class weights')
    with Measured(n) as m: sampled = weighted_sampler(dls)
    yield m.row('weighted_sampler')
    with Measured(n) as m: sampled.train.get_idxs()
    yield m.row('(fastai: WeightedDL draws the items of an epoch)')
    del sampled
    with Measured(n) as m: dls.train.get_idxs()
    yield m.row('(fastai: a shuffled TfmdDL draws the items of an epoch)')

def part_trusted(n):
    "A trusted loader with all items, which is more than anybody has."
    with Measured(n) as m: next(TrustedBatches(DataLoader(Numbers(n), bs=32, shuffle=True, num_workers=0), torch.device('cpu')))
    yield m.row('TrustedBatches, the first batch of an order')

def part_table(n):
    ledger,_ = full_ledger(n, 2)
    dls = some_dls(n)
    interp = MetaInterpretation(SimpleNamespace(dls=dls), SimpleNamespace(label_quality=lambda: None), ledger)
    with Measured(n) as m: df = interp.table()
    assert len(df) == n
    yield m.row('MetaInterpretation.table')
    del df
    with Measured(n) as m: interp.label_issues(20)
    yield m.row('MetaInterpretation.label_issues')

def part_step(n):
    "Steps of a ResNet-18 on images of 64 x 64, 32 at a time, with a ledger of `n` items; and what the ledger takes of them."
    from torchvision.models import resnet18
    rng = np.random.default_rng(0)
    class Images(Numbers):
        def __getitem__(self, i): return torch.zeros(3, 64, 64),int(i) % n_classes
    n_steps = 64
    train = DataLoader(Images(n), bs=32, num_workers=0, get_idxs=lambda: rng.integers(0, n, 32*n_steps).tolist(), n=32*n_steps)
    dls = DataLoaders(train, DataLoader(Images(64), bs=32, num_workers=0))
    spent = dict(ledger=0.)
    def timed(name, f):
        def inner(*args, **kwargs):
            start = time.perf_counter()
            try: return f(*args, **kwargs)
            finally: spent[name] += time.perf_counter() - start
        return inner
    for owner in ([], [MetaReweightCallback(DataLoader(Images(32), bs=16, num_workers=0))]):
        learn = Learner(dls, resnet18(num_classes=n_classes), loss_func=CrossEntropyLossFlat(), lr=1e-6, cbs=owner)
        learn.remove_cbs(ProgressCallback)
        learn.logger = noop
        if owner: # what is done for the ledger: to know the items, to see what the model says of them, and to add it up
            learn.item_ledger.after_loss = timed('ledger', learn.item_ledger.after_loss)
            Fit.see,BatchItems.items = timed('ledger', Fit.see),timed('ledger', BatchItems.items)
        seconds,start = [],[0.]
        class Watch(Callback):
            order,run_valid = -2000,False
            def before_batch(self): start[0] = time.perf_counter()
            def after_batch(self): seconds.append(time.perf_counter() - start[0])
        learn.fit(1, cbs=Watch())
        mean = sum(seconds[8:])/len(seconds[8:])
        what,ledger = 'step of ResNet-18' + (', reweighted' if owner else ', plain'),spent['ledger']/n_steps
        row = dict(what=what, n=n, ms_a_step=round(1e3*mean, 1))
        if owner: row |= dict(ledger_ms=round(1e3*ledger, 3), share_of_plain=f'{100*ledger/plain:.2f} %')
        yield row
        plain = mean

parts = {k.removeprefix('part_'): f for k,f in list(globals().items()) if k.startswith('part_')}

def as_table(rows, columns):
    "A table in Markdown."
    lines = [f'| {" | ".join(columns.values())} |', f'|{"---|"*len(columns)}']
    def text(o): return '' if o is None else f'{o:,}' if isinstance(o, (int, float)) else str(o)
    return '\n'.join(lines + [f'| {" | ".join(text(r.get(k)) for k in columns)} |' for r in rows])

def write(rows, machine, out):
    "The figures of all parts, as JSON and for people."
    (out/'large.json').write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + '\n')
    order = list(dict.fromkeys(o['what'] for o in rows))
    rows = sorted(rows, key=lambda o: (order.index(o['what']), o['n']))
    ledgers,steps,files = [[o for o in rows if k in o] for k in ('ledger_mb', 'ms_a_step', 'file_mb')]
    others = [o for o in rows if o not in steps]
    command = f'`python benchmarks/large.py`, on {machine}, shared with other work, which times suffer from.'
    (out/'large.md').write_text('\n\n'.join(['# Large data', command,
        '## The ledger',
        as_table(ledgers, dict(n='items', ledger_mb='MB', bytes_an_item='bytes an item', ms_a_batch='ms for a batch of 32')),
        as_table(files, dict(n='items', file_mb='checkpoint, MB')),
        '## Beside a step of ResNet-18 on 32 images of 64 x 64',
        as_table(steps, dict(what='what', n='items', ms_a_step='ms a step', ledger_ms='of these the ledger, ms',
            share_of_plain='ledger / plain step')),
        '## Time, and by how much memory grows at most',
        'Lines in parentheses are what fastai itself takes.',
        as_table(others, dict(what='what', n='items', seconds='seconds', peak_mb='MB'))]) + '\n')

@call_parse
def main(
    part:str='', # One part only, whose figures are printed
    n:int=0, # Number of items of that part
    only:str='', # Parts to measure, with commas between them; figures of others are kept from before; default: all
    sizes:str='100_000,1_000_000,10_000_000', # Numbers of items
    out:Path=Path('results'), # Folder for the results
):
    "Measure memory and time of what grows with the number of items."
    if part:
        torch.set_num_threads(1)
        set_seed(0)
        for row in parts[part](n): print(json.dumps(dict(part=part) | row), flush=True)
        return
    before = json.loads((out/'large.json').read_text())['rows'] if only and (out/'large.json').exists() else []
    machine = f'{os.cpu_count()} CPU cores ({platform.machine()}), one thread, torch {torch.__version__}, fastai {fastai.__version__}'
    rows = []
    for name in parts:
        if only and name not in only.split(','):
            rows += [o for o in before if o['part'] == name]
            continue
        for size in map(int, sizes.split(',')):
            command = [sys.executable, __file__, '--part', name, '--n', str(size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = [json.loads(o) for o in done.stdout.splitlines() if o.startswith('{')]
            rows += found
            for o in found: print(o, flush=True)
    write(rows, machine, out)
