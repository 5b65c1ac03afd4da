"Where weights were once wrong without a word, or a fit failed: against one ordinary backward pass per example, or against plain training."
import sys
from collections import deque

import pytest, torch
from fastai.basics import Callback, OptimWrapper, load_learner
from fastai.callback.all import ProgressCallback
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from fastai_l2rw.all import *
from oracle import BATCH, TRUSTED, N_CLASSES, N_FEATURES, check, fit, make_dls, make_learner, marked, shown
from test_callbacks import CpuAutocast

# Warnings of operators without a forward derivative, and PyTorch's own.
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')

engines = pytest.mark.parametrize('engine', ['auto', 'forward', 'reverse'])
def each(table): return pytest.mark.parametrize('name', table)

# ---- what the models are made of

class Own(nn.Module):
    "Its forward pass is a function of the module; tensors are buffers."
    def __init__(self, function, **parts):
        super().__init__()
        for k,o in parts.items():
            if isinstance(o, torch.Tensor) and not isinstance(o, nn.Parameter): self.register_buffer(k, o)
            else: setattr(self, k, o)
        self.function = function
    def forward(self, x): return self.function(self, x)

class Cube(torch.autograd.Function):
    "Has no derivative in forward mode."
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x**3
    @staticmethod
    def backward(ctx, g): return 3*ctx.saved_tensors[0]**2*g

class TrainingDropout(nn.Dropout):
    "Lets trusted batches, whose random stream is the callback's own, pass as they are."
    def forward(self, x): return x if len(x) == TRUSTED else super().forward(x)

def lin(ni=N_FEATURES, no=8): return nn.Linear(ni, no)
def head(ni=8): return nn.Linear(ni, N_CLASSES)
def param(*shape): return nn.Parameter(torch.randn(shape)/3)
def always(x): return True

# ---- A1: parameters that are reached by another name

class InList(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = lin(),head()
        self.ws = [self.a.weight]
    def forward(self, x): return self.b((x @ self.ws[0].t() + self.a.bias).tanh())

class InDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(lin(), nn.Tanh(), head())
        self.values = dict(self.inner.named_parameters())
    def forward(self, x): return functional_call(self.inner, self.values, (x,))

class InClosure(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = lin(),head()
        w,b = self.a.weight,self.a.bias
        self.body = lambda x: F.linear(x, w, b).tanh()
    def forward(self, x): return self.b(self.body(x))

ALIASED = {'list': InList, 'dict': InDict, 'closure': InClosure}

@engines
@each(ALIASED)
def test_a_parameter_that_is_reached_by_another_name(name, engine):
    "A parameter counts whatever name the forward pass finds it by."
    check(ALIASED[name], engine=engine, factory=name == 'closure') # a copy of a closure has the original's parameters

# ---- A2: gradients taken inside forward

def gradient_inside(energy):
    "A head on the gradient of `energy(m, x)` at the input."
    def forward(m, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            g, = torch.autograd.grad(energy(m, x).sum(), x, create_graph=True)
        return m.c(g)
    return forward

def linear_energy(m, x): return m.b(m.a(x).tanh())
def conv_energy(m, x): return m.b(m.a(x.reshape(len(x), 3, 2, 4)).tanh().flatten(1))
def norm_energy(m, x): return m.b(m.n(m.a(x)).tanh())
def jvp_inside(m, x):
    h,along = torch.func.jvp(lambda x: m.a(x).tanh(), (x,), (torch.ones_like(x),))
    return m.c(h + along)
def grad_inside(m, x): return m.c(torch.func.grad(lambda x: m.b(m.a(x).tanh()).sum())(x))

INSIDE = {
    'grad through linear layers': lambda: Own(gradient_inside(linear_energy), a=lin(), b=lin(8, 1), c=head(24)),
    'grad through a convolution': lambda: Own(gradient_inside(conv_energy), a=nn.Conv2d(3, 4, 2), b=lin(12, 1), c=head(24)),
    'grad through a layer norm': lambda: Own(gradient_inside(norm_energy), a=lin(), n=nn.LayerNorm(8), b=lin(8, 1), c=head(24)),
    'func.jvp': lambda: Own(jvp_inside, a=lin(), c=head()),
    'func.grad': lambda: Own(grad_inside, a=lin(), b=lin(8, 1), c=head(24)),
}

@engines
@each(INSIDE)
def test_a_gradient_inside_forward(name, engine):
    "A model may differentiate in its forward pass."
    check(INSIDE[name], engine=engine)

# ---- A3: a step that can't be followed after many that could

def normalised_in_place(m, x):
    rare = marked(x)
    h = m.a(x.sub_(0.5).mul_(2))
    if rare: h[:, :3] = 0
    return m.b(h.tanh())

def running_mean(m, x):
    rare,h = marked(x),m.a(x)
    if m.training: m.mean.lerp_(h.detach().mean(0), 0.5)
    h = (h - m.mean).tanh()
    return m.b(h + Cube.apply(h) if rare else h)

def spectral(m, x):
    h = m.a(x).tanh()
    return m.b(h + Cube.apply(h) if marked(x) else h)

def carried_state(m, x):
    h = (m.a(x) + m.c(m.state)).tanh()
    m.state = h.detach().mean(0)
    return m.b(h + Cube.apply(h) if marked(x) else h)

class Carried(Own):
    def __init__(self):
        super().__init__(carried_state, a=lin(), b=head(), c=lin(8, 8))
        self.__dict__['state'] = torch.zeros(8) # a plain attribute, no buffer

LATER = {
    'input normalised in place': lambda: Own(normalised_in_place, a=lin(), b=head()),
    'norm by running statistics': lambda: Own(running_mean, a=lin(), b=head(), mean=torch.zeros(8)),
    'spectral norm': lambda: Own(spectral, a=spectral_norm(lin()), b=head()),
    'carried hidden state': Carried,
}

@engines
@each(LATER)
def test_a_step_that_becomes_unsure_later(name, engine):
    "A batch in which the model does what can't be followed is weighed by the state before its pass, not after."
    check(LATER[name], tolerance=2e-4, lr=0.5, engine=engine)

# ---- A4: memory that is shared

def relu_on_a_view(m, x):
    h = m.a(x)
    if m.when(x): h[:, :4].relu_()
    return m.b(h)

def add_on_a_view(m, x):
    h = m.a(x) + m.d
    if m.when(x): h[:, :4].add_(3*m.d[:4])
    return m.b(h.tanh())

def product_on_a_view(m, x):
    h = m.a(x)
    if m.when(x): h.t()[2:].mul_(m.a.bias[:1])
    return m.b(h.tanh())

def base_of_a_view(m, x):
    h = m.a(x)
    v = h[:, :4]
    if m.when(x): h.add_(m.d).relu_()
    return m.b(h) + v.sum(1, keepdim=True)*m.c[:3]

def exp_then_in_place(m, x):
    h = m.a(x)*0.3
    e = h.exp()
    if m.when(x): h.add_(m.d*3)
    return m.b(e) + m.b(h)

def softmax_then_in_place(m, x):
    h = m.a(x)
    s = h.softmax(1)
    if m.when(x): h.add_(m.d*3)
    return m.b(s*5) + m.b(h)

SHARED = {'relu_ on a view': relu_on_a_view, 'add_ on a view': add_on_a_view, 'mul_ on a view': product_on_a_view,
    'in place on the base of a view': base_of_a_view, 'exp, then in place': exp_then_in_place,
    'softmax, then in place': softmax_then_in_place}

@engines
@each(SHARED)
@pytest.mark.parametrize('when', [always, marked], ids=['always', 'rarely'])
def test_memory_that_is_shared(name, when, engine):
    "Tensors that share memory, or whose memory is changed later, are followed or known not to be."
    def make_model():
        model = Own(SHARED[name], a=lin(), b=head(), c=param(4), d=param(8))
        model.when = when
        return model
    check(make_model, engine=engine)

# ---- A5: a subset of the parameters

def partly_cubed(m, x):
    h = m.a(x)
    return m.b(h.tanh() + Cube.apply(h) if marked(x) else h.tanh())

def weights_only(model): return [model.a.weight, model.b.weight]

@engines
def test_a_subset_of_the_parameters(engine):
    "A function that can't be followed is noticed when only some parameters are looked ahead along."
    check(lambda: Own(partly_cubed, a=lin(), b=head()), params=weights_only, engine=engine)

# ---- A6: dropout where another kernel would lay out memory in another way

def heads(m, x):
    "Results of attention, (n, heads, tokens, features of a head)."
    q,k,v = m.a(x.reshape(len(x), 6, 4)).reshape(len(x), 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)

def dropped_heads(m, x): return m.b(m.drop(heads(m, x)).transpose(1, 2).reshape(len(x), 6, 8).tanh().flatten(1))
def dropped_convolution(m, x):
    h = m.conv(heads(m, x).transpose(-1, -2).reshape(len(x), 8, 2, 3))
    return m.b(m.drop(h).tanh().flatten(1))

def attention(function, **parts): return Own(function, a=lin(4, 24), drop=TrainingDropout(0.4), b=head(48), **parts)

LAYOUTS = {
    'on the heads of attention': lambda: attention(dropped_heads),
    'after a 1 x 1 convolution of them': lambda: attention(dropped_convolution, conv=nn.Conv2d(8, 8, 1)),
}

@engines
@each(LAYOUTS)
def test_dropout_after_attention(name, engine):
    "Weights are computed with the dropout masks that the training pass draws."
    check(LAYOUTS[name], engine=engine)

# ---- A7: hooks that change gradients

def reversed_gradient(m, x):
    h = m.a(x).tanh()
    g = m.b(h)
    if g.requires_grad: g.register_hook(lambda g: -g)
    return m.c(g.tanh()) + m.d(h)

def masked_gradient(m, x):
    h = m.a(x).tanh()
    if h.requires_grad: h.register_hook(lambda g: g*torch.linspace(-1, 2, 8))
    return m.d(h)

def masked_parameter():
    model = nn.Sequential(lin(), nn.Tanh(), head())
    mask = (torch.arange(N_FEATURES) % 3 == 0).float()
    model[0].weight.register_hook(lambda g: g*mask)
    return model

def backward_hook():
    model = nn.Sequential(lin(), nn.Tanh(), lin(8, 8), nn.Tanh(), head())
    model[2].register_full_backward_hook(lambda m, given, got: (-2*given[0],))
    return model

def backward_pre_hook():
    model = nn.Sequential(lin(), nn.Tanh(), lin(8, 8), nn.Tanh(), head())
    model[2].register_full_backward_pre_hook(lambda m, got: (got[0]*torch.linspace(-1, 2, 8),))
    return model

HOOKS = {
    'gradient reversal on a tensor': lambda: Own(reversed_gradient, a=lin(), b=lin(8, 8), c=head(), d=head()),
    'scales on a tensor': lambda: Own(masked_gradient, a=lin(), d=head()),
    'a mask on a parameter': masked_parameter,
    'a full backward hook': backward_hook,
    'a full backward pre-hook': backward_pre_hook,
}

@engines
@each(HOOKS)
def test_hooks_that_change_gradients(name, engine):
    "An example is weighed by the gradient that it would be learned from, which hooks may have changed."
    check(HOOKS[name], engine=engine, factory=name == 'a mask on a parameter') # a copy of a parameter has no hooks

# ---- A8: what a pass changes in the model

class Memo:
    "No module, and no container that is known."
    def __init__(self): self.total,self.mean = 0.,torch.zeros(8)

class Remembers(Own):
    def __init__(self, function):
        super().__init__(function, a=lin(), b=head(), words=nn.Embedding(500, 8, max_norm=0.8), teacher=lin())
        self.teacher.requires_grad_(False)
        self.__dict__.update(mean=torch.zeros(8), queue=deque(maxlen=4), seen=dict(means=[]), memo=Memo())

def moving_average_teacher(m, x):
    if m.training:
        with torch.no_grad():
            for p,q in zip(m.teacher.parameters(), m.a.parameters()): p.mul_(0.8).add_(q, alpha=0.2)
    return m.b((m.a(x) + m.teacher(x)).tanh())

def shrunk_in_place(m, x):
    if m.training: m.a.weight.data.mul_(0.97)
    return m.b(m.a(x).tanh())

def renormed_embedding(m, x): return m.b(m.words((x[:, :3]*200).long().abs().clamp(max=499)).sum(1)*2)

def tensor_attribute(m, x):
    h = m.a(x).tanh()
    if m.training: m.mean.mul_(0.8).add_(h.detach().mean(0), alpha=0.2)
    return m.b(h - m.mean)

def queue(m, x):
    h = m.a(x).tanh()
    if m.training: m.queue.append(h.detach().mean(0))
    return m.b(h - sum(m.queue)/4)

def list_in_a_dict(m, x):
    h = m.a(x).tanh()
    if m.training: m.seen['means'].append(h.detach().mean(0))
    return m.b(h - sum(m.seen['means'][-3:]))

def another_object(m, x):
    h = m.a(x).tanh()
    if m.training: m.memo.total,m.memo.mean = m.memo.total + 1,h.detach().mean(0)
    return m.b(h - m.memo.mean)*(1 + 0.01*m.memo.total)

def tensor_of_another_object(m, x):
    h = m.a(x).tanh()
    if m.training: m.memo.mean.lerp_(h.detach().mean(0), 0.2)
    return m.b(h - m.memo.mean)

TRACES = {'a moving-average teacher': moving_average_teacher, '.data in place': shrunk_in_place, 'max_norm': renormed_embedding,
    'a tensor attribute in place': tensor_attribute, 'a queue': queue, 'a list in a dict': list_in_a_dict,
    'attributes of another object': another_object, 'a tensor of another object': tensor_of_another_object}

def everything(model):
    "All that the models above remember."
    return [*model.state_dict().values(), model.mean, *model.queue, *model.seen['means'], model.memo.mean, torch.tensor(model.memo.total)]

@pytest.fixture
def equal_weights(monkeypatch):
    "Every example weighs the same."
    for room in ('weighers', 'callback'):
        if hasattr(sys.modules.get(f'fastai_l2rw.{room}'), 'rectify'): monkeypatch.setattr(f'fastai_l2rw.{room}.rectify', torch.ones_like)

def assert_same(a, b, tolerance=1e-4):
    a,b = list(a),list(b)
    assert len(a) == len(b), f'{len(a)} things are remembered, and {len(b)} by plain training'
    worst = max((p - q).abs().max()/q.abs().max().clamp(min=1e-3) for p,q in zip(a, b, strict=True))
    assert worst <= tolerance, f'off by {worst.item():.2g}'

@engines
@each(TRACES)
def test_what_a_pass_changes_in_the_model_changes_once_a_step(name, engine, equal_weights):
    "With equal weights a fit gives the same parameters, and the same of all that the model remembers, as plain training."
    def make_model(): return Remembers(TRACES[name])
    plain = fit(make_model, weigh=False)
    try: learn = fit(make_model, engine=engine)
    except (NotImplementedError, ValueError) as e:
        if engine == 'auto' or f"engine='{engine}'" not in str(e): raise
        return
    assert_same(everything(learn.model), everything(plain.model))

# ---- A9: losses with a state, with randomness, or in which examples meet

class CentreLoss(nn.Module):
    "Takes a running mean of the outputs off them."
    def __init__(self):
        super().__init__()
        self.reduction,self.calls = 'mean',0
        self.register_buffer('centre', torch.zeros(N_CLASSES))
    def forward(self, out, y):
        losses = F.cross_entropy(out - 3*self.centre, y, reduction=self.reduction)
        self.centre.lerp_(out.detach().mean(0), 0.3)
        self.calls += 1
        return losses

class RunningTargets:
    "No module: it mixes the labels with running means of the predictions."
    def __init__(self): self.reduction,self.calls,self.means = 'mean',0,torch.full((N_CLASSES,), 1/N_CLASSES)
    def __call__(self, out, y):
        losses = F.cross_entropy(out, 0.6*F.one_hot(y, N_CLASSES) + 0.4*self.means, reduction=self.reduction)
        self.means.lerp_(out.detach().softmax(1).mean(0), 0.5)
        self.calls += 1
        return losses

class RandomLoss(nn.Module):
    "For training batches another one in each call."
    def __init__(self, draw): super().__init__(); self.reduction,self.draw = 'mean',draw
    def forward(self, out, y):
        if len(out) == BATCH: return self.draw(out, y, self.reduction)
        return F.cross_entropy(out, y, reduction=self.reduction)

def dropped_logits(out, y, reduction): return F.cross_entropy(F.dropout(out, 0.4), y, reduction=reduction)
def random_smoothing(out, y, reduction): return F.cross_entropy(out, y, reduction=reduction, label_smoothing=0.9*torch.rand(()).item())

def reduced(losses, reduction): return losses if reduction == 'none' else losses.mean()
def by_the_largest(out, y, reduction='mean'):
    losses = F.cross_entropy(out, y, reduction='none')
    return reduced(losses/losses.detach().max(), reduction)
def contrastive(out, y, reduction='mean'):
    similar = F.normalize(out) @ F.normalize(out).t()
    pairs = F.cross_entropy(similar/0.2, torch.arange(len(out)), reduction='none')
    return reduced(F.cross_entropy(out, y, reduction='none') + pairs, reduction)

def mlp(): return nn.Sequential(lin(), nn.Tanh(), head())

RANDOM = {'dropout of logits': lambda: RandomLoss(dropped_logits), 'random label smoothing': lambda: RandomLoss(random_smoothing)}
LOSSES = {'a running centre': CentreLoss, 'running targets': RunningTargets} | RANDOM
COUPLING = {'by the largest': by_the_largest, 'contrastive': contrastive}

@engines
@each(LOSSES)
def test_a_loss_with_a_state_or_with_randomness(name, engine):
    "A loss is weighed and trained on as the Learner's own call finds it, with the same state and the same draw."
    check(mlp, loss_func=LOSSES[name], engine=engine)

@engines
@each(LOSSES)
def test_a_loss_is_called_as_if_there_were_no_callback(name, engine, equal_weights):
    "With equal weights a fit gives the same parameters and the same state of the loss, with as many updates, as plain training."
    def trained(**kwargs):
        learn = fit(mlp, loss_func=LOSSES[name], **kwargs)
        loss = learn.loss_func
        remembered = [getattr(loss, k) for k in ('centre', 'means') if hasattr(loss, k)]
        return getattr(loss, 'calls', None),[*learn.model.state_dict().values(), *remembered]
    (plain_calls,plain),(calls,weighed) = trained(weigh=False),trained(engine=engine)
    assert calls == plain_calls
    assert_same(weighed, plain)

@engines
@each(COUPLING)
def test_a_loss_in_which_examples_meet(name, engine):
    "The loss of an example that depends on others is weighed by all that it depends on."
    check(mlp, loss_func=lambda: COUPLING[name], engine=engine)

@each(COUPLING)
def test_skip_zeros_refuses_a_loss_in_which_examples_meet(name):
    "No example can be left out of a loss in which it changes that of others."
    with pytest.raises(ValueError, match='skip_zeros'): fit(mlp, loss_func=lambda: COUPLING[name], skip_zeros=True)

SINGLE = {'a function': lambda: F.cross_entropy, 'a module': nn.CrossEntropyLoss} | RANDOM

@each(SINGLE)
def test_skip_zeros_takes_a_loss_of_single_examples(name):
    "A loss without a say of other examples is not refused, be it random."
    fit(mlp, loss_func=SINGLE[name], skip_zeros=True)

# ---- A10: other callbacks

log_prior = torch.tensor([2., 0., -2.])
def adjusted(pred): return pred + log_prior
def doubled(pred): return pred*2

class ChangePred(Callback):
    order,run_valid = 10,False
    def __init__(self, change): self.change = change
    def after_pred(self): self.learn.pred = self.change(self.pred)

class LateInputs(Callback):
    order,run_valid = 70,False
    def before_batch(self): self.learn.xb = (self.xb[0].flip(1) + 0.3,)

class LateTargets(Callback):
    order,run_valid = 70,False
    def before_batch(self): self.learn.yb = ((self.yb[0] + 1) % N_CLASSES,)

@engines
@each(['adjusted', 'doubled'])
def test_a_callback_that_changes_the_output(name, engine):
    "Examples are weighed by the loss of what other callbacks make of the output; trusted batches are not passed to these."
    change = dict(adjusted=adjusted, doubled=doubled)[name]
    check(mlp, cbs=[ChangePred(change)], change=change, engine=engine)

@engines
@pytest.mark.parametrize('late', [LateInputs, LateTargets])
def test_a_callback_that_changes_the_batch_late(late, engine):
    "Examples are weighed as the model and the loss get them, however late other callbacks change them."
    check(mlp, cbs=[late()], engine=engine)

# ---- A11: skip_zeros

def centred(m, x):
    h = m.a(x).tanh()
    return m.b(h - h.mean(0))

@pytest.mark.parametrize('trusted', [1, 2, TRUSTED])
def test_skip_zeros_refuses_examples_that_meet_in_a_layer(trusted):
    "A layer that couples examples is noticed, also if the trusted batch has one item, which could not tell."
    with pytest.raises(ValueError, match='skip_zeros'): fit(lambda: Own(centred, a=lin(), b=head()), trusted=trusted, skip_zeros=True)

def test_skip_zeros_with_a_trusted_batch_of_one_item():
    "A model in which no example acts on another is not refused."
    fit(mlp, trusted=1, skip_zeros=True)

# ---- B1: every option where the Learner's pass can't be followed

def cubed(m, x): return m.b(Cube.apply(m.a(x)))
def recomputed(m, x): return m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False))
def distances(m, x): return m.b(-torch.cdist(m.a(x), m.c))
def easy(m, x): return m.b(m.a(x).tanh())
def head_only(model): return model.b.parameters()

HARD = {'a function of its own': cubed, 'checkpoint': recomputed, 'cdist': distances}
def hard(name): return Own(HARD.get(name, easy), a=lin(), b=head(), c=param(8, 8))

OPTIONS = {'none': {}, 'relative': dict(relative=True), 'margin': dict(margin=1.),
    'skip_zeros': dict(skip_zeros=True), 'every': dict(every=2), 'lookahead': dict(lookahead='opt'), 'params': dict(params=weights_only),
    'params of the head': dict(params=head_only), 'relative and margin': dict(relative=True, margin=1.)}

class Seen(Callback):
    "Looks at the weights of every step."
    order,run_valid = 90,False
    def before_fit(self): self.weights = []
    def after_loss(self):
        w,_ = shown(self.learn.meta_reweight)
        assert w.shape == (BATCH,) and w.isfinite().all() and (w >= 0).all() and min(abs(w.sum() - 1), abs(w.sum())) < 1e-3
        self.weights.append(w)

def assert_runs(learn):
    "Two epochs; gives the weights of each step."
    seen = Seen()
    learn.fit(2, 0.05, cbs=seen)
    assert len(seen.weights) == 2*len(learn.dls.train) and all(p.isfinite().all() for p in learn.model.parameters())
    assert sum(len(w.unique()) > 1 for w in seen.weights) > len(learn.dls.train)
    return torch.stack(seen.weights)

@pytest.fixture
def autocast():
    "The Learner's pass in bfloat16, until the test is over, however it ends."
    callback = CpuAutocast()
    yield callback
    if torch.is_autocast_enabled('cpu'): callback.autocast.__exit__(None, None, None)

def hard_learner(name, *cbs, dls=None, path=None, **options):
    dls = make_dls(5, fastai_loaders=True) if dls is None else dls
    return make_learner(lambda: hard(name), [MetaReweightCallback(**options), *cbs], dls, path=path)

options = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)

@each(HARD)
@options
def test_every_option_where_the_pass_is_not_followed(name, options):
    "Two epochs run, with weights that are finite and sum to one or zero."
    assert_runs(hard_learner(name, **options))

@options
def test_every_option_in_mixed_precision(options, autocast):
    "Two epochs run, with weights that are finite and sum to one or zero."
    assert_runs(hard_learner('easy', autocast, **options))

@each(['easy', *HARD])
@pytest.mark.parametrize('engine', ['forward', 'reverse'])
@pytest.mark.parametrize('options', [OPTIONS['relative'], OPTIONS['margin']], ids=['relative', 'margin'])
def test_options_with_every_engine(name, engine, options):
    "The weights are the same by every engine that does not refuse."
    try: weights = assert_runs(hard_learner(name, engine=engine, **options))
    except NotImplementedError as e: assert f"engine='{engine}'" in str(e)
    else: torch.testing.assert_close(assert_runs(hard_learner(name, **options)), weights, rtol=2e-3, atol=2e-4)

@options
def test_every_option_after_export(options, tmp_path):
    "An exported Learner that is loaded, and given its data again, trains on with all options."
    dls = make_dls(5, fastai_loaders=True)
    learn = hard_learner('a function of its own', dls=dls, path=tmp_path, meta_dl=dls.loaders[2], **options)
    assert_runs(learn)
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    loaded.remove_cbs(ProgressCallback)
    loaded.dls,loaded.meta_reweight.meta_dl = dls,dls.loaders[2]
    assert_runs(loaded)

# ---- B4: kinds of parameters and of layers

def words(x): return (x[:, :6]*2).long().abs().clamp(max=8)
def bag(m, x): return m.b(m.emb(words(x)).tanh())
def weighted_bag(m, x): return m.b(m.emb(words(x), per_sample_weights=x[:, 6:12]).tanh())
def sparse(m, x): return m.b(m.emb(words(x)).sum(1).tanh())
def only_sparse(m, x): return m.emb(words(x)).sum(1)
def complex_layer(m, x): return m.b((x.to(torch.cfloat) @ m.w).abs())
def complex_output(m, x): return torch.view_as_real(x.to(torch.cfloat) @ m.w).flatten(1) @ m.c

def complex_param(*shape): return nn.Parameter(torch.randn(shape, dtype=torch.cfloat)/5)

def torch_sgd(params, lr): return OptimWrapper(params, torch.optim.SGD, lr=lr)
def sparse_adam(params, lr): return OptimWrapper(params, torch.optim.SparseAdam, lr=lr)

KINDS = {
    'EmbeddingBag, mean': (lambda: Own(bag, emb=nn.EmbeddingBag(9, 8, mode='mean'), b=head()), {}),
    'EmbeddingBag, sum': (lambda: Own(bag, emb=nn.EmbeddingBag(9, 8, mode='sum'), b=head()), {}),
    'EmbeddingBag, weighted': (lambda: Own(weighted_bag, emb=nn.EmbeddingBag(9, 8, mode='sum'), b=head()), {}),
    'EmbeddingBag, sparse': (lambda: Own(bag, emb=nn.EmbeddingBag(9, 8, mode='sum', sparse=True), b=head()), dict(opt_func=torch_sgd)),
    'sparse Embedding, SGD': (lambda: Own(sparse, emb=nn.Embedding(9, 8, sparse=True), b=head()), dict(opt_func=torch_sgd)),
    'sparse Embedding, SparseAdam': (lambda: Own(only_sparse, emb=nn.Embedding(9, N_CLASSES, sparse=True)), dict(opt_func=sparse_adam)),
    'complex parameters': (lambda: Own(complex_layer, w=complex_param(24, 8), b=head()), {}),
    'complex features': (lambda: Own(complex_output, w=complex_param(24, 2), c=param(4, N_CLASSES)), {}),
}

@engines
@each(KINDS)
def test_kinds_of_parameters_and_layers(name, engine):
    "By default every kind of parameter and layer that trains without the callback is weighed right."
    make_model,options = KINDS[name]
    check(make_model, engine=engine, **options)

def test_no_engine_is_advised_that_refuses_too():
    "Where both engines refuse, neither error sends the user to the other one."
    said = {}
    for engine in ('forward', 'reverse'):
        try: fit(KINDS['EmbeddingBag, mean'][0], engine=engine)
        except NotImplementedError as e: said[engine] = str(e)
    if len(said) == 2: assert "engine='reverse'" not in said['forward'] and "engine='forward'" not in said['reverse']

def compiled(model): return torch.compile(model, backend='aot_eager')
def compiled_in_place(model): model.compile(backend='aot_eager'); return model

@engines
@pytest.mark.parametrize('how', [compiled, compiled_in_place])
def test_a_compiled_model(how, engine):
    "A compiled model is weighed right."
    torch._dynamo.reset()
    check(mlp, engine=engine, factory=True, wrap=how)
