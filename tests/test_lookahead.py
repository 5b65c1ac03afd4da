"Looking ahead along the optimizer's own step, against formulas and against finite differences."
import math
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai import optimizer as fo
from fastai.basics import Callback, DataLoaders, Learner, TrainEvalCallback, set_seed
from fastai.callback.all import GradientAccumulation, ParamScheduler, SchedLin
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastai_l2rw.engines.routes import Engine
from fastai_l2rw.fit import Fit
from fastai_l2rw.all import *
from fastai_l2rw.reweight import normalise, rectify
from fastai_l2rw.lookahead import virtual_step
from conftest import Seen, tensors

def torch_opt(name, **kwargs): return partial(OptimWrapper, opt=getattr(torch.optim, name), **kwargs)

OPTIMIZERS = {
    'SGD': fo.SGD, 'SGD, decay': partial(fo.SGD, wd=0.1), 'SGD, momentum': partial(fo.SGD, mom=0.9, wd=0.1), 'SGD, momentum, L2': partial(fo.SGD, mom=0.9, wd=0.1, decouple_wd=False),
    'RMSProp': fo.RMSProp, 'RMSProp, momentum': partial(fo.RMSProp, mom=0.9), 'Adam': fo.Adam, 'Adam, L2': partial(fo.Adam, decouple_wd=False), 'RAdam': fo.RAdam,
    'RAdam, softplus': partial(fo.RAdam, beta=50.), 'QHAdam': fo.QHAdam, 'LARC': partial(fo.Larc, trust_coeff=1e-3), 'LARS': partial(fo.Larc, clip=False, wd=0.1), 'LAMB': fo.Lamb, 'ranger': fo.ranger, 'ranger, k': partial(fo.ranger, k=2),
    'torch.SGD': torch_opt('SGD', momentum=0.9, nesterov=True, weight_decay=0.1), 'torch.Adam': torch_opt('Adam'), 'torch.Adam, amsgrad': torch_opt('Adam', amsgrad=True),
    'torch.Adam, fused': torch_opt('Adam', fused=True), 'torch.Adam, foreach': torch_opt('Adam', foreach=True), 'torch.AdamW': torch_opt('AdamW'), 'torch.NAdam': torch_opt('NAdam'),
    'torch.RAdam': torch_opt('RAdam'), 'torch.RMSprop': torch_opt('RMSprop', momentum=0.9, centered=True), 'torch.Adagrad': torch_opt('Adagrad'), 'torch.Adadelta': torch_opt('Adadelta'),
    'torch.Adamax': torch_opt('Adamax'), 'torch.ASGD': torch_opt('ASGD'),
}

def stepped(opt, params, gradient):
    "The parameters after a step of a copy of the optimizer, with a given gradient."
    memo,copies = {},{}
    for k,p in params.items():
        copies[k] = memo[id(p)] = p.detach().clone()
        copies[k].grad = gradient[k].clone()
    deepcopy(opt, memo).step()
    return {k: p.detach() for k,p in copies.items()}

@pytest.mark.parametrize('steps', [0, 1, 7])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_derivative_of_a_step(name, steps):
    "Against finite differences of the optimizer itself, in float64."
    if (name, steps) == ('LAMB', 0): pytest.skip('the first step has no derivative: its length jumps from 1 to 10 times where the gradient is not zero')
    set_seed(0)
    model = nn.Linear(3, 2).double()
    params = dict(model.named_parameters())
    opt = OPTIMIZERS[name]([list(model.parameters())], lr=0.01)
    for _ in range(steps):
        for p in params.values(): p.grad = torch.randn_like(p)
        opt.step()
    opt.zero_grad()
    direction,gradient = [{k: torch.randn_like(p) for k,p in params.items()} for _ in range(2)]
    before = deepcopy(opt.state_dict()),deepcopy(model.state_dict())
    at,pull_back = virtual_step(opt, params)
    got = sum((pull_back(gradient)[k]*direction[k]).sum() for k in params)
    def step(h): return stepped(opt, params, {k: h*v for k,v in direction.items()})
    def difference(h): return -sum((gradient[k]*(step(h)[k] - step(-h)[k])/(2*h)).sum() for k in params)
    # with an empty state, the slope of a step changes over a gradient as small as Adam's eps
    errors = [abs(got/difference(h) - 1) for h in ((1e-7, 1e-10, 1e-13) if steps == 0 else (1e-7,))]
    assert min(errors) < 2e-3, (got, errors)
    still = step(0.)
    for k in params: torch.testing.assert_close(at[k], still[k], rtol=1e-5, atol=1e-6) # PyTorch's counts of steps are float32
    assert repr(before) == repr((opt.state_dict(), model.state_dict())), 'the optimizer and the model are as they were'

# ---- in a fit, against the step written out as a formula and differentiated with respect to the example weights

def wd(s, h): return h['wd'] if s.get('do_wd', True) else 0. # fastai has none on biases
def debiased(avg, mom, step): return avg/(1 - mom**step)

def sgd(p, g, s, h): return p*(1 - h['lr']*wd(s, h)) - h['lr']*g
def momentum(p, g, s, h): return p*(1 - h['lr']*wd(s, h)) - h['lr']*(h['mom']*s.get('grad_avg', 0) + g)
def adam(p, g, s, h):
    step = s.get('step', 0) + 1
    m,v = h['mom']*s.get('grad_avg', 0*p) + (1 - h['mom'])*g, h['sqr_mom']*s.get('sqr_avg', 0*p)
    return p*(1 - h['lr']*wd(s, h)) - h['lr'] * debiased(m, h['mom'], step) / (debiased(v, h['sqr_mom'], step).sqrt() + h['eps'])
def rms(p, g, s, h): return p*(1 - h['lr']*wd(s, h)) - h['lr']*g/((h['sqr_mom']*s.get('sqr_avg', 0*p)).sqrt() + h['eps'])
def radam(p, g, s, h):
    step,b = s.get('step', 0) + 1,h['sqr_mom']
    m = debiased(h['mom']*s.get('grad_avg', 0*p) + (1 - h['mom'])*g, h['mom'], step)
    r_inf = 2/(1 - b) - 1
    r = r_inf - 2*step*b**step/(1 - b**step)
    p = p*(1 - h['lr']*wd(s, h))
    if r <= 5: return p - h['lr']*m
    return p - h['lr'] * math.sqrt((r - 4)*(r - 2)*r_inf/((r_inf - 4)*(r_inf - 2)*r)) * m / (debiased(b*s['sqr_avg'], b, step).sqrt() + h['eps'])
def torch_adamw(p, g, s, h):
    step = s.get('step', torch.tensor(0.)).double() + 1
    m = h['mom']*s.get('exp_avg', 0*p) + (1 - h['mom'])*g
    return p*(1 - h['lr']*wd(s, h)) - h['lr']*debiased(m, h['mom'], step)/(debiased(h['sqr_mom']*s.get('exp_avg_sq', 0*p), h['sqr_mom'], step).sqrt() + h['eps'])
def torch_nesterov(p, g, s, h):
    g = g + wd(s, h)*p
    buffer = g if 'momentum_buffer' not in s else h['mom']*s['momentum_buffer'] + g
    return p - h['lr']*(g + h['mom']*buffer)
# the square of the example weights' gradient has no slope where they are zero, so it is left out above

STEPS = {
    'SGD': (partial(fo.SGD, wd=0.1), sgd), 'SGD, momentum': (partial(fo.SGD, mom=0.9, wd=0.1), momentum), 'AdamW': (partial(fo.Adam, wd=0.1), adam),
    'RMSProp': (partial(fo.RMSProp, wd=0.1), rms), 'RAdam': (partial(fo.RAdam, wd=0.1), radam),
    'torch.AdamW': (torch_opt('AdamW'), torch_adamw), 'torch.SGD, Nesterov': (torch_opt('SGD', momentum=0.9, nesterov=True, weight_decay=0.1), torch_nesterov),
}

def per_item(out, y): return F.cross_entropy(out, y, reduction='none')

class Literal(Callback):
    "Computes the weights of each step by differentiating through the optimizer's step, written as a formula."
    order,run_valid = 10001,False
    def __init__(self, formula): self.formula = formula
    def before_fit(self): self.compared = self.differs = 0
    def before_batch(self):
        cb = self.learn.meta_reweight
        hypers = {p: h for ps,h in zip(self.opt.param_lists, self.opt.hypers) for p in ps}
        state = getattr(self.opt, 'opt', self.opt).state
        params = {k: p for k,p in self.model.named_parameters() if p.requires_grad}
        leaves = {k: p.detach().clone().requires_grad_() for k,p in params.items()}
        losses = per_item(functional_call(self.model, leaves, tuple(self.xb)), *self.yb)
        epsilon = torch.zeros_like(losses, requires_grad=True)
        gradient = torch.autograd.grad((epsilon*losses).sum(), list(leaves.values()), create_graph=True)
        ahead = {k: self.formula(leaves[k].detach(), g, state.get(p, {}), hypers[p]) for (k,p),g in zip(params.items(), gradient)}
        (xm,),(ym,) = cb.step.meta_batch
        u = -torch.autograd.grad(per_item(functional_call(self.model, ahead, xm), ym).mean(), epsilon)[0]
        self.plain = example_weights(self.model, per_item, (self.xb, self.yb), cb.step.meta_batch, list(params), {k: hypers[p]['lr'] for k,p in params.items()})
        self.expected = normalise(rectify(u))
    def after_loss(self):
        got = self.learn.meta_reweight.step.weights
        torch.testing.assert_close(got, self.expected, rtol=1e-4, atol=1e-6)
        self.compared += 1
        self.differs += not torch.allclose(got, self.plain, rtol=1e-3, atol=1e-6)

def learner(opt_func, path, cbs=(), frozen=False):
    set_seed(0)
    x,y = torch.randn(24, 6, dtype=torch.float64),torch.arange(24) % 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    dls = DataLoaders(*[tensors(x, y) for _ in range(3)])
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, splitter=lambda m: [list(m[:2].parameters()), list(m[2:4].parameters()), list(m[4].parameters())],
        default_cbs=False, cbs=[TrainEvalCallback(), *cbs], path=path)

@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('name', STEPS)
def test_weights_in_a_fit(name, frozen, tmp_path):
    opt_func,formula = STEPS[name]
    learn = learner(opt_func, tmp_path, [MetaReweightCallback(lookahead='opt'), literal := Literal(formula)])
    learn.create_opt()
    if frozen: learn.freeze_to(1)
    learn.fit(3, slice(1e-3, 1e-1))
    assert literal.compared == 9
    if name not in ('SGD', 'RAdam'): assert literal.differs # the option does something

def test_sgd_is_the_default_and_the_same_for_plain_sgd(tmp_path):
    def weights(**kwargs):
        learn = learner(fo.SGD, tmp_path, [MetaReweightCallback(**kwargs), seen := Seen()])
        learn.fit(2, 0.1)
        return torch.cat([o.weights for o in seen.steps])
    torch.testing.assert_close(weights(lookahead='opt'), weights(), rtol=1e-6, atol=1e-9)

def test_every_pulls_an_old_gradient_back_through_the_new_state(tmp_path, monkeypatch):
    gradients,directions = [],[]
    original,aligned = Fit.meta_gradient_at,Engine.before_pass
    monkeypatch.setattr(Fit, 'meta_gradient_at', lambda *args: (gradients.append(original(*args)), gradients[-1])[1])
    monkeypatch.setattr(Engine, 'before_pass', lambda e, m, p, b, v, *more, **kw: (directions.append(v), aligned(e, m, p, b, v, *more, **kw))[1])
    learn = learner(fo.Adam, tmp_path, [_cb := MetaReweightCallback(lookahead='opt', every=2, engine='forward')])
    pulled = []
    def expect(self): pulled.append(virtual_step(self.opt, dict(self.model.named_parameters()))[1](gradients[(self.iter + 1)//2 + 2*self.epoch - (self.iter == 1)]))
    learn.add_cb(Callback(before_batch=lambda self: expect(self) if self.training else None))
    learn.cbs[-1].order = 10001
    learn.fit(2, 0.01)
    assert len(gradients) == 4 and len(directions) == 6, 'three steps per epoch, the third with a new gradient'
    for v,w in zip(directions, pulled, strict=True):
        for k in v: torch.testing.assert_close(v[k], w[k])

@pytest.mark.parametrize('opt_func', [partial(fo.Adam, eps=1e-3), partial(fo.SGD, mom=0.9), torch_opt('AdamW', eps=1e-3), fo.ranger])
def test_with_gradient_accumulation(tmp_path, opt_func):
    "The step that is looked ahead along has what has been gathered by then."
    class Compare(Callback):
        order,run_valid = 10001,False
        def before_batch(self):
            cb = self.learn.meta_reweight
            params = dict(self.model.named_parameters())
            gathered = {k: torch.zeros_like(p) if p.grad is None else p.grad for k,p in params.items()}
            self.learn.with_gradient += any(g.any() for g in gathered.values())
            (xm,),(ym,) = cb.step.meta_batch
            def meta_loss(i, h): # along the gradient of item i
                g = torch.autograd.grad(per_item(self.model(*self.xb), *self.yb)[i], list(params.values()))
                ahead = stepped(self.opt, params, {k: gathered[k] + h*o for k,o in zip(params, g)})
                return per_item(functional_call(self.model, ahead, xm), ym).mean().detach()
            u = torch.stack([-(meta_loss(i, 1e-7) - meta_loss(i, -1e-7))/2e-7 for i in range(8)])
            self.expected = normalise(rectify(u))
        def after_loss(self): torch.testing.assert_close(self.learn.meta_reweight.step.weights, self.expected, rtol=2e-3, atol=1e-5)
    learn = learner(opt_func, tmp_path, [MetaReweightCallback(lookahead='opt'), GradientAccumulation(16), Compare()])
    learn.with_gradient = 0
    learn.fit(1, 0.01); learn.fit(1, 0.01)
    assert learn.with_gradient

def test_ranger_with_frozen_groups(tmp_path):
    "Its slow weights are of all parameters, also of those that are not looked ahead along."
    learn = learner(partial(fo.ranger, k=2), tmp_path, [MetaReweightCallback(lookahead='opt')])
    learn.create_opt()
    learn.freeze_to(1)
    before = learn.model[0].weight.clone()
    learn.fit(3, 0.01)
    assert torch.equal(learn.model[0].weight, before)

def test_parameters_of_another_model():
    model = nn.Linear(2, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match='params has weight, which is not a parameter of the optimizer'): virtual_step(opt, dict(nn.Linear(2, 2).named_parameters()))
    with pytest.raises(ValueError, match='params has no parameter'): virtual_step(opt, {})

def test_against_torchopt(tmp_path):
    "TorchOpt's differentiable Adam, taken through one step from the state that PyTorch's Adam has."
    torchopt = pytest.importorskip('torchopt')
    set_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x,y,xm,ym = torch.randn(16, 6).double(),torch.arange(16) % 3,torch.randn(9, 6).double(),torch.arange(9) % 3
    meta_model = deepcopy(model)
    theirs,ours = torchopt.MetaAdam(meta_model, lr=0.01),torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3): # the same steps for both
        ours.zero_grad()
        F.cross_entropy(model(x), y).backward()
        ours.step()
        theirs.step(F.cross_entropy(meta_model(x), y))
        torchopt.stop_gradient(meta_model)
        torchopt.stop_gradient(theirs)
    for a,b in zip(model.parameters(), meta_model.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    epsilon = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    theirs.step((epsilon*per_item(meta_model(x), y)).sum())
    u = -torch.autograd.grad(F.cross_entropy(meta_model(xm), ym), epsilon)[0]
    at,pull_back = virtual_step(ours, dict(model.named_parameters()))
    gradient,_ = meta_gradient(model, per_item, ((xm,), (ym,)), at)
    got = alignment(model, per_item, ((x,), (y,)), pull_back(gradient))
    torch.testing.assert_close(got, u, rtol=1e-4, atol=1e-9)

def test_a_subset_leaves_the_rest_where_it_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    before = deepcopy(model.state_dict())
    at,_ = virtual_step(opt, {k: p for k,p in model.named_parameters() if k.startswith('1')})
    assert list(at) == ['1.weight', '1.bias'] and (at['1.weight'] != model[1].weight).all()
    for k,p in model.state_dict().items(): assert torch.equal(p, before[k]), 'gradients that lie around move nothing'

class NoGrad(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']: p -= group['lr']*p.grad

@pytest.mark.parametrize('make,message', [(torch.optim.LBFGS, "the optimizer LBFGS can't be looked ahead along: it has no option `differentiable`.*lookahead='sgd'"),
    (torch.optim.Adafactor, "Adafactor can't be looked ahead along"), (torch.optim.Rprop, "Rprop can't.*the derivative of its step is zero everywhere.*lookahead='sgd'"),
    (NoGrad, "NoGrad can't.*its step has no derivative")])
def test_optimizers_without_a_derivative(make, message, tmp_path):
    if make is torch.optim.LBFGS:
        model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=message): virtual_step(make(model.parameters()), dict(model.named_parameters()))
        return
    learn = learner(partial(OptimWrapper, opt=make), tmp_path, [MetaReweightCallback(lookahead='opt')])
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=message): learn.fit(1)
    for k,p in learn.model.state_dict().items(): assert torch.equal(p, before[k])

def test_a_learning_rate_of_zero_is_no_fault(tmp_path):
    "As at the start of a warm-up: nothing can be learned in such a step, so all weights are zero."
    learn = learner(fo.Adam, tmp_path, [MetaReweightCallback(lookahead='opt'), seen := Seen(), ParamScheduler({'lr': SchedLin(0., 0.1)})])
    learn.fit(2)
    weights = [o.weights for o in seen.steps]
    assert not weights[0].any() and all(w.any() for w in weights[1:])
    learn.fit(1, lr=0.)
