"Small real data and Learners for the tests: the handwritten digits that scikit-learn ships."
import random
import pytest, torch
from fastai.basics import CategoryBlock, DataBlock, Learner, TransformBlock, accuracy, noop, params, set_seed
from fastai.callback.all import ProgressCallback
from fastai.layers import ConvLayer, NormType
from fastai.losses import CrossEntropyLossFlat
from fasttransform import ItemTransform
from torch import nn
from sklearn.datasets import load_digits

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
