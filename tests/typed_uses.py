"Typical uses of the public interface, for mypy alone: nothing here is run (test_project.py)."
from collections.abc import Iterable
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import Tensor, nn

from fastai_l2rw.all import (BalancedAccuracy, ClassRecall, MetaReweightCallback, MetaSplitter, MetaWeightNetCallback, cifar10_dls,
    example_weights, ham10000_dls, hold_out_meta, imbalance, label_noise, show_distribution, verify, weighted_sampler,
    weighting_scheme, weighting_schemes)
from fastai_l2rw.studies.commands import l2rw_cifar10, l2rw_demo
from fastai_l2rw.studies.grids import Grid, Results, run_grid

def a_learner(dls:DataLoaders, model:nn.Module)->pd.DataFrame:
    held,meta_dl = hold_out_meta(dls, 5, get_y='label', groups=None, seed=1)
    cb = MetaReweightCallback(meta_dl, engine='auto', params=lambda m: m[-1].parameters(), lookahead='sgd', every=4, start=1,
        on_zero='uniform', relative=True, margin=1., skip_zeros=False, autocast=False, record=True)
    learn = Learner(held, model, metrics=[BalancedAccuracy(), *ClassRecall(['cat', 'dog'])], cbs=[cb])
    learn.fit(1)
    show_distribution(held).savefig('parts.png')
    weights:pd.DataFrame = cb.item_weights()
    return weights

def by_name(dls:DataLoaders, meta_dl:Iterable)->Learner:
    names:list[str] = list(weighting_schemes)
    return Learner(model=nn.Linear(2, 2), **weighting_scheme(names[0], dls, meta_dl, margin=3.))

def a_loop_of_ones_own(model:nn.Module, x:Tensor, y:Tensor, meta_x:Tensor, meta_y:Tensor)->Tensor:
    loss_func = nn.CrossEntropyLoss(reduction='none')
    weights:Tensor = example_weights(model, loss_func, (x, y), (meta_x, meta_y))
    return (weights*loss_func(model(x), y)).sum()

def data(path:Path)->tuple[DataLoaders,DataLoaders]:
    labels = np.array(list('aabbc'))
    keep:np.ndarray = imbalance(labels, tail=10, seed=0)
    noisy,wrong = label_noise(labels[keep], uniform=0.4, among=[0, 1])
    shares:float = wrong.mean() + len(noisy)
    problems:pd.DataFrame = verify(path, save='usable.csv', progress=shares > 0)
    splitter = MetaSplitter(lambda o: ([0], [1]), 3, 'label')
    splitter(problems)
    weighted_sampler(cifar10_dls(path))
    skewed = cifar10_dls(path, dominance=0.9, noise=dict(pair=0.2), bs=64, device=torch.device('cpu'))
    return skewed,ham10000_dls(str(path), meta_per_class=3)

def comparisons(out:Path)->int:
    grid = Grid(dict(f=dict(s={})), dict(f=('s', {})), ['reweighted'], range(3), [0.1])
    l2rw_demo(seeds=1, out=out)
    l2rw_cifar10(path=out, quick=True, lrs='0.1', jobs=2)
    return run_grid(grid, lambda cell: dict(valid_balanced_accuracy=1.), out, threads=1) + len(Results(out).frame())

callback:type = MetaWeightNetCallback
