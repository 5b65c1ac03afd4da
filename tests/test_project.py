"The project itself: what must agree with what."
import re, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).parent.parent

def test_readme_is_made_from_the_index_notebook():
    pytest.importorskip('nbconvert')
    done = subprocess.run([sys.executable, str(root/'.ci/readme.py'), '--check'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_the_algorithm_needs_no_fastai():
    code = 'import sys, fastai_l2rw.reweight; print([m for m in sys.modules if m.split(".")[0] in ("fastai", "fastcore")])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_all_exports_everything():
    import fastai_l2rw.all as everything
    from fastai_l2rw import callback, lookahead, metrics, reweight, schemes
    from fastai_l2rw.data import cifar10, core, folders, ham10000
    for module in (callback, lookahead, metrics, reweight, schemes, core, folders, cifar10, ham10000):
        for name in module.__all__: assert getattr(everything, name) is getattr(module, name)

def test_the_table_of_what_works_is_what_is_tested():
    import json, test_callbacks, test_lookahead, test_losses, test_models
    cells = json.loads((root/'nbs'/'tutorials'/'what_works.ipynb').read_text())['cells']
    told = [name for cell in cells for line in ''.join(cell['source']).splitlines() if line.startswith('| `') for name in re.findall('`([^`]+)`', line.split('|')[1])]
    tested = [name for table in (test_models.LEARNERS, test_losses.LOSSES, test_lookahead.OPTIMIZERS, test_callbacks.CALLBACKS, test_callbacks.MODES) for name in table]
    elsewhere = ['ModelResetter', 'RNNCallback', 'RNNRegularizer']
    assert sorted(told) == sorted(tested + elsewhere)
