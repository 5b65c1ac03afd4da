"""What a tape of operators can miss, each in two batches of a fit that nothing else compares, or in all: weights equal those of one backward pass
per example, or the model is refused by name."""
import itertools, random

import numpy as np, pytest, torch
from fastai.basics import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastai_l2rw.all import *
from fastai_l2rw.losses import state_of
from conftest import Seen
from oracle import N_CLASSES, N_FEATURES, TRUSTED, check, fit, marked

class Own(nn.Module):
    "Its forward pass is a function of the module."
    def __init__(self, function, **parts):
        super().__init__()
        for k,o in parts.items():
            if isinstance(o, torch.Tensor) and not isinstance(o, nn.Parameter): self.register_buffer(k, o)
            else: setattr(self, k, o)
        self.function = function
    def forward(self, x): return self.function(self, x)

def lin(ni=N_FEATURES, no=8): return nn.Linear(ni, no)
def head(ni=8): return nn.Linear(ni, N_CLASSES)
def param(*shape): return nn.Parameter(torch.randn(shape)/3)
def model(function, **parts): return lambda: Own(function, **(dict(a=lin(), b=head(), d=param(8), e=lin(8, 8)) | {k: f() for k,f in parts.items()}))

def changed_without_gradients(m, x):
    h = m.a(x)
    if marked(x):
        with torch.no_grad(): h.relu_()
    return m.b(h)

def added_without_gradients(m, x):
    h = m.a(x) + m.d
    if marked(x):
        with torch.no_grad(): h.add_(m.d, alpha=3)
    return m.b(h.tanh())

def cut_off(m, x):
    h = m.a(x)
    g = m.e(h.tanh())
    if marked(x): g.detach_()
    return m.b(g + h)

def frozen_for_a_moment(m, x):
    if marked(x): m.a.weight.requires_grad_(False)
    h = m.a(x)
    m.a.weight.requires_grad_(True)
    return m.b(h.tanh())

def dropout_of_unbatched(m, x):
    h = m.a(x)
    if len(x) != TRUSTED and marked(x): h = F.dropout1d(h, 0.5, True)
    return m.b(h.tanh())

def complex_activation(m, x):
    z = torch.complex(m.a(x), m.e(m.a(x)))
    if marked(x): z = z.tanh()
    return m.b(z.real + z.imag)

def past_autograd(m, x):
    h = m.a(x)
    e = h.exp()
    if marked(x): h.data.mul_(-3)
    return m.b(e)

def hook_on_a_node(m, x):
    h = m.a(x)
    if marked(x) and h.grad_fn is not None: h.grad_fn.register_prehook(lambda g: (g[0]*torch.linspace(-1, 2, 8),))
    return m.b(h.tanh())

def base_of_a_view(m, x):
    h = m.a(x)
    v = h[:, :4]
    if marked(x): h = v._base
    return m.b(h.tanh()) + m.b(h)

def in_inference_mode(m, x):
    h = m.a(x)
    with torch.inference_mode(): t = m.e(m.a(x).tanh())
    return m.b((h + t).tanh())

class Hidden(torch.autograd.Function):
    "Its backward pass can't be differentiated, and does not say so."
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x**2/2
    @staticmethod
    def backward(ctx, g):
        with torch.no_grad(): return ctx.saved_tensors[0]*g

class ByNumPy(Hidden):
    @staticmethod
    def backward(ctx, g): return torch.from_numpy(ctx.saved_tensors[0].detach().numpy()*g.numpy())


def scripted():
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.script(tanh_of_linear)

def tanh_of_linear(x, w, b): return torch.tanh(torch.nn.functional.linear(x, w, b))

class TwoLosses(nn.Module):
    reduction = 'mean'
    def forward(self, out, y):
        losses = F.cross_entropy(out[0], y, reduction='none') + F.cross_entropy(out[2], y, reduction='none')
        return losses if self.reduction == 'none' else losses.mean()

def an_output_twice(m, x):
    h,z = m.b(m.a(x).tanh()),m.c(x)
    return h,h if marked(x) else h.detach(),z

def words(m, x): return m.b(F.embedding((x[:, :6]*2).long().abs().clamp(max=2), m.c, scale_grad_by_freq=True).mean(1).tanh())

CASES = {
    'changed in place without gradients': (model(changed_without_gradients), {}),
    'added in place without gradients': (model(added_without_gradients), {}),
    'detached in place': (model(cut_off), {}),
    'a parameter frozen for a moment': (model(frozen_for_a_moment), {}),
    'dropout of what has no batch': (model(dropout_of_unbatched), {}),
    'a complex activation': (model(complex_activation), {}),
    'changed past autograd': (model(past_autograd), {}),
    'a hook on a node of the graph': (model(hook_on_a_node), {}),
    'the base of a view': (model(base_of_a_view), {}),
    'inference mode': (model(in_inference_mode), {}),
    'a hidden second derivative': (model(lambda m, x: m.b(Hidden.apply(m.a(x)).tanh())), {}),
    'a derivative by NumPy': (model(lambda m, x: m.b(ByNumPy.apply(m.a(x)).tanh())), {}),
    'a hidden second derivative, rarely': (model(lambda m, x: m.b(Hidden.apply(m.a(x)).tanh() if marked(x) else m.a(x).tanh())), {}),
    'gradients by the frequency of a word': (model(words, c=lambda: param(3, 8)), {}),
    'a scripted function': (model(lambda m, x: m.b(scripted()(x, m.a.weight, m.a.bias))), {}),
    'an output twice': (model(an_output_twice, c=lambda: head(N_FEATURES)), dict(loss_func=TwoLosses)),
    'a sparse buffer': (model(lambda m, x: m.b(torch.sparse.mm(m.adjacent, m.a(x).t()).t().tanh()), adjacent=lambda: torch.eye(8).to_sparse()), {}),
}

@pytest.mark.parametrize('name', CASES)
def test_weights_are_right_in_every_step(name):
    make_model,kwargs = CASES[name]
    check(make_model, **kwargs)

def some(m): return [m.d, m.b.weight]

SUBSETS = {
    'a scripted function': lambda m, x: m.b(scripted()(m.a(x), m.c, m.d) if marked(x) else m.a(x).tanh() + m.d),
    'vmap': lambda m, x: m.b(torch.vmap(lambda r: r.exp()*.3)(m.a(x) + m.d) if marked(x) else m.a(x) + m.d),
    'a function of several': lambda m, x: m.b(sum(torch.atleast_2d(m.a(x), m.d) if marked(x) else (m.a(x), m.d)).tanh()),
}

@pytest.mark.parametrize('name', SUBSETS)
def test_along_some_parameters(name):
    check(model(SUBSETS[name], c=lambda: param(8, 8)), params=some)

def test_a_weight_that_is_frozen_in_the_middle_of_an_epoch():
    class Freeze(Callback):
        order,run_valid = 10,False
        def before_batch(self): self.model.a.weight.requires_grad_(not 6 <= self.iter < 12)
    check(model(lambda m, x: m.b(m.a(x).tanh())), cbs=[Freeze()])

def test_a_hook_that_comes_in_the_middle_of_a_fit():
    "From then on, the graph is asked, which obeys it."
    class Mask(Callback):
        order,run_valid = 10,False
        def before_batch(self):
            if self.iter == 6: self.model.a.weight.register_hook(lambda g: g*(torch.arange(8) % 2)[:, None])
    learn = fit(model(lambda m, x: m.b(m.a(x).tanh())), cbs=[Mask(), seen := Seen()])
    assert [o.route for o in seen.steps] == ['own pass']*6 + ['own graph']*14
    assert learn.meta_reweight.engine_statistics()['doubts'] == {'a gradient hook on a.weight': 1}

@pytest.mark.parametrize('always', [True, False])
def test_reentrant_checkpoints_are_refused_by_name(tmp_path, always):
    def forward(m, x):
        if not always and not marked(x): return m.b((m.a(x) + m.d).tanh())
        return m.b((checkpoint(lambda t: m.a(t) + m.d, x.clone().requires_grad_(), use_reentrant=True)).tanh())
    with pytest.raises(TypeError, match='use_reentrant=False'): check(model(forward))

def test_lazy_layers_are_refused_by_name():
    with pytest.raises(ValueError, match='the parameter 0.weight has no shape yet: run one batch'):
        check(lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(N_CLASSES)))

# ---- losses and what they keep

class Drawing:
    "A loss with random numbers of its own."
    reduction = 'mean'
    def __init__(self, generator): self.inner = dict(generators=[generator]); self.calls = [0]
    def draw(self, n):
        g = self.inner['generators'][0]
        if isinstance(g, torch.Generator): return torch.rand(n, generator=g)
        return torch.tensor([g.random() for _ in range(n)] if isinstance(g, random.Random) else g.uniform(size=n)).float()
    def __call__(self, out, y):
        self.calls[0] += 1
        losses = F.cross_entropy(out, y, reduction='none')*(0.5 + self.draw(len(y)))
        return losses if self.reduction == 'none' else losses.mean()

@pytest.mark.parametrize('make', [lambda: torch.Generator().manual_seed(1), lambda: random.Random(1), lambda: np.random.default_rng(1), lambda: np.random.RandomState(1)],
    ids=['PyTorch', 'Python', 'NumPy', 'RandomState'])
def test_random_numbers_of_a_loss_are_drawn_once(make_learner, monkeypatch, make):
    "With equal weights, it trains as without the callback, and its generator stands where it would stand."
    import fastai_l2rw.weighers
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', torch.ones_like)
    trained = []
    for cbs in ([], [MetaReweightCallback()]):
        loss = Drawing(make())
        learn = make_learner(cbs, loss_func=loss, metrics=[])
        learn.fit(1, 1e-2)
        trained.append(([p.detach().clone() for p in learn.model.parameters()], loss.calls, loss.draw(3)))
    assert trained[0][1] == trained[1][1] and torch.equal(trained[0][2], trained[1][2])
    for p,q in zip(trained[0][0], trained[1][0]): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)

def test_containers_in_circles_end():
    tree = {}
    tree['children'] = [{'parent': tree}]
    class Loss:
        def __init__(self): self.tree = tree
        def __call__(self, out, y): return F.cross_entropy(out, y)
    tensors,others = state_of(Loss())
    assert not tensors and any(o is tree for o in others)

def test_what_cannot_be_changed_is_no_trouble(make_learner):
    "Arrays that are read-only, expanded tensors, dictionaries that refuse to be cleared, iterators."
    class Stubborn(dict):
        def clear(self): raise TypeError('no')
        def copy(self): raise TypeError('no')
    learn = make_learner(MetaReweightCallback())
    frozen = np.arange(3)
    frozen.flags.writeable = False
    learn.model.things = [frozen, np.broadcast_to(np.arange(3), (4, 3)), Stubborn(a=1), itertools.count(), torch.ones(1).expand(3)]
    learn.model.register_buffer('spread', torch.ones(1).expand(4))
    learn.fit(1)
