"Typical mistakes, each with what its message says was given, and what it says to do."
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import IndexSplitter, Learner, RandomSplitter, noop
from fastai.callback.progress import ProgressCallback
from fastai.data.transforms import parent_label
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset

from fastai_l2rw.all import (BalancedSplitter, MetaCandidates, MetaReweightCallback, MetaSplitter, MetaWeightNetCallback, PartSplitter,
    hold_out_meta, imbalance, label_noise, weighting_scheme)
from conftest import cnn, images, labels, make_dls, meta

x,y = images[meta],torch.tensor(labels[meta])
df = pd.DataFrame(dict(age=np.arange(40.), label=['no', 'yes']*20, ok=[True] + [False]*39))

def fit(meta_dl=None, *, dls=None, cls=MetaReweightCallback, model=None, loss_func=None, **kwargs):
    "Train for an epoch with what was given."
    learn = Learner(make_dls() if dls is None else dls, cnn() if model is None else model, loss_func=loss_func or CrossEntropyLossFlat(),
        cbs=cls(meta_dl, **kwargs))
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    learn.fit(1)

def table():
    return TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cont_names=['age'], y_names='label', valid_idx=range(30, 40), bs=8)
def loader(*data, bs=8): return TorchLoader(TensorDataset(*data), bs)
def named(vocab):
    dl = loader(x, y)
    dl.vocab = vocab
    return dl
def two(): return make_dls(2)
def of_own(fn):
    "Loaders of which the one of training draws by itself."
    dls = make_dls()
    dls.loaders[0] = dls.train.new(get_idxs=fn)
    return dls
def unreadable(tmp_path, text):
    (tmp_path/'some.csv').write_text(text)
    return tmp_path/'some.csv'

# what a person does (given a folder), the error, what the message says was given, and what it says to do
MISTAKES = {
    # the trusted loader
    'the folder of checked images': (lambda p: MetaReweightCallback('checked'), TypeError,
        "meta_dl is a str, 'checked'", "learn.dls.test_dl(get_image_files('checked'), with_labels=True)"),
    'all loaders at once': (lambda p: MetaReweightCallback(two()), TypeError,
        'DataLoaders of 2 loaders', 'make one of examples whose labels have been checked, with meta_dl.test_dl(items, with_labels=True)'),
    'the Learner': (lambda p: MetaReweightCallback(Learner(two(), cnn(), CrossEntropyLossFlat())), TypeError,
        'meta_dl is a Learner', 'must be a loader'),
    'the training loader': (lambda p: (lambda dls: fit(dls.train, dls=dls))(make_dls()), ValueError,
        'is the training loader: its labels are those you do not trust', 'learn.dls.test_dl(items, with_labels=True)'),
    'the validation loader': (lambda p: (lambda dls: fit(dls.valid, dls=dls))(make_dls()), UserWarning,
        'meta_dl reads the validation set', 'Hold out other examples'),
    'Datasets': (lambda p: MetaReweightCallback(two().train_ds), TypeError, 'meta_dl is a Datasets', 'learn.dls.valid.new(meta_dl)'),
    'a table': (lambda p: MetaReweightCallback(df), TypeError,
        'DataFrame of shape (40, 3)', 'learn.dls.test_dl(meta_dl, with_labels=True)'),
    'a pair of arrays': (lambda p: MetaReweightCallback((x.numpy(), y.numpy())), TypeError,
        'tuple of 2 elements, the first of type ndarray', 'TensorDataset(*map(torch.as_tensor, meta_dl))'),
    'a data set of PyTorch': (lambda p: MetaReweightCallback(TensorDataset(x, y)), TypeError,
        'TensorDataset', 'DataLoader(meta_dl, batch_size=64)'),
    'an iterator': (lambda p: MetaReweightCallback(iter(loader(x, y))), TypeError,
        'can be read only once', 'pass a loader, or a list of batches'),
    'no trusted loader': (lambda p: fit(dls=two()), ValueError, 'learn.dls has 2 loaders', 'a splitter that makes three parts'),
    'no trusted loader, and a table': (lambda p: fit(dls=table(), model=nn.Linear(1, 2)), ValueError, 'learn.dls has 2 loaders',
        'dls,meta_dl = hold_out_meta(dls, trusted=rows)'),
    'no labels': (lambda p: fit(loader(x)), ValueError, '(8, 1, 8, 8): are the labels missing?', 'with_labels=True'),
    'one-hot labels': (lambda p: fit(loader(x, torch.eye(4)[y])), ValueError, '(8, 4) (one-hot?)', 'pass labels.argmax(1)'),
    'labels that are floats': (lambda p: fit(loader(x, y.float())), ValueError,
        'are floating-point numbers of shape (8,)', 'pass labels.long()'),
    'a class that is none': (lambda p: fit(named(['digit 0', 'digit 7'])), ValueError, '2 (digit 0, digit 7) and not 4',
        'digit 7 is none of the classes of learn.dls: leave its examples out'),
    'a class less': (lambda p: fit(named(['digit 3', 'digit 2', 'digit 1', 'digit 0'])), UserWarning,
        'meta_dl has the classes digit 3, digit 2', 'mapped by name'),
    'a class without a trusted example': (lambda p: fit(loader(x[y > 0], y[y > 0])), UserWarning,
        'meta_dl has no example of digit 0', 'Add a few trusted ones'),
    'no trusted example': (lambda p: fit(loader(x[:0], y[:0])), ValueError, 'yields no batch', 'at least one labelled, trusted example'),
    # options
    'an unknown engine': (lambda p: MetaReweightCallback(engine='backward'), ValueError,
        "engine='backward' is unknown", "'auto' or 'forward' or 'reverse'"),
    'parameters and no function': (lambda p: MetaReweightCallback(params=cnn()[-1].parameters()), TypeError, 'params is a generator',
        'lambda model: model[-1].parameters()'),
    'half a step': (lambda p: MetaReweightCallback(every=0.5), ValueError, 'every=0.5', 'a whole number, 1 or more'),
    'a rate below zero': (lambda p: MetaWeightNetCallback(net_lr=-1e-3), ValueError, 'net_lr=-0.001', 'above 0'),
    'an unknown scheme': (lambda p: weighting_scheme('sampler', two()), ValueError, "scheme='sampler' is unknown", "'weighted sampler'"),
    'an option of another scheme': (lambda p: weighting_scheme('robust', two(), beta=0.9), TypeError, 'does not take beta', 'engine'),
    'a loss for all items at once': (lambda p: fit(loader(x, y), loss_func=lambda a, b: nn.functional.cross_entropy(a, b)), ValueError,
        'returned a tensor of shape () for a batch of 8 items', "obeys when it is 'none', or let it return one loss per item"),
    # which examples are trusted
    'two ways to say which': (lambda p: hold_out_meta(two(), 3, trusted=[1]), ValueError, 'meta_per_class=3', 'give one of them'),
    'nothing said': (lambda p: hold_out_meta(two()), ValueError, 'meta_per_class=None must be', 'or trusted must say which items are'),
    'the Learner again': (lambda p: hold_out_meta(Learner(two(), cnn(), CrossEntropyLossFlat()), 3), TypeError,
        'dls is a Learner', 'take learn.dls'),
    'more than there are': (lambda p: hold_out_meta(two(), 500), ValueError, 'meta_per_class=500', 'must leave at least one to train on'),
    'files of another folder': (lambda p: hold_out_meta(two(), trusted=['a.png', 'b.png']), ValueError,
        'trusted names 2 items', 'none of them is among the'),
    'a folder': (lambda p: hold_out_meta(two(), trusted=str(p)), ValueError, 'is a folder', 'pass get_image_files('),
    'a file that is not there': (lambda p: hold_out_meta(two(), trusted='checked.csv'), FileNotFoundError,
        "trusted='checked.csv' is no file",
        'save checked examples with MetaCandidates first'),
    'another file': (lambda p: hold_out_meta(two(), trusted=unreadable(p, 'a,b\n1,2\n')), ValueError, 'has the columns a, b',
        'label, given, date after one of file, row, item, position'),
    'checked rows of another table': (
        lambda p: hold_out_meta(two(), trusted=unreadable(p, 'row,label,given,date\n1,a,a,2024-01-01\n')), ValueError,
        'are called by row, but the items by item', 'of other data, or these are loaded in another way'),
    'a position too far': (lambda p: hold_out_meta(two(), trusted=[10**6]), ValueError,
        'trusted has the position 1000000', 'positions from 0 to'),
    'a mask of something else': (lambda p: hold_out_meta(two(), trusted=[True, False]), ValueError,
        'a mask of 2 values', 'one for each of'),
    'a column that is none': (lambda p: hold_out_meta(table(), trusted='checked'), ValueError,
        "trusted='checked'", 'which has only age, label, ok'),
    'a column of something else': (lambda p: hold_out_meta(table(), trusted='age'), ValueError,
        'trusted gives', 'True or False for each item'),
    'files for rows': (lambda p: hold_out_meta(table(), trusted=['a.png']), ValueError,
        'trusted is a list of str', 'or the name of a column of truth values'),
    'a number': (lambda p: hold_out_meta(table(), trusted=5), TypeError, 'trusted is a int', 'files, rows of a DataFrame'),
    'a loader as the trusted ones': (lambda p: hold_out_meta(table(), trusted=table()), TypeError,
        'trusted is a TabularDataLoaders', 'files, rows of a DataFrame'),
    'the loader itself': (lambda p: hold_out_meta(two(), trusted=loader(x, y)), TypeError, 'trusted is a DataLoader',
        'is what MetaReweightCallback takes'),
    'labels by position': (lambda p: hold_out_meta(two(), trusted={3: 'digit 1'}), TypeError,
        'trusted is a dict', 'labels are corrected by relabel'),
    'all of a class': (lambda p: hold_out_meta(table(), trusted=lambda r: r.label in ('no', 0)), UserWarning,
        "trusted has all items of 'no'", 'leave some of them out'),
    'a loader that draws by itself': (lambda p: hold_out_meta(of_own(lambda: [0, 1, 2]), 3), ValueError,
        'draws items by a function of its own',
        'hold them out first'),
    # splitters
    'a number as splitter': (lambda p: MetaSplitter(0.2, 3, parent_label), TypeError, 'splitter is a float', 'such as RandomSplitter()'),
    'no label to draw by': (lambda p: MetaSplitter(RandomSplitter(), 3), ValueError,
        'get_y is needed for meta_per_class=3', 'such as parent_label'),
    'a part of a class': (lambda p: BalancedSplitter(0.2, 'label'), ValueError, 'valid_per_class=0.2', 'a whole number of items per class'),
    'an unknown part': (lambda p: PartSplitter('label')(df), ValueError,
        "col='label' has the values no, yes", 'the parts are train, valid, meta, test'),
    'groups that leave nothing': (lambda p: MetaSplitter(IndexSplitter([38, 39]), 1, 'label', groups=[0]*20 + [1]*20)(df), ValueError,
        'groups leaves no item for validation', 'BalancedSplitter with groups'),
    # candidates
    'trust before a look': (lambda p: hold_out_meta(table(), trusted=MetaCandidates(table(), 2)), ValueError,
        'none of the 4 candidates has been confirmed', 'look at them (show)'),
    'confirmed before a look': (lambda p: MetaCandidates(table(), 2).confirm(), ValueError, 'none of the 4 open candidates has been shown',
        'look at them with show() first'),
    'a class with a typo': (lambda p: MetaCandidates(table(), 2).relabel({0: 'nope'}), ValueError,
        "'nope' is none of the classes", 'which are no, yes'),
    'a number that is none': (lambda p: MetaCandidates(table(), 2).drop([44]), ValueError,
        'there is no candidate 44', 'numbered from 0 to 3'),
    'a list of labels': (lambda p: MetaCandidates(table(), 2).relabel(['no']), TypeError, 'labels is a list', "relabel({3: 'dog'})"),
    'no .csv': (lambda p: MetaCandidates(table(), 2).confirm(range(4)).save(p/'checked.txt'), ValueError,
        "checked.txt'", 'must end with .csv'),
    # data for experiments
    'a percentage': (lambda p: label_noise(df.label, uniform=40), ValueError, 'uniform=40', 'a share, from 0 to 1'),
    'two kinds of skew': (lambda p: imbalance(df.label, tail=2, step=2), ValueError,
        'not tail and step', 'exactly one of dominance, tail, step'),
}

@pytest.mark.parametrize('do,error,given,remedy', MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_so_is_what_to_do(do, error, given, remedy, tmp_path):
    catch = pytest.warns if issubclass(error, Warning) else pytest.raises
    with catch(error) as caught: do(tmp_path)
    said = [str(o.message) for o in caught] if issubclass(error, Warning) else [str(caught.value)]
    assert any(given in o and remedy in o for o in said), said
    assert max(map(len, said)) < 700

def test_there_are_enough_of_them(): assert len(MISTAKES) >= 25
