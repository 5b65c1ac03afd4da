"The options that steady weights, against gradients of single examples."
import pytest, torch
from copy import deepcopy
from fastai.basics import Callback, DataLoaders, SGD, set_seed
from fastai.callback.all import MixUp
from torch import nn

from conftest import Oracle, cnn, make_dls, split, tensors
from fastai_l2rw.all import MetaReweightCallback, weighted_sampler, weighting_scheme

cross_entropy = nn.CrossEntropyLoss(reduction='none')

class ByHand:
    "Weights of each batch by a backward pass per example."
    def __init__(self, relative=False, margin=0.): self.relative,self.margin = relative,margin

    def __call__(self, model, loss_func, batch, meta_batch, params, step_size):
        model,(x,),(y,) = deepcopy(model),*batch
        named = {k: p for k,p in model.named_parameters() if k in params}
        gradient = lambda loss: torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        meta = gradient(loss_func(model(*meta_batch[0]), *meta_batch[1]).mean())
        out = model(x)
        losses = loss_func(out, y)
        u = [sum((step_size[k]*(a*b).sum()).item() for k,a,b in zip(named, meta, gradient(l))) for l in losses]
        if self.relative:
            lengths = [torch.autograd.grad(l, out, retain_graph=True)[0].norm().item() for l in losses]
            u = [a/(b + 1e-3*sum(lengths)/len(lengths)) for a,b in zip(u, lengths)]
        if self.margin:
            size = sum(map(abs, u))/len(u)
            u = [o/size for o in u]
        w = [max(o + self.margin, 0) for o in u]
        return torch.tensor([o/(sum(w) or 1) for o in w])

@pytest.mark.parametrize('engine', ['forward', 'reverse'])
@pytest.mark.parametrize('sampler', [False, True])
@pytest.mark.parametrize('options', [dict(relative=True), dict(margin=0.5), dict(relative=True, margin=1.)])
def test_weights_by_hand(options, sampler, engine, make_learner):
    dls = weighted_sampler(make_dls()) if sampler else make_dls()
    oracle = Oracle(cross_entropy, ByHand(**options))
    learn = make_learner([MetaReweightCallback(engine=engine, **options), oracle], dls=dls, model=cnn(bn=False, p=0.), splitter=split)
    learn.fit(4, slice(1e-3, 1e-1))
    assert oracle.compared == 4*len(dls.train) and oracle.varied > oracle.compared/2

def test_relative_with_several_outputs_and_targets(make_learner):
    "Pixel-wise losses, and a length that does not depend on the scale of the loss."
    x,y = torch.randn(24, 2, 4, 4),torch.randint(0, 3, (24, 4, 4))
    dls = DataLoaders(tensors(x, y), tensors(x, y))
    def weights(factor):
        set_seed(0)
        learn = make_learner(MetaReweightCallback(tensors(x[:8], y[:8]), relative=True), dls=dls, model=nn.Conv2d(2, 3, 1), opt_func=SGD, metrics=[],
            loss_func=lambda p, t, reduction='mean': factor*nn.functional.cross_entropy(p, t, reduction=reduction))
        found = []
        class Note(Callback):
            order = 100
            def after_loss(self):
                if self.training: found.append(self.learn.meta_reweight.step.weights)
        learn.fit(1, 1e-6, cbs=Note())
        return torch.cat(found)
    torch.testing.assert_close(weights(1.), weights(50.), rtol=1e-4, atol=1e-6)
    assert (weights(1.) > 0).any()

def test_a_margin_below_zero():
    with pytest.raises(ValueError, match='margin=-0.5 must be 0 or more'): MetaReweightCallback(margin=-0.5)

def test_mixed_batches_train(make_learner):
    learn = make_learner([MetaReweightCallback(relative=True, margin=1.), MixUp()])
    learn.fit(2)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_preset():
    dls = make_dls()
    assert weighting_scheme('robust', dls)['cbs'][0].relative
    got = weighting_scheme('robust', dls, margin=0.5)
    cb, = got['cbs']
    assert type(got['dls'].train).__name__ == 'WeightedDL' and (cb.relative, cb.margin) == (True, 0.5)

def test_relative_with_skip_zeros(make_learner):
    "Examples of weight zero are left out of the training pass, and the lengths of the gradients are those of all examples."
    def train(**kwargs):
        set_seed(3)
        learn = make_learner(MetaReweightCallback(relative=True, **kwargs), model=cnn(bn=False, p=0.), opt_func=SGD)
        set_seed(2)
        learn.fit(2, 1e-2)
        return learn
    plain,skipping = train(),train(skip_zeros=True)
    assert 0 < plain.meta_reweight.item_weights().zero.mean() < 1
    for p,q in zip(plain.model.parameters(), skipping.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
