"Small real data and Learners for the tests: the handwritten digits that scikit-learn ships."
import random, warnings
from copy import deepcopy
from types import SimpleNamespace
import pytest, torch
from fastai.basics import Callback, CategoryBlock, DataBlock, Learner, TransformBlock, accuracy, noop, params, set_seed
from fastai.callback.all import ProgressCallback
from fastai.layers import ConvLayer, NormType
from fastai.losses import CrossEntropyLossFlat
from fasttransform import ItemTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from sklearn.datasets import load_digits

from fastai_l2rw.all import MetaReweightCallback, normalise, rectify, unrolled_weights

SLOW = ('callbacks', 'checked', 'data_cifar10', 'data_core', 'data_folders', 'data_ham10000', 'demo', 'docs', 'experiments',
    'faults', 'interpret', 'ledger', 'mistakes', 'models', 'params', 'project', 'ranks', 'readme', 'report', 'skip_zeros')

def pytest_collection_modifyitems(items):
    """The fast set for daily work, `pytest -m 'not slow'`, has what compares weights with independent computations. It leaves these
    files out, and the engines that are asked for in the file with the most comparisons."""
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        asked_for = item.path.stem == 'test_right' and params.get('engine') in ('forward', 'reverse')
        if asked_for or item.path.stem.removeprefix('test_') in SLOW: item.add_marker(pytest.mark.slow)

torch.set_num_threads(1) # threads are no gain for tensors this small, and a loss on a busy machine

digits = load_digits(n_class=4)
images,labels = torch.tensor(digits.images, dtype=torch.float32)[:, None]/16, digits.target
parts = [list(range(i, len(labels), 12))[:60] + extra for i,extra in ((0, list(range(1, 240, 12))), (2, []), (4, []))]
train,valid,meta = parts[0], parts[1], parts[2][:24]

class Augment(ItemTransform):
    "Augmentation that draws from PyTorch's and Python's random streams."
    split_idx = 0
    def encodes(self, b):
        x,y = b
        return (x.flip(-1) if random.random() < 0.5 else x) + 0.1*torch.randn_like(x),y

def make_dls(n_parts=3, bs=16, batch_tfms=None):
    set_seed(0)
    block = DataBlock((TransformBlock, CategoryBlock), splitter=lambda _: (train, valid, meta)[:n_parts],
        get_x=lambda i: images[i], get_y=lambda i: f'digit {labels[i]}', batch_tfms=batch_tfms)
    return block.dataloaders(range(len(labels)), bs=bs, num_workers=0)

def cnn(bn=True, p=0.2, n_out=4):
    norm = NormType.Batch if bn else None
    return nn.Sequential(nn.Sequential(ConvLayer(1, 8, norm_type=norm), ConvLayer(8, 16, stride=2, norm_type=norm)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p), nn.Linear(16, n_out)))

def split(model): return [params(model[0]), params(model[1])]

@pytest.fixture
def dls(): return make_dls()

@pytest.fixture
def make_learner(tmp_path):
    def make(cbs=None, dls=None, model=None, loss_func=None, metrics=accuracy, **kwargs):
        if dls is None: dls = make_dls()
        set_seed(1)
        learn = Learner(dls, cnn() if model is None else model, loss_func=CrossEntropyLossFlat() if loss_func is None else loss_func,
            metrics=metrics, cbs=cbs, path=tmp_path, **kwargs)
        learn.remove_cbs(ProgressCallback)
        learn.logger = noop
        return learn
    return make

def tensors(*data, bs=8): return TorchLoader(TensorDataset(*data), bs, drop_last=True)

class Oracle(Callback):
    "Computes the weights of each step anew, by differentiating through the look-ahead."
    order = 10001 # after ours: the random stream and the model are as our callback found them
    run_valid = False
    def __init__(self, per_item, weights=unrolled_weights): self.per_item,self.weights = per_item,weights
    def before_fit(self): self.compared = self.positive = self.varied = 0
    def before_batch(self):
        cb = self.learn.meta_reweight
        model = getattr(self.model, 'module', self.model)
        batch,meta_batch = [[[o.as_subclass(Tensor) if isinstance(o, Tensor) else o for o in part] for part in b] for b in (cb.step.batch, cb.step.meta_batch)]
        lrs = {p: h['lr'] for ps,h in zip(self.opt.param_lists, self.opt.hypers) for p in ps}
        rates = {k: lrs[p] for k,p in model.named_parameters() if p.requires_grad}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            self.expected = self.weights(model, self.per_item, tuple(map(tuple, batch)), tuple(map(tuple, meta_batch)), params=list(rates), step_size=rates)
    def after_loss(self):
        got,expected = self.learn.meta_reweight.step.weights,self.expected
        assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-7, (got, expected)
        self.compared += 1
        self.positive += (got > 0).sum().item()
        self.varied += len(got.unique()) > 1

class Seen(Callback):
    "Keeps what can be read of each training step."
    order,run_valid = 300,False
    def before_fit(self): self.steps = []
    def after_loss(self):
        cb = next(cb for cb in self.learn.cbs if isinstance(cb, MetaReweightCallback))
        if cb.step is not None: self.steps.append(SimpleNamespace(**{k: getattr(cb.step, k) for k in ('weights','alignments','items','meta_batch','route','epoch')}))

def dot_products(model, loss_func, batch, meta_batch, params, step_size):
    "Weights by one ordinary backward pass for each example; for models of which PyTorch has no second derivative, and without randomness."
    model = deepcopy(model)
    named = {k: p for k,p in model.named_parameters() if k in params}
    def gradient(loss): return torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True, allow_unused=True)
    meta = gradient(loss_func(model(*meta_batch[0]), *meta_batch[1]).mean())
    losses = loss_func(model(*batch[0]), *batch[1])
    return normalise(rectify(torch.stack([sum(step_size[k]*(a*b).sum() for k,a,b in zip(named, meta, gradient(l))) for l in losses])))
