"""What an epoch of real training costs with example weights, as a ratio to a plain one.

The cost of `skip_zeros` depends on how many weights are zero, which only training tells: the report's network learns
CIFAR-10 with a dominant class, plainly and with the callback's options, each for itself. They take turns, an epoch
each, in one process, and the ratio is that of each turn. Another training, by the exact weights, tells how well those of
the options that change them would have agreed with them in the same step. Run from the repository root:

    python benchmarks/epoch_cost.py path/to/cifar10
"""
import json, os, platform, time
from functools import partial
from pathlib import Path

import fastai, numpy as np, pandas as pd, torch
from fastai.basics import Callback, Learner, SGD, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.data.transforms import Normalize
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import cifar_stats
from fastcore.script import call_parse

from fastai_l2rw.all import *
from fastai_l2rw.reweight import rectify
from fastai_l2rw.studies.cifar10 import report_cnn
import fastai_l2rw.engines.routes
from fastai_l2rw.engines.routes import separate_pass
from fastai_l2rw.weighers import AlignmentWeigher

fastai_l2rw.engines.routes.is_compared = lambda n: n == 0 # here each epoch is a fit of its own, and fits are long: those at 1, 4, 16, 64, ... take no share worth mentioning

def head(model): return model[-1].parameters()

OPTIONS = {'plain': None, 'exact': dict(), 'skip_zeros': dict(skip_zeros=True), 'every=4': dict(every=4), 'skip_zeros, every=4': dict(skip_zeros=True, every=4), 'params=head': dict(params=head)}
BOUNDS = { # in plain epochs, for a ratio r = m/n and a share f of positive weights
    'exact': lambda r, f: 5/3 + r, 'skip_zeros': lambda r, f: 1 + f + r, 'every=4': lambda r, f: 5/3 + r/4, 'skip_zeros, every=4': lambda r, f: 1 + f + r/4}

class Timer(Callback):
    "Times the training part of an epoch, without what comes before its first batch."
    order,run_valid = 1000,False
    def after_batch(self):
        if self.iter == 0: self.start = time.perf_counter()
    def after_train(self): self.seconds = time.perf_counter() - self.start

class Comparing(AlignmentWeigher):
    "Weighs exactly, and notes how weights along the head only, and those by a trusted gradient of up to three steps before, correlate with that."
    def __init__(self, correlations):
        super().__init__()
        self.correlations,self.kept = correlations,None

    def direction(self, step, fit):
        n,direction = self.n,super().direction(step, fit)
        if n % 4 == 0 or self.kept is None: self.kept = direction
        others = {k: direction[k] for k in list(direction)[-2:]},self.kept
        self.others = [separate_pass(fit.model, fit.losses.training, step.batch, d).alignments for d in others]
        return direction

    def weights(self, alignments, step, fit):
        exact = super().weights(alignments, step, fit)
        for k,u in zip(('params=head','every=4'), self.others):
            self.correlations[k].append(torch.corrcoef(torch.stack([exact, fit.normalise(rectify(u))]))[0, 1])
        return exact

class Agreement(MetaReweightCallback):
    "Trains by exact weights that are compared."
    def make_weigher(self, searching):
        self.correlations = {'params=head': [], 'every=4': []}
        return Comparing(self.correlations)

def learner(dls, options, cls=MetaReweightCallback):
    set_seed(0)
    learn = Learner(dls, report_cnn(10), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), cbs=[Timer(), *([] if options is None else [cls(**options)])])
    learn.remove_cbs(ProgressCallback)
    return learn

@call_parse
def main(
    path:Path, # Folder of CIFAR-10
    dominance:float=0.9, # Share of the training set that one class makes up
    bs:int=100, # Batch size; a trusted batch has 50 images
    epochs:int=20, # Number of epochs that each is trained
    lr:float=0.01, # Learning rate
    threads:int=1, # Number of threads; more do not pay for so small a network
    out:Path=Path('results'), # Folder for the results
):
    "Compare epochs, and write results/epoch_cost.json and results/epoch_cost.md."
    torch.set_num_threads(threads)
    dls = cifar10_dls(path, dominance=dominance, meta_per_class=5, bs=bs, batch_tfms=[Normalize.from_stats(*cifar_stats)])
    learners,rows = {k: learner(dls, o) for k,o in OPTIONS.items()},[]
    for epoch in range(epochs):
        for k,learn in learners.items():
            with learn.no_logging(), learn.no_bar(): learn.fit(1, lr)
            log = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
            rows.append(dict(epoch=epoch, variant=k, seconds=learn.timer.seconds, positive=1 - log.get('zero_weights', 0)))
        print(f'epoch {epoch}:', {o['variant']: round(o['seconds'], 2) for o in rows[-len(learners):]}, flush=True)
    judge = learner(dls, dict(engine='forward'), Agreement)
    with judge.no_logging(), judge.no_bar(): judge.fit(epochs, lr)
    correlations = {k: float(torch.stack(o).nanmean()) for k,o in judge.agreement.correlations.items()}
    df = pd.DataFrame(rows)
    seconds,positive = [df.pivot(index='epoch', columns='variant', values=o) for o in ('seconds', 'positive')]
    r,results = 50/bs,[]
    for k in OPTIONS:
        ratio,f = seconds[k]/seconds.plain,positive[k]
        bound = BOUNDS[k](r, f) if k in BOUNDS else None
        results.append(dict(variant=k, positive=round(float(f.mean()), 3), bound=None if bound is None else round(float(np.mean(bound)), 3),
            ratio=[round(float(o), 3) for o in np.quantile(ratio, (0.25, 0.5, 0.75))], over_bound=None if bound is None else round(float((ratio/bound).median()), 3), correlation=correlations.get(k)))
    machine = f'{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}, fastai {fastai.__version__}, Python {platform.python_version()}'
    what = f"CIFAR-10, one class at {dominance:.0%}, the report's network, n = {bs}, m = 50, SGD with learning rate {lr}, {epochs} epochs of {len(dls.train)} steps"
    lines = ['# What an epoch costs', '', f'`python benchmarks/epoch_cost.py ... --dominance {dominance} --bs {bs} --epochs {epochs} --lr {lr}`', f'on {machine}.', '',
        f'{what}. Epochs over plain ones, medians (and quartiles) of {epochs} turns; f is the share of positive weights, correlation that with the exact weights of the same step, on average.', '',
        '| | f | time | bound | time over bound | correlation |', '|---|---|---|---|---|---|']
    number = lambda o: '' if o is None else f'{o:.2f}'
    lines += [f"| {o['variant']} | {o['positive']:.2f} | {o['ratio'][1]:.2f} ({o['ratio'][0]:.2f} to {o['ratio'][2]:.2f}) | {number(o['bound'])} | {number(o['over_bound'])} | {number(o['correlation'])} |" for o in results]
    out.mkdir(exist_ok=True)
    (out/'epoch_cost.json').write_text(json.dumps(dict(what=what, machine=machine, results=results), indent=1) + '\n')
    (out/'epoch_cost.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
