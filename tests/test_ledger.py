"What was seen of each item: which items are in a batch, for every kind of loader, and what is kept of them."
import copy, multiprocessing, pickle, random, warnings
from contextlib import nullcontext
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import (Callback, DataLoader, DataLoaders, Datasets, Learner, MSELossFlat, SkipItemException, TfmdDL, load_learner, noop,
    set_seed)
from fastai.callback.all import CutMix, MixUp, PartialDL, ProgressCallback, WeightedDL
from fastai.callback.schedule import lr_find # noqa: F401, which gives Learner a method
from fastai.tabular.core import TabDataLoader, TabularPandas, TabWeightedDL
from fastai.text.data import LMDataLoader, SortedDL
from fastcore.basics import chunked
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, IterableDataset

from fastai_l2rw.data.cifar10 import DecodedDL, WeightedDecodedDL
from fastai_l2rw.ledger import BatchItems, ItemLedger, Ledger, Mixing, credited, evidence_of, tells_items

n_items = 43
positions = list(range(n_items)) # items that carry their own position

class Holes:
    "Items that are their own positions; some can't be read."
    def __init__(self, missing, n=n_items): self.missing,self.n = set(missing),n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i in self.missing: raise SkipItemException
        return int(i)

class Texts:
    "Texts of different lengths, that consist of their own position."
    def __len__(self): return n_items
    def __getitem__(self, i): return (torch.full((1 + i*7 % 5,), int(i)),)

def in_batch(b):
    "The positions of the items in a batch, as the batch itself has them."
    if isinstance(b, (tuple, list)): b = b[1 if len(b) == 3 else 0] # tabular: categories, numbers, targets
    return b.reshape(len(b), -1)[:, 0].long().tolist()

def follow(dl, told=None):
    "Pairs of what is told and what is in the batch, for a pass over `dl`."
    told = told or BatchItems(dl)
    found = []
    for i,b in enumerate(dl):
        truth = in_batch(b)
        items = told.items(i, len(truth))
        assert items is None or items.dtype == torch.long
        assert items is not None or told.why.startswith('the training loader, ')
        found.append((None if items is None else items.tolist(), truth))
    return found

def check_right(dl, n_passes=2):
    for _ in range(n_passes):
        found = follow(dl)
        assert found and all(a == b for a,b in found), found
    return found

def check_unknown(dl, words):
    before,told = vars(dl).get('create_batches'),BatchItems(dl)
    assert words in told.why and told.why.startswith('the training loader, ') and type(dl).__name__ in told.why
    assert all(items is None for items,_ in follow(dl, told))
    assert vars(dl).get('create_batches') is before

def tabular(cls, **kwargs):
    df = pd.DataFrame(dict(x=np.arange(n_items, dtype=float), y=np.arange(n_items) % 2))
    return cls(TabularPandas(df, cont_names=['x'], y_names='y'), bs=8, **kwargs)

# ---- loaders of fastai

weights = [i % 4 for i in positions]

@pytest.mark.parametrize('make', [
    lambda: DataLoader(positions, bs=8),
    lambda: DataLoader(positions, bs=8, shuffle=True),
    lambda: DataLoader(positions, bs=8, shuffle=True, drop_last=True),
    lambda: DataLoader(positions, bs=8, n=20),
    lambda: DataLoader(positions, bs=n_items),
    lambda: DataLoader(positions, bs=1, shuffle=True),
    lambda: TfmdDL(positions, bs=8, shuffle=True, num_workers=0),
    lambda: TfmdDL(Datasets(positions, [[noop], [noop]]), bs=8, shuffle=True, num_workers=0, drop_last=True),
    lambda: WeightedDL(positions, bs=8, wgts=weights, shuffle=True, num_workers=0),
    lambda: PartialDL(positions, bs=8, partial_n=19, num_workers=0),
    lambda: tabular(TabDataLoader),
    lambda: tabular(TabDataLoader, shuffle=True, drop_last=True),
    lambda: tabular(TabWeightedDL, shuffle=True, wgts=weights),
    lambda: SortedDL(Texts(), bs=4, before_batch=pad, num_workers=0),
    lambda: SortedDL(Texts(), bs=4, shuffle=True, before_batch=pad, num_workers=0),
    lambda: DataLoader(positions, bs=8, get_idxs=lambda: [5, 5, -1, np.int64(7), torch.tensor(2)]*4),
    lambda: DataLoader(positions, bs=8, get_idxs=lambda: iter([3, 1, 2]*5)),
], ids='plain shuffled drop_last n whole single tfmd datasets weighted partial tabular tabular-shuffled tabular-weighted sorted '
    'sorted-shuffled own-get_idxs iterator'.split())
def test_loaders_of_fastai(make):
    set_seed(0)
    check_right(make())

def pad(samples):
    longest = max(len(s[0]) for s in samples)
    return [(torch.cat([s[0], s[0][:1].expand(longest - len(s[0]))]),) for s in samples]

@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('missing', [[0], [42], [3, 4, 20], range(8), range(0, 43, 2), range(42)])
def test_items_that_are_skipped(missing, drop_last):
    set_seed(0)
    for shuffle in (False, True):
        dl = DataLoader(Holes(missing), bs=8, shuffle=shuffle, drop_last=drop_last)
        found = follow(dl) + follow(dl)
        assert all(a == b for a,b in found) and (found or drop_last)
        assert drop_last or sum(len(a) for a,_ in found) == 2*(n_items - len(missing))

def test_items_that_are_skipped_by_a_transform():
    def after_item(o):
        if o % 5 == 2: raise SkipItemException
        return o
    check_right(TfmdDL(positions, bs=8, shuffle=True, num_workers=0, after_item=after_item))

# ---- worker processes

@pytest.mark.parametrize('n_workers', [1, 2, 3])
def test_workers(n_workers):
    set_seed(0)
    check_right(DataLoader(positions, bs=4, shuffle=True, num_workers=n_workers))
    check_right(DataLoader(positions, bs=4, shuffle=True, drop_last=True, num_workers=n_workers), 1)

@pytest.mark.parametrize('make', [
    lambda: WeightedDL(positions, bs=4, wgts=weights, shuffle=True, num_workers=2),
    lambda: PartialDL(positions, bs=4, partial_n=19, num_workers=2),
    lambda: SortedDL(Texts(), bs=4, shuffle=True, before_batch=pad, num_workers=2),
    lambda: tabular(TabDataLoader, shuffle=True, num_workers=2),
    lambda: DataLoader(positions, bs=4, num_workers=2, get_idxs=lambda: iter([3, 1, 2]*5)),
], ids='weighted partial sorted tabular own-get_idxs'.split())
def test_workers_of_other_loaders(make):
    set_seed(0)
    check_right(make(), 1)

one_worker_ends_early = [i for i in range(32) if i // 4 % 2 == 0] # and the batches of the other move up

@pytest.mark.parametrize('missing', [[9], [0, 1, 2, 3, 8, 9], range(0, 40, 3), range(40), one_worker_ends_early])
def test_workers_that_skip_items_are_right_until_one_of_them_ends(missing):
    set_seed(0)
    for shuffle in (False, True):
        found = follow(DataLoader(Holes(missing), bs=4, shuffle=shuffle, num_workers=2))
        assert all(a in (None, b) for a,b in found), found
        known = [a is not None for a,_ in found]
        assert known == sorted(known, reverse=True), 'once unknown, it stays unknown'
        if len(missing) < 7: assert sum(known) >= 7

def test_workers_with_batches_of_different_speed():
    class Slow:
        def __len__(self): return 32
        def __getitem__(self, i):
            if i % 8 == 0: torch.randn(300, 300).svd()
            return i
    check_right(DataLoader(Slow(), bs=4, num_workers=2), 1)

def test_workers_that_are_spawned(monkeypatch):
    dl = DataLoader(positions, bs=8, shuffle=True, num_workers=1)
    context = property(lambda self: multiprocessing.get_context('spawn') if self.num_workers else None)
    monkeypatch.setattr(type(dl.fake_l), 'multiprocessing_context', context)
    check_right(dl, 1)

# ---- loaders with methods of their own

def test_own_sample():
    class Backwards(DataLoader):
        def sample(self): return iter(range(self.n - 1, 2, -2))
    found = check_right(Backwards(positions, bs=8))
    assert found[0][0][0] == n_items - 1
    check_right(DataLoader(positions, bs=8, sample=lambda: iter([4, 4, 1])))
    class Strided(DataLoader):
        def sample(self): return (i for i in reversed(range(self.n)) if i // self.bs % self.num_workers == self.offs)
    assert all(a in (None, b) for a,b in follow(Strided(positions, bs=4, num_workers=2)))

@pytest.mark.parametrize('samples', [['a', 'b'], [0.5], [(0, 1)]])
def test_what_is_no_position_is_not_taken_for_one(samples):
    class Named:
        def __len__(self): return 2
        def __getitem__(self, i): return 0
    dl = DataLoader(Named(), bs=8, sample=lambda: iter(samples))
    told = BatchItems(dl)
    assert follow(dl, told)[0][0] is None and 'by something else than their positions' in told.why

def test_own_create_item_is_believed_only_if_marked():
    class Other(DataLoader):
        def create_item(self, s): return self.dataset[(s + 1) % self.n]
    check_unknown(Other(positions, bs=8), 'has its own create_item')
    check_unknown(DataLoader(positions, bs=8, create_item=lambda s: 0), 'has its own create_item')
    class Same(DataLoader):
        @tells_items
        def create_item(self, s):
            if s % 5 == 0: raise SkipItemException
            return super().create_item(s)
    check_right(Same(positions, bs=8, shuffle=True))
    class Changed(Same):
        def create_item(self, s): return self.dataset[0]
    check_unknown(Changed(positions, bs=8), 'mark it with @tells_items')

def test_own_do_item_is_believed_only_if_marked():
    class Retries(DataLoader):
        def do_item(self, s): return super().do_item(s) or 1
    check_unknown(Retries(positions, bs=8), 'has its own do_item')
    class Same(DataLoader):
        @tells_items
        def do_item(self, s): return None if s < 3 else super().do_item(s)
    check_right(Same(positions, bs=8, shuffle=True))

def test_own_create_batches_is_believed_only_if_marked():
    class Sorted(DataLoader):
        def create_batches(self, samps):
            for o in chunked(samps, self.bs): yield torch.tensor(sorted(o))
    check_unknown(Sorted(positions, bs=8, shuffle=True), 'has its own create_batches')
    def create_batches(samps): return map(torch.tensor, chunked(samps, 8))
    check_unknown(DataLoader(positions, bs=8, create_batches=create_batches), 'has its own create_batches')
    check_unknown(DataLoader(positions, bs=8, create_batches=tells_items(create_batches)), 'make it a method of a class')
    class AtOnce(DataLoader):
        @tells_items
        def create_batches(self, samps):
            for o in chunked(samps, self.bs, self.drop_last): yield torch.tensor(positions)[o]
    check_right(AtOnce(positions, bs=8, shuffle=True))
    check_right(AtOnce(positions, bs=8, shuffle=True, drop_last=True))
    check_right(AtOnce(positions, bs=8, shuffle=True, num_workers=2), 1)

def test_a_marked_loader_that_reads_ahead_is_found_out():
    class Ahead(DataLoader):
        @tells_items
        def create_batches(self, samps): yield from reversed([torch.tensor(o) for o in chunked(samps, self.bs)])
    dl = Ahead(positions, bs=8, shuffle=True)
    told = BatchItems(dl)
    assert all(a is None for a,_ in follow(dl, told))

def test_own_chunkify_and_iteration():
    class Pairs(DataLoader):
        def chunkify(self, b): return chunked(sorted(b), 2)
    check_unknown(Pairs(positions, bs=8, shuffle=True), 'has its own chunkify')
    class Growing(DataLoader):
        @tells_items
        def chunkify(self, b):
            b,n = iter(b),1
            while o := [x for _,x in zip(range(n), b)]:
                yield o
                n += 1
    check_right(Growing(positions, bs=8, shuffle=True))
    found = follow(Growing(positions, bs=8, shuffle=True, num_workers=1))
    assert all(a == b if len(b) <= 8 else a is None for a,b in found)
    class Twice(DataLoader):
        def __iter__(self):
            for b in super().__iter__():
                yield b
                yield b
    check_unknown(Twice(positions, bs=8), 'has its own __iter__')

def test_a_batch_that_loses_items_when_it_is_put_together():
    dl = DataLoader(positions, bs=8, shuffle=True, before_batch=lambda b: [o for o in b if o != 7])
    told = BatchItems(dl)
    found = follow(dl, told)
    assert [a is None for a,_ in found] == [len(b) == 7 for _,b in found[:-1]] + [found[-1][0] is None]
    assert all(a in (None, b) for a,b in found)

def test_loaders_that_can_not_tell():
    class Stream(IterableDataset):
        def __iter__(self): return iter(positions)
    check_unknown(DataLoader(Stream(), bs=8), 'reads its items one after the other')
    check_unknown(DataLoader([torch.arange(4)]*3), 'takes batches that are ready')
    check_unknown(TorchLoader(positions, 8), "use fastai's DataLoader")
    lm = LMDataLoader([(torch.arange(10),)]*4, lens=[10]*4, bs=2, seq_len=5, shuffle=True)
    check_unknown(lm, 'deals in pieces of texts')
    batches = [torch.arange(4)]
    told = BatchItems(batches)
    assert told.why.startswith('the training loader, list(') and told.items(0, 4) is None
    told.close()

def test_the_loader_of_decoded_images(monkeypatch):
    monkeypatch.setattr(DecodedDL.create_batches, 'tells_items', True, raising=False)
    kept = torch.arange(n_items)[:, None].float(),torch.arange(n_items).flip(0),torch.arange(n_items)
    for cls in (DecodedDL, WeightedDecodedDL):
        for drop_last in (False, True):
            dl = cls(positions, bs=8, shuffle=True, drop_last=drop_last)
            dl._kept = kept # rows of the images are backwards: item 0 is in the last
            found = follow(dl)
            assert found and all(a == [n_items - 1 - o for o in b] for a,b in found)
    check_right(DecodedDL(positions, bs=8, shuffle=True)) # item by item

def test_the_distributed_loader(monkeypatch):
    pytest.importorskip('accelerate')
    from fastai import distributed
    monkeypatch.setattr(distributed.DistributedDL, '_broadcast', lambda self, t, rank: list(t))
    for rank in (0, 1):
        for missing in ([], [3, 8, 9]):
            dl = distributed.DistributedDL(DataLoader(Holes(missing), bs=4, shuffle=True), rank=rank, world_size=2)
            check_right(dl)
            check_right(distributed.DistributedDL(DataLoader(positions, bs=4, num_workers=2), rank=rank, world_size=2), 1)
    class Other(DataLoader):
        def create_item(self, s): return 0
    check_unknown(distributed.DistributedDL(Other(positions, bs=4), rank=0, world_size=2), 'has its own create_item')

# ---- nothing is left behind, and nothing is mistaken

def test_the_owner_closes_what_was_never_iterated():
    dl = DataLoader(positions, bs=8, shuffle=True, num_workers=1)
    told = BatchItems(dl)
    list(dl) # an epoch in which nobody asked: with workers, only `close` can know that it is over
    told.close()
    assert not left(dl)
    dl = DataLoader(positions, bs=8, shuffle=True)
    BatchItems(dl)
    list(dl)
    assert not left(dl), 'and without, the second batch did'

def left(dl): return {k for k in vars(dl) if k in ('create_batches', 'do_item', 'get_idxs', 'sample')}

class Interrupted(Exception): pass

@pytest.mark.parametrize('n_workers', [0, 1])
def test_nothing_stays_on_the_loader(n_workers):
    dl = DataLoader(positions, bs=8, shuffle=True, num_workers=n_workers)
    before = set(vars(dl)) | {'_DataLoader__idxs'}
    told = BatchItems(dl)
    for i,b in enumerate(dl):
        told.items(i, len(b))
        assert not left(dl)
    assert set(vars(dl)) <= before
    told = BatchItems(dl)
    with pytest.raises(Interrupted):
        for i,b in enumerate(dl):
            if i == 1: raise Interrupted
            told.items(i, len(b))
    assert not left(dl)
    told = BatchItems(dl)
    told.close()
    told.close()
    assert not left(dl)
    BatchItems(dl) # a pass that never begins
    second = BatchItems(dl)
    assert vars(dl)['create_batches'].__self__ is second
    second.close()
    assert not left(dl)
    pickle.loads(pickle.dumps(dl))

def test_an_error_in_the_loader_leaves_nothing():
    class Broken(Holes):
        def __getitem__(self, i):
            if i == 11: raise Interrupted
            return i
    dl = DataLoader(Broken([]), bs=4)
    with pytest.raises(Interrupted): follow(dl)
    assert not left(dl)
    told = BatchItems(DataLoader(Broken([]), bs=16))
    with pytest.raises(Interrupted): list(told.dl)
    told.close()
    assert not left(told.dl)

def test_the_loader_can_be_copied_and_saved_while_it_is_listened_to():
    dl = TfmdDL(positions, bs=8, shuffle=True, num_workers=0)
    told = BatchItems(dl)
    new,saved,same = dl.new(),pickle.loads(pickle.dumps(dl)),copy.deepcopy(dl)
    assert 'create_batches' not in vars(new)
    for o in (new, saved, same): assert sorted(torch.cat(list(o)).tolist()) == positions
    assert all(a == b for a,b in follow(dl, told))
    own = DataLoader(positions, bs=8, get_idxs=lambda: [1]*8)
    BatchItems(own)
    assert own.new().one_batch().tolist() == [1]*8, 'what was given as an argument goes along'

def test_a_do_item_of_the_instance_is_put_back():
    dl = DataLoader(positions, bs=8)
    mine = tells_items(lambda s: None if s == 3 else positions[s])
    dl.do_item = mine
    check_right(dl)
    assert dl.do_item is mine

def test_looking_at_a_batch_does_not_confuse_it():
    dl = DataLoader(positions, bs=8, shuffle=True)
    told = BatchItems(dl)
    dl.one_batch()
    assert all(a == b for a,b in follow(dl, told))
    told = BatchItems(dl)
    for i,b in enumerate(dl):
        dl.one_batch()
        list(dl)
        assert told.items(i, len(b)).tolist() == b.tolist()
    told = BatchItems(dl)
    list(dl) # a whole pass before the one in question
    assert all(a in (None, b) for a,b in follow(dl, told))

def test_two_passes_at_a_time_are_not_mixed_up():
    dl = DataLoader(positions, bs=8, shuffle=True)
    told = BatchItems(dl)
    other = iter(dl)
    next(other)
    for i,b in enumerate(dl):
        assert told.items(i, len(b)) is None and 'does something else iterate over it' in told.why
        next(other, None)

def test_two_passes_with_workers_are_not_mixed_up():
    dl = DataLoader(positions, bs=8, shuffle=True, num_workers=1)
    told = BatchItems(dl)
    dl.one_batch() # in this process
    found = follow(dl, told)
    assert all(a == b for a,b in found)
    told = BatchItems(dl)
    other = iter(dl)
    next(other)
    found = follow(dl, told)
    assert all(a is None for a,b in found)

def test_a_batch_that_is_not_at_hand():
    dl = DataLoader(positions, bs=8)
    told = BatchItems(dl)
    batches = iter(dl)
    next(batches), next(batches)
    assert told.items(0, 8) is None and told.items(1, 8).tolist() == positions[8:16] and told.items(2, 8) is None

def test_random_streams_and_order_are_as_without():
    def batches(listen, n_workers=0):
        set_seed(3)
        dl = WeightedDL(positions, bs=8, wgts=weights, shuffle=True, num_workers=n_workers)
        for _ in range(2):
            told = BatchItems(dl) if listen else None
            for i,b in enumerate(dl):
                if told: told.items(i, len(b))
                yield b.tolist()
        yield random.random(), np.random.rand(), torch.rand(1).item()
    for n_workers in (0, 1): assert list(batches(True, n_workers)) == list(batches(False, n_workers))

# ---- the ledger

def log_of(ledger, n_epochs=4, n_items=n_items, n_steps=30, bs=8, seed=0):
    "Steps that a ledger is given, as a table."
    rng,log = np.random.default_rng(seed),[]
    for epoch in range(n_epochs):
        ledger.begin_epoch(epoch)
        for _ in range(n_steps):
            items,w = rng.integers(0, n_items - 1, bs),np.maximum(rng.normal(1, 1, bs), 0).astype('float32')
            ledger.add(torch.tensor(items), torch.tensor(w))
            log += [(epoch, i, o) for i,o in zip(items, w)]
    return pd.DataFrame(log, columns=['epoch', 'item', 'weight'])

def expected(log, last=None):
    if last is not None: log = log[log.epoch > log.epoch.max() - last]
    return log.assign(zero=log.weight == 0).groupby('item').agg(weight=('weight', 'mean'), zero=('zero', 'mean'), steps=('weight', 'size'))

def assert_same(got, want):
    assert got.index.name == 'item' and list(got) == ['weight', 'zero', 'steps'] and list(got.index) == list(want.index)
    for o in got: np.testing.assert_allclose(got[o], want[o], rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('keep', [1, 3, 10])
def test_means_are_those_of_a_full_log(keep):
    ledger = Ledger(n_items, keep)
    log = log_of(ledger, 6)
    assert_same(ledger.item_weights(), expected(log))
    for last in range(1, min(keep, 6) + 1): assert_same(ledger.item_weights(last), expected(log, last))
    for last in (6, 7, 100): assert_same(ledger.item_weights(last), expected(log))
    assert n_items - 1 not in ledger.item_weights().index, 'it was never visited'
    if keep < 5:
        with pytest.raises(ValueError, match=rf'last=5 is not known: only the last {keep} of the 6 epochs'): ledger.item_weights(last=5)
        with pytest.raises(ValueError, match=rf'keep={keep}\b'): ledger.item_weights(last=keep + 1)

def test_memory_does_not_grow_with_the_steps():
    def size(n_steps, n_epochs):
        ledger = Ledger(1000, keep=3)
        log_of(ledger, n_epochs, 1000, n_steps)
        waiting = sum(i.nbytes + w.nbytes for i,w in ledger._pending)
        return sum(t.nbytes for t in ledger.state().values()), waiting
    assert size(20, 3)[0] == size(400, 3)[0] <= 3*12*1000 + 200
    assert size(20, 4)[0] == size(100, 9)[0] <= (3*12 + 16)*1000 + 200
    assert max(size(o, 1)[1] for o in (63, 64, 65, 500)) <= 64*8*12
    assert Ledger(10**9).n_items == 10**9, 'nothing is allocated before it is needed'

def test_weights_are_taken_when_they_are_added():
    ledger,w = Ledger(2),torch.tensor([1., 3.], requires_grad=True)
    ledger.add(torch.tensor([0, 0]), w)
    with torch.no_grad(): w.zero_()
    assert ledger.item_weights().weight.tolist() == [2.]
    ledger.add(torch.tensor([[1]]), torch.tensor([0.5], dtype=torch.float16))
    assert ledger.item_weights().weight.tolist() == [2., 0.5]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_weights_on_a_gpu():
    ledger = Ledger(2)
    ledger.add(torch.tensor([0, 1]), torch.tensor([1., 0.], device='cuda'))
    ledger.add(torch.tensor([0, 1], device='cuda'), torch.tensor([1., 0.], device='cuda'))
    assert ledger.item_weights().zero.tolist() == [0, 1]

@pytest.mark.parametrize('args, message', [((-1,), 'n_items=-1 must be'), ((2.5,), 'n_items=2.5 must be'),
    ((3, 0), 'keep=0 must be'), ((3, True), 'keep=True must be')])
def test_arguments(args, message):
    with pytest.raises(ValueError, match=message): Ledger(*args)

def test_wrong_items():
    ledger = Ledger(3)
    with pytest.raises(ValueError, match='position 3, but must be from 0 to below n_items=3'):
        ledger.add(torch.tensor([0, 3]), torch.ones(2))
    with pytest.raises(ValueError, match='position -1'): ledger.add(torch.tensor([-1]), torch.ones(1))
    with pytest.raises(ValueError, match='items has 2 positions, but weights has 1'): ledger.add(torch.tensor([0, 1]), torch.ones(1))
    for last in (0, -1):
        with pytest.raises(ValueError, match=f'last={last} must be a number of epochs, 1 or more'): ledger.item_weights(last)

def test_a_ledger_without_weights():
    with pytest.raises(ValueError, match='no weights have been recorded'): Ledger(3).item_weights()
    ledger = Ledger(3)
    with pytest.raises(ValueError, match='position 5'): ledger.add(torch.tensor([5]), torch.ones(1))
    with pytest.raises(ValueError, match='no weights have been recorded'): ledger.item_weights()

def test_unknown_items():
    ledger = Ledger(3, keep=2)
    ledger.add(torch.tensor([0]), torch.ones(1))
    ledger.add(None, torch.ones(1), 'nobody told')
    assert ledger.reason == 'nobody told'
    with pytest.raises(ValueError, match='nobody told'): ledger.item_weights()
    for epoch in (1, 2, 3):
        ledger.begin_epoch(epoch)
        ledger.add(torch.tensor([0]), torch.ones(1))
    with pytest.raises(ValueError, match='nobody told'): ledger.item_weights()
    with pytest.raises(ValueError, match='nobody told'): ledger.item_weights(last=4)
    assert ledger.item_weights(last=2).steps.tolist() == [2], 'these epochs are known'
    ledger = Ledger(3)
    ledger.add(None, torch.ones(1))
    with pytest.raises(ValueError, match='not known'): ledger.item_weights()

def test_epochs():
    ledger = Ledger(3, keep=2)
    for epoch in (2, 3, 5): # plain training before, and an epoch that was cancelled
        ledger.begin_epoch(epoch)
        ledger.add(torch.tensor([0, 1]), torch.tensor([1., epoch]))
    assert ledger.item_weights(last=1).weight.tolist() == [1, 5]
    assert ledger.item_weights(last=2).weight.tolist() == [1, 5], 'nothing was seen in epoch 4'
    assert ledger.item_weights(last=3).weight.tolist() == [1, 4]
    assert ledger.item_weights(last=4).weight[1] == ledger.item_weights().weight[1] == pytest.approx(10/3), 'all that were weighed'
    ledger.begin_epoch(6)
    assert ledger.item_weights(last=1).weight.tolist() == [1, 5], 'an epoch without weights does not count'
    ledger.begin_epoch(6)
    with pytest.raises(ValueError, match='epoch=4 comes after epoch 5'): ledger.begin_epoch(4)

def test_state():
    ledger = Ledger(n_items, 3)
    log_of(ledger, 5, n_steps=7)
    state = ledger.state()
    assert all(isinstance(o, torch.Tensor) for o in state.values())
    kept = {k: v.clone() for k,v in state.items()}
    again = Ledger(n_items, 3)
    again.load({k: v.double() if v.is_floating_point() else v.float() for k,v in state.items()}) # as an optimizer's state may change them
    for o in (ledger, again):
        o.begin_epoch(5)
        o.add(torch.tensor([1, 1, 2]), torch.tensor([0., 2., 3.]))
        for last in (None, 1, 3):
            pd.testing.assert_frame_equal(o.item_weights(last), ledger.item_weights(last))
    assert all(torch.equal(kept[k], state[k]) for k in kept), 'a state does not change any more'
    fewer = Ledger(n_items, 1)
    fewer.load(state)
    first = Ledger(n_items, 3)
    first.load(state)
    pd.testing.assert_frame_equal(fewer.item_weights(), first.item_weights())
    with pytest.raises(ValueError, match='last=2 is not known'): fewer.item_weights(last=2)
    with pytest.raises(ValueError, match=f'state is of {n_items} items, but must be of n_items=4'): Ledger(4).load(state)
    empty = Ledger(3)
    empty.load(Ledger(3).state())
    with pytest.raises(ValueError, match='no weights have been recorded'): empty.item_weights()
    unknown = Ledger(3)
    unknown.add(None, torch.ones(1), 'weil Wörter fehlen')
    empty.load(unknown.state())
    with pytest.raises(ValueError, match='weil Wörter fehlen'): empty.item_weights()

# ---- in a Learner

class Owner(Callback):
    "Gives weights that depend on the items, and says when a fit begins."
    order,run_valid,step = -100,False,None
    def __init__(self, start=0): self.start,self.log,self.told,self.fresh = start,[],None,False
    def begins(self): self.fresh = True
    def before_train(self):
        if self.fresh: self.item_ledger.begin_fit(len(self.dl.dataset))
        self.fresh,self.told = False,BatchItems(self.dl)
        self.item_ledger.begin_epoch(self.epoch)
    def after_loss(self):
        self.step = None
        if self.epoch < self.start: return
        items = self.x[:, 0].mul(n_items).round().long().cpu()
        w = (items % 3 + 0.).to(self.x.device)
        self.step = SimpleNamespace(weights=w/w.sum(), items=self.told.items(self.iter, len(w)), why=self.told.why)
        if hasattr(self.learn, 'lr_finder'): return
        self.log += [(self.epoch, i, o) for i,o in zip(items.tolist(), (w/w.sum()*len(w)).tolist())]

def as_input(i): return torch.tensor([i/n_items])
def as_target(i): return torch.tensor([2*i/n_items])

def make_learner(tmp_path, train_dl=None, owner=None, keep=10):
    set_seed(0)
    ds = Datasets(positions, [[as_input], [as_target]], splits=[positions, positions[:8]])
    train = train_dl(ds.train) if train_dl else TfmdDL(ds.train, bs=8, shuffle=True, drop_last=True, num_workers=0)
    dls = DataLoaders(train, TfmdDL(ds.valid, bs=8, num_workers=0))
    owner = owner or Owner()
    learn = Learner(dls, nn.Linear(1, 1), loss_func=MSELossFlat(), lr=1e-3, path=tmp_path, cbs=[owner, ItemLedger(owner, keep)])
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn,owner

def fit(learn, owner, n_epoch, **kwargs):
    owner.log = []
    owner.begins()
    learn.fit(n_epoch, **kwargs)
    return pd.DataFrame(owner.log, columns=['epoch', 'item', 'weight'])

def test_a_fit_is_recorded(tmp_path):
    learn,owner = make_learner(tmp_path)
    with pytest.raises(ValueError, match='no weights have been recorded'): learn.item_ledger.item_weights()
    log = fit(learn, owner, 3)
    assert_same(learn.item_ledger.item_weights(), expected(log))
    assert_same(learn.item_ledger.item_weights(last=1), expected(log, 1))
    log = fit(learn, owner, 1)
    assert_same(learn.item_ledger.item_weights(), expected(log))
    assert not left(learn.dls.train)

def test_epochs_without_weights(tmp_path):
    learn,owner = make_learner(tmp_path, owner=Owner(start=2), keep=1)
    log = fit(learn, owner, 4)
    assert set(log.epoch) == {2, 3}
    assert_same(learn.item_ledger.item_weights(), expected(log))
    assert_same(learn.item_ledger.item_weights(last=1), expected(log, 1))
    assert_same(learn.item_ledger.item_weights(last=2), expected(log))
    assert not left(learn.dls.train)

class Predicts(Callback):
    "Predicts and validates in the middle of an epoch, and between epochs."
    order,run_valid,looking = 70,False,False
    def look(self):
        if self.looking: return # its own events come here, too
        self.looking = True
        state = {k: v for k,v in vars(self.learn).items() if k in ('training', 'dl', 'xb', 'yb', 'pred', 'loss', 'loss_grad', 'iter')}
        self.learn.get_preds(ds_idx=0)
        self.learn.validate()
        self.looking = False
        vars(self.learn).update(state)
    def before_batch(self):
        if self.iter == 2: self.look()
    def after_batch(self):
        if self.iter == 1: self.look()
    def before_epoch(self): self.look()

def test_predictions_leave_the_record(tmp_path):
    learn,owner = make_learner(tmp_path)
    log = fit(learn, owner, 2, cbs=Predicts())
    assert len(log) == 2*8*len(learn.dls.train)
    assert_same(learn.item_ledger.item_weights(), expected(log))
    learn.validate(), learn.get_preds(ds_idx=0)
    assert_same(learn.item_ledger.item_weights(), expected(log))

def test_searching_a_learning_rate_leaves_the_record(tmp_path):
    learn,owner = make_learner(tmp_path)
    log = fit(learn, owner, 2)
    before = learn.item_ledger.ledger
    owner.begins()
    learn.lr_find(show_plot=False, num_it=12)
    assert learn.item_ledger.ledger is before
    assert_same(learn.item_ledger.item_weights(), expected(log))

def test_an_interrupted_fit_is_recorded_up_to_then(tmp_path):
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if self.epoch == 1 and self.iter == 2: raise KeyboardInterrupt
    learn,owner = make_learner(tmp_path)
    owner.begins()
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Stop())
    log = pd.DataFrame(owner.log, columns=['epoch', 'item', 'weight'])
    assert set(log.epoch) == {0, 1}
    assert_same(learn.item_ledger.item_weights(), expected(log))
    assert not left(learn.dls.train)

def test_unknown_items_of_a_fit(tmp_path):
    learn,owner = make_learner(tmp_path, lambda ds: TorchLoader(ds, 8, shuffle=True))
    fit(learn, owner, 1)
    with pytest.raises(ValueError, match=r'the training loader, DataLoader\(.*does not tell which items'): learn.item_ledger.item_weights()

def test_the_record_is_not_exported(tmp_path):
    learn,owner = make_learner(tmp_path)
    fit(learn, owner, 2)
    owner.told = owner.step = None
    before = learn.item_ledger.item_weights()
    learn.export('full.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'full.pkl')
    assert again.item_ledger.ledger is None and again.item_ledger.keep == 10 and again.item_ledger.reweight is again.owner
    with pytest.raises(ValueError, match='no weights have been recorded'): again.item_ledger.item_weights()
    assert b'_tallies' not in (tmp_path/'full.pkl').read_bytes()
    assert copy.deepcopy(learn.item_ledger).ledger is None
    pd.testing.assert_frame_equal(learn.item_ledger.item_weights(), before)

def test_keep_of_the_callback(tmp_path):
    with pytest.raises(ValueError, match='keep=0 must be'): ItemLedger(Owner(), keep=0)
    learn,owner = make_learner(tmp_path, keep=2)
    log = fit(learn, owner, 4)
    assert_same(learn.item_ledger.item_weights(last=2), expected(log, 2))
    with pytest.raises(ValueError, match='last=3 is not known'): learn.item_ledger.item_weights(last=3)

# ---- what is seen beside the weights

def test_evidence_of_labels():
    set_seed(0)
    z,y = torch.randn(7, 4),torch.tensor([0, 3, 2, -100, 1, 4, 2])
    got = evidence_of(z, y)
    assert list(got) == ['log_prob', 'margin', 'label', 'suggested', 'agrees'] and all(o.shape == (7,) for o in got.values())
    for i,(row,label) in enumerate(zip(z.tolist(), y.tolist())):
        one = {k: o[i].item() for k,o in got.items()}
        if not 0 <= label < 4:
            assert np.isnan(one['log_prob']) and np.isnan(one['margin']) and (one['label'], one['suggested'], one['agrees']) == (-1, -1, False)
            continue
        others = {k: o for k,o in enumerate(row) if k != label}
        best = max(others, key=others.get)
        assert one['log_prob'] == pytest.approx(row[label] - np.log(np.exp(row).sum()), rel=1e-5)
        assert one['margin'] == pytest.approx(row[label] - row[best], rel=1e-5)
        assert (one['label'], one['suggested'], one['agrees']) == (label, best, row[label] > row[best])

def test_evidence_of_other_forms():
    z,y = torch.randn(5, 3, requires_grad=True),torch.tensor([0, 1, 2, 1, 0])
    same = evidence_of(z, y)
    assert not any(o.requires_grad for o in same.values())
    for other in ((z, (y,)), (z, y[:, None]), (z, y.to(torch.uint8)), (z.bfloat16().float(), [y])):
        got = evidence_of(*other)
        assert list(got) == list(same) and torch.equal(got['label'], same['label'])
    assert evidence_of(z.double(), y)['margin'].dtype is torch.float64 and evidence_of(z.bfloat16(), y)['margin'].dtype is torch.float32
    evidence_of(z.detach().to('meta'), y.to('meta')) # where nothing can be waited for
    for nothing in ((z, y.float()), (z, y[:4]), (z[:, :1], y), (z[0], y), (z, (y, y)), ([z], y), (z, torch.randint(0, 2, (5, 3))), (z, y.bool()), (z, None), ((z > 0), y)):
        assert evidence_of(*nothing) == {}

def seen_log(ledger, n_steps=150, bs=8, seed=0, n_epochs=3):
    "Steps with columns, some of which lack a column, or a value; as a table with a row for each visit, in their order."
    rng,log = np.random.default_rng(seed),[]
    for step in range(n_steps):
        if step % (n_steps//n_epochs) == 0: ledger.begin_epoch(step//(n_steps//n_epochs))
        items = rng.integers(0, n_items - 1, bs)
        items[:2] = items[0] # twice in a batch
        seen = dict(loss=rng.normal(1, 1, bs), margin=np.where(rng.random(bs) < 0.3, np.nan, rng.normal(size=bs)), suggested=rng.integers(0, 9, bs))
        if step % 7 == 2: del seen['margin']
        if step % 5 == 3: del seen['suggested']
        weights = None if step < 20 else torch.ones(bs)
        ledger.add(torch.tensor(items), weights, **{k: torch.tensor(v) for k,v in seen.items()})
        log += [dict(item=i, weighed=step >= 20) | {k: o[j] for k,o in seen.items()} for j,i in enumerate(items)]
    return pd.DataFrame(log)

def evidence_from(log, decay=0.5):
    "What a ledger should tell, visit by visit."
    rows = {}
    for i,visits in log.groupby('item'):
        row = dict(visits=visits.loss.notna().sum())
        for name in ('loss', 'margin'):
            values = visits[name].dropna().to_numpy()
            counts = decay**np.arange(len(values))[::-1] if decay else np.eye(len(values))[-1] if len(values) else []
            row[name],row[f'{name}_recent'] = (values.mean(),(counts*values).sum()/np.sum(counts)) if len(values) else (np.nan, np.nan)
        last = visits.suggested.dropna()
        rows[i] = row | dict(suggested=int(last.iloc[-1]) if len(last) else -1)
    return pd.DataFrame.from_dict(rows, orient='index')

def assert_same_evidence(got, want):
    assert got.index.name == 'item' and sorted(got) == sorted(want) and list(got.index) == list(want.index)
    for o in want: np.testing.assert_allclose(got[o], want[o], rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('decay', [0.5, 0.9, 0.])
def test_means_over_visits(decay):
    ledger = Ledger(n_items, decay=decay)
    log = seen_log(ledger)
    assert_same_evidence(ledger.item_evidence(), evidence_from(log, decay))
    weighed = log[log.weighed].groupby('item').size()
    assert ledger.item_weights().steps.to_dict() == weighed.to_dict(), 'batches without weights are not counted as weighed'
    assert n_items - 1 not in ledger.item_evidence().index

def test_columns_take_memory_for_items_not_for_steps():
    def size(n_steps):
        ledger = Ledger(n_items)
        seen_log(ledger, n_steps)
        return sum(t.nbytes for t in ledger.state().values())
    assert size(90) == size(300)
    ledger = Ledger(10**9)
    assert ledger.state()['steps'].numel() == 0, 'nothing is allocated before it is needed'

def test_wrong_columns():
    ledger = Ledger(3)
    with pytest.raises(ValueError, match='items has 2 positions, but loss has 3 values'):
        ledger.add(torch.tensor([0, 1]), torch.ones(2), loss=torch.ones(3))
    with pytest.raises(ValueError, match='nothing but weights has been recorded'): ledger.item_evidence()
    with pytest.raises(ValueError, match='decay=1 must be'): Ledger(3, decay=1)
    ledger.add(None, None, 'nobody told', loss=torch.ones(1))
    with pytest.raises(ValueError, match='nobody told'): ledger.item_evidence()
    ledger.add(torch.tensor([0]), torch.ones(1))
    assert len(ledger.item_weights()) == 1, 'the items that were weighed are known'

@pytest.mark.parametrize('keep', [(10, 10), (1, 3), (3, 1)])
def test_merged_runs_are_one_log(keep):
    runs = [Ledger(n_items, o) for o in keep]
    logs = [log_of(o, 4, seed=s) for s,o in enumerate(runs)]
    before = runs[1].state()
    merged = runs[0].merge(runs[1])
    assert merged is runs[0]
    assert_same(merged.item_weights(), expected(pd.concat(logs)))
    for last in range(1, min(keep) + 1): assert_same(merged.item_weights(last), expected(pd.concat(logs), last))
    with pytest.raises(ValueError, match='last=2 is not known') if min(keep) < 2 else nullcontext(): merged.item_weights(last=2)
    assert all(torch.equal(o, before[k]) for k,o in runs[1].state().items()), 'the other stays as it is'

def test_merged_columns():
    runs = [Ledger(n_items) for _ in range(2)]
    logs = [seen_log(o, seed=s) for s,o in enumerate(runs)]
    each = [evidence_from(o) for o in logs]
    got,both = runs[0].merge(runs[1]).item_evidence(),evidence_from(pd.concat(logs))
    for o in ('loss', 'margin', 'visits'): np.testing.assert_allclose(got[o], both[o], rtol=1e-5, atol=1e-5)
    i = got.index[0]
    mass = [1 - 0.5**(log[log.item == i].loss.size) for log in logs]
    want = sum(m*o.loss_recent[i] for m,o in zip(mass, each))/sum(mass)
    assert got.loss_recent[i] == pytest.approx(want, rel=1e-5), 'the exponential means count by what their visits count'
    later = each[1].suggested.where(each[1].suggested >= 0, each[0].suggested)
    assert got.suggested[later.index].tolist() == later.tolist()
    with pytest.raises(ValueError, match='other is of 4 items, but must be of n_items=43'): runs[0].merge(Ledger(4))
    with pytest.raises(ValueError, match='other is this ledger itself'): runs[0].merge(runs[0])
    unknown = Ledger(n_items)
    unknown.add(None, torch.ones(1), 'nobody told')
    with pytest.raises(ValueError, match='nobody told'): runs[0].merge(unknown).item_weights()

def test_state_of_columns():
    ledger,whole = Ledger(n_items),Ledger(n_items)
    log = seen_log(ledger)
    seen_log(whole)
    state = ledger.state()
    assert all(isinstance(o, torch.Tensor) for o in state.values())
    again = Ledger(n_items)
    again.load({k: v.double() if v.is_floating_point() else v.float() for k,v in state.items()})
    assert_same_evidence(again.item_evidence(), evidence_from(log))
    for o in (again, whole): o.add(torch.tensor([1, 1]), torch.ones(2), loss=torch.tensor([0., 3.]), other=torch.tensor([1., 2.]))
    pd.testing.assert_frame_equal(again.item_evidence(), whole.item_evidence())
    copied = whole.copy()
    whole.add(torch.tensor([1]), torch.ones(1), loss=torch.tensor([9.]))
    assert copied.item_evidence().visits[1] == whole.item_evidence().visits[1] - 1

def test_a_state_of_before_there_were_columns():
    ledger = Ledger(n_items, 3)
    log = log_of(ledger, 5)
    old = {k: v for k,v in ledger.state().items() if ':' not in k}
    old['marks'] = old['marks'][:4]
    again = Ledger(n_items, 3)
    again.load(old)
    assert_same(again.item_weights(), expected(log))
    again.add(torch.tensor([1]), torch.ones(1), loss=torch.ones(1))
    assert again.item_evidence().visits.to_dict() == {1: 1}

def test_single_epochs():
    ledger = Ledger(n_items, keep=2)
    log = log_of(ledger, 4)
    assert ledger.epochs == [2, 3]
    assert_same(ledger.epoch_weights(2), expected(log[log.epoch == 2]))
    with pytest.raises(ValueError, match=r'epoch=1 is not kept by itself: those that are kept are \[2, 3\]'): ledger.epoch_weights(1)
    ledger.add(None, torch.ones(1), 'nobody told')
    with pytest.raises(ValueError, match='nobody told'): ledger.epoch_weights(3)

# ---- mixed batches

def test_what_belongs_to_each_item_of_a_mixed_batch():
    set_seed(0)
    w,order,share = torch.rand(8),torch.randperm(8),torch.rand(8)
    want = np.zeros(8)
    for i in range(8):
        want[i] += share[i]*w[i]
        want[order[i]] += (1 - share[i])*w[i]
    np.testing.assert_allclose(credited(w, order, share), want, rtol=1e-5)
    np.testing.assert_allclose(credited(w, order, share).sum(), w.sum(), rtol=1e-5)
    np.testing.assert_allclose(credited(w, order, torch.tensor([0.3])), 0.3*w + 0.7*w[order.argsort()], rtol=1e-5)

class Batch(Callback):
    "A batch for a callback that mixes, without a Learner."
    def __init__(self, mixer, n=6):
        self.mixer = mixer
        self.x,self.y = torch.randn(n, 3, 8, 8),torch.arange(n)
        mixer.learn,mixer.stack_y = SimpleNamespace(x=self.x, y=self.y, xb=(self.x.clone(),), yb=(self.y,)),True
    def mix(self): self.mixer('before_batch')

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_the_partners_are_told(mix):
    set_seed(0)
    batch = Batch(mix())
    mixing = Mixing([batch.mixer, noop])
    for _ in range(3):
        batch.mix()
        order,share,why = mixing.take()
        assert why is None and torch.equal(batch.mixer.yb1[0], order) and (share is batch.mixer.lam or torch.equal(share, batch.mixer.lam))
    assert mixing.take() is None, 'this one was not mixed'
    mixing.close()
    assert 'before_batch' not in vars(batch.mixer)
    mixing.close()

def test_listening_changes_nothing():
    def mixed(listen):
        set_seed(3)
        batch = Batch(MixUp())
        mixing = Mixing([batch.mixer] if listen else [])
        batch.mix()
        mixing.close()
        return batch.mixer.learn.xb[0], torch.rand(1)
    for a,b in zip(mixed(True), mixed(False)): assert torch.equal(a, b)

def test_a_second_listener_takes_the_place_of_the_first():
    batch = Batch(MixUp())
    first,second = Mixing([batch.mixer]),Mixing([batch.mixer])
    batch.mix()
    assert first.take() is None and second.take()[2] is None
    second.close()
    assert 'before_batch' not in vars(batch.mixer)
    own = batch.mixer.before_batch
    vars(batch.mixer)['before_batch'] = own
    Mixing([batch.mixer]).close()
    assert vars(batch.mixer)['before_batch'] is own, 'what was there is put back'

class Rolled(MixUp):
    "Mixes each item with the one before it."
    def before_batch(self):
        self.lam,self.yb1 = torch.full((6,), 0.7),(self.y.roll(1),)

class Sometimes(MixUp):
    n = 0
    def before_batch(self):
        self.n += 1
        if self.n % 2: super().before_batch()

def test_mixing_that_does_not_tell():
    batch = Batch(Rolled())
    mixing = Mixing([batch.mixer])
    batch.mix()
    order,share,why = mixing.take()
    assert order is None and why.startswith('Rolled mixes the items of a batch and does not tell which: let it draw them with torch.randperm')
    both = Batch(MixUp()),Batch(CutMix())
    mixing = Mixing([o.mixer for o in both])
    for o in both: o.mix()
    assert mixing.take()[2] == 'MixUp and CutMix have both mixed the items of a batch: use one of them'
    batch = Batch(Sometimes())
    mixing = Mixing([batch.mixer])
    found = []
    for _ in range(4):
        batch.mix()
        found.append(mixing.take())
    assert [o is None for o in found] == [False, True, False, True]

def test_a_mixed_step_is_credited_to_both(tmp_path):
    owner = Owner()
    learn,_ = make_learner(tmp_path, owner=owner)
    ledger = learn.item_ledger
    ledger.begin_fit(n_items)
    order,share = torch.tensor([1, 2, 0]),torch.tensor([0.5, 0.75, 1.])
    owner.step = SimpleNamespace(weights=torch.tensor([0.5, 0.5, 0.]), items=torch.tensor([7, 8, 9]), mixed=(order, share, None), seen=dict(loss=torch.tensor([1., 2., 3.])))
    ledger.after_loss()
    owner.step = SimpleNamespace(weights=torch.ones(1), items=torch.tensor([1]), mixed=(None, None, 'they are mixed'), seen={})
    np.testing.assert_allclose(ledger.item_weights().weight, [0.75, 1.125 + 0.75, 0.375], rtol=1e-6)
    assert ledger.item_weights().weight.sum() == pytest.approx(3)
    np.testing.assert_allclose(ledger.item_evidence().loss, [1., (0.75*2 + 0.5*1)/1.25, (3 + 0.25*2)/1.25], rtol=1e-6)
    ledger.after_loss()
    with pytest.raises(ValueError, match='they are mixed'): ledger.item_weights()
