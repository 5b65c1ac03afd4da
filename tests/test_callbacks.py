"Every callback and mode of fastai that users combine: with equal weights, it trains as it would without reweighting."
import os, random, subprocess, sys, warnings
from copy import deepcopy
from pathlib import Path

import numpy as np, pytest, torch
from fastai.basics import Callback, CancelStepException, accuracy, error_rate, noop
from fastai.callback.all import (BnFreeze, CSVLogger, CollectDataCallback, CutMix, EarlyStoppingCallback, FetchPredsCallback, GradientAccumulation, GradientClip, MixUp, ParamScheduler,
    ProgressCallback, ReduceLROnPlateau, SaveModelCallback, SchedCos, ShowGraphCallback, TerminateOnNaNCallback)
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import ShortEpochCallback

import fastai_l2rw.weighers
from fastai_l2rw.all import *
from fastai_l2rw.reweight import rectify
from conftest import Augment, cnn, make_dls, split

class CpuAutocast(Callback):
    "bf16 on a CPU; fastai's own is for GPUs."
    def before_batch(self):
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
        self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)
    def after_pred(self): self.learn.pred = self.pred.float()

class EMA(Callback):
    "Keeps a moving average of the weights and validates it, as fastxtend and timm do."
    order = 70
    def before_fit(self): self.average = deepcopy(self.model)
    def after_batch(self):
        if self.training:
            for a,p in zip(self.average.state_dict().values(), self.model.state_dict().values()): a.copy_(a.lerp(p, 0.1) if a.is_floating_point() else p)
    def before_validate(self): self.own,self.learn.model = self.model,self.average
    def after_validate(self): self.learn.model = self.own

class SkipEveryThird(Callback):
    def before_step(self):
        if self.train_iter % 3 == 0: raise CancelStepException()

class PredictInBetween(Callback):
    "Predictions in the middle of an epoch."
    def __init__(self, inner): self.inner = inner
    def after_batch(self):
        if not self.training or self.iter != 1: return
        learn = self.learn
        state = learn.iter,learn.dl,learn.xb,learn.yb
        with learn.removed_cbs(self): learn.get_preds(dl=learn.dls.valid, inner=self.inner)
        learn.iter,learn.dl,learn.xb,learn.yb = state
        learn.model.train()
        learn.training = True

def tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    return TensorBoardCallback(tmp_path/'runs', trace_model=False, log_preds=False)

CALLBACKS = {
    'GradientAccumulation': lambda _: GradientAccumulation(32), 'GradientClip': lambda _: GradientClip(0.1), 'MixedPrecision, fp16': lambda _: MixedPrecision(),
    'MixedPrecision, bf16': lambda _: MixedPrecision('bf16'), 'autocast to bf16': lambda _: CpuAutocast(), 'ChannelsLast': lambda _: ChannelsLast(), 'BnFreeze': lambda _: BnFreeze(),
    'ShortEpochCallback': lambda _: ShortEpochCallback(0.5), 'SaveModelCallback': lambda _: SaveModelCallback(every_epoch=True, with_opt=True),
    'SaveModelCallback, best': lambda _: SaveModelCallback('accuracy'), 'EarlyStoppingCallback': lambda _: EarlyStoppingCallback(min_delta=9., patience=1),
    'ReduceLROnPlateau': lambda _: ReduceLROnPlateau(min_delta=9., patience=1), 'CSVLogger': lambda _: CSVLogger(), 'TensorBoardCallback': tensorboard,
    'TerminateOnNaNCallback': lambda _: TerminateOnNaNCallback(), 'MixUp': lambda _: MixUp(), 'CutMix': lambda _: CutMix(), 'EMA': lambda _: EMA(), 'ProgressCallback': lambda _: ProgressCallback(),
    'ShowGraphCallback': lambda _: [ProgressCallback(), ShowGraphCallback()], 'ParamScheduler': lambda _: ParamScheduler({'lr': SchedCos(1e-2, 1e-4), 'mom': SchedCos(0.95, 0.8)}),
    'CollectDataCallback': lambda _: CollectDataCallback(), 'FetchPredsCallback': lambda _: FetchPredsCallback(), 'steps that are cancelled': lambda _: SkipEveryThird(),
    'get_preds in training, inner': lambda _: PredictInBetween(True),
}

def freeze_in_between(learn):
    learn.freeze(); learn.fit(1, 1e-2)
    learn.unfreeze(); learn.fit(1, 1e-2)

def second_learner(learn):
    other = type(learn)(learn.dls, cnn(), loss_func=learn.loss_func, path=learn.path)
    other.logger = noop
    learn.fit(1, 1e-2); other.fit(1, 1e-2); learn.fit(1, 1e-2)

def predict_between(learn):
    learn.fit(1, 1e-2)
    learn.validate(); learn.get_preds(with_decoded=True, with_loss=True); learn.tta(n=1)
    learn.fit(1, 1e-2)

def find_rate(learn):
    learn.lr_find(show_plot=False, num_it=8)
    learn.fit(1, 1e-2)

MODES = {
    'fit': lambda l: l.fit(2, 1e-2), 'fit_one_cycle': lambda l: l.fit_one_cycle(2, 1e-2), 'fit_flat_cos': lambda l: l.fit_flat_cos(2, 1e-2), 'fit_sgdr': lambda l: l.fit_sgdr(2, 1, 1e-2),
    'fine_tune': lambda l: l.fine_tune(1), 'fit twice': lambda l: (l.fit(1, 1e-2), l.fit(1, 1e-2)), 'start_epoch': lambda l: l.fit(3, 1e-2, start_epoch=1), 'reset_opt': lambda l: (l.fit(1), l.fit(1, reset_opt=True)),
    'freeze in between': freeze_in_between, 'a second Learner': second_learner, 'validate, get_preds and tta': predict_between, 'lr_find': find_rate,
}

def run(make_learner, with_ours, callback=None, mode=MODES['fit'], **kwargs):
    cbs = [MetaReweightCallback()] if with_ours else []
    learn = make_learner(cbs, dls=make_dls(batch_tfms=Augment()), metrics=[accuracy, error_rate], splitter=split, **kwargs)
    if callback is not None: learn.add_cbs(callback)
    loss_func = learn.loss_func
    with warnings.catch_warnings():
        warnings.filterwarnings('error', module='fastai_l2rw')
        mode(learn)
    assert learn.loss_func is loss_func and loss_func.reduction == 'mean'
    return [p.detach().clone() for p in learn.model.state_dict().values()],(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())

@pytest.fixture
def used(monkeypatch):
    "The weights that were used; equal ones on demand."
    log = []
    class Log(list): equal = False
    log = Log()
    original = rectify
    monkeypatch.setattr(fastai_l2rw.weighers, 'rectify', lambda u: (log.append(u), torch.ones_like(u) if log.equal else original(u))[1])
    return log

def compare(make_learner, used, build, tmp_path, **kwargs):
    "Without our callback, with equal weights, and with the real ones."
    without = run(make_learner, False, build and build(tmp_path), **kwargs)
    used.equal = True
    equal = run(make_learner, True, build and build(tmp_path), **kwargs)
    assert used and all(u.std() > 0 for u in used)
    for a,b in zip(without[0], equal[0], strict=True): torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
    assert without[1] == equal[1], 'the random streams stand where they would stand without it'
    used.equal = False
    weighted = run(make_learner, True, build and build(tmp_path), **kwargs)
    assert any(not torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a,b in zip(without[0], weighted[0])), 'real weights make a difference'
    assert all(p.isfinite().all() for p in weighted[0])

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', CALLBACKS)
def test_with_callback(make_learner, used, name, tmp_path): compare(make_learner, used, CALLBACKS[name], tmp_path)

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', MODES)
def test_in_mode(make_learner, used, name, tmp_path): compare(make_learner, used, None, tmp_path, mode=MODES[name])

@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_whole_prediction_in_the_middle_of_an_epoch(make_learner, used):
    "It ends what the callback has begun for the fit, as it resets fastai's Recorder; the training goes on reweighted."
    learn = make_learner([MetaReweightCallback(), PredictInBetween(False)])
    learn.fit(2, 1e-2)
    assert len(used) == 2*len(learn.dls.train) and learn.meta_reweight.item_weights().steps.sum() == 16*len(used)

@pytest.mark.parametrize('norm', ['batch norm', 'no norm'])
def test_distributed(tmp_path, norm):
    "Two processes, each of which weighs its own batches."
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(Path(__file__).parent/'distributed.py'), str(tmp_path), norm],
        capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    (p0, w0, a0),(p1, w1, a1) = [torch.load(tmp_path/f'{rank}.pt') for rank in (0, 1)]
    torch.testing.assert_close(p0, p1)
    assert set(a0 + a1) == {'own pass'}
    assert len(w0) == len(w1) == 80 and not torch.equal(w0, w1)
    assert all(w.isfinite().all() and w.std() > 0.1/16 for w in (w0, w1))
    together = (w0 + w1).view(-1, 8).sum(1)
    torch.testing.assert_close(together, torch.ones_like(together)) # over the batches of both

def test_the_third_loader_of_distributed_training(make_learner, used):
    "fastai hands each process a part of every loader; of the trusted one, each reads all."
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL
    learn = make_learner(MetaReweightCallback())
    third = learn.dls.loaders[2]
    learn.dls.loaders[2] = DistributedDL(third, rank=1, world_size=2, device='cpu')
    read = []
    learn.fit(1, cbs=Callback(after_loss=lambda self: read.append(self.meta_reweight.this_fit.trusted.dl) if self.training else None))
    assert len(used) == len(learn.dls.train) and all(dl is third for dl in read) and read

@pytest.mark.parametrize('share', [False, True])
def test_weights_in_bfloat16(make_learner, share):
    "Only on request, and only where the Learner's own pass runs in it."
    def dtypes(own, **kwargs):
        seen = []
        params = (lambda m: m[1].parameters()) if share else None
        learn = make_learner([MetaReweightCallback(params=params, **kwargs), *own])
        learn.model[1][-1].register_forward_hook(lambda m, args, out: seen.append(out.dtype) if learn.training else None)
        learn.fit(1)
        return set(seen[1:]) # the first is to try the trusted loader out
    assert dtypes([], autocast=True) == {torch.float32}
    assert dtypes([CpuAutocast()]) == {torch.float32, torch.bfloat16} # the virtual passes, and the Learner's own
    assert dtypes([CpuAutocast()], autocast=True) == {torch.bfloat16}

def test_no_weights_in_float16(make_learner):
    class Half(CpuAutocast):
        def before_batch(self):
            self.autocast = torch.autocast('cpu', dtype=torch.float16)
            self.autocast.__enter__()
    learn = make_learner([MetaReweightCallback(autocast=True), half := Half()])
    try:
        with pytest.raises(ValueError, match='autocast=True, but the Learner trains in torch.float16'): learn.fit(1)
    finally: half.autocast.__exit__(None, None, None)
