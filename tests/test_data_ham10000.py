"HAM10000 and ISIC 2018: splits, folders as people have them, and the challenge's own scorer."
import gzip, hashlib, json, os, shutil, subprocess, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import CrossEntropyLossFlat, Learner, load_learner
from fastai.callback.progress import ProgressCallback
from fastai.metrics import BalancedAccuracy
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from fastai_l2rw.data.ham10000 import ham10000_block, ham10000_dls, ham10000_table, isic2018_test_dl, submission, verify

kinds = 'akiec bcc bkl df mel nv vasc'.split()
official = 'MEL NV BCC AKIEC BKL DF VASC'.split()

def photo(seed=0, size=(24, 20)): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

def metadata(per_lesion=None, lesions=6):
    "A table with `lesions` lesions of each kind."
    rows = []
    for lesion,kind in enumerate(np.repeat(kinds, lesions)):
        for _ in range(per_lesion or 1 + lesion % 2):
            rows.append(dict(lesion_id=f'HAM_{lesion:07}', image_id=f'ISIC_{len(rows):07}', dx=kind, dx_type='histo', age='45.0', sex='male', localization='back'))
    return pd.DataFrame(rows)

def make(path, df=None):
    df = metadata() if df is None else df
    for o in (1, 2): (path/f'HAM10000_images_part_{o}').mkdir(parents=True)
    for i,o in enumerate(df.image_id): photo(i).save(path/f'HAM10000_images_part_{1 + i % 2}'/f'{o}.jpg')
    df.to_csv(path/'HAM10000_metadata.csv', index=False)
    return path

@pytest.fixture(scope='module')
def clean(tmp_path_factory): return make(tmp_path_factory.mktemp('clean')/'ham')

@pytest.fixture
def ham(clean, tmp_path):
    shutil.copytree(clean, tmp_path/'ham')
    return tmp_path/'ham'

def snapshot(path):
    "Everything about a folder that could change."
    def facts(o):
        s = o.lstat()
        return s.st_mode, s.st_size, s.st_mtime_ns, os.readlink(o) if o.is_symlink() else hashlib.md5(o.read_bytes()).hexdigest() if o.is_file() else None
    return {str(o): facts(o) for o in [path, *sorted(path.rglob('*'))]}

split = dict(meta_per_class=1, valid_per_class=2)
n_clean = len(metadata())

def read_all(path, **kwargs):
    "The number of images that all loaders yield."
    dls = ham10000_dls(path, size=16, num_workers=0, bs=8, **{**split, **kwargs})
    n = 0
    for dl in dls:
        for x,y in dl.new(shuffle=False, drop_last=False):
            assert x.shape[1:] == (3, 16, 16) and torch.isfinite(x).all()
            n += len(y)
    return n,dls

# --- splits

def test_the_protocol_with_six_images_a_lesion(tmp_path, capsys):
    "21 trusted and 105 validation images, all kinds alike, no lesion in two parts."
    path = make(tmp_path/'ham', metadata(per_lesion=6, lesions=20))
    df = ham10000_table(path)
    assert df[df.part == 'meta'].label.value_counts().to_dict() == {o: 3 for o in kinds}
    assert df[df.part == 'valid'].label.value_counts().to_dict() == {o: 15 for o in kinds}
    assert df.groupby('lesion').part.nunique().max() == 1
    assert (df[df.part != 'train'].lesion.value_counts() == 1).all() # each held-out image shows another lesion
    assert (df.part == 'train').sum() == 7*6*(20 - 18)
    out = capsys.readouterr().out
    assert f'{7*15*5} of 840 items are left out' in out and f'{7*3*5} of 840 items are left out' in out

@pytest.mark.parametrize('seed', range(3))
def test_splits_are_those_of_their_seed(clean, tmp_path, seed):
    df = ham10000_table(clean, seed=seed, **split)
    assert df.equals(ham10000_table(clean, seed=seed, **split))
    assert df.groupby('lesion').part.nunique().max() == 1
    assert list(df.part) != list(ham10000_table(clean, seed=seed + 1, **split).part)
    elsewhere = tmp_path/'another place' # with the images written in another order, and the rows in another
    for o in sorted(clean.rglob('*'), reverse=True):
        if o.is_file() and o.suffix == '.jpg':
            (elsewhere/o.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(o, elsewhere/o.parent.name)
    pd.read_csv(clean/'HAM10000_metadata.csv').sample(frac=1, random_state=seed).to_csv(elsewhere/'HAM10000_metadata.csv', index=False)
    assert list(df.part) == list(ham10000_table(elsewhere, seed=seed, **split).part)

def test_without_lesions_and_without_trusted_images(clean):
    df = ham10000_table(clean, valid_per_class=2, meta_per_class=0, by_lesion=False)
    assert set(df.part) == {'train', 'valid'} and len(df) == n_clean
    assert len(list(ham10000_block(size=16, valid_per_class=2, meta_per_class=0).dataloaders(clean, num_workers=0))) == 2

@pytest.mark.parametrize('kwargs, says', [
    (dict(valid_per_class=30), 'valid_per_class=30 takes 30 items of each class'),
    (dict(valid_per_class=0), 'valid_per_class=0 must be a whole number'),
    (dict(meta_per_class=-1), 'meta_per_class=-1 must be a whole number'),
    (dict(meta_per_class=9), 'meta_per_class=9'),
])
def test_splits_that_cant_be_made(clean, kwargs, says):
    with pytest.raises(ValueError, match=says): ham10000_table(clean, **{**split, **kwargs})

def make_isic(path, df=None, lesions=True):
    "The challenge's own layout."
    df = metadata() if df is None else df
    (path/'ISIC2018_Task3_Training_Input').mkdir(parents=True)
    (path/'ISIC2018_Task3_Training_GroundTruth').mkdir()
    for i,o in enumerate(df.image_id): photo(i).save(path/f'ISIC2018_Task3_Training_Input/{o}.jpg')
    one_hot = pd.DataFrame([[float(o.upper() == k) for k in official] for o in df.dx], columns=official)
    one_hot.insert(0, 'image', df.image_id)
    one_hot.to_csv(path/'ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv', index=False)
    if lesions: df.rename(columns=dict(image_id='image', dx_type='diagnosis_confirm_type'))[['image', 'lesion_id', 'diagnosis_confirm_type']].to_csv(
        path/'ISIC2018_Task3_Training_LesionGroupings.csv', index=False)
    return path

def test_both_layouts_give_the_same_split(clean, tmp_path):
    isic = ham10000_table(make_isic(tmp_path/'isic'), **split)
    ham = ham10000_table(clean, **split)
    for col in ('label', 'part', 'image', 'lesion'): assert list(isic[col]) == list(ham[col])

def test_the_challenges_layout_without_lesions(tmp_path):
    path = make_isic(tmp_path/'isic', lesions=False)
    with pytest.raises(FileNotFoundError, match='ISIC2018_Task3_Training_LesionGroupings.csv, which says'): ham10000_table(path, **split)
    assert len(ham10000_table(path, by_lesion=False, **split)) == n_clean

@pytest.mark.parametrize('change, says', [
    (lambda t: t.replace(',1.0,', ',,', 1), 'no single diagnosis, or one'),
    (lambda t: t.replace(',1.0,0.0', ',1.0,1.0', 1), 'no single diagnosis, or one'),
    (lambda t: t.replace('image,', 'picture,', 1), "has no column 'image'"),
])
def test_dirty_ground_truths(tmp_path, change, says):
    path = make_isic(tmp_path/'isic')
    file = path/'ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv'
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=says): ham10000_table(path, **split)

def test_an_image_of_two_lesions(tmp_path):
    path = make_isic(tmp_path/'isic')
    with open(path/'ISIC2018_Task3_Training_LesionGroupings.csv', 'a') as f: f.write('ISIC_0000000,HAM_9999999,histo\n')
    with pytest.raises(ValueError, match='different lesions for 1 images: ISIC_0000000'): ham10000_table(path, **split)

# --- dirty folders: each works with nothing lost, or gives one error that says what is wrong

def first(path, i=0): return sorted(path.rglob('*.jpg'))[i]

def rewrite(path, change, **kwargs):
    "The table, changed."
    file = path/'HAM10000_metadata.csv'
    df = pd.read_csv(file, dtype=str)
    new = change(df)
    (df if new is None else new).to_csv(file, index=False, **kwargs)

def as_bytes(path, change):
    file = path/'HAM10000_metadata.csv'
    file.write_bytes(change(file.read_bytes()))

def save_as(path, im, **kwargs):
    im.save(path.with_suffix('.tmp'), **kwargs)
    path.with_suffix('.tmp').replace(path)

def turned(path):
    exif = Image.Exif()
    exif[274] = 6
    photo(size=(40, 24)).save(first(path), exif=exif)

def as_png(path, im, drop=True):
    old = first(path)
    if drop: old.unlink()
    im.save(old.with_suffix('.png'))
    return old.with_suffix('.png')

def outside(path, target='outside'):
    "All images of a part as links to a folder elsewhere."
    shutil.move(path/'HAM10000_images_part_1', path.parent/target)
    (path/'HAM10000_images_part_1').mkdir()
    for o in (path.parent/target).iterdir(): (path/'HAM10000_images_part_1'/o.name).symlink_to(o)

def masks(path):
    for folder in ('HAM10000_segmentations_lesion_tschandl', 'ISIC2018_Task3_Test_Input', 'ISIC2018_Task3_Validation_Input'):
        (path/folder).mkdir()
        photo().save(path/folder/'ISIC_9999999.jpg')

def kaggle_twins(path):
    "Kaggle's archive has had both folders twice, once in small letters."
    for o in (1, 2): shutil.copytree(path/f'HAM10000_images_part_{o}', path/f'ham10000_images_part_{o}_again')

def animated(path): save_as(first(path), photo(), format='GIF', save_all=True, append_images=[photo(1), photo(2)])

def two_values(df): df.loc[len(df)] = [*df.loc[0, ['lesion_id', 'image_id']], 'nv', 'histo', '3', 'male', 'face']

def deep(high=65535): return Image.fromarray(np.linspace(0, high, 24*20).reshape(20, 24).astype(np.uint16))

works = dict(
    gif_named_jpg=lambda p: save_as(first(p), photo(), format='GIF'),
    animated_gif_named_jpg=animated,
    png_named_jpg=lambda p: save_as(first(p), photo(), format='PNG'),
    sixteen_bits=lambda p: as_png(p, deep()),
    sixteen_bits_named_jpg=lambda p: save_as(first(p), deep(), format='PNG'),
    float_tiff=lambda p: (save_as(first(p), Image.fromarray(np.random.rand(20, 24).astype(np.float32)), format='TIFF')),
    grey=lambda p: photo().convert('L').save(first(p)),
    black_and_white=lambda p: as_png(p, photo().convert('1')),
    palette=lambda p: as_png(p, photo().quantize(16)),
    cmyk=lambda p: photo().convert('CMYK').save(first(p)),
    rgba=lambda p: as_png(p, photo().convert('RGBA')),
    grey_with_transparency=lambda p: as_png(p, photo().convert('LA')),
    exif_rotation=turned,
    one_pixel=lambda p: photo(size=(1, 1)).save(first(p)),
    macos_files=lambda p: [(o.parent/f'._{o.name}').write_bytes(b'Mac OS X') for o in sorted(p.rglob('*.jpg'))],
    other_files=lambda p: [(p/o).write_text('x') for o in ('.DS_Store', 'Thumbs.db', 'hmnist_28_28_L.csv', 'LICENSE.txt')],
    a_folder_named_like_an_image=lambda p: (p/'x.jpg').mkdir(),
    upper_case_extensions=lambda p: [o.rename(o.with_suffix('.JPG')) for o in p.rglob('*.jpg')],
    lower_case_names=lambda p: [o.rename(o.with_name(o.name.lower())) for o in p.rglob('*.jpg')],
    all_in_one_folder=lambda p: [o.rename(p/o.name) for o in sorted(p.rglob('*.jpg'))],
    duplicate_rows=lambda p: rewrite(p, lambda df: pd.concat([df, df[:5]])),
    nan_age=lambda p: rewrite(p, lambda df: df.assign(age=np.nan)),
    unknown_age=lambda p: rewrite(p, lambda df: df.assign(age='unknown')),
    byte_order_mark=lambda p: as_bytes(p, lambda b: b'\xef\xbb\xbf' + b),
    windows_line_ends=lambda p: as_bytes(p, lambda b: b.replace(b'\n', b'\r\n')),
    utf_16=lambda p: as_bytes(p, lambda b: b.decode().encode('utf-16')),
    latin_1=lambda p: as_bytes(p, lambda b: b.replace(b'back', 'Rücken'.encode('latin-1'))),
    semicolons=lambda p: rewrite(p, lambda df: None, sep=';'),
    tabs=lambda p: rewrite(p, lambda df: None, sep='\t'),
    blank_lines=lambda p: as_bytes(p, lambda b: b + b'\n\n,,,,,,\n'),
    spaces_in_cells=lambda p: rewrite(p, lambda df: df.assign(dx=' ' + df.dx + ' ', image_id=df.image_id + ' ')),
    upper_case_diagnoses=lambda p: rewrite(p, lambda df: df.assign(dx=df.dx.str.upper())),
    extensions_in_the_table=lambda p: rewrite(p, lambda df: df.assign(image_id=df.image_id + '.jpg')),
    columns_in_another_order=lambda p: rewrite(p, lambda df: df[df.columns[::-1]].assign(extra=1)),
    columns_that_others_have_added=lambda p: rewrite(p, lambda df: df.assign(path='x', label=3, part=1, image='y', lesion='z', cell_type='mole')),
    gzipped_table=lambda p: ((p/'HAM10000_metadata.csv.gz').write_bytes(gzip.compress((p/'HAM10000_metadata.csv').read_bytes())), (p/'HAM10000_metadata.csv').unlink()),
    table_without_extension=lambda p: (p/'HAM10000_metadata.csv').rename(p/'HAM10000_metadata'),
    the_same_table_twice=lambda p: shutil.copy(p/'HAM10000_metadata.csv', p/'HAM10000_metadata (1).csv'),
    links_to_elsewhere=outside,
    a_link_to_itself=lambda p: (p/'HAM10000_images_part_1'/'up').symlink_to(p),
    read_only=lambda p: [o.chmod(o.stat().st_mode & ~0o222) for o in [*p.rglob('*'), p]],
    masks_and_test_images=masks,
    images_twice=kaggle_twins,
)

@pytest.mark.parametrize('name', works)
def test_harmless_dirt_just_works(ham, name, capsys):
    works[name](ham)
    before = snapshot(ham)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        n,_ = read_all(ham)
        problems = verify(ham, progress=False)
    left_out = sum(int(o.split(': ')[1].split()[0]) for o in capsys.readouterr().out.splitlines() if 'left out' in o)
    assert n == n_clean - left_out # nothing is lost without a word
    assert problems.usable.all()
    assert snapshot(ham) == before

def test_spaces_and_letters_of_other_languages_in_the_path(clean, tmp_path):
    path = tmp_path/'Données (copie) 皮膚 ü'
    shutil.copytree(clean, path/'HAM 10000')
    for p in (path, str(path/'HAM 10000')): assert read_all(p)[0] > 0

cut_png = lambda p: (lambda f: f.write_bytes(f.read_bytes()[:-40]))(as_png(p, photo()))
errors = dict(
    cut_off=(lambda p: first(p).write_bytes(first(p).read_bytes()[:-60]), '1 time: the file is cut off: HAM10000_images_part_1/ISIC_0000000.jpg'),
    cut_off_after_the_head=(lambda p: first(p).write_bytes(first(p).read_bytes()[:200]), '1 time: the file is'),
    cut_off_png=(cut_png, 'ISIC_0000000.png'),
    zero_bytes=(lambda p: [first(p, i).write_bytes(b'') for i in range(8)], r'8 times: the file is empty: .* and 3 more'),
    a_web_page=(lambda p: first(p).write_text('<html>404</html>'), '1 time: the file is no image'),
    broken_link=(lambda p: (first(p).rename(p.parent/'x.jpg'), first(p, 0).with_name('ISIC_0000000.jpg').symlink_to(p.parent/'y.jpg')), 'the link points to a file that is not there'),
    image_without_row=(lambda p: rewrite(p, lambda df: df[3:]), '3 times: no row in HAM10000_metadata.csv: '),
    row_without_image=(lambda p: [first(p).unlink() for _ in range(3)], '3 times: no image file, but a row in HAM10000_metadata.csv: ISIC_'),
    second_archive_not_unpacked=(lambda p: shutil.rmtree(p/'HAM10000_images_part_2'), f'{n_clean//2} times: no image file, but a row'),
    rows_that_differ=(lambda p: rewrite(p, two_values), '1 time: rows with different values in HAM10000_metadata.csv'),
    lesion_with_two_diagnoses=(lambda p: rewrite(p, lambda df: df.assign(lesion_id=df.lesion_id.where(df.index != 0, df.lesion_id.iloc[-1]))), '3 times: a lesion with different diagnoses'),
    unknown_diagnosis=(lambda p: rewrite(p, lambda df: df.assign(dx=df.dx.where(df.index != 2, 'scc'))), '1 time: no single diagnosis, or one that is none of akiec, bcc'),
    no_diagnosis=(lambda p: rewrite(p, lambda df: df.assign(dx=df.dx.where(df.index != 2))), '1 time: no single diagnosis'),
    no_lesion=(lambda p: rewrite(p, lambda df: df.assign(lesion_id=df.lesion_id.where(df.index != 2))), '1 time: no lesion, so that'),
    no_image_name=(lambda p: rewrite(p, lambda df: pd.concat([df, df[:1].assign(image_id=np.nan)])), f'no image is named in a row of HAM10000_metadata.csv: row {n_clean + 2}'),
    different_images_with_one_name=(lambda p: photo(99).save(p/first(p).name), '2 times: different images with the same name'),
)

@pytest.mark.parametrize('name', errors)
def test_harmful_dirt_is_one_error_and_can_be_left_out(ham, name, tmp_path):
    change,says = errors[name]
    change(ham)
    before = snapshot(ham)
    with pytest.raises(ValueError, match=says): ham10000_dls(ham, **split)
    problems = verify(ham, save=tmp_path/'usable.csv', progress=False)
    assert not problems.usable[0]
    if name not in ('second_archive_not_unpacked', 'zero_bytes', 'no_image_name'): # which leave too few images, or are no matter of images
        n,dls = read_all(ham, usable=tmp_path/'usable.csv')
        bad = {str(o) for o in problems.item[~problems.usable]}
        assert n > 40 and not bad & {str(o) for dl in dls for o in dl.dataset.items.path}
    assert snapshot(ham) == before

tables = dict(
    no_table=(lambda p: (p/'HAM10000_metadata.csv').unlink(), 'must have a table HAM10000_metadata.csv or ISIC2018_Task3_Training_GroundTruth.csv'),
    empty_table=(lambda p: (p/'HAM10000_metadata.csv').write_bytes(b''), "can't be read as a table"),
    no_column=(lambda p: rewrite(p, lambda df: df.drop(columns='lesion_id')), "has no column 'lesion_id', but only 'image_id', 'dx'"),
    no_text=(lambda p: (p/'HAM10000_metadata.csv').write_bytes(b'PK\x03\x04' + bytes(range(256))*9), 'HAM10000_metadata.csv'),
    different_tables=(lambda p: shutil.copy(p/'HAM10000_metadata.csv', p/'HAM10000_metadata_old.csv') and rewrite(p, lambda df: df[1:]), 'there are different tables'),
    no_folder=(shutil.rmtree, 'is no folder'),
    an_archive=(lambda p: (shutil.rmtree(p), p.write_bytes(b'PK')), 'is no folder: unpack it first'),
    no_images=(lambda p: [shutil.rmtree(p/f'HAM10000_images_part_{o}') for o in (1, 2)], 'no image file, but a row'),
)

@pytest.mark.parametrize('name', tables)
def test_folders_that_are_something_else(ham, name):
    change,says = tables[name]
    change(ham)
    with pytest.raises((ValueError, FileNotFoundError), match=says): ham10000_dls(ham, **split)

def test_a_file_that_may_not_be_read(ham):
    first(ham).chmod(0)
    if os.access(first(ham), os.R_OK): pytest.skip('this user may read everything')
    with pytest.raises(ValueError, match='the file may not be read'): ham10000_dls(ham, **split)

def test_lists_of_usable_items(ham, tmp_path):
    with pytest.raises(ValueError, match='is inside the data folder'): verify(ham, save=ham/'usable.csv', progress=False)
    (tmp_path/'wrong.csv').write_text('item\nHAM10000_images_part_1/ISIC_0000000.jpg\ngone.jpg\n')
    with pytest.raises(ValueError, match="lists 1 items that are not in .*: gone.jpg"): ham10000_table(ham, usable=tmp_path/'wrong.csv', **split)
    with pytest.raises(FileNotFoundError, match='there is no table'): ham10000_table(ham, usable=tmp_path/'none.csv', **split)

def test_verify_of_other_folders(tmp_path, capsys):
    photo().save(tmp_path/'a.png')
    (tmp_path/'b.png').write_bytes((tmp_path/'a.png').read_bytes()[:100])
    problems = verify(tmp_path, progress=True)
    assert list(problems.item) == [tmp_path/'b.png'] and '2 images, 1 of which can be used' in capsys.readouterr().out
    (tmp_path/'none').mkdir()
    with pytest.raises(FileNotFoundError, match='has no images'): verify(tmp_path/'none')

def test_an_image_that_breaks_later_is_named(ham):
    "Damage in the middle of a file is what the quick check can't see."
    dls = ham10000_dls(ham, size=16, num_workers=0, **split)
    file = dls.valid_ds.items.path.iloc[0]
    file.write_bytes(b'x')
    with pytest.raises(ValueError, match=f"{file.name} can't be read.*verify"): list(dls.valid)

# --- the official test

def make_test(path, ids, seed=0):
    "Images and ground truth of a test set, with all kinds."
    rng = np.random.default_rng(seed)
    (path/'ISIC2018_Task3_Test_Input').mkdir(parents=True)
    label = rng.permutation(np.resize(np.arange(7), len(ids)))
    truth = pd.DataFrame(np.eye(7)[label], columns=official)
    truth.insert(0, 'image', ids)
    truth.to_csv(path/'ISIC2018_Task3_Test_GroundTruth.csv', index=False)
    for i,o in enumerate(ids): photo(1000 + i).save(path/f'ISIC2018_Task3_Test_Input/{o}.jpg')
    return truth

ids = [f'ISIC_{o:07}' for o in range(35040, 35120)] # among them the one that the scorer gives no weight

@pytest.fixture
def learn(clean, tmp_path):
    dls = ham10000_dls(clean, size=16, num_workers=0, **split)
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 7))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=BalancedAccuracy(), path=tmp_path)
    learn.remove_cbs(ProgressCallback)
    return learn

def test_test_labels_and_submissions_go_by_name(learn, tmp_path):
    truth = make_test(tmp_path/'test', ids)
    dl = isic2018_test_dl(learn.dls, tmp_path/'test', bs=7)
    assert [learn.dls.vocab[i].upper() for _,y in dl for i in y] == truth[official].idxmax(axis=1).tolist()
    df = submission(learn, dl, tmp_path/'submission.csv')
    assert list(df.columns) == ['image', *official] and list(df.image) == ids
    preds,targs = learn.get_preds(dl=dl)
    assert np.allclose(df[[o.upper() for o in learn.dls.vocab]], preds, atol=1e-9)
    written = pd.read_csv(tmp_path/'submission.csv')
    assert np.allclose(written[official], df[official], rtol=1e-14) and list(written.image) == ids and (tmp_path/'submission.csv').read_text().startswith('image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n')
    ours = learn.validate(dl=dl)[1]
    assert abs(ours - balanced_accuracy_score(truth[official].idxmax(axis=1), df[official].idxmax(axis=1))) < 1e-9
    without_labels = learn.dls.test_dl([Path(o) for o in dl.dataset.items.path])
    assert np.allclose(submission(learn, without_labels)[official], df[official])

def test_submissions_of_logits_and_of_loaded_learners(learn, tmp_path):
    make_test(tmp_path/'test', ids)
    df = submission(learn, isic2018_test_dl(learn.dls, tmp_path/'test'))
    learn.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    loaded.remove_cbs(ProgressCallback)
    assert np.allclose(submission(loaded, isic2018_test_dl(loaded.dls, tmp_path/'test'))[official], df[official])
    learn.loss_func = nn.CrossEntropyLoss() # which fastai knows no activation for
    assert np.allclose(submission(learn, isic2018_test_dl(learn.dls, tmp_path/'test'))[official], df[official])

@pytest.mark.parametrize('change, says', [
    (lambda p: sorted(p.rglob('*.jpg'))[0].unlink(), '1 time: no image file, but a row'),
    (lambda p: sorted(p.rglob('*.jpg'))[0].write_bytes(b''), '1 time: the file is empty'),
    (lambda p: (p/'ISIC2018_Task3_Test_GroundTruth.csv').unlink(), 'must have the table'),
    (lambda p: (p/'ISIC2018_Task3_Test_GroundTruth.csv').write_text('image,MEL\nx,1\n'), "has no column 'NV'"),
    (lambda p: (lambda f: f.write_text(f.read_text().replace('1.0', '0.0', 2)))(p/'ISIC2018_Task3_Test_GroundTruth.csv'), '2 times: no single diagnosis'),
])
def test_dirty_test_sets(learn, tmp_path, change, says):
    make_test(tmp_path/'test', ids)
    change(tmp_path/'test')
    with pytest.raises((ValueError, FileNotFoundError), match=says): isic2018_test_dl(learn.dls, tmp_path/'test')

def test_other_classes_can_not_be_submitted(learn, tmp_path):
    make_test(tmp_path/'test', ids)
    dl = isic2018_test_dl(learn.dls, tmp_path/'test')
    learn.dls.vocab[:] = ['a', *list(learn.dls.vocab)[1:]]
    with pytest.raises(ValueError, match='learn.dls.vocab is a, bcc'): submission(learn, dl)
    with pytest.raises(ValueError, match='dls.vocab is a, bcc'): isic2018_test_dl(learn.dls, tmp_path/'test')

scorer = os.environ.get('ISIC_CHALLENGE_SCORING') or shutil.which('isic-challenge-scoring')

@pytest.mark.skipif(not scorer, reason='needs isic-challenge-scoring, on the PATH or named by ISIC_CHALLENGE_SCORING')
@pytest.mark.parametrize('tie', [False, True])
def test_the_challenges_own_scorer_agrees(learn, tmp_path, tie):
    "Also where two kinds are equally likely, which the scorer would count as wrong."
    make_test(tmp_path/'test', ids)
    if tie:
        with torch.no_grad():
            for o in (learn.model[-1].weight, learn.model[-1].bias): o[2:] = o[:1]
    dl = isic2018_test_dl(learn.dls, tmp_path/'test')
    submission(learn, dl, tmp_path/'submission.csv')
    done = subprocess.run([scorer, '-o', 'json', 'classification', str(tmp_path/'test/ISIC2018_Task3_Test_GroundTruth.csv'), str(tmp_path/'submission.csv')],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scored = isic2018_test_dl(learn.dls, tmp_path/'test', scored_only=True)
    assert set(ids) - set(scored.dataset.items.image) == {'ISIC_0035068'}
    ours = learn.validate(dl=scored)[1]
    assert abs(ours - json.loads(done.stdout)['overall']) < 1e-9
