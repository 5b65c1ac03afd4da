"CIFAR-10: counts, wrong labels, human labels, and loaders that give what fastai's own give."
import os, pickle, shutil, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, load_learner, noop
from fastai.callback.progress import ProgressCallback
from fastai.vision.all import ImageDataLoaders, Resize, ResizeMethod
from PIL import Image
from torch import nn

from fastai_l2rw.all import MetaReweightCallback
from fastai_l2rw.data import cifar10
from fastai_l2rw.data.cifar10 import ShiftFlip, cifar10_dls, cifar10_table, cifar10n
from fastai_l2rw.data.folders import image_files
from fastai_l2rw.data.ham10000 import verify

classes = 'airplane automobile bird cat deer dog frog horse ship truck'.split()

def make(path, n_train=40, n_test=4, ext='png', name='{k:04}', size=32):
    rng,place = np.random.default_rng(0),0
    for part,n in (('train', n_train), ('test', n_test)):
        for c in classes: (path/part/c).mkdir(parents=True)
        for k in range(n):
            for c in rng.permutation(classes):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path/part/c/(name.format(k=k, place=place, c=c) + f'.{ext}'))
                place += 1
    return path

@pytest.fixture(scope='module')
def clean(tmp_path_factory): return make(tmp_path_factory.mktemp('cifar')/'cifar10')

@pytest.fixture(scope='module')
def tenth(tmp_path_factory):
    "The layout with a tenth of the real counts; a table needs only the names."
    path = tmp_path_factory.mktemp('tenth')
    for part,n in (('train', 500), ('test', 10)):
        for c in classes:
            (path/part/c).mkdir(parents=True)
            for k in range(n): (path/part/c/f'{k:04}.jpg').touch()
    return path

@pytest.mark.parametrize('dominance, others', [(0.5, 55), (0.6, 37), (0.7, 24), (0.8, 14), (0.9, 6)])
def test_the_protocol(tenth, dominance, others):
    df = cifar10_table(tenth, dominance=dominance, dominant='dog')
    counts = df.groupby(['part', 'label']).size().unstack('label')
    assert counts.loc['train'].to_dict() == {c: 495 if c == 'dog' else others for c in classes}
    assert others == round(495*(1 - dominance)/dominance/9)
    assert set(counts.loc['meta']) == {5} and set(counts.loc['valid']) == {10}

def test_parts_do_not_depend_on_skew_and_noise_and_are_those_of_their_seed(clean, tmp_path):
    part = lambda name, **kwargs: cifar10_table(clean, **kwargs).query('part == @name').path.tolist()
    assert part('meta') == part('meta', dominance=0.8) == part('meta', noise=0.5, tail=3) != part('meta', seed=1)
    assert part('valid') == part('valid', step=2) == [f for f in image_files(clean/'test')]
    assert not set(part('valid', valid_per_class=6)) & set(part('meta', valid_per_class=6))
    assert cifar10_table(clean, noise=0.3, tail=2).equals(cifar10_table(clean, noise=0.3, tail=2))
    elsewhere = tmp_path/'b'
    shutil.copytree(clean, elsewhere)
    assert [o.relative_to(elsewhere) for o in cifar10_table(elsewhere, noise=0.3).path] == [o.relative_to(clean) for o in cifar10_table(clean, noise=0.3).path]

@pytest.mark.parametrize('noise, wrong', [(0.4, 14), (dict(pair=0.2), 7), (dict(background=0.6, to='ship'), 21), (dict(matrix=np.roll(np.eye(10), 1, 1)), 35)])
def test_noise_is_in_the_training_part_only_and_exact(clean, noise, wrong):
    df = cifar10_table(clean, noise=noise)
    changed = df.label != df.clean
    assert not changed[df.part != 'train'].any()
    per_class = changed[df.part == 'train'].groupby(df.clean).sum()
    assert set(per_class.drop('ship' if 'background' in str(noise) else [])) == {wrong}
    assert (df.clean == [o.parent.name for o in df.path]).all()

def test_a_class_whose_labels_are_all_flipped_stays_known(clean):
    dls = cifar10_dls(clean, noise=dict(background=1., to='cat'), bs=16)
    assert list(dls.vocab) == classes and {int(i) for _,y in dls.train for i in y} == {3}
    assert {int(i) for _,y in dls.valid for i in y} == set(range(10))

@pytest.mark.parametrize('kwargs, error, says', [
    (dict(meta_per_class=40), ValueError, 'meta_per_class=40 takes 40 items of each class'),
    (dict(meta_per_class=None), ValueError, 'meta_per_class=None must be a whole number'),
    (dict(dominance=0.6, dominant='tiger'), ValueError, "dominant='tiger' is an unknown class"),
    (dict(dominant='cat'), ValueError, 'exactly one of dominance, tail, step'),
    (dict(dominance=0.5, tail=2), ValueError, 'exactly one of'),
    (dict(noise=7), ValueError, 'uniform=7 must be a share'),
    (dict(noise=dict(swap=0.1)), TypeError, 'swap'),
    (dict(noise=lambda paths, clean: ['tiger']*len(paths)), ValueError, 'given has unknown classes for 350 items, tiger'),
])
def test_options_that_make_no_sense(clean, kwargs, error, says):
    with pytest.raises(error, match=says): cifar10_table(clean, **kwargs)

def test_the_default_is_what_fastai_downloads(clean, monkeypatch):
    asked = []
    monkeypatch.setattr(cifar10, 'untar_data', lambda url: asked.append(url) or clean)
    assert len(cifar10_dls(bs=16).valid_ds) == 40 and asked[0].endswith('cifar10.tgz')

# --- loaders

def all_of(dl): return [torch.cat(o) for o in zip(*[(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y in dl])]

@pytest.mark.parametrize('ext', ['png', 'jpg', 'JPEG'])
def test_batches_are_those_of_fastai(tmp_path, ext):
    path = make(tmp_path/'c', n_train=7, ext=ext)
    ours = cifar10_dls(path, meta_per_class=0, batch_tfms=[], bs=16)
    theirs = ImageDataLoaders.from_folder(path, train='train', valid='test', bs=16, num_workers=0)
    assert list(ours.vocab) == list(theirs.vocab)
    files = ours.valid_ds.items.path.tolist()
    x,y = all_of(ours.valid)
    x2,y2 = all_of(theirs.test_dl(files, with_labels=True))
    assert torch.equal(x, x2) and torch.equal(y, y2)

def test_a_training_pass_has_each_item_once_and_says_which(clean):
    dls = cifar10_dls(clean, batch_tfms=[], bs=16, noise=0.3)
    dl = dls.train.new(drop_last=False)
    x,y = all_of(dl)
    order = dl._DataLoader__idxs
    assert sorted(order) == list(range(350)) != order
    items = dls.train_ds.items.iloc[order]
    assert [dls.vocab[i] for i in y] == items.label.tolist()
    first = np.asarray(Image.open(items.path.iloc[0]))
    assert torch.equal((x[0]*255).round().byte().permute(1, 2, 0), torch.tensor(first))
    assert len(dls.train) == len(list(dls.train)) == 350//16 # the last, incomplete batch is dropped in training

def test_worker_processes_give_the_same(clean):
    dls = cifar10_dls(clean, batch_tfms=[], bs=16)
    x,y = all_of(dls.valid)
    for kwargs in (dict(num_workers=2), dict(bs=7)): # workers share the batches
        x2,y2 = all_of(dls.valid.new(**kwargs))
        assert torch.equal(x, x2) and torch.equal(y, y2)

def test_item_transforms_and_other_files(clean, tmp_path):
    dls = cifar10_dls(clean, item_tfms=Resize(16, ResizeMethod.Squish), bs=8)
    assert dls.one_batch()[0].shape == (8, 3, 16, 16)
    dls = cifar10_dls(clean, bs=8)
    Image.new('L', (32, 32), 128).save(tmp_path/'other.bmp')
    x, = dls.test_dl([tmp_path/'other.bmp']).one_batch()
    assert x.shape == (1, 3, 32, 32)
    files = dls.valid_ds.items.path.tolist()[:5]
    assert torch.equal(all_of(dls.test_dl(dls.valid_ds.items[:5], with_labels=True))[0], torch.cat([o for o, in dls.test_dl(files)]).as_subclass(torch.Tensor))

def test_training_predicting_and_exporting(clean, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dls = cifar10_dls(clean, dominance=0.6, noise=0.2, bs=16)
        learn = Learner(dls, nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)), loss_func=CrossEntropyLossFlat(), metrics=accuracy,
            cbs=MetaReweightCallback(), path=tmp_path)
        learn.remove_cbs(ProgressCallback)
        learn.logger = noop
        learn.fit(2, 1e-3)
    weights = learn.meta_reweight.item_weights()
    items = dls.train_ds.items.iloc[weights.index]
    assert len(items) == len(weights) and 0 < (items.label != items.clean).mean() < 0.5
    learn.export('l.pkl')
    assert (tmp_path/'l.pkl').stat().st_size < 300_000
    loaded = load_learner(tmp_path/'l.pkl')
    for o in (learn, loaded): o.remove_cbs(ProgressCallback)
    file = dls.valid_ds.items.path.iloc[0]
    with loaded.no_bar(), learn.no_bar(): assert torch.allclose(loaded.predict(file)[2], learn.predict(file)[2])

def test_augmentation_is_for_training_and_keeps_the_pixels():
    x = torch.rand(64, 3, 32, 32)
    assert torch.equal(ShiftFlip(pad=0)(cifar10.TensorImage(x), split_idx=0).sort(-1)[0], x.sort(-1)[0]) # mirrored or not
    y = ShiftFlip()(cifar10.TensorImage(x), split_idx=0)
    assert y.shape == x.shape and y.is_contiguous() and not torch.equal(y, x)
    tiny = cifar10.TensorImage(torch.rand(2, 3, 3, 3))
    assert ShiftFlip(pad=4)(tiny, split_idx=0).shape == tiny.shape

# --- dirt

dirt = dict(
    cut_off=(lambda p: p.write_bytes(p.read_bytes()[:300]), '1 time: the file is cut off: train/airplane/0000.png'),
    empty=(lambda p: p.write_bytes(b''), '1 time: the file is empty'),
    no_image=(lambda p: p.write_text('x'), '1 time: the file is no image'),
    another_size=(lambda p: Image.new('RGB', (28, 30)).save(p), '1 time: 28 x 30 pixels, and not 32 x 32 as most others'),
    broken_link=(lambda p: (p.unlink(), p.symlink_to('gone.png')), 'the link points to a file that is not there'),
    not_in_a_class=(lambda p: p.rename(p.parent.parent/p.name), '1 time: not in a folder of a class'),
    another_class_to_test=(lambda p: shutil.copytree(p.parents[2]/'test/cat', p.parents[2]/'test/tiger'), 'tiger is a folder of test/ but not of train/'),
)

@pytest.mark.parametrize('name', dirt)
def test_dirt_is_one_error(tmp_path, name):
    path = make(tmp_path/'c', n_train=7, n_test=2)
    change,says = dirt[name]
    change(path/'train/airplane/0000.png')
    with pytest.raises(ValueError, match=says): cifar10_dls(path)
    if name in ('cut_off', 'empty', 'no_image', 'broken_link'):
        verify(path, save=tmp_path/'usable.csv', progress=False)
        assert sum(len(o.dataset) for o in cifar10_dls(path, usable=tmp_path/'usable.csv')) == 89

@pytest.mark.parametrize('change', [
    lambda p: Image.new('L', (32, 32)).save(p),
    lambda p: Image.new('RGBA', (32, 32)).save(p),
    lambda p: Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(p),
    lambda p: Image.new('P', (32, 32)).save(p, format='GIF'),
    lambda p: p.rename(p.with_suffix('.PNG')),
    lambda p: (p.parent/'._0000.png').write_bytes(b'x'),
    lambda p: (p.parents[2]/'labels.txt').write_text('airplane'),
])
def test_harmless_dirt(tmp_path, change):
    path = make(tmp_path/'c ü', n_train=7, n_test=2)
    change(path/'train/airplane/0000.png')
    assert sum(len(o.dataset) for o in cifar10_dls(path)) == 90

@pytest.mark.parametrize('change, says', [
    (lambda p: shutil.rmtree(p/'test'), r'must have images in the folders .* and has none in test/'),
    (lambda p: shutil.rmtree(p), 'has none in train, test/'),
])
def test_other_folders(tmp_path, change, says):
    path = make(tmp_path/'c', n_train=1, n_test=1)
    change(path)
    with pytest.raises(FileNotFoundError, match=says): cifar10_dls(path)

# --- labels by people

def human(path, tmp_path, order):
    "Labels in the order of `order`, as arrays and as a table."
    rng = np.random.default_rng(1)
    y = np.array([classes.index(o.parent.name) for o in order])
    kinds = {k: np.where(rng.random(len(y)) < 0.4, rng.integers(0, 10, len(y)), y) for k in ('worse_label', 'aggre_label', 'random_label1', 'random_label2', 'random_label3')}
    torch.save(dict(clean_label=y, **kinds), tmp_path/'CIFAR-10_human.pt')
    df = pd.DataFrame(dict(path=[o.relative_to(path).as_posix() for o in order], worse=np.array(classes)[kinds['worse_label']], aggregate=np.array(classes)[kinds['aggre_label']]))
    df.to_csv(tmp_path/'human.csv.gz', index=False)
    return dict(zip(order, np.array(classes)[kinds['worse_label']]))

def test_the_authors_file_and_a_table_agree(tmp_path):
    path = make(tmp_path/'c', n_train=8, name='{place}_{c}')
    order = sorted(image_files(path/'train'), key=lambda o: int(o.name.split('_')[0]))
    expected = human(path, tmp_path, order)
    for file in ('CIFAR-10_human.pt', 'human.csv.gz'):
        df = cifar10_table(path, noise=cifar10n(tmp_path/file, 'worse'))
        train = df[df.part == 'train']
        assert train.label.tolist() == [expected[o] for o in train.path] and (train.label != train.clean).mean() > 0.1
        assert (df.label == df.clean)[df.part != 'train'].all()
    assert not cifar10_table(path, noise=cifar10n(tmp_path/'human.csv.gz', 'aggregate')).equals(df)

def test_names_that_are_no_places_are_refused(tmp_path):
    path = make(tmp_path/'c', n_train=8)
    human(path, tmp_path, image_files(path/'train'))
    with pytest.raises(ValueError, match="no places in that order .*: use a table with the columns path and worse instead"):
        cifar10_table(path, noise=cifar10n(tmp_path/'CIFAR-10_human.pt'))

def test_another_order_is_refused(tmp_path):
    path = make(tmp_path/'c', n_train=8, name='{place}_{c}')
    human(path, tmp_path, image_files(path/'train'))
    with pytest.raises(ValueError, match='has another right label than the folder for .* of 30 images'):
        cifar10_table(path, noise=cifar10n(tmp_path/'CIFAR-10_human.pt'))

class Code:
    def __reduce__(self): return Path.touch, (Path('ran'),)

@pytest.mark.parametrize('content, says', [
    (lambda f: torch.save(dict(clean_label=Code()), f), "can't be loaded as a dictionary of arrays"),
    (lambda f: f.write_bytes(pickle.dumps(Code())), "can't be loaded as a dictionary of arrays"),
    (lambda f: f.write_bytes(b''), "can't be loaded as a dictionary of arrays"),
    (lambda f: torch.save([1, 2], f), "can't be loaded as a dictionary of arrays"),
    (lambda f: torch.save(dict(labels=np.zeros(3)), f), 'has no worse_label or no clean_label, but only labels'),
])
def test_other_files_of_labels(clean, tmp_path, content, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content(tmp_path/'x.pt')
    with pytest.raises(ValueError, match=says): cifar10_table(clean, noise=cifar10n(tmp_path/'x.pt'))
    assert not (tmp_path/'ran').exists() # no code of the file has run

def test_tables_of_labels(clean, tmp_path):
    with pytest.raises(ValueError, match="kind='worst' is unknown: use one of 'clean', 'aggregate'"): cifar10n(tmp_path/'x.csv', 'worst')
    with pytest.raises(FileNotFoundError, match='there is no file'): cifar10n(tmp_path/'x.csv', 'worse')
    (tmp_path/'x.csv').write_text('path,worse\ntrain/cat/0001.png,dog\n')
    with pytest.raises(ValueError, match='has no label for 349 of 350 items|has no label for 350 of 350 items'): cifar10_table(clean, noise=cifar10n(tmp_path/'x.csv'))
    (tmp_path/'x.csv').write_text('path,worse\ntrain/cat/0001.png,dog\ntrain/cat/0001.jpg,cat\n')
    with pytest.raises(ValueError, match='has different labels for 1 items: train/cat/0001'): cifar10_table(clean, noise=cifar10n(tmp_path/'x.csv'))

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no pipes')
def test_a_pipe_among_the_images(clean, tmp_path):
    "It is named, and not waited for."
    shutil.copytree(clean, tmp_path/'c')
    os.mkfifo(tmp_path/'c/train/cat/pipe.png')
    with pytest.raises(ValueError, match='it is no file, but a pipe, a device or the like: train/cat/pipe.png'): cifar10_dls(tmp_path/'c')
