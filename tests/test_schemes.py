"The other schemes: their weights against formulas, Meta-Weight-Net against autograd through its step."
import inspect, warnings
from copy import deepcopy

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import (Callback, CategoryBlock, DataBlock, DataLoaders, Learner, MultiCategoryBlock, RegressionBlock, SGD, TrainEvalCallback, TransformBlock, noop,
    set_seed)
from fastai.callback.all import GradientClip, MixUp
from fastai.callback.data import WeightedDL
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.tabular.all import Categorify, TabularDataLoaders, TabWeightedDL
from fastai.text.all import BaseTokenizer, ColReader, TextBlock
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastai_l2rw.all import *
from fastai_l2rw.schemes import class_counts, class_weights, register_scheme, scheme_registry, weighting_schemes
from conftest import cnn, labels, make_dls, tensors, train

# ---- Meta-Weight-Net

def per_item(out, y): return F.cross_entropy(out, y, reduction='none')

class Literal(Callback):
    "The step of the weight net by autograd through the look-ahead, as in the paper."
    order,run_valid = MetaReweightCallback.order - 1,False
    def before_fit(self): self.compared = 0
    def before_batch(self):
        cb = self.learn.meta_weight_net
        cb.weight_net.double()
        self.net = deepcopy(cb.weight_net)
        self.net_opt = torch.optim.AdamW(self.net.parameters(), lr=cb.net_lr, weight_decay=cb.net_wd)
        self.net_opt.load_state_dict(deepcopy(cb.weigher.optimizer.state_dict()))
        self.params = {k: p.detach().clone() for k,p in self.model.named_parameters()}
        self.rates = {k: h['lr'] for ps,h in zip(self.opt.param_lists, self.opt.hypers) for p in ps for k,q in self.model.named_parameters() if p is q}
    def after_loss(self):
        cb = self.learn.meta_weight_net
        def weights(losses):
            v = self.net(losses.detach()[:, None])[:, 0]
            return (v/v.sum() if cb.normalised else v/len(v)) * (len(v) if self.loss_func.reduction == 'sum' else 1)
        leaves = {k: p.requires_grad_() for k,p in self.params.items()}
        model = deepcopy(self.model) # batch norms count what passes
        losses = per_item(functional_call(model, leaves, tuple(self.xb)), *self.yb)
        gradient = torch.autograd.grad((weights(losses)*losses).sum(), list(leaves.values()), create_graph=True)
        ahead = {k: p - self.rates[k]*g for (k,p),g in zip(leaves.items(), gradient)}
        (xm,),(ym,) = cb.step.meta_batch
        self.net_opt.zero_grad()
        per_item(functional_call(model, ahead, xm), ym).mean().backward(inputs=list(self.net.parameters()))
        self.net_opt.step()
        for a,b in zip(cb.weight_net.parameters(), self.net.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        scale = len(losses) if self.loss_func.reduction == 'sum' else 1
        torch.testing.assert_close(cb.step.weights*scale, weights(losses), rtol=1e-6, atol=1e-9)
        self.compared += 1

@pytest.mark.parametrize('normalised', [True, False])
@pytest.mark.parametrize('engine', ['auto', 'forward', 'reverse'])
@pytest.mark.parametrize('lookahead,reduction', [('sgd', 'mean'), ('opt', 'mean'), ('sgd', 'sum')])
def test_meta_weight_net_equals_the_paper(tmp_path, normalised, engine, lookahead, reduction):
    set_seed(0)
    x,y = torch.randn(24, 6, dtype=torch.float64),torch.arange(24) % 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.BatchNorm1d(3)).double()
    learn = Learner(DataLoaders(*[tensors(x, y) for _ in range(3)]), model, loss_func=nn.CrossEntropyLoss(reduction=reduction), opt_func=SGD, path=tmp_path, default_cbs=False,
        splitter=lambda m: [list(m[0].parameters()), list(m[2:].parameters())],
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
    assert learn.recorder.metric_names[-4:-1] == ['meta_loss', 'zero_weights', 'ess'] 
    before = deepcopy(cb.weight_net.state_dict())
    learn.fit(1)
    assert not all(torch.equal(a, b) for a,b in zip(before.values(), cb.weight_net.state_dict().values())), 'the net learns on'
    assert learn.meta_weight_net.item_weights().steps.sum() == 16*len(learn.dls.train)
    learn.export()
    with pytest.raises(ValueError, match='has a MetaReweightCallback already'): learn.add_cb(MetaReweightCallback())

def test_a_saved_weight_net_of_another_size(make_learner):
    learn = make_learner(MetaWeightNetCallback(hidden=5))
    learn.fit(1)
    learn.save('five')
    other = make_learner(MetaWeightNetCallback(hidden=6)).load('five')
    with pytest.raises(ValueError, match='hidden=6, but the weight net that was loaded with the optimizer has 5 hidden units: use hidden=5'): other.fit(1)

@pytest.mark.parametrize('kwargs,message', [(dict(hidden=0), 'hidden=0 must be a whole number, 1 or more'), (dict(hidden=2.5), 'hidden=2.5 must be'),
    (dict(net_lr=-1.), 'net_lr=-1.0 must be a learning rate above 0'), (dict(net_wd=-1.), 'net_wd=-1.0 must be a weight decay')])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message): MetaWeightNetCallback(**kwargs)

def net_of(learn): return [p.clone() for p in learn.meta_weight_net.weight_net.parameters()]
def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b, strict=True))

def test_searching_a_learning_rate_leaves_the_weight_net(make_learner):
    learn = make_learner(MetaWeightNetCallback())
    learn.lr_find(show_plot=False, num_it=8)
    learn.fit(1)
    make_learner(MetaWeightNetCallback())
    before = net_of(learn)
    learn.lr_find(show_plot=False, num_it=8)
    assert same(before, net_of(learn)) and len(learn.meta_weight_net.weigher.optimizer.state) == 4
    learn.fit(1)
    assert not same(before, net_of(learn))

def test_a_new_callback_begins_with_a_new_net(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=MetaWeightNetCallback())
    learn.fit(1, cbs=MetaWeightNetCallback(hidden=50))
    assert not any('meta_reweight' in state for state in learn.opt.state.values())

def test_a_loaded_net_is_gone_on_with(make_learner):
    learn = make_learner(MetaWeightNetCallback())
    learn.fit(1)
    learn.save('one')
    saved = net_of(learn)
    learn.fit(1)
    seen = []
    class Start(Callback):
        order,run_valid = MetaReweightCallback.order + 1,False
        def before_train(self): seen.append(net_of(self.learn))
    for other in (learn, make_learner(MetaWeightNetCallback())): # in the same process too
        other.load('one')
        other.fit(1, cbs=Start())
        assert same(seen[-1], saved)
    learn.freeze_to(0) # fastai forgets the optimizer's state; the callback is still here
    before = net_of(learn)
    learn.fit(1, cbs=Start())
    assert same(seen[-1], before)

def test_no_warning_for_models_with_an_attribute_net(make_learner):
    class Wrapped(nn.Module):
        def __init__(self): super().__init__(); self.net = cnn()
        def forward(self, x): return self.net(x)
    learn = make_learner(MetaWeightNetCallback(), model=Wrapped())
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='You are shadowing')
        learn.fit(1)

def test_weight_of_takes_what_one_plots():
    cb = MetaWeightNetCallback()
    cb.weigher.prepare(torch.device('cpu'), 0)
    assert cb.weight_of(torch.linspace(0, 5, 7)).numpy().shape == (7,) and 0 < cb.weight_of(1.5) < 1

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

def test_classes_of_pytorch_loaders():
    dls = DataLoaders(tensors(torch.randn(16, 3), torch.arange(16) % 3), tensors(torch.randn(16, 3), torch.arange(16) % 3))
    assert class_counts(dls).tolist() == [6, 5, 5]
    with pytest.raises(TypeError, match='dls.train is a DataLoader, but must be a loader of fastai'): weighted_sampler(dls)

def test_a_loader_that_brings_its_own_weighted_one_keeps_its_way_to_make_batches():
    from fastai_l2rw.data.cifar10 import DecodedDL, WeightedDecodedDL
    items = [(torch.tensor([float(i)]), torch.tensor(int(i < 5))) for i in range(50)]
    dls = DataLoaders(DecodedDL(items, bs=10, shuffle=True), DecodedDL(items, bs=10))
    sampled = weighted_sampler(dls).train
    assert type(sampled) is WeightedDecodedDL and sampled.bs == 10 and sampled.wgts[:5].sum() == pytest.approx(0.5)

@pytest.mark.parametrize('y', [torch.randn(16, 2), torch.randn(16), -torch.arange(16)])
def test_what_has_no_single_label(y):
    dls = DataLoaders(tensors(torch.randn(16, 3), y), tensors(torch.randn(16, 3), y))
    with pytest.raises(ValueError, match='dls (must have one class label per training item|has no vocab)'): class_counts(dls)

def several_labels():
    return DataBlock((TransformBlock, MultiCategoryBlock), get_x=lambda i: torch.randn(3), get_y=lambda i: ['a', 'b'][:1 + i % 2], splitter=lambda _: (range(16), range(16, 24), range(24, 32))
        ).dataloaders(range(32), bs=8)

def numbers():
    return DataBlock((TransformBlock, RegressionBlock), get_x=lambda i: torch.randn(3), get_y=lambda i: i/7, splitter=lambda _: (range(16), range(16, 24), range(24, 32))).dataloaders(range(32), bs=8)

@pytest.mark.parametrize('make,n_out', [(several_labels, 2), (numbers, 1)])
@pytest.mark.parametrize('scheme', weighting_schemes)
def test_schemes_without_classes(make, n_out, scheme, tmp_path):
    "Those that weigh classes say so; the others train with the loss of the data."
    dls = make()
    if scheme in ('unweighted', 'reweighted', 'meta-weight-net'):
        learn = Learner(model=nn.Linear(3, n_out), path=tmp_path, **weighting_scheme(scheme, dls))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    else:
        with pytest.raises(ValueError, match='one class label per'): weighting_scheme(scheme, dls)

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
    with pytest.raises(TypeError, match="scheme='inverse frequency' takes no further arguments, and got beta"): weighting_scheme('inverse frequency', dls, beta=0.5)
    with pytest.raises(ValueError, match='counts=.* must be numbers of items, 0 or more'): class_weights([-3, 5])

# ---- the register

def test_the_schemes_of_this_package():
    by_class = 'weighted sampler','inverse frequency','effective number'
    assert weighting_schemes == ('unweighted', *by_class, 'focal', 'reweighted', 'robust', 'calibrated', 'meta-weight-net')
    assert tuple(scheme_registry) == weighting_schemes and all(o.name == k for k,o in scheme_registry.items())
    assert [k for k,o in scheme_registry.items() if o.learns] == ['reweighted', 'robust', 'calibrated', 'meta-weight-net']
    assert [k for k,o in scheme_registry.items() if o.replaces_loss] == ['inverse frequency', 'effective number', 'focal']
    table = schemes_table()
    assert tuple(table.index) == weighting_schemes
    assert all(len(o) > 5 for column in ('source', 'what weighs') for o in table[column])
    with pytest.raises(AttributeError): scheme_registry['focal'].learns = True

@pytest.mark.parametrize('scheme', weighting_schemes)
def test_an_unknown_option_is_named_with_its_scheme(scheme):
    says = f"scheme='{scheme}' (takes no further arguments, and got gama|does not take gama, but only )"
    with pytest.raises(TypeError, match=says): weighting_scheme(scheme, make_dls(), gama=1.)
    with pytest.raises(TypeError, match=f"scheme='{scheme}' .* loss_func"): weighting_scheme(scheme, make_dls(), loss_func=None)

@pytest.mark.parametrize('scheme,cls',
    [('reweighted', MetaReweightCallback), ('robust', MetaReweightCallback), ('calibrated', MetaReweightCallback), ('meta-weight-net', MetaWeightNetCallback)])
def test_options_are_those_of_the_callback(scheme, cls):
    assert scheme_registry[scheme].options == [o for o in inspect.signature(cls.__init__).parameters if o not in ('self', 'meta_dl')]

def test_a_scheme_of_ones_own():
    try:
        @register_scheme('mine', learns=False, source='this test')
        def mine(dls, loss_func, meta_dl, **kwargs): return dict(dls=dls, loss_func=(loss_func, meta_dl, kwargs), cbs=[])
        dls = make_dls()
        loss_func,meta_dl,kwargs = weighting_scheme('mine', dls, 'trusted', any_option=1)['loss_func']
        assert isinstance(loss_func, CrossEntropyLossFlat) and meta_dl == 'trusted' and kwargs == dict(any_option=1)
        with pytest.raises(ValueError, match="scheme='none' is unknown: use one of 'unweighted', .*, 'mine'"): weighting_scheme('none', dls)
        says = "name='mine' is registered already, for .*mine: choose another name"
        with pytest.raises(ValueError, match=says): register_scheme('mine', True, '')(mine)
        assert scheme_registry['mine'].source == 'this test', 'the first one stays'
    finally: scheme_registry.pop('mine', None)
    with pytest.raises(TypeError, match='takes meta_dl, dls first, but a scheme must take dls, loss_func and meta_dl'):
        register_scheme('other', False, '')(lambda meta_dl, dls: {})
    assert 'other' not in scheme_registry
