"What can go wrong in a fit, and what is left of the Learner then."
import multiprocessing, os, random, re, subprocess, sys, textwrap, warnings
from copy import deepcopy
from pathlib import Path

import numpy as np, pytest, torch
from fastai.basics import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
    CancelValidException, Learner, accuracy)
from fastai.callback.all import CSVLogger, MixUp, SaveModelCallback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchLoader, Dataset, IterableDataset, TensorDataset

from fastai_l2rw.all import *
from conftest import Augment, cnn, images, labels, make_dls, meta

def torch_loader(items=meta, bs=12, **kwargs): return TorchLoader(TensorDataset(images[items], torch.tensor(labels[items])), bs, **kwargs)

class Hooked(nn.Module):
    "A CNN with a hook, a frozen batch norm and a failure to order."
    def __init__(self):
        super().__init__()
        self.cnn,self.calls,self.fail_at,self.error = cnn(),0,None,None
        self.cnn[0][1].register_forward_hook(lambda m, i, o: o + 0)
        self.cnn[0][0][1].eval()
    def forward(self, x):
        self.cnn[0][0][1].eval()
        out = self.cnn(x)
        self.calls += 1
        if self.fail_at is not None and self.fail_at(): raise self.error
        return out

def facts(learn):
    "Everything about a Learner that a fault must not change, or only as plain training does."
    model = learn.model
    return dict(loss_func=learn.loss_func, reduction=learn.loss_func.reduction, cbs=[type(cb).__name__ for cb in learn.cbs],
        hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        attributes=[sorted(vars(m)) + sorted(m._parameters) + sorted(m._buffers) for m in model.modules()], requires_grad=[p.requires_grad for p in model.parameters()],
        backends=(torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled('cpu')))

def check_usable(learn, before):
    "It is as it was, and goes on: validates, trains, saves."
    assert facts(learn) == before
    assert all(t.isfinite().all() for t in learn.model.state_dict().values()), 'neither parameters nor statistics have been spoilt'
    for cb in list(learn.cbs):
        if type(cb) is Fail: learn.remove_cb(cb)
    plain = Learner(learn.dls, learn.model, loss_func=learn.loss_func, metrics=accuracy)
    with plain.no_bar(), plain.no_logging(): assert learn.validate() == plain.validate()
    learn.fit(1)
    assert len(learn.recorder.values) == 1 and len(learn.recorder.values[0]) == len(learn.recorder.metric_names) - 2
    ours, = [cb for cb in learn.cbs if isinstance(cb, MetaReweightCallback)]
    assert ours.item_weights().steps.sum() == 16*len(learn.dls.train)
    assert facts(learn) == before
    assert not multiprocessing.active_children()

class Fail(Callback):
    "Raises an error at an event; if it is one of a batch, in the second of an epoch's training."
    run_valid = False
    def __init__(self, event, error, order):
        self.error,self.order = error,order
        inner = event in EVENTS[EVENTS.index('before_batch'):EVENTS.index('after_batch') + 1]
        setattr(self, event, lambda: self._raise() if not inner or self.iter == 1 else None)
    def _raise(self): raise self.error

EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch', 'after_train',
    'before_validate', 'after_validate', 'after_epoch', 'after_fit']
CANCEL = [CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException, CancelValidException]

@pytest.mark.parametrize('order', [-200, 54, 56, 200])
@pytest.mark.parametrize('event', EVENTS)
def test_errors_at_any_event(make_learner, event, order):
    "Before and after ours in the order of callbacks."
    for error in (RuntimeError('stop'), KeyboardInterrupt()):
        learn = make_learner(MetaReweightCallback())
        before = facts(learn)
        learn.add_cb(Fail(event, error, order))
        before['cbs'] = [type(cb).__name__ for cb in learn.cbs if not isinstance(cb, Fail)]
        with pytest.raises(type(error)): learn.fit(1)
        learn.remove_cbs(Fail)
        check_usable(learn, before)

def may_stand_at(error, event):
    name = re.match('Cancel(.*)Exception', error.__name__)[1].lower()
    inside = dict(fit=EVENTS[:-1], epoch=EVENTS[1:-2], train=EVENTS[2:11], batch=EVENTS[3:10], backward=['before_backward'], step=['before_step'], valid=['before_validate'])
    return event in inside[name]

@pytest.mark.parametrize('event,error', [(e, c) for e in EVENTS for c in CANCEL if may_stand_at(c, e)])
def test_cancelling(make_learner, event, error):
    for order in (-200, 200):
        if (event, error, order) == ('before_epoch', CancelEpochException, -200): continue # fastai's Recorder fails by itself
        for cb in (MetaReweightCallback(), MetaWeightNetCallback()):
            learn = make_learner(cb)
            before = facts(learn)
            learn.add_cb(Fail(event, error(), order))
            learn.fit(2)
            learn.remove_cbs(Fail)
            check_usable(learn, before)

# ---- errors inside the virtual passes

@pytest.mark.parametrize('call', range(7))
@pytest.mark.parametrize('engine', ['auto', 'forward', 'reverse'])
@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt()])
def test_a_model_that_fails(make_learner, call, engine, error):
    "When a trusted batch is tried out; then in the gradient on one, the alignment and the training pass of each step."
    learn = make_learner(MetaReweightCallback(engine=engine), model=Hooked())
    before,n = facts(learn),iter(range(1000))
    learn.model.fail_at,learn.model.error = lambda: next(n) == call,error
    meta,batch = 'batch {} of meta_dl in epoch 0','batch {} of the training loader in epoch 0'
    where = [meta.format(1), meta.format(1), batch.format(0), '', meta.format(2), batch.format(1), '']
    if engine == 'auto': where = [o for o in where if 'training' not in o] + [meta.format(3), '']
    where = where[call]
    with pytest.raises(type(error), match=where if isinstance(error, RuntimeError) else ''): learn.fit(1)
    learn.model.fail_at = None
    check_usable(learn, before)

def test_the_random_streams_go_on_as_without_the_callback(make_learner):
    "The error comes in the second step, in a virtual pass."
    def streams(): return torch.get_rng_state().tolist(),random.getstate(),np.random.get_state()[1].tolist()
    plain = make_learner(dls=make_dls(batch_tfms=Augment()), model=Hooked())
    states = []
    plain.add_cb(Callback(before_batch=lambda self: states.append(streams()) if self.training else None))
    plain.cbs[-1].order = 99
    plain.fit(1)
    learn = make_learner(MetaReweightCallback(), dls=make_dls(batch_tfms=Augment()), model=Hooked())
    learn.model.fail_at,learn.model.error = lambda: learn.training and getattr(learn, 'iter', 0) == 1,RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): learn.fit(1)
    assert streams() == states[1]

OOM,OF_META,OF_TRAINING = 'out of memory','batch {} of meta_dl in epoch 0','batch {} of the training loader in epoch 0'
PASSES = {
    'forward': [OF_TRAINING.format(0), OF_META.format(1), OF_TRAINING.format(0), OOM, OF_TRAINING.format(1), OF_META.format(2)],
    'auto': [OOM, OF_META.format(1), OOM, OF_META.format(2)],
}

@pytest.mark.parametrize('engine,call', [(engine, call) for engine,where in PASSES.items() for call in range(1, len(where) + 1)])
def test_a_model_that_fails_under_meta_weight_net(make_learner, engine, call):
    """With separate passes, a step has four: the weighted gradient, the one on the trusted batch, the alignment and the training pass.
    Otherwise there are two: the training pass, and the one on the trusted batch. The first of all is to try."""
    learn = make_learner(MetaWeightNetCallback(engine=engine), model=Hooked())
    before,n = facts(learn),iter(range(1000))
    learn.model.fail_at,learn.model.error = lambda: next(n) == call,RuntimeError(OOM)
    with pytest.raises(RuntimeError, match=PASSES[engine][call - 1]): learn.fit(1)
    learn.model.fail_at = None
    check_usable(learn, before)

# ---- trusted loaders that fail

class Locked(Exception):
    "An error that can be neither copied nor made from a message."
    def __init__(self, file, lock): super().__init__(file, lock)
    def __reduce__(self): raise TypeError('has a lock')
    def __str__(self): return f'{self.args[0]} is locked'

class Images(Dataset):
    "Fails at an item, in the way that is asked for."
    def __init__(self, fault, at=7): self.fault,self.at = fault,at
    def __len__(self): return 24
    def __getitem__(self, i):
        x,y = images[meta[i]].clone(),int(labels[meta[i]])
        if i == self.at and self.fault == 'truncated': raise OSError('image file is truncated (3 bytes not processed)')
        if i == self.at and self.fault == 'missing': open('/nowhere/7.jpg')
        if i == self.at and self.fault == 'locked': raise Locked('7.jpg', object())
        if i == self.at and self.fault == 'encoding': b'\xff'.decode('utf-8')
        if i == self.at and self.fault == 'dies' and torch.utils.data.get_worker_info(): os._exit(1)
        if i == self.at and self.fault == 'nan': x[0, 0, 0] = float('nan')
        if i == self.at and self.fault == 'inf': x[0, 0, 0] = -float('inf')
        if i == self.at and self.fault == 'shape': x = x[:, :5]
        if i == self.at and self.fault == 'label': y = 9
        return x,y

class Stream(IterableDataset):
    "A stream that breaks off."
    def __iter__(self):
        for i in range(30):
            if i == 20: raise ConnectionError('the stream broke off')
            yield images[meta[i % 24]],int(labels[meta[i % 24]])

FAULTS = {
    'truncated image': (lambda: TorchLoader(Images('truncated'), 12), OSError, r'batch [12] of meta_dl in epoch 0 \(could not be read\): image file is truncated'),
    'truncated image in a worker': (lambda: TorchLoader(Images('truncated'), 12, num_workers=1), OSError, r'(?s)batch [12] of meta_dl in epoch 0 \(could not be read\).*image file is truncated'),
    'missing image': (lambda: TorchLoader(Images('missing'), 12), FileNotFoundError, r'batch [12] of meta_dl in epoch 0 \(could not be read\): .*No such file or directory: ./nowhere/7.jpg'),
    "an error of the user's own": (lambda: TorchLoader(Images('locked'), 12), Exception, r'batch [12] of meta_dl in epoch 0 \(could not be read\): 7.jpg is locked'),
    'a name in another encoding': (lambda: TorchLoader(Images('encoding'), 12), Exception, r"batch [12] of meta_dl in epoch 0 \(could not be read\): .*can't decode byte 0xff"),
    'a worker dies': (lambda: TorchLoader(Images('dies'), 12, num_workers=1), RuntimeError, r'(?s)batch [12] of meta_dl in epoch 0 \(could not be read\).*worker'),
    'NaN in a trusted item': (lambda: TorchLoader(Images('nan'), 12), FloatingPointError, r'batch [12] of meta_dl in epoch 0 .* holds NaN or infinite values, in its item\(s\) \[\d+\]'),
    'infinity in a trusted item': (lambda: TorchLoader(Images('inf'), 12), FloatingPointError, r'batch [12] of meta_dl in epoch 0 .* holds NaN or infinite values'),
    'another shape': (lambda: TorchLoader(Images('shape'), 12), RuntimeError, r'batch [12] of meta_dl in epoch 0 \(could not be read\).*stack expects'),
    'an unknown label': (lambda: TorchLoader(Images('label'), 12), IndexError, r'batch [12] of meta_dl in epoch 0 .*Target 9 is out of bounds'),
    'a stream breaks off': (lambda: TorchLoader(Stream(), 12), ConnectionError, r'batch 2 of meta_dl in epoch 0 \(could not be read\): the stream broke off'),
    'batches of another kind': (lambda: [(images[meta], torch.tensor(labels[meta])), images[meta]], ValueError, r'batch 2 of meta_dl .*are the labels missing'),
}

@pytest.mark.filterwarnings('ignore:meta_dl has no example')
@pytest.mark.parametrize('name', FAULTS)
def test_a_trusted_loader_that_fails(make_learner, name):
    loader,error,message = FAULTS[name]
    learn = make_learner(MetaReweightCallback(loader()), model=Hooked())
    before = facts(learn)
    with pytest.raises(error, match=message): learn.fit(1)
    learn.meta_reweight.meta_dl = torch_loader()
    check_usable(learn, before)

# ---- values that are not finite

def test_nan_in_a_training_item(make_learner):
    dls = make_dls()
    learn = make_learner(MetaReweightCallback(), dls=dls, model=Hooked())
    before = facts(learn)
    poison = Callback(before_batch=lambda self: self.learn.xb[0].__setitem__((5, 0, 0, 0), float('nan')) if self.training and self.iter == 2 else None)
    with pytest.raises(FloatingPointError, match=r'batch 2 of the training loader in epoch 0 .* holds NaN or infinite values, in its item\(s\) \[5\]'): learn.fit(1, cbs=poison)
    check_usable(learn, before)

class Overflow(nn.Module):
    "Infinite for an item, in a training batch from the second step on."
    def __init__(self): super().__init__(); self.reduction,self.calls,self.broken = 'mean',0,True
    def forward(self, out, y):
        self.calls += 1
        loss = F.cross_entropy(out, y, reduction='none')
        if self.broken and self.calls > 1 and len(y) == 16: loss = torch.where(torch.arange(len(y)) == 3, loss*float('inf'), loss) # calls of the Learner's only
        return loss if self.reduction == 'none' else loss.mean()

def test_a_loss_that_overflows(make_learner):
    learn = make_learner(MetaReweightCallback(), model=Hooked(), loss_func=Overflow())
    before = facts(learn)
    with pytest.raises(FloatingPointError, match=r'batch 1 of the training loader in epoch 0 .*are NaN or infinite, although the model and both batches are finite'): learn.fit(1)
    learn.loss_func.broken = False
    check_usable(learn, before)

def test_a_model_that_has_diverged(make_learner):
    learn = make_learner(MetaReweightCallback())
    with torch.no_grad(): next(learn.model.parameters())[0] = float('inf')
    with pytest.raises(FloatingPointError, match=r'the model holds NaN or infinite values, in 0.0.0.weight and 0 other.*diverged before batch 0 of epoch 0'): learn.fit(1)

def test_the_search_for_a_learning_rate_may_go_too_far(make_learner):
    learn = make_learner(MetaReweightCallback())
    before = deepcopy(learn.model.state_dict())
    learn.lr_find(start_lr=1, end_lr=1e38, num_it=40, stop_div=False, show_plot=False, suggest_funcs=())
    for k,p in learn.model.state_dict().items(): assert torch.equal(p, before[k])
    learn.fit(1)

# ---- what others leave behind

@pytest.mark.parametrize('at', ['before_batch', 'after_step'])
def test_mixup_gives_the_loss_function_back(make_learner, at):
    "fastai's MixUp leaves its own behind when an error ends the training."
    learn = make_learner([MetaReweightCallback(), MixUp()])
    loss_func = learn.loss_func
    if at == 'before_batch': learn.meta_reweight.meta_dl = TorchLoader(Images('truncated'), 12)
    else: learn.add_cb(Callback(after_step=lambda self: 1/0))
    with pytest.raises((OSError, ZeroDivisionError)): learn.fit(1)
    if at == 'before_batch': assert learn.loss_func is loss_func
    else: learn.remove_cb(learn.cbs[-1])
    learn.meta_reweight.meta_dl = torch_loader()
    learn.fit(1)
    assert learn.loss_func is loss_func

def test_mixup_gives_the_loss_function_back_before_training_begins(make_learner):
    learn = make_learner(MetaReweightCallback(), dls=make_dls(n_parts=2))
    loss_func = learn.loss_func
    with pytest.raises(ValueError, match='learn.dls has 2 loaders'): learn.fit(1, cbs=MixUp())
    assert learn.loss_func is loss_func

def test_what_was_saved_stays(make_learner, tmp_path):
    learn = make_learner([MetaReweightCallback(), SaveModelCallback(every_epoch=True), CSVLogger()])
    def fail(self):
        if self.training and self.epoch == 2: raise KeyboardInterrupt
    learn.add_cb(Callback(after_loss=fail))
    with pytest.raises(KeyboardInterrupt): learn.fit(4)
    assert {p.name for p in (tmp_path/'models').iterdir()} == {'model_0.pth', 'model_1.pth'}
    assert len((tmp_path/'history.csv').read_text().splitlines()) == 3
    assert learn.meta_reweight.item_weights().steps.sum() == 16*(2*len(learn.dls.train) + 1), 'the weights up to then are still there'

# ---- a process that was killed

SCRIPT = '''
    import os, sys
    sys.path.insert(0, {tests!r})
    from conftest import *
    from fastai.basics import *
    from fastai.callback.all import SaveModelCallback
    from fastai_l2rw.all import *
    from fastai_l2rw.schemes import MetaWeightNetCallback
    class Seeded(Callback):
        "What any exact continuation needs: the same batches and dropout in an epoch, whatever came before."
        order = 80
        def before_epoch(self):
            set_seed(self.epoch)
            self.dls.train.rng = random.Random(self.epoch)
    def learner(**kwargs):
        set_seed({seed})
        dls = make_dls(batch_tfms=Augment())
        learn = Learner(dls, cnn(), loss_func=CrossEntropyLossFlat(), opt_func={opt}, cbs=[{callback}, Seeded(), SaveModelCallback(every_epoch=True, with_opt=True)], path={path!r})
        learn.remove_cbs(ProgressCallback)
        return learn
'''

def script(tmp_path, body, callback, opt='Adam', seed=1):
    code = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), path=str(tmp_path), callback=callback, opt=opt, seed=seed) + textwrap.dedent(body)
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)

@pytest.mark.parametrize('callback,opt', [('MetaReweightCallback()', 'Adam'), ("MetaReweightCallback(lookahead='opt', every=2)", 'partial(OptimWrapper, opt=torch.optim.AdamW)'),
    ('MetaWeightNetCallback()', 'Adam'), ('MetaWeightNetCallback()', 'partial(OptimWrapper, opt=torch.optim.SGD)'), ('MetaWeightNetCallback()', 'ranger')])
def test_a_killed_training_goes_on_where_it_was(tmp_path, callback, opt):
    whole,killed = tmp_path/'whole',tmp_path/'killed'
    done = script(whole, 'learn = learner(); learn.fit(4, 1e-2)', callback, opt)
    assert done.returncode == 0, done.stderr
    done = script(killed, 'learn = learner(); learn.add_cb(Callback(after_step=lambda self: os.kill(os.getpid(), 9) if self.epoch == 2 and self.iter == 1 else None)); learn.fit(4, 1e-2)', callback, opt)
    assert done.returncode == -9, done.stderr
    # another stream at the start: what counts is in the checkpoint
    done = script(killed, 'learn = learner(); learn.load("model_1", with_opt=True); learn.fit(4, 1e-2, start_epoch=2)', callback, opt, seed=2)
    assert done.returncode == 0, done.stderr
    expected,got = [torch.load(p/'models'/'model_3.pth', weights_only=False)['model'] for p in (whole, killed)]
    for k in expected: torch.testing.assert_close(got[k], expected[k], rtol=1e-6, atol=1e-7)

def test_a_checkpoint_loads_without_the_callback(make_learner):
    learn = make_learner(MetaReweightCallback())
    learn.fit(1)
    learn.save('with')
    other = make_learner()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Could not load')
        other.load('with', with_opt=True)
    other.fit(1)
