"Trusted examples that a person has checked: found wherever they are, with their right labels, and gone from where they were."
import builtins, os, shutil, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import (CategoryBlock, ColReader, DataBlock, DataLoaders, Datasets, IndexSplitter, L, Learner, RandomSplitter, Transform,
    TransformBlock, noop, set_seed)
from fastai.callback.progress import ProgressCallback
from fastai.data.load import DataLoader
from fastai.data.transforms import get_image_files, parent_label
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, TabularPandas, tabular_learner
from fastai.text.data import TextBlock
from fastai.vision.all import ImageBlock, ImageDataLoaders
from PIL import Image
from torch import nn

from fastai_l2rw.all import MetaCandidates, MetaReweightCallback, MetaSplitter, PartSplitter, hold_out_meta
from fastai_l2rw.data.core import find_trusted, item_keys, read_checked
from fastai_l2rw.trusted import DoubtedLabels, disagreements

COLOURS = dict(cat=(220, 40, 40), dog=(40, 40, 220), eel=(40, 180, 40))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Pictures, 15 % of them in the wrong folder; the colour is what a person sees."
    path,rng = tmp_path_factory.mktemp('pets'),np.random.default_rng(0)
    for c in COLOURS: (path/c).mkdir()
    for k,c in enumerate(COLOURS):
        wrong = set(rng.permutation(40)[:6])
        for i in range(40):
            into = [o for o in COLOURS if o != c][i % 2] if i in wrong else c
            Image.new('RGB', (12, 12), COLOURS[c]).save(path/into/f'{40*k + i:03}.png')
    return path

def image_dls(path, seed=0, **kwargs): return ImageDataLoaders.from_folder(path, valid_pct=0.2, seed=seed, bs=16, num_workers=0, **kwargs)

def of_colour(pixel): return min(COLOURS, key=lambda c: sum(abs(int(a) - b) for a,b in zip(pixel, COLOURS[c])))

def truth(dl):
    "What a person sees in the images of a loader, and what their labels say."
    x,y = next(iter(dl.new(bs=len(dl.dataset), shuffle=False, drop_last=False)))
    return [of_colour((255*o[:, 0, 0]).tolist()) for o in x.cpu()],[dl.vocab[i] for i in y]

def look(candidates):
    "A person looks at the pictures that are shown, and says which labels are wrong."
    seen = {}
    for ax in candidates.show().axes:
        if not ax.get_images(): continue
        number,label = ax.get_title().split('\n')[0].split(': ')
        right = of_colour(np.asarray(ax.get_images()[0].get_array())[0, 0])
        if right != label: seen[int(number)] = right
    return seen

@pytest.mark.parametrize('seed', range(3))
def test_a_person_makes_a_trusted_set_without_a_wrong_label(folder, tmp_path, seed, capsys):
    dls = image_dls(folder, seed)
    by_given = truth(hold_out_meta(dls, 5, seed=seed)[1])
    assert by_given[0] != by_given[1], 'drawn by the labels as given, some are wrong'
    assert 'Nobody has checked these' in capsys.readouterr().out
    candidates = MetaCandidates(dls, per_class=5, seed=seed)
    wrong = look(candidates)
    assert wrong
    candidates.relabel(wrong).confirm()
    said = capsys.readouterr().out
    assert f'15 examples are confirmed, {len(wrong)} of them with another label' in said and 'draw() gets more' in said
    while min(candidates.counts().values()) < 5:
        candidates.draw()
        candidates.relabel(look(candidates)).confirm()
    candidates.save(tmp_path/'checked.csv')
    for trusted in (candidates, tmp_path/'checked.csv', str(tmp_path/'checked.csv')):
        held,meta_dl = hold_out_meta(dls, trusted=trusted)
        seen,labels = truth(meta_dl)
        assert seen == labels and min(labels.count(c) for c in COLOURS) >= 5
        assert not set(held.train_ds.items) & set(meta_dl.dataset.items) and held.valid is dls.valid
        assert len(held.train_ds) + len(meta_dl.dataset) == len(dls.train_ds)
        assert not meta_dl.unchecked

def checked_file(dls, fname, **kwargs):
    candidates = MetaCandidates(dls, **kwargs)
    candidates.relabel(look(candidates)).confirm().save(fname)
    return candidates

def test_checked_examples_are_found_in_another_split(folder, tmp_path, capsys):
    "Also those that are among the validation items then."
    checked_file(image_dls(folder, 0), tmp_path/'checked.csv', per_class=6)
    dls = image_dls(folder, 1)
    held,meta_dl = hold_out_meta(dls, trusted=tmp_path/'checked.csv')
    seen,labels = truth(meta_dl)
    assert seen == labels and len(seen) == 18
    in_valid = len(dls.valid_ds) - len(held.valid_ds)
    assert 0 < in_valid < 18 and f'{in_valid} of 18 trusted items were in the validation part' in capsys.readouterr().out
    parts = [set(o.dataset.items) for o in (held.train, held.valid, meta_dl)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 120
    assert held.valid.one_batch()[0].shape == dls.valid.one_batch()[0].shape

def test_all_trusted_items_are_in_validation(folder):
    dls = image_dls(folder)
    wanted = dls.valid_ds.items[:4]
    held,meta_dl = hold_out_meta(dls, trusted=wanted)
    assert set(meta_dl.dataset.items) == set(wanted) and len(held.valid_ds) == len(dls.valid_ds) - 4
    assert set(held.train_ds.items) == set(dls.train_ds.items)
    with pytest.raises(ValueError, match='all 24 items of the validation part: trust fewer'): hold_out_meta(dls, trusted=dls.valid_ds.items)

def test_texts_are_found_by_what_they_are(tmp_path):
    "In validation, where two are the same, they are not looked for."
    texts = [f'text {i} {"long "*40}' for i in range(24)] + ['the same']*2
    def number(o): return torch.tensor([float(len(o))])
    def of(o): return 'ab'[texts.index(o) % 2]
    block = DataBlock((TransformBlock, CategoryBlock), get_x=number, get_y=of, splitter=IndexSplitter(range(20, 26)))
    dls = block.dataloaders(texts, bs=4, num_workers=0)
    MetaCandidates(dls, 2).confirm().save(tmp_path/'checked.csv')
    assert max(map(len, (tmp_path/'checked.csv').read_text().splitlines())) < 110
    held,meta_dl = hold_out_meta(dls, trusted=tmp_path/'checked.csv')
    assert len(meta_dl.dataset) == 4 and len(held.train_ds) == 16

def test_checked_examples_are_found_after_the_folder_has_moved(folder, tmp_path):
    checked_file(image_dls(folder), tmp_path/'checked.csv')
    moved = shutil.copytree(folder, tmp_path/'elsewhere'/'pets')
    assert len(hold_out_meta(image_dls(moved), trusted=tmp_path/'checked.csv')[1].dataset) == 15
    files = get_image_files(moved)
    with pytest.raises(ValueError, match="a splitter can't correct labels: use hold_out_meta"):
        MetaSplitter(RandomSplitter(), get_y=parent_label, trusted=tmp_path/'checked.csv')(files)
    table = read_checked(tmp_path/'checked.csv')
    table[table.label == table.given].to_csv(tmp_path/'same.csv')
    _,_,meta = MetaSplitter(RandomSplitter(), get_y=parent_label, trusted=tmp_path/'same.csv')(files)
    assert {files[i].relative_to(moved).as_posix() for i in meta} == set(table.index[table.label == table.given])

def test_files_that_are_gone(folder, tmp_path):
    candidates = checked_file(image_dls(folder), tmp_path/'checked.csv')
    copy = shutil.copytree(folder, tmp_path/'pets')
    gone = candidates.keys[candidates.table.position[0]]
    (copy/gone).unlink()
    with pytest.warns(UserWarning, match=f'trusted names 1 items that are not among .*{gone}'):
        _,meta_dl = hold_out_meta(image_dls(copy), trusted=tmp_path/'checked.csv')
    assert len(meta_dl.dataset) == 14
    again = MetaCandidates.load(tmp_path/'checked.csv', image_dls(copy), per_class=6)
    again.draw().confirm().save(tmp_path/'checked.csv')
    assert gone in read_checked(tmp_path/'checked.csv').index and len(read_checked(tmp_path/'checked.csv')) > 15

def test_a_file_that_was_edited(folder, tmp_path):
    "By a program that marks the encoding, and by hand; and names that are not UTF-8, or look like numbers or like nothing."
    dls = image_dls(folder)
    checked_file(dls, tmp_path/'checked.csv')
    text = (tmp_path/'checked.csv').read_text()
    (tmp_path/'marked.csv').write_text(text.replace('\n', '\r\n'), encoding='utf-8-sig')
    assert len(hold_out_meta(dls, trusted=tmp_path/'marked.csv')[1].dataset) == 15
    first = text.splitlines()[1]
    (tmp_path/'twice.csv').write_text(text + first)
    with pytest.raises(ValueError, match='has .* more than once: leave one line of it'): hold_out_meta(dls, trusted=tmp_path/'twice.csv')
    for broken in ('', 'file\n"', text.replace('label,', ''), 'file,label,given,date\n'):
        (tmp_path/'broken.csv').write_text(broken)
        with pytest.raises(ValueError): hold_out_meta(dls, trusted=tmp_path/'broken.csv')
    df = pd.DataFrame(dict(name=[f'{i}' for i in range(30)], label=['NA', 'None', '1']*10))
    odd = [Path('a'), *[Path(os.fsdecode(b'\xff%d' % i)) for i in range(29)]]
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda o: torch.zeros(1), get_y=lambda o: df.label[odd.index(o)],
        splitter=IndexSplitter(range(24, 30)))
    dls = block.dataloaders(odd, bs=4, num_workers=0)
    MetaCandidates(dls, 2).relabel({0: 'NA'}).confirm().save(tmp_path/'odd.csv')
    assert len(hold_out_meta(dls, trusted=tmp_path/'odd.csv')[1].dataset) == 6

def test_what_is_saved_is_small_and_readable(folder, tmp_path):
    checked_file(image_dls(folder), tmp_path/'checked.csv')
    lines = (tmp_path/'checked.csv').read_text().splitlines()
    assert lines[0] == 'file,label,given,date' and len(lines) == 16
    assert all(o.count(',') == 3 and o.split(',')[0].count('/') == 1 for o in lines[1:])
    assert [o.name for o in tmp_path.iterdir()] == ['checked.csv']

def test_another_example_by_the_same_name(folder, tmp_path):
    "A row that has another label than it had is taken for another one; one that has been corrected is not."
    df = pd.DataFrame(dict(x=range(40), label=['a', 'b']*20))
    def dls_of(df):
        block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda r: torch.tensor([float(r.x)]), get_y=ColReader('label'),
            splitter=IndexSplitter(range(30, 40)))
        return block.dataloaders(df, bs=8, num_workers=0)
    candidates = MetaCandidates(dls_of(df), 3)
    row = int(candidates.keys[candidates.table.position[0]])
    candidates.relabel({0: 'b'}).confirm().save(tmp_path/'c.csv')
    fixed = df.copy()
    fixed.loc[row, 'label'] = 'b'
    _,meta_dl = hold_out_meta(dls_of(fixed), trusted=tmp_path/'c.csv')
    assert sorted(meta_dl.one_batch()[1].tolist()) == [0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="was labelled '.' when it was checked, and is '.' now"):
        hold_out_meta(dls_of(df.assign(label=['b', 'a']*20)), trusted=tmp_path/'c.csv')
    with pytest.raises(ValueError, match='are called by row, but the items by file'):
        hold_out_meta(image_dls(folder), trusted=tmp_path/'c.csv')

# ---- kinds of naming, kinds of data

def frame_dls(path, df, **kwargs): return ImageDataLoaders.from_df(df, path, valid_pct=0.2, seed=0, bs=16, num_workers=0, **kwargs)

@pytest.mark.parametrize('name', ['files', 'names', 'positions', 'mask', 'function', 'tensor'])
def test_ways_to_name_files(folder, name):
    dls = image_dls(folder)
    items = list(dls.train_ds.items)
    wanted = items[3:30:3]
    trusted = dict(files=wanted, names=[str(o.relative_to(folder)) for o in wanted], positions=range(3, 30, 3),
        mask=[o in wanted for o in items], function=lambda o: o in wanted, tensor=torch.arange(3, 30, 3))[name]
    held,meta_dl = hold_out_meta(dls, trusted=trusted)
    assert set(meta_dl.dataset.items) == set(wanted) and len(held.train_ds) == len(items) - 9
    assert truth(meta_dl)[1] == [o.parent.name for o in meta_dl.dataset.items]

@pytest.mark.parametrize('name', ['rows', 'index', 'column', 'series', 'positions'])
@pytest.mark.parametrize('kind', ['images', 'table', 'split in three'])
def test_ways_to_name_rows(folder, kind, name, capsys):
    files = sorted(get_image_files(folder))
    df = pd.DataFrame(dict(fname=[str(o.relative_to(folder)) for o in files], label=[o.parent.name for o in files],
        size=[float(o.stem) for o in files]))
    df.index = df.index + 1000
    df['ok'] = [i % 11 == 0 for i in range(len(df))]
    if kind == 'images': dls = frame_dls(folder, df, fn_col='fname', label_col='label')
    else:
        third = L(int(i) for i in np.flatnonzero(df.ok))
        train,valid = RandomSplitter(seed=0)(df)
        splits = train,valid
        if kind == 'split in three': splits = *(L(i for i in o if i not in third) for o in splits),third
        dls = TabularPandas(df, [Categorify, FillMissing, Normalize], [], ['size'], 'label', splits=splits).dataloaders(bs=16)
    before = [o.items.copy() for o in (dls.train_ds, dls.valid_ds)]
    if name == 'positions':
        if kind == 'split in three': return
        held,meta_dl = hold_out_meta(dls, trusted=np.flatnonzero(dls.train_ds.items.ok))
        assert len(held.valid_ds) == len(dls.valid_ds)
    else:
        held,meta_dl = hold_out_meta(dls, trusted=dict(rows=df[df.ok], index=df.index[df.ok], column='ok', series=df.ok)[name])
        assert set(meta_dl.dataset.items.index) == set(df.index[df.ok])
        assert not held.valid_ds.items.ok.any()
    assert not held.train_ds.items.ok.any() and meta_dl.dataset.items.ok.all()
    for now,then in zip((dls.train_ds, dls.valid_ds), before): assert now.items.equals(then)
    meta_dl.one_batch(), held.one_batch(), held.valid.one_batch()

def test_the_third_part_of_a_table(tmp_path):
    "fastai adds it to validation; here it is taken out again, and training runs."
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(age=rng.normal(size=120), job=rng.choice(['a', 'b'], 120), income=['low', 'high', 'low']*40))
    splits = list(range(80)),list(range(80, 100)),list(range(100, 120))
    to = TabularPandas(df, [Categorify, Normalize], ['job'], ['age'], 'income', y_block=CategoryBlock(), splits=splits)
    dls = to.dataloaders(bs=16, path=tmp_path)
    assert len(dls.valid_ds) == 40
    learn = quiet(tabular_learner(dls, layers=[8], cbs=MetaReweightCallback()))
    message = r'hold rows out, dls,meta_dl = hold_out_meta\(dls, trusted=rows\): a table has two parts'
    with pytest.raises(ValueError, match=message): learn.fit(1)
    held,meta_dl = hold_out_meta(dls, trusted=df.iloc[splits[2]])
    assert [len(held.train_ds), len(held.valid_ds), len(meta_dl.dataset)] == [80, 20, 20]
    quiet(tabular_learner(held, layers=[8], cbs=MetaReweightCallback(meta_dl))).fit(1)

def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def labels_of(dl): return [o[-1].flatten().tolist() for o in dl.new(shuffle=False, drop_last=False, bs=1, num_workers=0)]

class Odd(Transform):
    "Labels that no `Categorize` makes."
    def encodes(self, o): return torch.tensor(['a', 'b'].index(o))

def corrected_data(kind):
    df = pd.DataFrame(dict(x=range(40), label=['a', 'b']*20))
    if kind == 'table': return TabularDataLoaders.from_df(df, y_names='label', cont_names=['x'], procs=[Normalize], bs=8,
        valid_idx=range(30, 40), y_block=CategoryBlock())
    if kind == 'PyTorch':
        data = [(torch.tensor([float(i)]), torch.tensor(i % 2)) for i in range(30)]
        return DataLoaders(DataLoader(data, bs=8, shuffle=True), DataLoader(data[:5], bs=8))
    if kind == 'own transform': return Datasets(df.x.tolist(), [[lambda i: torch.tensor([float(i)])], [lambda i: 'ab'[i % 2], Odd()]],
        splits=[list(range(30)), list(range(30, 40))]).dataloaders(bs=8, num_workers=0)
    words = TextBlock(Transform(lambda row: L(f'word{row.x % 4} word0'.split())), vocab=['xxunk', 'xxpad', *[f'word{i}' for i in range(4)]])
    block = DataBlock((words, CategoryBlock), get_y=ColReader('label'), splitter=IndexSplitter(range(30, 40)))
    return block.dataloaders(df, bs=8, num_workers=0)

@pytest.mark.parametrize('kind', ['table', 'text', 'PyTorch', 'own transform'])
def test_corrected_labels(kind, tmp_path, capsys):
    dls = corrected_data(kind)
    candidates = MetaCandidates(dls, 3)
    names = list(candidates.classes)
    candidates.relabel({0: names[1], 5: names[0]}).drop([1]).confirm().save(tmp_path/'c.csv')
    assert ('saved by their positions' in capsys.readouterr().out) == (kind == 'PyTorch')
    before = labels_of(dls.train)
    for trusted in (candidates, tmp_path/'c.csv', MetaCandidates.load(tmp_path/'c.csv', dls)):
        held,meta_dl = hold_out_meta(dls, trusted=trusted)
        assert sorted(o for o, in labels_of(meta_dl)) == [0, 0, 1, 1, 1]
        assert len(held.train.dataset) == 25 and labels_of(dls.train) == before
        if kind != 'PyTorch': meta_dl.decode_batch(meta_dl.one_batch()) if kind != 'table' else meta_dl.show_batch(show=False)

def test_texts_and_rows_are_shown_with_their_labels():
    assert list(MetaCandidates(corrected_data('text'), 2).show().input)[0].startswith('word')
    shown = MetaCandidates(corrected_data('table'), 2).show()
    assert list(shown.columns[:2]) == ['label', 'given'] and 'x' in shown and shown.x.max() > 2, 'as it was before normalisation'
    assert MetaCandidates(corrected_data('PyTorch'), 2).show().input.str.startswith('[').all()

def test_parts_of_a_column_and_trusted_rows():
    df = pd.DataFrame(dict(part=['train']*6 + ['valid']*3 + ['test'], ok=[True, False]*5))
    splits = PartSplitter(parts=('train', 'valid', 'meta', 'test'), trusted='ok')(df)
    assert [list(o) for o in splits] == [[1, 3, 5], [7], [0, 2, 4, 6, 8], [9]]
    with pytest.raises(ValueError, match="rows that are of the part 'test', at position 9"): PartSplitter(trusted=[1, 9])(df)
    with pytest.raises(ValueError, match='trusted needs a third name in parts'): PartSplitter(parts=('train', 'valid'), trusted='ok')

def test_named_items_and_their_groups(capsys):
    df = pd.DataFrame(dict(patient=np.repeat(range(10), 4), finding=['no', 'yes']*20))
    train,valid,meta = MetaSplitter(RandomSplitter(seed=0), get_y='finding', trusted=[0, 5, 9], groups='patient')(df)
    assert list(meta) == [0, 5, 9] and not set(df.patient[[*train, *valid]]) & {0, 1, 2}
    assert '9 of 40 items are left out' in capsys.readouterr().out
    assert list(MetaSplitter(RandomSplitter(seed=0), trusted=df[df.patient == 3])(df)[2]) == [12, 13, 14, 15]

# ---- drawing

def test_candidates_are_drawn_in_groups_and_leave_one():
    df = pd.DataFrame(dict(x=range(26), label=['a']*20 + ['b']*3 + ['c']*2 + ['d'], patient=[i//5 for i in range(20)] + [*range(10, 16)]))
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda r: torch.tensor([float(r.x)]), get_y=ColReader('label'),
        splitter=lambda o: (range(len(o)), []))
    dls = block.dataloaders(df, bs=8, num_workers=0)
    candidates = MetaCandidates(dls, 4, groups='patient')
    assert candidates.counts() == dict(a=4, b=2, c=1, d=0)
    assert sorted(candidates.groups[candidates.table.position[candidates.table.label == 'a']]) == [0, 1, 2, 3]
    again = MetaCandidates(dls, 4, groups='patient')
    assert again.table.equals(candidates.table) and not MetaCandidates(dls, 4, groups='patient', seed=1).table.equals(candidates.table)
    more = candidates.draw(6)
    assert more is candidates and len(set(candidates.table.position)) == len(candidates) and candidates.counts()['a'] == 6
    state = torch.get_rng_state(),np.random.get_state()[1].tolist()
    MetaCandidates(dls, 2).show()
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()

def test_nothing_changes_where_a_correction_is_refused(folder):
    candidates = MetaCandidates(image_dls(folder), 2)
    before = candidates.table.copy()
    for labels,error in (({0: 'dog', 99: 'cat'}, ValueError), ({0: 'dog', 1: 'fox'}, ValueError), (['dog'], TypeError)):
        with pytest.raises(error): candidates.relabel(labels)
    with pytest.raises(ValueError): candidates.drop([0, 'x'])
    assert candidates.table.equals(before)

def test_a_picture_that_can_not_be_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path/'pets')
    dls = image_dls(copy)
    candidates = MetaCandidates(dls, 3)
    dls.train_ds.items[candidates.table.position[4]].write_bytes(b'no picture')
    fig = candidates.show()
    assert [bool(ax.get_images()) for ax in fig.axes] == [True]*4 + [False] + [True]*4
    assert "can't be read" in fig.axes[4].texts[0].get_text()

def test_no_more_than_a_page_is_shown(folder, capsys):
    candidates = MetaCandidates(image_dls(folder), 8)
    assert len(candidates.show(max_n=4).axes) == 4 and '4 of 24 candidates' in capsys.readouterr().out
    assert [ax.get_title().split(':')[0] for ax in candidates.show([7, 3]).axes] == ['7', '3']
    assert 'file' in repr(candidates) and '<table' in candidates._repr_html_()

# ---- labels that nobody has checked

def test_the_model_is_asked_about_unchecked_labels(folder, tmp_path):
    dls = image_dls(folder)
    held,meta_dl = hold_out_meta(dls, 5)
    seen,labels = truth(meta_dl)
    wrong = [i for i,(a,b) in enumerate(zip(seen, labels)) if a != b]
    class ByColour(nn.Module):
        "Is right about all but a bit of its bias."
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))
            self.register_buffer('colours', torch.tensor([COLOURS[c] for c in dls.vocab])/255)
            self.calls = 0
        def forward(self, x):
            self.calls += 1
            return self.bias - 9*(x[:, :, 0, 0][:, None] - self.colours).abs().sum(2)
    model = ByColour()
    assert disagreements(model, meta_dl) == wrong and wrong and model.calls == 0 and model.training
    learn = quiet(Learner(held, model, loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(meta_dl), path=tmp_path))
    with pytest.warns(UserWarning) as caught: learn.fit(3, 1e-5)
    told = [str(o.message) for o in caught if 'nobody has checked' in str(o.message)]
    assert len(told) == 1 and f'After epoch 0, the model disagrees with {len(wrong)} of them, at the positions {wrong[0]}' in told[0]
    checked,meta_dl = hold_out_meta(dls, trusted=list(meta_dl.dataset.items))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quiet(Learner(checked, ByColour(), loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(meta_dl), path=tmp_path)).fit(1, 1e-5)

@pytest.mark.parametrize('n_epoch,told_after', [(1, 0), (3, 2)])
def test_a_model_that_knows_little_is_asked_later(folder, tmp_path, n_epoch, told_after):
    "Not after the first epoch, unless that is the last."
    class SaysCat(nn.Module):
        def __init__(self): super().__init__(); self.bias = nn.Parameter(torch.tensor([9., 0., 0.]))
        def forward(self, x): return self.bias.expand(len(x), 3)
    held,meta_dl = hold_out_meta(image_dls(folder), 5)
    learn = quiet(Learner(held, SaysCat(), loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(meta_dl), path=tmp_path))
    with pytest.warns(UserWarning) as caught: learn.fit(n_epoch, 1e-5)
    told, = [str(o.message) for o in caught if 'nobody has checked' in str(o.message)]
    assert f'After epoch {told_after}, the model disagrees with 10 of them' in told
    learn.validate()

def test_asking_changes_no_training(folder, tmp_path):
    def weights(mark):
        set_seed(3)
        held,meta_dl = hold_out_meta(image_dls(folder), 5)
        meta_dl.unchecked = mark
        head = nn.Dropout(0.3),nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(4, 3)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            quiet(Learner(held, model, loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(meta_dl), path=tmp_path)).fit(2, 1e-2)
        return [p.clone() for p in [*model.parameters(), *model.buffers()]]
    for a,b in zip(weights(True), weights(False)): assert torch.equal(a, b)

# ---- by mouse

def test_the_widget(folder, capsys):
    ipywidgets = pytest.importorskip('ipywidgets')
    candidates = MetaCandidates(image_dls(folder), 2)
    box,button,_ = candidates.widget().children
    menus = [o.children[-1] for o in box.children]
    assert [o.value for o in menus] == ['cat', 'cat', 'dog', 'dog', 'eel', 'eel']
    assert isinstance(box.children[0].children[0], ipywidgets.Image)
    menus[0].value,menus[3].value,menus[4].value = 'eel','<Drop>','<Drop>'
    menus[4].value = 'dog'
    button.click()
    assert candidates.table.label.tolist() == ['eel', 'cat', 'dog', 'dog', 'dog', 'eel']
    assert candidates.table.state.tolist() == ['confirmed']*3 + ['dropped'] + ['confirmed']*2
    assert MetaCandidates(corrected_data('table'), 1).widget() and MetaCandidates(corrected_data('text'), 1).widget()

def test_without_ipywidgets(folder, monkeypatch):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name == 'ipywidgets': raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    candidates = MetaCandidates(image_dls(folder), 1)
    with pytest.raises(ImportError, match='pip install ipywidgets, or use show, relabel and drop'): candidates.widget()
