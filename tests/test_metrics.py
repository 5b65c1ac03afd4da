"Metrics against scikit-learn, on whole validation passes."
import warnings
import numpy as np, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, noop
from fastai.callback.progress import ProgressCallback
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch import nn

from fastai_l2rw.all import BalancedAccuracy, ClassRecall

@pytest.mark.parametrize('present', [[0, 1, 2, 3], [0, 2, 3], [1]])
def test_metrics_agree_with_sklearn(present, tmp_path):
    "The model's outputs are the inputs, so that the predictions are known; batches are of different sizes."
    rng = np.random.default_rng(0)
    y = rng.choice(present, 101)
    out = torch.tensor(rng.normal(size=(101, 4)) + np.eye(4)[y], dtype=torch.float32)
    dl = DataLoader(list(zip(out, torch.tensor(y))), bs=16)
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad(): model.weight.copy_(torch.eye(4))
    vocab = ['nv', 'mel', 'bcc', 'df']
    learn = Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(), metrics=[BalancedAccuracy(), *ClassRecall(vocab)], path=tmp_path)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # scikit-learn warns of predicted classes that are never true
        learn.fit(1, lr=0.)
        predicted = out.argmax(1).numpy()
        assert abs(learn.recorder.values[0][2] - balanced_accuracy_score(y, predicted)) < 1e-9
    assert learn.recorder.metric_names[4:-1] == [f'recall_{o}' for o in vocab]
    for c,recall in enumerate(learn.recorder.values[0][3:]):
        if c in present: assert abs(recall - recall_score(y, predicted, labels=[c], average='macro')) < 1e-9
        else: assert np.isnan(recall)

@pytest.mark.parametrize('vocab', [[], 'nv'])
def test_a_vocab_must_be_names(vocab):
    with pytest.raises(ValueError, match='must be the names of the classes'): ClassRecall(vocab)
