"The options that steady weights, against histories kept by hand and gradients of single examples."
import pytest, torch
from copy import deepcopy
from fastai.basics import Callback, CancelFitException, DataLoaders, SGD, set_seed
from fastai.callback.all import MixUp, SaveModelCallback
from torch import nn

from conftest import Oracle, cnn, images, labels, make_dls, meta, split, tensors, train
from fastai_l2rw.all import MetaReweightCallback, weighted_sampler, weighting_scheme

cross_entropy = nn.CrossEntropyLoss(reduction='none')

class ByHand:
    "Weights of each batch by a backward pass per example, and a list of visits per image."
    def __init__(self, relative, smooth, margin): self.relative,self.smooth,self.margin,self.visits = relative,smooth,margin,{}

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
        if self.smooth or self.margin:
            size = sum(map(abs, u))/len(u)
            u = [o/size for o in u]
        if self.smooth: u = self.averaged([o.numpy().tobytes() for o in x.cpu()], u)
        w = [max(o + self.margin, 0) for o in u]
        return torch.tensor([o/(sum(w) or 1) for o in w])

    def averaged(self, keys, u):
        now = {k: [a for a,o in zip(u, keys) if o == k] for k in keys}
        for k,o in now.items(): self.visits.setdefault(k, []).append(sum(o)/len(o))
        def mean(visits):
            counts = [self.smooth**i for i in range(len(visits))][::-1]
            return sum(a*b for a,b in zip(counts, visits))/sum(counts)
        return [mean(self.visits[k]) for k in keys]

@pytest.mark.parametrize('engine', ['forward', 'reverse'])
@pytest.mark.parametrize('sampler', [False, True])
@pytest.mark.parametrize('options', [dict(relative=True), dict(smooth=0.8), dict(margin=0.5), dict(relative=True, smooth=0.5, margin=1.)])
def test_weights_by_hand(options, sampler, engine, make_learner):
    dls = weighted_sampler(make_dls()) if sampler else make_dls()
    by_hand = ByHand(**dict(relative=False, smooth=0., margin=0.) | options)
    oracle = Oracle(cross_entropy, by_hand)
    learn = make_learner([MetaReweightCallback(engine=engine, **options), oracle], dls=dls, model=cnn(bn=False, p=0.), splitter=split)
    learn.fit(4, slice(1e-3, 1e-1))
    assert oracle.compared == 4*len(dls.train) and oracle.varied > oracle.compared/2
    if options.get('smooth'): assert max(map(len, by_hand.visits.values())) >= 4

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

def test_resumed_fit_goes_on_with_the_means(make_learner):
    class Stop(Callback):
        order = SaveModelCallback.order + 1
        def __init__(self, at): self.at = at
        def after_epoch(self):
            if self.epoch == self.at: raise CancelFitException()
    def learner():
        dls = make_dls()
        dls = DataLoaders(dls.train.new(shuffle=False), *dls.loaders[1:])
        return make_learner(MetaReweightCallback(smooth=0.9, relative=True), dls=dls, model=cnn(bn=False, p=0.))
    whole,first,second,forgetful = learner(),learner(),learner(),learner()
    set_seed(2) # the order of the trusted batches
    whole.fit(4)
    set_seed(2)
    first.fit(4, cbs=[Stop(1), SaveModelCallback(every_epoch=True, with_opt=True)])
    for learn in (second, forgetful): learn.load('model_1', with_opt=True)
    for state in forgetful.opt.state.values():
        if 'meta_reweight' in state: del state['meta_reweight']['running']
    for learn in (second, forgetful): learn.fit(4, start_epoch=2)
    def differ(learn): return max((p - q).abs().max().item() for p,q in zip(whole.model.parameters(), learn.model.parameters()))
    assert differ(second) < 1e-6 < 1e-4 < differ(forgetful)

def test_each_fit_begins_anew_and_lr_find_leaves_nothing(make_learner):
    learn = make_learner(MetaReweightCallback(smooth=0.9), model=cnn(bn=False, p=0.))
    visits = []
    def look(self):
        if self.training: visits.append(self.meta_reweight.this_fit.weigher.transforms[0].running.visits.clone())
    learn.fit(2, 0., cbs=Callback(after_batch=look))
    assert visits[-1].sum() == 2*len(learn.dls.train)*16
    learn.lr_find(show_plot=False, num_it=8)
    learn.fit(1, 0., cbs=Callback(after_batch=look))
    assert visits[-1].max() == 1

def test_a_prediction_in_between_forgets_nothing(make_learner):
    class Predict(Callback):
        run_valid = False
        def after_batch(self):
            if self.iter == 0: self.learn.visits = self.learn.meta_reweight.this_fit.weigher.transforms[0].running.visits.sum().item()
        def after_train(self): self.learn.get_preds(dl=self.dls.valid)
    learn = make_learner(MetaReweightCallback(smooth=0.9), model=cnn(bn=False, p=0.))
    learn.fit(3, 1e-3, cbs=Predict())
    assert learn.visits == (2*len(learn.dls.train) + 1)*16

def test_what_cannot_be_smoothed(make_learner):
    data,trusted = [tensors(images[items], torch.tensor(labels)[items]) for items in (train, meta)]
    learn = make_learner(MetaReweightCallback(trusted, smooth=0.9), dls=DataLoaders(data, data))
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='smooth=0.9 needs to know which items are in a batch, and the training loader, .* does not tell'): learn.fit(1)
    for k,v in learn.model.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)

@pytest.mark.parametrize('name,value,right', [('smooth', 1., 'from 0 to below 1'), ('smooth', -0.1, 'from 0 to below 1'), ('margin', -0.5, '0 or more')])
def test_wrong_options(name, value, right):
    with pytest.raises(ValueError, match=f'{name}={value} must be {right}'): MetaReweightCallback(**{name: value})

def test_mixed_batches_train(make_learner):
    learn = make_learner([MetaReweightCallback(relative=True, smooth=0.9, margin=1.), MixUp()])
    learn.fit(2)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_preset():
    dls = make_dls()
    assert weighting_scheme('robust', dls)['cbs'][0].relative
    got = weighting_scheme('robust', dls, margin=0.5)
    cb, = got['cbs']
    assert type(got['dls'].train).__name__ == 'WeightedDL' and (cb.relative, cb.smooth, cb.margin) == (True, 0., 0.5)

def test_relative_with_skip_zeros(make_learner):
    "Examples of weight zero are left out of the training pass, and the lengths of the gradients are those of all examples."
    def train(**kwargs):
        set_seed(3)
        learn = make_learner(MetaReweightCallback(relative=True, smooth=0.5, **kwargs), model=cnn(bn=False, p=0.), opt_func=SGD)
        set_seed(2)
        learn.fit(2, 1e-2)
        return learn
    plain,skipping = train(),train(skip_zeros=True)
    assert 0 < plain.meta_reweight.item_weights().zero.mean() < 1
    for p,q in zip(plain.model.parameters(), skipping.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
