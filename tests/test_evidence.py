"The comparison of schemes: what is trained, how it is kept, and that the tables say what the rows say."
import importlib.util, json, re, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from scipy.stats import ttest_1samp

from fastai_l2rw.schemes import scheme_registry

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'benchmarks'))
import evidence as ev, evidence_tables as tables, label_quality as quality
sys.path.pop(0)

@pytest.fixture(autouse=True)
def registered():
    before = dict(scheme_registry)
    yield
    scheme_registry.clear()
    scheme_registry.update(before)
    ev.read_data.cache_clear()

@pytest.fixture
def small(monkeypatch, tmp_path):
    "A file of features, and settings that suit it."
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(list('abc'), [500, 300, 200]))
    X = rng.normal(size=(1000, 6)) + 2*np.eye(6)[np.unique(y, return_inverse=True)[1]]
    worse = np.where(rng.random(1000) < 0.3, rng.integers(0, 3, 1000), np.unique(y, return_inverse=True)[1])
    np.savez(tmp_path/'cifar10.npz', X=X.astype(np.float32), y=y, worse=worse)
    monkeypatch.setattr(ev, 'EPOCHS', 2)
    monkeypatch.setattr(ev.one, '__defaults__', (2, 0.01))
    return tmp_path/'cifar10.npz'

def lines(out): return (out/'rows.jsonl').read_text().splitlines()

# ---- what is done to the data

@pytest.mark.parametrize('setting', ev.SETTINGS)
def test_a_setting_is_what_its_name_says(setting):
    "On as many items of a class as the data have."
    how,rng = dict(ev.SETTINGS[setting]),np.random.default_rng(1)
    name,counts = {'ham10000': ('HAM10000', [183, 264, 583, 60, 491, 4323, 80]), 'diamonds': ('Diamonds', [240, 730, 3200, 2040, 1790]),
        'cifar10': ('CIFAR-10', [900]*10)}[how.pop('data').removesuffix('_blocks')]
    y = np.repeat(range(len(counts)), counts)
    others = dict(test=np.tile(np.arange(900) >= 700, 10)) if name == 'CIFAR-10' else {}
    flipped = np.where(rng.random(len(y)) < 0.4, (y + 1) % (y.max() + 1), y)
    others |= {o: flipped for o in ('worse', 'aggregate', 'random1')}
    X = torch.tensor(0.05*rng.normal(size=(len(y), 3)) + y[:, None], dtype=torch.float32)
    test,train,trusted,given = ev.split(X, y, others, 3, **how)
    assert setting.startswith(name)
    assert not set(test) & set(train) and not set(test) & set(trusted) and not set(train) & set(trusted) and len(set(train)) == len(train)
    np.testing.assert_array_equal(given[test], y[test])
    said = re.search(r'(\d+) trusted', setting)
    assert set(np.bincount(y[trusted])) == {int(said[1]) if said else 10}
    counts,wrong = np.bincount(y[train]),(given != y)[train]
    if 'one class 20 times' in setting: assert list(counts) == [600] + [30]*9
    elif tail := re.search(r'long tail (\d+)', setting):
        assert counts[0]/counts[-1] == pytest.approx(int(tail[1]), rel=0.15) and (np.diff(counts) < 0).all()
    elif name == 'CIFAR-10': assert len(set(counts)) == 1
    if noise := re.search(r'(\d+) % (uniform|to the next class|to the most similar class)', setting):
        assert wrong.mean() == pytest.approx(int(noise[1])/100, abs=0.05)
        away = (given - y)[train][wrong] % (y.max() + 1)
        if noise[2] == 'uniform': assert len(set(away)) == y.max()
        elif noise[2] == 'to the next class': assert set(away) == {1}
        else: assert set(away) == {1, y.max()} # of means on a line, a neighbour is nearest
    elif 'right labels' in setting: assert not wrong.any() and setting not in ev.NOISY
    else: np.testing.assert_array_equal(given[train], flipped[train])
    again = ev.split(X, y, others, 3, **how)
    for a,b in zip(again, (test, train, trusted, given)): np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ev.split(X, y, others, 4, **how)[0], test)

def test_a_batch_is_that_of_the_items():
    X,y = torch.arange(40.).reshape(20, 2),np.arange(20) % 3
    dl = ev.FeaturesDL(ev.Features(X, y, np.arange(5, 20)), bs=4, num_workers=0)
    assert [len(b) for _,b in dl] == [4, 4, 4, 3]
    x,labels = map(torch.cat, zip(*dl))
    torch.testing.assert_close(x, X[5:])
    np.testing.assert_array_equal(labels, y[5:])

@pytest.fixture
def photos(tmp_path):
    "A folder of images, for training and test, of two classes."
    rng = np.random.default_rng(0)
    for part,n in (('train', 12), ('test', 4)):
        for k,name in enumerate('ab'):
            (tmp_path/'photos'/part/name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 100, (40, 40, 3)).astype(np.uint8) + np.uint8(100*k)).save(tmp_path/'photos'/part/name/f'{i}.png')
    return tmp_path/'photos'

def test_what_a_look_at_some_labels_gives():
    rng = np.random.default_rng(0)
    truth,labels = rng.random(3000),rng.integers(0, 3, 3000)
    right = rng.random(3000) < truth
    after = quality.after_checks(truth**0.2, labels, right, seed=0) # far too high
    assert len(after) == 12 and all(abs(after[f'tenth {k}']) < 6 for k in range(1, 11)) and after['mean error'] < 6 < after['largest'] + 3
    assert quality.reliability(truth**0.2, right)['mean error'] > 25

def test_features_and_blocks_of_images(photos, tmp_path, monkeypatch):
    "What the last blocks make of the activations of the first ones are the features; a few images are drawn, the same each time."
    pytest.importorskip('efficientnet_lite_pytorch')
    parts = {}
    for name,blocks in (('cifar10', False), ('cifar10_blocks', True)):
        quality.make_features(tmp_path/f'{name}.npz', photos, 64, (20, 3), blocks)
        parts[name] = np.load(tmp_path/f'{name}.npz')
    whole,blocks = parts.values()
    assert whole['path'].tolist() == blocks['path'].tolist() and len(set(whole['path'].tolist())) == 23
    assert [o.split('/')[0] for o in whole['path']] == ['train']*20 + ['test']*3 == ['test' if o else 'train' for o in whole['test']]
    assert all(o.split('/')[1] == y for o,y in zip(whole['path'], whole['y']))
    with torch.no_grad(): made = ev.pretrained_blocks().eval()(torch.tensor(blocks['X'])).mean((2, 3))
    torch.testing.assert_close(made, torch.tensor(whole['X']), rtol=1e-4, atol=1e-5)

    before = [o.clone() for o in ev.pretrained_blocks().state_dict().values()]
    X,y,others = ev.read_data(tmp_path/'cifar10_blocks.npz')
    monkeypatch.setattr(ev, 'BS', 4)
    learn,_ = ev.train(X, y, np.arange(16), y, np.arange(16, 20), 'calibrated', 0, 0, 0.003)
    assert not learn.training and all(torch.equal(a, b) for a,b in zip(before, ev.pretrained_blocks().state_dict().values()))
    tuned = learn[0].state_dict().values()
    assert any(not torch.equal(a, b) for a,b in zip(before, tuned)), 'the blocks are trained'

def test_one_image_of_a_lesion(tmp_path):
    (tmp_path/'images').mkdir()
    for i in range(4): Image.new('RGB', (8, 8), (i, 0, 0)).save(tmp_path/'images'/f'ISIC_{i}.jpg')
    (tmp_path/'HAM10000_metadata.csv').write_text('lesion_id,image_id,dx\nL0,ISIC_2,nv\nL1,ISIC_1,mel\nL0,ISIC_0,nv\nL2,ISIC_3,bcc\n')
    files,labels,test = quality.images(tmp_path)
    assert [o.stem for o in files] == ['ISIC_0', 'ISIC_1', 'ISIC_3'] and labels.tolist() == ['nv', 'mel', 'bcc'] and not test.any()

# ---- what is kept

def test_a_run_goes_on_where_it_was_killed(small, capsys, monkeypatch, tmp_path):
    settings = ['CIFAR-10N worse, balanced']
    schemes = ['unweighted', 'robust', 'small losses', 'gold loss correction', 'trusted alone', ev.CEILING]
    whole,parts = tmp_path/'whole',tmp_path/'parts'
    ev.run([small], whole, settings, schemes, range(2))
    rows = [json.loads(o) for o in lines(whole)]
    assert [(o['seed'], o['scheme']) for o in rows] == [(s, k) for s in range(2) for k in schemes]
    assert all(o['setting'] == settings[0] and 0 < o['balanced_accuracy'] < 100 and o['seconds'] > 0 and o['commit'] for o in rows)
    ev.run([small], parts, settings, schemes, range(2), part=(2, 2))
    assert len(lines(parts)) == 6
    with open(parts/'rows.jsonl', 'a') as f: f.write('{"setting": "CIFAR-10N wo') # a process was killed here
    assert len(ev.read_rows(parts/'rows.jsonl')) == 6
    trained = []
    monkeypatch.setattr(ev, 'one', lambda *args, f=ev.one, **kw: trained.append(args[3]) or f(*args, **kw))
    ev.run([small], parts, settings, schemes, range(2))
    assert len(trained) == 6
    score = lambda out: {ev.key(o): o['balanced_accuracy'] for o in map(json.loads, lines(out))}
    assert score(parts) == score(whole), 'the order of the work changes nothing'
    ev.run([small], parts, settings, schemes, range(2))
    assert len(trained) == 6 and len(lines(parts)) == 12
    monkeypatch.setattr(ev, 'commit', lambda: 'another')
    ev.run([small], parts, settings, ['robust'], range(1), again=True)
    assert len(lines(parts)) == 13 and len(ev.read_rows(parts/'rows.jsonl')) == 12
    assert ev.read_rows(parts/'rows.jsonl')[settings[0], 'robust', 0, ev.LR]['commit'] == 'another'

def test_what_comes_first():
    cells = list(ev.cells(list(ev.SETTINGS), ev.SCHEMES, range(2), 0.1))
    core = [o for o in cells if o['setting'] in ev.CORE]
    assert len(ev.CORE) == 9 and cells[:len(core)] == core and [o['seed'] for o in core] == sorted(o['seed'] for o in core)
    right = [o for o in cells if o['scheme'] == ev.CEILING]
    assert {o['setting'] for o in right} == set(ev.NOISY) and len({ev.key(o) for o in cells}) == len(cells)

def test_labels_of_a_table(tmp_path):
    np.savez(tmp_path/'a.npz', X=np.zeros((4, 2)), y=np.array(['cat', 'dog', 'cat', 'dog']), test=np.array([False, False, False, True]),
        path=np.array(['train/cat/0.jpg', 'train/dog/0.jpg', 'train/cat/1.jpg', 'test/dog/0.jpg']))
    (tmp_path/'t.csv').write_text('path,clean,worse\ntrain/cat/1.jpg,cat,dog\ntrain/dog/0.jpg,dog,cat\ntrain/cat/0.jpg,cat,cat\n')
    ev.add_labels(tmp_path/'a.npz', tmp_path/'t.csv')
    found = np.load(tmp_path/'a.npz')
    assert found['worse'].tolist() == [0, 0, 1, 1] and 'clean' not in found

@pytest.mark.parametrize('args,says', [(['a.npz', '--part', '3/2'], '--part is 3/2'),
    (['a.npz', '--schemes', 'best'], "--schemes has 'best'"), (['a.npz', '--settings', 'none'], "--settings has 'none'")])
def test_wrong_options(args, says, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['evidence.py', *args])
    with pytest.raises(SystemExit, match=re.escape(says)): ev.main()

# ---- tables

def some_rows(means, settings=tuple(ev.CORE), n=5, seed=0):
    rng = np.random.default_rng(seed)
    score = lambda mean: round(float(mean + rng.normal()), 3)
    return [dict(setting=k, scheme=o, seed=s, lr=ev.LR, balanced_accuracy=score(m), seconds=2. if o == 'robust' else 1., commit='abc')
        for k in settings for s in range(n) for o,m in means.items() if o != ev.CEILING or k in ev.NOISY]

def test_what_the_tables_conclude():
    rows = some_rows({'unweighted': 40, 'focal': 45, 'reweighted': 50, 'calibrated': 55, 'early learning': 52, ev.CEILING: 60})
    found = tables.conclusions(tables.wide_table(rows))
    setting = 'CIFAR-10N worse, balanced'
    value = lambda scheme: np.array([o['balanced_accuracy'] for o in rows if o['setting'] == setting and o['scheme'] == scheme])
    o = found[setting]
    assert (o['static'], o['rival'], o['verdict'], o['n']) == ('focal', 'early learning', 'ahead', 5)
    differences = value('calibrated') - value('focal')
    low,high = ttest_1samp(differences, 0).confidence_interval()
    assert tables.signed(o['ahead']) == f'{differences.mean():+.1f} ({low:+.1f} to {high:+.1f})'
    closed = differences.mean()/(value(ev.CEILING) - value('focal')).mean()
    assert tables.share([o]) == pytest.approx(100*closed)
    row = tables.main_table(found, list(ev.CORE)).loc[setting]
    assert row['best static'] == f"{value('focal').mean():.1f} ± {value('focal').std(ddof=1):.1f} (focal)"
    assert row['gap closed, %'] == f'{100*closed:.0f}'
    assert 'gap' not in found['HAM10000, right labels']
    first,second,third = tables.sentences(found)
    assert first == "`'calibrated'` is behind the best static scheme in 0 of 9 settings." and 'ahead in 9, and in 0' in second
    assert tables.cost_table(rows + some_rows({'robust': 50})).loc['robust', 'time, plain training = 1'] == '2.0'

def test_the_tables_say_first_where_the_preset_loses():
    names = list(ev.CORE)
    rows = some_rows({'focal': 50, 'calibrated': 45}, names[:1]) + some_rows({'focal': 50, 'calibrated': 55, ev.CEILING: 60}, names[1:3])
    first,second,_ = tables.sentences(tables.conclusions(tables.wide_table(rows)))
    assert re.fullmatch(r"`'calibrated'` is behind .* in 1 of 3 settings: HAM10000, right labels \(-[3-7]\.\d\)\.", first)
    level = tables.pd.Series([1., -1., 2., -2.])
    assert [tables.verdict(o) for o in (level, level + 9, level - 9, level[:1])] == ['level', 'ahead', 'behind', '']
    assert tables.report(rows).startswith(f'# Evidence: which way to train\n\n{first}\n')

def test_a_scheme_with_fewer_seeds_is_not_the_best():
    rows = some_rows({'focal': 50, 'calibrated': 55}) + some_rows({'unweighted': 60}, n=2)
    assert tables.conclusions(tables.wide_table(rows))['HAM10000, right labels']['static'] == 'focal'

def test_the_figure_has_all_settings():
    rows = some_rows({'focal': 50, 'reweighted': 40, 'calibrated': 55, 'early learning': 52, ev.CEILING: 60})
    found = tables.conclusions(tables.wide_table(rows))
    ax, = tables.figure(found).axes
    assert [o.get_text() for o in ax.get_yticklabels()] == list(ev.CORE) and 'balanced accuracy' in ax.get_xlabel()
    signs = {o.get_label(): (o.get_marker(), len(o.get_xdata())) for o in ax.lines if not o.get_label().startswith('_')}
    assert len({o for o,_ in signs.values()}) == 5 and [n for _,n in signs.values()] == [9]*4 + [len(set(ev.NOISY) & set(ev.CORE))]

# ---- that pages agree with the rows

kept = root/'results'/'evidence'

def cells_of(text):
    "Each row of a table in Markdown as a dictionary, by the heads of its columns."
    found,head = [],None
    for line in text.splitlines():
        if not line.startswith('|'): head = None; continue
        parts = [re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', o).strip() for o in line.strip('|').split('|')]
        if head is None: head = parts
        elif not set(parts[0]) <= set('-: '): found.append(dict(zip(head, parts)))
    return found

def disagreements(text, rows):
    "The cells of a page's tables, in rows that are named as a setting, that are not what the rows give; and how many are."
    short = tables.short_table(tables.conclusions(tables.wide_table(rows)), list(ev.SETTINGS))
    n,wrong = 0,[]
    for row in cells_of(text):
        name = next(iter(row.values()))
        if name not in short.index: continue
        for title in set(row) & set(short):
            n += 1
            if row[title] != short.loc[name, title]: wrong.append((name, title, row[title], short.loc[name, title]))
    return n,wrong

def test_cells_that_disagree_are_found():
    rows = some_rows({'focal': 50, 'reweighted': 40, 'calibrated': 55})
    page = 'Text.\n\n' + tables.markdown(tables.short_table(tables.conclusions(tables.wide_table(rows)))) + '\n'
    n,wrong = disagreements(page, rows)
    assert n == 9*5 and not wrong
    changed = re.sub(r'(?<=HAM10000, right labels \| )\d+', '77', page)
    assert [o[:2] for o in disagreements(changed, rows)[1]] == [('HAM10000, right labels', 'best without trusted examples')]

@pytest.mark.skipif(not (kept/'rows.jsonl').exists(), reason='nothing has been trained yet')
def test_pages_agree_with_the_rows():
    rows = list(ev.read_rows(kept/'rows.jsonl').values())
    assert (kept/'README.md').read_text(encoding='utf-8') == tables.report(rows), 'run python benchmarks/evidence_tables.py'
    for page in ('README.md', 'results/README.md'):
        n,wrong = disagreements((root/page).read_text(encoding='utf-8'), rows)
        assert not wrong, f'{page}: run python benchmarks/evidence_tables.py --short'
