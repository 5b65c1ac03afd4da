"The project itself: what must agree with what."
import subprocess, sys
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
    for module in (callback, lookahead, metrics, reweight, schemes):
        for name in module.__all__: assert getattr(everything, name) is getattr(module, name)
