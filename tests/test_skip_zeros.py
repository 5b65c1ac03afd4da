"Examples of weight zero left out of the training pass: the same step, and who sees what."
import pytest, torch
from fastai.basics import Callback, Learner, SGD, accuracy, set_seed
from fastai.callback.all import CutMix, GradientAccumulation, GradientClip, MixUp
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from torch import nn

import fastai_l2rw.weighers
from fastai_l2rw.all import *
from conftest import Augment, Oracle, Seen, make_dls

class Rows(nn.Module):
    "A CNN without batch norm that notes how many rows it is given with gradients on."
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.layers,self.norm,self.seen = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)),norm(),[]
        self.noting = False
    def forward(self, x):
        if self.noting: self.seen.append(len(x))
        return self.layers(self.norm(x))

class Noting(Callback):
    "Lets the model note what the Learner's own passes in training are given, and notes the sizes that callbacks see."
    order = 70
    def before_fit(self): self.at_pred,self.after,self.weights = [],[],[]
    def before_batch(self): self.model.noting = self.training
    def after_pred(self):
        if self.training: self.at_pred.append((len(self.x), len(self.pred), len(self.y)))
        self.model.noting = False
    def after_batch(self):
        if self.training: self.after.append((len(self.x), len(self.pred), len(self.y)))
        if self.training: self.weights.append((step := self.learn.meta_reweight.step) and step.weights)

def fit(skip, tmp_path, *cbs, epochs=2, loss_func=None, train_metrics=False, make_model=Rows, **kwargs):
    dls = make_dls(batch_tfms=Augment())
    set_seed(1)
    learn = Learner(dls, make_model(), loss_func=loss_func or CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy, path=tmp_path,
        cbs=[MetaReweightCallback(skip_zeros=skip, **kwargs), Noting(), *[cb() for cb in cbs]])
    learn.recorder.train_metrics = train_metrics
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 0.05, wd=0.1)
    return learn

def assert_same(a, b, rtol=1e-4, atol=1e-6):
    for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True): torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    assert a.recorder.metric_names == b.recorder.metric_names
    for v,w in zip(a.recorder.values, b.recorder.values, strict=True): torch.testing.assert_close(torch.tensor(list(v)), torch.tensor(list(w)), rtol=rtol, atol=1e-5, equal_nan=True)

CASES = {
    'plain': {},
    'class weights': dict(loss_func=lambda: CrossEntropyLossFlat(weight=torch.tensor([1., 5., 0.2, 3.]))),
    'label smoothing': dict(loss_func=LabelSmoothingCrossEntropyFlat),
    'focal': dict(loss_func=FocalLossFlat),
    'MixUp': dict(cbs=[MixUp]),
    'CutMix and class weights': dict(cbs=[CutMix], loss_func=lambda: CrossEntropyLossFlat(weight=torch.tensor([1., 5., 0.2, 3.]))),
    'accumulation': dict(cbs=[lambda: GradientAccumulation(32)]),
    'clipping': dict(cbs=[lambda: GradientClip(0.1)]),
    'reverse': dict(engine='reverse'),
    'every, opt': dict(every=3, lookahead='opt'),
    'uniform': dict(on_zero='uniform'),
    'start': dict(start=1),
    'training metrics': dict(train_metrics=True),
    'group norm': dict(make_model=lambda: Rows(lambda: nn.GroupNorm(1, 1))),
    'frozen batch norm': dict(make_model=lambda: Rows(lambda: FrozenNorm(1))),
}

class FrozenNorm(nn.BatchNorm2d):
    def train(self, mode=True): return super().train(False)

@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_the_same_parameters_and_figures(tmp_path, case):
    case = dict(case)
    cbs,loss_func = case.pop('cbs', []),case.pop('loss_func', None)
    whole,left = [fit(skip, tmp_path, *cbs, loss_func=loss_func and loss_func(), **case) for skip in (False, True)]
    assert_same(whole, left)
    assert set(whole.model.seen) == {16} and min(left.model.seen) < 12, left.model.seen
    positive = [max((w > 0).sum().item(), 2) if w is not None else 16 for w in left.noting.weights]
    assert left.model.seen == positive and len(set(positive)) > 1
    assert left.noting.at_pred == [(k, k, k) for k in positive] and set(left.noting.after) == {(16, 16, 16)}

def test_weights_are_those_of_the_oracle(make_learner):
    learn = make_learner([MetaReweightCallback(skip_zeros=True), Seen(), oracle := Oracle(nn.CrossEntropyLoss(reduction='none'))], model=Rows())
    learn.fit(1)
    assert oracle.compared == len(learn.dls.train) and oracle.varied and all(len(o.weights) == 16 for o in learn.seen.steps)

@pytest.mark.parametrize('helping', [0, 1])
@pytest.mark.parametrize('on_zero', ['skip', 'uniform'])
def test_few_or_none_help(tmp_path, monkeypatch, helping, on_zero):
    "Weight decay and momentum still move the parameters."
    def few(u): return torch.where(torch.arange(len(u)) < helping, 1., 0.)
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', few)
    whole,left = [fit(skip, tmp_path, on_zero=on_zero) for skip in (False, True)]
    assert_same(whole, left)
    assert set(left.model.seen) == ({16} if helping == 0 and on_zero == 'uniform' else {2})

class CenterBatch(nn.Module):
    def forward(self, x): return x - x.mean(0)

@pytest.mark.parametrize('norm,message', [(lambda: nn.BatchNorm2d(1), 'norm, a BatchNorm2d in training mode'), (lambda: nn.BatchNorm2d(1, track_running_stats=False), 'norm, a BatchNorm2d in training mode'),
    (lambda: nn.InstanceNorm2d(1, track_running_stats=True), 'norm, a InstanceNorm2d'), (CenterBatch, 'depends on the others in the batch'), (lambda: nn.Sequential(CenterBatch(), nn.Dropout(0.1)), 'depends on the others')])
def test_refused_where_examples_act_on_each_other(tmp_path, norm, message):
    model = Rows(norm)
    before = [p.clone() for p in model.state_dict().values()]
    with pytest.raises(ValueError, match=message): fit(True, tmp_path, make_model=lambda: model)
    assert all(torch.equal(p, q) for p,q in zip(model.state_dict().values(), before))
    fit(False, tmp_path, make_model=lambda: model)

@pytest.mark.parametrize('norm', [nn.Dropout, lambda: nn.InstanceNorm2d(1), lambda: nn.BatchNorm2d(1).eval()])
def test_not_refused_where_they_do_not(tmp_path, norm):
    model = Rows(norm)
    if isinstance(model.norm, nn.BatchNorm2d): model.norm = FrozenNorm(1)
    learn = fit(True, tmp_path, make_model=lambda: model, epochs=1)
    assert min(learn.model.seen) < 16 and all(p.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_step'])
def test_an_error_leaves_a_usable_learner(tmp_path, event):
    learn = fit(True, tmp_path, MixUp, epochs=1)
    def fail(self):
        if self.training and self.iter == 1: raise RuntimeError('stop')
    for order in (-200, 200):
        cb = Callback(**{event: fail})
        cb.order = order
        with pytest.raises(RuntimeError, match='stop'):
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cb)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert isinstance(learn.loss_func, CrossEntropyLossFlat) and learn.meta_reweight.this_fit is None
