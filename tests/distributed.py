"Run by test_callbacks.py in two processes: training with DistributedDataParallel, reweighted, with or without batch norm. Writes what each process has into a folder."
import os, sys
from pathlib import Path
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from torch.distributed import barrier, destroy_process_group, get_rank, init_process_group
from fastai_l2rw.all import MetaReweightCallback
from conftest import cnn, images, labels, make_dls, tensors, train

init_process_group('gloo')
own = train[get_rank()::2] # fastai's own loader for this needs GPUs
dls = DataLoaders(tensors(images[own], torch.tensor(labels[own])), make_dls().valid)
set_seed(0)
learn = Learner(dls, torch.nn.parallel.DistributedDataParallel(cnn(bn=sys.argv[2] == 'batch norm')), loss_func=CrossEntropyLossFlat(), cbs=MetaReweightCallback(make_dls().loaders[2]))
agreed,weights = [],[]
def note(self):
    if not self.training: return
    agreed.append(self.meta_reweight.step.route)
    weights.append(self.meta_reweight.step.weights)
with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=Callback(after_loss=note))
parameters = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
torch.save((parameters, torch.cat(weights), agreed), Path(sys.argv[1])/f'{get_rank()}.pt')
barrier() # a process that is gone before the other has let go of it makes that abort now and then
destroy_process_group()
os._exit(0) # threads that gloo leaves behind can make an orderly end abort on a busy machine
