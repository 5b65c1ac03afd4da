"Looking ahead along some of the parameters: from the Learner's own pass, or by another pass through the model; the weights are the same."
import pytest, torch
from fastai.basics import Callback, Learner, SGD, accuracy, set_seed
from fastai.callback.all import MixUp, GradientAccumulation
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torchvision.models import resnet18

from fastai_l2rw.fit import Fit
from fastai_l2rw.all import *
from fastai_l2rw.reweight import normalise, rectify
from conftest import Augment, make_dls

class Counted(nn.Module):
    "Counts its calls, and has noise of its own."
    calls = 0
    def forward(self, x): type(self).calls += 1; return x + 0.01*torch.randn_like(x) if self.training else x

def body(): return nn.Sequential(nn.Conv2d(1, 8, 3), Counted(), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3, 2), nn.Flatten())
def head(): return nn.Sequential(nn.Dropout(0.3), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(16, 4))

class Own(nn.Module):
    "As torchvision's models are written; what comes after the head is up to `end`."
    def __init__(self, end=lambda x: x): super().__init__(); self.body,self.fc,self.end = body(),head(),end
    def forward(self, x): return self.end(self.fc(self.body(x)))

class Twice(nn.Module):
    "The head is used twice."
    def __init__(self): super().__init__(); self.body,self.fc = body(),nn.Linear(32, 4)
    def forward(self, x): h = self.body(x); self.fc(h/2); return self.fc(h)

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.body,self.fc = body(),nn.Bilinear(32, 32, 4)
    def forward(self, x): h = self.body(x); return self.fc(h, h.sin())

class Keyword(nn.Module):
    def __init__(self): super().__init__(); self.body,self.fc = body(),nn.Linear(32, 4)
    def forward(self, x): return self.fc(input=self.body(x))

class Gray(nn.Module):
    def __init__(self): super().__init__(); self.net = resnet18(num_classes=4)
    def forward(self, x): return self.net(x.expand(-1, 3, -1, -1))

MODELS = { # the model and the parameters
    'head of a Sequential':    (lambda: nn.Sequential(body(), head()), lambda m: m[1].parameters()),
    'last layer of the head':  (lambda: nn.Sequential(body(), head()), lambda m: m[1][-1].parameters()),
    'part of the body, too':   (lambda: nn.Sequential(body(), head()), lambda m: [*m[0][5].parameters(), *m[1].parameters()]),
    'biases of the head':      (lambda: nn.Sequential(body(), head()), lambda m: [m[1][1].bias, m[1][5].bias]),
    'attribute':               (Own, lambda m: m.fc.parameters()),
    'ResNet':                  (Gray, lambda m: m.net.fc.parameters()),
    'two inputs':              (TwoInputs, lambda m: m.fc.parameters()),
    'last block of a ResNet':  (Gray, lambda m: [*m.net.layer4.parameters(), *m.net.fc.parameters()]),
    'more after the head':     (lambda: Own(lambda x: 2*x), lambda m: m.fc.parameters()),
    'head used twice':         (Twice, lambda m: m.fc.parameters()),
    'head given keywords':     (Keyword, lambda m: m.fc.parameters()),
    'begin of the body':       (lambda: nn.Sequential(body(), head()), lambda m: m[0][0].parameters()),
}

class Weights(Callback):
    run_valid = False
    def before_fit(self): self.weights = []
    def after_batch(self): self.weights.append(self.learn.meta_reweight.step.weights)

@pytest.fixture
def fit(tmp_path):
    def fit(share, make_model, params, *cbs, **kwargs):
        if not share: kwargs['engine'] = 'forward'
        set_seed(3)
        learn = Learner(make_dls(batch_tfms=Augment()), make_model(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy, path=tmp_path,
            cbs=[MetaReweightCallback(params=params, **kwargs), Weights(), *cbs])
        Counted.calls = 0
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.05)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
        return learn,Counted.calls
    return fit

@pytest.mark.parametrize('kwargs', [{}, dict(lookahead='opt', every=2)], ids=str)
@pytest.mark.parametrize('make_model,params', MODELS.values(), ids=MODELS)
def test_shared_or_not_the_weights_are_the_same(fit, make_model, params, kwargs):
    (a,calls),(b,calls_without) = fit(True, make_model, params, **kwargs),fit(False, make_model, params, **kwargs)
    n = 2 if make_model is Gray else None # a ResNet on few pixels is chaotic: parameters that differ by 1e-7 give other weights in the third step, by a hundredth
    for v,w in zip(a.weights.weights[:n], b.weights.weights[:n], strict=True): torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5)
    assert len({len(w.unique()) for w in a.weights.weights}) > 1
    if make_model is Gray: return
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert calls_without - calls == 2*len(a.dls.train) # passes through the body

@pytest.mark.parametrize('cbs', [[MixUp], [lambda: GradientAccumulation(32)]], ids=['MixUp', 'accumulation'])
def test_with_other_callbacks(fit, cbs):
    (a,_),(b,_) = [fit(share, *MODELS['attribute'], *[cb() for cb in cbs]) for share in (True, False)]
    for v,w in zip(a.weights.weights, b.weights.weights, strict=True): torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5)
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

def test_by_hand(make_learner):
    "The head's gradients, one example at a time, from what the Learner's pass gave it."
    learn = make_learner(MetaReweightCallback(params=lambda m: m[1].parameters()), model=nn.Sequential(body(), nn.Linear(32, 4)))
    seen = []
    def check(self):
        if not self.training: return
        cb,h = self.learn.meta_reweight,seen[0]
        def gradient(h, y): return torch.cat([g.flatten() for g in torch.autograd.grad(nn.functional.cross_entropy(self.model[1](h), y), self.model[1].parameters())])
        each = torch.stack([gradient(h[i:i + 1], self.y[i:i + 1]) for i in range(len(h))])
        expected = normalise(rectify(each @ vectors[-1]))
        torch.testing.assert_close(cb.step.weights, torch.as_tensor(expected), rtol=1e-3, atol=1e-5)
        seen.clear(); self.n = getattr(self, 'n', 0) + 1
    taken,vectors = Fit.meta_gradient_at,[]
    def note(*args):
        gradient = taken(*args)
        vectors.append(torch.cat([g.flatten() for g in gradient.values()]))
        return gradient
    def watch(self): self.model[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()) if args[0].requires_grad else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, 'meta_gradient_at', note)
        learn.fit(1, cbs=[cb := Callback(before_train=watch, after_loss=check)])
    assert cb.n == len(learn.dls.train)

def test_nan_is_noticed_before_the_training_pass(make_learner):
    learn = make_learner(MetaReweightCallback(params=lambda m: m[1].parameters()))
    def poison(self):
        if self.training and self.iter == 1: self.learn.xb[0][3, 0, 0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match=r'batch 1 of the training loader .* in its item\(s\) \[3\]'): learn.fit(1, cbs=Callback(before_batch=poison))
    assert all(p.isfinite().all() for p in learn.model.state_dict().values())

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_batch'])
def test_an_error_leaves_a_usable_learner(make_learner, event):
    "An error in the model leaves hooks in it until it is used again."
    learn = make_learner(MetaReweightCallback(params=lambda m: m[1].parameters()))
    def fail(self):
        if self.training and self.iter == 1: raise RuntimeError('stop')
    for order in (-200, 200):
        cb = Callback(**{event: fail})
        cb.order = order
        with pytest.raises(RuntimeError, match='stop'): learn.fit(1, cbs=cb)
        learn.export()
        learn.validate()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
        learn.fit(1)
