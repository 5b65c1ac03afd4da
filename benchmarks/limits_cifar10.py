"""How well do alignments tell wrong labels from right ones, and what keeps them from doing better?

A small network learns CIFAR-10 with one class at 70 % and 40 % of all labels wrong. Then each training example is aligned with trusted images:
those that the training had, and others that it never saw, few and many. The measure is the area under the ROC curve, 0.5 for chance, within the items of a
label, and the mean over the labels. Run from the repository root (about two minutes for a seed and scheme on one core):

    python benchmarks/limits_cifar10.py my_data/cifar10
"""
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, torch, torch.nn.functional as F
from fastai.basics import Learner, SGD, set_seed
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.vision.core import cifar_stats
from fastcore.script import call_parse, store_true
from sklearn.metrics import roc_auc_score
from torch.func import functional_call, grad, jvp

from fastai_l2rw.all import *
from fastai_l2rw.data.cifar10 import ShiftFlip, cifar10_table
from fastai_l2rw.studies.training import fit_schedule, kept_dls, variant_parts, variants, versions
from fastai_l2rw.studies.cifar10 import decoded_images, report_cnn
from fastai_l2rw.weighers import output_gradient_norms, relative_alignments

cross_entropy = partial(F.cross_entropy, reduction='none')

def whole(df, images, vocab):
    "Inputs and labels of all rows, not augmented."
    x = torch.stack([images[str(o)] for o in df.path]).float()/255
    mean,std = (torch.tensor(o)[:, None, None] for o in cifar_stats)
    return (x - mean)/std,torch.tensor([vocab.o2i[o] for o in df.label])

def relative_to(model, x, y, trusted):
    "Alignments of items with the gradient on trusted ones, divided by the lengths of the gradients at the output."
    params = dict(model.named_parameters())
    direction = grad(lambda p: F.cross_entropy(functional_call(model, p, trusted[0]), trusted[1]))(params)
    along = lambda x, y: jvp(lambda p: cross_entropy(functional_call(model, p, x), y), (params,), (direction,))[1]
    u = torch.cat([along(*o) for o in zip(x.split(500), y.split(500))]).detach()
    with torch.no_grad(): output = model(x)
    return relative_alignments(u, output_gradient_norms(cross_entropy, output, y))

def measure(path, name, seed, augment, lr, epochs):
    "What is to be known after a training by a scheme."
    df = cifar10_table(path, dominance=0.7, dominant='airplane', noise=0.4, subset=0.56, meta_per_class=5, valid_per_class=300, seed=seed)
    images = decoded_images(df.path)
    set_seed(seed)
    dls = kept_dls(df, images, 50, [IntToFloatTensor(), *([ShiftFlip()] if augment else []), Normalize.from_stats(*cifar_stats)])
    parts = variant_parts(variants[name], dls, dls[2].new(bs=50))
    set_seed(seed)
    learn = Learner(model=report_cnn(10), opt_func=partial(SGD, mom=0.9, wd=0.), **parts)
    with learn.no_bar(), learn.no_logging(): fit_schedule(learn, epochs, lr, 'cosine')
    model = learn.model.eval()
    rows = {o: df[df.part == o] for o in ('train', 'meta', 'valid')}
    train,own,other = (whole(o, images, dls.vocab) for o in rows.values())
    right,label = (rows['train'].label == rows['train'].clean).to_numpy(),rows['train'].label.to_numpy()
    auc = lambda score: 100*np.mean([roc_auc_score(right[label == c], score[label == c]) for c in set(label)])
    with torch.no_grad(): scores = [model(x) for x,_ in (train, own, other)]
    losses = [cross_entropy(z, y) for z,(_,y) in zip(scores, (train, own, other))]
    facts = {'accuracy on others, %': 100*(scores[2].argmax(1) == other[1]).float().mean().item(), 'loss on trusted': losses[1].mean().item(), 'on others': losses[2].mean().item(),
        'AUC of the loss': auc(-losses[0]), 'of alignments with the trusted': auc(relative_to(model, *train, own))}
    for k in (5, 20, 100):
        draws = [torch.cat([(other[1] == c).nonzero().flatten()[i*k:(i + 1)*k] for c in range(10)]) for i in range(3)]
        facts[f'with {k} others per class'] = np.mean([auc(relative_to(model, *train, [o[i] for o in other])) for i in draws])
    return facts

@call_parse
def main(
    path:Path, # Folder of CIFAR-10
    seeds:int=3, # Number of seeds
    lr:float=0.01, # Learning rate
    epochs:int=30, # Number of epochs
    schemes:str='weighted sampler,robust,robust margin 3', # Names in `variants`, with commas between them
    not_augmented:store_true=False, # Train without shifted and mirrored images?
    out:Path=Path('results/limits_cifar10.md'), # File of the result
):
    "Train by each scheme, and write what its alignments tell."
    table = {}
    for name in schemes.split(','):
        df = pd.DataFrame([measure(path, name, seed, not not_augmented, lr, epochs) for seed in range(seeds)])
        digits = [2 if o.startswith(('loss', 'on')) else 1 for o in df]
        table[name] = {o: f'{df[o].mean():.{d}f}' + (f' ± {df[o].std():.{d}f}' if seeds > 1 else '') for o,d in zip(df, digits)}
        print(name, table[name], flush=True)
    df = pd.DataFrame(table).T
    command = f'python benchmarks/limits_cifar10.py ... --seeds {seeds} --lr {lr} --epochs {epochs} --schemes \'{schemes}\'' + (' --not_augmented' if not_augmented else '')
    lines = ['# What alignments tell of wrong labels', '', f'`{command}`', ', '.join(f'{k} {v}' for k,v in versions().items()) + f', mean ± standard deviation over {seeds} seeds.', '',
        'CIFAR-10, one class at 70 %, 40 % of the labels wrong, 5 trusted images per class. AUC in %: how well right labels are told from wrong ones within the items of a label; 50 is chance.', '',
        '| | ' + ' | '.join(df) + ' |', '|---'*(1 + df.shape[1]) + '|', *('| ' + ' | '.join([i, *row]) + ' |' for i,row in zip(df.index, df.values))]
    out.write_text('\n'.join(lines) + '\n')
