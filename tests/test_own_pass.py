"Weights from the Learner's own pass: the same as by a pass with tangents, for whatever model; and what is left of it when something fails."
import gc, pickle, weakref
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai.basics import Callback, DataLoaders, Learner, SGD, noop, set_seed
from fastai.callback.all import GradientAccumulation, MixUp, ProgressCallback
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision import models as tv

import fastai_l2rw.weighers
from fastai_l2rw.all import *
from fastai_l2rw.reweight import rectify
from fastai_l2rw.engines.routes import Engine, along_output
from fastai_l2rw.engines.tape import OwnPass, Tape
from conftest import cnn, tensors

def timm_model(name, **kwargs): return pytest.importorskip('timm').create_model(name, num_classes=3, **kwargs)

class Own(nn.Module):
    "Its forward pass is a function of the module."
    def __init__(self, forward, **layers):
        super().__init__()
        for k,m in layers.items(): setattr(self, k, m)
        self.function = forward
    def forward(self, x): return self.function(self, x.flatten(1))

class Count(nn.Module):
    calls = 0
    def forward(self, x): type(self).calls += 1; return x + 0.1*torch.randn_like(x) if self.training else x

def param(*shape): return nn.Parameter(torch.randn(shape)/3)
def lin(ni=192, no=3): return nn.Linear(ni, no)
def body(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 8), nn.Dropout(0.3), nn.MaxPool2d(2), nn.Flatten())

def frozen_bn():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model[1].train = lambda mode=True: model[1]
    model[1].training,model[1].running_var = False,torch.rand(8) + 0.5
    return model

def one_frozen():
    model = nn.Sequential(body(), nn.Linear(72, 3))
    model[0][0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    return model

class Positions(nn.Module):
    "As a vision transformer, with a token for the class and a relative bias by an index that is a buffer."
    def __init__(self):
        super().__init__()
        self.cls,self.pos,self.bias,self.a,self.b = param(1, 1, 8),param(1, 17, 8),param(5, 2),nn.Linear(12, 8),nn.Linear(8, 3)
        self.register_buffer('index', torch.randint(5, (17,)))
        self.scale = nn.Parameter(torch.tensor(0.7))
    def forward(self, x):
        x = self.a(x.reshape(len(x), 16, 12))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        x = x + self.bias[self.index].mean(1)[None, :, None]*self.scale
        return self.b((x.tanh()*self.scale.exp()).mean(1))

class Words(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(9, 6, padding_idx=0),nn.Linear(6, 9); self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.emb((x[:, 0, 0]*4).abs().long().clamp(max=8)).mean(1))[:, :3]

class Checkpointed(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(192, 8),nn.Linear(8, 3)
    def forward(self, x): return self.b(checkpoint(lambda o: self.a(o).tanh(), x.flatten(1), use_reentrant=False))

def grown(m, x):
    features = [m.a(x)]
    features.append(m.b(torch.cat(features, 1)))
    return m.c(torch.cat(features, 1))

SHARED = {
    'plain CNN': lambda: nn.Sequential(body(), nn.Linear(72, 3)),
    'no bias': lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3, bias=False)),
    'grouped and transposed convolutions': lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding='same', padding_mode='circular'), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(1024, 3)),
    'frozen batch norm': frozen_bn,
    'some frozen': one_frozen,
    'instance norm': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.PReLU(), nn.Flatten(), nn.Linear(288, 3)),
    'layer norm with keywords': lambda: Own(lambda m, x: F.layer_norm(m.a(x), (3,), weight=m.n.weight, bias=m.n.bias), a=lin(), n=nn.LayerNorm(3)),
    'batch norm with keywords': lambda: Own(lambda m, x: F.batch_norm(m.a(x), None, None, bias=m.n.bias, weight=m.n.weight, training=True), a=lin(), n=nn.BatchNorm1d(3, track_running_stats=False)),
    'layer norm without bias': lambda: Own(lambda m, x: F.layer_norm(m.a(x), (3,), m.n.weight), a=lin(), n=nn.LayerNorm(3)),
    'weights as keywords': lambda: Own(lambda m, x: F.linear(input=x, weight=m.a.weight, bias=m.a.bias), a=lin()),
    'matrices by hand': lambda: Own(lambda m, x: (x @ m.a.weight.t() + m.a.bias).relu() @ m.b, a=lin(no=5), b=param(5, 3)),
    'parameters in a list': lambda: Own(lambda m, x: torch.einsum('ni,ji,kj->nk', x, m.a.weight, m.b), a=lin(no=5), b=param(3, 5)),
    'the same layer twice': lambda: Own(lambda m, x: m.c(m.b(m.b(m.a(x)).tanh())), a=lin(no=5), b=lin(5, 5), c=lin(5)),
    'rows for each example': lambda: Own(lambda m, x: m.b(m.a(x.reshape(-1, 12)).relu()).reshape(len(x), 16, 3).mean(1), a=lin(12, 8), b=lin(8)),
    'positions and scales': Positions,
    'tied embedding': Words,
    'timm ConvNeXt': lambda: nn.Sequential(nn.Upsample(scale_factor=4), timm_model('convnext_atto', depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), drop_path_rate=0.3)),
    'timm ViT': lambda: timm_model('vit_tiny_patch16_224', img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, attn_drop_rate=0.2),
    'torchvision ConvNeXt': lambda: tv.ConvNeXt([tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)], stochastic_depth_prob=0.5, num_classes=3),
    'torchvision Swin': lambda: tv.SwinTransformer([2, 2], 12, [1, 1], [2, 2], [2, 2], num_classes=3),
    'batch norm': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.Linear(128, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    'batch norm without momentum': lambda: nn.Sequential(nn.Flatten(), lin(), nn.BatchNorm1d(3, momentum=None)),
    'centered': lambda: Own(lambda m, x: m.b(m.a(x).tanh() - m.a(x).tanh().mean(0)), a=lin(no=5), b=lin(5)),
    'sequence first': lambda: Own(lambda m, x: m.b(m.a(x.reshape(len(x), 24, 8).transpose(0, 1)).tanh()).mean(0), a=lin(8, 8), b=lin(8)),
    'LSTM': lambda: Own(lambda m, x: m.b(m.a(x.reshape(len(x), 16, 12))[0].mean(1)), a=nn.LSTM(12, 6, 2, batch_first=True, dropout=0.3), b=lin(6)),
    'multi-head attention': lambda: Own(lambda m, x: m.b(m.a(*[x.reshape(len(x), 16, 12)]*3)[0].mean(1)), a=nn.MultiheadAttention(12, 2, dropout=0.2, batch_first=True), b=lin(12)),
    'spectral norm': lambda: Own(lambda m, x: m.b(m.a(x).relu()), a=spectral_norm(lin(no=5)), b=lin(5)),
    'parameters past autograd': lambda: Own(lambda m, x: m.b(m.a(x)*m.a.weight.data.norm()), a=lin(no=5), b=lin(5)),
    'a branch that the loss ignores': lambda: Own(lambda m, x: (m.b(m.a(x)), m.c(m.a(x)))[0], a=lin(no=5), b=lin(5), c=lin(5)),
    'sums and products': lambda: Own(lambda m, x: (2*m.a(x) + m.c + 1)*(1.5 + m.b(x))*m.c*3 + m.d, a=lin(), b=lin(), c=param(1, 3), d=param(3)),
    'sums in place': lambda: Own(lambda m, x: (m.a(x).add_(m.b(x)).__iadd__(m.c)).relu_(), a=lin(), b=lin(), c=param(3)),
    'activations': lambda: Own(lambda m, x: sum(f(m.a(x)) for f in (F.silu, F.gelu, F.hardswish, F.relu6, F.leaky_relu, F.elu, F.mish, torch.sigmoid, torch.tanh, F.softplus, F.selu)), a=lin()),
    'activations in place': lambda: Own(lambda m, x: sum(f(m.a(x), inplace=True) for f in (F.silu, F.hardswish, F.relu6, F.leaky_relu, F.elu, F.mish, F.relu, F.hardsigmoid)), a=lin()),
    'kinds of dropout': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.3), nn.Dropout(0.3, inplace=True), nn.ReLU(), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), nn.Flatten(), nn.Linear(288, 3), nn.Dropout(0.)),
    'pooling': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 1, padding=1), nn.MaxPool2d(2, ceil_mode=True), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)),
    'a list that grows': lambda: Own(grown, a=lin(no=5), b=lin(5, 5), c=lin(10)),
    'iterated': lambda: Own(lambda m, x: sum(m.b(r) for r in m.a(x.reshape(len(x), 4, 48)).transpose(0, 1)), a=lin(48, 5), b=lin(5)),
    'torchvision DenseNet': lambda: tv.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3),
    'torchvision ResNet': lambda: tv.resnet18(num_classes=3),
    'torchvision SqueezeNet': lambda: nn.Sequential(nn.Upsample(scale_factor=4), tv.squeezenet1_1(num_classes=3)),
}

class JVP(torch.autograd.Function):
    "Has a derivative in forward mode, too."
    @staticmethod
    def forward(x): return x**3
    @staticmethod
    def setup_context(ctx, inputs, output): ctx.save_for_backward(*inputs); ctx.save_for_forward(*inputs)
    @staticmethod
    def backward(ctx, g): return 3*ctx.saved_tensors[0]**2*g
    @staticmethod
    def jvp(ctx, dx): return 3*ctx.saved_tensors[0]**2*dx

def set_item(m, x):
    out = torch.zeros(len(x), 5)
    out[:, 1:] = m.a(x)[:, 1:]
    return m.b(out)

NOT_SHARED = {
    'a function of its own': lambda: Own(lambda m, x: m.b(JVP.apply(m.a(x))), a=lin(no=5), b=lin(5)),
    'part by a function of its own': lambda: Own(lambda m, x: m.b(m.a(x).tanh() + JVP.apply(m.a(x))), a=lin(no=5), b=lin(5)),
    'at the end a function of its own': lambda: Own(lambda m, x: JVP.apply(m.a(x)), a=lin()),
    'set an item': lambda: Own(set_item, a=lin(no=5), b=lin(5)),
    'in place without a rule': lambda: Own(lambda m, x: m.b(m.a(x).mul_(m.c)), a=lin(no=5), b=lin(5), c=param(5)),
    'dropout in place on a view': lambda: Own(lambda m, x: m.b(F.dropout(m.a(x).view(-1, 5), 0.3, m.training, True)), a=lin(no=5), b=lin(5)),
    'checkpointed': Checkpointed,
}

class Note(Callback):
    "Keeps the weights of each step, and whether they come from the Learner's own pass."
    run_valid = False
    def before_fit(self): self.noted,self.agreed = [],[]
    def after_loss(self):
        step = self.learn.meta_reweight.step
        self.noted.append(step and step.weights)
        self.agreed.append(step is not None and step.route == 'own pass')

def fit(tmp_path, make_model, *cbs, epochs=2, dtype=torch.float32, **kwargs):
    set_seed(0)
    x,y = torch.randn(22, 3, 8, 8, dtype=dtype),torch.arange(22) % 3
    dls = DataLoaders(TorchLoader(TensorDataset(x, y), 8), tensors(x, y), tensors(x.flip(0), y.flip(0))) # the last batch is smaller
    set_seed(1)
    learn = Learner(dls, make_model().to(dtype), loss_func=CrossEntropyLossFlat(), opt_func=SGD, path=tmp_path, cbs=[MetaReweightCallback(**kwargs), Note(), *cbs])
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    learn.fit(epochs, 0.05)
    assert not _get_current_function_mode_stack() and not learn.model._forward_hooks and not learn.model._forward_pre_hooks
    return learn

def assert_same(a, b):
    for v,w in zip(a.note.noted, b.note.noted, strict=True): assert v is w is None or torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5) is None
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert any(w is not None and len(w.unique()) > 1 for w in a.note.noted)

@pytest.mark.parametrize('name', SHARED)
def test_the_weights_are_those_of_a_pass_with_tangents(tmp_path, name):
    shared,separate = fit(tmp_path, SHARED[name]),fit(tmp_path, SHARED[name], engine='forward')
    assert all(shared.note.agreed) and not any(separate.note.agreed)
    assert_same(shared, separate)

@pytest.mark.parametrize('name', NOT_SHARED)
def test_a_model_that_is_not_seen_through_gets_the_other_engine(tmp_path, name):
    dtype = torch.float64 if name == 'a function of its own' else torch.float32 # its numbers grow large
    shared,separate = [fit(tmp_path, NOT_SHARED[name], dtype=dtype, **o) for o in ({}, dict(engine='forward'))]
    assert not any(shared.note.agreed)
    assert_same(shared, separate)

def test_operators_without_forward_derivatives(tmp_path):
    model = lambda: Own(lambda m, x: m.b(m.a(x).relu()), a=weight_norm(lin(no=5)), b=lin(5))
    with pytest.warns(UserWarning, match="engine='reverse'"): shared = fit(tmp_path, model)
    separate = fit(tmp_path, model, engine='reverse')
    assert not any(shared.note.agreed)
    assert_same(shared, separate)

@pytest.mark.parametrize('kwargs', [dict(lookahead='opt', every=2), dict(relative=True), dict(margin=1., start=1), dict(params=lambda m: m[0].parameters())], ids=lambda o: ' '.join(o))
@pytest.mark.parametrize('cbs', [(), (MixUp,), (partial(GradientAccumulation, 16),)], ids=['', 'MixUp', 'accumulation'])
def test_with_options_and_callbacks(tmp_path, kwargs, cbs):
    make_model = SHARED['plain CNN']
    a,b = [fit(tmp_path, make_model, *[cb() for cb in cbs], **kwargs, **more) for more in ({}, dict(engine='forward'))]
    assert a.note.agreed[-1] and not any(b.note.agreed)
    assert_same(a, b)

class Blind(nn.Module):
    "Something goes unseen: what it adds has a history, but not for the tape."
    def __init__(self): super().__init__(); self.a,self.b = lin(no=5),nn.Linear(5, 3)
    def forward(self, x):
        h = self.a(x.flatten(1))
        with torch._C.DisableTorchFunction(): h = h.tanh()
        return self.b(h)

def test_what_the_first_batch_hides(tmp_path):
    "As long as the last layer is zero, the losses do not depend on the layers before, of which a part goes unseen."
    def model():
        m = Blind()
        nn.init.zeros_(m.b.weight)
        return m
    for params in (None, lambda m: [p for p in m.parameters() if p is not m.b.bias]): # in the second case, a history that is not known says nothing
        shared,separate = [fit(tmp_path, model, engine=engine, params=params) for engine in ('auto', 'forward')]
        assert not any(shared.note.agreed[1:])
        assert_same(shared, separate)

def test_it_is_compared_again(tmp_path, monkeypatch):
    steps,after_pass = [],Engine.after_pass
    def noted(engine, *args):
        before = engine.compared
        found = after_pass(engine, *args)
        steps.append(engine.compared > before)
        return found
    monkeypatch.setattr(Engine, 'after_pass', noted)
    for _ in range(2):
        fit(tmp_path, SHARED['plain CNN'], epochs=7)
        assert [i for i,compared in enumerate(steps) if compared] == [0, 1, 4, 16]
        steps.clear()

def test_the_model_runs_once_less(tmp_path):
    def calls(**kwargs):
        Count.calls = 0
        fit(tmp_path, lambda: nn.Sequential(Count(), body(), nn.Linear(72, 3)), epochs=1, **kwargs)
        return Count.calls
    assert calls(engine='forward') - calls() == 3 # in three steps

def test_a_second_pass_in_a_step(tmp_path):
    "A callback has the model run on something else before and after: its pass is not taken for the Learner's."
    class Peek(Callback):
        order,run_valid = 200,False
        def before_batch(self): self.model(torch.zeros_like(self.x))
        def after_pred(self): self.model(torch.zeros_like(self.x))
    a,b = [fit(tmp_path, lambda: nn.Sequential(body()[:3], nn.Flatten(), nn.Linear(288, 3)), Peek(), engine=engine) for engine in ('auto', 'forward')]
    assert all(a.note.agreed)
    assert_same(a, b)

def test_a_pass_that_becomes_unsure_later(tmp_path):
    "From the second batch on, the model does something that is not seen."
    class Later(Callback):
        run_valid = False
        def before_batch(self): self.model.late = self.iter > 0
    def model(): return Own(lambda m, x: m.b(JVP.apply(m.a(x)) if getattr(m, 'late', False) else m.a(x)**3), a=lin(no=5), b=lin(5))
    shared,separate = [fit(tmp_path, model, Later(), engine=engine) for engine in ('auto', 'forward')]
    assert shared.note.agreed[0] and not shared.note.agreed[-1]
    assert_same(shared, separate)

def test_mixed_precision_is_left_to_the_other_engine(tmp_path):
    class Autocast(Callback):
        run_valid = False
        def before_batch(self): self.context = torch.autocast('cpu', torch.bfloat16); self.context.__enter__()
        def after_pred(self): self.context.__exit__(None, None, None); self.learn.pred = self.pred.float()
    a,b = [fit(tmp_path, lambda: nn.Sequential(nn.Flatten(), lin()), Autocast(), engine=engine) for engine in ('auto', 'forward')]
    assert not any(a.note.agreed)
    assert_same(a, b)

@pytest.mark.parametrize('event', ['forward', 'after_pred', 'after_loss', 'before_batch'])
def test_an_error_leaves_a_usable_learner(make_learner, event):
    class Fails(nn.Module):
        fail = False
        def forward(self, x):
            if self.fail and self.training and torch.is_grad_enabled() and x.requires_grad: raise RuntimeError('stop')
            return x
    learn = make_learner(MetaReweightCallback(), model=nn.Sequential(nn.Conv2d(1, 4, 3), fails := Fails(), nn.Flatten(), nn.Linear(144, 4)))
    def fail(self):
        if self.training and self.iter == 2: raise RuntimeError('stop')
    def arm(self): fails.fail = self.training and self.iter == 2 and event == 'forward'
    for order in (-200, 200):
        cb = Callback(**{event: fail}) if event != 'forward' else Callback(before_batch=arm)
        cb.order = order
        with pytest.raises(RuntimeError, match='stop'): learn.fit(1, cbs=cb)
        fails.fail = False
        assert not _get_current_function_mode_stack()
        learn.export()
        learn.validate()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
        learn.fit(1)

def test_nan_is_named_before_the_optimizer_steps(make_learner):
    learn = make_learner(MetaReweightCallback(), model=cnn(bn=False))
    def poison(self):
        if self.training and self.iter == 1: self.learn.xb[0][3, 0, 0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match=r'batch 1 of the training loader .* in its item\(s\) \[3\]'): learn.fit(1, cbs=Callback(before_batch=poison))
    assert all(p.isfinite().all() for p in learn.model.state_dict().values())

def test_an_error_after_the_pass_leaves_the_buffers(make_learner):
    learn = make_learner(MetaReweightCallback())
    states = []
    with pytest.MonkeyPatch.context() as patch:
        def rectified(u):
            if learn.iter == 2: raise KeyboardInterrupt
            return rectify(u)
        patch.setattr(fastai_l2rw.weighers, 'rectify', rectified)
        cb = Callback(before_batch=lambda self: states.append(deepcopy(self.model.state_dict())))
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=cb)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, states[-1][k]), k
    assert len(states) == 3 and not torch.equal(states[0]['0.0.1.running_mean'], states[2]['0.0.1.running_mean'])

def test_nothing_of_a_step_is_kept(make_learner):
    "The graph of a pass dies with its step, not when Python collects cycles."
    graphs = []
    class Watch(Callback):
        order,run_valid = 300,False
        def after_pred(self): graphs.append(weakref.ref(self.model.kept))
        def after_batch(self): del self.model.kept
    class Keeps(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            if self.training and out.requires_grad: self.kept = out*1
            return out
    learn = make_learner([MetaReweightCallback(), Watch()], model=Keeps(*cnn(bn=False)))
    gc.disable()
    try: learn.fit(1)
    finally: gc.enable()
    assert len(graphs) == len(learn.dls.train) and all(o() is None for o in graphs)

def test_a_note_that_fails_does_not_fail_the_model(tmp_path, monkeypatch):
    def fail(*args): raise RuntimeError('a tensor of another kind')
    monkeypatch.setattr(Tape, '_note', fail)
    shared,separate = fit(tmp_path, SHARED['plain CNN']),fit(tmp_path, SHARED['plain CNN'], engine='forward')
    assert not any(shared.note.agreed)
    assert_same(shared, separate)

def test_activations_are_let_go(make_learner):
    alive = []
    class Spy(nn.Module):
        def forward(self, x):
            if x.requires_grad: alive.append(weakref.ref(x))
            return x.tanh()
    learn = make_learner(MetaReweightCallback(), model=nn.Sequential(nn.Conv2d(1, 4, 3), Spy(), nn.Flatten(), nn.Linear(144, 4)))
    counts = []
    gc.disable()
    try: learn.fit(1, cbs=Callback(after_batch=lambda self: counts.append(sum(o() is not None for o in alive)) if self.training else None))
    finally: gc.enable()
    assert alive and not any(counts)

def test_a_copy_of_a_watched_model_is_not_watched():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x = torch.randn(2, 4)
    watched = OwnPass(model, dict(model.named_parameters()), (x,))
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copy(x), model[1](model[0](x))) and not watched.seen
    model(torch.randn(2, 4))
    assert not watched.seen
    watched.take_down()
    watched = OwnPass(model, dict(model.named_parameters()), (x,))
    model(x)
    assert watched.seen and not watched.doubt and not model._forward_hooks
    watched.take_down()

class Used(nn.Module):
    "What a convolution, a batch norm and a sum give is used once or twice, in whatever order."
    def __init__(self, forward):
        super().__init__()
        self.a,self.b,self.bn,self.bn2,self.head = nn.Conv2d(3, 4, 3, padding=1),nn.Conv2d(4, 4, 3, padding=1),nn.BatchNorm2d(4),nn.BatchNorm2d(4),nn.Linear(4, 3)
        self.function = forward
    def forward(self, x): return self.head(self.function(self, x).mean((2, 3)))

def both_norms(m, x): y = m.a(x); return m.bn(y)*m.bn2(y)
def before_and_after(m, x): y = m.a(x); z = m.bn(y); return z*y + z
def to_itself(m, x): y = m.bn(m.a(x)); return (y + y)*(m.b(y) + y)
def residual(m, x): y = m.bn(m.a(x)); z = m.bn2(m.b(y)); z += y; return z.tanh()*y
def second_is_spare(m, x): y = m.bn(m.a(x)); return (y + m.bn2(m.b(y)))*(1. + m.b(y))
def view_of_it(m, x): y = m.a(x); z = y.flatten(2); return m.bn(y)*z.view_as(y)
def broadcast(m, x): y = m.bn(m.a(x)); return m.bn2(m.b(y).mean((2, 3), keepdim=True)) + y
def returned_too(m, x): y = m.a(x); m.seen = y; return m.bn(y).relu_() + m.bn2(m.b(x[:, :1].expand(-1, 4, -1, -1)))

@pytest.mark.parametrize('forward', [both_norms, before_and_after, to_itself, residual, second_is_spare, view_of_it, broadcast, returned_too])
def test_tangents_take_the_place_of_none_that_is_still_needed(forward):
    torch.manual_seed(0)
    model = Used(forward).double()
    for p in model.parameters(): nn.init.normal_(p)
    batch,loss_func = (torch.randn(5, 3, 6, 6).double(), torch.tensor([0, 1, 2, 0, 1])),nn.CrossEntropyLoss(reduction='none')
    v = {k: torch.randn_like(p) for k,p in model.named_parameters()}
    before = deepcopy(v)
    expected = alignment(model, loss_func, batch, v)
    watched = OwnPass(model, dict(model.named_parameters()), batch[:1])
    losses = loss_func(model(batch[0]), batch[1])
    for _ in range(2):
        u = along_output(losses, watched, v)
        assert not watched.doubt and torch.allclose(u, expected, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(v[k], before[k]) for k in v)
    watched.take_down()
