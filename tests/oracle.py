"""What the weights of each step of a fit should be, by one ordinary backward pass per example on a copy of the model.

It is slow, takes any model, and has nothing of the package in it, neither its passes nor its choice of kernels. The trusted pass has a
random stream of its own in the package, so a model or a loss with randomness must have none for batches of the trusted size."""
import random
from copy import deepcopy

import numpy as np, torch
from fastai.basics import Callback, DataLoaders, Datasets, Learner, SGD, TfmdDL, noop, set_seed
from fastai.callback.all import ProgressCallback
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset

from fastai_l2rw.all import MetaReweightCallback

N_FEATURES,N_CLASSES,BATCH,TRUSTED = 24,3,8,6 # two sizes of batches, so that a layer can tell a trusted batch
MARKED = 7,12 # batches of an epoch of 20 in which a model does something rare: not among the first ones, nor where the callback compares

def shown(cb):
    "The weights of the step at hand, and the trusted batch that they come from."
    return cb.step.weights,cb.step.meta_batch

# ---- random streams

def streams(): return torch.get_rng_state(),random.getstate(),np.random.get_state()

def wind(states):
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])

# ---- the oracle

def item_losses(loss_func, output, *targets):
    "One loss per item, from a module or a function with `reduction`."
    if not hasattr(loss_func, 'reduction'): return loss_func(output, *targets, reduction='none')
    before,loss_func.reduction = loss_func.reduction,'none'
    try: return loss_func(output, *targets)
    finally: loss_func.reduction = before

def flat(p):
    "The gradient of a parameter as a real vector."
    g = torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
    return (torch.view_as_real(g) if g.is_complex() else g).detach().flatten()

def gradients(model, params, losses):
    "The gradient of each loss, as an optimizer would find it in `.grad`, where every hook has been at work."
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        yield [flat(p) for p in params]

def right_weights(make_copy, loss_func, chosen, rates, batch, meta_batch, change=noop):
    """The weights of a batch, and its losses.

    `make_copy()` gives the model as it is before the pass, `chosen(model)` the parameters to look ahead along, which have the learning
    rates `rates`; `change` is what other callbacks make of the output for `batch`."""
    def run(xb, yb, change):
        model,loss = make_copy(),deepcopy(loss_func)
        output = change(model(*(o.clone() for o in xb)))
        return model,chosen(model),item_losses(loss, output, *yb)
    model,params,losses = run(*batch, change) # first, where the random streams are those of the Learner's pass
    own = list(gradients(model, params, losses))
    model,params,meta_losses = run(*meta_batch, noop)
    meta, = gradients(model, params, [meta_losses.mean()])
    u = torch.stack([sum(rate*(a @ b) for rate,a,b in zip(rates, meta, g, strict=True)) for g in own])
    w = u.clamp(min=0)
    return (w/w.sum() if w.sum() > 0 else w),losses.detach()

class Check(Callback):
    "Compares the weights of each step, and the loss that is trained on, with what they should be; `errors` and `loss_errors` are relative."
    order,run_valid = 20000,False # nothing comes between this and the Learner's pass
    def __init__(self,
        make_model=None, # For models that can't be deep-copied, or lose their hooks by that
        params=None, # As the callback gets it
        change=noop, # What another callback makes of the output
    ): self.make_model,self.params,self.change = make_model,params,change

    def before_fit(self): self.errors,self.loss_errors,self.varied = [],[],0

    def copy(self, model):
        if self.make_model is None: return deepcopy(model)
        now,copy = streams(),self.make_model()
        wind(now) # the initial weights were drawn
        copy.load_state_dict(getattr(model, '_orig_mod', model).state_dict())
        return copy.train(model.training)

    def before_batch(self):
        self.before = streams()
        self.model_before,self.loss_before = self.copy(self.model),deepcopy(self.learn.loss_func)
        self.seen_xb = [o.clone() for o in self.xb]

    def after_pred(self): self.seen_yb = [o.clone() for o in self.yb]

    def moved(self):
        "Learning rates of the parameters that are looked ahead along, by their position."
        rates = {id(p): h['lr'] for ps,h in zip(self.opt.param_lists, self.opt.hypers) for p in ps}
        wanted = rates if self.params is None else {id(p) for p in self.params(self.model)}
        return {i: rates[id(p)] for i,p in enumerate(self.model.parameters()) if p.requires_grad and id(p) in rates and id(p) in wanted}

    def after_loss(self):
        (w,meta_batch),now,rates = shown(self.learn.meta_reweight),streams(),self.moved()
        def chosen(model): return [p for i,p in enumerate(model.parameters()) if i in rates]
        wind(self.before)
        try: right,losses = right_weights(lambda: self.copy(self.model_before), self.loss_before, chosen, rates.values(),
            (self.seen_xb, self.seen_yb), meta_batch, self.change)
        finally: wind(now)
        loss = (right*losses).sum() # for a loss function whose reduction is the mean
        self.errors.append(((w - right).norm()/right.norm().clamp(min=1e-6)).item())
        self.loss_errors.append(((self.loss_grad - loss).abs()/loss.abs().clamp(min=1e-2)).item())
        self.varied += len(right.unique()) > 1

# ---- small data and fits

def marked(x): return bool((x[:, 0] > 3).any())

def make_data(n_batches=20):
    "Normal features, and labels by a linear rule, a quarter of which are wrong; a large value marks some batches."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH*n_batches, N_FEATURES, generator=g).clamp(-2.5, 2.5)
    rule = torch.randn(N_FEATURES, N_CLASSES, generator=g)
    y,wrong = (x @ rule).argmax(1),torch.rand(len(x), generator=g) < 0.25
    y = torch.where(wrong, (y + 1) % N_CLASSES, y)
    x[[BATCH*i + 3 for i in MARKED if i < n_batches], 0] = 4.
    xm = torch.randn(4*TRUSTED, N_FEATURES, generator=g).clamp(-2.5, 2.5)
    return (x, y),(xm, (xm @ rule).argmax(1))

def features(item): return item['x']
def label(item): return item['y']

def make_dls(n_batches=20, trusted=TRUSTED, fastai_loaders=False):
    "Loaders of training, validation and trusted batches; those of fastai tell the items of a batch, and can be exported."
    train,meta = make_data(n_batches)
    parts = (train, BATCH),([t[:5] for t in train], 5),(meta, trusted)
    if not fastai_loaders: return DataLoaders(*[TorchLoader(TensorDataset(*o), bs, drop_last=True) for o,bs in parts])
    sets = [Datasets([dict(x=x, y=y) for x,y in zip(*o)], [[features], [label]]) for o,_ in parts]
    return DataLoaders(*[TfmdDL(s, bs=bs, drop_last=True, num_workers=0) for s,(_,bs) in zip(sets, parts)], device=torch.device('cpu'))

def make_learner(make_model, cbs=(), dls=None, loss_func=None, opt_func=SGD, wrap=noop, **kwargs):
    "A silent Learner; `wrap` is what is done to the model that `make_model` gives."
    dls = make_dls() if dls is None else dls
    set_seed(1)
    model,loss_func = wrap(make_model()),nn.CrossEntropyLoss() if loss_func is None else loss_func
    learn = Learner(dls, model, loss_func=loss_func, opt_func=opt_func, cbs=cbs, **kwargs)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def fit(make_model, steps=20, cbs=(), lr=0.1, weigh=True, trusted=TRUSTED, loss_func=None, opt_func=SGD, wrap=noop, **options):
    "A Learner after a fit of `steps` steps (20, or a multiple), with our callback and `options` for it if `weigh`."
    ours = [MetaReweightCallback(**options)] if weigh else []
    learn = make_learner(make_model, [*ours, *cbs], make_dls(20, trusted), loss_func and loss_func(), opt_func, wrap)
    set_seed(2)
    learn.fit(steps//20, lr)
    return learn

def check(make_model, steps=80, tolerance=2e-3, factory=False, change=noop, cbs=(), params=None, engine='auto', **kwargs):
    "Fit and compare each step with the oracle; an engine that was asked for may refuse and say so."
    oracle = Check(make_model if factory else None, params, change)
    try: learn = fit(make_model, steps, [oracle, *cbs], params=params, engine=engine, **kwargs)
    except (NotImplementedError, ValueError) as e:
        if engine == 'auto' or f"engine='{engine}'" not in str(e): raise
        return
    assert len(oracle.errors) == steps and oracle.varied > steps/2
    for what,errors in (('weights', oracle.errors), ('loss', oracle.loss_errors)):
        wrong = [i for i,e in enumerate(errors) if not e <= tolerance]
        assert not wrong, f'{what} wrong in {len(wrong)} of {steps} steps, by up to {max(errors):.2g}, in steps {wrong}'
    assert all(p.isfinite().all() for p in learn.model.parameters())
