"The project itself: what must agree with what."
import re, shutil, subprocess, sys
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement

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
    cells = json.loads((root/'nbs'/'reference'/'what_works.ipynb').read_text())['cells']
    told = [name for cell in cells for line in ''.join(cell['source']).splitlines() if line.startswith('| `') for name in re.findall('`([^`]+)`', line.split('|')[1])]
    tested = [name for table in (test_models.LEARNERS, test_losses.LOSSES, test_lookahead.OPTIMIZERS, test_callbacks.CALLBACKS, test_callbacks.MODES) for name in table]
    elsewhere = ['ModelResetter', 'RNNCallback', 'RNNRegularizer']
    assert sorted(told) == sorted(tested + elsewhere)

def backend(folder, hook, out):
    "What a hook of setuptools has made in `out`, when it is called in a folder as pip and build call it."
    (folder/out).mkdir()
    code = f'from setuptools import build_meta; print(build_meta.{hook}({out!r}))'
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder/out/done.stdout.splitlines()[-1]

@pytest.fixture(scope='module')
def unpacked(tmp_path_factory):
    "The source distribution, made from a copy of the project, and unpacked where nothing else is."
    pytest.importorskip('setuptools', minversion='77')
    copy,empty = tmp_path_factory.mktemp('copy'),tmp_path_factory.mktemp('empty')
    for o in root.iterdir():
        if o.is_file(): shutil.copy(o, copy)
    for o in ('fastai_l2rw', 'nbs', 'tests', '.ci'): shutil.copytree(root/o, copy/o)
    shutil.unpack_archive(backend(copy, 'build_sdist', 'dist'), empty)
    folder, = empty.iterdir()
    return folder

def test_the_source_distribution_is_whole(unpacked):
    for o in ('settings.ini', 'README.md', 'LICENSE', 'setup.py', 'pyproject.toml', 'CHANGELOG.md'):
        assert (unpacked/o).read_bytes() == (root/o).read_bytes()
    def files(folder, ext):
        found = [o.relative_to(folder) for name in ('fastai_l2rw', 'nbs', 'tests') for o in (folder/name).rglob(f'*.{ext}')]
        return {o for o in found if '.ipynb_checkpoints' not in o.parts}
    for ext in ('py', 'ipynb'): assert files(unpacked, ext) == files(root, ext)
    assert not list(unpacked.rglob('*.pyc'))

def test_the_source_distribution_gives_its_metadata(unpacked):
    settings = ConfigParser()
    settings.read(root/'settings.ini', encoding='utf-8')
    cfg = settings['DEFAULT']
    info = backend(unpacked, 'prepare_metadata_for_build_wheel', 'meta')
    metadata = HeaderParser().parsestr((info/'METADATA').read_text(encoding='utf-8'))
    assert (metadata['Name'], metadata['Version']) == (cfg['lib_name'], cfg['version'])
    assert metadata['Requires-Python'] == f">={cfg['min_python']}"
    assert 'Apache-2.0' in (metadata['License-Expression'], metadata['License'])
    assert metadata.get_payload().strip() == (root/'README.md').read_text(encoding='utf-8').strip()
    needs = [Requirement(o) for o in metadata.get_all('Requires-Dist')]
    def found(extra): return {f'{o.name}{o.specifier}' for o in needs if (o.marker.evaluate(dict(extra=extra)) if o.marker else not extra)}
    def meant(*fields): return {f'{o.name}{o.specifier}' for field in fields for o in map(Requirement, cfg[f'{field}requirements'].split())}
    expected = {'': meant(''), 'test': meant('test_'), 'dev': meant('test_', 'dev_'), 'bench': meant('bench_'), 'lite': meant('lite_')}
    assert {o: found(o) for o in ('', *metadata.get_all('Provides-Extra'))} == expected
    commands = ConfigParser()
    commands.read(info/'entry_points.txt', encoding='utf-8')
    assert dict(commands['console_scripts']) == dict(o.split('=') for o in cfg['console_scripts'].split())
