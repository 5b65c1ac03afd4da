"Every kind of loss and target: the weights of a real fit against the oracle with the loss per item written out."
import warnings
from functools import partial

import pytest, torch
from fastai.basics import DataLoaders, Learner, noop, set_seed
from fastai.losses import (BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat)
from torch import nn
from torch.nn import functional as F

from fastai_l2rw.all import *
from conftest import Oracle, tensors

N,C = 24,4
set_seed(0)
x = torch.randn(N, 6)
label = torch.arange(N) % C
some_ignored = torch.where(torch.arange(N) % 5 == 0, 2, label)
several_labels = (torch.rand(N, C) > 0.6).float()
numbers,number = torch.randn(N, 3),torch.randn(N, 1)
pixels,pixel_labels = torch.randn(N, 3, 6, 5),torch.randint(C, (N, 6, 5))
steps,step_labels = torch.randn(N, 7, 6),torch.randint(C, (N, 7))
factors = torch.tensor([1., 5., 0.5, 2.])

def mlp(n_out=C): return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, n_out))
def fcn(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, C, 1))
def tagger(): return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, C))

class TwoHeads(nn.Module):
    def __init__(self): super().__init__(); self.body,self.a,self.b = mlp(8),nn.Linear(8, C),nn.Linear(8, 1)
    def forward(self, x): h = self.body(x); return self.a(h),self.b(h)

def two_targets(out, y, z, reduction='mean'):
    loss = F.cross_entropy(out[0], y, reduction='none') + 0.5*F.mse_loss(out[1], z, reduction='none')[:, 0]
    return loss.mean() if reduction == 'mean' else loss

class OwnLoss(nn.Module):
    "As users write it: an attribute `reduction`, which fastai sets."
    def __init__(self): super().__init__(); self.reduction = 'mean'
    def forward(self, out, y):
        loss = (out.logsumexp(1) - out[torch.arange(len(y)), y])**2
        return loss if self.reduction == 'none' else loss.mean()

def log_p(out): return out.log_softmax(1)
def nll(out, y): return -log_p(out).gather(1, y[:, None])[:, 0]
def smooth(out, y, eps=0.1): return (1 - eps)*nll(out, y) - eps*log_p(out).mean(1)
def per_pixel(out, y): return torch.stack([F.cross_entropy(o[None], t[None]) for o,t in zip(out, y)])
def dice(out, y):
    p,t = out.softmax(1),F.one_hot(y, C).movedim(-1, 1)
    inter,union = (p*t).sum((2, 3)),(p + t).sum((2, 3))
    return (1 - 2*inter/(union + 1e-6)).mean(1)

# name: loss function, the loss of each item, model, inputs, targets
LOSSES = {
    'cross-entropy': (nn.CrossEntropyLoss(), nll, mlp, x, label),
    'cross-entropy, fastai': (CrossEntropyLossFlat(), nll, mlp, x, label),
    'cross-entropy, function': (F.cross_entropy, nll, mlp, x, label),
    'label smoothing, fastai': (LabelSmoothingCrossEntropyFlat(eps=0.1), smooth, mlp, x, label),
    'label smoothing, PyTorch': (nn.CrossEntropyLoss(label_smoothing=0.1), smooth, mlp, x, label),
    'label smoothing, partial': (partial(F.cross_entropy, label_smoothing=0.1), smooth, mlp, x, label),
    'focal': (FocalLossFlat(gamma=2.), lambda out, y: (1 - (-nll(out, y)).exp())**2 * nll(out, y), mlp, x, label),
    'class weights': (CrossEntropyLossFlat(weight=factors), lambda out, y: factors[y]*nll(out, y), mlp, x, label),
    'ignore_index': (CrossEntropyLossFlat(ignore_index=2), lambda out, y: (y != 2)*nll(out, y), mlp, x, some_ignored),
    'several labels': (BCEWithLogitsLossFlat(), lambda out, y: (F.softplus(out) - y*out).mean(1), mlp, x, several_labels),
    'several labels, pos_weight': (nn.BCEWithLogitsLoss(pos_weight=factors), lambda out, y: (factors*y*F.softplus(-out) + (1 - y)*F.softplus(out)).mean(1), mlp, x, several_labels),
    'squared error': (MSELossFlat(), lambda out, y: ((out - y)**2).mean(1), partial(mlp, 3), x, numbers),
    'squared error, one number': (MSELossFlat(), lambda out, y: ((out - y)**2).mean(1), partial(mlp, 1), x, number),
    'absolute error': (L1LossFlat(), lambda out, y: (out - y).abs().mean(1), partial(mlp, 3), x, numbers),
    'Huber': (nn.HuberLoss(delta=0.5), lambda out, y: torch.where((out - y).abs() < 0.5, (out - y)**2/2, 0.5*((out - y).abs() - 0.25)).mean(1), partial(mlp, 3), x, numbers),
    'segmentation': (CrossEntropyLossFlat(axis=1), per_pixel, fcn, pixels, pixel_labels),
    'Dice': (DiceLoss(reduction='mean'), dice, fcn, pixels, pixel_labels),
    'sequences': (CrossEntropyLossFlat(), lambda out, y: -out.log_softmax(2).gather(2, y[..., None])[..., 0].mean(1), tagger, steps, step_labels),
    'several targets': (two_targets, lambda out, y, z: two_targets(out, y, z, 'none'), TwoHeads, x, (label, number)),
    'own function, a value per item': (lambda out, y: nll(out, y), nll, mlp, x, label),
    'own module with reduction': (OwnLoss(), lambda out, y: nll(out, y)**2, mlp, x, label),
}

@pytest.mark.parametrize('name', LOSSES)
def test_weights_with_every_loss(name, tmp_path):
    loss_func,per_item,model,inputs,targets = LOSSES[name]
    targets = targets if isinstance(targets, tuple) else (targets,)
    set_seed(1)
    dls = DataLoaders(*[tensors(inputs, *targets) for _ in range(3)])
    dls.n_inp = 1
    reduction = getattr(loss_func, 'reduction', None)
    learn = Learner(dls, model(), loss_func=loss_func, path=tmp_path)
    learn.logger = noop
    with warnings.catch_warnings():
        warnings.filterwarnings('error', module='fastai_l2rw')
        learn.fit(1, 1e-3, cbs=[MetaReweightCallback(), oracle := Oracle(per_item)])
    assert oracle.compared == N//8 and oracle.positive and oracle.varied
    assert learn.loss_func is loss_func and getattr(loss_func, 'reduction', None) == reduction

class Mean(nn.Module):
    def forward(self, out, y): return F.cross_entropy(out, y)

@pytest.mark.parametrize('loss_func', [lambda out, y: F.cross_entropy(out, y), Mean(), lambda out, y: F.cross_entropy(out, y, reduction='none')[:3]])
def test_a_loss_that_gives_no_value_per_item(loss_func, tmp_path):
    learn = Learner(DataLoaders(*[tensors(x, label) for _ in range(3)]), mlp(), loss_func=loss_func, cbs=MetaReweightCallback(), path=tmp_path)
    before = [p.clone() for p in learn.model.state_dict().values()]
    with pytest.raises(ValueError, match="learn.loss_func.*can't give one loss per item.*argument or attribute `reduction`"): learn.fit(1)
    for a,b in zip(before, learn.model.state_dict().values(), strict=True): assert torch.equal(a, b)
