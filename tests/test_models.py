"Every kind of model that fastai users train: the weights of a real fit against the oracle, by both engines."
import warnings

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CategoryBlock, DataBlock, DataLoaders, Learner, noop, set_seed
from fastai.callback.all import ProgressCallback
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (AWD_LSTM, BaseTokenizer, ColReader, TextBlock, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner,
    text_classifier_learner)
from fastai.vision.all import ImageBlock, MaskBlock, PILImage, PILMask, unet_learner, vision_learner, xresnet18
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision import models as tv

from fastai_l2rw.all import *
from conftest import Oracle, Seen, dot_products, tensors

def per_item(out, y): return F.cross_entropy(out, y.long().squeeze(1) if y.shape[1:] == (1,) else y.long(), reduction='none')

def images(size=32, n=24, channels=3):
    set_seed(0)
    x,y = torch.randn(n, channels, size, size),torch.arange(n) % 3
    dls = DataLoaders(tensors(x, y), tensors(x, y), tensors(x.flip(0), y.flip(0)))
    dls.c = 3
    return dls

def plain(model, dls=None, **kwargs): return Learner(images() if dls is None else dls, model, loss_func=nn.CrossEntropyLoss(), **kwargs)

# ---- the learners

def picture_block(mask=False):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(32)]
    masks = [rng.integers(0, 3, (32, 32), dtype=np.uint8) for _ in range(32)]
    return DataBlock((ImageBlock, MaskBlock([0, 1, 2]) if mask else CategoryBlock), get_x=lambda i: PILImage.create(pictures[i]),
        get_y=lambda i: PILMask.create(masks[i]) if mask else i % 3, splitter=lambda _: (list(range(16)), list(range(16, 24)), list(range(24, 32)))
        ).dataloaders(range(32), bs=8, num_workers=0)

def vision(**kwargs): return vision_learner(picture_block(), tv.resnet18, pretrained=False, normalize=False, **kwargs)

def frozen_vision():
    learn = vision()
    learn.freeze()
    return learn

def own_head(): return vision(custom_head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 3)))

def unet(**kwargs): return unet_learner(picture_block(mask=True), tv.resnet18, pretrained=False, normalize=False, n_out=3, **kwargs)

def tabular():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.choice(list('xyz'), 40), b=rng.normal(size=40), c=rng.normal(size=40), y=rng.choice(['no', 'yes'], 40)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['a'], cont_names=['b', 'c'], y_names='y', bs=16, valid_idx=range(8))
    dls.loaders.append(dls.valid)
    return tabular_learner(dls, layers=[20, 10], loss_func=CrossEntropyLossFlat())

def text_dls(is_lm):
    rng = np.random.default_rng(0)
    words = 'the cat sat on a mat and then the dog ran off to see what was up with it'.split()
    df = pd.DataFrame(dict(text=[' '.join(rng.choice(words, rng.integers(8, 15))) for _ in range(40)], label=rng.choice(['good', 'bad'], 40)))
    text = TextBlock.from_df('text', tok=BaseTokenizer(), n_workers=0, is_lm=is_lm, seq_len=7, min_freq=1)
    return DataBlock((text, ) if is_lm else (text, CategoryBlock), get_x=ColReader('text'), get_y=None if is_lm else ColReader('label'),
        splitter=lambda _: (list(range(24)), list(range(24, 32)), list(range(32, 40)))).dataloaders(df, bs=8)

def text_classifier():
    config = awd_lstm_clas_config | dict(emb_sz=12, n_hid=16, n_layers=2)
    return text_classifier_learner(text_dls(False), AWD_LSTM, config=config, pretrained=False, seq_len=6, loss_func=CrossEntropyLossFlat())

def language_model():
    config = awd_lstm_lm_config | dict(emb_sz=12, n_hid=16, n_layers=2)
    return language_model_learner(text_dls(True), AWD_LSTM, config=config, pretrained=False, alpha=2., beta=1.)

class Tied(nn.Module):
    "Embeds and predicts tokens with the same matrix."
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.out = nn.Embedding(9, 6),nn.GRU(6, 6, batch_first=True),nn.Linear(6, 9)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.rnn(self.emb(x))[0][:, -1])

class Unused(nn.Module):
    "A branch is taken only if the first pixel of the batch is large."
    def __init__(self): super().__init__(); self.body,self.used,self.unused = nn.Linear(48, 8),nn.Linear(8, 3),nn.Linear(8, 3)
    def forward(self, x):
        h = self.body(x.flatten(1)).tanh()
        return self.unused(h) if x.flatten()[0] > 1 else self.used(h)

class SeveralInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(5, 8),nn.Bilinear(8, 4, 3)
    def forward(self, x, z): return self.b(self.a(x).relu(), z)

class Sequences(nn.Module):
    def __init__(self, rnn): super().__init__(); self.emb,self.rnn,self.out = nn.Embedding(9, 8),rnn(8, 8, batch_first=True, dropout=0.3, num_layers=2),nn.Linear(8, 3)
    def forward(self, x): return self.out(self.rnn(self.emb(x))[0].mean(1))

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.layers,self.out = nn.Embedding(9, 8),nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),nn.Linear(8, 3)
    def forward(self, x): return self.out(self.layers(self.emb(x)).mean(1))

def tokens(n_classes=3):
    set_seed(0)
    x = torch.randint(9, (24, 6))
    y = x[:, 0] % n_classes
    return DataLoaders(tensors(x, y), tensors(x, y), tensors(x.flip(0), y.flip(0)))

def several_inputs():
    set_seed(0)
    data = lambda: TorchLoader(TensorDataset(torch.randn(24, 5), torch.randn(24, 4), torch.arange(24) % 3), 8)
    return DataLoaders(data(), data(), data())

def hugging_face():
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3, max_position_embeddings=8)
    class Dicts(torch.utils.data.Dataset):
        "As a tokenizer of transformers gives them, with a mask."
        def __len__(self): return 24
        def __getitem__(self, i):
            ids = torch.randint(9, (6,), generator=torch.Generator().manual_seed(i))
            return dict(input_ids=ids, attention_mask=(torch.arange(6) < 3 + i % 4).long()),i % 3
    class Classifier(nn.Module):
        def __init__(self): super().__init__(); self.bert = transformers.BertForSequenceClassification(config)
        def forward(self, inputs): return self.bert(**inputs).logits
    return plain(Classifier(), DataLoaders(*[TorchLoader(Dicts(), 8) for _ in range(3)]))

def timm_model(name, **kwargs):
    return plain(pytest.importorskip('timm').create_model(name, num_classes=3, **kwargs))

def pictures_for(model): return plain(model(num_classes=3))

LEARNERS = {
    'vision_learner, frozen': frozen_vision,
    'vision_learner, unfrozen': vision,
    'vision_learner, own head': own_head,
    'xresnet': lambda: plain(xresnet18(n_out=3)),
    'unet_learner': unet,
    'unet_learner, self-attention': lambda: unet(self_attention=True),
    'tabular_learner': tabular,
    'text_classifier_learner': text_classifier,
    'language_model_learner': language_model,
    'torchvision EfficientNet': lambda: pictures_for(tv.efficientnet_b0),
    'torchvision SqueezeNet': lambda: pictures_for(tv.squeezenet1_1),
    'torchvision DenseNet': lambda: plain(tv.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)),
    'torchvision Swin': lambda: plain(tv.SwinTransformer([2, 2], 12, [1, 1], [2, 2], [4, 4], num_classes=3)),
    'timm ConvNeXt': lambda: timm_model('convnext_atto', depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), drop_path_rate=0.1),
    'timm ViT': lambda: timm_model('vit_tiny_patch16_224', img_size=32, embed_dim=24, depth=2, num_heads=2),
    'Hugging Face BERT': hugging_face,
    'LSTM': lambda: plain(Sequences(nn.LSTM), tokens()),
    'GRU': lambda: plain(Sequences(nn.GRU), tokens()),
    'transformer encoder': lambda: plain(Encoder(), tokens()),
    'several inputs': lambda: plain(SeveralInputs(), several_inputs()),
    'tied weights': lambda: plain(Tied(), tokens(9)),
    'parameters that are not used': lambda: plain(Unused(), images(4)),
    'DataParallel': lambda: plain(nn.DataParallel(tv.resnet18(num_classes=3))),
}

OTHER_ENGINE = 'unet_learner','unet_learner, self-attention','text_classifier_learner','torchvision EfficientNet' # tangents can't follow the Learner's own pass there

@pytest.mark.parametrize('engine', ['auto', 'reverse'])
@pytest.mark.parametrize('name', LEARNERS)
def test_weights_in_a_fit(name, engine, tmp_path):
    set_seed(1)
    learn = LEARNERS[name]()
    learn.path,learn.logger = tmp_path,noop
    learn.remove_cbs(ProgressCallback)
    text = any(type(cb).__name__ == 'RNNCallback' for cb in learn.cbs)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', module='fastai_l2rw') # a normal run has no warning of ours
        learn.fit(1, 1e-3, cbs=[reweight := MetaReweightCallback(engine=engine, record=name != JOINED), oracle := Oracle((lambda out, y: text_losses(out, y)) if text else per_item), noted := Agreed()])
    assert set(noted.agreed) == {True} if engine == 'auto' and name not in OTHER_ENGINE else not any(noted.agreed)
    assert oracle.compared >= 2 and oracle.positive and oracle.varied
    assert reweight.routes.kind == ('reverse' if engine == 'reverse' else 'forward')
    assert all(p.isfinite().all() for p in learn.model.parameters())

JOINED = 'language_model_learner' # texts are joined, so nothing can be kept of single items, which a warning says

class Agreed(Callback):
    run_valid = False
    def before_fit(self): self.agreed = []
    def after_loss(self): self.agreed.append(self.learn.meta_reweight.step.route == 'own pass')

def text_losses(out, y):
    pred = out[0]
    return F.cross_entropy(pred.flatten(0, -2), y.flatten(), reduction='none')

def test_a_model_without_second_derivatives(tmp_path):
    "Its activation has a forward-mode derivative, but no double backward."
    def fit(engine):
        set_seed(1)
        learn = plain(tv.mobilenet_v3_small(num_classes=3, dropout=0.), path=tmp_path)
        learn.logger = noop
        learn.fit(1, 1e-3, cbs=[MetaReweightCallback(engine=engine), oracle := Oracle(per_item, dot_products)])
        return oracle
    assert fit('auto').compared == 3
    with pytest.raises(NotImplementedError, match="engine='reverse' can't be used: aten::hardsigmoid_backward has no derivative.*Use engine='forward'"): fit('reverse')

@pytest.mark.parametrize('name', LEARNERS)
def test_meta_weight_net_trains(name, tmp_path):
    set_seed(1)
    learn = LEARNERS[name]()
    learn.path,learn.logger = tmp_path,noop
    learn.remove_cbs(ProgressCallback)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', module='fastai_l2rw')
        learn.fit(1, 1e-3, cbs=[MetaWeightNetCallback(net_lr=0.1, record=name != JOINED), seen := Seen()])
    weights = [o.weights for o in seen.steps]
    assert len(weights) >= 2 and all(p.isfinite().all() for p in learn.model.parameters())
    assert all(abs(w.sum() - 1) < 1e-4 and w.std() > 0 for w in weights)
