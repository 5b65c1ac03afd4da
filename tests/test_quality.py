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
from fastai_l2rw.quality import LabelQuality, label_quality, sharpness, true_classes
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
        self.steps.append(dict(epoch=self.epoch, items=s.items, weights=s.weights.clone(), u=s.alignments.clone(),
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
    learn = fit(make_learner([spy, Trusted()], p=0.), 2, 0.1)
    first,second = [[s for s in spy.steps if s['epoch'] == e] for e in (0, 1)]
    for s in first: # the paper's
        w = s['u'].clamp(min=0)
        torch.testing.assert_close(s['weights'], w/w.sum(), rtol=1e-4, atol=1e-6)
    items,said,y = [torch.cat([s[k] for s in first]) for k in ('items','output','y')]
    assert len(set(items.tolist())) == 300
    a = sharpness(kept['said'], torch.tensor(Y[TRUSTED]))
    q = em((a*said.double().log_softmax(1)).exp().numpy(), y.tolist(), 0.6, 5., 50)[np.arange(300), y]
    believed = 1 - (1 - q.mean())*5/(5 + 3)
    assert 0.3 < q.mean() < 0.95
    r = torch.zeros(300)
    r[items] = torch.tensor(q/np.bincount(y, weights=q)[y], dtype=torch.float32)
    for s in second:
        wr,wa = r[s['items']],s['u'].clamp(min=0)
        torch.testing.assert_close(s['weights'], believed*wr/wr.sum() + (1 - believed)*wa/wa.sum(), rtol=2e-3, atol=2e-5)

def test_wrong_labels_are_found():
    learn = fit(make_learner(), 12, 0.1)
    found = learn.meta_reweight.label_quality()
    assert found.index.tolist() == list(range(300)) and found.label_quality.between(0, 1).all()
    auc = roc_auc_score(WRONG, -found.label_quality)
    weights = learn.meta_reweight.item_weights().weight
    assert auc > 0.93 and auc > roc_auc_score(WRONG, -weights[found.index]) - 0.02
    assert abs(found.label_quality.mean() - (~WRONG).mean()) < 0.1
    right = found.suggested.to_numpy() == Y[TRAIN]
    assert right[WRONG].mean() > 0.7 and right[~WRONG].mean() > 0.85
    table = MetaInterpretation.from_learner(learn).table('label_quality')
    assert table.label_quality.tolist() == sorted(found.label_quality)
    df = learn.meta_reweight.calibration()
    assert len(df) == 40 and df.right.sum() == 20 and roc_auc_score(df.right, df.quality) > 0.9
    assert MetaInterpretation.from_learner(learn).plot_quality().get_ylabel()

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

def test_judging_moves_nothing():
    "Neither the random stream, nor the model's mode and buffers, nor the order of trusted batches."
    streams = []
    class Stream(Callback):
        order = 10000
        def after_epoch(self): streams.append(torch.get_rng_state().clone())
    def end(calibrate):
        learn = make_learner([Stream()], calibrate=calibrate)
        learn.model.append(nn.BatchNorm1d(4, affine=False))
        fit(learn, 1, 0.1)
        return learn.model.state_dict()
    one,other = end(True),end(False) # in the first epoch the weights are the same
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

@pytest.mark.parametrize('options', [dict(skip_zeros=True), dict(every=2), dict(relative=True), dict(smooth=0.5), dict(margin=0.5),
    dict(lookahead='opt'), dict(engine='reverse'), dict(start=1), dict(record=False), dict(params=lambda m: m[-1].parameters())], ids=lambda o: next(iter(o)))
def test_other_options_go_with_it(options):
    learn = make_learner(**options)
    found = fit(learn, 8, 0.1).meta_reweight.label_quality()
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
