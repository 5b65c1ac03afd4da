"What is said of a `meta_dl` that can't be one: each mistake, what was given and what to do, and that what to do works."
import warnings
from collections import UserDict
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import CategoryBlock, DataBlock, DataLoaders, Datasets, Learner, TransformBlock
from fastai.callback.data import WeightedDL
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize
from fastai.tabular.all import Categorify, TabularPandas
from fastcore.foundation import L
from torch.utils.data import DataLoader as TorchLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from fastai_l2rw.trusted import TrustedBatches, check_labels, check_meta_dl, class_names, describe_batch, describe_loader, label_kind
from conftest import images, labels, make_dls, meta

cpu = torch.device('cpu')
x,y = images[meta],torch.tensor(labels[meta])
df = pd.DataFrame(dict(a=['p', 'q', 'r']*8, y=['n', 'm']*12))

def table():
    return TabularPandas(df, [Categorify], ['a'], y_names='y', y_block=CategoryBlock(), splits=(list(range(16)), list(range(16, 24))))

def number(letter): return torch.tensor(ord(letter))

def letters(items='abcabc'):
    return Datasets(list(items), [number, Categorize()], splits=[[0, 1, 2], list(range(3, len(items)))])

class Items:
    "A data set of PyTorch that is not said to be one by its class."
    def __len__(self): return 3
    def __getitem__(self, i): return x[i],y[i]

class Stream(IterableDataset):
    def __iter__(self): return iter([(x, y)])

needed,a_path = 'but must be a loader of labelled batches',type(Path()).__name__
of_items = (f'{needed}: make one of its items with learn.dls.test_dl(items, with_labels=True), '
    "or, if its transforms are those of the Learner's data, with learn.dls.valid.new(meta_dl)")
of_these = f'{needed}: make one of these items with learn.dls.test_dl(meta_dl, with_labels=True)'
of_files = f"{needed}: for a folder of images, make one with learn.dls.test_dl(get_image_files('checked'), with_labels=True)"
of_frame = f'{needed}: make one with learn.dls.test_dl(meta_dl, with_labels=True)'
of_pair = (f'{needed}: if these are inputs and labels, make one with '
    'torch.utils.data.DataLoader(TensorDataset(*map(torch.as_tensor, meta_dl)), batch_size=64)')
of_tensor = (f'{needed}: with inputs and labels as tensors, make one with '
    'torch.utils.data.DataLoader(TensorDataset(inputs, labels), batch_size=64)')
of_dataset = f'{needed}: make one with torch.utils.data.DataLoader(meta_dl, batch_size=64)'
of_dict = f'{needed}: pass one of its values, if these are loaders, or a list of batches, [(inputs, labels)]'
once = 'which can be read only once: pass a loader, or a list of batches'
one = 'but must be one loader, of trusted examples: '

# what is given, what the message calls it, and what it advises
KINDS = {
    'a number': (lambda: 5, 'int', f'{needed}, or a list of them'),
    'a Learner': (lambda: Learner(make_dls(), torch.nn.Linear(1, 1), loss_func=len), 'Learner', f'{needed}, or a list of them'),
    'data without a loader': (Items, 'Items', f'{needed}, or a list of them'),
    'an iterator': (lambda: iter([1]), 'list_iterator', once),
    'a generator': (lambda: (o for o in [1]), 'generator', once),
    'three loaders': (make_dls, 'DataLoaders of 3 loaders',
        one + "pass the one that has these, such as meta_dl.loaders[2]; "
        "of the Learner's own loaders, the third is the default, and need not be passed"),
    'two loaders': (lambda: make_dls(2), 'DataLoaders of 2 loaders',
        one + 'make one of examples whose labels have been checked, with meta_dl.test_dl(items, with_labels=True), '
        'or take them out of the training part, with hold_out_meta(meta_dl, trusted=items)'),
    'a folder': (lambda: 'checked', "str, 'checked'", of_files),
    'a Path': (lambda: Path('checked'), f"{a_path}, 'checked'", of_files),
    'files': (lambda: [Path('a.png'), Path('b.png')], f'list of 2 elements, the first of type {a_path}', of_these),
    'an L of files': (lambda: L('a.png', 'b.png', 'c.png'), 'L of 3 elements, the first of type str', of_these),
    'a list of loaders': (lambda: [make_dls().valid]*2, 'list of 2 elements, the first of type TfmdDL', f'{needed}: pass one loader'),
    'Datasets': (letters, 'Datasets', of_items),
    'a part of Datasets': (lambda: letters().train, 'Datasets', of_items),
    'TfmdLists': (lambda: letters().tls[0], 'TfmdLists', of_items),
    'TabularPandas': (table, 'TabularPandas', of_items),
    'a DataBlock': (lambda: DataBlock((TransformBlock, CategoryBlock)), 'DataBlock', of_items),
    'a data set of PyTorch': (lambda: TensorDataset(x, y), 'TensorDataset', of_dataset),
    'arrays': (lambda: (x.numpy(), y.numpy()), 'tuple of 2 elements, the first of type ndarray', of_pair),
    'tensors': (lambda: (x, y), 'tuple of 2 elements, the first of type Tensor', of_pair),
    'a list of inputs and labels': (lambda: [x, y], 'list of 2 elements, the first of type Tensor', of_pair),
    'an array': (x.numpy, 'ndarray of shape (24, 1, 8, 8)', of_tensor),
    'a tensor': (lambda: x, 'Tensor of shape (24, 1, 8, 8)', of_tensor),
    'a number of PyTorch': (lambda: torch.tensor(1), 'Tensor of shape ()', of_tensor),
    'a DataFrame': (lambda: df, 'DataFrame of shape (24, 2)', of_frame),
    'a column': (lambda: df.y, 'Series of shape (24,)', of_frame),
    'a dict': (lambda: dict(x=x, y=y), 'dict with 2 keys (x, y)', of_dict),
    'a large dict': (lambda: {i: x for i in range(1000)}, 'dict with 1000 keys (0, 1, 2, 3, …)', of_dict),
}

@pytest.mark.parametrize('make,what,advice', KINDS.values(), ids=KINDS)
def test_what_can_not_be_read(make, what, advice):
    for dls in (None, make_dls()):
        with pytest.raises(TypeError) as e: check_meta_dl(make(), dls)
        assert str(e.value) == f'meta_dl is a {what}, {advice}'
        assert len(str(e.value)) < 330

def test_a_long_path_is_cut_short():
    with pytest.raises(TypeError, match=r'meta_dl is a str, .*\.\.\.') as e: check_meta_dl('x'*10_000)
    assert len(str(e.value)) < 1000

def test_what_can_be_read():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for dls in (None, make_dls()):
            for ok in (None, [], [(x, y)], ((x, y), (x, y)), [x], Stream(), make_dls().valid, make_dls().train.new(), make_dls()[2],
                TorchLoader(TensorDataset(x, y), 8), DataLoader(list(zip(x, y)), bs=8)): check_meta_dl(ok, dls)
        dls = make_dls()
        check_meta_dl(dls[2], dls)
        check_meta_dl(dls[2], DataLoaders(*dls.loaders[:1]))

# ---- the advice of the messages works

def read(dl, dls):
    check_meta_dl(dl, dls)
    return next(TrustedBatches(dl, cpu, getattr(dls, 'n_inp', None), class_names(dls)))

def test_advice_for_items_and_datasets():
    dls = letters().dataloaders(bs=2)
    for dl in (dls.test_dl(list('cba'), with_labels=True), dls.valid.new(letters('cabcab').valid)):
        (xb,),(yb,) = read(dl, dls)
        assert torch.equal(xb, yb + ord('a'))

def test_advice_for_tables():
    to = table()
    dls = to.dataloaders(bs=4)
    for dl in (dls.test_dl(df[:6], with_labels=True), dls.valid.new(table().valid)): assert [len(o) for o in read(dl, dls)] == [2, 1]

def test_advice_for_files(tmp_path):
    for c in ('m', 'n'):
        (tmp_path/c).mkdir()
        for i in range(3): (tmp_path/c/f'{i}.txt').write_text(c)
    files = sorted(tmp_path.glob('*/*.txt'))
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda p: torch.tensor(ord(p.read_text())), get_y=lambda p: p.parent.name)
    dls = block.dataloaders(files, bs=2)
    (xb,),(yb,) = read(dls.test_dl(files[:4], with_labels=True), dls)
    assert torch.equal(xb - ord('m'), yb)
    with pytest.raises(ValueError, match='with_labels=True'): read(dls.test_dl(files[:4]), dls)

def test_advice_for_tensors_and_arrays():
    for pair in ((x, y), (x.numpy(), y.numpy())):
        (xb,),(yb,) = read(TorchLoader(TensorDataset(*map(torch.as_tensor, pair)), batch_size=64), make_dls())
        assert xb.shape == x.shape and sorted(yb.tolist()) == sorted(y.tolist())

# ---- the Learner's own data

def subset(dl, items): return DataLoader(dl.dataset, bs=4, get_idxs=lambda: items)

OWN = {
    'the training loader': lambda dls: dls.train,
    'a copy of it': lambda dls: dls.train.new(shuffle=False),
    'a loader of fastai': lambda dls: DataLoader(dls.train_ds, bs=8),
    'one that draws by weights': lambda dls: WeightedDL(dls.train_ds, bs=8, wgts=range(1, len(dls.train_ds) + 1)),
    'a loader of PyTorch': lambda dls: TorchLoader(dls.train_ds, 8, shuffle=True),
}

@pytest.mark.parametrize('own', OWN.values(), ids=OWN)
def test_training_examples_are_not_trusted(own):
    dls = make_dls()
    which = 'is the training loader' if own(dls) is dls.train else 'reads the training set'
    with pytest.raises(ValueError, match=f'meta_dl {which}: its labels are those you do not trust. Pass .*with_labels=True'):
        check_meta_dl(own(dls), dls)

def test_training_examples_of_a_table():
    "Its loader can draw by weights."
    dls = table().dataloaders(bs=4)
    with pytest.raises(ValueError, match='is the training loader'): check_meta_dl(dls.train, dls)
    with pytest.raises(ValueError, match='reads the training set'): check_meta_dl(dls.train.new(), dls)

def test_some_of_the_training_examples_can_be_trusted():
    dls = make_dls()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for some in (TorchLoader(Subset(dls.train_ds, [1, 2])), TorchLoader(dls.train_ds, 2, sampler=SubsetRandomSampler([1, 2])),
            subset(dls.train, [1, 2, 3]), DataLoader(dls.train_ds, bs=2, n=10),
            WeightedDL(dls.train_ds, bs=2, wgts=range(len(dls.train_ds)))): check_meta_dl(some, dls)

def test_trusting_the_validation_examples_warns():
    dls = make_dls()
    for own in (dls.valid, dls.valid.new(shuffle=True), subset(dls.valid, [1, 2])):
        with pytest.warns(UserWarning, match='meta_dl reads the validation set: losses and metrics on it will look better') as caught:
            check_meta_dl(own, dls)
        assert len(caught) == 1

def test_a_loader_that_is_training_and_validation():
    dl = TorchLoader(TensorDataset(x, y), 8)
    with pytest.raises(ValueError, match='is the training loader'): check_meta_dl(dl, DataLoaders(dl, dl))

# ---- another vocab

def test_a_class_less_shifts_no_label():
    "Labels are mapped by name, and the warning of a lacking class names the right one."
    dls,fewer = letters('abcabc').dataloaders(bs=2),letters('acaca').dataloaders(bs=2)
    check_meta_dl(fewer.valid, dls)
    with pytest.warns(UserWarning, match='meta_dl has the classes a, c, and learn.dls numbers them as a, b, c: labels .* mapped by name'):
        batches = TrustedBatches(fewer.valid, cpu, classes=class_names(dls))
    with pytest.warns(UserWarning, match='meta_dl has no example of b:'): (xb,),(yb,) = next(batches)
    assert torch.equal(xb, yb + ord('a')) and set(yb.tolist()) == {0, 2}
    right = dls.test_dl(list('acac'), with_labels=True)
    check_meta_dl(right, dls)
    batches = TrustedBatches(right, cpu, classes=class_names(dls))
    with pytest.warns(UserWarning, match='meta_dl has no example of b:'): next(batches),next(batches)

class Vocab(TorchLoader):
    def __init__(self, *vocab): super().__init__(TensorDataset(x, y), 8); self.vocab = vocab

def with_vocab(*vocab):
    dls = DataLoaders(TorchLoader(TensorDataset(x, y)), TorchLoader(TensorDataset(x, y)))
    dls.vocab = vocab
    return dls

@pytest.mark.parametrize('got,want,message', [
    (('cat', 'dog', 'eel'), ('cat', 'dog'), 'the number 2 means eel in the one and nothing in the other: eel is none of the classes'),
    (('cat', 'fox'), ('dog', 'cat'),
        r'classes than learn.dls, 2 \(cat, fox\) and not 2 \(dog, cat\), so that the number 0 means cat in the one and dog in'),
    (range(100), [*range(98), 99, 100],
        r'100 \(0, 1, 2, 3, …\) and not 100 \(0, 1, 2, 3, …\), so that the number 98 means 98 in the one and 99'),
    (('cat', 'cat'), ('cat', 'dog'), 'two are called cat'),
    ((['the', 'a'], ['bad', 'good']), (['the', 'a'], ['good', 'worse']), 'other classes'),
    ((['the', 'a'], ['bad', 'good']), (['a', 'the'], ['bad', 'good']), 'other names'),
    ((['the', 'a'], ['bad', 'good']), (['a', 'the'], ['good', 'bad']), 'other names'),
    (('fox',), (['a', 'the'], ['bad', 'good']), 'other classes'),
])
def test_another_vocab(got, want, message):
    with pytest.raises(ValueError, match=message): check_meta_dl(Vocab(*got), with_vocab(*want))

@pytest.mark.parametrize('got,want', [
    (('cat', 'dog'), ('dog', 'cat')),
    (('cat',), ('dog', 'cat')),
    (range(4), [3, 2, 0, 1]),
    ((['the', 'a'], ['bad', 'good']), (['the', 'a'], ['good', 'bad'])),
    (('bad',), (['a', 'the'], ['good', 'bad'])),
])
def test_classes_are_mapped_by_name(got, want):
    dl,dls = Vocab(*got),with_vocab(*want)
    check_meta_dl(dl, dls)
    theirs,ours = class_names(dl),class_names(dls)
    dl = TorchLoader(TensorDataset(x, y % len(theirs)), 8)
    dl.vocab = got
    with pytest.warns(UserWarning, match='mapped by name'): batches = TrustedBatches(dl, cpu, classes=ours)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        (xb,),(yb,) = next(batches)
    given = [(y % len(theirs))[(x == o).flatten(1).all(1)][0].item() for o in xb]
    assert [str(ours[i]) for i in yb] == [str(theirs[i]) for i in given]
    assert yb.dtype == y.dtype

@pytest.mark.parametrize('labels,message', [
    (torch.eye(2)[y % 2], r'labels are of shape \(24, 2\) and not one whole number for each item'),
    (y % 2 + 1, 'labels of meta_dl must be from 0 to 1, since it has 2 classes, but are from 1 to 2'),
    (y % 2 - 1, 'must be from 0 to 1, since it has 2 classes, but are from -1 to 0'),
])
def test_labels_that_can_not_be_mapped(labels, message):
    batches = [(x, labels)]
    class Named(list): vocab = ('dog', 'cat')
    with pytest.warns(UserWarning, match='mapped by name'): batches = TrustedBatches(Named(batches), cpu, classes=('cat', 'dog'))
    with pytest.raises(ValueError, match=message): next(batches)

@pytest.mark.parametrize('got,want', [(('cat', 'dog'), ('cat', 'dog')), ((0, 1), ('0', '1')), ((np.str_('a'), 'b'), ('a', 'b'))])
def test_the_same_vocab(got, want): check_meta_dl(Vocab(*got), with_vocab(*want))

def test_a_loader_that_does_not_tell_its_vocab(): check_meta_dl(TorchLoader(TensorDataset(x, y)), with_vocab('cat', 'dog'))

# ---- what a loader gives

one_hot = torch.eye(4)[y]
BATCHES = {
    'nothing': ([], ValueError, r'meta_dl yields no batch: list\(0 batches\). It needs at least one labelled, trusted example'),
    'nothing, for drop_last': (TorchLoader(Items(), 8, drop_last=True, num_workers=0, sampler=range(3)), ValueError,
        r'meta_dl yields no batch: DataLoader\(batch_size=8, drop_last=True\)'),
    'no labels': ([x], ValueError,
        r'a batch of meta_dl must be a tuple of 1 input and then the labels, but is \(24, 1, 8, 8\): are the labels missing\?'),
    'no labels, in a tuple': ([(x,)], ValueError, r'but is \(24, 1, 8, 8\): are the labels missing\? .*with_labels=True'),
    'a dict': ([dict(x=x, y=y)], TypeError,
        r'a batch of meta_dl is a dict, \{x \(24, 1, 8, 8\), y \(24,\)\}, but must be a tuple of inputs and labels: .*collate_fn'),
    'another dict': ([UserDict(x=x)], TypeError, r'a batch of meta_dl is a dict, \{x \(24, 1, 8, 8\)\}'),
    'items': ([(x[0], 1), (x[1], 2)], TypeError,
        r'a single label of type int, .*is it one example\? Then pass torch.utils.data.DataLoader\(meta_dl, batch_size=64\)'),
    'items with names': ([(x[0], 'cat')], TypeError, 'a single label of type str'),
    'arrays': ([(x.numpy(), y.numpy())], TypeError,
        r'has NumPy arrays, inputs ndarray \(24, 1, 8, 8\), labels ndarray \(24,\), but must have tensors'),
    'loaders': ([None, make_dls().valid], ValueError, 'but is NoneType: are the labels missing'),
    'one-hot labels': ([(x, one_hot)], ValueError, r'labels of meta_dl are floating-point numbers of shape \(24, 4\) \(one-hot\?\), '
        r'those of the training loader are whole numbers of shape \(8,\): pass labels.argmax\(1\)'),
    'floats': ([(x, y.float())], ValueError,
        r'labels of meta_dl are floating-point numbers of shape \(24,\), those .*: pass labels.long\(\)'),
    'truth values': ([(x, y > 1)], ValueError, r'labels of meta_dl are truth values of shape \(24,\), those .*: pass labels.long\(\)'),
    'masks': ([(x, y[:, None, None].expand(24, 8, 8))], ValueError,
        r'whole numbers of shape \(24, 8, 8\), those .*: both must be of the same kind'),
    'boxes': ([(x, [dict(boxes=x)]*24)], ValueError, 'labels of meta_dl are list, those of the training loader are whole numbers'),
}

@pytest.mark.parametrize('dl,error,message', BATCHES.values(), ids=BATCHES)
def test_batches_that_are_none(dl, error, message):
    with pytest.raises(error, match=message) as e: next(TrustedBatches(dl, cpu, like=label_kind((torch.zeros(8, dtype=torch.int64),))))
    assert len(str(e.value)) < 330

def test_two_inputs_and_no_labels():
    batches = TrustedBatches([(x, y)], cpu, n_inp=2)
    with pytest.raises(ValueError, match=r'a tuple of 2 inputs and then the labels, but is \(24, 1, 8, 8\), \(24,\): are'):
        next(batches)

@pytest.mark.parametrize('got,like,remedy', [
    (one_hot, y, 'labels.argmax(1)'),
    (y.float(), y, 'labels.long()'),
    (y, one_hot, 'torch.nn.functional.one_hot(labels, 4).float()'),
    (y, y.float(), 'labels.float()'),
])
def test_what_makes_labels_alike(got, like, remedy):
    with pytest.raises(ValueError) as e: check_labels((got,), label_kind((like,)))
    assert str(e.value).endswith(f': pass {remedy}')
    check_labels((eval(remedy, dict(torch=torch, labels=got)),), label_kind((like,)))

@pytest.mark.parametrize('got,like', [
    ((y,), (y[:3],)),
    ((y,), (y[:, None],)),
    ((y,), (y.to(torch.int8),)),
    ((y.float()[:, None],), (y.double(),)),
    ((x, y), (x[:1], y[:1])),
    (([1, 2],), (['a'],)),
])
def test_labels_that_are_alike(got, like): check_labels(got, label_kind(like))

def test_another_number_of_labels():
    with pytest.raises(ValueError, match=r'labels of meta_dl are whole .* \(24,\), those .* are whole .* \(24,\), whole .* \(24,\): both'):
        check_labels((y,), label_kind((y, y)))

def test_labels_can_be_compared_later():
    "What the training labels are is known only when a training batch has been read."
    batches = TrustedBatches([(x, one_hot)], cpu)
    next(batches)
    batches.like = label_kind((y,))
    with pytest.raises(ValueError, match='one-hot'): next(batches)

# ---- in words

@pytest.mark.parametrize('batch,words', [
    (((x,), (y,)), 'inputs (24, 1, 8, 8), labels (24,)'),
    (((x, y), (y, x)), 'inputs (24, 1, 8, 8), (24,), labels (24,), (24, 1, 8, 8)'),
    ((((x, [y, y]),), (y,)), 'inputs (24, 1, 8, 8), (24,), (24,), labels (24,)'),
    (((dict(ids=x, mask=y),), (y,)), 'inputs {ids (24, 1, 8, 8), mask (24,)}, labels (24,)'),
    ((('left', None), (3,)), 'inputs str, NoneType, labels int'),
    (((x,), ([y]*24,)), 'inputs (24, 1, 8, 8), labels (24,), (24,), (24,), (24,), … (24 in all)'),
    (((x,), ()), 'inputs (24, 1, 8, 8), labels none'),
    ((x, y), '(24, 1, 8, 8), (24,)'),
    (y.numpy(), 'ndarray (24,)'),
])
def test_batches_in_words(batch, words): assert describe_batch(batch) == words

def test_loaders_in_words():
    assert describe_loader(make_dls().valid) == 'TfmdDL(n=60, bs=16, drop_last=False)'
    assert describe_loader(Stream()) == 'Stream' and describe_loader([1, 2]) == 'list(2 batches)'
