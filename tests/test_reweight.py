"The algorithm against independent computations, and the traces that it must not leave."
import copy, random
import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from fastai_l2rw.reweight import *

cross_entropy = nn.CrossEntropyLoss(reduction='none')

def images(n, size=8): return torch.randn(n, 3, size, size), torch.randint(0, 4, (n,))
def sequences(n): return torch.randn(n, 6, 16), torch.randint(0, 4, (n,))

class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm,self.head = nn.LSTM(16, 12, num_layers=2, batch_first=True, dropout=0.3), nn.Linear(12, 4)
    def forward(self, x): return self.head(self.lstm(x)[0][:, -1])

class TransformerClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.encoder,self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)
    def forward(self, x): return self.head(self.encoder(x).mean(1))

def cnn(*extra):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), *extra, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

models = dict(
    mlp=(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 4)), images),
    cnn=(cnn, images),
    resnet18=(lambda: resnet18(num_classes=4), lambda n: images(n, 32)),
    dropout=(lambda: cnn(nn.Dropout2d(0.3), nn.Dropout(0.3)), images),
    transformer=(TransformerClassifier, sequences),
    lstm=(LSTMClassifier, sequences),
)

def setting(kind, dtype=torch.float32, n=16, m=6):
    "A model in training mode, a training batch and a trusted batch."
    torch.manual_seed(0)
    make_model,make_data = models[kind]
    model = make_model().to(dtype).train()
    batches = [(x.to(dtype), y) for x,y in (make_data(n), make_data(m))]
    return model,*batches

def relative_difference(a, b): return ((a - b).abs().max() / b.abs().max()).item()

# ---- exactness

@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize('engine', ['forward', 'reverse'])
@pytest.mark.parametrize('kind', models)
def test_engines_equal_the_paper_taken_literally(kind, engine, dtype, tolerance):
    model,batch,meta_batch = setting(kind, dtype)
    expected = unrolled_weights(model, cross_entropy, batch, meta_batch)
    weights = example_weights(model, cross_entropy, batch, meta_batch, engine=engine)
    assert weights.dtype == dtype and (weights > 0).sum() > 1
    assert relative_difference(weights, expected) < tolerance

@pytest.mark.parametrize('kind', models)
def test_alignment_is_the_inner_product_of_gradients(kind):
    """One ordinary backward pass per example, through the model as it is. In a batch norm an example's loss depends on the whole
    batch, so it stays in one piece. The trusted batch's dropout masks are its own, so that part runs without dropout."""
    model,(x,y),(xm,ym) = setting(kind, torch.float64)
    dropout = [m for m in model.modules() if 'Dropout' in type(m).__name__ or 'Attention' in type(m).__name__ or isinstance(m, nn.LSTM)]
    params = list(model.parameters())
    for m in dropout: m.eval()
    v = torch.autograd.grad(F.cross_entropy(model(xm), ym), params)
    direction,loss = meta_gradient(model, cross_entropy, (xm, ym))
    assert torch.allclose(loss, F.cross_entropy(model(xm), ym))
    assert all(torch.allclose(a, b) for a,b in zip(v, direction.values()))
    if kind != 'lstm': model.train() # PyTorch's own kernels draw the masks between its layers differently
    state = torch.get_rng_state()
    losses = cross_entropy(model(x), y)
    torch.set_rng_state(state)
    expected = torch.stack([sum((a*b).sum() for a,b in zip(v, torch.autograd.grad(l, params, retain_graph=True))) for l in losses])
    for engine in ('forward', 'reverse'):
        assert relative_difference(alignment(model, cross_entropy, (x, y), direction, engine), expected) < 1e-10

def test_finite_differences_of_a_literal_step():
    "Weigh one example a little more, take the step with torch.optim, look at the trusted loss."
    model,(x,y),(xm,ym) = setting('mlp', torch.float64)
    lr,h = 0.1,1e-4
    def trusted_loss_after(epsilon):
        stepped = copy.deepcopy(model)
        (epsilon * cross_entropy(stepped(x), y)).sum().backward()
        torch.optim.SGD(stepped.parameters(), lr).step()
        return F.cross_entropy(stepped(xm), ym).item()
    unit = torch.eye(len(x), dtype=torch.float64)
    u = torch.tensor([-(trusted_loss_after(h*e) - trusted_loss_after(-h*e)) / (2*h) for e in unit], dtype=torch.float64)
    direction = scale_gradient(meta_gradient(model, cross_entropy, (xm, ym))[0], lr)
    assert relative_difference(alignment(model, cross_entropy, (x, y), direction), u) < 1e-6

def test_spectral_norm():
    "Its power iteration runs under no_grad and updates a buffer in place."
    torch.manual_seed(0)
    model = cnn(nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))).double()
    batch,meta_batch = [(x.double(), y) for x,y in (images(8), images(6))]
    expected = unrolled_weights(model, cross_entropy, batch, meta_batch)
    for engine in ('forward', 'reverse'):
        assert relative_difference(example_weights(model, cross_entropy, batch, meta_batch, engine=engine), expected) < 1e-10

def test_no_grad_in_a_model_stops_tangents_too():
    "Forward mode by itself goes through it."
    class Normed(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(16, 8), nn.Linear(8, 4)
        def forward(self, x):
            h = torch.tanh(self.a(x.mean(1)))
            with torch.no_grad(): size = h.abs().mean(1, keepdim=True)
            return self.b(h/size)
    torch.manual_seed(0)
    model = Normed().double()
    batch,meta_batch = [(x.double(), y) for x,y in (sequences(8), sequences(6))]
    expected = unrolled_weights(model, cross_entropy, batch, meta_batch)
    for engine in ('forward', 'reverse'):
        assert relative_difference(example_weights(model, cross_entropy, batch, meta_batch, engine=engine), expected) < 1e-10

@pytest.mark.parametrize('affine,moves', [(True, ('weight','bias')), (True, ('weight',)), (True, ('bias',)), (True, ()), (False, ())])
@pytest.mark.parametrize('norm,shape', [(nn.BatchNorm1d, (8, 3)), (nn.BatchNorm1d, (8, 3, 4)), (nn.BatchNorm2d, (4, 3, 5, 2)), (nn.BatchNorm2d, (4, 3, 1, 1)), (nn.BatchNorm3d, (2, 3, 2, 3, 4))])
@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_tangents_of_batch_norm(norm, shape, affine, moves, first, training):
    "They have a rule of our own; here in double precision against PyTorch's, with the norm as the first layer and after one that moves."
    torch.manual_seed(0)
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.scale,self.norm = nn.Parameter(torch.randn(shape[1:])),norm(3, affine=affine, momentum=None)
        def forward(self, x): return self.norm(x + 5 if first else torch.sin(self.scale*x) + 5).flatten(1)*torch.sin(self.scale).flatten()
    model = Model().double().train(training)
    if affine: nn.init.normal_(model.norm.weight); nn.init.normal_(model.norm.bias)
    x,y = torch.randn(shape, dtype=torch.float64),torch.zeros(shape[0])
    names = ['scale',*(f'norm.{k}' for k in moves)]
    params = {k: p.detach() for k,p in model.named_parameters() if k in names}
    direction = {k: torch.randn_like(p) for k,p in params.items()}
    loss_func = lambda out, y: out.sin().sum(1)
    expected = torch.func.jvp(lambda p: loss_func(torch.func.functional_call(copy.deepcopy(model), p, (x,)), y), (params,), (direction,))[1]
    assert relative_difference(alignment(model, loss_func, (x, y), direction), expected) < 1e-12
    assert model.norm.num_batches_tracked == 0 and (model.norm.running_mean == 0).all()

@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('n', [3, 9, 16])
def test_tangents_of_large_convolutions_in_parts(n, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 3, stride=2, dilation=2), nn.Flatten()).double().to(memory_format=memory_format)
    size = int((2**20/n/2)**0.5) + 2
    x = torch.randn(n, 1, size, size).double().to(memory_format=memory_format)
    params = {k: p.detach() for k,p in model.named_parameters()}
    direction = {k: torch.randn_like(p) for k,p in params.items()}
    loss_func = lambda out, y: out.sin().sum(1)
    assert 2*n*size**2 > 2**20
    expected = torch.func.jvp(lambda p: loss_func(torch.func.functional_call(model, p, (x,)), None), (params,), (direction,))[1]
    assert relative_difference(alignment(model, loss_func, (x, torch.zeros(n)), direction), expected) < 1e-12

def test_forward_engine_is_the_jvp_of_torch_func():
    model,(x,y),meta_batch = setting('mlp')
    direction,_ = meta_gradient(model, cross_entropy, meta_batch)
    params = {k: p.detach() for k,p in model.named_parameters()}
    _,expected = torch.func.jvp(lambda p: cross_entropy(torch.func.functional_call(model, p, (x,)), y), (params,), (direction,))
    assert relative_difference(alignment(model, cross_entropy, (x, y), direction), expected) < 1e-6

def test_learning_rates_and_a_subset_of_parameters():
    model,batch,meta_batch = setting('cnn', torch.float64)
    names = ['2.weight', '6.weight', '6.bias']
    rates = dict(zip(names, (1., 0.01, 3.)))
    expected = unrolled_weights(model, cross_entropy, batch, meta_batch, names, rates)
    assert relative_difference(expected, unrolled_weights(model, cross_entropy, batch, meta_batch)) > 1e-2
    for engine in ('forward', 'reverse'):
        assert relative_difference(example_weights(model, cross_entropy, batch, meta_batch, names, rates, engine), expected) < 1e-10

def test_frozen_parameters_are_left_out():
    model,batch,meta_batch = setting('cnn', torch.float64)
    trainable = [k for k,_ in model.named_parameters()][2:]
    expected = unrolled_weights(model, cross_entropy, batch, meta_batch, trainable)
    for p in list(model.parameters())[:2]: p.requires_grad_(False)
    assert set(meta_gradient(model, cross_entropy, meta_batch)[0]) == set(trainable)
    assert relative_difference(example_weights(model, cross_entropy, batch, meta_batch), expected) < 1e-10

def test_tied_and_unused_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.unused,self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(3, 3), nn.Linear(16, 4)
            self.b.weight = self.a.weight
        def forward(self, x): return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).mean(1))
    torch.manual_seed(0)
    model = Tied().double()
    batch,meta_batch = [(x.double(), y) for x,y in (sequences(8), sequences(6))]
    expected = unrolled_weights(model, cross_entropy, batch, meta_batch)
    for engine in ('forward', 'reverse'):
        assert relative_difference(example_weights(model, cross_entropy, batch, meta_batch, engine=engine), expected) < 1e-10

def test_several_inputs_and_targets():
    class TwoIn(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(3, 4), nn.Linear(5, 4)
        def forward(self, x, z): return self.a(x) + self.b(z), self.a(x)
    def loss_func(out, y, t): return cross_entropy(out[0], y) + F.mse_loss(out[1], t, reduction='none').mean(1)
    torch.manual_seed(0)
    model = TwoIn().double()
    def data(n): return (torch.randn(n, 3).double(), torch.randn(n, 5).double()), (torch.randint(0, 4, (n,)), torch.randn(n, 4).double())
    batch,meta_batch = data(7),data(5)
    assert relative_difference(example_weights(model, loss_func, batch, meta_batch), unrolled_weights(model, loss_func, batch, meta_batch)) < 1e-10

@pytest.mark.parametrize('training', [True, False])
def test_attention_in_both_modes(training):
    "In eval mode PyTorch has a fused kernel for whole encoder layers, without derivatives."
    model,batch,meta_batch = setting('transformer', torch.float64)
    model.train(training)
    expected = unrolled_weights(model, cross_entropy, batch, meta_batch)
    assert relative_difference(example_weights(model, cross_entropy, batch, meta_batch), expected) < 1e-10

@pytest.mark.parametrize('kind,least', [('mlp', 0.98), ('transformer', 0.98), ('lstm', 0.98), ('resnet18', 0.7)])
def test_in_bfloat16_on_request(kind, least):
    "Near to the exact numbers, if less so after many layers of batch norm."
    model,batch,meta_batch = setting(kind)
    if kind == 'resnet18': batch,meta_batch = images(16, 64),images(6, 64)
    for m in model.modules():
        if 'Dropout' in type(m).__name__: m.p = 0.
        if isinstance(m, nn.LSTM): m.dropout = 0.
    expected = alignment(model, cross_entropy, batch, meta_gradient(model, cross_entropy, meta_batch)[0])
    seen = []
    [m for m in model.modules() if isinstance(m, nn.Linear)][-1].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    u = alignment(model, cross_entropy, batch, meta_gradient(model, cross_entropy, meta_batch, autocast=torch.bfloat16)[0], autocast=torch.bfloat16)
    assert seen == [torch.bfloat16]*2 and u.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    assert torch.corrcoef(torch.stack([u, expected]))[0, 1] > least and (u - expected).abs().max() > 0

def test_autocast_does_not_reach_the_virtual_passes():
    model,batch,meta_batch = setting('resnet18')
    expected = example_weights(model, cross_entropy, batch, meta_batch)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert model(batch[0]).dtype == torch.bfloat16
        model.load_state_dict(setting('resnet18')[0].state_dict()) # that pass has updated the batch-norm statistics
        assert relative_difference(example_weights(model, cross_entropy, batch, meta_batch), expected) < 1e-6
        assert torch.is_autocast_enabled('cpu')

# ---- per-item losses and weights

def test_item_losses_of_a_segmentation_loss_weigh_images():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1).double()
    def data(n): return torch.randn(n, 3, 5, 5).double(), torch.randint(0, 4, (n, 5, 5))
    batch,meta_batch = data(6),data(4)
    weights = example_weights(model, cross_entropy, batch, meta_batch)
    per_image = lambda out, y: cross_entropy(out, y).mean((1, 2))
    assert weights.shape == (6,)
    assert relative_difference(weights, unrolled_weights(model, per_image, batch, meta_batch)) < 1e-10

@pytest.mark.parametrize('shape', [(), (5,), (3, 4), (0,)])
def test_losses_that_are_not_per_item_are_refused(shape):
    with pytest.raises(ValueError, match='one value per item is needed'): item_losses(torch.zeros(shape), 4)

def test_weights_sum_to_one_or_are_all_zero():
    u = torch.tensor([2., -1., 0., 6.])
    assert normalise(rectify(u)).tolist() == [0.25, 0, 0, 0.75]
    assert normalise(rectify(-u.abs())).tolist() == [0]*4
    assert effective_sample_size(torch.tensor([3., 3., 0.])) == 2

def test_all_zero_weights_where_nothing_helps():
    "A training batch with all labels flipped pulls a linear model the wrong way."
    x = torch.eye(3).repeat(2, 1)
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    y = torch.tensor([0, 1, 0, 0, 1, 0])
    assert example_weights(model, cross_entropy, (x, 1-y), (x, y)).tolist() == [0]*6
    assert (example_weights(model, cross_entropy, (x, y), (x, y)) - 1/6).abs().max() < 1e-7

# ---- no traces

class FailsLate(nn.Module):
    def __init__(self): super().__init__(); self.fail = False
    def forward(self, x):
        if self.fail: raise RuntimeError('late failure')
        return x

class Remembers(nn.Module):
    "Sets attributes, a buffer and a parameter while it runs, as language models and weight dropout do."
    def __init__(self):
        super().__init__()
        self.hidden,self.seen = None,[]
        self.register_buffer('n', torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
    def forward(self, x):
        x.mul_(2) # in place, on the user's batch
        self.hidden = x.mean()
        self.seen.append(x)
        self.n = self.n + 1
        self.made_here = True
        return x * self.weight

def state(model):
    "All that a pass could change, in comparable form."
    return dict(
        params=[(k, id(p), p.detach().clone(), p.grad if p.grad is None else p.grad.clone()) for k,p in model.named_parameters()],
        buffers=[(k, id(b), b.clone()) for k,b in model.named_buffers()],
        flags=[m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()],
        attributes=[{k: (id(v), len(v) if isinstance(v, list) else 0) for k,v in vars(m).items()} for m in model.modules()],
        hooks=[{k: list(v.items()) for k,v in vars(m).items() if 'hooks' in k and isinstance(v, dict)} for m in model.modules()],
        random=[torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()],
        global_flags=(torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()))

def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)): return bool((a == b).all())
    if isinstance(a, (tuple, list)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b

class Rolls(nn.Module):
    "Draws from all three random streams."
    def forward(self, x): return x * (1 + random.random() + np.random.rand() + torch.rand(1))

@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('compute', [example_weights, unrolled_weights, lambda *a: example_weights(*a, engine='reverse')])
def test_no_trace_is_left(compute, fails, grad):
    torch.manual_seed(0)
    late = FailsLate()
    model = nn.Sequential(Remembers(), Rolls(), nn.BatchNorm2d(3), cnn(nn.Dropout(), nn.utils.spectral_norm(nn.Conv2d(8, 8, 1))), nn.Sequential(late)).train()
    model[3][0].eval()
    calls = []
    model[2].register_forward_hook(lambda *a: calls.append(1))
    cross_entropy(model(images(4)[0]), torch.zeros(4).long()).mean().backward() # gradients that must stay
    late.fail = fails
    batch,meta_batch = images(8),images(6)
    before,x = state(model),batch[0].clone()
    with torch.set_grad_enabled(grad):
        if fails:
            with pytest.raises(RuntimeError, match='late failure'): compute(model, cross_entropy, batch, meta_batch)
        else: compute(model, cross_entropy, batch, meta_batch)
        torch.set_grad_enabled(True)
    after = state(model)
    for k in before: assert same(before[k], after[k]), k
    assert len(calls) > 1 and same(x, batch[0]), 'the model has run, and the batch is as it was'

def test_lstm_keeps_backend_flags():
    model,batch,meta_batch = setting('lstm')
    before = state(model)
    example_weights(model, cross_entropy, batch, meta_batch)
    assert same(before, state(model))

def test_forked_random_has_its_own_stream():
    torch.manual_seed(1); random.seed(1); np.random.seed(1)
    seed = derived_seed()
    with forked_random(seed=seed): inside = torch.rand(2), random.random(), np.random.rand()
    assert derived_seed() == seed
    with forked_random(seed=seed): assert same(inside, (torch.rand(2), random.random(), np.random.rand()))
    with forked_random(): here = torch.rand(2)
    assert same(here, torch.rand(2)) and derived_seed() != seed

# ---- errors

def test_operators_without_a_forward_derivative_are_named():
    class Prototypes(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.prototypes = nn.Conv2d(3, 4, 8), nn.Parameter(torch.randn(4, 4))
        def forward(self, x): return -torch.cdist(self.conv(x).flatten(1), self.prototypes)
    torch.manual_seed(0)
    model = Prototypes()
    batch,meta_batch = images(8),images(6)
    with pytest.raises(NoForwardDerivative, match="engine='reverse'") as e: example_weights(model, cross_entropy, batch, meta_batch)
    assert e.value.operator in str(e.value) and 'cdist' in e.value.operator
    weights = example_weights(model, cross_entropy, batch, meta_batch, engine='reverse')
    assert relative_difference(weights, unrolled_weights(model, cross_entropy, batch, meta_batch)) < 1e-5

def test_other_runtime_errors_stay_what_they_are():
    model,batch,meta_batch = setting('mlp')
    direction,_ = meta_gradient(model, cross_entropy, meta_batch)
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'): alignment(model, cross_entropy, (torch.zeros(3, 7), torch.zeros(3).long()), direction)

@pytest.mark.parametrize('kwargs,message', [
    (dict(engine='auto'), "engine='auto' is unknown"),
    (dict(params=[]), 'params is empty'),
    (dict(params=['no.such']), "'no.such', which is not a parameter of the model; it has 1.weight"),
    (dict(step_size={'1.weight': 1.}), "step_size has no entry for the parameter '1.bias'"),
])
def test_bad_arguments_are_named(kwargs, message):
    model,batch,meta_batch = setting('mlp')
    with pytest.raises(ValueError, match=message.replace('(', r'\(')): example_weights(model, cross_entropy, batch, meta_batch, **kwargs)

@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('whole', [False, True])
def test_scripted_modules_are_refused_by_name(whole):
    scripted = torch.jit.script(nn.Linear(2, 2))
    batch = torch.rand(3, 2),torch.tensor([0, 1, 1])
    with pytest.raises(TypeError, match='the model is a torch.jit.ScriptModule' if whole else "the model, in '1', is a torch.jit.ScriptModule"):
        example_weights(scripted if whole else nn.Sequential(nn.Linear(2, 2), scripted), cross_entropy, batch, batch)

def test_synchronised_batch_norm_is_local_in_virtual_passes():
    "On a CPU it would refuse to run, and on several GPUs the processes would wait for each other."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    batch,trusted = [(torch.randn(n, 3, 8, 8), torch.arange(n) % 3) for n in (8, 6)]
    loss = nn.CrossEntropyLoss(reduction='none')
    expected = example_weights(model, loss, batch, trusted)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for engine in ('forward', 'reverse'): torch.testing.assert_close(example_weights(synced, loss, batch, trusted, engine=engine), expected)
    assert 'forward' not in vars(synced[1])
