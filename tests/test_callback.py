"`MetaReweightCallback` in real fits."
import gc, random, warnings, weakref
from copy import deepcopy
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from fastai import basics as fa
from fastai.basics import Callback, CancelBatchException, CancelFitException, DataLoaders, SGD, TrainEvalCallback, accuracy, error_rate, load_learner, set_seed
from fastai.callback.all import (CSVLogger, CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp, ParamScheduler, ProgressCallback, RNNCallback,
    RNNRegularizer, SaveModelCallback, WeightedDL)
from fastai.callback.fp16 import MixedPrecision
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchLoader, TensorDataset

import fastai_l2rw.fit, fastai_l2rw.weighers
from fastai_l2rw.fit import Fit
from fastai_l2rw.all import *
from fastai_l2rw.reweight import effective_sample_size
from conftest import cnn, images, labels, make_dls, meta, split, train, Augment

def torch_loader(items=meta, bs=12, **kwargs): return TorchLoader(TensorDataset(images[items], torch.tensor(labels[items])), bs, **kwargs)
def parameters(learn): return [p.detach().clone() for p in learn.model.state_dict().values()]
def assert_close(a, b, **kwargs):
    for p,q in zip(a, b, strict=True): torch.testing.assert_close(p, q, **kwargs)

class Spy(Callback):
    "Keeps what the callback works with, in each step."
    order = MetaReweightCallback.order - 1
    def before_fit(self): self.steps = []
    def before_batch(self):
        if self.training: self.steps.append(SimpleNamespace(batch=(self.xb, self.yb), model=deepcopy(self.model), rng=torch.get_rng_state()))
    def after_loss(self):
        if self.training: self.steps[-1].loss = self.learn.loss.detach()
    def after_batch(self):
        if self.training: self.steps[-1].lrs = [h['lr'] for h in self.opt.hypers]

@pytest.fixture
def used(monkeypatch):
    "The trusted batches and the weights that the callback used, in order."
    log = SimpleNamespace(meta=[], weights=[])
    gradient,normalised = Fit.meta_gradient_at,Fit.normalise
    def meta_gradient(fit, at, step):
        found = gradient(fit, at, step)
        log.meta.append(step.meta_batch)
        return found
    monkeypatch.setattr(Fit, 'meta_gradient_at', meta_gradient)
    monkeypatch.setattr(Fit, 'normalise', lambda fit, w: (log.weights.append(normalised(fit, w)), log.weights[-1])[1])
    return log

# ---- exactness in a real fit

@pytest.mark.parametrize('engine', ['auto', 'reverse'])
@pytest.mark.parametrize('fit', [lambda l: l.fit(1, slice(1e-4, 1e-2)), lambda l: l.fit_one_cycle(2, slice(1e-4, 1e-2)), lambda l: l.fine_tune(1)])
def test_weights_of_a_fit_equal_the_oracle(make_learner, used, fit, engine):
    learn = make_learner([MetaReweightCallback(engine=engine), Spy()], dls=make_dls(batch_tfms=Augment()), splitter=split)
    fit(learn)
    spy = learn.spy
    last = len(spy.steps)
    per_item = nn.CrossEntropyLoss(reduction='none')
    group = {k: int(not k.startswith('0.')) for k,_ in learn.model.named_parameters()}
    for step,meta_batch,weights in zip(spy.steps, used.meta[-last:], used.weights[-last:]):
        xb,yb = step.batch
        torch.set_rng_state(step.rng)
        rates = {k: step.lrs[g] for k,g in group.items()}
        expected = unrolled_weights(step.model, lambda out, y: per_item(out, y), (tuple(xb), tuple(yb)), meta_batch, step_size=rates)
        torch.testing.assert_close(weights, expected.as_subclass(Tensor), atol=1e-5, rtol=1e-4)
        torch.set_rng_state(step.rng)
        loss = (weights * per_item(step.model(*xb), *yb)).sum()
        torch.testing.assert_close(loss.as_subclass(Tensor), step.loss.as_subclass(Tensor))
    assert last >= len(learn.dls.train)
    assert all(w.sum() == 0 or abs(w.sum() - 1) < 1e-5 for w in used.weights) and len({len(w.unique()) for w in used.weights}) > 1

def test_learning_rates_of_groups_count(make_learner, used):
    "The schedule sets a step's rates after our turn; groups with schedules of their own would show a lag of one step."
    learn = make_learner([MetaReweightCallback(), Spy()], splitter=split)
    learn.create_opt()
    rates = lambda pct: np.array([1e-2*(1 - pct) + 1e-6, 1e-2*pct + 1e-6])
    learn.fit(1, cbs=ParamScheduler({'lr': rates}))
    per_item = nn.CrossEntropyLoss(reduction='none')
    for i,(step,meta_batch,weights) in enumerate(zip(learn.spy.steps, used.meta, used.weights)):
        assert np.allclose(step.lrs, rates(i/len(learn.dls.train)))
        torch.set_rng_state(step.rng)
        by_name = {k: step.lrs[int(not k.startswith('0.'))] for k,_ in learn.model.named_parameters()}
        expected = unrolled_weights(step.model, per_item, tuple(map(tuple, step.batch)), meta_batch, step_size=by_name)
        torch.testing.assert_close(weights, expected.as_subclass(Tensor), atol=1e-5, rtol=1e-4)

def test_equal_weights_train_as_without_the_callback(make_learner, monkeypatch):
    "Batch norm, dropout, augmentation and the schedule included."
    def run(*cbs):
        learn = make_learner(list(cbs), dls=make_dls(batch_tfms=Augment()), wd=0.01)
        learn.fit_one_cycle(2, 1e-2)
        return parameters(learn),torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    plain = run()
    passes = []
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', lambda u: (passes.append(u), torch.ones_like(u))[1])
    equal = run(MetaReweightCallback())
    assert len(passes) == 2*len(make_dls().train) and all(u.std() > 0 for u in passes)
    assert_close(plain[0], equal[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(plain[1], equal[1]) and plain[2:] == equal[2:], 'the random streams stand where they would stand without it'

def test_reweighting_learns_through_wrong_labels(make_learner):
    "40 % of the training labels are wrong, and long training learns them by heart. Means over seeds, against plain training."
    everything = [i for i in range(len(labels)) if i not in meta]
    half,rest = everything[::2],everything[1::2]
    def run(seed, *cbs):
        rng = np.random.default_rng(seed)
        wrong = rng.permutation(half)[:int(0.4*len(half))]
        noisy = labels.copy()
        noisy[wrong] = (noisy[wrong] + rng.integers(1, 4, len(wrong))) % 4
        loaders = [TorchLoader(TensorDataset(images[i], torch.tensor(y[i])), 64, shuffle=i is half) for i,y in ((half, noisy), (rest, labels))]
        learn = make_learner(list(cbs), dls=DataLoaders(*loaders), model=cnn(p=0))
        learn.fit(40, 1e-2)
        return learn.recorder.values[-1][2]
    plain = np.mean([run(s) for s in range(3)])
    robust = np.mean([run(s, MetaReweightCallback(torch_loader(bs=24))) for s in range(3)])
    assert robust > plain + 0.05, (robust, plain)

# ---- the ways to train, and everything else a Learner does

@pytest.mark.parametrize('fit', [lambda l: l.fit(1), lambda l: l.fit_one_cycle(1, 1e-2), lambda l: l.fine_tune(1), lambda l: l.lr_find(show_plot=False, num_it=8), lambda l: (l.fit(1), l.fit(1))])
@pytest.mark.parametrize('loader', [None, torch_loader, lambda: make_dls().valid, lambda: list(torch_loader())])
def test_ways_to_fit_and_loaders(make_learner, fit, loader):
    learn = make_learner(MetaReweightCallback(loader and loader()), splitter=split)
    loss_func,names = learn.loss_func,[type(c) for c in learn.cbs]
    fit(learn)
    assert learn.loss_func is loss_func and learn.loss_func.reduction == 'mean' and [type(c) for c in learn.cbs] == names
    assert all(p.isfinite().all() for p in parameters(learn))

def test_validation_and_prediction_do_not_need_a_trusted_loader(make_learner):
    learn = make_learner(MetaReweightCallback(), dls=make_dls(n_parts=2))
    plain = make_learner(dls=make_dls(n_parts=2), model=learn.model)
    assert learn.validate() == plain.validate()
    for a,b in zip(learn.get_preds(), plain.get_preds()): assert torch.equal(a, b)
    assert abs(learn.get_preds(with_loss=True)[2].mean() - plain.validate()[0]) < 1e-5
    assert len(learn.tta(n=1)[0]) == 60
    with pytest.raises(ValueError, match='learn.dls has 2 loaders'): learn.fit(1)

def test_show_results(make_learner, monkeypatch):
    learn = make_learner(MetaReweightCallback())
    learn.fit(1)
    shown = []
    monkeypatch.setattr(type(learn.dls.valid), 'show_results', lambda self, b, out, **kw: shown.append(out))
    learn.show_results()
    assert len(shown[0]) == 16

def test_exported_learner_holds_no_meta_data(make_learner, tmp_path):
    "The trusted items are recognisable bytes; none of them may be in the file."
    secret = torch.full((24, 1, 8, 8), 0.123456789)
    loader = TorchLoader(TensorDataset(secret, torch.tensor(labels[meta])), 12)
    learn = make_learner(MetaReweightCallback(loader))
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=Callback(after_step=lambda self: 1/0)) # an interrupted fit has batches at hand
    assert learn.meta_reweight.this_fit.trusted is not None
    learn.export('l.pkl')
    assert secret[0].numpy().tobytes()[:64] not in (tmp_path/'l.pkl').read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'l.pkl')
    cb = loaded.meta_reweight
    assert cb.meta_dl is None and cb.this_fit is None and cb.record_of_items.ledger is None
    x = images[3]
    loaded.remove_cbs(ProgressCallback)
    torch.testing.assert_close(loaded.predict(x)[2], learn.predict(x)[2])
    assert learn.meta_reweight.meta_dl is loader, 'exporting takes nothing from the Learner at hand'

def test_save_and_load(make_learner):
    learn = make_learner(MetaReweightCallback())
    learn.fit(1)
    learn.save('m')
    other = make_learner(MetaReweightCallback()).load('m')
    assert_close(parameters(learn), parameters(other))
    other.fit(1)

def test_a_copy_does_not_take_another_loader_for_trusted(make_learner):
    learn = make_learner(MetaReweightCallback(torch_loader())) # whose third loader is not what the user has chosen
    copy = deepcopy(learn)
    with pytest.raises(ValueError, match='not copied or exported.*set learn.meta_reweight.meta_dl'): copy.fit(1)
    copy.meta_reweight.meta_dl = torch_loader()
    copy.fit(1)

def test_nothing_trusted_stays_after_a_fit(make_learner):
    learn = make_learner(MetaReweightCallback(every=2))
    fits = []
    learn.fit(1, cbs=Callback(after_loss=lambda self: fits.append(weakref.ref(self.meta_reweight.this_fit))))
    assert learn.meta_reweight.this_fit is None and learn.meta_reweight.step is None
    gc.collect()
    assert fits and all(o() is None for o in fits)

# ---- the progress table

@pytest.mark.parametrize('train_metrics,valid_metrics', [(False, True), (True, True), (True, False)])
def test_columns(make_learner, train_metrics, valid_metrics, used):
    rows = []
    learn = make_learner(MetaReweightCallback(), metrics=[accuracy, error_rate])
    learn.logger = rows.append
    learn.recorder.train_metrics,learn.recorder.valid_metrics = train_metrics,valid_metrics
    learn.fit(2)
    table = pd.DataFrame(list(map(list, rows)), columns=list(learn.recorder.metric_names))
    first = list(table).index('meta_loss')
    assert list(table)[first:] == ['meta_loss', 'zero_weights', 'ess', 'time'] and list(table)[first-1].endswith('error_rate')
    n = len(learn.dls.train)
    for epoch,row in table.iterrows():
        weights = used.weights[epoch*n:(epoch + 1)*n]
        assert abs(row.zero_weights - np.mean([(w == 0).float().mean() for w in weights])) < 1e-6
        assert abs(row.ess - np.mean([effective_sample_size(w) for w in weights])) < 1e-4
        assert 1 <= row.ess <= 16 and 0 < row.meta_loss < 3
    if valid_metrics: assert abs(table['valid_accuracy' if train_metrics else 'accuracy'].iloc[-1] - learn.validate()[1]) < 1e-6

def test_others_read_the_right_columns(make_learner, tmp_path):
    learn = make_learner([MetaReweightCallback(), CSVLogger(), SaveModelCallback('accuracy'), EarlyStoppingCallback('meta_loss', patience=9)])
    learn.fit(2, 1e-2)
    table = pd.read_csv(tmp_path/'history.csv')
    assert list(table.columns) == ['epoch','train_loss','valid_loss','accuracy','meta_loss','zero_weights','ess','time']
    assert abs(table.accuracy.max() - learn.save_model.best) < 1e-6
    assert abs(table.meta_loss.min() - learn.early_stopping.best) < 1e-6

def test_the_validation_loss_stays_where_others_look_for_it(make_learner):
    "ShowGraphCallback takes the second value of each epoch."
    learn = make_learner(MetaReweightCallback())
    losses = []
    learn.add_cb(Callback(after_epoch=lambda self: losses.append(self.recorder.values[-1][1])))
    learn.cbs[-1].order = 99
    learn.fit(1)
    assert abs(losses[0] - learn.validate()[0]) < 1e-6 and len(learn.validate()) == 2

@pytest.mark.parametrize('error', [fa.CancelTrainException, fa.CancelEpochException])
def test_cancelled_epochs_log_nothing_out_of_place(make_learner, error):
    def cancel(self):
        if self.training and self.epoch == 0 and self.iter == 2: raise error()
    learn = make_learner([MetaReweightCallback(), Callback(after_batch=cancel)])
    rows = []
    learn.logger = rows.append
    learn.fit(2)
    assert len(rows[0]) < 5 and len(rows[1]) == len(learn.recorder.metric_names)

def test_without_recorder_and_default_callbacks(make_learner):
    trained = []
    for default_cbs in (False, True):
        cbs = [MetaReweightCallback()] + ([] if default_cbs else [TrainEvalCallback(), fa.CastToTensor()])
        learn = make_learner(cbs, default_cbs=default_cbs)
        learn.fit(1)
        trained.append(parameters(learn))
    assert_close(*trained)

# ---- frozen parameters, groups and options

def test_frozen_parameters_are_not_looked_along(make_learner, monkeypatch):
    looked = []
    original = Fit.meta_gradient_at
    monkeypatch.setattr(Fit, 'meta_gradient_at', lambda fit, names, step: (looked.append(set(names)), original(fit, names, step))[1])
    learn = make_learner(MetaReweightCallback(), splitter=split, train_bn=False)
    everything = {k for k,_ in learn.model.named_parameters()}
    learn.freeze(); learn.fit(1)
    parameters(learn)
    assert looked[-1] == {'1.3.weight', '1.3.bias'}
    learn.unfreeze(); learn.fit(1)
    assert looked[-1] == everything
    learn.train_bn = True
    learn.create_opt(); learn.freeze(); learn.fit(1)
    assert looked[-1] == {'1.3.weight', '1.3.bias'} | {k for k in everything if k.startswith(('0.0.1.', '0.1.1.'))}, 'fastai trains frozen batch norms'
    for p in learn.model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='all parameters of the optimizer are frozen'): learn.fit(1)

def test_params_names_a_subset(make_learner, used):
    learn = make_learner([MetaReweightCallback(params=lambda m: m[1].parameters()), Spy()], splitter=split)
    learn.fit(1)
    step = learn.spy.steps[0]
    torch.set_rng_state(step.rng)
    expected = unrolled_weights(step.model, nn.CrossEntropyLoss(reduction='none'), tuple(map(tuple, step.batch)), used.meta[0], ['1.3.weight', '1.3.bias'])
    torch.testing.assert_close(used.weights[0], expected.as_subclass(Tensor), atol=1e-5, rtol=1e-4)

def test_every(make_learner, used):
    learn = make_learner(MetaReweightCallback(every=2))
    learn.fit(1)
    n = len(learn.dls.train)
    assert len(used.weights) == n and len(used.meta) == -(-n//2)

def test_every_takes_a_new_gradient_at_the_first_step_and_every_kth(make_learner, monkeypatch):
    events = []
    for owner,name in ((Fit, 'meta_gradient_at'), (fastai_l2rw.engines.routes, 'separate_pass')):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, original=original, **kw: (events.append(name[0]), original(*a, **kw))[1])
    learn = make_learner(MetaReweightCallback(every=3, engine='forward')); learn.fit(1)
    assert ''.join(events) == 'msssmss'[:len(events)] and len(events) == len(learn.dls.train) + 2

def test_start_tries_a_trusted_batch_at_once(make_learner):
    learn = make_learner(MetaReweightCallback([(images[meta],)], start=2))
    before = parameters(learn)
    with pytest.raises(ValueError, match='are the labels missing'): learn.fit(3)
    assert_close(before, parameters(learn), rtol=0, atol=0)

def test_start(make_learner, used):
    rows = []
    learn = make_learner(MetaReweightCallback(start=1))
    learn.logger = rows.append
    learn.fit(2)
    assert len(used.weights) == len(learn.dls.train)
    assert np.isnan(rows[0][4:7]).all() and not np.isnan(rows[1][4:7]).any()
    plain = make_learner(MetaReweightCallback(start=2)); plain.fit(2)
    other = make_learner(); other.fit(2)
    assert_close(parameters(plain), parameters(other))

@pytest.mark.parametrize('on_zero', ['skip', 'uniform'])
def test_on_zero(make_learner, monkeypatch, on_zero):
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', torch.zeros_like)
    learn = make_learner(MetaReweightCallback(on_zero=on_zero), opt_func=SGD, wd=0.)
    before = dict(learn.model.named_parameters())['0.0.0.weight'].detach().clone()
    learn.fit(1, 1e-2)
    after = dict(learn.model.named_parameters())['0.0.0.weight'].detach()
    if on_zero == 'skip': assert torch.equal(before, after)
    else:
        plain = make_learner(opt_func=SGD, wd=0.); plain.fit(1, 1e-2)
        assert_close(parameters(learn), parameters(plain), rtol=1e-4, atol=1e-6)
    assert learn.recorder.values[0][-2:] == [1., 0.], 'all weights were zero, with an effective size of 0'

def test_penalties_of_other_callbacks_stay_in_the_loss(make_learner, monkeypatch):
    "With all weights at zero, what a callback of order 0 adds after the loss is all there is to learn from."
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', torch.zeros_like)
    class Penalty(Callback):
        def after_loss(self):
            if self.training: self.learn.loss_grad += 10*self.model[1][3].weight.square().sum()
    learn = make_learner([Penalty(), MetaReweightCallback()], opt_func=SGD, wd=0.)
    before = learn.model[1][3].weight.detach().clone()
    learn.fit(1, 1e-2)
    torch.testing.assert_close(learn.model[1][3].weight.detach(), before * (1 - 1e-2*20)**len(learn.dls.train))

@pytest.mark.parametrize('cb', [lambda: GradientAccumulation(32), lambda: GradientClip(0.1), lambda: RNNRegularizer(alpha=0., beta=0.)])
def test_callbacks_that_scale_the_loss_or_its_gradient(make_learner, monkeypatch, cb):
    "Equal weights train as the mean loss does, with them too."
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', torch.ones_like)
    trained = []
    for callbacks in ([MetaReweightCallback(), cb()], [cb()]):
        learn = make_learner(callbacks, opt_func=SGD)
        learn.fit(2, 1e-2)
        trained.append(parameters(learn))
    assert_close(*trained, rtol=1e-4, atol=1e-6)

# ---- engines

class Prototypes(nn.Module):
    "Distances have no forward-mode derivative in PyTorch."
    def __init__(self): super().__init__(); self.conv,self.prototypes = nn.Conv2d(1, 8, 3), nn.Parameter(torch.randn(4, 8))
    def forward(self, x): return -torch.cdist(self.conv(x).relu().mean((2, 3)), self.prototypes)

def test_falls_back_to_reverse_once(make_learner, used):
    set_seed(3)
    seen = []
    class Last(Callback):
        def before_batch(self):
            if self.training: seen[:] = [{k: v.clone() for k,v in self.model.state_dict().items()}, (tuple(self.xb), tuple(self.yb))]
    learn = make_learner([MetaReweightCallback(), Last()], model=Prototypes())
    with pytest.warns(UserWarning, match="has no forward-mode derivative.*engine='reverse'") as caught:
        learn.fit(1); learn.fit(1)
    assert len([w for w in caught if 'forward-mode' in str(w.message)]) == 1
    model = Prototypes()
    model.load_state_dict(seen[0])
    expected = unrolled_weights(model, nn.CrossEntropyLoss(reduction='none'), seen[1], used.meta[-1])
    torch.testing.assert_close(used.weights[-1], expected.as_subclass(Tensor), atol=1e-5, rtol=1e-4)

def test_forward_does_not_fall_back(make_learner):
    learn = make_learner(MetaReweightCallback(engine='forward'), model=Prototypes())
    with pytest.raises(NotImplementedError, match="engine='forward' can't be used"): learn.fit(1)

# ---- the trusted loader

def test_meta_batches_are_reshuffled_and_all_used(make_learner, used):
    for loader in (None, torch_loader()):
        used.meta.clear()
        learn = make_learner(MetaReweightCallback(loader)); learn.fit(2)
        per_pass = 2
        seen = [torch.cat([b[0][0] for b in used.meta[i:i+per_pass]]) for i in range(0, 4, per_pass)]
        as_set = [sorted(x.sum().item() for x in s) for s in seen]
        np.testing.assert_allclose(as_set[0], as_set[1])
        np.testing.assert_allclose(as_set[0], sorted(images[meta].sum((1, 2, 3)).tolist()), rtol=1e-6)
        assert not torch.equal(seen[0], seen[1]), 'in another order'
        assert all(type(t) is Tensor for b in used.meta for part in b for t in part), 'no tensor subclass enters a virtual pass'

def test_trusted_batches_are_not_augmented(make_learner, used):
    make_learner(MetaReweightCallback(), dls=make_dls(batch_tfms=Augment())).fit(1)
    known = images[meta].flatten(1)
    distances = torch.cat([torch.cdist(x.flatten(1), known).min(1)[0] for (x,),_ in used.meta])
    assert (distances < 1e-3).all()

def test_loaders_that_draw_with_replacement(make_learner, used):
    "fastai's tabular loaders do, even with equal weights: trusted ones must all be used. A weighted loader keeps its weights."
    df = pd.DataFrame(dict(x=np.arange(60.), y=[f'c{i%3}' for i in range(60)]))
    dls = TabularDataLoaders.from_df(df, y_names='y', cont_names=['x'], procs=[Categorify], bs=16)
    learn = make_learner(MetaReweightCallback(dls.test_dl(df[:20])), dls=dls, model=tabular_learner(dls, layers=[5]).model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2)
    seen = torch.cat([b[0][1][:, 0] for b in used.meta[:4]])
    assert seen.tolist() != sorted(seen.tolist()) and sorted(seen[:10].tolist() + seen[10:20].tolist()) == sorted(df.x[:20].tolist())
    weighted = WeightedDL(fa.Datasets(meta, [[lambda i: images[i]], [lambda i: int(labels[i])]]), bs=8, shuffle=True, wgts=np.array([1.]*4 + [0.]*20))
    learn = make_learner(MetaReweightCallback(weighted))
    used.meta.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # only four items are ever drawn, and some classes with none of them
        learn.fit(1)
    few = {round(images[i].sum().item(), 3) for i in meta[:4]}
    assert {round(x.sum().item(), 3) for b in used.meta for x in b[0][0]} <= few

def test_outputs_with_more_than_predictions(make_learner, used):
    "fastai's text models return what their regularizer needs as well."
    class Text(nn.Module):
        def __init__(self, predict): super().__init__(); self.predict = predict
        def forward(self, x):
            out = self.predict(x)
            return out,out.detach(),out.detach()
    model = cnn()
    make_learner([MetaReweightCallback(), RNNCallback()], model=Text(deepcopy(model))).fit(1)
    make_learner(MetaReweightCallback(), model=model).fit(1)
    n = len(used.weights)//2
    for a,b in zip(used.weights[:n], used.weights[n:]): torch.testing.assert_close(a, b)

def test_a_fit_is_reproducible(make_learner):
    def run():
        learn = make_learner(MetaReweightCallback(), dls=make_dls(batch_tfms=Augment())); set_seed(5); learn.fit(2, 1e-2)
        return parameters(learn)
    assert_close(run(), run(), rtol=0, atol=0)

@pytest.mark.parametrize('loader', [lambda: torch_loader(bs=64, drop_last=True), lambda: torch_loader(meta + train[:1], 12), lambda: torch_loader(meta + train[:1], 12, shuffle=True),
    lambda: make_dls().train.new(bs=4096, drop_last=True)])
def test_all_items_are_used_in_batches_of_even_size(make_learner, used, loader):
    "drop_last would leave nothing, and a last batch of one would break batch norm."
    make_learner(MetaReweightCallback(loader())).fit(1)
    sizes = {len(b[0][0]) for b in used.meta}
    assert max(sizes) - min(sizes) < 3 and min(sizes) > 1

def test_a_loader_that_yields_nothing_is_named(make_learner):
    batches = torch.utils.data.BatchSampler(range(24), 64, drop_last=True)
    learn = make_learner(MetaReweightCallback(TorchLoader(TensorDataset(images[meta], torch.tensor(labels[meta])), batch_sampler=batches)))
    with pytest.raises(ValueError, match=r'meta_dl yields no batch: DataLoader\(batch_size.*drop_last'): learn.fit(1)

class Corrupt(torch.utils.data.Dataset):
    def __len__(self): return 24
    def __getitem__(self, i):
        if i == 7: raise OSError('image 7 is truncated')
        return images[meta[i]],int(labels[meta[i]])

def test_a_corrupt_item_names_the_batch_and_training_can_go_on(make_learner):
    cb = MetaReweightCallback(TorchLoader(Corrupt(), 12))
    learn = make_learner(cb)
    loss_func = learn.loss_func
    with pytest.raises(OSError, match=r'batch \d of meta_dl in epoch 0 \(could not be read\): image 7 is truncated'): learn.fit(1)
    assert learn.loss_func is loss_func
    cb.meta_dl = torch_loader()
    learn.fit(1)

@pytest.mark.parametrize('loader,message', [
    ([], 'meta_dl yields no batch'),
    ([images[meta]], 'are the labels missing'),
    ([(images[meta],)], 'are the labels missing'),
    ([(images[meta].repeat(1, 3, 1, 1), torch.tensor(labels[meta]))], r'batch 1 of meta_dl .*\(24, 3, 8, 8\).*channels'),
    ([(images[meta], torch.full((24,), 9))], 'batch 1 of meta_dl .*out of bounds'),
    ([(images[meta], torch.zeros(24))], 'batch 1 of meta_dl'),
])
def test_batches_that_do_not_fit(make_learner, loader, message):
    learn = make_learner(MetaReweightCallback(loader))
    before = parameters(learn)
    with pytest.raises(Exception, match='(?s)' + message): learn.fit(1)
    assert_close(before, parameters(learn), rtol=0, atol=0)

def test_lacking_classes_are_named(make_learner):
    keep = [i for i in meta if labels[i] in (1, 3)]
    learn = make_learner(MetaReweightCallback(torch_loader(keep)))
    with pytest.warns(UserWarning, match='meta_dl has no example of digit 0, digit 2:'): learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make_learner(MetaReweightCallback(torch_loader())).fit(1)

def test_classes_without_a_vocab(make_learner):
    loaders = DataLoaders(torch_loader(train, 16, shuffle=True), torch_loader())
    loaders.c = 4
    learn = make_learner(MetaReweightCallback(torch_loader([i for i in meta if labels[i] != 2])), dls=loaders)
    with pytest.warns(UserWarning, match='meta_dl has no example of 2:'): learn.fit(1)

def test_several_inputs_from_pytorch_loaders(make_learner, used):
    "The batches are split as the Learner splits its own: all but the last are inputs."
    class TwoIn(nn.Module):
        def __init__(self): super().__init__(); self.cnn,self.extra = cnn(),nn.Linear(3, 4)
        def forward(self, x, z): return self.cnn(x) + self.extra(z)
    data = lambda items: TensorDataset(images[items], torch.randn(len(items), 3), torch.tensor(labels[items]))
    learn = make_learner(MetaReweightCallback(TorchLoader(data(meta), 12)), dls=DataLoaders(TorchLoader(data(train), 16), TorchLoader(data(meta), 16)), model=TwoIn())
    learn.fit(1)
    assert [len(part) for part in used.meta[0]] == [2, 1]

@pytest.mark.parametrize('vocab', [['a', 'b', 'c', 'd'], [['the', 'a', 'of'], fa.CategoryMap(['a', 'b', 'c', 'd'])]])
def test_class_names_from_either_kind_of_vocab(make_learner, vocab):
    "Text DataLoaders have the vocab of the words before that of the classes; tabular ones have a column of labels."
    loader = lambda items, bs=16: TorchLoader(TensorDataset(images[items], torch.tensor(labels[items])[:, None]), bs)
    loaders = DataLoaders(loader(train), loader(meta))
    loaders.vocab = vocab
    learn = make_learner(MetaReweightCallback(loader([i for i in meta if labels[i] != 2])), dls=loaders, metrics=[])
    with pytest.warns(UserWarning, match='meta_dl has no example of c:'): learn.fit(1)

def test_regression_targets_have_no_classes(make_learner):
    data = lambda items: TensorDataset(images[items], torch.tensor(labels[items]).float()[:, None])
    learn = make_learner(MetaReweightCallback(TorchLoader(data(meta), 12)), dls=DataLoaders(TorchLoader(data(train), 16), TorchLoader(data(meta), 16)),
        model=cnn(n_out=1), loss_func=MSELossFlat(), metrics=[])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)

# ---- losses

@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(), F.cross_entropy, LabelSmoothingCrossEntropyFlat(), FocalLossFlat(),
    lambda out, y, **kwargs: F.cross_entropy(out, y, **kwargs), lambda out, y: F.cross_entropy(out, y, reduction='none')])
def test_losses(make_learner, used, loss_func):
    learn = make_learner(MetaReweightCallback(), loss_func=loss_func, metrics=[])
    learn.fit(1)
    assert learn.loss_func is loss_func and getattr(loss_func, 'reduction', 'mean') == 'mean'
    assert len(used.weights) == len(learn.dls.train)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_batches(make_learner, used, mix):
    "A mixed example's loss lies between those for its two targets; trusted batches are not mixed."
    seen = []
    class Mixed(Callback):
        order = 1
        def before_batch(self):
            if self.training: seen.append((deepcopy(self.model), self.xb, self.yb, self.learn.mixer.yb1, self.learn.mixer.lam, torch.get_rng_state()))
        def after_loss(self):
            if self.training: seen[-1] += (self.learn.loss.detach(),)
    learn = make_learner([MetaReweightCallback(), mix(), Mixed()])
    learn.mixer = learn.mix_up if mix is MixUp else learn.cut_mix
    loss_func = learn.loss_func
    learn.fit(1)
    assert learn.loss_func is loss_func
    per_item = nn.CrossEntropyLoss(reduction='none')
    for (model,xb,(y,),(y1,),lam,rng,loss),meta_batch,weights in zip(seen, used.meta, used.weights):
        def losses(out, targets): return torch.lerp(per_item(out, y1), per_item(out, y), lam) if targets is y else per_item(out, targets)
        torch.set_rng_state(rng)
        expected = unrolled_weights(model, losses, (tuple(xb), y), meta_batch)
        torch.testing.assert_close(weights, expected.as_subclass(Tensor), atol=1e-5, rtol=1e-4)
        torch.set_rng_state(rng)
        torch.testing.assert_close((weights * losses(model(*xb), y)).sum().as_subclass(Tensor), loss.as_subclass(Tensor))

def test_a_loss_without_per_item_values(make_learner):
    learn = make_learner(MetaReweightCallback(), loss_func=lambda out, y: F.cross_entropy(out, y))
    with pytest.raises(ValueError, match="learn.loss_func.*can't give one loss per item.*`reduction`") as e: learn.fit(1)
    assert 'meta_dl' not in str(e.value)

class OwnLoss(nn.Module):
    def forward(self, out, y): return F.cross_entropy(out, y)

def test_a_loss_module_without_reduction(make_learner):
    learn = make_learner(MetaReweightCallback(), loss_func=OwnLoss())
    with pytest.raises(ValueError, match="can't give one loss per item"): learn.fit(1)

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(weight=torch.tensor([1., 5., 1., 9.])), CrossEntropyLossFlat(ignore_index=2), CrossEntropyLossFlat(reduction='sum'),
    LabelSmoothingCrossEntropyFlat(), FocalLossFlat(), nn.CrossEntropyLoss(label_smoothing=0.1), lambda out, y: F.cross_entropy(out, y, reduction='none')])
def test_equal_weights_train_as_the_loss_does_by_itself(make_learner, monkeypatch, loss_func):
    "PyTorch's mean with class weights or ignored labels is not the mean over the items."
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', torch.ones_like)
    trained = []
    for callbacks in ([MetaReweightCallback()], [Callback(after_loss=lambda self: setattr(self.learn, 'loss_grad', self.loss_grad.mean()))]):
        learn = make_learner(callbacks, loss_func=loss_func, opt_func=SGD, metrics=[])
        learn.fit(2, 1e-2 if getattr(loss_func, 'reduction', '') != 'sum' else 1e-3)
        trained.append(parameters(learn))
    assert_close(*trained, rtol=1e-4, atol=1e-5)

# ---- the record of weights

def test_item_weights(make_learner, used):
    learn = make_learner(MetaReweightCallback())
    with pytest.raises(ValueError, match='no weights have been recorded'): learn.meta_reweight.item_weights()
    order = []
    class Order(Callback):
        def before_batch(self):
            if self.training: order.append([(x - images[train][:, None]).abs().flatten(1).sum(1).argmin().item() for x in self.xb[0]])
    learn.add_cb(Order())
    learn.fit(3)
    expected = pd.DataFrame([(i, w.item()*len(ws)) for items,ws in zip(order, used.weights) for i,w in zip(items, ws)], columns=['item', 'weight'])
    got = learn.meta_reweight.item_weights()
    np.testing.assert_allclose(got.weight, expected.groupby('item').weight.mean(), rtol=1e-5, atol=1e-6)
    assert got.steps.sum() == sum(map(len, order)) and got.zero.between(0, 1).all()
    n = len(learn.dls.train)
    last = expected.iloc[-sum(map(len, order[-n:])):]
    np.testing.assert_allclose(learn.meta_reweight.item_weights(last=1).weight, last.groupby('item').weight.mean(), rtol=1e-5, atol=1e-6)

def test_item_weights_need_a_record_and_a_loader_that_tells(make_learner):
    learn = make_learner(MetaReweightCallback(record=False)); learn.fit(1)
    with pytest.raises(ValueError, match=r'record=False'): learn.meta_reweight.item_weights()
    learn = make_learner(MetaReweightCallback(torch_loader()), dls=DataLoaders(torch_loader(train, 16), torch_loader())); learn.fit(1)
    with pytest.raises(ValueError, match='does not tell which items'): learn.meta_reweight.item_weights()

def test_searching_a_learning_rate_leaves_the_record(make_learner):
    learn = make_learner(MetaReweightCallback())
    learn.fit(1)
    before = learn.meta_reweight.item_weights()
    learn.lr_find(show_plot=False, num_it=8)
    learn.validate(); learn.get_preds()
    assert learn.meta_reweight.item_weights().equals(before)
    with pytest.raises(ValueError, match='last=0 must be'): learn.meta_reweight.item_weights(last=0)

# ---- interruptions

EVENTS = ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_step']

@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, CancelBatchException, CancelFitException])
@pytest.mark.parametrize('order', [0, 99])
def test_interruptions_leave_the_learner_usable(make_learner, event, error, order):
    def fail(self):
        if self.training and self.iter == 1: raise error('stop')
    learn = make_learner([MetaReweightCallback(), Callback(**{event: fail})])
    learn.cbs[-1].order = order
    loss_func,reduction = learn.loss_func,learn.loss_func.reduction
    try: learn.fit(1)
    except (KeyboardInterrupt, RuntimeError): pass
    assert learn.loss_func is loss_func and loss_func.reduction == reduction
    learn.remove_cb(learn.cbs[-1])
    expected = make_learner(dls=learn.dls, model=learn.model).validate()
    assert learn.validate() == expected
    learn.fit(1)
    assert learn.loss_func is loss_func

def test_removing_and_adding_between_fits(make_learner, used):
    learn = make_learner(cb := MetaReweightCallback())
    learn.fit(1)
    n = len(used.weights)
    learn.remove_cb(cb); learn.fit(1)
    assert len(used.weights) == n and 'ess' not in learn.recorder.metric_names
    learn.fit(1, cbs=cb)
    assert len(used.weights) == 2*n and cb not in learn.cbs

def test_comes_and_goes_as_one(make_learner, used):
    "The callback brings a second one along, which applies the weights."
    def names(learn): return sorted(type(cb).__name__ for cb in learn.cbs if type(cb).__module__.startswith('fastai_l2rw'))
    both = ['DoubtedLabels', 'ItemLedger', 'MetaReweightCallback', '_AfterLoss', '_BeforePass']
    learn = make_learner(cb := MetaReweightCallback())
    with learn.removed_cbs(list(learn.cbs)): assert names(learn) == []
    assert names(learn) == both
    with pytest.raises(ValueError, match='has a MetaReweightCallback already'): learn.fit(1, cbs=MetaReweightCallback())
    assert names(learn) == both and learn.meta_reweight is cb
    other = make_learner(cb)
    assert names(learn) == [] and names(other) == both and not hasattr(learn, 'meta_reweight')
    other.fit(1)
    assert used.weights
    other.remove_cbs(MetaReweightCallback)
    assert names(other) == [] and cb.learn is None

def test_data_parallel(make_learner, used):
    model = cnn()
    for wrap in (nn.DataParallel, lambda m: m): make_learner(MetaReweightCallback(params=lambda m: m[1].parameters()), model=wrap(deepcopy(model))).fit(1)
    n = len(used.weights)//2
    for a,b in zip(used.weights[:n], used.weights[n:]): torch.testing.assert_close(a, b)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(make_learner, used):
    "The trusted batches come from the CPU."
    learn = make_learner([MetaReweightCallback(torch_loader()), Spy()], dls=make_dls().cuda(), model=cnn(p=0))
    learn.fit(1)
    step = learn.spy.steps[0]
    expected = unrolled_weights(step.model, nn.CrossEntropyLoss(reduction='none'), tuple(map(tuple, step.batch)), used.meta[0])
    assert used.weights[0].is_cuda
    torch.testing.assert_close(used.weights[0], expected.as_subclass(Tensor), atol=1e-4, rtol=1e-3)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision_on_a_gpu(make_learner, used, mode):
    "On a CPU fastai's callback does nothing."
    learn = make_learner([MetaReweightCallback(torch_loader()), MixedPrecision(mode), GradientClip(1.), Spy()], dls=make_dls().cuda(), model=cnn(p=0))
    learn.fit(2, 1e-2)
    step = learn.spy.steps[0]
    expected = unrolled_weights(step.model, nn.CrossEntropyLoss(reduction='none'), tuple(map(tuple, step.batch)), used.meta[0])
    torch.testing.assert_close(used.weights[0], expected.as_subclass(Tensor), atol=1e-4, rtol=1e-3)
    assert all(p.isfinite().all() for p in parameters(learn)) and all(w.dtype == torch.float32 for w in used.weights)

# ---- arguments

@pytest.mark.parametrize('params', [lambda m: m[1][3].weight, lambda m: ['1.3.weight'], lambda m: [n for n,_ in m.named_parameters()]])
def test_params_that_are_no_parameters(make_learner, params):
    with pytest.raises(TypeError, match=r'params\(learn.model\) gives .*but must give parameters, as model\[-1\].parameters\(\) does'): make_learner(MetaReweightCallback(params=params)).fit(1)

def test_a_scheduler_runs_once_in_a_step(make_learner):
    class Counting(ParamScheduler):
        def before_batch(self):
            super().before_batch()
            if self.training: self.learn.scheduled = getattr(self.learn, 'scheduled', 0) + 1
    learn = make_learner(MetaReweightCallback())
    learn.fit(1, cbs=Counting({'lr': lambda pct: 1e-3}))
    assert learn.scheduled == len(learn.dls.train)

@pytest.mark.parametrize('kwargs,error,message', [
    (dict(meta_dl=5), TypeError, 'meta_dl is a int'),
    (dict(meta_dl=iter([1])), TypeError, 'meta_dl is a list_iterator, which can be read only once'),
    (dict(engine='jvp'), ValueError, "engine='jvp' is unknown: use 'auto' or 'forward' or 'reverse'"),
    (dict(on_zero='stop'), ValueError, "on_zero='stop' is unknown"),
    (dict(every=0), ValueError, 'every=0 must be a whole number, 1 or more'),
    (dict(start=-1), ValueError, 'start=-1 must be a whole number, 0 or more'),
    (dict(start=0.5), ValueError, 'start=0.5'),
    (dict(params=['head']), TypeError, 'params is a list'),
])
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message): MetaReweightCallback(**kwargs)

def test_dataloaders_are_not_a_loader(dls):
    with pytest.raises(TypeError, match=r'DataLoaders of 3 loaders, but must be one loader, of trusted examples.*such as meta_dl.loaders\[2\]'): MetaReweightCallback(dls)
