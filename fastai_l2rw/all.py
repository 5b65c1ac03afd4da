"Everything that users of fastai_l2rw need, for `from fastai_l2rw.all import *`."
from fastai_l2rw.reweight import *
from fastai_l2rw.lookahead import *
from fastai_l2rw.weighers import *
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
