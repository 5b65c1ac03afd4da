"Several processes on this machine weigh and train as one does; if one of them fails, all end."
import os, re, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest, torch

from fastai_l2rw.ranks import Ranks

pytest.importorskip('accelerate')
pytest.importorskip('torchvision')
SCRIPT = Path(__file__).parent/'ranks.py'
ENV = os.environ | dict(OMP_NUM_THREADS='1', MALLOC_MMAP_THRESHOLD_='1073741824') # for the sake of memory that comes and goes

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What each process has, by number of processes."
    out = tmp_path_factory.mktemp('ranks')
    done = subprocess.run([sys.executable, str(SCRIPT), str(out)], capture_output=True, text=True, env=ENV, timeout=400)
    assert done.returncode == 0, done.stderr
    found = {n: [torch.load(out/f'{n}-{r}.pt', weights_only=False) for r in range(n)] for n in (1, 2, 4)}
    errors = [o['error'] for ranks in found.values() for cases in ranks for o in cases.values() if 'error' in o]
    assert not errors, errors[0]
    return found

def relative(a, b): return float((a - b).double().norm()/a.double().norm())

def same(one, several):
    "Weights to 1e-5, parameters and what the ledger has to 1e-4 of their size."
    torch.testing.assert_close(several['weights'], one['weights'], rtol=0, atol=1e-5)
    assert one['weights'].std() > 1e-4
    assert several['parameters'].isfinite().all() and relative(one['parameters'], several['parameters']) < 1e-4
    if 'net' in one: assert relative(one['net'], several['net']) < 1e-3 # of its optimizer, which divides by the gradient's size
    for k in ('figures', 'item_weights', 'evidence', 'quality'):
        if k in one: torch.testing.assert_close(several[k], one[k], rtol=1e-4, atol=1e-5, equal_nan=True)

EVERYWHERE = ['MLP', 'MLP, accumulated', 'MLP, accumulated without sync', 'ResNet-18 with group norm', 'ResNet-18 with frozen batch norm',
    'transformer', 'synchronised batch norm',
    'fewer trusted examples than processes', 'a process with zeros only', 'uneven parts', 'resumed']

@pytest.mark.parametrize('case', EVERYWHERE)
def test_one_two_and_four_processes(found, case):
    "The same weights in 20 steps, the same parameters after them, and the same ledger in each process."
    for n in (2, 4):
        for cases in found[n]: same(found[1][0][case], cases[case])

@pytest.mark.parametrize('case', ['relative', 'margin', 'every=2', 'params', 'skip_zeros', 'forward', 'reverse', 'uniform', 'opt',
    'opt, accumulated without sync', 'class weights', 'calibrate', 'Meta-Weight-Net', 'Meta-Weight-Net, separate pass',
    'Meta-Weight-Net, class weights'])
def test_options_in_two_processes(found, case):
    for cases in found[2]: same(found[1][0][case], cases[case])
    first,second = [cases[case] for cases in found[2]]
    assert first['routes'] == second['routes'] == found[1][0][case]['routes']
    for k in ('net', 'quality'): assert k not in first or torch.equal(first[k], second[k]), 'nothing drifts apart'

@pytest.mark.parametrize('case', ['unused parameters are looked for', 'static graph'])
def test_other_kinds_of_ddp(found, case):
    for cases in found[2]: same(found[1][0]['MLP'], cases[case])

def test_weights_of_one_process_only(found):
    "The case is what its name says."
    weights = found[1][0]['a process with zeros only']['weights']
    assert not weights[:, 12:].any() and (weights[:, :12] > 0).any(1).all()

@pytest.mark.parametrize('case,error,where', [('NaN', 'FloatingPointError', r'batch 3 of the training loader .* in its item\(s\) \[2\]'),
    ('broken data', 'Broken', 'batch 3 of meta_dl in epoch 0 .*the disk is gone'),
    ('broken at once', 'Broken', 'batch 1 of meta_dl .*the disk is gone')])
def test_if_one_fails_all_do(found, case, error, where):
    "Within a second, with an error of the same type, which names the process; and all can train again."
    first,second = [cases[case] for cases in found[2]]
    assert re.search(f'(?s)^{error}: .*process 1 of 2 has failed, and so all end: {error}: {where}', first['said']), first['said']
    assert re.search(f'(?s)^{error}: .*{where}', second['said']) and 'process 1' not in second['said']
    assert max(first['took'], second['took']) < 20
    assert first['steps'] == second['steps'] == {'NaN': 3, 'broken data': 2, 'broken at once': 0}[case]
    assert first['same'] == second['same'] == (case == 'broken at once')
    assert torch.equal(first['parameters'], second['parameters']) and first['parameters'].isfinite().all()

def test_only_the_first_process_warns(found):
    first,second = [cases['warnings']['said'] for cases in found[2]]
    assert len(first) == 1 and 'no example of 2, 3' in first[0] and second == []

def test_trusted_batches_differ_by_process(found):
    first,second = [cases['shares']['seen'] for cases in found[2]]
    assert not any((a == b).all() for x,y in zip(first, second) for a in x for b in y)

def test_a_sharded_model_is_refused(found):
    for cases in found[2]: assert re.search(r'sharded over processes \(FSDPModule\).*distrib_ctx', cases['sharded']['said'])

def test_bytes_of_a_step(found):
    "At most 1.05 times those of plain DDP, or 0.05 times for the head."
    whole,head = [found[2][0][o] for o in ('bytes', 'bytes, head')]
    assert whole['ddp'] == head['ddp'] > 4e7
    assert whole['ddp'] < whole['ours'] < 1.01*whole['ddp'] and head['ours'] < 0.01*head['ddp']

def test_a_killed_process(tmp_path):
    "All end soon, nobody is left, and the checkpoint is whole: a training goes on from it."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(SCRIPT), str(tmp_path), 'killed']
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path/'models'/'each_2.pth').exists():
            assert run.poll() is None and time.monotonic() < deadline, run.stderr.read()
            time.sleep(0.1)
        pids = [int((tmp_path/f'pid{r}').read_text()) for r in (0, 1)]
        os.kill(pids[1], signal.SIGKILL)
        start = time.monotonic()
        _,said = run.communicate(timeout=60)
        assert time.monotonic() - start < 60 and run.returncode != 0
        assert 'Signal 9 (SIGKILL)' in said
        for pid in pids:
            with pytest.raises(ProcessLookupError): os.kill(pid, 0)
    finally: run.kill()
    log = pd.read_csv(tmp_path/'history.csv')
    assert list(log.columns[:5]) == ['epoch', 'train_loss', 'valid_loss', 'meta_loss', 'zero_weights'] and len(log) > 2
    import ranks
    learn,cb = ranks.learner(ranks.mlp, ranks.reweight(calibrate=True), path=tmp_path)
    learn.load('each_2')
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 0.01, start_epoch=3)
    assert cb.item_weights().steps.eq(4).all(), 'three epochs of two processes, and one of this'

def test_one_process_is_alone():
    ranks = Ranks(torch.nn.Linear(1, 1))
    assert ranks.size == 1 and ranks.share(5) == (None, None)
    with pytest.raises(ValueError, match='^no$'), ranks.meeting(): raise ValueError('no')
