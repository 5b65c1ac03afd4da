"What lives as long as a step, an epoch or a fit, and what outlives it: checkpoints, exports, the record of items."
import gc, weakref
from copy import deepcopy

import pytest, torch
from fastai.basics import Callback, load_learner
from fastai.callback.all import FetchPredsCallback, SaveModelCallback
from torch import nn

from fastai_l2rw.all import *
from conftest import cnn, make_dls

def pickled_tensors(path):
    "The sizes of all tensors in a file that `learn.export` wrote."
    with torch.serialization._open_zipfile_reader(str(path)) as f: return sorted(len(f.get_record(o)) for o in f.get_all_records() if '/data/' in f'/{o}')

def memory(learn): return next((s['meta_reweight'] for s in learn.opt.state.values() if 'meta_reweight' in s), None)

@pytest.mark.parametrize('kwargs', [dict(calibrate=True), dict(calibrate=True, every=3), {}], ids=str)
def test_an_export_holds_nothing_of_the_training_items(make_learner, tmp_path, kwargs):
    "Neither what is known of labels nor the record: what is exported is as large as without the callback."
    learn = make_learner(MetaReweightCallback(**kwargs), model=cnn(bn=False, p=0.))
    learn.fit(1)
    learn.export('ours.pkl')
    assert ('quality' in memory(learn)) == bool(kwargs), 'a checkpoint holds what is known of labels'
    plain = make_learner(model=cnn(bn=False, p=0.))
    plain.fit(1)
    plain.export('plain.pkl')
    assert pickled_tensors(tmp_path/'ours.pkl') == pickled_tensors(tmp_path/'plain.pkl')
    loaded = load_learner(tmp_path/'ours.pkl')
    assert loaded.meta_reweight.this_fit is None and loaded.meta_reweight.record_of_items.ledger is None
    loaded.dls,loaded.meta_reweight.meta_dl = make_dls(),make_dls().loaders[2]
    with loaded.no_bar(), loaded.no_logging(): loaded.fit(1)
    assert len(loaded.meta_reweight.item_weights())

@pytest.mark.parametrize('make', [lambda: MetaReweightCallback(calibrate=True), MetaWeightNetCallback], ids=['calibrated', 'Meta-Weight-Net'])
def test_checkpoints_keep_what_a_fit_needs_beside_callbacks_that_take_others_out(make_learner, make):
    "`FetchPredsCallback` takes ours out of the Learner for a while after each epoch, before `SaveModelCallback` writes."
    learn = make_learner([make(), FetchPredsCallback(), SaveModelCallback(every_epoch=True, with_opt=True)], model=cnn(bn=False, p=0.))
    learn.fit(2)
    saved = torch.load(learn.path/'models'/'model_1.pth', weights_only=False)['opt']
    left, = [s['meta_reweight'] for s in saved['state'] if 'meta_reweight' in s]
    assert 'seed' in left and ('quality' in left or 'net' in left)
    assert memory(learn) is not None
    cb = next(cb for cb in learn.cbs if isinstance(cb, MetaReweightCallback))
    learn.remove_cb(cb)
    assert memory(learn) is None, 'it takes that away when it leaves'

def as_0_1_0_wrote(learn):
    "The entry of a checkpoint of version 0.1.0: a plain dictionary with these keys."
    left = memory(learn)
    keys = dict(seed=int, net=dict, net_opt=dict) if 'net' in left else dict(seed=int)
    assert all(isinstance(left[k], kind) for k,kind in keys.items()) and set(left) == set(keys)
    if 'net' in left: return left
    return left | dict(running=dict(decay=0.9, sums=torch.rand(3), visits=torch.ones(3))) # of an option that it had

@pytest.mark.parametrize('make', [MetaReweightCallback, MetaWeightNetCallback])
def test_checkpoints_of_version_0_1_0_are_read(make_learner, make):
    "Seed and weight net of an epoch come from the file, in the form that 0.1.0 gave them; what nobody needs any more is left there."
    learn = make_learner(make(), model=cnn(bn=False, p=0.))
    learn.fit(1)
    left = deepcopy({k: v for k,v in as_0_1_0_wrote(learn).items()})
    left['seed'] = 12345
    if 'net' in left: left['net'] = {k: v + 1 for k,v in left['net'].items()}
    next(s for s in learn.opt.state.values() if 'meta_reweight' in s)['meta_reweight'] = left
    learn.save('old')
    other = make_learner(make(), model=cnn(bn=False, p=0.))
    other.load('old', with_opt=True)
    found = []
    def look(self):
        if self.iter == 0 and self.training: found.append(deepcopy(self.learn.cbs.filter(lambda cb: isinstance(cb, MetaReweightCallback))[0].this_fit.state()))
    other.fit(2, start_epoch=1, cbs=Callback(before_batch=look))
    assert found[0]['seed'] == 12345
    for k,v in left.get('net', {}).items(): torch.testing.assert_close(found[0]['net'][k], v)

class Between(Callback):
    "A validation and predictions at the end of each epoch, and in the middle."
    def __init__(self, event): setattr(self, event, self.look)
    def look(self):
        if getattr(self, 'busy', False): return
        self.busy = True
        learn = self.learn
        state = learn.iter,learn.dl,learn.xb,learn.yb,learn.pred,learn.training
        learn.validate(); learn.get_preds()
        learn.iter,learn.dl,learn.xb,learn.yb,learn.pred,learn.training = state
        learn.model.train(learn.training)
        self.busy = False

@pytest.mark.parametrize('event', ['after_train', 'after_epoch'])
def test_validations_in_between_empty_nothing(make_learner, event):
    learn = make_learner([MetaReweightCallback(), Between(event)])
    learn.fit(3)
    assert learn.meta_reweight.item_weights().steps.sum() == 3*16*len(learn.dls.train)
    assert learn.meta_reweight.this_fit is None

def test_two_in_one_fit_are_refused_and_both_leave(make_learner):
    learn = make_learner()
    before = [type(cb) for cb in learn.cbs]
    for both in ([MetaReweightCallback(), MetaReweightCallback()], [MetaReweightCallback(), MetaWeightNetCallback()]):
        with pytest.raises(ValueError, match='has a MetaReweightCallback already'): learn.fit(1, cbs=both)
        assert [type(cb) for cb in learn.cbs] == before and all(cb.learn is None for cb in both)
    learn.add_cb(cb := MetaReweightCallback())
    with pytest.raises(ValueError, match='has a MetaReweightCallback already'): learn.fit(1, cbs=MetaReweightCallback())
    assert learn.meta_reweight is cb
    learn.fit(1)

def test_what_another_callback_left_after_a_crash_is_not_taken_up(make_learner):
    "A fit that was cut short leaves its weight net with the optimizer; a new callback begins with a new one."
    learn = make_learner()
    def stop(self):
        if self.training and self.iter == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[MetaWeightNetCallback(hidden=5), Callback(after_batch=stop)])
    learn.fit(1, cbs=MetaWeightNetCallback(hidden=7))

def test_the_record_does_not_grow_with_the_steps(make_learner):
    "In bytes of tensors, after one epoch and after twelve; those of the last ten can be looked at one by one."
    def size(cb): return sum(t.nbytes for t in cb.record_of_items.ledger.state().values())
    learn = make_learner(MetaReweightCallback(), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    learn.fit(11)
    eleven = size(learn.meta_reweight)
    learn.fit(25)
    assert size(learn.meta_reweight) == eleven
    table = learn.meta_reweight.item_weights(last=10)
    assert table.steps.sum() == 10*16*len(learn.dls.train)
    with pytest.raises(ValueError, match='last=12 is not known.*last=10 or less'): learn.meta_reweight.item_weights(last=12)

def test_steps_and_fits_are_let_go(make_learner):
    "Objects of a fit die with it, and a step with the next, without a collection of cycles."
    steps,fits = [],[]
    class Watch(Callback):
        run_valid = False
        def after_batch(self):
            steps.append(weakref.ref(self.meta_reweight.step))
            fits.append(weakref.ref(self.meta_reweight.this_fit))
            self.alive = sum(o() is not None for o in steps)
            assert self.alive == 1
    learn = make_learner([MetaReweightCallback(), Watch()])
    gc.disable()
    try: learn.fit(1)
    finally: gc.enable()
    assert len(steps) == len(learn.dls.train) and not any(o() for o in steps + fits)

def test_statistics_of_the_engine(make_learner):
    class Doubtful(nn.Module):
        "In every fourth pass, something that the tape does not follow."
        steps = 0
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(64, 8),nn.Linear(8, 4)
        def forward(self, x):
            h = self.a(x.flatten(1))
            if self.training and torch.is_grad_enabled():
                type(self).steps += 1
                if self.steps % 4 == 3: h.register_hook(lambda g: g)
            return self.b(h.tanh())
    learn = make_learner(MetaReweightCallback(), model=Doubtful())
    with pytest.warns(UserWarning, match='of 40 steps took their weights from two backward passes.*because of Tensor.register_hook'): learn.fit(9)
    stats = learn.meta_reweight.engine_statistics()
    assert sum(stats['steps'].values()) == 9*len(learn.dls.train) and stats['steps']['own graph'] == stats['doubts']['Tensor.register_hook'] > 4
    assert set(stats['steps']) == {'own pass', 'own graph'} and stats['compared'] > 0
    assert learn.meta_reweight.step is None

def test_hooks_that_change_gradients_after_they_are_there_are_named(make_learner):
    learn = make_learner(MetaReweightCallback())
    p = learn.model[1][3].weight
    handle = p.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.warns(UserWarning, match='1.3.weight has a hook that runs after its gradient is accumulated'): learn.fit(1)
    handle.remove()
