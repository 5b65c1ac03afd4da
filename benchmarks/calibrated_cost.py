"""What epochs cost with `calibrate=True`, beside the paper's method and plain training.

A ResNet-18 is trained on random images, plainly, by the paper's method and with `calibrate=True`, each for fits of three epochs that take turns
in one process. The first epoch needs alignments as the paper's method does, and its end has the first judgement. In later epochs a trusted batch is
learned from instead:

    python benchmarks/calibrated_cost.py
"""
import os, time
from functools import partial
from pathlib import Path

import fastai, pandas as pd, torch
from fastai.basics import Callback, DataLoaders, Learner, SGD, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.data.core import TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastcore.script import call_parse
from torchvision.models import resnet18

from fastai_l2rw.all import *

SCHEMES = {'plain': None, "the paper's method": dict(), 'calibrated': dict(calibrate=True)}

class Timer(Callback):
    "Times each epoch, the judgement at its end among it."
    order,run_valid = 1000,False
    def before_fit(self): self.seconds = []
    def before_train(self): self.start = time.perf_counter()
    def after_train(self): self.seconds.append(time.perf_counter() - self.start)

@call_parse
def main(
    items:int=512, # Number of training items
    trusted:int=70, # Number of trusted ones
    size:int=112, # Height and width of the images
    bs:int=32, # Batch size; a trusted batch has half as many
    turns:int=3, # Number of fits of each
    threads:int=2, # Number of threads
    out:Path=Path('results/calibrated_cost.md'), # Where the table goes
):
    "Write a table of medians."
    torch.set_num_threads(threads)
    set_seed(0)
    def loader(n, bs, **kwargs): return TfmdDL([(torch.randn(3, size, size), torch.tensor(i % 7)) for i in range(n)], bs=bs, num_workers=0, **kwargs)
    dls,meta_dl = DataLoaders(loader(items, bs, shuffle=True, drop_last=True), loader(2, 2), device='cpu'),loader(trusted, bs//2, shuffle=True)
    rows = []
    for turn in range(turns):
        for name,options in SCHEMES.items():
            set_seed(0)
            cbs = [] if options is None else [MetaReweightCallback(meta_dl, **options)]
            learn = Learner(dls, resnet18(num_classes=7), CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), cbs=[Timer(), *cbs])
            learn.remove_cb(ProgressCallback)
            with learn.no_logging(): learn.fit(3, 1e-3)
            rows += [dict(turn=turn, scheme=name, epoch='first' if k == 0 else 'later', number=k, seconds=s) for k,s in enumerate(learn.timer.seconds)]
            print(turn, name, [round(o, 2) for o in learn.timer.seconds], flush=True)
    df = pd.DataFrame(rows)
    plain = df[df.scheme == 'plain'].set_index(['turn','number']).seconds
    df['ratio'] = [r.seconds/plain[r.turn, r.number] for r in df.itertuples()]
    lines = ['# What `calibrate=True` costs', '', f'`python benchmarks/calibrated_cost.py --items {items} --trusted {trusted} --size {size} --bs {bs} --turns {turns}`', '',
        f'ResNet-18, {size} x {size} pixels, n = {bs}, m = {bs//2}, {items} items and {trusted} trusted ones, of which the end of an epoch needs three passes. '
        f'{os.cpu_count()} CPU cores, {threads} threads, torch {torch.__version__}, fastai {fastai.__version__}. Epochs over those of plain training in the same turn, '
        'medians (smallest to largest).', '', '| | first epoch | later epochs | fit of three |', '|---|---|---|---|']
    cell = lambda o: f'{o.median():.2f} ({o.min():.2f} to {o.max():.2f})'
    whole = df.groupby(['scheme','turn']).seconds.sum()
    for name in SCHEMES:
        g = df[df.scheme == name]
        lines.append(f"| {name} | {cell(g[g.epoch == 'first'].ratio)} | {cell(g[g.epoch == 'later'].ratio)} | {cell(whole[name]/whole['plain'])} |")
    out.write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
