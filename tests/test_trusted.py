"Reading trusted batches: the same as if no item were kept, and no more often than needed."
import random
import numpy as np, pytest, torch
from fastai.data.load import DataLoader, SkipItemException
from fasttransform import Pipeline, Transform
from torch.utils.data import DataLoader as TorchLoader

import fastai_l2rw.trusted
from fastai_l2rw.trusted import TrustedBatches
from conftest import Augment, images, make_dls, meta

cpu = torch.device('cpu')

class Counted:
    "Items that count how often they are read, changed by `tfm`."
    def __init__(self, tfm=lambda x: x, n=7, size=3): self.tfm,self.n,self.size,self.reads = tfm,n,size,[0]*n
    def __len__(self): return self.n
    def __getitem__(self, i): self.reads[i] += 1; return self.tfm(torch.full((self.size,), float(i))),i % 2

own = np.random.default_rng(0)
RANDOM = dict(
    torch=lambda x: x + torch.rand(1),
    python=lambda x: x + random.random(),
    numpy=lambda x: x + np.random.rand(),
    own=lambda x: x + own.random())
LOADERS = dict(
    fastai=lambda items: DataLoader(items, bs=3),
    torch=lambda items: TorchLoader(items, 3),
    transforms=lambda items: DataLoader(items, bs=3, after_batch=Pipeline([Transform(lambda x: x)])))

def read(dl, epochs=4, steps=5):
    batches,out = TrustedBatches(dl, cpu, seed=3),[]
    for epoch in range(epochs):
        batches.begin(epoch)
        out += [next(batches) for _ in range(steps)]
    return out

def assert_equal(a, b):
    for ((x,),(y,)),((x_,),(y_,)) in zip(a, b, strict=True): assert torch.equal(x, x_) and torch.equal(y, y_)

@pytest.fixture
def nothing_kept(monkeypatch):
    def read_anew(*args):
        with monkeypatch.context() as m:
            m.setattr(fastai_l2rw.trusted, '_with_cache', lambda dl, cache: dl)
            return read(*args)
    return read_anew

@pytest.mark.parametrize('make', LOADERS.values(), ids=LOADERS)
def test_items_are_read_twice_and_no_more(make, nothing_kept):
    items,anew = Counted(),Counted()
    got,expected = read(make(items)),nothing_kept(make(anew))
    assert items.reads == [2]*7 and min(anew.reads) > 4
    assert_equal(got, expected)

@pytest.mark.parametrize('tfm', ['torch','python','numpy'])
@pytest.mark.parametrize('make', LOADERS.values(), ids=LOADERS)
def test_random_items_are_read_anew(make, tfm, nothing_kept):
    items = Counted(RANDOM[tfm])
    got = read(make(items))
    assert_equal(got, nothing_kept(make(Counted(RANDOM[tfm]))))
    values = torch.cat([x[:, 0] for (x,),_ in got])
    assert len(values.unique()) == len(values)

def test_randomness_of_its_own():
    values = torch.cat([x[:, 0] for (x,),_ in read(LOADERS['fastai'](Counted(RANDOM['own'])))])
    assert len(values.unique()) == len(values)

def test_randomness_that_rarely_shows():
    "An item that came out the same twice is not relied on any more once another has not."
    rng = np.random.default_rng(1)
    items = Counted(lambda x: -x if rng.random() < 0.2 else x)
    batches = TrustedBatches(DataLoader(items, bs=7), cpu)
    for _ in range(20): next(batches)
    assert batches.cache.random and min(items.reads) == 20

def test_what_changes_a_batch_does_not_change_what_is_kept():
    dl = DataLoader(Counted(), bs=3, after_batch=lambda b: (b[0].mul_(2), b[1]))
    for (x,),_ in read(dl): assert set(x.flatten().tolist()) <= {0., 2., 4., 6., 8., 10., 12.}

def test_random_batch_transforms_go_on():
    dl = make_dls(bs=8, batch_tfms=Augment()).train.new(num_workers=0)
    batches = TrustedBatches(dl, cpu)
    for _ in range(20): (x,),_ = next(batches)
    assert len(batches.cache.confirmed) == dl.n
    (again,),_ = next(batches)
    assert not torch.equal(x.sort(0)[0], again.sort(0)[0])

def as_set(batches): return torch.cat([x.flatten(1) for (x,),_ in batches]).sort(0)[0]

def test_transforms_of_training():
    "They are not applied to batches of a third loader, and the loader stays as it is."
    class Never(Transform):
        split_idx = 0
        def encodes(self, x): raise AssertionError('an item transform of training')
    dl = make_dls(batch_tfms=Augment())[2].new(bs=8, after_item=Never())
    plain = images[meta].flatten(1).sort(0)[0]
    batches = TrustedBatches(dl, cpu, seed=1)
    for _ in range(2): torch.testing.assert_close(as_set([next(batches) for _ in range(3)]), plain)
    assert_equal(read_some(dl), read_some(dl))
    torch.testing.assert_close(torch.cat([x for x,_ in dl]).as_subclass(torch.Tensor), images[meta])

def read_some(dl):
    batches = TrustedBatches(dl, cpu, seed=1)
    return [next(batches) for _ in range(5)]

def test_no_more_is_kept_than_there_is_room(nothing_kept):
    items = Counted(size=2**10)
    batches = TrustedBatches(DataLoader(items, bs=3), cpu)
    batches.cache.room = 3*2**12 + 5
    for _ in range(12): next(batches)
    assert sorted(items.reads) == [2]*3 + [4]*4

def test_skipped_items_stay_out():
    def skip(b):
        if b[0][0] == 2: raise SkipItemException
        return b
    for (x,),_ in read(DataLoader(Counted(), bs=7, after_item=skip)): assert sorted(x[:, 0].tolist()) == [0, 1, 3, 4, 5, 6]

def stack(items): return torch.stack([x for x,_ in items]),torch.tensor([y for _,y in items])

OTHERS = dict(
    before_batch=lambda items: DataLoader(items, bs=3, before_batch=lambda b: b),
    create_batch=lambda items: DataLoader(items, bs=3, create_batch=stack),
    collate_fn=lambda items: TorchLoader(items, 3, collate_fn=lambda b: torch.utils.data.default_collate(b)),
    workers=lambda items: TorchLoader(items, 3, num_workers=1))

@pytest.mark.parametrize('make', OTHERS.values(), ids=OTHERS)
def test_nothing_is_kept_of_other_loaders(make):
    batches = TrustedBatches(make(Counted()), cpu)
    for _ in range(9): next(batches)
    assert not batches.cache.items
