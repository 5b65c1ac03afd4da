"The demo: its data, its command, and what it leaves on disk."
import json, os, signal, subprocess, sys
import numpy as np, pandas as pd, pytest, torch
from sklearn.datasets import load_digits

from fastai_l2rw.studies.commands import l2rw_demo
from fastai_l2rw.studies.demo import *
from fastai_l2rw.studies import demo

clean = load_digits().target

@pytest.mark.parametrize('seed,dominance,noise,trusted,dominant', [(0, 0.4, 0.35, 3, 0), (1, 0.6, 0.1, 5, 7), (2, 0.2, 0., 1, 9)])
def test_digits_data(seed, dominance, noise, trusted, dominant):
    data = digits_data(seed, dominance, noise, trusted, dominant)
    assert len(set(data.train) & set(data.test)) == len(set(data.trusted) & set(data.test)) == len(set(data.trusted) & set(data.train)) == 0
    assert np.bincount(clean[data.trusted]).tolist() == [trusted]*10
    counts = np.bincount(clean[data.train], minlength=10)
    others = np.delete(counts, dominant)
    assert len(set(others)) == 1 and abs(counts[dominant]/counts.sum() - dominance) < 0.02
    assert data.wrong.sum() == round(noise*len(data.train)) and set(np.flatnonzero(data.wrong)) <= set(data.train)
    assert ((data.labels != clean) == data.wrong).all(), 'a wrong label is never the right one by chance, and no other label changes'

def test_loaders_hold_what_they_say():
    data = digits_data(0)
    train,test,trusted = data.dataloaders().loaders
    for dl,items in ((train, data.train), (test, data.test), (trusted, data.trusted)): assert list(dl.dataset.items) == items.tolist()
    x,y = test.one_batch()
    assert (y.numpy() == clean[data.test[:64]]).all() and np.allclose(x[:, 0]*16, load_digits().images[data.test[:64]])

def test_schemes_start_from_the_same_weights(monkeypatch):
    starts = []
    class Stop(Exception): pass
    def fit(self, *args): starts.append([p.detach().clone() for p in self.model.parameters()]); raise Stop
    monkeypatch.setattr(demo.Learner, 'fit_one_cycle', fit)
    for scheme in schemes:
        with pytest.raises(Stop): train_scheme(digits_data(0), scheme, seed=5)
    for other in starts[1:]:
        for p,q in zip(starts[0], other): assert (p == q).all()

def test_results_are_reproducible():
    runs = [train_scheme(digits_data(0), 'reweighted', seed=1, epochs=2) for _ in range(2)]
    for result,_ in runs: result.pop('seconds')
    assert runs[0][0] == runs[1][0] and runs[0][1].equals(runs[1][1])

def test_group_weights():
    data = digits_data(0)
    items = np.arange(len(data.train))
    wrong = data.wrong[data.train]
    weights = pd.DataFrame(dict(weight=np.where(wrong, 0.5, 2.)), index=items)
    groups = group_weights(data, weights)
    assert groups['wrong labels'] == 0.5 and groups['right labels'] == 2
    dominant = data.labels[data.train] == 0
    assert groups['dominant class'] == np.where(wrong, 0.5, 2.)[dominant].mean() and groups['other classes'] == np.where(wrong, 0.5, 2.)[~dominant].mean()

def test_results_table():
    results = pd.DataFrame([dict(scheme=s, seed=i, balanced_accuracy=a, recall_0=a/2, seconds=10.*a) for s,i,a in
        (('unweighted', 0, 0.2), ('unweighted', 1, 0.4), ('reweighted', 0, 0.5), ('reweighted', 1, 0.5))])
    table = results_table(results, dominant=0)
    assert list(table) == ['unweighted', 'reweighted'] and list(table.index) == ['balanced accuracy', 'recall of 0 (dominant)', 'seconds']
    assert table.loc['balanced accuracy', 'unweighted'] == '30.0 ± 14.1' and table.loc['seconds', 'reweighted'] == '5.0 ± 0.0'
    assert results_table(results[results.seed == 0], 0).loc['balanced accuracy', 'unweighted'] == '20.0'

def start(*args, cwd):
    code = 'from fastai_l2rw.studies.commands import l2rw_demo; l2rw_demo.main()'
    (cwd/'run.py').write_text(code)
    return subprocess.Popen([sys.executable, str(cwd/'run.py'), *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True)

def rows(folder): return [json.loads(o)['result'] for o in (folder/'results.jsonl').read_text().splitlines()]

def test_command(tmp_path):
    run = start('--seed', '4', '--seeds', '2', '--epochs', '1', '--out', 'a/b', cwd=tmp_path)
    out,err = run.communicate()
    assert run.returncode == 0 and not err # nobody else has a say on the screen
    results = pd.read_csv(tmp_path/'a/b/results.csv')
    assert list(zip(results.seed, results.scheme)) == [(s, o) for s in (4, 5) for o in schemes]
    assert np.allclose(results.filter(like='recall_').mean(axis=1), results.balanced_accuracy)
    assert (tmp_path/'a/b/demo.png').read_bytes()[:4] == b'\x89PNG' and 'figure: a/b/demo.png' in out
    assert 'balanced accuracy' in out and '±' in out and '8 of 8: seed 5, trusted alone: ' in out
    assert '\r' not in out # lines, for log files

def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    run = start('--seeds', '1', '--epochs', '2000', '--out', 'out', cwd=tmp_path)
    for line in run.stdout:
        if line.startswith('301 training digits'): break
    os.killpg(run.pid, signal.SIGINT) # as a terminal does
    out,err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, 'l2rw_demo: interrupted\n')
    assert 'interrupted: 0 of 4 trainings are kept in out, and the same command goes on from there' in out
    calls,original = [],demo.train_scheme
    def train(data, scheme, *args):
        calls.append(scheme)
        if len(calls) == 3: raise KeyboardInterrupt
        return original(data, scheme, *args)
    monkeypatch.setattr(demo, 'train_scheme', train)
    options = dict(seeds=1, epochs=2, out=tmp_path/'out')
    with pytest.raises(KeyboardInterrupt): l2rw_demo(**options)
    assert '2 of 4 trainings are kept' in capsys.readouterr().out and len(rows(tmp_path/'out')) == 2
    assert l2rw_demo(**options) == 0 and calls == [*schemes[:3], *schemes[2:]]
    assert pd.read_csv(tmp_path/'out/results.csv').scheme.tolist() == list(schemes)
    assert '1 of 4: seed 0, unweighted: ' in (out := capsys.readouterr().out) and out.count('done before') == 2
    l2rw_demo(**options | dict(epochs=1)) # other options are other trainings
    assert len(calls) == 9

def test_figures_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    original,seen = demo.train_scheme,[]
    def train(*args):
        seen.append(torch.get_num_threads())
        return original(*args)
    monkeypatch.setattr(demo, 'train_scheme', train)
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            l2rw_demo(seeds=1, epochs=2, out=tmp_path/str(n))
            assert torch.get_num_threads() == n
        finally: torch.set_num_threads(1)
        found.append(pd.read_csv(tmp_path/str(n)/'results.csv').drop(columns='seconds'))
    assert seen == [1]*8 and found[0].equals(found[1])

def test_nothing_is_lost(tmp_path, monkeypatch):
    "On a full disk, and where the file of results has something else in it."
    write,n = os.write,[0]
    def full(fd, data):
        n[0] += 1
        return write(fd, data if n[0] < 3 else data[:5])
    monkeypatch.setattr(demo, 'train_scheme', lambda data, scheme, seed, epochs: (dict(scheme=scheme, seed=seed, balanced_accuracy=0.5, recall_0=0.5, seconds=1.),
        pd.DataFrame(dict(weight=1.), index=range(len(data.train))) if scheme == 'reweighted' else None))
    options = dict(seeds=1, epochs=1, out=tmp_path/'out')
    monkeypatch.setattr(os, 'write', full)
    with pytest.raises(SystemExit, match='is the disk full.*2 of 4 trainings are kept in .*, and the same command goes on'):
        l2rw_demo(**options)
    monkeypatch.setattr(os, 'write', write)
    def no_space(self, file, **kwargs): raise OSError(28, 'No space left on device', str(file))
    with monkeypatch.context() as m, pytest.raises(SystemExit, match='No space left on device.*4 of 4 trainings are kept'):
        m.setattr(demo.Figure, 'savefig', no_space)
        l2rw_demo(**options)
    file = tmp_path/'out/results.jsonl'
    good = b''.join(file.read_bytes().splitlines(keepends=True)[:2])
    file.write_bytes(broken := good + b'rubbish\n')
    with pytest.raises(SystemExit, match="whose results can't be read: line 3 of .* Nothing was changed"): l2rw_demo(**options)
    assert file.read_bytes() == broken

@pytest.mark.parametrize('args,message', [(['--seeds', '0'], '--seeds is 0, but must be 1 or more'), (['--epochs', '-1'], '--epochs is -1'),
    (['--dominance', '0.05'], "dominance=0.05 can't be reached"), (['--noise', '2'], 'noise=2.0 must be a share'), (['--trusted', '0'], 'trusted_per_class=0 must be'),
    (['--dominance', '1'], 'dominance=1.0 must be a share'),
    (['--out', 'l2rw_demo'], '--out is l2rw_demo, but must be a folder'), (['--out', 'l2rw_demo/x'], '--out is l2rw_demo/x, but must be a folder')])
def test_wrong_arguments(args, message, tmp_path, monkeypatch):
    "Exit status 1 and a line: Python makes these of a SystemExit with a text."
    (tmp_path/'l2rw_demo').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['l2rw_demo', *args])
    with pytest.raises(SystemExit) as e: l2rw_demo.main()
    assert isinstance(e.value.code, str) and message in e.value.code and '\n' not in e.value.code

def test_help_comes_at_once(tmp_path):
    "Without PyTorch and fastai, which take seconds to load; what takes them says so first."
    run = start('--help', cwd=tmp_path)
    out,_ = run.communicate()
    assert run.returncode == 0 and all(o in out for o in ('--seed ', '--seeds', '--epochs', '--dominance', '--noise', '--trusted', '--out'))
    code = """if True:
        import sys
        from fastai_l2rw.studies import commands
        slow = lambda: [o for o in ('torch', 'fastai', 'numpy', 'pandas', 'matplotlib') if o in sys.modules]
        print(slow())
        commands.import_module = lambda name: print(name, slow())
        commands.l2rw_cifar10(quick=True)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ['[]', 'loading PyTorch and fastai, which takes some seconds', 'fastai_l2rw.studies.cifar10 []']
