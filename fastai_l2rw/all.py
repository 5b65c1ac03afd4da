"""What users of fastai_l2rw need, for `from fastai_l2rw.all import *`. The other public names of these modules can be
had from here, too, but have to be named: `from fastai_l2rw.all import virtual_step`."""
from fastai_l2rw.reweight import *
from fastai_l2rw.lookahead import *
from fastai_l2rw.weighers import *
from fastai_l2rw.ledger import ItemKeys
from fastai_l2rw.losses import LossNotPerItem
from fastai_l2rw.callback import *
from fastai_l2rw.schemes import *
from fastai_l2rw.metrics import *
from fastai_l2rw.interpret import *
from fastai_l2rw.data.core import *
from fastai_l2rw.data.checked import *
from fastai_l2rw.data.folders import *
from fastai_l2rw.data.cifar10 import *
from fastai_l2rw.data.ham10000 import *

__all__ = ['MetaReweightCallback', 'MetaWeightNetCallback', 'ItemKeys', 'weighting_scheme', 'schemes_table',
    'weighted_sampler', # in a Learner
    'example_weights', 'meta_gradient', 'alignment', 'unrolled_weights', # in a loop of one's own
    'MetaCandidates', 'hold_out_meta', 'MetaSplitter', 'PartSplitter', # trusted examples
    'MetaInterpretation', 'BalancedAccuracy', 'ClassRecall', 'show_distribution', # to look at
    'imbalance', 'label_noise', 'cifar10_dls', 'ham10000_dls', 'isic2018_test_dl', 'submission', 'verify'] # data
