"What MetaInterpretation tells of a training: against what a spy among the callbacks saw, and one backward pass per example."
import sys, warnings
from copy import deepcopy
from functools import partial
import matplotlib; matplotlib.use('agg')
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import (Callback, CategoryBlock, ColReader, DataBlock, DataLoaders, Datasets, Learner, RegressionBlock, SkipItemException, TfmdDL, TransformBlock, noop,
    set_seed)
from fastai.callback.all import CSVLogger, CutMix, MixUp, ProgressCallback, SaveModelCallback, WeightedDL
from fastai.optimizer import OptimWrapper
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, Normalize, TabularPandas, tabular_learner
from fastai.text.data import LMDataLoader
from fastai.vision.core import PILImage, PILImageBW
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchLoader, SubsetRandomSampler, TensorDataset

from conftest import cnn, digits, images, labels, make_dls, meta, tensors, train, valid
from fastai_l2rw.all import MetaInterpretation, MetaReweightCallback, MetaWeightNetCallback, PartSplitter
from fastai_l2rw.interpret import item_sources
from fastai_l2rw.quality import recalibrated
from fastai_l2rw.ledger import Ledger

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))

flat_images = images.flatten(1)

def positions_of(x):
    "Which training items these images are, by what is in them."
    return torch.cdist(x.flatten(1).as_subclass(Tensor).float(), flat_images[train]).argmin(1)

class Spy(Callback):
    "Sees each training step from outside: a row for each item and step."
    order,run_valid = 200,False
    def __init__(self, skip=False): self.rows = []
    def before_batch(self): self.items = positions_of(self.xb[0])
    def after_loss(self):
        cb = next(o for o in self.learn.cbs if isinstance(o, MetaReweightCallback))
        z,y = self.pred.detach().as_subclass(Tensor),self.yb[0].as_subclass(Tensor)
        w = cb.step.weights*len(y) if cb.step is not None else torch.full((len(y),), torch.nan)
        p = z.log_softmax(1)
        for i,item in enumerate(self.items.tolist()):
            others = z[i].clone()
            others[y[i]] = -torch.inf
            self.rows.append(dict(epoch=self.epoch, item=item, weight=w[i].item(), loss=-p[i, y[i]].item(), log_prob=p[i, y[i]].item(), label=y[i].item(),
                margin=(z[i, y[i]] - others.max()).item(), suggested=others.argmax().item(), predicted=z[i].argmax().item()))
    @property
    def log(self): return pd.DataFrame(self.rows)

def recent(values, decay=0.5):
    counts = decay**np.arange(len(values))[::-1]
    return (counts*values).sum()/counts.sum()

def check_table(interp, log, vocab):
    "Is each number of the table what the spy saw?"
    df,by_item = interp.table(),log.groupby('item')
    assert df.index.name == 'item' and list(df.index) == list(range(interp.ledger.n_items))
    seen = df[df.visits > 0]
    assert list(seen.index) == sorted(by_item.groups)
    for o in ('loss', 'log_prob', 'margin'): np.testing.assert_allclose(seen[o], by_item[o].mean(), rtol=1e-4, atol=1e-5)
    evidence = interp.ledger.item_evidence()
    for o in ('loss', 'log_prob', 'margin'):
        np.testing.assert_allclose(evidence[f'{o}_recent'], by_item[o].apply(lambda v: recent(v.to_numpy())), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen.label_quality, np.exp(by_item.log_prob.apply(lambda v: recent(v.to_numpy()))), rtol=1e-4, atol=1e-5)
    weighed = log.dropna(subset='weight').groupby('item')
    np.testing.assert_allclose(df.weight.dropna(), weighed.weight.mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(df.zero.dropna(), weighed.weight.apply(lambda w: (w == 0).mean()), rtol=1e-4, atol=1e-5)
    assert seen.visits.tolist() == by_item.size().tolist()
    last = by_item.last()
    for o in ('label', 'suggested', 'predicted'): assert seen[o].tolist() == [str(vocab[i]) for i in last[o]]

def trained(make_learner, cbs=(), epochs=2, cb=None, dls=None, model=None, **kwargs):
    learn = make_learner([MetaReweightCallback() if cb is None else cb, *cbs, spy := Spy()], dls=dls, model=mlp() if model is None else model, **kwargs)
    learn.fit(epochs, 0.02)
    return learn,spy

# ---- the table

@pytest.mark.parametrize('kwargs', [{}, dict(start=1), dict(skip_zeros=True), dict(relative=True), dict(engine='forward')], ids=lambda o: ' '.join(o) or 'default')
def test_the_table_is_what_was_seen(make_learner, kwargs):
    learn,spy = trained(make_learner, cb=MetaReweightCallback(**kwargs), epochs=3)
    interp = MetaInterpretation.from_learner(learn)
    check_table(interp, spy.log, learn.dls.vocab)
    assert interp.table().source.tolist() == train

def test_meta_weight_net_has_the_same_table(make_learner):
    learn,spy = trained(make_learner, cb=MetaWeightNetCallback())
    check_table(MetaInterpretation.from_learner(learn), spy.log, learn.dls.vocab)

class Skips:
    "Training items of which some can't be read."
    def __init__(self, ds): self.ds = ds
    def __len__(self): return len(self.ds)
    def __getattr__(self, name):
        if name.startswith('__') or name == 'ds': raise AttributeError(name)
        return getattr(self.ds, name)
    def __getitem__(self, i):
        if i % 5 == 0: raise SkipItemException
        return self.ds[i]

def other_loader(change):
    dls = make_dls()
    dls.loaders[0] = change(dls)
    return dls

@pytest.mark.parametrize('change', [lambda dls: dls.train.new(drop_last=False, bs=7), lambda dls: dls.train.new(num_workers=1), lambda dls: dls.train.new(Skips(dls.train_ds)),
    lambda dls: dls.train.new(get_idxs=lambda: [0, 3, 3, 8]*8), lambda dls: dls.train.new(shuffle=False, n=40)], ids='all workers skipped drawn part'.split())
def test_right_for_other_loaders(make_learner, change):
    learn,spy = trained(make_learner, dls=other_loader(change))
    interp = MetaInterpretation.from_learner(learn)
    check_table(interp, spy.log, learn.dls.vocab)
    unseen = interp.table()[interp.table().visits == 0]
    known = isinstance(learn.dls.train.dataset, Datasets) # of others, labels can't be read without the inputs
    assert unseen.loss.isna().all() and unseen.label.tolist() == [f'digit {labels[train[i]]}' if known else None for i in unseen.index]
    assert len(interp.label_issues(1000)) == len(train) - len(unseen)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('start', [0, 1])
def test_both_partners_of_a_mixed_batch(make_learner, mix, start):
    rows,noisy = [],images + torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    set_seed(0)
    block = DataBlock((TransformBlock, CategoryBlock), splitter=lambda _: (train, valid, meta), get_x=lambda i: noisy[i], get_y=lambda i: f'digit {labels[i]}')
    dls = block.dataloaders(range(len(labels)), bs=16, num_workers=0)
    class Before(Callback):
        order,run_valid = -1,False
        def before_batch(self): self.learn.unmixed = self.x.clone()
    class After(Callback):
        order,run_valid = 200,False
        def before_batch(self):
            mixer = self.mix_up if mix is MixUp else self.cut_mix
            n,lam = len(self.x),mixer.lam.as_subclass(Tensor).expand(len(self.x))
            x,others = self.learn.unmixed.flatten(1),self.x.flatten(1)
            if mix is MixUp: # which other one it has been mixed with: the one that gives the mixture
                mixtures = lam[:, None, None]*x[:, None] + (1 - lam)[:, None, None]*x[None]
            else: # each pixel is that of one of the two
                changed = (others != x)[:, None]
                mixtures = torch.where(changed.any(0, keepdim=True), x[None], x[:, None])
            self.partner = (mixtures - others[:, None]).abs().sum(2).argmin(1)
            self.own,self.lam = torch.cdist(x.as_subclass(Tensor), noisy[train].flatten(1)).argmin(1),lam
        def after_loss(self):
            cb = self.learn.meta_reweight
            if cb.step is None: return
            for i,w in enumerate((cb.step.weights*len(self.own)).tolist()):
                rows.append((self.own[i].item(), self.lam[i].item()*w, 1))
                rows.append((self.own[self.partner[i]].item(), (1 - self.lam[i].item())*w, 0))
    learn = make_learner([MetaReweightCallback(start=start), mix(), Before(), After()], dls=dls, model=mlp())
    learn.fit(2 + start, 0.02)
    by_item = pd.DataFrame(rows, columns=['item', 'weight', 'step']).groupby('item')
    got = learn.meta_reweight.item_weights()
    assert got.steps.tolist() == by_item.step.sum().tolist()
    np.testing.assert_allclose(got.weight*got.steps, by_item.weight.sum(), rtol=1e-3, atol=2e-3)
    interp = MetaInterpretation.from_learner(learn)
    assert 'suggested' not in interp.table() and interp.table().loss.notna().sum() == len(got), 'what a model says of a mixture is no evidence of a label'
    assert all('before_batch' not in vars(cb) for cb in learn.cbs)
    names = pd.Series([f'digit {labels[i]}' for i in train])
    mass,steps = by_item.weight.sum().groupby(names).sum(),by_item.step.sum().groupby(names).sum()
    np.testing.assert_allclose(interp.class_mass().weights, (mass/mass.sum())[interp.class_mass().index], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(interp.class_mass().data, (steps/steps.sum())[interp.class_mass().index])
    assert set(interp.label_issues(2, label='digit 1').label) == {'digit 1'}
    assert interp.show_label_issues(1)[0].get_title().count('\n') == 1, 'label and quality, no suggestion'

def test_an_error_leaves_mixing_usable(make_learner):
    def stop(self):
        if self.training and self.iter == 2: raise RuntimeError('stop')
    learn = make_learner([MetaReweightCallback(), MixUp()], model=mlp())
    with pytest.raises(RuntimeError, match='stop'): learn.fit(1, cbs=Callback(before_step=stop))
    learn.fit(1)
    assert 'before_batch' not in vars(learn.mix_up) and MetaInterpretation.from_learner(learn).table().visits.sum() == 16*len(learn.dls.train)

def test_a_second_fit_begins_anew_and_runs_can_be_merged(make_learner):
    learn,spy = trained(make_learner)
    first,log = learn.meta_reweight.record_of_items.ledger,spy.log
    interp = MetaInterpretation.from_learner(learn)
    before = interp.table()
    learn.lr_find(show_plot=False, num_it=5)
    spy.rows = []
    learn.fit(1, 0.02)
    pd.testing.assert_frame_equal(interp.table(), before, obj='what was taken of a fit stays')
    check_table(MetaInterpretation.from_learner(learn), spy.log, learn.dls.vocab)
    both,logs = MetaInterpretation.from_learner(learn, [first]).table(),pd.concat([log, spy.log]).groupby('item')
    np.testing.assert_allclose(both.loss.dropna(), logs.loss.mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.weight.dropna(), logs.weight.mean(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='other is of 3 items'): MetaInterpretation.from_learner(learn, [Ledger(3)])

def test_a_checkpoint_keeps_what_was_seen(make_learner):
    def make():
        return make_learner([MetaReweightCallback(), Spy(), SaveModelCallback(every_epoch=True, with_opt=True)], model=mlp())
    learn = make()
    learn.fit(3, 0.02)
    other = make()
    other.load('model_1', with_opt=True)
    other.fit(3, 0.02, start_epoch=2)
    a,b = [MetaInterpretation.from_learner(o) for o in (learn, other)]
    n = min(o.visits.sum() for o in (a.table(), b.table()))
    assert n == 3*16*len(learn.dls.train) == b.table().visits.sum()
    log = pd.concat([learn.spy.log.query('epoch < 2'), other.spy.log])
    check_table(b, log, learn.dls.vocab)
    figures = b.reweight.record_of_items.epoch_figures()
    assert list(figures.index) == [0, 1, 2] and figures.ess.notna().all()
    fresh = make()
    fresh.load('model_2', with_opt=True)
    fresh.fit(1, 0.02)
    assert MetaInterpretation.from_learner(fresh).table().visits.sum() == 16*len(learn.dls.train), 'a fit that does not go on begins anew'
    again = make()
    again.load('model_2', with_opt=True)
    again.fit(2, 0.02, start_epoch=1) # from a checkpoint that has seen a later epoch
    assert MetaInterpretation.from_learner(again).table().visits.sum() == 16*len(learn.dls.train)

class Cast(nn.Module):
    def __init__(self, dtype): super().__init__(); self.dtype = dtype
    def forward(self, x): return x.to(self.dtype)

def test_a_checkpoint_is_exact_where_an_optimizer_casts_its_state(make_learner):
    "PyTorch's optimizers cast what they load to the type of the parameter: in bfloat16, 257 would become 256."
    def make():
        return make_learner(MetaReweightCallback(), model=nn.Sequential(nn.Flatten(), Cast(torch.bfloat16), nn.Linear(64, 4).bfloat16(), Cast(torch.float32)),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    learn,other,found = make(),make(),[]
    learn.fit(2)
    learn.save('bf16')
    other.load('bf16', with_opt=True)
    def look(self):
        if self.training and self.iter == 0 and self.epoch == 2: found.append(self.learn.meta_reweight.record_of_items.ledger.state())
    other.fit(3, start_epoch=2, cbs=Callback(before_batch=look))
    want = learn.meta_reweight.record_of_items.ledger.state()
    assert set(found[0]) == set(want) and all(torch.equal(o, want[k]) for k,o in found[0].items() if k != 'marks')

def test_what_was_seen_changes_nothing_of_the_training(make_learner):
    both = []
    for record in (True, False):
        set_seed(5)
        learn = make_learner(MetaReweightCallback(start=1, record=record), model=cnn())
        learn.fit(2, 0.02)
        both.append([*learn.model.state_dict().values(), torch.rand(1)])
    for a,b in zip(*both): assert torch.equal(a, b)

# ---- sorting, and what is refused

def test_the_most_suspicious_come_first(make_learner):
    learn,_ = trained(make_learner)
    interp = MetaInterpretation.from_learner(learn)
    df = interp.table()
    by_quality,by_loss = interp.table('label_quality'),interp.table('loss')
    assert by_quality.label_quality.dropna().is_monotonic_increasing and by_loss.loss.dropna().is_monotonic_decreasing
    assert set(by_quality.index) == set(df.index)
    seen = df[df.visits > 0]
    assert interp.label_issues(7).index.tolist() == seen.label_quality.sort_values(kind='stable').index[:7].tolist()
    assert interp.label_issues(7, by='loss').index.tolist() == seen.loss.sort_values(ascending=False, kind='stable').index[:7].tolist()
    one = interp.label_issues(3, label='digit 2')
    assert one.index.tolist() == seen[seen.label == 'digit 2'].label_quality.sort_values(kind='stable').index[:3].tolist()
    each = interp.label_issues(3, per_class=True)
    assert each.index.tolist() == [i for k in range(4) for i in interp.label_issues(3, label=f'digit {k}').index]

def test_wrong_input(make_learner):
    learn,_ = trained(make_learner)
    interp = MetaInterpretation.from_learner(learn)
    for by in ('weight', 'zero'):
        with pytest.raises(ValueError, match=f"by='{by}' does not tell right labels from wrong ones.*use 'label_quality' or 'loss'"):
            interp.table(by)
    with pytest.raises(ValueError, match="by='quality' is unknown: use 'label_quality' or 'loss'"): interp.label_issues(by='quality')
    for n in (0, 2.5, True):
        with pytest.raises(ValueError, match=f'n={n} must be a number of items'): interp.label_issues(n)
    with pytest.raises(ValueError, match="label='cat' is the label of no item that was visited: there are digit 0, digit 1"):
        interp.label_issues(label='cat')
    with pytest.raises(ValueError, match='drop has -1, but must have positions of training items, from 0 to 79'):
        interp.drop_or_relabel([-1])
    with pytest.raises(ValueError, match="relabel has '3', but must have positions"): interp.drop_or_relabel(relabel={'3': 'digit 0'})
    with pytest.raises(ValueError, match=r'the items 3 are in drop and in relabel'): interp.drop_or_relabel([2, 3], {3: 'digit 0'})
    with pytest.raises(ValueError, match="relabel has the label 'cat', which is none of digit 0, digit 1, digit 2, digit 3"):
        interp.drop_or_relabel(relabel={3: 'cat'})
    for i in (80, -1, 1.5):
        with pytest.raises(ValueError, match=f'i has {i}, but must have positions of training items, from 0 to 79'): interp.explain(i)
    with pytest.raises(ValueError, match='label_quality has not been calibrated'): interp.plot_quality()
    learn.dls = other_loader(lambda dls: dls.train.new(Datasets(list(range(5)), [[noop], [noop]])))
    with pytest.raises(ValueError, match='learn.dls.train has 5 items, and what was kept is of 80'): MetaInterpretation.from_learner(learn)

def test_learners_that_have_nothing_to_tell(make_learner):
    with pytest.raises(TypeError, match='learn is a DataLoaders, but must be a Learner'): MetaInterpretation.from_learner(make_dls())
    with pytest.raises(ValueError, match='learn has no MetaReweightCallback'): MetaInterpretation.from_learner(make_learner())
    with pytest.raises(ValueError, match='train first'): MetaInterpretation.from_learner(make_learner(MetaReweightCallback()))
    learn = make_learner(MetaReweightCallback(record=False)); learn.fit(1)
    with pytest.raises(ValueError, match='record=False'): MetaInterpretation.from_learner(learn)
    dls = DataLoaders(tensors(images[train], torch.tensor(labels[train]), bs=16), tensors(images[valid], torch.tensor(labels[valid])))
    learn = make_learner(MetaReweightCallback(tensors(images[meta], torch.tensor(labels[meta]))), dls=dls, model=mlp()); learn.fit(1)
    with pytest.raises(ValueError, match="is not one of fastai's.*use fastai's DataLoader on the same data set"):
        MetaInterpretation.from_learner(learn)

def test_pieces_of_texts_are_told_before_training():
    "A language model's loader cuts joined texts, so nothing is known of single texts: said before the first batch, with the way out."
    set_seed(0)
    ds = [(torch.randint(0, 5, (9,)),) for _ in range(12)]
    def loader(): return LMDataLoader(list(ds), lens=[9]*12, bs=2, seq_len=4)
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(5, 8),nn.Linear(8, 5)
        def forward(self, x): return self.out(self.emb(x))
    def learner(**kwargs):
        learn = Learner(DataLoaders(loader(), loader()), Net(), loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(loader(), **kwargs))
        learn.remove_cbs(ProgressCallback); learn.logger = noop
        return learn
    learn,steps = learner(),[]
    learn.add_cb(Callback(after_batch=lambda self: steps.append(self.iter)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserWarning, match='nothing will be known of single training items.*pieces of texts.*use a loader of whole texts.*record=False'):
            learn.fit(1)
        assert not steps
        learner(record=False).fit(1)
    with pytest.warns(UserWarning, match='nothing will be known'): learn.fit(1)
    with pytest.raises(ValueError, match='pieces of texts'): MetaInterpretation.from_learner(learn)

# ---- tables, texts, numbers to predict

def test_the_table_can_be_written(make_learner, tmp_path):
    learn,_ = trained(make_learner, dls=other_loader(lambda dls: dls.train.new(shuffle=False, n=40)))
    df = MetaInterpretation.from_learner(learn).table('loss')
    df.to_csv(tmp_path/'items.csv')
    again = pd.read_csv(tmp_path/'items.csv', index_col='item')
    assert list(again) == list(df)
    for o in df:
        if df[o].dtype.kind in 'fi': np.testing.assert_allclose(again[o], df[o])
        else: assert again[o].fillna('').tolist() == df[o].fillna('').tolist()
    pytest.importorskip('pyarrow')
    df.to_parquet(tmp_path/'items.parquet')
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'items.parquet'), df, check_dtype=False)

def fit_quietly(learn, *args):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    learn.fit(*args)
    return MetaInterpretation.from_learner(learn)

def test_rows_of_a_table(tmp_path):
    set_seed(0)
    df = pd.DataFrame(dict(size=np.random.rand(90), colour=np.random.choice(['red', 'blue'], 90)), index=[f'row {i}' for i in range(90)])
    df['kind'] = np.where(df['size'] > 0.5, 'big', 'small')
    def part(rows):
        return TabularPandas(df.iloc[rows], [Categorify, Normalize], ['colour'], ['size'], y_names='kind', y_block=CategoryBlock(), splits=(list(range(len(rows) - 10)), list(range(len(rows) - 10, len(rows)))))
    dls = part(range(70)).dataloaders(bs=16)
    trusted = dls.test_dl(df.iloc[70:], with_labels=True)
    learn = tabular_learner(dls, layers=[8], cbs=MetaReweightCallback(trusted), path=tmp_path)
    interp = fit_quietly(learn, 3, 0.05)
    got = interp.table()
    assert got.source.tolist() == df.index[:60].tolist() and got.label.tolist() == df.kind[:60].tolist()
    issues = interp.show_label_issues(5)
    assert issues.index.tolist() == interp.label_issues(5).index.tolist()
    assert issues.colour.tolist() == df.colour.iloc[issues.index].tolist() and issues.label.tolist() == df.kind.iloc[issues.index].tolist()
    np.testing.assert_allclose(issues['size'].astype(float), df['size'].iloc[issues.index], rtol=1e-4)
    why = interp.explain(4)
    assert why.trusted.pull.sum() == pytest.approx(why.alignment, abs=1e-5) and set(why.trusted.source) == set(df.index[70:])
    assert why.trusted.label.tolist() == df.kind[why.trusted.source].tolist()
    shown = interp.show_explain(4, n=2)
    assert shown.source[0] == 'row 4' and shown['what'].tolist() == ['item'] + ['pulls up']*2 + ['pulls down']*2
    fixed = interp.drop_or_relabel([0], {1: 'small'})
    assert fixed.item.tolist() == df.index[1:70].tolist() and fixed.label.iloc[0] == 'small'
    assert fixed.part.tolist() == ['train']*59 + ['valid']*10

def test_texts(tmp_path):
    "Words as numbers, padded by a sorted loader; shown as words, and cut off."
    from fastai.text.all import Categorize, Numericalize, SortedDL
    set_seed(0)
    words = dict(good=['fine', 'nice', 'great'], bad=['poor', 'awful', 'dull'])
    rows = pd.DataFrame([dict(text=' '.join(np.random.choice(words[kind], 3 + i % 4)), kind=kind) for i in range(40) for kind in words])
    vocab = ['xxpad', 'xxunk', *words['good'], *words['bad']]
    dsets = Datasets(rows, [[ColReader('text'), str.split, Numericalize(vocab)], [ColReader('kind'), Categorize()]], splits=(list(range(60)), list(range(60, 70)), list(range(70, 80))))
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(len(vocab), 8),nn.Linear(8, 2)
        def forward(self, x): return self.out(self.emb(x).mean(1))
    def pad(samples):
        n = max(len(o[0]) for o in samples)
        return [(torch.cat([o[0].as_subclass(Tensor), torch.zeros(n - len(o[0]), dtype=torch.long)]), *o[1:]) for o in samples]
    dls = dsets.dataloaders(bs=8, dl_type=partial(SortedDL, before_batch=pad), num_workers=0)
    interp = fit_quietly(Learner(dls, Net(), loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(), path=tmp_path), 2, 0.05)
    df = interp.table()
    assert (df.visits == 2).sum() >= 50 and df.label.tolist() == rows.kind[:60].tolist()
    shown = interp.show_label_issues(4, max_len=11)
    assert all(len(o) <= 11 for o in shown.input) and any(o.endswith('…') for o in shown.input)
    assert all(rows.text[i].startswith(o.rstrip('…')) for i,o in shown.input.items())
    why = interp.explain(0)
    assert len(why.trusted) == 10 and why.trusted.pull.sum() == pytest.approx(why.alignment, abs=1e-5)
    fixed = interp.drop_or_relabel([1], {0: 'bad'})
    assert fixed.query("part == 'train'").label.tolist() == ['bad', *rows.kind[2:60]] and fixed.index.tolist() == [0, *range(2, 80)]

def test_numbers_to_predict(tmp_path):
    set_seed(0)
    x = torch.randn(60, 3)
    y = x.sum(1)
    y[7] += 20
    block = DataBlock((TransformBlock, RegressionBlock), get_x=lambda i: x[i], get_y=lambda i: y[i].item(), splitter=lambda _: (list(range(40)), list(range(40, 50)), list(range(50, 60))))
    dls = block.dataloaders(range(60), bs=8, num_workers=0)
    interp = fit_quietly(Learner(dls, nn.Linear(3, 1), loss_func=MSELossFlat(), cbs=MetaReweightCallback(), path=tmp_path), 3, 0.05)
    df = interp.table()
    np.testing.assert_allclose(df.label.astype(float), y[:40], rtol=1e-5)
    assert 'suggested' not in df and df.label_quality.between(0, 1, inclusive='right').all()
    assert interp.label_issues(1).index.tolist() == [7] == interp.label_issues(1, by='loss').index.tolist()
    loss = interp.ledger.item_evidence().loss_recent
    np.testing.assert_allclose(df.label_quality, [(loss >= o).mean() for o in loss])
    for method in (interp.plot_weights, interp.plot_class_mass):
        with pytest.raises(ValueError, match='the items have no classes'): method()
    with pytest.raises(ValueError, match='the items have no classes'): interp.label_issues(per_class=True)
    why = interp.explain(7)
    assert why.trusted.label.isna().all() and why.trusted.pull.sum() == pytest.approx(why.alignment, rel=1e-4)
    assert interp.drop_or_relabel(relabel={7: 1.5}).label[7] == 1.5
    assert interp.calibrate(range(20), wrong=[7]) > 0.75 > df.label_quality.mean()
    assert interp.table('label_quality').index[0] == 7 and interp.show_label_issues(items=[3, 7]).columns.tolist() == ['label','input']

def test_sources():
    from pathlib import Path
    assert item_sources(Listed([Path('a/b.jpg'), 'c', np.int64(3), 4.5])) == ['a/b.jpg', 'c', 3, 3]
    assert item_sources(Listed(pd.DataFrame(dict(x=[1, 2]), index=['u', 'v']))) == ['u', 'v']
    assert item_sources([5, 6]) == [0, 1] and item_sources(Listed([1, 2], n=3)) == [0, 1, 2]

class Listed:
    def __init__(self, items, n=None): self.items,self.n = items,n
    def __len__(self): return self.n or len(self.items)

# ---- what others put in

def test_a_quality_of_the_callback_is_taken(make_learner):
    learn,_ = trained(make_learner)
    cb = learn.meta_reweight
    n = len(train)
    quality = pd.Series(np.linspace(1, 0, n), index=range(n))
    cb.label_quality = lambda: pd.DataFrame(dict(label_quality=quality, suggested=0))
    cb.calibration = lambda: pd.DataFrame(dict(quality=[0.05, 0.15, 0.5, 0.9], right=[0., 0.4, 0.4, 1.]))
    interp = MetaInterpretation.from_learner(learn)
    np.testing.assert_allclose(interp.table().label_quality, quality)
    seen = interp.table().query('visits > 0').index
    assert interp.label_issues(3).index.tolist() == sorted(seen, reverse=True)[:3]
    ax = interp.plot_quality()
    line = next(o for o in ax.lines if o.get_label() == 'trusted examples')
    assert line.get_xydata().tolist() == [[0.1, 0.2], [0.5, 0.4], [0.9, 1.]]
    assert ax.get_xlabel() and ax.get_ylabel()

def test_checked_items_correct_the_quality(make_learner):
    learn,_ = trained(make_learner)
    interp = MetaInterpretation.from_learner(learn)
    before = interp.label_quality()
    items = interp.items_to_check(30)
    assert items == interp.items_to_check(30) != interp.items_to_check(30, seed=1) and len(set(items)) == 30
    assert sorted(interp.items_to_check(1000)) == before.index.tolist() and interp.items_to_check(10) == items[:10]
    wrong = items[::3]
    share = interp.calibrate(np.array(items), torch.tensor(wrong))
    found = interp.label_quality()
    assert share == pytest.approx(found.mean()) and abs(share - 2/3) < 0.1 < abs(before.mean() - 2/3) and found.index.equals(before.index)
    assert [found[i] for i in items] == [float(i not in wrong) for i in items]
    codes = {k: j for j,k in enumerate(dict.fromkeys(interp.classes()[before.index]))}
    at,right = torch.tensor([before.index.get_loc(i) for i in items]),torch.tensor([i not in wrong for i in items])
    want = recalibrated(torch.tensor(before.to_numpy()), torch.tensor([codes[k] for k in interp.classes()[before.index]]), at, right)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert interp.table('label_quality').index[:len(wrong)].sort_values().tolist() == sorted(wrong)
    axs = interp.show_label_issues(items=items[:5])
    assert [o.get_title() for o in axs[:5]] == [f'item {i}: {interp.table().label[i]}' for i in items[:5]] # nothing that would sway a person
    line = interp.plot_quality().lines[1] # each half by the other, so they are not 0 and 1
    assert line.get_label() == 'checked items' and 0 < line.get_xdata().min() and line.get_xdata().max() < 1
    for given,message in [(dict(items=[]), 'items is empty'), (dict(items=[80]), 'items has 80, but must have positions'),
            (dict(items=[1], wrong=[1, 2]), 'wrong has 2, which is not in items'), (dict(items=[1], wrong=['a']), "wrong has 'a'"),
            (dict(items=[0, 1], wrong=torch.tensor([True, False])), 'wrong has True'), (dict(items=7), 'items is 7, but must have positions')]:
        with pytest.raises(ValueError, match=message): interp.calibrate(**given)
    pd.testing.assert_series_equal(interp.label_quality(), found) # what was there is kept
    for n in (0, 1.5, True):
        with pytest.raises(ValueError, match=f'n={n} must be a number of items'): interp.items_to_check(n)
    with pytest.raises(ValueError, match='items is empty'): interp.show_label_issues(items=[])
    assert interp.calibrate(items) > share # all are right

# ---- plots

def test_plots_have_the_right_data(make_learner):
    learn,spy = trained(make_learner, cb=MetaReweightCallback(start=1), epochs=4)
    interp,log = MetaInterpretation.from_learner(learn),spy.log.dropna(subset='weight')
    log['name'] = [f'digit {i}' for i in log.label]
    ax = interp.plot_weights()
    means = log.groupby(['name', 'epoch']).weight.mean()
    lines = {o.get_label(): o for o in ax.lines}
    assert sorted(lines) == ['as all others', *sorted(set(log.name))]
    for name in set(log.name):
        assert lines[name].get_xdata().tolist() == [1, 2, 3]
        np.testing.assert_allclose(lines[name].get_ydata(), means[name], rtol=1e-4, atol=1e-5)
    assert len({(o.get_marker(), o.get_linestyle()) for o in ax.lines}) == 5, 'to be told apart without colours'
    ax = interp.plot_class_mass()
    data,weights = log.groupby('name').size(),log.groupby('name').weight.sum()
    names = [o.get_text() for o in ax.get_yticklabels()]
    for bars,want in zip(ax.containers, (data/data.sum(), weights/weights.sum())):
        np.testing.assert_allclose([o.get_width() for o in bars], 100*want[names], rtol=1e-4)
    assert '%' in ax.get_xlabel()
    ess = log.groupby(['epoch', log.groupby('epoch').cumcount() // 16]).weight.apply(lambda w: w.sum()**2/max((w**2).sum(), 1e-12)).groupby('epoch').mean()
    learn.validate(), learn.get_preds() # which empty the Recorder
    ax = interp.plot_ess()
    np.testing.assert_allclose(ax.lines[0].get_xydata(), list(ess.items()), rtol=1e-3)
    assert ax.lines[1].get_ydata()[0] == 16
    assert all(o.get_xlabel() and o.get_ylabel() and o.get_title() for o in [interp.plot_weights(), ax])

def test_plots_go_where_they_are_told(make_learner):
    learn,_ = trained(make_learner)
    interp = MetaInterpretation.from_learner(learn)
    for plot in (interp.plot_weights, interp.plot_class_mass, interp.plot_ess):
        _,ax = plt.subplots()
        assert plot(ax=ax) is ax and plot(figsize=(3, 2)).figure.get_size_inches().tolist() == [3, 2]
        ax.figure.canvas.draw()
        ax = plot()
        ax.figure.canvas.draw()
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1, 'the legend hides nothing'
        assert ax.get_legend().get_window_extent().x1 <= ax.figure.get_window_extent().x1 + 1, 'and is whole'
    assert {o.get_label() for o in interp.plot_weights(max_classes=2).lines} - {'as all others'} == set(interp.class_weights_by_epoch().iloc[-1].sort_values().index[[0, -1]])
    assert '3 of 4 classes' in interp.plot_weights(max_classes=3).get_title() and len(interp.plot_class_mass(max_classes=2).get_yticklabels()) == 2

def test_classes_of_very_many_items(make_learner, monkeypatch):
    "By epoch, from sums over the classes, as no epochs of single items are kept."
    few = MetaInterpretation.from_learner(trained(make_learner)[0]).class_weights_by_epoch()
    monkeypatch.setattr('fastai_l2rw.ledger.many_items', 10)
    interp = MetaInterpretation.from_learner(trained(make_learner)[0])
    assert interp.ledger.compact and interp.ledger.epochs == [] and interp.ledger.class_epochs == [0, 1]
    many = interp.class_weights_by_epoch()
    pd.testing.assert_frame_equal(many[few.columns], few, rtol=1e-4)
    assert set(many.columns) == set(interp.vocab) and len(interp.plot_weights().lines) == len(few.columns) + 1

def test_plain_training_alone_has_no_weights(make_learner):
    learn,spy = trained(make_learner, cb=MetaReweightCallback(start=5))
    interp = MetaInterpretation.from_learner(learn)
    df = interp.table()
    assert df.weight.isna().all() and df.loss.notna().sum() == spy.log.item.nunique()
    for plot in (interp.plot_weights, interp.plot_class_mass):
        with pytest.raises(ValueError, match='no weights have been recorded'): plot()
    with pytest.raises(ValueError, match='no epoch with weights has ended'): interp.plot_ess()

@pytest.mark.parametrize('kind', [noop, PILImageBW.create], ids=['tensors', 'images'])
def test_images_are_shown(make_learner, tmp_path, kind):
    if kind is not noop:
        paths = [tmp_path/f'{i}.png' for i in range(len(labels))]
        for o,i in zip(paths, digits.images): PILImage.create(np.uint8(i*15.9)).save(o)
        from fastai.vision.all import ImageBlock
        set_seed(0)
        block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=lambda i: paths[i], get_y=lambda i: f'digit {labels[i]}', splitter=lambda _: (train, valid, meta))
        dls = block.dataloaders(range(len(labels)), bs=16, num_workers=0)
    else: dls = make_dls()
    learn = make_learner(MetaReweightCallback(), dls=dls, model=mlp())
    learn.fit(1)
    interp = MetaInterpretation.from_learner(learn)
    issues,axs = interp.label_issues(5),interp.show_label_issues(5)
    for ax,(i,row) in zip(axs, issues.iterrows()):
        assert ax.get_title() == f'item {i}: {row.label}\n→ {row.suggested}?\nquality {row.label_quality:.2g}'
        shown = np.asarray(ax.images[0].get_array(), dtype=float)
        assert np.corrcoef(shown.reshape(64, -1)[:, 0], digits.images[train[i]].flatten())[0, 1] > 0.99
    assert len(interp.show_label_issues(2, per_class=True)) == 8
    why,axs = interp.explain(3),interp.show_explain(3, n=2)
    assert 'item 3' in axs[0].get_title()
    up = why.trusted[why.trusted.pull > 0].iloc[0]
    assert axs[1].get_title() == f'trusted {up.label}\n↑ pulls up, {100*up.pull/why.trusted.pull.abs().sum():+.1f} %'

# ---- corrections

def test_corrections_are_what_the_next_block_needs(make_learner):
    learn,_ = trained(make_learner)
    interp = MetaInterpretation.from_learner(learn)
    fixed = interp.drop_or_relabel(drop=[0, np.int64(5)], relabel={1: 'digit 3', torch.tensor(2): 'digit 0'})
    assert fixed.part.value_counts().to_dict() == dict(train=len(train) - 2, valid=len(valid), meta=len(meta))
    assert fixed.item.tolist() == [o for i,o in enumerate(train) if i not in (0, 5)] + valid + meta
    given = [f'digit {labels[i]}' for i in train]
    given[1],given[2] = 'digit 3','digit 0'
    assert fixed.label[:len(train) - 2].tolist() == given[1:5] + given[6:]
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda r: images[r['item']], get_y=ColReader('label'), splitter=PartSplitter())
    dls = block.dataloaders(fixed, bs=16, num_workers=0)
    x,y = dls.train_ds[0]
    assert torch.equal(x, images[train[1]]) and dls.vocab[y] == 'digit 3'
    other = make_learner(MetaReweightCallback(), dls=dls, model=mlp())
    other.fit(1)
    again = MetaInterpretation.from_learner(other).drop_or_relabel([1])
    assert list(again) == ['item', 'label', 'part'] and len(again) == len(fixed) - 1, 'and once more, from the table'

def test_the_cleaner_says_what_it_needs(make_learner, monkeypatch):
    learn,_ = trained(make_learner)
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    monkeypatch.delitem(sys.modules, 'fastai.vision.widgets', raising=False)
    with pytest.raises(ImportError, match='the cleaner needs the package ipywidgets: pip install ipywidgets'):
        MetaInterpretation.from_learner(learn).cleaner()

def test_the_cleaner(make_learner, tmp_path, monkeypatch):
    pytest.importorskip('ipywidgets')
    from IPython.display import display
    from fastai.vision import widgets
    from fastai.vision.all import ImageBlock
    paths = [tmp_path/f'{i}.png' for i in range(len(labels))]
    for o,i in zip(paths, digits.images): PILImage.create(np.uint8(i*15.9)).save(o)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=lambda p: f'digit {labels[int(p.stem)]}', splitter=lambda _: (train, valid, meta))
    learn = make_learner(MetaReweightCallback(), dls=block.dataloaders(paths, bs=16, num_workers=0), model=mlp())
    learn.fit(1)
    interp = MetaInterpretation.from_learner(learn)
    with pytest.raises(RuntimeError, match='the cleaner needs a notebook'): interp.cleaner()
    monkeypatch.setattr(widgets, 'display', display, raising=False)
    opened = interp.cleaner(max_n=3)
    assert [str(o) for o in opened.fns] == interp.label_issues(3, label='digit 0').source.tolist()
    for box,choice in zip(opened.iw.widget.children, ('<Delete>', 'digit 2', '<Keep>')): box.children[1].value = choice
    first,second,_ = interp.label_issues(3, label='digit 0').index
    assert interp.from_cleaner(opened) == dict(drop=[first], relabel={second: 'digit 2'})
    fixed = interp.drop_or_relabel(**interp.from_cleaner(opened))
    assert len(fixed) == len(train) + len(valid) + len(meta) - 1 and 'digit 2' == fixed.label[fixed.item == paths[train[second]]].item()

# ---- why

def gradient_of(model, x, y):
    "One backward pass, over all parameters, as one vector."
    loss = F.cross_entropy(model(x[None]), y[None])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])

@pytest.mark.parametrize('bn', [False, True])
def test_parts_of_an_alignment(make_learner, bn):
    "Each trusted example's part, by one backward pass per example in float64, and what they add up to."
    learn = make_learner(MetaReweightCallback(), model=cnn(bn=bn))
    learn.fit(1)
    learn.model.double()
    block = DataBlock((TransformBlock, CategoryBlock), splitter=lambda _: (train, valid, meta), get_x=lambda i: images[i].double(), get_y=lambda i: f'digit {labels[i]}')
    learn.dls = block.dataloaders(range(len(labels)), bs=16, num_workers=0)
    before = deepcopy(learn.model.state_dict())
    learn.model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    interp = MetaInterpretation.from_learner(learn)
    why = interp.explain(6)
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in learn.model.modules())
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    model = deepcopy(learn.model).eval()
    x,y = images.double(),torch.tensor(labels)
    own = gradient_of(model, x[train[6]], y[train[6]])
    parts = torch.stack([own @ gradient_of(model, x[i], y[i]) for i in meta])/len(meta)
    got = why.trusted.sort_index()
    np.testing.assert_allclose(got.pull, parts, rtol=1e-6, atol=1e-9)
    assert got.source.tolist() == meta and got.label.tolist() == [f'digit {labels[i]}' for i in meta]
    mean = torch.stack([gradient_of(model, x[i], y[i]) for i in meta]).mean(0)
    for total in (why.alignment, why.trusted.pull.sum(), why.layers.sum()): assert total == pytest.approx((own @ mean).item(), rel=1e-5)
    names,sizes = zip(*[(k.rpartition('.')[0], p.numel()) for k,p in model.named_parameters()])
    by_layer = pd.Series([a @ b for a,b in zip(own.split(sizes), mean.split(sizes))], dtype=float).groupby(list(names)).sum()
    np.testing.assert_allclose(why.layers, by_layer[why.layers.index], rtol=1e-5, atol=1e-9)
    assert why.trusted.pull.abs().is_monotonic_decreasing and 'alignment=' in repr(why) and 'pull' not in repr(why)

def test_explanations_take_other_loaders_and_parameters(make_learner):
    learn,_ = trained(make_learner, cb=MetaReweightCallback(params=lambda m: m[-1].parameters()))
    whole = MetaInterpretation.from_learner(learn)
    a = whole.explain(2)
    assert list(a.layers.index) == ['3']
    x,y = images[meta],torch.tensor(labels[meta])
    for loader in (tensors(x, y, bs=5), [(x[:9], y[:9]), (x[9:], y[9:])], learn.dls.loaders[2].new(shuffle=True)):
        learn.meta_reweight.meta_dl = loader
        b = whole.explain(2)
        np.testing.assert_allclose(b.trusted.sort_index().pull, a.trusted.sort_index().pull, rtol=1e-4, atol=1e-6)
        assert b.trusted.sort_index().label.tolist() == a.trusted.sort_index().label.tolist()
    part = [1, 4, 9, 11]
    own = learn.dls.loaders[0].new(learn.dls.loaders[2].dataset, get_idxs=lambda: part[::-1])
    weighted = WeightedDL(learn.dls.loaders[2].dataset, bs=3, wgts=[float(i in part) for i in range(len(meta))], num_workers=0)
    for loader in (own, weighted, TorchLoader(TensorDataset(x, y), 3, sampler=SubsetRandomSampler(part))): # those that are drawn, and no others
        learn.meta_reweight.meta_dl = loader
        b = whole.explain(2).trusted.sort_index()
        assert b.index.tolist() == part
        np.testing.assert_allclose(b.pull*4, a.trusted.pull[part]*len(meta), rtol=1e-4, atol=1e-6)
    learn.meta_reweight.meta_dl = [(x[:9], y[:9]), (x[9:], y[9:])]
    shown = whole.show_explain(2, n=1)
    assert shown['what'].tolist() == ['item', 'pulls up', 'pulls down'], 'batches alone can be named, but not shown'
    learn.meta_reweight.meta_dl,learn.dls.loaders = None,learn.dls.loaders[:2]
    with pytest.raises(ValueError, match='there are no trusted examples here'): whole.explain(2)

def test_explanations_are_without_augmentation(make_learner):
    from conftest import Augment
    set_seed(0)
    block = DataBlock((TransformBlock, CategoryBlock), splitter=lambda _: (train, valid, meta), get_x=lambda i: images[i], get_y=lambda i: f'digit {labels[i]}', item_tfms=Augment, batch_tfms=Augment)
    learn = make_learner(MetaReweightCallback(), dls=block.dataloaders(range(len(labels)), bs=16, num_workers=0), model=mlp())
    learn.fit(1)
    interp = MetaInterpretation.from_learner(learn)
    a,b = interp.explain(1),interp.explain(1)
    assert a.alignment == b.alignment and (a.trusted.pull == b.trusted.pull).all()
    x,y = images,torch.tensor(labels)
    own = gradient_of(learn.model, x[train[1]], y[train[1]])
    np.testing.assert_allclose(a.trusted.sort_index().pull*len(meta), [own @ gradient_of(learn.model, x[i], y[i]) for i in meta], rtol=1e-4, atol=1e-5)
    batch = [o.clone() for o in next(iter(learn.dls.train))[:1]]
    assert not torch.isclose(batch[0].flatten(1)[:, None], flat_images[train]).all(2).any(), 'training is augmented all the same'

# ---- loggers

def test_loggers_get_the_curves(make_learner, tmp_path):
    learn = make_learner([MetaReweightCallback(), CSVLogger()], model=mlp())
    learn.fit(3, 0.02)
    df = pd.read_csv(tmp_path/'history.csv')
    figures = learn.meta_reweight.record_of_items.epoch_figures()
    assert list(figures) == ['meta_loss', 'zero_weights', 'ess'] and list(figures.index) == df.epoch.tolist() == [0, 1, 2]
    for o in figures: np.testing.assert_allclose(df[o], figures[o], rtol=1e-5)

def test_tensorboard_gets_the_curves(make_learner, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make_learner([MetaReweightCallback(), TensorBoardCallback(tmp_path/'runs', trace_model=False, log_preds=False)], model=mlp())
    learn.fit(2, 0.02)
    events = EventAccumulator(str(tmp_path/'runs')).Reload()
    figures = learn.meta_reweight.record_of_items.epoch_figures()
    for o in figures: np.testing.assert_allclose([e.value for e in events.Scalars(o)], figures[o], rtol=1e-5)
