"""What a training step costs with example weights, in time, memory and arithmetic, as ratios to plain training.

For each model, plain fastai training, `MetaReweightCallback` with its engines and options, and other published
implementations, written as their own documentation shows, take turns in one process: whole training steps, whatever else
the computer does meets all of them, and the ratio is that of each turn. Peak memory is that of a process of its own for
each. Run from the repository root, all of it or a part:

    OMP_WAIT_POLICY=PASSIVE python benchmarks/step_cost.py
    OMP_WAIT_POLICY=PASSIVE python benchmarks/step_cost.py --models 'resnet18 resnet50' --variants 'exact higher'

`--quick` is for a look: small models, few turns, nothing written. The other implementations are in the extra `bench`; one
that is not installed is left out, with a line that says so. (For betty-ml, `pip install 'pip<24.1'` and then `pip install --no-deps
betty-ml`: later versions of pip reject its metadata.) Without OMP_WAIT_POLICY, PyTorch's threads wait for each other
by spinning, and on a computer with other work to do the figures are then a matter of chance.
"""
import gc, json, logging, os, platform, random, re, resource, subprocess, sys, time, warnings
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path

import fastai, numpy as np, torch, torchvision
from fastai.basics import Callback, DataLoaders, Learner, SGD, noop, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.data.load import DataLoader
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from fastcore.script import bool_arg, call_parse
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from fastai_l2rw.all import *
import fastai_l2rw.engines.routes
from fastai_l2rw.engines.routes import Aligned

LR = 1e-3
fastai_l2rw.engines.routes.is_compared = lambda n: n == 0 # turns are short, and fits are long: those at 1, 4, 16, 64, ... take no share worth mentioning
cross_entropy = nn.CrossEntropyLoss(reduction='none')

# ---- models, without random layers, so that the weights can be compared

class First(nn.Module):
    "The first of the outputs: fastai's text classifiers also return what their regularizer needs."
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(x)[0]

def cnn():
    layers = [o for a,b in ((3, 32), (32, 64), (64, 128)) for o in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(inplace=True), nn.Linear(128, 10))

def awd_lstm():
    config = awd_lstm_clas_config | {k: 0. for k in awd_lstm_clas_config if k.endswith('_p')} | dict(weight_p=1e-9) # at 0, fastai's WeightDropout fails in its second pass
    return First(get_text_classifier(AWD_LSTM, 5000, 10, config=config, seq_len=40, max_len=40, ps=[0.], lin_ftrs=[50]))

def vit_small():
    import timm
    return timm.create_model('vit_small_patch16_224', num_classes=10, img_size=160)

def torchvision_model(name, **kwargs): return lambda: getattr(torchvision.models, name)(num_classes=10, **kwargs)
def images(size): return lambda n: (torch.randn(n, 3, size, size),)
def texts(n): return (torch.randint(2, 5000, (n, 40)),)
def rows(n): return torch.randint(0, 50, (n, 6)),torch.randn(n, 8)

MODELS = { # what makes it, its inputs, and the batch size
    'cnn':           (cnn, images(32), 64),
    'resnet18':      (torchvision_model('resnet18'), images(112), 32),
    'resnet50':      (torchvision_model('resnet50'), images(160), 16),
    'convnext_tiny': (torchvision_model('convnext_tiny', stochastic_depth_prob=0.), images(160), 16),
    'vit_small':     (vit_small, images(160), 16),
    'awd_lstm':      (awd_lstm, texts, 16),
    'tabular':       (lambda: TabularModel([(50, 10)]*6, 8, 10, [200, 100]), rows, 64),
}
DEPTHS = {f'resnet{k} at 64': (torchvision_model(f'resnet{k}'), images(64), 16) for k in (18, 34, 50, 101, 152)} # for the growth table

def setting(name, n=None, m_share=0.5, device='cpu'):
    "A model, three training batches and a trusted one, all the same every time, and a label for the table."
    make_model,make_inputs,bs = (MODELS | DEPTHS)[name]
    n = n or bs
    m = max(round(m_share*n), 1)
    set_seed(0)
    model = make_model().to(device)
    batch = lambda k: tuple(o.to(device) for o in (*make_inputs(k), torch.randint(10, (k,))))
    return model.train(),[batch(n) for _ in range(3)],batch(m)

def head(model):
    "Parameters of the last linear layer."
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1].parameters()

# ---- what is compared: each is made of a setting and gives a function `run(steps)`, seconds (by the clock, and of the processors) for a step

class Clock:
    "Seconds since it was made, by the clock and of the processors."
    def __init__(self): self.sync(); self.start = time.perf_counter(),time.process_time()
    def sync(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
    def __call__(self): self.sync(); return np.array([time.perf_counter() - self.start[0],time.process_time() - self.start[1]])

class StepTimer(Callback):
    "Times all steps of an epoch but the first; keeps the weights of the very first."
    order,run_valid,weights = 1000,False,None
    def after_batch(self):
        if self.iter == 0: self.clock = Clock()
        cb = next((cb for cb in self.learn.cbs if isinstance(cb, MetaReweightCallback)), None)
        if self.weights is None and cb: self.weights = cb.step.weights
    def after_train(self): self.seconds = self.clock()

class Steps:
    "So many batches, over and over."
    def __init__(self, batches): self.batches,self.n = batches,0
    def __len__(self): return self.n
    def __iter__(self): return islice(cycle(self.batches), self.n)

def learner(setting, *cbs):
    model,batches,_ = setting
    dl = Steps(batches)
    dls = DataLoaders(dl, Steps([]))
    dls.n_inp = len(batches[0]) - 1
    dl.n_inp = dls.n_inp
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=[StepTimer(), *cbs])
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    def run(steps):
        dl.n = steps + 1
        learn.fit(1, LR)
        run.weights = learn.step_timer.weights
        return learn.step_timer.seconds/steps
    return run

def ours(cls=MetaReweightCallback, **kwargs):
    def make(setting):
        b = setting[2]
        return learner(setting, cls(DataLoader(list(zip(*b)), bs=len(b[0])), **kwargs))
    return make

class WithoutPasses(MetaReweightCallback):
    "All that the callback does in a step but its virtual passes, and following the tape."
    def begin_fit(self):
        super().begin_fit()
        fit,fixed = self.this_fit,{k: p.detach() for k,p in self.this_fit.params.items()}
        def meta_gradient_at(at, step):
            fit.epoch.add(meta_loss=torch.zeros(()))
            return fixed
        fit.meta_gradient_at = meta_gradient_at
        self.routes.after_pass = lambda own, aligned, losses, *args: Aligned(torch.ones_like(losses.detach()), losses, route='own pass')

def by_hand(step):
    "A training loop around `step(batch, trusted)`, which gives the weights."
    def make(setting):
        model,batches,trusted = setting
        take_step = step(model)
        def run(steps):
            for i,b in enumerate(islice(cycle(batches), steps + 1)):
                w = take_step((b[:-1], b[-1]), (trusted[:-1], trusted[-1]))
                if run.weights is None: run.weights = w
                if i == 0: clock = Clock()
            return clock()/steps
        run.weights = None
        return run
    return make

def weighted_step(model, opt, x, y, w):
    loss = (w*cross_entropy(model(*x), y)).sum()
    opt.zero_grad()
    loss.backward()
    opt.step()

def weights_of(gradient):
    w = torch.clamp(-gradient, min=0)
    return w/(w.sum() + (w.sum() == 0))

def higher_step(model):
    "As in higher's README: the inner loop's context gives a functional model and a differentiable optimizer."
    import higher
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    def step(batch, trusted):
        (x,y),(xm,ym) = batch,trusted
        with higher.innerloop_ctx(model, opt) as (fmodel,diffopt):
            losses = cross_entropy(fmodel(*x), y)
            epsilon = torch.zeros_like(losses, requires_grad=True)
            diffopt.step((epsilon*losses).sum())
            gradient, = torch.autograd.grad(F.cross_entropy(fmodel(*xm), ym), epsilon)
        w = weights_of(gradient.detach())
        weighted_step(model, opt, x, y, w)
        return w
    return step

def torchopt_step(model):
    "As in TorchOpt's example of this method (examples/L2R): MetaSGD moves the model itself, and the state before is put back."
    import torchopt
    opt,meta_opt = torch.optim.SGD(model.parameters(), lr=LR),torchopt.MetaSGD(model, lr=LR)
    def step(batch, trusted):
        (x,y),(xm,ym) = batch,trusted
        before,opt_before = torchopt.extract_state_dict(model),torchopt.extract_state_dict(meta_opt)
        losses = cross_entropy(model(*x), y)
        epsilon = torch.zeros_like(losses, requires_grad=True)
        meta_opt.step((epsilon*losses).sum())
        gradient, = torch.autograd.grad(F.cross_entropy(model(*xm), ym), epsilon)
        torchopt.recover_state_dict(model, before)
        torchopt.recover_state_dict(meta_opt, opt_before)
        w = weights_of(gradient.detach())
        weighted_step(model, opt, x, y, w)
        return w
    return step

def betty(setting):
    "As in Betty's example (examples/learning_to_reweight): Meta-Weight-Net by finite differences, the cost of which is to compare with ours of that."
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem
    model,batches,(*xm,ym) = setting
    net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()).to(ym.device)
    class Outer(ImplicitProblem):
        def forward(self, losses): return self.module(losses)
        def training_step(self, batch): *x,y = batch; return F.cross_entropy(self.inner(*x), y)
    class Inner(ImplicitProblem):
        def forward(self, *x): return self.module(*x)
        def training_step(self, batch):
            *x,y = batch
            losses = cross_entropy(self.forward(*x), y)[:, None]
            return torch.mean(self.outer(losses.detach())*losses)
    device = str(ym.device)
    logging.disable(logging.INFO) # it tells of itself
    outer = Outer(name='outer', config=Config(type='darts', retain_graph=True), module=net, optimizer=torch.optim.Adam(net.parameters(), lr=1e-5), train_data_loader=[(*xm, ym)], device=device)
    inner = Inner(name='inner', config=Config(type='darts', unroll_steps=1), module=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), train_data_loader=batches, device=device)
    engine = Engine(config=EngineConfig(train_iters=1, valid_step=10**9), problems=[outer, inner], dependencies=dict(u2l={outer: [inner]}, l2u={inner: [outer]}))
    def run(steps):
        engine.train_iters = 1
        engine.run()
        engine.train_iters,clock = steps,Clock()
        engine.run()
        return clock()/steps
    run.weights = None
    return run

VARIANTS = { # what makes it, and by how many plain steps it is bounded from below, for the ratio r = m/n, if that is known
    'plain':           (learner, lambda r: 1),
    'exact':           (ours(), lambda r: 5/3 + r),
    'forward':         (ours(engine='forward'), lambda r: 2 + r),
    'reverse':         (ours(engine='reverse'), None),
    "lookahead='opt'": (ours(lookahead='opt'), lambda r: 5/3 + r),
    'every=4':         (ours(every=4), lambda r: 5/3 + r/4),
    'skip_zeros':      (ours(skip_zeros=True), None), # 1 + f + m/n for a share f of positive weights
    'params=head':     (ours(params=head), None),
    'overhead':        (ours(WithoutPasses), lambda r: 1),
    'meta-weight-net': (ours(MetaWeightNetCallback), lambda r: 7/3 + r),
    'higher':          (by_hand(higher_step), None),
    'torchopt':        (by_hand(torchopt_step), None),
    'betty':           (betty, None), # Meta-Weight-Net, too
}
PEERS = dict(higher='higher', torchopt='torchopt', betty='betty-ml') # and what pip calls them

def installed(variant):
    try: return version(PEERS[variant])
    except PackageNotFoundError: return None

# ---- measuring

def quiet(f):
    "What `f` gives, without the warnings of other packages, or what went wrong, as text."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return f()
        except Exception as e: return f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'

def floating_operations(run):
    "Those of one step, by PyTorch's counter: what two steps take beyond one, so that what comes once in a fit is left out."
    counts = []
    for steps in (1, 2):
        counter = FlopCounterMode(display=False)
        with _FlopCounterMode(counter): run(steps) # by itself it also follows modules with hooks, which would change what is counted
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]

def oracle(setting):
    "The weights of the first batch, by differentiating through the look-ahead in double precision."
    model,batches,trusted = setting
    double = lambda b: tuple(o.double() if o.is_floating_point() else o for o in b)
    (*x,y),(*xm,ym) = double(batches[0]),double(trusted)
    return unrolled_weights(model.double(), cross_entropy, (tuple(x), y), (tuple(xm), ym))

def peak_memory(name, variant, m_share, device):
    """MiB at the peak of a process of its own that trains three steps, beyond what it had after importing everything.
    The setting lets glibc give freed memory back; by default it keeps what its heap has been fragmented into, of which small models have a lot."""
    command = [sys.executable, '-W', 'ignore', __file__, '--models', name, '--variants', variant, '--mn', str(m_share), '--threads', str(torch.get_num_threads()), '--device', device, '--memory']
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(MALLOC_MMAP_THRESHOLD_='100000'))
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None

def resident():
    "MiB that this process has had at most. (The figure that `resource` gives counts the process that started it, too, so it is for systems without /proc.)"
    status = Path('/proc/self/status')
    if status.exists(): return int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])/2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)

def print_memory(name, variant, m_share, device):
    "Print this process's."
    cuda = torch.device(device).type == 'cuda'
    highest = (lambda: torch.cuda.max_memory_allocated()/2**20) if cuda else resident
    before = highest()
    VARIANTS[variant][0](setting(name, None, m_share, device))(2)
    print(highest() - before)

def quartiles(values): return [round(float(q), 3) for q in np.quantile(values, (0.25, 0.5, 0.75))]

def take_turns(runs, repeats, seconds):
    "Ratios to plain, by the clock and in processor time, from `repeats` turns; each takes as many steps as fill about `seconds` of plain training."
    steps = max(round(seconds/quiet(lambda: runs['plain'](2))[0]), 1)
    times,order = {k: [] for k in runs},random.Random(0)
    for _ in range(repeats):
        gc.collect()
        for k in order.sample(list(runs), len(runs)): times[k].append(quiet(lambda: runs[k](steps)))
    plain = np.array(times['plain'])
    return {k: dict(ratio=quartiles(np.array(t)[:, 0]/plain[:, 0]), processor_ratio=quartiles(np.array(t)[:, 1]/plain[:, 1]), ms=round(1000*float(np.median(np.array(t)[:, 0])), 2)) for k,t in times.items()}

def compare(name, variants, m_share, repeats, seconds, device, memory):
    "A row for each variant."
    n,m = [len(b[-1]) for b in (lambda s: (s[1][0], s[2]))(setting(name, None, m_share))]
    expected = quiet(lambda: oracle(setting(name, None, m_share, device)))
    runs,rows,flops = {},{},{}
    for k in variants:
        run = quiet(lambda: VARIANTS[k][0](setting(name, None, m_share, device)))
        failed = run if isinstance(run, str) else quiet(lambda: run(1))
        if isinstance(failed, str):
            print(f'{name}, {k} left out: {failed}', flush=True)
            rows[k] = dict(failed=failed)
            continue
        runs[k],flops[k] = run,quiet(lambda: floating_operations(run))
        rows[k] = dict(bound=VARIANTS[k][1] and VARIANTS[k][1](m/n))
        if run.weights is not None and not isinstance(expected, str) and (run.weights != run.weights[0]).any():
            w = run.weights.double()
            rows[k] |= dict(difference=float((w - expected).abs().max()/expected.abs().max()), correlation=float(torch.corrcoef(torch.stack([w, expected]))[0, 1]))
    for k,row in take_turns(runs, repeats, seconds).items():
        rows[k] |= row
        if not isinstance(flops[k], str) and flops['plain']: rows[k]['flops'] = round(flops[k]/flops['plain'], 3)
    del runs
    if memory: peaks = {k: peak_memory(name, k, m_share, device) for k in rows if 'ratio' in rows[k]}
    for k,row in rows.items():
        if memory and 'ratio' in row and peaks[k] and peaks['plain']: row |= dict(peak_mib=round(peaks[k]), peak_ratio=round(peaks[k]/peaks['plain'], 2))
        print(f'{name}, n={n}, m={m}, {k}: {row}', flush=True)
    return [dict(model=name, n=n, m=m, variant=k, **row) for k,row in rows.items()]

def growth(repeats, seconds, device):
    "How the cost grows with the batch, the depth and the trusted batch."
    grid = [('batch', 'cnn', n, 0.5) for n in (8, 16, 32, 64, 128, 256)] + [('depth', k, 16, 0.5) for k in DEPTHS] + [('trusted batch', 'cnn', 64, m/64) for m in (1, 4, 16, 64, 256)]
    for what,name,n,m_share in grid:
        runs = {k: VARIANTS[k][0](setting(name, n, m_share, device)) for k in ('plain','exact')}
        row = dict(what=what, model=name, n=n, m=round(m_share*n), bound=5/3 + m_share, **take_turns(runs, repeats, seconds)['exact'])
        print(row, flush=True)
        yield row

# ---- the tables

def number(x, digits=2): return '' if x is None else f'{x:.{digits}f}'
def spread(q): return f'{q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})'

def markdown(result):
    lines = ['# What a step costs', '', f"`{result['command']}`", f"on {result['machine']}. {result['note']}".rstrip(), '',
        f"Whole training steps over plain ones, medians (and quartiles) of {result['repeats']} turns: by the clock, and in processor time. `bound` is what the arithmetic of the method says,",
        '`flops` what PyTorch counts; `memory` is the peak of a process of its own beyond its imports (MALLOC_MMAP_THRESHOLD_=100000), over that of plain training; `difference` the largest deviation',
        'from weights by differentiating through the step in double precision, relative to the largest weight, and `correlation` that with them.', '',
        '| model, n, m | variant | time | processor time | bound | flops | memory | difference | correlation |', '|---|---|---|---|---|---|---|---|---|']
    for o in result['results']:
        first = f"| {o['model']}, {o['n']}, {o['m']} | {o['variant']} |"
        if 'failed' in o: lines.append(f"{first} does not run: {o['failed']} |" + ' |'*6); continue
        difference = f"{o['difference']:.0e}" if 'difference' in o else ''
        lines.append(f"{first} {spread(o['ratio'])} | {spread(o['processor_ratio'])} | {number(o['bound'])} | {number(o.get('flops'))} | {number(o.get('peak_ratio'))} | {difference} | {number(o.get('correlation'), 3)} |")
    if result['growth']:
        lines += ['', '## How it grows', '', '| | model | n | m | bound | time | processor time |', '|---|---|---|---|---|---|---|']
        lines += [f"| {o['what']} | {o['model']} | {o['n']} | {o['m']} | {o['bound']:.2f} | {spread(o['ratio'])} | {spread(o['processor_ratio'])} |" for o in result['growth']]
    return '\n'.join(lines) + '\n'

@call_parse
def main(
    models:str=' '.join(MODELS), # Which models, with spaces in between
    variants:str=' '.join(VARIANTS), # Which variants; `plain` always takes part
    mn:str='0.5', # Sizes of the trusted batch over that of the training batch, such as '1 0.5 0.25'
    repeats:int=7, # Number of turns
    seconds:float=1., # Plain training in a turn
    threads:int=0, # Number of threads; default: as PyTorch chooses
    device:str='cpu', # Device, such as 'cuda'
    grow:bool_arg=False, # How the cost grows with batch, depth and trusted batch, too?
    quick:bool=False, # Small models and three short turns, nothing written
    memory:bool=False, # Print the peak memory of one model and variant (the benchmark calls itself so)
    note:str='', # A sentence about the circumstances, for the tables
    out:Path=Path('results'), # Folder for the results
):
    "Compare steps, and write results/step_cost.json and results/step_cost.md."
    if threads: torch.set_num_threads(threads)
    models,variants,shares = models.split(),variants.split(),[float(o) for o in mn.split()]
    for given,known in ((models, MODELS), (variants, VARIANTS)):
        if unknown := [o for o in given if o not in known]: raise SystemExit(f'{unknown[0]!r} is unknown: use some of {", ".join(known)}')
    if memory: return print_memory(models[0], variants[0], shares[0], device)
    if quick: models,repeats,seconds = [o for o in models if o in ('cnn','tabular')],3,0.1
    for k in PEERS:
        if k in variants and not installed(k):
            print(f"{k} is not installed, and left out: see the top of this file")
            variants.remove(k)
    variants = ['plain'] + [o for o in variants if o != 'plain']
    results = [row for k in models for r in shares for row in compare(k, variants, r, repeats, seconds, device, not quick)]
    versions = ''.join(f', {PEERS[k]} {installed(k)}' for k in PEERS if k in variants)
    processor = torch.cuda.get_device_name() if torch.device(device).type == 'cuda' else f'{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads'
    result = dict(command=' '.join(['python', 'benchmarks/step_cost.py', *(f"'{o}'" if ' ' in o else o for o in sys.argv[1:])]), note=note, repeats=repeats,
        machine=f'{processor}, torch {torch.__version__}, fastai {fastai.__version__}, Python {platform.python_version()}{versions}', results=results, growth=list(growth(repeats, seconds, device)) if grow else [])
    print(markdown(result))
    if quick: return
    out.mkdir(exist_ok=True)
    (out/'step_cost.json').write_text(json.dumps(result, indent=1) + '\n')
    (out/'step_cost.md').write_text(markdown(result))
