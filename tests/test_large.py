"Large data: what the ledger keeps of very many items, items that are called by keys, and loaders that are streams."
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, Categorize, DataLoader, DataLoaders, Datasets, Learner, TfmdDL, noop, set_seed
from fastai.callback.all import MixUp, ProgressCallback
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, IterableDataset

from fastai_l2rw.all import ItemKeys, MetaInterpretation, MetaReweightCallback, MetaSplitter, example_weights, hold_out_meta
from fastai_l2rw.ledger import Ledger, check_room, evidence_of, many_items
from fastai_l2rw.schemes import class_counts
from conftest import images, labels, parts

n_items = 60

def visits(n_steps=120, bs=16, n_classes=5, seed=0, n_epochs=4, smoothing=0.):
    "Batches of an epoch each, as a classification gives them; items are drawn with replacement."
    rng = torch.Generator().manual_seed(seed)
    for step in range(n_steps):
        items = torch.randint(0, n_items - 1, (bs,), generator=rng)
        z,y = 3*torch.randn(bs, n_classes, generator=rng),items % n_classes
        weights = torch.randn(bs, generator=rng).clamp(min=0)
        loss = torch.nn.functional.cross_entropy(z, y, reduction='none', label_smoothing=smoothing)
        yield step*n_epochs//n_steps,items,weights,dict(loss=loss) | evidence_of(z, y)

def filled(ledger, steps, called=None):
    for epoch,items,weights,seen in steps:
        ledger.begin_epoch(epoch)
        ledger.add(items if called is None else called(items), weights, **seen)
    return ledger

def n_bytes(ledger): return sum(o.nbytes for o in ledger.state().values())

def assert_close(got, want, rtol=2e-3):
    "Whole numbers are the same, and others up to the digits that are kept."
    assert list(got) == list(want) and list(got.index) == list(want.index) and got.index.name == want.index.name
    for k in want:
        if want[k].dtype.kind in 'iu': assert got[k].tolist() == want[k].tolist(), k
        else: np.testing.assert_allclose(got[k], want[k], rtol=rtol, atol=rtol*want[k].abs().mean(), err_msg=k)

# ---- the compact ledger

def test_bytes_an_item():
    n = 100_000
    ledger,full = [filled(Ledger(n, compact=o), visits(n_epochs=12)) for o in (True, False)]
    assert n_bytes(ledger)/n <= 18.1 and n_bytes(full)/n == pytest.approx(208, abs=0.1)
    high = ((0, i, w, s | {k: s[k] + 900 for k in ('label', 'suggested')}) for _,i,w,s in visits(10))
    many = filled(Ledger(n, compact=True), high)
    assert n_bytes(many)/n <= 20.1, 'with a thousand classes'
    smoothed = filled(Ledger(n, compact=True), visits(smoothing=0.1))
    assert n_bytes(smoothed)/n <= 22.1, 'where the loss is no log-probability'

def test_many_items_are_kept_in_few_bytes_without_being_asked():
    assert Ledger(many_items + 1).compact and not Ledger(many_items).compact
    assert not Ledger(many_items + 1, compact=False).compact and Ledger(3, compact=True).compact
    assert n_bytes(Ledger(10**9)) < 1000, 'nothing is allocated before it is needed'
    with pytest.raises(ValueError, match='compact=1.5 must be'): Ledger(3, compact=1.5)

@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_a_compact_ledger_tells_the_same(smoothing):
    full,compact = [filled(Ledger(n_items, compact=o), visits(smoothing=smoothing)) for o in (False, True)]
    assert_close(compact.item_weights(), full.item_weights(), 1e-5)
    assert_close(compact.item_weights(last=4), full.item_weights(), 1e-5)
    assert_close(compact.item_evidence(), full.item_evidence())
    pd.testing.assert_frame_equal(compact.class_weights(), full.class_weights())
    assert compact.item_weights().steps.sum() == 120*16

def test_single_epochs_of_a_compact_ledger():
    ledger = filled(Ledger(n_items, compact=True), visits())
    with pytest.raises(ValueError, match='last=3 is not known: .* only the whole fit is kept.*class_weights.*compact=False'):
        ledger.item_weights(last=3)
    assert ledger.epochs == []
    with pytest.raises(ValueError, match='epoch=3 is not kept by itself'): ledger.epoch_weights(3)

def test_a_mean_of_few_digits_follows_for_ever():
    "Rounding to the nearest number would stop at the value of a thousand visits: each later one moves the mean by less than a digit."
    ledger,values = Ledger(3, compact=True),[3.]*1000 + [4.]*3000
    for o in values: ledger.add(torch.tensor([0, 2]), None, loss=torch.tensor([o, -o]))
    means = ledger.item_evidence().loss
    np.testing.assert_allclose(means, [3.75, -3.75], rtol=3e-3)

def test_what_is_too_large_for_few_digits():
    ledger = Ledger(2, compact=True)
    ledger.add(torch.tensor([0, 1]), None, loss=torch.tensor([1e30, -torch.inf]))
    assert ledger.item_evidence().loss.tolist() == [65504, -65504]

@pytest.mark.parametrize('most', [255, 256, 33_000])
def test_counts_get_more_bytes_when_they_are_needed(most):
    ledger,step = Ledger(5, compact=True),1000
    for k in range(0, most, step):
        items = torch.tensor([1]*min(step, most - k) + [2])
        ledger.add(items, torch.zeros(len(items)), loss=torch.ones(len(items)), suggested=torch.full((len(items),), most))
    df = ledger.item_weights()
    assert df.steps[1] == most and df.zero[1] == 1 and ledger.item_evidence().visits[1] == most
    assert ledger.item_evidence().suggested[1] == most

def test_columns_that_are_not_always_seen():
    "Each has its own number of visits, as in the full ledger."
    def some():
        rng = np.random.default_rng(0)
        for step,(epoch,items,weights,seen) in enumerate(visits()):
            seen['margin'] = torch.where(torch.tensor(rng.random(16)) < 0.3, torch.nan, seen['margin'])
            if step % 7 == 2: del seen['log_prob']
            if step % 5 == 3: del seen['suggested']
            yield epoch,items,weights if step > 20 else None,seen
    full,compact = [filled(Ledger(n_items, compact=o), some()) for o in (False, True)]
    assert_close(compact.item_weights(), full.item_weights(), 1e-5)
    assert_close(compact.item_evidence(), full.item_evidence())

def test_compact_ledgers_are_merged():
    def three(compact): return [filled(Ledger(n_items, compact=compact), visits(seed=s, smoothing=0.1*(s == 1))) for s in range(3)]
    (a,b,c),(x,y,z) = three(False),three(True)
    before = y.state()
    full,compact = a.merge(b).merge(c),x.merge(y).merge(z)
    assert_close(compact.item_weights(), full.item_weights(), 1e-5)
    assert_close(compact.item_evidence(), full.item_evidence(), 4e-3)
    pd.testing.assert_frame_equal(compact.class_weights(), full.class_weights())
    assert all(torch.equal(o, before[k]) for k,o in y.state().items()), 'the other stays as it is'
    for o in (compact, full): filled(o, ((3, *rest) for _,*rest in visits(10, seed=9)))
    assert_close(compact.item_evidence(), full.item_evidence(), 4e-3)
    with pytest.raises(ValueError, match='other has compact=True, but this ledger has compact=False'): full.merge(compact)

@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_the_state_of_a_compact_ledger(smoothing):
    ledger,whole = [filled(Ledger(n_items, compact=True), visits(smoothing=smoothing)) for _ in range(2)]
    state = ledger.state()
    kept = {k: o.clone() for k,o in state.items()}
    again = Ledger(n_items)
    again.load({k: o.double() if o.is_floating_point() else o.float() for k,o in state.items()}) # as an optimizer's state may change them
    assert again.compact
    copied = whole.copy()
    for o in (ledger, again, whole): filled(o, ((3, *rest) for _,*rest in visits(10, seed=9)))
    for o in (ledger, again):
        pd.testing.assert_frame_equal(o.item_weights(), whole.item_weights())
        pd.testing.assert_frame_equal(o.item_evidence(), whole.item_evidence())
        pd.testing.assert_frame_equal(o.class_weights(), whole.class_weights())
    assert all(torch.equal(kept[k], state[k]) for k in kept), 'a state does not change any more'
    assert copied.item_weights().steps.sum() == 120*16
    empty = Ledger(3, compact=True)
    empty.load(Ledger(3, compact=True).state())
    assert empty.compact
    with pytest.raises(ValueError, match='no weights have been recorded'): empty.item_weights()

# ---- sums over classes

@pytest.mark.parametrize('compact', [False, True])
def test_sums_over_classes(compact):
    log = pd.concat([pd.DataFrame(dict(epoch=e, label=s['label'], weight=w)) for e,_,w,s in visits(n_epochs=6)])
    ledger = Ledger(n_items, keep=3, compact=compact)
    for epoch,items,weights,seen in visits(n_epochs=6):
        ledger.begin_epoch(epoch)
        ledger.add(None if epoch % 2 else items, weights, 'nobody told', **seen)
    def expected(log):
        means = dict(weight=('weight', 'mean'), zero=('zero', 'mean'), steps=('weight', 'size'))
        return log.assign(zero=log.weight == 0).groupby('label').agg(**means)
    for got,want in ((ledger.class_weights(), log), (ledger.class_weights(4), log[log.epoch == 4])):
        np.testing.assert_allclose(got, expected(want), rtol=1e-6)
        assert got.index.name == 'class' and got.index.tolist() == list(range(5))
    with pytest.raises(ValueError, match=r'epoch=1 is not kept by itself: those that are kept are \[3, 4, 5\]'): ledger.class_weights(1)
    with pytest.raises(ValueError, match='nobody told'): ledger.item_weights()
    with pytest.raises(ValueError, match='nothing is known of classes'): Ledger(3).class_weights()

# ---- keys

def as_text(items): return [f'shard-{i//7}/{i}' for i in items.tolist()]

@pytest.mark.parametrize('compact', [False, True])
def test_items_called_by_keys(compact):
    by_place,by_key = Ledger(n_items, compact=compact),Ledger(None, compact=compact)
    filled(by_place, visits()), filled(by_key, visits(), as_text)
    for f in (Ledger.item_weights, Ledger.item_evidence):
        want = f(by_place)
        want.index = pd.Index(as_text(torch.tensor(want.index)), name='item')
        assert_close(f(by_key).loc[want.index], want, 4e-3 if compact else 1e-12) # what is rounded up and what down depends on the order
    assert len(by_key.keys) == len(by_key.item_weights()) and by_place.keys is None
    if not compact: assert by_key.epoch_weights(1).index.isin(by_key.keys).all()

@pytest.mark.parametrize('compact', [False, True])
def test_a_ledger_of_keys_grows(compact):
    ledger,want = Ledger(None, compact=compact),{}
    for k in range(60):
        items = [f'{k} {i}' for i in range(100)] + ['always']
        ledger.add(items, torch.full((101,), float(k)), loss=torch.full((101,), float(k)), suggested=torch.full((101,), k))
        want |= {o: k for o in items[:100]}
    df,seen = ledger.item_weights(),ledger.item_evidence()
    assert {k: int(o) for k,o in df.weight.items() if k != 'always'} == want
    assert (df.weight['always'], df.steps['always'], seen.suggested['always']) == (29.5, 60, 59)
    assert len(df) == 6001 <= ledger.n_items <= 1.3*6001, 'with little more room than is needed'

@pytest.mark.parametrize('compact', [False, True])
def test_ledgers_of_keys_are_merged_by_keys(compact):
    a,b = Ledger(None, compact=compact),Ledger(None, compact=compact)
    a.add(['x', 'y', 7], torch.tensor([1., 2., 3.]), loss=torch.tensor([1., 2., 3.]))
    b.add([7, 'z', 'x'], torch.tensor([5., 6., 7.]), loss=torch.tensor([5., 6., 7.]))
    for df in (a.merge(b).item_weights(), a.item_evidence().rename(columns=dict(loss='weight'))):
        assert df.weight.to_dict() == {'x': 4, 'y': 2, 7: 4, 'z': 6}
    assert b.keys == [7, 'z', 'x']
    with pytest.raises(ValueError, match='other calls items by positions, and this ledger by keys'): a.merge(Ledger(3))

@pytest.mark.parametrize('compact', [False, True])
def test_the_state_of_a_ledger_of_keys(compact):
    ledger,again = filled(Ledger(None, compact=compact), visits(), lambda o: [f'Schlüssel {i}' for i in o.tolist()]),Ledger(None)
    again.load(ledger.state())
    for o in (ledger, again): o.add(['new', 'Schlüssel 3'], torch.ones(2))
    pd.testing.assert_frame_equal(again.item_weights(), ledger.item_weights())
    with pytest.raises(ValueError, match='state calls items by keys: make the ledger with n_items=None'):
        Ledger(n_items).load(ledger.state())
    with pytest.raises(ValueError, match=r'state calls items by positions: make the ledger with n_items=3\b'): again.load(Ledger(3).state())

@pytest.mark.parametrize('key', [None, 1.5, True, (1, 2)])
def test_what_is_no_key(key):
    with pytest.raises(ValueError, match='items has the key .*, but keys must be texts or whole numbers'):
        Ledger(None).add(['a', key], torch.ones(2))

# ---- streams

x,y = images,torch.tensor(labels)

class Stream(IterableDataset):
    "Digits one after the other, `n` of them; a pass reads `n` of them from the beginning, with a key each."
    def __init__(self, items, key=None, n=None): self.items,self.key,self.n = items,key,n
    def __len__(self): return self.n or len(self.items)
    def __iter__(self):
        for i in self.items: yield (x[i], y[i]) if self.key is None else (x[i], y[i], self.key(i))

def as_name(i): return f'digit {i}'

loaders = dict(torch=lambda ds, bs: TorchLoader(ds, bs), fastai=lambda ds, bs: DataLoader(ds, bs=bs, num_workers=0),
    workers=lambda ds, bs: TorchLoader(ds, bs, num_workers=1))

class Spy(Callback):
    "Sees weights and labels, and computes each batch's weights once more."
    order,run_valid = 10001,False
    def before_fit(self): self.log,self.wanted = [],[]
    def before_batch(self):
        step = self.meta_reweight.step
        self.inputs = tuple(self.xb),tuple(self.yb)
        self.state = {k: o.clone() for k,o in self.model.state_dict().items()}
    def after_loss(self):
        step,model = self.meta_reweight.step,nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        model.load_state_dict(self.state)
        want = example_weights(model, nn.CrossEntropyLoss(reduction='none'), self.inputs, step.meta_batch)
        torch.testing.assert_close(step.weights, want, rtol=1e-4, atol=1e-6)
        self.log += zip(step.items if step.items is not None else [None]*len(want), (step.weights*len(want)).tolist(), self.yb[0].tolist())

def make(kind='torch', key=None, trusted_key=None, cbs=(), n_items=None, trusted=None, **kwargs):
    set_seed(0)
    make_dl = loaders[kind]
    dls = DataLoaders(make_dl(Stream(parts[0], key), 16), make_dl(Stream(parts[1], key), 16))
    reweight = MetaReweightCallback(trusted or make_dl(Stream(parts[2][:24], trusted_key), 12), **kwargs)
    cbs = [reweight, Spy(), *([ItemKeys(2, n_items)] if key else []), *cbs]
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), loss_func=CrossEntropyLossFlat(), lr=0.1, cbs=cbs)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.mark.parametrize('kind', ['torch', 'fastai', 'workers'])
@pytest.mark.filterwarnings('ignore:nothing will be known of single training items')
def test_a_stream_without_keys_is_weighed(kind):
    learn = make(kind)
    learn.fit(2)
    assert len(learn.spy.log) == 2*len(parts[0])
    cb = learn.meta_reweight
    for f in (cb.item_weights, cb.item_evidence, lambda: MetaInterpretation.from_learner(learn)):
        with pytest.raises(ValueError, match='reads its items one after the other, from data without positions: .*ItemKeys'): f()
    log = pd.DataFrame(learn.spy.log, columns=['item', 'weight', 'label']).groupby('label').weight
    got = cb.class_weights()
    np.testing.assert_allclose(got.weight, log.mean(), rtol=1e-5)
    assert got.steps.tolist() == log.size().tolist()
    assert cb.class_weights(1).steps.sum() == len(parts[0])

@pytest.mark.parametrize('kind', ['torch', 'fastai', 'workers'])
@pytest.mark.parametrize('trusted_key', [None, as_name])
def test_items_of_a_stream_are_told_by_keys(kind, trusted_key):
    learn = make(kind, as_name, trusted_key)
    learn.fit(2)
    with pytest.raises(ValueError, match=r'called by keys .*learn.meta_reweight.item_evidence\(\)'): MetaInterpretation.from_learner(learn)
    log = pd.DataFrame(learn.spy.log, columns=['item', 'weight', 'label']).groupby('item')
    df,seen = learn.meta_reweight.item_weights(),learn.meta_reweight.item_evidence()
    assert df.index.tolist() == [as_name(i) for i in parts[0]]
    np.testing.assert_allclose(df.weight, log.weight.mean()[df.index], rtol=1e-4, atol=1e-6)
    assert seen.label.tolist() == log.label.first()[df.index].tolist() and set(seen.visits) == {2}
    assert learn.validate()[0] > 0

def test_whole_numbers_are_positions():
    "Then the stream is weighed as a list of the same items would be, calibrated or not."
    place = {i: k for k,i in enumerate(dict.fromkeys(parts[0]))}
    learn = make(key=lambda i: place.get(i, 0), n_items=len(place))
    learn.fit(2)
    df = learn.meta_reweight.item_weights()
    assert df.index.tolist() == list(range(len(place)))
    learn = make(key=lambda i: place.get(i, 0), n_items=len(place), calibrate=True)
    learn.remove_cbs(Spy)
    learn.fit(2)
    assert len(learn.meta_reweight.item_weights()) == len(place)
    for key,words in ((as_name, 'ItemKeys their n_items'), (None, 'one after the other.*ItemKeys')):
        with pytest.raises(ValueError, match=f'calibrate=True needs to know which items.*{words}'): make(key=key, calibrate=True).fit(1)

def test_a_function_gives_the_keys_and_leaves_the_batch():
    learn = make()
    def bright(batch): return [round(float(o.sum()), 3).hex() for o in batch[0]]
    learn.add_cb(ItemKeys(bright))
    learn.fit(1)
    assert learn.meta_reweight.item_weights().index.tolist() == list(dict.fromkeys(bright([x[parts[0]]])))

def test_keys_are_taken_out_for_a_plain_learner_and_for_other_batches():
    learn = make(key=as_name)
    learn.remove_cbs([MetaReweightCallback, Spy])
    learn.fit(1)
    with_keys = learn.get_preds(dl=learn.dls.valid)[0]
    without = learn.get_preds(dl=TorchLoader(Stream(parts[1]), 16))[0]
    inputs_only = learn.get_preds(dl=DataLoader([(o,) for o in x[parts[1]]], bs=16, num_workers=0), with_loss=False)[0]
    assert torch.equal(with_keys, without) and torch.equal(with_keys, inputs_only)

def test_a_resumed_fit_goes_on_with_its_keys(tmp_path):
    learn = make(key=as_name)
    learn.path = tmp_path
    learn.fit(2)
    learn.save('two')
    other = make(key=as_name)
    other.path = tmp_path
    other.load('two', with_opt=True)
    other.fit(3, start_epoch=2)
    learn.fit(1) # a new fit, of one epoch
    assert set(other.meta_reweight.item_weights().steps) == {3} and set(learn.meta_reweight.item_evidence().visits) == {1}
    assert other.meta_reweight.item_weights().index.tolist() == [as_name(i) for i in parts[0]]

def test_mixed_batches_of_a_stream():
    learn = make(key=as_name, cbs=[MixUp()])
    learn.remove_cbs(Spy)
    learn.fit(1)
    df = learn.meta_reweight.item_weights()
    assert len(df) == len(set(parts[0])) and df.weight.mean() == pytest.approx(1, rel=0.2)

@pytest.mark.filterwarnings('ignore:nothing will be known of single training items')
def test_streams_without_an_end():
    "`n` says how long an epoch is, and a trusted stream is read as long as it takes."
    class Endless(IterableDataset):
        def __iter__(self):
            k = 0
            while True:
                yield x[k % 100],y[k % 100]
                k += 1
    set_seed(0)
    train = DataLoader(Endless(), bs=16, n=64, num_workers=0)
    dls = DataLoaders(train, DataLoader(list(zip(x[:32], y[:32])), bs=16, num_workers=0))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), loss_func=CrossEntropyLossFlat(), lr=0.1,
        cbs=[MetaReweightCallback(TorchLoader(Endless(), 12)), Spy()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert len(learn.spy.log) == 2*64

@pytest.mark.parametrize('args, error, message', [(('id',), TypeError, 'key is a str, but must be a place in the batch, such as 2'),
    ((True,), TypeError, 'key is a bool'), ((0,), ValueError, 'key=0 must be a place in the batch after its first element'),
    ((-1,), ValueError, 'key=-1 must be'), ((2, 0), ValueError, 'n_items=0 must be a whole number, 1 or more')])
def test_wrong_arguments_of_keys(args, error, message):
    with pytest.raises(error, match=message): ItemKeys(*args)

@pytest.mark.parametrize('key, n_items, message', [
    (lambda i: 1.5*i, None, 'keys of a batch must be texts or whole numbers, and one is'),
    (lambda i: torch.tensor([i, i]), None, 'has 16 items and 32 keys: give one for each'),
    (lambda i: i, 50, 'must be a whole number from 0 to below n_items=50'),
    (as_name, 50, r"the key 'digit \d+' must be a whole number from 0 to below n_items=50: leave n_items out")])
def test_wrong_keys(key, n_items, message):
    learn = make(key=key, n_items=n_items)
    with pytest.raises(ValueError, match=message): learn.fit(1)
    assert learn.loss_func.func.reduction == 'mean'
    with pytest.raises(ValueError, match=message): learn.fit(1)

def test_a_key_at_a_place_that_is_not_there():
    learn = make(cbs=[ItemKeys(2)])
    with pytest.raises(ValueError, match=r'ItemKeys\(2\) takes the element 2 of a batch, counted from 0, and the training batches have 2'):
        learn.fit(1)

def test_the_training_stream_is_not_trusted():
    learn = make()
    learn.meta_reweight.meta_dl = TorchLoader(learn.dls.train.dataset, 4)
    with pytest.raises(ValueError, match='reads the training set'): learn.fit(1)

# ---- what needs room

def test_calibrating_says_what_it_needs(monkeypatch):
    "And does not begin what can't end well."
    monkeypatch.setattr('fastai_l2rw.ledger.memory_of', lambda device: 64e9)
    check_room(10**7, 10)
    with pytest.warns(UserWarning, match=r'100 classes and 10,000,000 items, 8.3 GB on the device cpu, and needs 33.3 GB while it judges'):
        check_room(10**7, 100)
    with pytest.raises(ValueError, match='1000 classes and 10,000,000 items, 80.3 GB .*, which has 64.0 GB: use calibrate=False'):
        check_room(10**7, 1000)
    learn = make(key=lambda i: i, n_items=10**10, calibrate=True)
    learn.dls.vocab = ['a', 'b', 'c', 'd']
    with pytest.raises(ValueError, match='4 classes and 10,000,000,000 items'): learn.fit(1)

def test_nothing_is_kept_for_items_that_nobody_knows():
    ledger = Ledger(10**6)
    for epoch,items,weights,seen in visits(): ledger.add(None, weights, 'nobody told', **seen)
    assert n_bytes(ledger) < 1000 and ledger.class_weights().steps.sum() == 120*16

# ---- labels, draws and splits

def test_a_label_is_read_once_for_each_item():
    calls = []
    def label_of(i):
        calls.append(i)
        return f'class {i % 7}'
    tfms = [[noop], [label_of, Categorize(vocab=[f'class {k}' for k in range(7)])]]
    ds = Datasets(range(700), tfms, splits=[range(600), range(600, 700)])
    dls = DataLoaders(TfmdDL(ds.train, bs=8, num_workers=0), TfmdDL(ds.valid, bs=8, num_workers=0))
    calls.clear()
    assert class_counts(dls).tolist() == [86, 86, 86, 86, 86, 85, 85] and len(calls) == 600
    held,meta_dl = hold_out_meta(dls, 5, checked=True)
    assert len(held.train_ds) == 565 and meta_dl.n == 35

def test_a_draw_does_not_depend_on_how_classes_are_found():
    "Many classes, of several types, in the order of their names; items that stand alone are drawn as groups of one."
    labels = np.array([(k, str(k))[k % 2] for k in range(40)]*12, dtype=object)
    items = list(range(len(labels)))
    def drawn(**kwargs):
        return MetaSplitter(lambda o: (range(40, 480), range(40)), 3, labels, checked=True, seed=3, **kwargs)(items)[2]
    alone,groups = drawn(),drawn(groups=items)
    assert list(alone) == list(groups) and len(alone) == 120
    assert pd.Series(labels[list(alone)]).value_counts().eq(3).all()

def test_a_fit_with_a_compact_ledger_is_resumed(tmp_path):
    place = {i: k for k,i in enumerate(parts[0])}
    def learner():
        learn = make(key=lambda i: place.get(i, 0), n_items=len(place))
        learn.path,learn.item_ledger.compact = tmp_path,True
        return learn
    learn,other = learner(),learner()
    learn.fit(2)
    learn.save('compact')
    other.load('compact', with_opt=True)
    other.fit(3, start_epoch=2)
    assert learn.item_ledger.ledger.compact and other.item_ledger.ledger.compact
    assert set(other.meta_reweight.item_weights().steps) == set(other.meta_reweight.item_evidence().visits) == {3}
    log = pd.DataFrame(learn.spy.log + other.spy.log, columns=['item', 'weight', 'label'])
    want = log.assign(item=log.item.astype(int)).groupby('item').weight.mean()
    np.testing.assert_allclose(other.meta_reweight.item_weights().weight, want, rtol=1e-4, atol=1e-6)
