"""How many trusted examples are enough, and what a wrong one among them costs.

Trains a small network on features by the preset 'robust', with the same split, the same wrong labels and the same initial weights for each
row; only the trusted examples differ, and no row trains on any of them. Three are among the five, and so on. By itself it takes the
handwritten digits of scikit-learn, one of them dominant (about two minutes on one core):

    python benchmarks/trusted_examples.py

A file of your own is given with `--features`: `np.savez(name, X=features, y=labels)`, of shapes (n, d) and (n,).
"""
from pathlib import Path

import fastai, numpy as np, pandas as pd, torch
from fastai.basics import DataLoaders, Learner, set_seed
from fastai.callback.all import ProgressCallback # which brings what a Learner is patched with
from fastai.data.core import TfmdDL
from fastcore.script import call_parse
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from fastai_l2rw.all import *

SIZES,WRONG = (3, 5, 10, 20, 50),(1, 2)

def read_data(features):
    "Features, scaled, and labels from 0."
    if features is None: X,y = load_digits(return_X_y=True)
    else: X,y = (np.load(features)[k] for k in ('X', 'y'))
    X = X - X.mean(0)
    return torch.tensor(X/np.sqrt((X.std(0)**2).mean()), dtype=torch.float32),np.unique(y, return_inverse=True)[1]

def split(X, y, seed, noise, sizes, dominance):
    "Positions of test and training items, the labels given to training items, and by row the trusted items with their labels."
    rng,classes = np.random.default_rng(seed),range(y.max() + 1)
    fixed = np.random.default_rng(0)
    order = {c: fixed.permutation(np.flatnonzero(y == c)) for c in classes}
    test = np.concatenate([o[:len(o)//4] for o in order.values()])
    pool = {c: rng.permutation(o[len(o)//4:]) for c,o in order.items()}
    held = max(sizes) + max(WRONG) # trusted items come from a reserve, so that the training part is the same for all rows
    reserve = np.concatenate([o[:held] for o in pool.values()])
    train = np.concatenate([o[held:] for o in pool.values()])
    if dominance: train = train[imbalance(y[train], dominance=dominance, dominant=0)]
    given = y.copy()
    for o in (train, reserve): given[o] = label_noise(y[o], uniform=noise, classes=list(classes), seed=seed)[0]
    rows = {f'{k} of each class': [(i, c) for c in classes for i in pool[c][:k]] for k in sizes}
    others = {c: rng.permutation([o for o in classes if o != c]) for c in classes}
    for n in WRONG: # of another class each
        rows[f'10 of each class, {n} of these wrong'] = [(i, c) for c in classes for i in pool[c][:10 - n]] + \
            [(pool[o][max(sizes) + j], c) for c in classes for j,o in enumerate(others[c][:n])]
    looks = {c: list(rng.permutation(reserve[given[reserve] == c])) for c in classes}
    drawn = [i for o in looks.values() for i in o[:10]]
    rows['10 of each class by the labels as given, unchecked'] = [(i, given[i]) for i in drawn]
    rows['these, looked at and corrected'] = [(i, y[i]) for i in drawn]
    rows['10 likely and different ones by the labels as given, looked at and corrected'] = [(i, y[i])
        for c,o in looks.items() for i in likely(X, given, train, o, c, 10, seed)]
    return test,train,given,rows

def likely(X, given, train, items, c, k, seed):
    """k of the items with the label c: of the half whose label a quick look finds likelier, those in the middle of k groups. The quick look
    is a linear classifier on the features, fitted to the training part."""
    items = np.array(items)
    quick = LogisticRegression(C=0.01, max_iter=200).fit(X[train], given[train])
    items = items[np.argsort(-quick.predict_proba(X[items])[:, c])][:max(k, len(items)//2)]
    groups = KMeans(k, n_init=1, random_state=seed).fit(X[items].numpy())
    distance = groups.transform(X[items].numpy())
    return [items[np.where(groups.labels_ == g, distance[:, g], np.inf).argmin()] for g in range(k)]

def loader(X, y, positions, labels, **kwargs):
    return TfmdDL([(X[i], torch.tensor(int(c))) for i,c in zip(positions, labels)], bs=64, num_workers=0, **kwargs)

def score(X, y, parts, scheme, trusted, seed, epochs, lr):
    "Balanced accuracy on test items."
    test,train,given,_ = parts
    train = np.random.default_rng(seed).permutation(train)
    set_seed(seed)
    dls = DataLoaders(loader(X, y, train, given[train], shuffle=True, drop_last=True), loader(X, y, test, y[test]), device='cpu')
    dls.c = int(y.max()) + 1
    meta_dl = None if trusted is None else loader(X, y, *zip(*trusted))
    model = nn.Sequential(nn.Linear(X.shape[1], 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, dls.c))
    learn = Learner(model=model, metrics=BalancedAccuracy(), **weighting_scheme(scheme, dls, meta_dl))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
        return 100*learn.validate()[1]

@call_parse
def main(
    features:Path=None, # File of features and labels; default: scikit-learn's digits
    name:str='digits', # What the data are called in the table
    noise:float=0.4, # Share of the training labels that are wrong
    dominance:float=0.3, # Share of the first class among the training items; 0 leaves them as they are
    sizes:str='3,5,10,20,50', # Numbers of trusted items of each class, with commas between them; 10 must be one
    seeds:int=10, # Number of seeds
    epochs:int=40, # Number of epochs
    lr:float=0.003, # Highest learning rate
    out:Path=Path('results'), # Folder for the result
):
    "Train with different trusted examples, and write trusted_examples.md, or trusted_examples_NAME.md for a file of your own."
    torch.set_num_threads(1)
    (X,y),found,counts = read_data(features),{},np.array(list(map(int, sizes.split(','))))
    for seed in range(seeds):
        parts = split(X, y, seed, noise, counts, dominance)
        found.setdefault('none: a weighted sampler', []).append(score(X, y, parts, 'weighted sampler', None, seed, epochs, lr))
        for row,trusted in parts[-1].items(): found.setdefault(row, []).append(score(X, y, parts, 'robust', trusted, seed, epochs, lr))
        print(seed, {k: round(v[-1], 1) for k,v in found.items()}, flush=True)
    table,base = pd.DataFrame(found),'10 of each class'
    spread = lambda o: f'{o.mean():.1f} ± {o.std():.1f}'
    given = dict(features=features and features.name, name=name, noise=noise, dominance=dominance, sizes=sizes, seeds=seeds,
        epochs=epochs, lr=lr)
    options = ' '.join(f'--{k} {v}' for k,v in given.items() if v is not None)
    train = split(X, y, 0, noise, counts, dominance)[1]
    lines = [f'# Trusted examples: {name}', '', f'`python benchmarks/trusted_examples.py {options}`',
        f'with torch {torch.__version__}, fastai {fastai.__version__}.', '',
        f'A network with one hidden layer on {X.shape[1]} features, {len(train)} training items of {y.max() + 1} classes, '
        f'{noise:.0%} of the labels wrong. The trusted items are not trained on. '
        f'Balanced accuracy on test items in %, mean ± standard deviation over {seeds} seeds; differences are of the same seed.', '',
        f'| trusted | balanced accuracy | difference to {base} |', '|---|---|---|',
        *(f'| {k} | {spread(v)} | {"" if k == base else spread(v - table[base])} |' for k,v in table.items())]
    out.mkdir(exist_ok=True)
    (out/('trusted_examples.md' if features is None else f'trusted_examples_{name}.md')).write_text('\n'.join(lines) + '\n')
