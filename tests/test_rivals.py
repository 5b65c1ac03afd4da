"The rivals of the comparison: their arithmetic against independent computations in NumPy."
import numpy as np, pytest, torch
from fastai.basics import Callback, DataLoaders, Learner, SGD, set_seed
from fastai.callback.all import ProgressCallback
from fastai.data.core import TfmdDL
from torch import nn

from fastai_l2rw.schemes import scheme_registry, weighting_scheme, weighting_schemes
from fastai_l2rw.studies.rivals import *

rng = np.random.default_rng(0)
X,y = torch.tensor(rng.normal(size=(70, 5)), dtype=torch.float32),torch.tensor(rng.choice(3, 70, p=[0.6, 0.3, 0.1]))
trusted_X,trusted_y = torch.tensor(rng.normal(size=(9, 5)), dtype=torch.float32),torch.arange(9) % 3
z,labels = rng.normal(size=(8, 3)),np.array([0, 2, 1, 1, 0, 0, 2, 0])

def softmax(z): return np.exp(z)/np.exp(z).sum(1, keepdims=True)
def picked(p, y): return p[np.arange(len(y)), y]
def inverse(y): return len(y)/(len(set(y))*np.bincount(y))

@pytest.fixture(autouse=True)
def registered():
    before = dict(scheme_registry)
    register_rivals()
    yield
    scheme_registry.clear()
    scheme_registry.update(before)

def loader(X, y, **kwargs): return TfmdDL(list(zip(X, y)), bs=16, num_workers=0, **kwargs)

def make_dls():
    dls = DataLoaders(loader(X, y, shuffle=True, drop_last=True), loader(trusted_X, trusted_y), loader(trusted_X, trusted_y), device='cpu')
    dls.c = 3
    return dls

class Seen(Callback):
    "What each step had, and made of it; runs after all others."
    order,run_valid = 1000,False
    def before_fit(self): self.steps = []
    def after_loss(self):
        items = [int((X == x).all(1).nonzero()[0]) if (X == x).all(1).any() else -1 for x in self.xb[0]]
        self.steps.append((self.epoch, items, self.pred.detach().double().numpy(), self.yb[0].numpy(), float(self.loss_grad)))

def trained(scheme, epochs=3, **kwargs):
    set_seed(0)
    how = weighting_scheme(scheme, make_dls(), **kwargs)
    learn = Learner(model=nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), opt_func=SGD, **how)
    learn.remove_cbs(ProgressCallback)
    learn.add_cb(seen := Seen())
    with learn.no_logging(): learn.fit(epochs, 0.1)
    return learn,seen.steps

def test_the_names():
    assert list(rivals) == ['label smoothing', 'logit adjustment', 'generalised cross-entropy', 'small losses', 'early learning',
        'trusted added', 'gold loss correction']
    assert not set(rivals) & set(weighting_schemes) and tuple(scheme_registry) == (*weighting_schemes, *rivals)
    assert all(o.name == k and o.replaces_loss and o.make.__doc__ and o.source for k,o in rivals.items())

def test_logit_adjustment():
    counts = np.array([60, 30, 10])
    for tau in (0., 0.5, 1.):
        p = softmax(z + tau*np.log(counts/counts.sum()))
        loss = LogitAdjustedLoss(torch.tensor(counts), tau)
        assert float(loss(torch.tensor(z), torch.tensor(labels))) == pytest.approx(-np.log(picked(p, labels)).mean())
    balanced = picked(counts*np.exp(z), labels)/(counts*np.exp(z)).sum(1) # the balanced softmax
    assert float(loss(torch.tensor(z), torch.tensor(labels))) == pytest.approx(-np.log(balanced).mean())
    given = weighting_scheme('logit adjustment', make_dls(), tau=2.)['loss_func']
    torch.testing.assert_close(given.shift, 2*(torch.bincount(y)/70).log())
    torch.testing.assert_close(given.activation(torch.tensor(z)), torch.tensor(z).softmax(1)) # predictions are not shifted
    empty = LogitAdjustedLoss(torch.tensor([5, 0, 5]))(torch.tensor(z), torch.zeros(8, dtype=torch.long))
    assert empty.isfinite()

def test_generalised_cross_entropy():
    weight,p = np.array([0.5, 1., 3.]),softmax(z)
    each = weight[labels]*(1 - picked(p, labels)**0.7)/0.7
    loss = GeneralisedCrossEntropyFlat(q=0.7, weight=torch.tensor(weight))
    assert float(loss(torch.tensor(z), torch.tensor(labels))) == pytest.approx(each.sum()/weight[labels].sum())
    np.testing.assert_allclose(GeneralisedCrossEntropy(0.7, torch.tensor(weight), 'none')(torch.tensor(z), torch.tensor(labels)), each)
    given = weighting_scheme('generalised cross-entropy', make_dls(), q=0.3)['loss_func']
    assert given.func.q == 0.3
    np.testing.assert_allclose(given.func.weight, inverse(y.numpy()), rtol=1e-6)

def test_label_smoothing():
    given = weighting_scheme('label smoothing', make_dls(), eps=0.2)['loss_func']
    weight,logs = inverse(y.numpy()),np.log(softmax(z))
    each = -0.8*weight[labels]*picked(logs, labels) - 0.2/3*(weight*logs).sum(1)
    assert float(given(torch.tensor(z).float(), torch.tensor(labels))) == pytest.approx(each.sum()/weight[labels].sum(), rel=1e-5)

def test_small_losses():
    _,steps = trained('small losses', epochs=5, forget=0.5)
    weight,dropped = inverse(y.numpy()),0
    for epoch,_,pred,given,loss in steps:
        keep = 16 - round(16*0.5*min(epoch/9, 1)) # ten epochs to the whole share, as in the authors' code
        losses = -np.log(picked(softmax(pred), given))
        kept = np.argsort(losses)[:keep]
        dropped += 16 - keep
        assert loss == pytest.approx((weight[given]*losses)[kept].sum()/weight[given][kept].sum(), rel=1e-4)
    assert dropped > 0 and len(steps) == 20
    cb = SmallLosses(0.4, epochs=5)
    cb.learn = type('L', (), dict(epoch=0))()
    shares = []
    for cb.learn.epoch in range(7): shares.append(cb.keeps)
    assert shares == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6])
    for wrong in (1., -0.1): pytest.raises(ValueError, SmallLosses, wrong)

def test_early_learning():
    learn,steps = trained('early learning', strength=2., decay=0.6)
    weight,said = inverse(y.numpy()),np.zeros((70, 3))
    for _,items,pred,given,loss in steps:
        p = softmax(pred)
        said[items] = 0.6*said[items] + 0.4*p
        plain = (weight[given]*-np.log(picked(p, given))).sum()/weight[given].sum()
        assert loss == pytest.approx(plain + 2*np.log(1 - (said[items]*p).sum(1)).mean(), rel=1e-4)
    held = next(o for o in learn.cbs if isinstance(o, EarlyLearning))
    np.testing.assert_allclose(held.said, said, rtol=1e-4, atol=1e-6)

def test_trusted_added():
    learn,steps = trained('trusted added', n=3)
    weight,counts = inverse(y.numpy()),np.zeros(9)
    for _,items,pred,given,loss in steps:
        assert len(items) == 16 + 3 and -1 not in items[:16] and items[16:] == [-1]*3
        assert loss == pytest.approx((weight[given]*-np.log(picked(softmax(pred), given))).sum()/weight[given].sum(), rel=1e-4)
        np.testing.assert_array_equal(given[:16], y[items[:16]])
    assert len(learn.dls.valid_ds) == 9 and learn.validate()[0] > 0 # validation has no more items than before

def test_all_trusted_come_equally_often():
    class Count(Callback):
        order,run_valid = 1000,False
        def before_fit(self): self.n = torch.zeros(9)
        def before_batch(self): self.n += torch.stack([(self.xb[0] == x).all(1).sum() for x in trusted_X])
    cbs = [AddTrusted(loader(trusted_X, trusted_y), 3), count := Count()]
    learn = Learner(make_dls(), nn.Linear(5, 3), loss_func=nn.CrossEntropyLoss(), cbs=cbs)
    learn.remove_cbs(ProgressCallback)
    with learn.no_logging(): learn.fit(3, 0.1)
    assert count.n.sum() == 36 and count.n.max() - count.n.min() <= 3

def test_corruption_matrix():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.9)).train()
    found = corruption_matrix(model, loader(trusted_X, trusted_y), 4 - 1)
    p = softmax(model[0](trusted_X).detach().double().numpy())
    np.testing.assert_allclose(found, [p[trusted_y == c].mean(0) for c in range(3)], rtol=1e-5)
    assert model.training and not found.requires_grad
    some = trusted_y != 1 # a class of which nothing is known is taken for right
    found = corruption_matrix(model, loader(trusted_X[some], trusted_y[some]), 3)
    np.testing.assert_allclose(found, [p[trusted_y == 0].mean(0), [0, 1, 0], p[trusted_y == 2].mean(0)], rtol=1e-5)

def test_gold_loss_correction():
    first = nn.Linear(5, 3)
    corruption = corruption_matrix(first, loader(trusted_X, trusted_y), 3).double().numpy()
    _,steps = trained('gold loss correction', first=first, n=3)
    for _,_,pred,given,loss in steps:
        p = softmax(pred)
        each = np.concatenate([-np.log(picked(p[:16] @ corruption, given[:16])), -np.log(picked(p[16:], given[16:]))])
        assert len(each) == 19 and loss == pytest.approx(each.mean(), rel=1e-4)
    with pytest.raises(ValueError, match='needs first, a model that was trained on the labels as they are'):
        weighting_scheme('gold loss correction', make_dls())

def test_the_loss_that_is_seen_is_the_one_that_is_learned_from():
    "A step leads where the gradient of the loss that was put in its place leads."
    for scheme in ('small losses', 'early learning', 'trusted added', 'gold loss correction'):
        kwargs = dict(first=nn.Linear(5, 3)) if scheme == 'gold loss correction' else {}
        class Gradient(Callback):
            order,run_valid = 1000,False
            def after_loss(self): self.expected = torch.autograd.grad(self.loss_grad, list(self.model.parameters()), retain_graph=True)
            def before_step(self):
                for p,g in zip(self.model.parameters(), self.expected): torch.testing.assert_close(p.grad, g)
                self.compared = True
        how = weighting_scheme(scheme, make_dls(), **kwargs)
        how['cbs'] = [*how['cbs'], cb := Gradient()]
        learn = Learner(model=nn.Linear(5, 3), **how)
        learn.remove_cbs(ProgressCallback)
        with learn.no_logging(): learn.fit(1, 0.1)
        assert cb.compared
