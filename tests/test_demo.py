"The demo: its data, its command, and what it leaves on disk."
import subprocess, sys
import numpy as np, pandas as pd, pytest
from sklearn.datasets import load_digits

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

def command(*args, cwd):
    code = 'import sys; from fastai_l2rw.studies.demo import l2rw_demo; sys.argv[0] = "l2rw_demo"; l2rw_demo()'
    script = cwd/'l2rw_demo'
    script.write_text(f'#!{sys.executable}\n{code}\n')
    return subprocess.run([sys.executable, str(script), *args], cwd=cwd, capture_output=True, text=True)

def test_command(tmp_path):
    done = command('--seed', '4', '--seeds', '2', '--epochs', '1', '--out', 'a/b', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = pd.read_csv(tmp_path/'a/b/results.csv')
    assert list(zip(results.seed, results.scheme)) == [(s, o) for s in (4, 5) for o in schemes]
    assert np.allclose(results.filter(like='recall_').mean(axis=1), results.balanced_accuracy)
    assert (tmp_path/'a/b/demo.png').read_bytes()[:4] == b'\x89PNG' and 'figure: a/b/demo.png' in done.stdout
    assert 'balanced accuracy' in done.stdout and '±' in done.stdout and '100.00%' in done.stdout

@pytest.mark.parametrize('args,message', [(['--seeds', '0'], '--seeds is 0, but must be 1 or more'), (['--epochs', '-1'], '--epochs is -1'),
    (['--dominance', '0.05'], "dominance=0.05 can't be reached"), (['--noise', '2'], 'noise=2.0 must be a share'), (['--trusted', '0'], 'trusted_per_class=0 must be'),
    (['--dominance', '1'], 'dominance=1.0 must be a share'),
    (['--out', 'l2rw_demo'], '--out is l2rw_demo, but must be a folder')])
def test_wrong_arguments(args, message, tmp_path):
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr

def test_help(tmp_path):
    done = command('--help', cwd=tmp_path)
    assert done.returncode == 0 and all(o in done.stdout for o in ('--seed ', '--seeds', '--epochs', '--dominance', '--noise', '--trusted', '--out'))
