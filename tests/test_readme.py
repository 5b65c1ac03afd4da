"The code blocks of README.md run as printed: on small folders of images, with a tiny network in the place of a pretrained one."
import re
from pathlib import Path
import numpy as np
import pytest
from fastai.torch_core import defaults
from fastai.vision.all import ConvLayer, Image, Learner, get_image_files, nn
import fastai.vision.all

readme = (Path(__file__).parent.parent/'README.md').read_text(encoding='utf-8')
blocks = re.findall(r'^```python\n(.*?)^```$', readme, flags=re.M | re.S)

def write_folder(path, n):
    rng = np.random.default_rng(0)
    for name,level in (('cat', 60), ('dog', 180)):
        (path/name).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(level, level + 60, (12, 12, 3), dtype=np.uint8)).save(path/name/f'{i}.png')

def tiny_learner(dls, arch, metrics, **kwargs):
    model = nn.Sequential(nn.AvgPool2d(8), ConvLayer(3, 8, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, dls.c))
    return Learner(dls, model, metrics=metrics, **kwargs)

def test_all_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    "One after the other, in the same namespace, as somebody would type them."
    from fastai_l2rw.all import MetaReweightCallback
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(defaults, 'cpus', 0) # no worker processes
    monkeypatch.setattr(fastai.vision.all, 'vision_learner', tiny_learner)
    write_folder(tmp_path/'my_images', 45)
    write_folder(tmp_path/'checked', 3)
    assert len(blocks) == len(re.findall('^```py', readme, flags=re.M)) >= 5
    names,learners = {},[]
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), names)
        learn = names['learn']
        if learn not in learners: learners.append(learn)
    first,second = learners
    assert [Path(o) for o in first.meta_reweight.meta_dl.items] == [o.relative_to(tmp_path) for o in get_image_files(tmp_path/'checked')]
    assert len(first.recorder.values) == 8 and len(first.meta_reweight.item_weights())
    assert (tmp_path/'checked.csv').read_text().count('dog') >= 5
    trusted = {str(o) for o in second.meta_reweight.meta_dl.items}
    assert len(trusted) == 9 and not trusted & {str(o) for o in second.dls.train.items}
    assert any(isinstance(o, MetaReweightCallback) for o in second.cbs)
    assert names['weights'].shape == (32,) and float(names['weights'].sum()) == pytest.approx(1, abs=1e-5)

def test_no_paragraph_of_the_readme_has_more_than_three_numbers():
    "Tables are for these."
    prose = re.sub(r'^```.*?^```$', '', readme, flags=re.M | re.S)
    for paragraph in re.split(r'\n\n|\n(?=- )', prose):
        if paragraph.startswith('|'): continue
        text = re.sub(r'\]\([^)]*\)|`[^`]*`', '', paragraph)
        found = re.findall(r'(?<![\w-])\d[\d.,]*(?![\w-])', text)
        assert len(found) <= 3 or paragraph.startswith('*'), (found, paragraph)
