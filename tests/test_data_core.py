"Splits, skew and label noise against what they promise, on many random data sets; held-out trusted items in real fits."
import random
from itertools import combinations
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import (CategoryBlock, ColReader, DataBlock, DataLoaders, EndSplitter, IndexSplitter, L, Learner, RandomSplitter,
    RandomSubsetSplitter, Transform, TransformBlock, noop, set_seed)
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.progress import ProgressCallback
from fastai.data.block import MultiCategoryBlock, RegressionBlock
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.data import TextBlock
from torch import nn

from fastai_l2rw.all import MetaReweightCallback
from fastai_l2rw.data.core import BalancedSplitter, MetaSplitter, hold_out_meta, imbalance, label_noise

def random_items(seed, n_groups=60, mixed=False):
    "A data set of groups of 1 to 6 items, each of one class, or with classes of their own for each item."
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), rng.integers(1, 7, n_groups))
    label = rng.choice(['nv', 'mel', 'df'], len(group) if mixed else n_groups, p=[0.6, 0.25, 0.15])
    return pd.DataFrame(dict(group=group, label=label if mixed else label[group])).sample(frac=1, random_state=seed).reset_index(drop=True)

@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('seed', range(10))
def test_parts_are_balanced_and_share_no_group(seed, mixed, capsys):
    df = random_items(seed, mixed=mixed)
    valid_splitter = RandomSplitter(0.2, seed=seed) if seed % 2 else BalancedSplitter(2, 'label', groups='group', seed=seed)
    parts = MetaSplitter(valid_splitter, 3, 'label', groups='group', seed=seed)(df)
    assert df.label[parts[2]].value_counts().to_dict() == dict(nv=3, mel=3, df=3)
    if not seed % 2: assert set(df.label[parts[1]].value_counts()) == {2}
    for a,b in combinations(parts, 2): assert not set(df.group[a]) & set(df.group[b])
    assert set(df.label[parts[0]]) == {'nv', 'mel', 'df'}
    in_parts = [i for o in parts for i in o]
    assert len(in_parts) == len(set(in_parts))
    if len(in_parts) < len(df): assert f'of {len(df)} items are left out' in capsys.readouterr().out
    left = df.drop(index=in_parts)
    assert set(left.group) <= set(df.group[[*parts[1], *parts[2]]]) # nothing is left out without need
    again = MetaSplitter(valid_splitter, 3, 'label', groups='group', seed=seed)(df)
    assert [list(o) for o in parts] == [list(o) for o in again]

def test_a_random_split_keeps_its_share_with_groups():
    df = pd.concat([random_items(s).assign(group=lambda d: d.group + 100*s) for s in range(20)], ignore_index=True)
    _,valid,_ = MetaSplitter(RandomSplitter(0.2, seed=0), 3, 'label', groups='group')(df)
    assert 0.16 < len(valid)/len(df) < 0.24

def test_singles_are_held_out_first_and_nothing_is_left_out_then():
    df = pd.DataFrame(dict(group=[*range(10), *[10]*6, *range(20, 30), *[30]*6], label=['a']*16 + ['b']*16))
    parts = MetaSplitter(EndSplitter(0.1), 5, 'label', groups='group')(df.iloc[::-1].reset_index(drop=True))
    assert sum(map(len, parts)) == len(df)

def test_few_large_groups_are_enough():
    "Two hospitals with many items of each class: one is held out, and gives all trusted items."
    df = pd.DataFrame(dict(hospital=['x']*40 + ['y']*20, label=['a', 'b']*30))
    train,_,meta = MetaSplitter(lambda o: (range(len(o)), []), 5, 'label', groups='hospital')(df)
    assert set(df.hospital[meta]) == {'y'} and len(meta) == 10 and set(df.hospital[train]) == {'x'} and len(train) == 40

@pytest.mark.parametrize('splitter, kwargs, error, says', [
    (RandomSplitter(seed=0), dict(meta_per_class=0), ValueError, 'meta_per_class=0 must be a whole number'),
    (RandomSplitter(seed=0), dict(meta_per_class=2.), ValueError, 'meta_per_class=2.0 must be a whole number'),
    (RandomSplitter(seed=0), dict(meta_per_class=50), ValueError, "there are only .* of 'b'"),
    (RandomSplitter(seed=0), dict(get_y='breed'), ValueError, "get_y='breed' must be a column"),
    (RandomSplitter(seed=0), dict(groups='holes'), ValueError, 'groups has no value for 2 of 60 items, at positions 0, 7'),
    (RandomSplitter(seed=0), dict(groups='one'), ValueError, "its .* items in the training part are in 1 group,"),
    (None, {}, TypeError, 'splitter is a NoneType'),
    (lambda o: ([0], [1], [2]), {}, ValueError, 'splitter makes 3 parts'),
    (lambda o: (range(60), range(5)), {}, ValueError, 'puts 5 items in both'),
    (IndexSplitter(range(40, 60)), {}, ValueError, "puts all items of 'b' into the validation part"),
])
def test_splitting_errors_help(splitter, kwargs, error, says):
    df = pd.DataFrame(dict(label=['a']*40 + ['b']*20, one=0, holes=[None if i in (0, 7) else i for i in range(60)]))
    with pytest.raises(error, match=says): MetaSplitter(splitter, **{**dict(meta_per_class=3, get_y='label'), **kwargs})(df)

def test_mixed_groups_that_leave_a_class_nothing_are_an_error():
    df = pd.DataFrame(dict(group=[0, 0, 0, 0, 1, 1, 2, 2], label=[*'aabb', *'aa', *'bb']))
    train,_,meta = MetaSplitter(lambda o: (range(8), []), 2, 'label', groups='group')(df)
    assert set(df.label[train]) == {'a', 'b'}
    with pytest.raises(ValueError, match='to train on'): MetaSplitter(lambda o: (range(6), []), 3, 'label', groups='group')(df)

def test_part_of_the_items_may_be_in_no_part():
    df = random_items(3)
    parts = MetaSplitter(RandomSubsetSplitter(0.5, 0.2, seed=0), 2, 'label')(df)
    assert sum(map(len, parts)) == int(len(df)*0.5) + int(len(df)*0.2)

def test_draws_neither_use_nor_move_the_random_streams():
    df = random_items(0)
    def draw():
        labels = df.label.tolist()
        parts = MetaSplitter(EndSplitter(0.3), 2, 'label', seed=4)(df)
        return [list(map(int, o)) for o in (*parts, imbalance(labels, step=2, seed=4), label_noise(labels, uniform=0.3, seed=4)[1])]
    set_seed(1)
    first = draw()
    state = random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(1)
    assert state == (random.random(), np.random.rand(), torch.rand(1).item())
    assert draw() == first

def test_paths_are_drawn_by_name():
    files = [Path(f'x/{o}/é {i}.jpg') for o in 'ab' for i in range(20)]
    split = MetaSplitter(lambda o: (range(len(o)), []), 3, lambda f: f.parent.name)
    shuffled = random.Random(0).sample(files, len(files))
    assert [files[i] for i in split(files)[2]] == [shuffled[i] for i in split(shuffled)[2]]

# --- loaders that exist already

def dataset_loaders(dl_type=None, dl_kwargs=None, y_block=CategoryBlock, n=80):
    label = np.array(['a', 'b', 'c'])[np.random.default_rng(0).choice(3, n, p=[0.6, 0.2, 0.2])]
    df = pd.DataFrame(dict(x=range(n), y=label, patient=np.arange(n)//2))
    class Jitter(Transform):
        split_idx = 0
        def encodes(self, x:torch.Tensor): return x + 1000 if x.is_floating_point() else x
    block = DataBlock((TransformBlock, y_block), get_x=lambda r: torch.tensor([float(r.x)]), get_y=ColReader('y'), splitter=EndSplitter(0.2), batch_tfms=Jitter())
    kwargs = {} if dl_kwargs is None else dict(dl_kwargs=dl_kwargs)
    return block.datasets(df).dataloaders(bs=8, num_workers=0, dl_type=dl_type, after_batch=block.batch_tfms, **kwargs)

def test_held_out_items_are_those_of_the_training_part_and_the_loaders_passed_stay():
    dls = dataset_loaders()
    before = dls.train, dls.valid, dls.train_ds.items.copy(), list(dls.loaders)
    held,meta_dl = hold_out_meta(dls, 3, seed=1)
    assert (dls.train, dls.valid) == before[:2] and dls.train_ds.items.equals(before[2]) and dls.loaders == before[3]
    meta = meta_dl.dataset.items
    assert meta.y.value_counts().to_dict() == dict(a=3, b=3, c=3)
    assert sorted([*meta.x, *held.train_ds.items.x]) == sorted(dls.train_ds.items.x)
    assert held.train.drop_last and held.train.shuffle and held.vocab == dls.vocab
    assert meta_dl.one_batch()[0].max() < 1000 <= held.one_batch()[0].min() # augmentation is for training
    again = hold_out_meta(dls, 3, seed=1)[1].dataset.items
    assert list(again.x) == list(meta.x) and list(hold_out_meta(dls, 3, seed=2)[1].dataset.items.x) != list(meta.x)

def test_held_out_groups_are_whole(capsys):
    dls = dataset_loaders()
    held,meta_dl = hold_out_meta(dls, 3, groups='patient')
    assert not set(held.train_ds.items.patient) & set(meta_dl.dataset.items.patient)
    out = len(dls.train_ds) - len(held.train_ds) - 9
    assert f'{out} of 64 items are left out' in capsys.readouterr().out
    by_row,_ = hold_out_meta(dls, 3, groups=dls.train_ds.items.patient.tolist(), get_y=lambda row: row.y)
    assert list(by_row.train_ds.items.x) == list(held.train_ds.items.x)
    with pytest.raises(ValueError, match='have items in both the training and the validation part'): hold_out_meta(dls, 3, groups='y')

def test_weights_of_a_sampler_follow_their_items():
    wgts = np.arange(64)**2.
    dls = dataset_loaders(WeightedDL, [dict(wgts=wgts), {}])
    held,_ = hold_out_meta(dls, 3)
    x = held.train_ds.items.x.to_numpy()
    assert np.allclose(held.train.wgts, wgts[x]/wgts[x].sum())
    dls = dataset_loaders(PartialDL, [dict(partial_n=16), {}])
    assert hold_out_meta(dls, 3)[0].train.partial_n == 16

def test_any_dataset_with_labels():
    data = [(torch.tensor([float(i)]), torch.tensor(i % 3)) for i in range(30)]
    dls = DataLoaders(DataLoader(data, bs=4, shuffle=True), DataLoader(data[:5], bs=4))
    held,meta_dl = hold_out_meta(dls, 2)
    meta = torch.cat([x for x,_ in meta_dl]).flatten().tolist()
    train = [o.item() for x,_ in held.train for o in x]
    assert sorted(meta + train) == list(range(30)) and sorted(i % 3 for i in meta) == [0, 0, 1, 1, 2, 2]

@pytest.mark.parametrize('y_block, says', [(MultiCategoryBlock, 'one value per item'), (RegressionBlock, None)])
def test_targets_that_are_no_classes(y_block, says):
    if says: dls = dataset_loaders(y_block=y_block)
    else:
        dls = DataLoaders(*[DataLoader([(torch.ones(1), torch.tensor(i/7)) for i in range(9)], bs=3)]*2)
        says = 'are numbers and not classes'
    with pytest.raises(ValueError, match=says): hold_out_meta(dls, 3)

def test_without_validation_items():
    data = [(torch.tensor([float(i)]), torch.tensor(i % 3)) for i in range(30)]
    for other in ([], [DataLoader([], bs=4)], [torch.utils.data.DataLoader(data)]):
        held,meta_dl = hold_out_meta(DataLoaders(DataLoader(data, bs=4, shuffle=True, drop_last=True), *other), 2)
        assert sum(len(x) for x,_ in meta_dl) == 6 and len(held.loaders) == 1 + len(other)

def test_what_are_no_dataloaders():
    with pytest.raises(TypeError, match='dls is a list'): hold_out_meta([], 3)
    with pytest.raises(TypeError, match='must be a loader of fastai'): hold_out_meta(DataLoaders(torch.utils.data.DataLoader([1])), 3)

def fit(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    learn.fit(2, 1e-2)
    assert all(np.isfinite(o) for o in learn.recorder.values[-1])

def test_reweighting_with_the_third_loader_of_a_datablock(tmp_path):
    df = random_items(0)
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda r: torch.tensor([float(r.group)]), get_y=ColReader('label'),
        splitter=MetaSplitter(RandomSplitter(seed=0), 3, 'label', groups='group'))
    dls = block.dataloaders(df, bs=16, num_workers=0)
    fit(Learner(dls, nn.Linear(1, 3), loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(), path=tmp_path))

def test_reweighting_of_tables(tmp_path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(age=rng.normal(size=90), job=rng.choice(['a', 'b'], 90), user=np.arange(90), income=['low']*60 + ['high']*30))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['job'], cont_names=['age'], y_names='income',
        y_block=CategoryBlock(), valid_idx=range(0, 90, 5), bs=16, path=tmp_path)
    held,meta_dl = hold_out_meta(dls, 4, groups='user')
    assert meta_dl.dataset.items.income.value_counts().tolist() == [4, 4]
    assert sorted([*held.train_ds.items.user, *meta_dl.dataset.items.user]) == sorted(dls.train_ds.items.user)
    fit(tabular_learner(held, layers=[8], cbs=MetaReweightCallback(meta_dl)))

def test_reweighting_of_texts(tmp_path):
    bad = np.arange(90) % 3 == 0
    df = pd.DataFrame(dict(text=[('bad' if o else 'good') + ' film very'*(i % 7) for i,o in enumerate(bad)], label=np.where(bad, 'neg', 'pos')))
    words = TextBlock(Transform(lambda r: L(r.text.split())), vocab=['xxunk', 'xxpad', 'good', 'bad', 'film', 'very'])
    dls = DataBlock((words, CategoryBlock), get_y=ColReader('label'), splitter=RandomSplitter(seed=0)).dataloaders(df, bs=16, num_workers=0)
    held,meta_dl = hold_out_meta(dls, 4)
    assert sorted([*held.train_ds.items.index, *meta_dl.dataset.items.index]) == sorted(dls.train_ds.items.index)
    assert held.train.res == [len(held.train_ds[i][0]) for i in range(len(held.train_ds))]
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(6, 4),nn.Linear(4, 2)
        def forward(self, x): return self.out(self.emb(x).mean(1))
    fit(Learner(held, Model(), loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(meta_dl), path=tmp_path))

# --- skew and wrong labels

@pytest.mark.parametrize('dominance', [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_dominance_counts(dominance):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    counts = np.bincount(y[imbalance(y, dominance=dominance, dominant=3)])
    other = round(500*(1 - dominance)/dominance/9)
    assert counts.tolist() == [500 if c == 3 else other for c in range(10)]

def test_tail_and_step_keep_the_proportions_that_uneven_counts_allow():
    y = np.repeat([0, 1, 2], [100, 30, 50])
    assert np.bincount(y[imbalance(y, tail=4)]).tolist() == [60, 30, 15] # 1 allows 60, 30, 15
    assert np.bincount(y[imbalance(y, step=2)]).tolist() == [60, 30, 30]
    assert np.bincount(y[imbalance(y, step=1)]).tolist() == [30, 30, 30]

def test_skew_among_some_items():
    y = np.tile([0, 1], 50)
    kept = imbalance(y, dominance=0.8, dominant=1, among=range(40))
    assert kept.max() < 40 and np.bincount(y[kept]).tolist() == [5, 20]
    mask = np.arange(100) < 40
    assert list(imbalance(y, dominance=0.8, dominant=1, among=mask)) == list(kept)

@pytest.mark.parametrize('kwargs, says', [
    (dict(dominance=0.9, tail=2), 'exactly one of dominance, tail, step, not dominance and tail'),
    (dict(dominance=1.), 'dominance=1.0 must be a share, between 0 and 1'),
    (dict(dominance=0.9, dominant='z'), "dominant='z' is an unknown class"),
    (dict(dominance=0.999), "dominance=0.999 can't be reached"),
    (dict(tail=10, dominant='a'), "goes with dominance, not with tail"),
    (dict(tail=0.1), 'tail=0.1 must be the ratio of the largest'),
    (dict(step='big'), "step='big' must be the ratio"),
    (dict(step=1e3), "step=1000.0 can't be reached"),
    (dict(tail=2, among=[0, 99]), 'among must hold positions from 0 to 29'),
    (dict(tail=2, among=[0, 1]), 'two classes or more'),
])
def test_skew_errors_help(kwargs, says):
    with pytest.raises(ValueError, match=says): imbalance(['a']*20 + ['b']*10, **kwargs)

@pytest.mark.parametrize('seed', range(5))
def test_noise_counts_are_exact(seed):
    rng = np.random.default_rng(seed)
    y = rng.choice(4, 400, p=[0.5, 0.3, 0.15, 0.05])
    T = rng.dirichlet(np.ones(4), 4)
    for kwargs,T in ((dict(uniform=0.35), np.full((4, 4), 0.35/3)), (dict(pair=0.2), 0.2*np.roll(np.eye(4), 1, 1)), (dict(matrix=T), T)):
        among = rng.choice(400, 300, replace=False)
        new,changed = label_noise(y, among=among, seed=seed, **kwargs)
        assert (changed == (new != y)).all() and not changed[np.setdiff1d(range(400), among)].any()
        for c in range(4):
            n,rates = (y[among] == c).sum(),np.where(np.arange(4) == c, 0, T[c])
            assert abs(changed[y == c].sum() - n*rates.sum()) <= 0.5 + 1e-9
            counts = np.bincount(new[among][y[among] == c], minlength=4)
            assert (np.abs(counts - n*rates)[np.arange(4) != c] <= 1 + 0.5).all()

def test_noise_with_names_and_a_named_matrix():
    y = ['a']*10 + ['bb']*10
    T = pd.DataFrame([[1, 0], [0.3, 0.7]], index=['bb', 'a'], columns=['bb', 'a'])
    new,changed = label_noise(y, matrix=T)
    assert list(new[10:]) == ['bb']*10 and changed.sum() == 3 and list(new[changed]) == ['bb']*3
    new,_ = label_noise(y, uniform=0.2, classes=['a', 'bb', 'a long name'])
    assert 'a long name' in set(new)

@pytest.mark.parametrize('kwargs, says', [
    ({}, 'exactly one of'),
    (dict(uniform=-0.1), 'uniform=-0.1 must be a share'),
    (dict(background=0.1), 'to=None must be the class that background flips to'),
    (dict(uniform=0.1, to='a'), "to='a' must be the class that background flips to, and goes with background only"),
    (dict(matrix=np.eye(3)), 'a row and a column for each of the 2 classes a, b, and has the shape'),
    (dict(given=['a']), 'given must have a label for each of the 30 items, and has 1'),
    (dict(given=['a']*29 + [None]), 'given has unknown classes for 1 items, None'),
    (dict(uniform=0.1, classes=['a']), 'labels has unknown classes, b'),
])
def test_noise_errors_help(kwargs, says):
    with pytest.raises(ValueError, match=says): label_noise(['a']*20 + ['b']*10, **kwargs)
