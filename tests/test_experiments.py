"Grids of trainings: nothing is lost or repeated, whatever happens, and no scheme gets more than another."
import builtins, json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Learner
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from torch import nn

from fastai_l2rw.studies.training import *
from fastai_l2rw.studies.grids import *
from fastai_l2rw.studies import training
from fastai_l2rw.schemes import weighting_schemes
from conftest import make_dls

families = dict(dominance={'dominance 0.5': dict(dominance=0.5), 'dominance 0.9': dict(dominance=0.9)}, noise={'uniform 0.4': dict(uniform=0.4)})
search_on = dict(dominance=('dominance 0.9', dict(dominance=0.9)), noise=('uniform 0.4', dict(uniform=0.4)))

def make_grid_of(schemes=('unweighted', 'reweighted'), seeds=range(2), lrs=(0.1, 0.2), **options): return Grid(families, search_on, list(schemes), seeds, list(lrs), options)
n_search,n_final = 2*2*2, 3*2*2

def fake(cell):
    "Better on validation with 0.1 if unweighted, with 0.2 if reweighted; on the test set it is the other way round."
    good = 0.1 if cell['scheme'] == 'unweighted' else 0.2
    valid = 0.8 if cell['lr'] == good else 0.4
    return dict(valid_balanced_accuracy=valid) | (dict(balanced_accuracy=1 - valid) if cell['stage'] == 'final' else {})

def read(out): return [json.loads(o) for o in (Path(out)/'results.jsonl').read_text().splitlines()]
def read_rows(out):
    "Those of whole lines."
    return [json.loads(o) for o in (Path(out)/'results.jsonl').read_text().splitlines(keepends=True) if o.endswith('\n')]

def check_complete(grid, out):
    "Each cell of the grid is in the file, once."
    results = Results(out)
    cells = grid.search_cells() + grid.final_cells(grid.chosen(results))
    keys = [cell_key(o['cell']) for o in read(out)]
    assert sorted(keys) == sorted(map(cell_key, cells)) and len(cells) == n_search + n_final

# --- the file

def test_a_file_that_ends_anywhere(tmp_path):
    "A run may be killed after any byte: whole lines stay, the rest goes, and the next row is whole."
    results = Results(tmp_path)
    for i in range(3): results.add(dict(seed=i), dict(text='ü\n', x=[0.5]))
    data = results.file.read_bytes()
    for n in range(len(data) + 1):
        results.file.write_bytes(data[:n])
        results = Results(tmp_path)
        assert len(results) == data[:n].count(b'\n')
        results.add(dict(seed=9), dict(x=1))
        assert [o['cell']['seed'] for o in read(tmp_path)] == [*range(len(results) - 1), 9]

def test_reading_changes_nothing(tmp_path):
    (tmp_path/'results.jsonl').write_text('{"cell": {}, "result": {}}\n{"cel')
    Results(tmp_path)
    assert (tmp_path/'results.jsonl').read_text().endswith('{"cel')

def test_a_full_disk(tmp_path, monkeypatch):
    results,write = Results(tmp_path),os.write
    results.add(dict(seed=0), {})
    monkeypatch.setattr(os, 'write', lambda fd, data: write(fd, data[:5]))
    with pytest.raises(OSError, match='is the disk full'): results.add(dict(seed=1), {})
    monkeypatch.undo()
    assert dict(seed=1) not in results
    results.add(dict(seed=1), {})
    assert len(read(tmp_path)) == 2

def test_rows_of_another_process_are_never_dropped(tmp_path):
    "One that has read the file before they were written, and goes on later; locks do not work on all file systems."
    first,second = Results(tmp_path),Results(tmp_path)
    for i in range(8): first.add(dict(seed=i), {})
    before = first.file.read_bytes()
    with pytest.raises(OSError, match='has been written to by another process'): second.add(dict(seed=9), {})
    assert first.file.read_bytes() == before
    first.file.write_bytes(before[:20])
    with pytest.raises(OSError, match='has been written to by another process'): first.add(dict(seed=9), {})
    assert first.file.read_bytes() == before[:20]

def test_the_table_is_whole(tmp_path, monkeypatch):
    "If it can't be written, that of last time stays."
    results = Results(tmp_path)
    results.add(dict(seed=0), {})
    results.to_csv()
    before = (tmp_path/'results.csv').read_bytes()
    results.add(dict(seed=1), {})
    def full(self, file, **kwargs):
        Path(file).write_text('seed')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', full)
    with pytest.raises(OSError, match='No space left'): results.to_csv()
    assert (tmp_path/'results.csv').read_bytes() == before and {o.name for o in tmp_path.iterdir()} == {'results.csv', 'results.jsonl'}

@pytest.mark.parametrize('text', ['\n', 'x\n', '[1]\n', '{"cell": 1}\n{}\n'])
def test_a_file_of_something_else(tmp_path, text):
    (tmp_path/'results.jsonl').write_text(text)
    with pytest.raises(ValueError, match=r"line \d of '.*results.jsonl' is no row of results"): Results(tmp_path)

def test_cells_are_told_apart_by_all_their_fields(tmp_path):
    a = make_grid_of().search_cells()
    b = make_grid_of(epochs=3).search_cells()
    assert len({cell_key(o) for o in a + b}) == 2*n_search
    assert cell_key(dict(a=1, b=dict(c=2, d=3))) == cell_key(dict(b=dict(d=3, c=2), a=1))

# --- running

def test_a_grid(tmp_path, capsys):
    grid = make_grid_of()
    assert run_grid(grid, fake, tmp_path) == 0
    check_complete(grid, tmp_path)
    out = capsys.readouterr().out
    assert 'search for the learning rate among 0.1, 0.2: 8 cells, 0 of them done\nfinal: 12 cells, 0 of them done' in out
    assert '0 to do, 0:00:00 left | final: uniform 0.4, reweighted, seed 1, lr 0.2: 20.0 %' in out and 'all cells are finished' in out
    df = pd.read_csv(tmp_path/'results.csv')
    assert len(df) == 20 and json.loads(df.data[0]) == dict(dominance=0.9) and {'wall_seconds', 'lr', 'how'} <= set(df)

def test_the_test_set_has_no_say(tmp_path):
    "The learning rate with the best validation score is taken, which the fake makes the worst on the test set."
    run_grid(make_grid_of(), fake, tmp_path)
    rows = [o for o in read(tmp_path) if o['cell']['stage'] == 'final']
    assert {(o['cell']['scheme'], o['cell']['lr']) for o in rows} == {('unweighted', 0.1), ('reweighted', 0.2)}
    search = [o for o in read(tmp_path) if o['cell']['stage'] == 'search']
    assert {o['cell']['seed'] for o in search}.isdisjoint(o['cell']['seed'] for o in rows)
    budget = pd.DataFrame([o['cell'] for o in search]).groupby(['family', 'scheme']).lr.apply(sorted)
    assert all(o == [0.1, 0.2] for o in budget)

@pytest.mark.parametrize('after', range(0, n_search + n_final, 3))
def test_interrupted_runs_go_on(tmp_path, after, capsys):
    grid,calls = make_grid_of(),[]
    def train(cell):
        calls.append(cell_key(cell))
        if len(calls) == after + 1: raise KeyboardInterrupt
        return fake(cell)
    with pytest.raises(KeyboardInterrupt): run_grid(grid, train, tmp_path)
    assert capsys.readouterr().out.endswith(f'interrupted: {after} finished trainings are kept in {tmp_path}, and the same command goes on from there\n')
    if after: assert len(pd.read_csv(tmp_path/'results.csv')) == after # the tables are there
    assert run_grid(grid, train, tmp_path) == 0
    assert len(calls) == n_search + n_final + 1 and calls[after] == calls[after + 1]
    check_complete(grid, tmp_path)
    run_grid(grid, train, tmp_path)
    assert len(calls) == n_search + n_final + 1

def test_other_settings_are_added(tmp_path):
    run_grid(make_grid_of(), fake, tmp_path)
    before = (tmp_path/'results.jsonl').read_bytes()
    assert run_grid(make_grid_of(seeds=range(3), schemes=('unweighted', 'reweighted', 'focal')), fake, tmp_path) == 0
    after = (tmp_path/'results.jsonl').read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == 20 + 4 + 6 + 9 # the search and all seeds of one more scheme, one more seed of two

def test_a_failing_cell(tmp_path, capsys):
    grid,broken = make_grid_of(),[True]
    def train(cell):
        if broken[0] and cell['stage'] == 'final' and (cell['setting'], cell['scheme'], cell['seed']) == ('dominance 0.9', 'reweighted', 1): raise RuntimeError('no luck')
        return fake(cell)
    assert run_grid(grid, train, tmp_path) == 1
    out = capsys.readouterr().out
    assert 'FAILED final: dominance 0.9, reweighted, seed 1, lr 0.2: RuntimeError: no luck' in out and '1 failed; run the same command again' in out
    assert 'Traceback' not in out and 'Traceback' in (tmp_path/'errors.log').read_text()
    assert len(read(tmp_path)) == 19
    broken[0] = False
    assert run_grid(grid, train, tmp_path) == 0
    check_complete(grid, tmp_path)

def test_a_failing_search_stops_its_scheme_only(tmp_path, capsys):
    def train(cell):
        if cell['stage'] == 'search' and cell['scheme'] == 'reweighted' and cell['lr'] == 0.1 and cell['family'] == 'noise': raise RuntimeError('no luck')
        return fake(cell)
    assert run_grid(make_grid_of(), train, tmp_path) == 1
    assert 'FAILED final: uniform 0.4, reweighted, seed 0: there is no learning rate, since its search is not finished' in capsys.readouterr().out
    assert len(read(tmp_path)) == 20 - 1 - 2

def test_a_failing_report(tmp_path, capsys):
    def report(search, final, folder): raise ZeroDivisionError('oh')
    assert run_grid(make_grid_of(), fake, tmp_path, report=report) == 1
    assert 'FAILED the report: ZeroDivisionError: oh' in capsys.readouterr().out and len(read(tmp_path)) == 20

def test_a_run_that_hangs_in_its_first_words(tmp_path, monkeypatch):
    "Another run that begins meanwhile is refused; nothing that either has done is lost."
    said = builtins.print
    def hang(*args, **kwargs):
        monkeypatch.setattr(builtins, 'print', said)
        try: run_grid(make_grid_of(seeds=[0]), fake, tmp_path)
        except SystemExit as e: refused.append(str(e))
        said(*args, **kwargs)
    refused = []
    monkeypatch.setattr(builtins, 'print', hang)
    assert run_grid(make_grid_of(), fake, tmp_path) == 0
    check_complete(make_grid_of(), tmp_path)
    assert len(refused) == 1 and 'to which another run is writing' in refused[0]

def test_a_disk_that_gets_full(tmp_path, monkeypatch):
    write,n = os.write,[0]
    def full(fd, data):
        n[0] += 1
        return write(fd, data if n[0] <= 5 else data[:7])
    monkeypatch.setattr(os, 'write', full)
    with pytest.raises(SystemExit, match=r"can't be written to: is the disk full\?. 5 finished trainings are kept in .*, and the same command goes on"):
        run_grid(make_grid_of(), fake, tmp_path)
    monkeypatch.setattr(os, 'write', write)
    before = read_rows(tmp_path)
    assert len(before) == 5 and run_grid(make_grid_of(), fake, tmp_path) == 0 and read(tmp_path)[:5] == before
    check_complete(make_grid_of(), tmp_path)

def test_folders_that_cannot_be_used(tmp_path):
    "One line says why, and nothing is changed."
    (tmp_path/'file').touch()
    for out in (tmp_path/'file', tmp_path/'file'/'x'):
        with pytest.raises(SystemExit, match=f'^--out is {out}, but must be a folder that can be written to: [^\n]*$'):
            run_grid(make_grid_of(), fake, out)
    for dry_run in (False, True):
        (tmp_path/'results.jsonl').write_text('{"cell": {}, "result": {}}\nrubbish\n')
        with pytest.raises(SystemExit, match="whose results can't be read: line 2 of .* Nothing was changed"):
            run_grid(make_grid_of(), fake, tmp_path, dry_run=dry_run)
        assert (tmp_path/'results.jsonl').read_text().endswith('rubbish\n')

def test_progress_in_lines(capsys):
    assert list(progress(range(4), 'images', every=0)) == [0, 1, 2, 3] and list(progress([5, 6], 'x')) == [5, 6]
    assert capsys.readouterr().out.splitlines() == ['images: 25%', 'images: 50%', 'images: 75%', 'images: 100%', 'x: 100%']

def test_the_report_has_the_grids_cells_only(tmp_path):
    seen = []
    def report(search, final, folder): seen.append((len(search), len(final), folder))
    run_grid(make_grid_of(epochs=1), fake, tmp_path, report=report)
    run_grid(make_grid_of(epochs=2, seeds=[5]), fake, tmp_path, report=report)
    assert seen == [(8, 12, tmp_path), (8, 6, tmp_path)]

def test_dry_run(tmp_path, capsys):
    def train(cell): raise AssertionError
    assert run_grid(make_grid_of(), train, tmp_path/'new', dry_run=True) == 0
    out = capsys.readouterr().out
    assert 'to do: 20 cells, time: unknown' in out and '  final: dominance 0.5, reweighted, seed 1\n' in out and not (tmp_path/'new').exists()
    run_grid(make_grid_of(seeds=[0]), fake, tmp_path/'new')
    capsys.readouterr()
    run_grid(make_grid_of(), train, tmp_path/'new', dry_run=True)
    assert 'to do: 6 cells, time: 0:00:00\n  final: dominance 0.5, unweighted, seed 1, lr 0.1\n' in capsys.readouterr().out

def test_remaining_time():
    rows = [dict(cell=dict(scheme=s), result=dict(wall_seconds=t)) for s,t in (('a', 10.), ('a', 20.), ('b', 60.))]
    assert seconds_left(rows, [dict(scheme='a')]*2 + [dict(scheme='b')], 1) == 90 and seconds_left(rows, [dict(scheme='c')], 2) == 15

def test_no_search_without_a_choice(tmp_path):
    assert run_grid(make_grid_of(lrs=[0.3]), fake, tmp_path) == 0
    assert [o['cell']['stage'] for o in read(tmp_path)] == ['final']*12 and {o['cell']['lr'] for o in read(tmp_path)} == {0.3}

@pytest.mark.parametrize('kwargs,says', [(dict(schemes=['magic']), "schemes has 'magic', but must be of 'unweighted'"), (dict(seeds=[1000]), 'seeds has 1000, which the search has'),
    (dict(lrs=[]), 'lrs is empty'), (dict(seeds=[]), 'seeds is empty')])
def test_grids_that_make_no_sense(kwargs, says):
    with pytest.raises(ValueError, match=says): make_grid_of(**kwargs)

@pytest.mark.parametrize('kwargs,says', [(dict(lrs='0.1,x'), '--lrs is 0.1,x, but must be numbers'), (dict(lrs='0'), '--lrs has 0.0'), (dict(schemes='magic'), "--schemes has 'magic'"),
    (dict(settings='magic'), "--settings has 'magic', but must be of 'dominance', 'noise', 'dominance 0.5'")])
def test_wrong_options(kwargs, says):
    with pytest.raises(SystemExit, match=says): make_grid(families, search_on, **dict(settings='', schemes='', seeds=1, lrs='0.1', search_seeds=1, options={}) | kwargs)

# --- several processes

def slow(cell):
    "Leaves its process id, and does what its seed says; if it is to hang, all but the first that comes hang."
    if 'pids' in cell: (Path(cell['pids'])/str(os.getpid())).touch()
    if cell['seed'] == 13: os.kill(os.getpid(), signal.SIGKILL)
    if cell['seed'] == 14: raise RuntimeError('no luck')
    if 'first' in cell:
        try: Path(cell['first']).touch(exist_ok=False)
        except FileExistsError: time.sleep(600)
    return fake(cell) | dict(threads=torch.get_num_threads())

@pytest.mark.parametrize('jobs', [1, 2])
def test_number_of_threads(jobs):
    "As asked for, and afterwards it is what it was."
    cells = [dict(stage='final', scheme='unweighted', lr=0.1, seed=0)]
    before = torch.get_num_threads()
    for n in ((2, 3) if jobs == 1 else (3,)):
        (_,result,_), = run_cells(slow, cells, jobs, threads=n)
        assert result['threads'] == n and torch.get_num_threads() == before

def test_processes_and_their_deaths(tmp_path):
    "A process that is killed takes no other cell with it."
    cells = [dict(stage='final', scheme='unweighted', lr=0.1, seed=o, pids=str(tmp_path)) for o in (0, 13, 1, 14, 2)]
    found = {cell_key(cell): (result, error) for cell,result,error in run_cells(slow, cells, jobs=2)}
    assert len(found) == len(cells)
    for cell in cells:
        result,error = found[cell_key(cell)]
        if   cell['seed'] == 13: assert result is None and 'its process ended with exit code -9' in error
        elif cell['seed'] == 14: assert result is None and 'RuntimeError: no luck' in error
        else: assert error is None and result['threads'] == 1
    assert not any(alive(int(o.name)) for o in tmp_path.iterdir())

def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return 'Z' not in (Path(f'/proc/{pid}/stat').read_text().rsplit(')')[-1].split()[:1] if Path('/proc').exists() else '')

script = '''
import sys; sys.path.insert(0, {tests!r})
from test_experiments import *
if __name__ == '__main__': sys.exit(run_grid(make_grid_of(first={first!r}, pids={pids!r}), slow, {out!r}, jobs=2))
'''

@pytest.mark.skipif(not Path('/proc').exists(), reason='looks for processes')
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_killed_runs_leave_nobody_behind_and_go_on(tmp_path, how):
    "The first cell is finished and the others hang, however busy the machine is."
    (tmp_path/'pids').mkdir()
    paths = {o: str(tmp_path/o) for o in ('pids', 'first', 'out')}
    (tmp_path/'run.py').write_text(script.format(tests=str(Path(__file__).parent), **paths))
    run = subprocess.Popen([sys.executable, tmp_path/'run.py'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in run.stdout:
        if 'to do' in line and 'left |' in line: break # a first cell is finished
    if how == signal.SIGINT:
        with pytest.raises(SystemExit): run_grid(make_grid_of(), fake, tmp_path/'out') # one run at a time
        os.killpg(run.pid, how) # as a terminal does, to all of them
    else: run.send_signal(how)
    _,err = run.communicate(timeout=120)
    assert run.returncode != 0
    if how == signal.SIGINT: assert err.count('KeyboardInterrupt') == 1 # the others are quiet, also those that have just begun
    for _ in range(600):
        pids = [int(o.name) for o in (tmp_path/'pids').iterdir()]
        if not any(map(alive, pids)): break
        time.sleep(0.1)
    assert pids and not any(map(alive, pids)) # the second may not have begun when the first was done
    done = read(tmp_path/'out')
    assert len(done) == 1
    grid = make_grid_of(first=paths['first'], pids=paths['pids'])
    assert run_grid(grid, fake, tmp_path/'out') == 0 and read(tmp_path/'out')[:len(done)] == done
    check_complete(grid, tmp_path/'out')

launched = '''
import sys; sys.path.insert(0, {tests!r})
import torch
from fastai.distributed import DistributedDL
from test_experiments import *
def broadcast(self, t, rank):
    t = torch.LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = broadcast # fastai's own needs a GPU
def train(cell): return train_digits(cell['scheme'], cell['seed'], lr=cell['lr'], bs=8)[0] # half of the batch each
if __name__ == '__main__':
    status = run_grid(make_grid_of(seeds=[0]), train, {out!r})
    def train(cell): return train_digits(cell['scheme'], cell['seed'], lr=cell['lr'])[0] | dict(process=os.getpid())
    status = status or run_grid(make_grid_of(seeds=[0]), train, {out!r} + '_apart', apart=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(status) # as in distributed.py
'''

def test_two_processes_train_each_cell_together(tmp_path):
    "As `accelerate launch` starts them on GPUs: by torch.distributed.run. One of them writes."
    pytest.importorskip('accelerate')
    (tmp_path/'run.py').write_text(launched.format(tests=str(Path(__file__).parent), out=str(tmp_path/'out')))
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '0', '--standalone', str(tmp_path/'run.py')],
        capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'))
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path/'out')
    assert len(rows) == len({cell_key(o['cell']) for o in rows}) == n_search + 3*2 and done.stdout.count('left |') == 2*len(rows)
    steps = {train_digits('unweighted')[0]['n_steps']}
    assert {o['result']['n_steps'] for o in rows} == steps # with half of each batch
    apart = read(tmp_path/'out_apart')
    def what(rows): return [[o['cell'][k] for k in ('stage','setting','scheme','seed')] for o in rows]
    assert what(apart) == what(rows) and {o['result']['n_steps'] for o in apart} == steps
    assert len({o['result']['process'] for o in apart}) == 2, 'each process trained some, and the first wrote all'

# --- one training

def test_measures_are_scikit_learns():
    rng = np.random.default_rng(0)
    y,p = rng.integers(0, 4, 200),rng.integers(0, 5, 200) # nothing is of the class 4, but some is taken for it
    batches = [(torch.eye(5)[p[i:i + 64]], torch.tensor(y[i:i + 64])) for i in range(0, 200, 64)]
    model = nn.Sequential(nn.Identity(), nn.Dropout()).train()
    confusion = confusion_matrix(model, batches, 5)
    assert model.training and (confusion == sklearn_confusion_matrix(y, p, labels=range(5))).all()
    found = scores(confusion)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert np.isclose(found['balanced_accuracy'], balanced_accuracy_score(y, p))
    assert np.isclose(found['accuracy'], accuracy_score(y, p)) and found['recalls'][4] is None
    assert np.allclose(found['recalls'][:4], recall_score(y, p, labels=range(4), average=None)) and found['confusion'] == confusion.tolist()

def train_digits(scheme, seed=0, epochs=2, lr=0.1, every=1, watch=None, bs=16, **kwargs):
    dls = make_dls(bs=bs)
    table = pd.concat([pd.DataFrame(dict(label=[str(int(o[1])) for o in dl.dataset], part=p)) for dl,p in zip(dls.loaders, ('train', 'valid', 'meta'))], ignore_index=True)
    table['clean'] = table.label.where(np.arange(len(table)) % 5 > 0, '0')
    def make_learner(**parts):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
        learn = Learner(model=model, **parts)
        if watch is not None: watch.append(learn)
        return learn
    def fit(learn):
        if watch is not None: watch.append([p.detach().clone() for p in learn.model.parameters()])
        fit_schedule(learn, epochs, lr, **kwargs)
    return train_variant(variants[scheme], dls, table, make_learner, fit, seed, every),table

@pytest.fixture(scope='module')
def trained():
    "All schemes on the same digits; more epochs than a warm-up has."
    out = {}
    for scheme in variants:
        if not {'alone', 'right'} & variants[scheme].keys(): out[scheme] = train_digits(scheme, epochs=6, watch=(watch := [])),watch
    return out

def test_all_schemes_have_the_same_start_and_steps(trained):
    (first,_),(_,start) = trained['unweighted']
    for scheme,((row,_),(_,other)) in trained.items():
        assert all((p == q).all() for p,q in zip(start, other)), scheme
        assert row['n_steps'] == first['n_steps'], scheme
    assert first['n_steps'] == 6*(first['n_train']//16)

def test_facts_about_weights(trained):
    for scheme,((row,table),(learn,_)) in trained.items():
        assert ('ess' in row) == (not is_static(variants[scheme])), scheme
        if 'ess' not in row: continue
        cb = next(o for o in learn.cbs if hasattr(o, 'item_weights'))
        weights = cb.item_weights()
        train = table[table.part == 'train'].iloc[weights.index]
        wrong = (train.label != train.clean).to_numpy()
        assert np.isclose(row['weight_wrong'], weights.weight[wrong].mean()) and np.isclose(row['weight_right'], weights.weight[~wrong].mean())
        for c,w in row['weight_by_class'].items(): assert np.isclose(w, weights.weight[(train.label == c).to_numpy()].mean())
        assert 1 <= row['ess'] <= 16 and 0 <= row['zero_share'] < 1
        classes = [c for c in sorted(set(train.label)) if len({*wrong[train.label == c]}) == 2]
        assert np.isclose(row['weight_wrong_alike'], np.mean([weights.weight[wrong & (train.label == c).to_numpy()].mean() for c in classes]))

def test_trainings_are_reproducible():
    a,b = [train_digits('reweighted')[0] for _ in range(2)]
    for o in (a, b): o.pop('seconds')
    assert a == b

def test_a_training_that_diverges_is_scored():
    for scheme in ('unweighted', 'reweighted'):
        row,_ = train_digits(scheme, lr=1e12, epochs=3)
        assert row['diverged'] and row['valid_balanced_accuracy'] <= 0.5
        assert json.dumps(row)

@pytest.mark.parametrize('schedule', schedules)
def test_schedules(schedule):
    row,_ = train_digits('unweighted', schedule=schedule, watch=(watch := []))
    lrs = watch[0].recorder.lrs
    assert {'constant': lambda: set(lrs) == {0.1}, 'cosine': lambda: lrs[0] == 0.1 > lrs[-1] and lrs == sorted(lrs, reverse=True),
        'one-cycle': lambda: lrs[0] < max(lrs) > lrs[-1], 'fine-tune': lambda: row['n_steps'] == 3*(row['n_train']//16)}[schedule]()

def test_unknown_schedules():
    with pytest.raises(ValueError, match="schedule='exp' is unknown: use one of 'constant'"): train_digits('unweighted', schedule='exp')

@pytest.mark.parametrize('every,epochs,expected', [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 2, [2])])
def test_validations(every, epochs, expected, monkeypatch):
    "Validated every few epochs and after the last one; the best of these epochs is remembered."
    seen,original = [],training.confusion_matrix
    def spy(model, dl, n):
        seen.append(original(model, dl, n))
        return seen[-1]
    monkeypatch.setattr(training, 'confusion_matrix', spy)
    row,_ = train_digits('unweighted', every=every, epochs=epochs, lr=0.3)
    assert len(seen) == len(expected) + 1
    found = [scores(o)['balanced_accuracy'] for o in seen[:-1]]
    assert row['best_valid_balanced_accuracy'] == max(found) and row['best_epoch'] == expected[int(np.argmax(found))] and row['valid_balanced_accuracy'] == found[-1]

def test_static_variants():
    "Those with fixed weights, which need no trusted item and do not know what is right."
    static = [o for o in variants if is_static(variants[o])]
    assert static == ['unweighted', 'weighted sampler', 'inverse frequency', 'effective number', 'focal']
    assert list(variants)[:len(weighting_schemes)] == list(weighting_schemes) and default_schemes == (*weighting_schemes, 'trusted alone')

def test_trusted_alone():
    table = pd.DataFrame(dict(label=list('abcabcab'), part=['train']*5 + ['meta']*2 + ['valid']))
    alone = train_rows(table, variants['trusted alone'])
    assert alone.label.tolist() == list('cacacca') + ['b'] and (alone.part == 'train').sum() == 5
    assert train_rows(table, variants['reweighted']) is table

def test_right_labels_alone():
    "Only items whose labels are right are trained on, for as many steps; without wrong labels it is the scheme itself."
    table = pd.DataFrame(dict(label=list('abcabc'), clean=list('abcbbc'), part=['train']*5 + ['meta'], item=range(6)))
    rows = train_rows(table, variants['right labels alone'])
    assert rows.part.tolist() == ['train']*5 + ['meta'] and rows.item.tolist() == [0, 1, 2, 4, 0, 5]
    for o in (table.assign(clean=table.label), table.drop(columns='clean')): assert train_rows(o, variants['right labels alone']).reset_index(drop=True).equals(o)

def test_select_settings():
    assert select_settings(families, '') == families and list(select_settings(families, ' noise ,dominance 0.9')) == ['dominance', 'noise']
