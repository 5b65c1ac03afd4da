"The other schemes: their weights against formulas, Meta-Weight-Net against autograd through its step."
from copy import deepcopy
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CategoryBlock, DataBlock, DataLoaders, Learner, SGD, TrainEvalCallback, noop, set_seed
from fastai.callback.all import GradientClip, MixUp
from fastai.callback.data import WeightedDL
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.tabular.all import Categorify, TabularDataLoaders, TabWeightedDL, tabular_learner
from fastai.text.all import BaseTokenizer, ColReader, TextBlock
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastai_l2rw.all import *
from conftest import cnn, labels, make_dls, tensors, train

# ---- Meta-Weight-Net

def per_item(out, y): return F.cross_entropy(out, y, reduction='none')

class Literal(Callback):
    "The step of the weight net by autograd through the look-ahead, as in the paper."
    order,run_valid = MetaReweightCallback.order - 1,False
    def before_fit(self): self.compared = 0
    def before_batch(self):
        cb = self.learn.meta_weight_net
        cb.net.double()
        self.net = deepcopy(cb.net)
        self.net_opt = torch.optim.AdamW(self.net.parameters(), lr=cb.net_lr, weight_decay=cb.net_wd)
        self.net_opt.load_state_dict(deepcopy(cb._net_opt.state_dict()))
        self.params = {k: p.detach().clone() for k,p in self.model.named_parameters()}
        self.rates = {k: h['lr'] for ps,h in zip(self.opt.param_lists, self.opt.hypers) for p in ps for k,q in self.model.named_parameters() if p is q}
    def after_pred(self):
        cb = self.learn.meta_weight_net
        def weights(losses):
            v = self.net(losses.detach()[:, None])[:, 0]
            return v/v.sum() if cb.normalised else v/len(v)
        leaves = {k: p.requires_grad_() for k,p in self.params.items()}
        losses = per_item(functional_call(self.model, leaves, tuple(self.xb)), *self.yb)
        gradient = torch.autograd.grad((weights(losses)*losses).sum(), list(leaves.values()), create_graph=True)
        ahead = {k: p - self.rates[k]*g for (k,p),g in zip(leaves.items(), gradient)}
        (xm,),(ym,) = cb._meta_batch
        self.net_opt.zero_grad()
        per_item(functional_call(self.model, ahead, xm), ym).mean().backward(inputs=list(self.net.parameters()))
        self.net_opt.step()
        for a,b in zip(cb.net.parameters(), self.net.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(cb._example_weights, weights(losses), rtol=1e-6, atol=1e-9)
        self.compared += 1

@pytest.mark.parametrize('normalised', [True, False])
@pytest.mark.parametrize('engine', ['forward', 'reverse'])
@pytest.mark.parametrize('lookahead', ['sgd', 'opt'])
def test_meta_weight_net_equals_the_paper(tmp_path, normalised, engine, lookahead):
    set_seed(0)
    x,y = torch.randn(24, 6, dtype=torch.float64),torch.arange(24) % 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    learn = Learner(DataLoaders(*[tensors(x, y) for _ in range(3)]), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, path=tmp_path, default_cbs=False,
        splitter=lambda m: [list(m[0].parameters()), list(m[2].parameters())],
        cbs=[TrainEvalCallback(), MetaWeightNetCallback(normalised=normalised, engine=engine, lookahead=lookahead, hidden=7, net_lr=0.01), literal := Literal()])
    learn.fit(3, slice(0.01, 0.1))
    assert literal.compared == 9

def test_meta_weight_net_leaves_the_random_stream(make_learner):
    learn = make_learner(MetaWeightNetCallback())
    plain = make_learner()
    plain.fit(1)
    expected = torch.get_rng_state()
    learn = make_learner(MetaWeightNetCallback())
    learn.fit(1)
    assert torch.equal(torch.get_rng_state(), expected)

def test_meta_weight_net_in_a_learner(make_learner, tmp_path):
    cb = MetaWeightNetCallback(hidden=5)
    with pytest.raises(ValueError, match='there is no weight net yet'): cb.weight_of(torch.ones(2))
    learn = make_learner([cb, GradientClip(1.), MixUp()])
    learn.fit(1)
    assert learn.recorder.metric_names[-4:-1] == ['meta_loss', 'zero_weights', 'ess'] and ((cb.weight_of(torch.rand(9)*9) - 0.5).abs() <= 0.5).all()
    before = deepcopy(cb.net.state_dict())
    learn.fit(1)
    assert not all(torch.equal(a, b) for a,b in zip(before.values(), cb.net.state_dict().values())), 'the net learns on'
    assert learn.meta_weight_net.item_weights().steps.sum() == 16*len(learn.dls.train)
    learn.export()
    with pytest.raises(ValueError, match='has a MetaReweightCallback already'): learn.add_cb(MetaReweightCallback())

def test_a_saved_weight_net_of_another_size(make_learner):
    learn = make_learner(MetaWeightNetCallback(hidden=5))
    learn.fit(1)
    learn.save('five')
    other = make_learner(MetaWeightNetCallback(hidden=6)).load('five')
    with pytest.raises(ValueError, match='hidden=6, but the weight net that was saved with the optimizer has 5 hidden units'): other.fit(1)

@pytest.mark.parametrize('hidden', [0, 2.5])
def test_bad_arguments(hidden):
    with pytest.raises(ValueError, match=f'hidden={hidden} must be a whole number, 1 or more'): MetaWeightNetCallback(hidden=hidden)

# ---- weights of classes

def test_class_weights():
    y = [0]*50 + [1]*7 + [2]*3
    torch.testing.assert_close(class_weights([50, 7, 3]), torch.tensor(compute_class_weight('balanced', classes=np.arange(3), y=y)).float())
    for beta in (0.9, 0.999, 0.999999):
        expected = np.array([(1 - beta)/(1 - beta**n) for n in (50, 7, 3)]) # Cui et al. 2019, eq. 2, up to a factor
        torch.testing.assert_close(class_weights([50, 7, 3], beta), torch.tensor(expected * 60/(expected*[50, 7, 3]).sum()).float(), rtol=1e-4, atol=1e-5)
    assert class_weights([50, 0]).tolist() == [1, 1]

def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(a=rng.choice(list('xyz'), 60), b=rng.normal(size=60), text=['a b c d'[:1 + i % 7] for i in range(60)], y=['no']*50 + ['yes']*10)).sample(frac=1, random_state=0)

def tabular(): return TabularDataLoaders.from_df(table(), procs=[Categorify], cat_names=['a'], cont_names=['b'], y_names='y', bs=16, valid_idx=range(10), drop_last=False)
def text():
    block = TextBlock.from_df('text', tok=BaseTokenizer(), n_workers=0, min_freq=1)
    return DataBlock((block, CategoryBlock), get_x=ColReader('text'), get_y=ColReader('y')).dataloaders(table(), bs=16)

@pytest.mark.parametrize('make', [make_dls, tabular, text])
def test_counts_and_sampler(make):
    set_seed(0)
    dls = make()
    counts = class_counts(dls)
    ys = torch.cat([b[-1].flatten() for b in dls.train.new(shuffle=False, drop_last=False)])
    assert counts.tolist() == ys.bincount(minlength=len(counts)).tolist()
    before = type(dls.train)
    sampled = weighted_sampler(dls)
    assert isinstance(sampled.train, (WeightedDL, TabWeightedDL)) and type(dls.train) is before and sampled.valid is dls.valid
    drawn = torch.cat([b[-1].flatten() for _ in range(30) for b in sampled.train]).bincount(minlength=len(counts))
    assert drawn.max() < 1.4*drawn.min(), drawn

def test_what_has_no_single_label():
    dls = DataLoaders(tensors(torch.randn(16, 3), torch.randn(16, 2)), tensors(torch.randn(16, 3), torch.randn(16, 2)))
    with pytest.raises(ValueError): class_counts(dls)
    with pytest.raises(TypeError, match='dls.train is a DataLoader, but must be a loader of fastai'): weighted_sampler(dls)

# ---- one line to switch

@pytest.mark.parametrize('scheme', weighting_schemes)
def test_every_scheme_trains(scheme, tmp_path):
    set_seed(0)
    dls = make_dls()
    learn = Learner(model=cnn(), path=tmp_path, **weighting_scheme(scheme, dls))
    learn.logger = noop
    with learn.no_bar(): learn.fit(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_what_a_scheme_gives():
    dls = make_dls()
    y = labels[train]
    weight = lambda name, **kw: weighting_scheme(name, dls, **kw)['loss_func'].func.weight
    torch.testing.assert_close(weight('inverse frequency'), torch.tensor(compute_class_weight('balanced', classes=np.arange(4), y=y)).float())
    torch.testing.assert_close(weight('effective number', beta=0.9), class_weights(np.bincount(y), 0.9))
    torch.testing.assert_close(weight('effective number'), class_weights(np.bincount(y), 0.999))
    assert isinstance(weighting_scheme('focal', dls, gamma=1.)['loss_func'], FocalLossFlat) and weighting_scheme('focal', dls, gamma=1.)['loss_func'].func.gamma == 1
    loader = [(torch.zeros(4, 1, 8, 8), torch.arange(4))]
    for name,cls in (('reweighted', MetaReweightCallback), ('meta-weight-net', MetaWeightNetCallback)):
        cb, = weighting_scheme(name, dls, loader, start=2)['cbs']
        assert type(cb) is cls and cb.meta_dl is loader and cb.start == 2
    assert weighting_scheme('unweighted', dls) | dict(loss_func=None) == dict(dls=dls, loss_func=None, cbs=[])
