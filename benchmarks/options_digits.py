"""What each option of the callback is worth on the demo's digits, at a small and at a large learning rate, and what augmentation changes.

The data are those of `l2rw_demo`: handwritten digits, one of them dominant, 35 % of the labels wrong, three trusted digits of each class.
All options get the same splits, initial weights and numbers of steps. Run from the repository root (about ten minutes on one core):

    python benchmarks/options_digits.py
"""
from pathlib import Path

import fastai, numpy as np, pandas as pd, torch, torch.nn.functional as F
from fastai.basics import Learner, set_seed
from fastai.layers import ConvLayer
from fastai.vision.augment import RandTransform
from fastcore.script import call_parse
from torch import nn

from fastai_l2rw.all import *
from fastai_l2rw.studies.demo import digits_data
from fastai_l2rw.studies.training import variant_parts, variants

class Shift(RandTransform):
    "Shift each image of a training batch by up to one pixel in each direction."
    def encodes(self, x:torch.Tensor):
        if x.ndim != 4: return x # the labels
        padded,(h,w) = F.pad(x, [1]*4),x.shape[-2:]
        return torch.stack([o[:, i:i + h, j:j + w] for o,(i,j) in zip(padded, torch.randint(3, (len(x), 2)).tolist())])

AUGMENTED = ('weighted sampler', 'robust', 'robust margin 3')
NAMES = ('weighted sampler', 'reweighted', 'reweighted + sampler', 'robust', 'robust margin', 'robust margin 3', 'robust margin not relative', 'calibrated')

def score(name, lr, seed, epochs, augmented):
    "Balanced accuracy on test digits."
    dls = digits_data(seed).dataloaders()
    if augmented: dls.loaders = [dl.new(after_batch=[Shift(p=1.)]) for dl in dls.loaders]
    parts = variant_parts(variants[name], dls, dls.loaders[2])
    set_seed(seed)
    model = nn.Sequential(ConvLayer(1, 32), ConvLayer(32, 64, stride=2), ConvLayer(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    learn = Learner(model=model, metrics=BalancedAccuracy(), **parts)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
        return learn.validate()[1]

@call_parse
def main(
    seeds:int=3, # Number of seeds
    epochs:int=40, # Number of epochs
    lrs:str='0.003,0.01', # Learning rates, with commas between them
    out:Path=Path('results'), # Folder for the result
):
    "Train by every option, and write results/options_digits.md."
    table = {}
    for name,augmented in [(o, False) for o in NAMES] + [(o, True) for o in AUGMENTED]:
        row = name + (', augmented' if augmented else '')
        for lr in map(float, lrs.split(',')):
            a = 100*np.array([score(name, lr, seed, epochs, augmented) for seed in range(seeds)])
            table.setdefault(f'learning rate {lr}', {})[row] = f'{a.mean():.1f} ± {a.std(ddof=1):.1f}' if seeds > 1 else f'{a.mean():.1f}'
            print(row, lr, table[f'learning rate {lr}'][row], flush=True)
    df = pd.DataFrame(table)
    lines = ['# Options on the digits of the demo', '', f'`python benchmarks/options_digits.py --seeds {seeds} --epochs {epochs} --lrs {lrs}`',
        f'with torch {torch.__version__}, fastai {fastai.__version__}.', '', f'Balanced accuracy on test digits in %, mean ± standard deviation over {seeds} seeds. '
            'Augmented: training images are shifted by up to one pixel.', '',
        '| | ' + ' | '.join(df) + ' |', '|---'*(1 + df.shape[1]) + '|', *('| ' + ' | '.join([i, *row]) + ' |' for i,row in zip(df.index, df.values))]
    out.mkdir(exist_ok=True)
    (out/'options_digits.md').write_text('\n'.join(lines) + '\n')
