"How likely each label is right, and the weights that follow, against independent computations."
import numpy as np, pytest, torch
from fastai.basics import DataLoaders, Learner, SGD, set_seed
from fastai.callback.all import Callback, MixUp, ProgressCallback, SaveModelCallback # which bring what a Learner is patched with
from fastai.data.core import TfmdDL
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from fastai_l2rw.callback import MetaReweightCallback
from fastai_l2rw.data.core import label_noise
from fastai_l2rw.interpret import MetaInterpretation
from fastai_l2rw.quality import CalibratedWeigher, LabelQuality, label_quality, recalibrated, sharpness, true_classes
from fastai_l2rw.schemes import weighting_scheme

# ---- the functions

def em(likelihood, labels, right, strength, rounds):
    "Item by item, in NumPy."
    n,C = likelihood.shape
    found = np.zeros((n, C))
    for k in set(labels):
        first = np.array([right if c == k else (1 - right)/(C - 1) for c in range(C)])
        shares,items = first.copy(),[i for i in range(n) if labels[i] == k]
        for step in range(rounds + 1):
            sums = np.zeros(C)
            for i in items:
                found[i] = likelihood[i]*shares/(likelihood[i]*shares).sum()
                sums += found[i]
            shares = (sums + strength*first)/(len(items) + strength)
    return found

@pytest.mark.parametrize('right, strength, rounds', [(0.6, 5., 50), (0.9, 1., 3)])
def test_shares_are_found_as_item_by_item(right, strength, rounds):
    rng = np.random.default_rng(0)
    log_likelihood,labels = rng.normal(size=(60, 4))*2 - 30,rng.integers(0, 3, 60) # a class without any item, too
    found = true_classes(torch.tensor(log_likelihood), torch.tensor(labels), right, strength, rounds)
    np.testing.assert_allclose(found, em(np.exp(log_likelihood), labels.tolist(), right, strength, rounds), atol=1e-10)

def test_extreme_likelihoods_give_numbers():
    found = true_classes(torch.tensor([[0., -1e4, -2e4], [-1e4, 0., 0.]]), torch.tensor([1, 0]))
    assert found.isfinite().all() and found[0, 0] > 0.99 and found[1, 0] < 0.01

@pytest.mark.parametrize('true', [0.4, 1., 2.5])
def test_sharpness_is_the_likeliest_on_a_grid(true):
    torch.manual_seed(0)
    said = torch.randn(400, 5).log_softmax(1)
    labels = torch.multinomial((true*said).softmax(1), 1)[:, 0]
    grid = np.linspace(0, 5, 5001)
    cost = [F.cross_entropy(a*said.double(), labels, reduction='sum').item() + (a - 1)**2/2 for a in grid]
    assert abs(sharpness(said, labels) - grid[np.argmin(cost)]) < 2e-3 and abs(sharpness(said, labels) - true) < 0.5

@pytest.mark.parametrize('given, message', [
    (dict(log_probs=torch.zeros(3)), r'log_probs has the shape \(3,\)'),
    (dict(log_probs=torch.zeros(3, 2).long()), 'log_probs has .* torch.int64'),
    (dict(labels=torch.zeros(2).long()), r'labels has the shape \(2,\).* for each of the 3 rows of log_probs'),
    (dict(labels=torch.tensor([0, 1, 2])), 'labels has numbers from 0 to 2, .* from 0 to 1'),
    (dict(trusted_labels=torch.tensor([0, -1])), 'trusted_labels has numbers from -1'),
    (dict(trusted_log_probs=torch.zeros(2, 3)), 'log_probs has 2 classes and trusted_log_probs 3')])
def test_what_does_not_fit_is_named(given, message):
    good = dict(log_probs=torch.zeros(3, 2), labels=torch.zeros(3).long(),
        trusted_log_probs=torch.zeros(2, 2), trusted_labels=torch.zeros(2).long())
    assert label_quality(**good).label_quality.between(0, 1).all()
    with pytest.raises(ValueError, match=message): label_quality(**good | given)

# ---- checked labels

def checked_case(n=3000, k=200, seed=0):
    "Labels that look better than they are, those of class 2 worse than others."
    rng = np.random.default_rng(seed)
    labels,said = rng.integers(0, 4, n),rng.beta(2, 1, n)
    right = rng.random(n) < said**3*np.where(labels == 2, 0.5, 1)
    return tuple(map(torch.as_tensor, (said, labels, rng.permutation(n)[:k], right)))

def test_checked_labels_count_as_by_another_optimizer():
    "The same prior and likelihood, item by item, with derivatives by autograd."
    said,labels,items,right = checked_case()
    place = torch.tensor([(said < o).sum() + ((said == o).sum() + 1)/2 for o in said])/len(said)
    factor,number,bumps,of_label = (torch.tensor(o, dtype=torch.double, requires_grad=True) for o in (1., 0., [0.]*9, [0.]*4))
    def odds(i):
        bump = sum(bumps[c]*torch.exp(-(place[i] - c/8)**2/(2*0.125**2)) for c in range(9))
        return factor*torch.log(said[i]/(1 - said[i])) + number + bump + of_label[labels[i]]
    optimizer = torch.optim.LBFGS([factor, number, bumps, of_label], max_iter=200, line_search_fn='strong_wolfe', tolerance_change=1e-12)
    def cost():
        optimizer.zero_grad()
        found = 2*(factor - 1)**2 + (number**2 + bumps.square().sum() + of_label.square().sum())/2
        for i in items: found = found - F.logsigmoid(odds(i) if right[i] else -odds(i))
        found.backward()
        return found
    optimizer.step(cost)
    others = np.setdiff1d(np.arange(3000), items)[:300]
    want = torch.stack([odds(i) for i in others]).sigmoid().detach()
    np.testing.assert_allclose(recalibrated(said, labels, items, right[items])[others], want, atol=2e-4)

def test_checked_labels_mend_each_label_and_each_tenth():
    said,labels,items,right = checked_case(20_000, 2000)
    now = recalibrated(said.float(), labels, items, right[items])
    assert now.dtype == torch.float32 and torch.equal(now[items], right[items].float())
    others = np.setdiff1d(np.arange(20_000), items)
    gap = lambda q, at: abs(float(q[at].double().mean() - right[at].double().mean()))
    tenths = np.array_split(others[np.argsort(now[others])], 10)
    assert max(gap(now, o) for o in tenths) < 0.05 < 0.2 < max(gap(said, o) for o in tenths)
    by_label = [others[labels[others] == c] for c in range(4)]
    assert max(gap(now, o) for o in by_label) < 0.03 < 0.2 < min(gap(said, o) for o in by_label)

def test_few_checked_labels_change_little():
    said,labels,items,right = checked_case()
    others = np.setdiff1d(np.arange(3000), items)
    np.testing.assert_allclose(recalibrated(said, labels, items[:0], right[:0]), said, atol=1e-5)
    one,many = ((recalibrated(said, labels, items[:k], right[items[:k]]) - said)[others].abs().mean() for k in (1, 200))
    assert one < many/2 and many > 0.15

def test_checks_of_a_quality_that_is_right_change_little():
    rng = np.random.default_rng(0)
    said,labels = torch.tensor(rng.beta(0.5, 0.5, 3000)),torch.tensor(rng.integers(0, 4, 3000))
    right,items = torch.tensor(rng.random(3000)) < said,torch.tensor(rng.permutation(3000))
    for k,most in ((1, 0.12), (30, 0.12), (300, 0.05)):
        moved = (recalibrated(said, labels, items[:k], right[items[:k]]) - said)[items[k:]].abs().mean()
        assert moved < most, k

def test_the_order_of_the_least_probable_is_kept_apart():
    said = torch.logspace(-12, -5, 50, dtype=torch.double)
    now = recalibrated(torch.cat([said, torch.full((50,), 0.9)]), torch.zeros(100).long(), torch.tensor([60]), torch.tensor([True]))
    assert len(now[:50].unique()) == 50

@pytest.mark.parametrize('given, message', [
    (dict(labels=torch.zeros(2).long()), r'labels has the shape \(2,\) and quality \(3,\)'),
    (dict(right=torch.tensor([True])), r'right has the shape \(1,\) and items \(2,\)'),
    (dict(items=torch.tensor([0, 3])), 'items has numbers from 0 to 3, but must have positions, from 0 and below 3'),
    (dict(items=torch.tensor([-1, 0])), 'items has numbers from -1'),
    (dict(labels=torch.tensor([0, -1, 0])), 'labels has numbers from -1 to 0, but must have classes'),
    (dict(items=torch.tensor([1, 1])), 'items has some position twice'),
    (dict(items=torch.tensor([True, False])), 'items has the type torch.bool'),
    (dict(quality=torch.tensor([0.5, torch.nan, 1.])), 'quality has other numbers'),
    (dict(right=torch.tensor([1, -1])), 'right has other values')])
def test_what_does_not_fit_of_checks_is_named(given, message):
    good = dict(quality=torch.full((3,), 0.5), labels=torch.zeros(3).long(), items=torch.tensor([0, 2]), right=torch.tensor([True, False]))
    assert recalibrated(**good)[1].item() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match=message): recalibrated(**good | given)

# ---- in a fit

X,Y = load_digits(return_X_y=True)
X = torch.tensor(X/16, dtype=torch.float32)
is_kept = np.isin(Y, (0, 1, 2, 3))
X,Y = X[is_kept],Y[is_kept]
TRUSTED = np.concatenate([np.flatnonzero(Y == c)[:5] for c in range(4)])
TRAIN = np.setdiff1d(np.arange(len(Y)), TRUSTED)[:300]
GIVEN,WRONG = label_noise(Y[TRAIN], uniform=0.35, classes=list(range(4)), seed=0)
GIVEN,WRONG = np.array(GIVEN),np.array(GIVEN) != Y[TRAIN]

def loader(x, y, **kwargs): return TfmdDL([(a, torch.tensor(int(b))) for a,b in zip(x, y)], bs=32, num_workers=0, **kwargs)

def make_learner(cbs=(), p=0.3, loss_func=None, **options):
    set_seed(0)
    dls = DataLoaders(loader(X[TRAIN], GIVEN, shuffle=True), loader(X[TRAIN][:40], Y[TRAIN][:40]), device='cpu')
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(p), nn.Linear(32, 4))
    cb = MetaReweightCallback(loader(X[TRUSTED], Y[TRUSTED]), **dict(calibrate=True) | options)
    learn = Learner(dls, model, loss_func or nn.CrossEntropyLoss(), opt_func=SGD, cbs=[cb, *cbs])
    return learn.remove_cb(ProgressCallback)

class Spy(Callback):
    "What each step has, as it is after the loss."
    order = 0
    def before_fit(self): self.steps = []
    def after_loss(self):
        if not self.training: return
        s = self.learn.meta_reweight.step
        self.steps.append(dict(epoch=self.epoch, items=s.items, weights=s.weights.clone(), u=None if s.alignments is None else s.alignments.clone(),
            y=self.y.clone(), output=self.pred.detach().clone()))

def fit(learn, *args, **kwargs):
    torch.manual_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)
    return learn

def test_weights_are_what_follows_from_the_passes():
    "Quality and weights of the second epoch from what was seen in the first, and a trusted set whose passes have nothing random."
    spy = Spy()
    kept = {}
    class Trusted(Callback):
        "What the model says of the trusted at the end of the first epoch."
        order = -1000
        def after_train(self):
            if self.epoch == 0:
                with torch.no_grad(): kept['said'] = self.model(X[TRUSTED]).log_softmax(1)
    class Gradient(Callback):
        "The gradient of a step of the second epoch, and what it should be."
        order = -1
        def before_step(self):
            if self.epoch == 0: return
            kept.setdefault('gradients', []).append([p.grad.clone() for p in self.model.parameters()])
            s = self.learn.meta_reweight.step
            kept.setdefault('trusted', []).append((s.meta_batch, float(s.meta_loss), [p.detach().clone() for p in self.model.parameters()]))
    learn = fit(make_learner([spy, Trusted(), Gradient()], p=0.), 2, 0.1)
    first,second = [[s for s in spy.steps if s['epoch'] == e] for e in (0, 1)]
    for s in first: # half of them the paper's
        w,n = s['u'].clamp(min=0),len(s['u'])
        torch.testing.assert_close(s['weights'], w/w.sum()/2 + 1/(2*n), rtol=1e-4, atol=1e-6)
    items,said,y = [torch.cat([s[k] for s in first]) for k in ('items','output','y')]
    assert len(set(items.tolist())) == 300
    a = sharpness(kept['said'], torch.tensor(Y[TRUSTED]))
    q = em((a*said.double().log_softmax(1)).exp().numpy(), y.tolist(), 0.8, 5., 50)[np.arange(300), y]
    share,right = q.mean(),np.bincount(y, weights=q)
    assert 0.3 < share < 0.95
    part = np.array([5/share**2/(5/share**2 + right[k]) for k in range(4)]) # five trusted ones of each class
    r = torch.zeros(300)
    r[items] = torch.tensor(q*((1 - part)/right)[y], dtype=torch.float32)
    assert 0.05 < part.min() < part.max() < 0.9
    for s,found,(batch,loss,values) in zip(second, kept['gradients'], kept['trusted']):
        wr = r[s['items']]
        torch.testing.assert_close(s['weights'], (1 - part.mean())*wr/wr.sum(), rtol=2e-3, atol=2e-5)
        (xm,),(ym,) = batch
        c = torch.tensor(part[ym]/len(ym), dtype=torch.float32)
        model = make_learner(p=0.).model
        for p,v in zip(model.parameters(), values): p.data.copy_(v)
        on_trusted = F.cross_entropy(model(xm), ym, reduction='none')
        (s['weights']@F.cross_entropy(model(X[TRAIN][s['items']]), s['y'], reduction='none') + c@on_trusted).backward()
        for p,g in zip(model.parameters(), found): torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx((c@on_trusted/c.sum()).item(), rel=1e-5)

def test_the_quality_that_is_shown():
    """Values are the mean of the judgements by half of the sharpness, in the order of the mean evidence; weights go by the last judgement,
    with all of the sharpness where many labels are wrong."""
    torch.manual_seed(0)
    seen,labels,trusted,shown,evidence = LabelQuality(60, 3),torch.randint(3, (60,)),torch.arange(12) % 3,[],[]
    truth = (labels + torch.arange(60) % 2) % 3 # every second label is wrong
    def judged(evidence): return em(np.exp(evidence), labels.tolist(), 0.8, 5., 50)
    for n in (1, 2, 3):
        output,of_trusted = torch.randn(60, 3) + n*F.one_hot(truth, 3),(torch.randn(12, 3) + 2*F.one_hot(trusted, 3)).log_softmax(1)
        seen.see(torch.arange(60), output, labels)
        seen.judge(of_trusted, trusted)
        evidence.append(sharpness(of_trusted, trusted)*output.double().log_softmax(1).numpy())
        shown.append(judged(evidence[-1]/2)[np.arange(60), labels])
    values,by = sorted(np.mean(shown, 0)),judged(np.average(evidence, axis=0, weights=[1, 2, 3])/3)[np.arange(60), labels]
    want = [values[(by < o).sum()] for o in by]
    np.testing.assert_allclose(seen.table().label_quality, want, atol=1e-5)
    np.testing.assert_allclose(seen.now, judged(evidence[-1])[np.arange(60), labels], atol=1e-5)
    assert seen.table().suggested.tolist() == judged(evidence[-1]).argmax(1).tolist()

@pytest.mark.parametrize('wrong, mixed', [(0., (0.9, 1.)), (0.12, (0.2, 0.8)), (0.5, (0., 0.))])
def test_weights_go_by_half_of_the_sharpness_where_labels_are_right(wrong, mixed):
    torch.manual_seed(0)
    seen,labels,trusted = LabelQuality(600, 3),torch.randint(3, (600,)),torch.arange(12) % 3
    truth = (labels + (torch.rand(600) < wrong)) % 3
    seen.see(torch.arange(600), torch.randn(600, 3) + 6*F.one_hot(truth, 3), labels)
    seen.judge((torch.randn(12, 3) + 2*F.one_hot(trusted, 3)).log_softmax(1), trusted)
    at,said = seen.said()
    sharp = label_quality(said, labels, *seen.of_trusted).label_quality.to_numpy()
    share = seen.quality.mean().item()
    t = max(0, 4*share - 3)
    assert mixed[0] <= t <= mixed[1] and seen.share == pytest.approx(seen.now.mean().item())
    np.testing.assert_allclose(seen.now, t*seen.mean + (1 - t)*sharp, atol=1e-5)

@pytest.mark.parametrize('counts, worth', [([600, 300], None), ([600, 0], 1.)])
def test_what_a_trusted_example_is_worth(counts, worth):
    "A class without items is learned from trusted examples alone; one with many is hardly changed by them; each class counts the same."
    seen = LabelQuality(sum(counts), 2)
    labels = torch.tensor([0]*counts[0] + [1]*counts[1])
    said = torch.where(labels[:, None] == torch.arange(2), 4., 0.)
    seen.see(torch.arange(len(labels)), said, labels)
    seen.judge(torch.tensor([[-0.1, -3.]]*6 + [[-3., -0.1]]*3), torch.tensor([0]*6 + [1]*3))
    assert seen.share > 0.95
    of_items = [seen.weights(torch.arange(len(labels)))[labels == k].sum().item() for k in range(2)]
    of_trusted = [seen.trusted_by_class[k].item()*(labels_k/9)*2 for k,labels_k in ((0, 6), (1, 3))]
    for a,b in zip(of_items, of_trusted): assert a + b == pytest.approx(1, abs=1e-3)
    assert of_trusted[0] == pytest.approx(6/606, rel=0.15) and of_trusted[1] == pytest.approx(worth or 3/303, rel=0.15)
    assert seen.taught == pytest.approx(np.mean(of_trusted), rel=1e-4)

def test_wrong_labels_are_found():
    learn = fit(make_learner(), 12, 0.1)
    found = learn.meta_reweight.label_quality()
    assert found.index.tolist() == list(range(300)) and found.label_quality.between(0, 1).all()
    auc = roc_auc_score(WRONG, -found.label_quality)
    weights = learn.meta_reweight.item_weights().weight
    assert auc > 0.93 and auc > roc_auc_score(WRONG, -weights[found.index]) - 0.02
    assert abs(found.label_quality.mean() - (~WRONG).mean()) < 0.15
    right = found.suggested.to_numpy() == Y[TRAIN]
    assert right[WRONG].mean() > 0.7 and right[~WRONG].mean() > 0.85
    table = MetaInterpretation.from_learner(learn).table('label_quality')
    assert table.label_quality.tolist() == sorted(found.label_quality)
    df = learn.meta_reweight.calibration()
    assert len(df) == 40 and df.right.sum() == 20 and roc_auc_score(df.right, df.quality) > 0.9
    interp = MetaInterpretation.from_learner(learn)
    assert interp.plot_quality().lines[1].get_label() == 'trusted examples'
    items = interp.items_to_check(60)
    assert interp.calibrate(items, wrong=[i for i in items if WRONG[i]]) == pytest.approx((~WRONG).mean(), abs=0.1)
    assert interp.plot_quality().lines[1].get_label() == 'checked items'
    assert roc_auc_score(WRONG, -interp.table().label_quality) > auc - 0.02
    before = interp.items_to_check(5),MetaInterpretation.from_learner(learn)
    quality = before[1].label_quality()
    fit(learn, 1, 0.1)
    assert before[1].label_quality().equals(quality) and interp.items_to_check(5) == before[0] # a later fit changes nothing

def test_right_labels_are_left_alone():
    "With right labels the weights are those of inverse frequency in the end."
    spy = Spy()
    learn = make_learner([spy], p=0.)
    learn.dls.loaders[0] = loader(X[TRAIN], Y[TRAIN], shuffle=True)
    fit(learn, 15, 0.1)
    last = spy.steps[-8:]
    counts = torch.bincount(torch.cat([s['y'] for s in spy.steps if s['epoch'] == 14]))
    for s in last:
        w = 1/counts[s['y']]
        assert (s['weights'] - w/w.sum()).abs().sum() < 0.2

def test_judging_moves_nothing(monkeypatch):
    "Neither the random stream, nor the model's mode and buffers, nor the order of trusted batches."
    streams = []
    class Stream(Callback):
        order = 10000
        def after_epoch(self): streams.append(torch.get_rng_state().clone())
    def end():
        learn = make_learner([Stream()])
        learn.model.append(nn.BatchNorm1d(4, affine=False))
        fit(learn, 1, 0.1)
        return learn.model.state_dict()
    one = end()
    monkeypatch.setattr(CalibratedWeigher, 'end_epoch', lambda self, fit: None)
    other = end()
    for k in one: torch.testing.assert_close(one[k], other[k], rtol=0, atol=0)
    assert torch.equal(*streams)

def test_an_interrupted_fit_goes_on(tmp_path):
    whole = fit(make_learner(p=0.), 4, 0.1)
    learn = make_learner(p=0., cbs=[SaveModelCallback(every_epoch=True, with_opt=True, fname='m')])
    learn.path = tmp_path
    class Stop(Callback):
        order = 1000
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    learn.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, 0.1)
    again = make_learner(p=0.)
    again.path = tmp_path
    again.load('m_1', with_opt=True)
    torch.manual_seed(1)
    for _ in range(2): list(again.dls.train) # the same order of training items, as far as it goes
    with again.no_bar(), again.no_logging(): again.fit(4, 0.1, start_epoch=2)
    q,p = again.meta_reweight.judged,whole.meta_reweight.judged
    assert q.visits.tolist() == [4.]*300
    torch.testing.assert_close(q.share, p.share, rtol=1e-3, atol=0)

def test_nothing_of_it_is_exported():
    cb = fit(make_learner(), 2, 0.1).meta_reweight
    assert cb.label_quality() is not None and 'judged' not in cb.__getstate__()
    bare = type(cb).__new__(type(cb))
    bare.__setstate__(cb.__getstate__())
    assert bare.calibrate and bare.label_quality() is None and bare.calibration() is None

@pytest.mark.parametrize('options', [dict(every=2), dict(relative=True), dict(margin=0.5),
    dict(lookahead='opt'), dict(engine='reverse'), dict(start=1), dict(record=False), dict(params=lambda m: m[-1].parameters())], ids=lambda o: next(iter(o)))
def test_other_options_go_with_it(options):
    learn = make_learner(**options)
    found = fit(learn, 12, 0.1).meta_reweight.label_quality()
    assert roc_auc_score(WRONG, -found.label_quality) > 0.85

def test_a_trusted_loader_may_never_end():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True: yield from ((X[i], torch.tensor(int(Y[i]))) for i in TRUSTED)
    learn = make_learner()
    learn.meta_reweight.meta_dl = torch.utils.data.DataLoader(Endless(), batch_size=8)
    cb = fit(learn, 2, 0.1).meta_reweight
    assert len(cb.judged.of_trusted[1]) == 8*10 # as many batches as the epoch had
    assert len(learn.dls.train) == 10 and len(cb.label_quality()) == 300

def test_the_loss_that_is_shown_has_its_own_gradient():
    "Sums of losses, as a loss with reduction='sum' has, stay in proportion to the trusted ones."
    mean = make_learner(p=0.)
    mean.dls.loaders[0] = mean.dls.train.new(drop_last=True) # batches of 32, so that a sum is 32 times a mean
    fit(mean, 3, 0.1)
    total = make_learner(loss_func=nn.CrossEntropyLoss(reduction='sum'), p=0.)
    total.dls.loaders[0] = total.dls.train.new(drop_last=True)
    fit(total, 3, 0.1/32)
    for a,b in zip(mean.model.parameters(), total.model.parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

def test_what_is_not_finite_is_named():
    class Spoil(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 3: self.learn.xb = (self.xb[0]*float('nan'),)
    with pytest.raises(FloatingPointError, match='batch 3 of the training loader in epoch 1 .* holds NaN'): fit(make_learner([Spoil()]), 3, 0.1)
    class SpoilTrusted(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 3:
                batches = self.learn.meta_reweight.this_fit.trusted
                batches.batches = iter([(True, (torch.full((5, 64), float('nan')), torch.zeros(5).long()))])
    with pytest.raises(FloatingPointError, match='of meta_dl in epoch 1'): fit(make_learner([SpoilTrusted()]), 3, 0.1)

def test_there_are_no_zeros_to_skip():
    with pytest.raises(ValueError, match='skip_zeros=True leaves out examples with weight zero, and calibrate=True gives none'):
        make_learner(skip_zeros=True)

def test_as_a_scheme():
    learn = make_learner()
    how = weighting_scheme('calibrated', learn.dls, loader(X[TRUSTED], Y[TRUSTED]))
    assert how['cbs'][0].calibrate and how['dls'] is learn.dls

# ---- where it can't be

def test_without_classes_it_says_so():
    learn = make_learner(loss_func=lambda p, y, reduction='mean': F.mse_loss(p[:, :1], y[:, None].float(), reduction=reduction))
    learn.model.append(nn.Linear(4, 1))
    learn.loss_func = nn.MSELoss()
    learn.dls.loaders[0] = TfmdDL([(a, torch.tensor([float(b)])) for a,b in zip(X[TRAIN], GIVEN)], bs=32, num_workers=0)
    learn.meta_reweight.meta_dl = TfmdDL([(a, torch.tensor([float(b)])) for a,b in zip(X[TRUSTED], Y[TRUSTED])], bs=32, num_workers=0)
    message = r'calibrate=True is for models that give one number for each class.* \(32, 1\) float32.*use calibrate=False'
    with pytest.raises(ValueError, match=message): fit(learn, 1, 0.1)
    assert isinstance(learn.loss_func, nn.MSELoss) and learn.meta_reweight.this_fit is None

def test_mixed_examples_have_no_label_of_their_own():
    from fastai.losses import CrossEntropyLossFlat
    learn = make_learner([MixUp()], loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='calibrate=True asks whether the label of an item is right, and MixUp'): fit(learn, 1, 0.1)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)

def test_items_have_to_be_known():
    learn = make_learner()
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): yield from zip(X, torch.tensor(Y))
    learn.dls.loaders[0] = torch.utils.data.DataLoader(Stream(), batch_size=32)
    with pytest.raises(ValueError, match='calibrate=True needs to know which items are in a batch'): fit(learn, 1, 0.1)

def test_labels_that_are_no_class_are_left_out():
    seen = LabelQuality(3, 2)
    seen.see(torch.tensor([0, 1, 2]), torch.tensor([[1., 0], [0, 1], [0, 1]]), torch.tensor([0, -100, 1]))
    seen.judge(torch.tensor([[-0.1, -2.], [-2., -0.1]]), torch.tensor([0, 1]))
    assert seen.table().index.tolist() == [0, 2] and seen.weights(torch.tensor([1])).item() == 0
