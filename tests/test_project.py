"The project itself: what must agree with what."
import ast, json, re, shlex, shutil, subprocess, sys
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile
import pytest
from packaging.requirements import Requirement

root = Path(__file__).parent.parent
settings = ConfigParser()
settings.read(root/'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']

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

def test_a_star_brings_what_users_need():
    "And nothing else; what 0.1.0 brought in that way can still be named."
    brought = {}
    exec('from fastai_l2rw.all import *', brought)
    del brought['__builtins__']
    assert set(brought) == set("""MetaReweightCallback MetaWeightNetCallback ItemKeys weighting_scheme schemes_table weighted_sampler
        example_weights meta_gradient alignment unrolled_weights MetaCandidates hold_out_meta MetaSplitter PartSplitter
        MetaInterpretation BalancedAccuracy ClassRecall show_distribution
        imbalance label_noise cifar10_dls ham10000_dls isic2018_test_dl submission verify""".split())
    import fastai_l2rw.all as everything
    for name in """forked_random derived_seed virtual_pass item_losses meta_gradient weighted_gradient scale_gradient NoForwardDerivative alignment
        rectify normalise effective_sample_size example_weights unrolled_weights virtual_step check_lookahead output_gradient_norms
        relative_alignments in_mean_units MetaReweightCallback weighting_schemes robust_options class_counts class_weights
        weighted_sampler MetaWeightNetCallback weighting_scheme ClassRecall BalancedAccuracy MetaSplitter BalancedSplitter PartSplitter
        hold_out_meta show_distribution imbalance label_noise open_rgb OpenRGB CategorizeColumn check_images labels_from_csv cifar10_table cifar10n
        OpenDecoded DecodedDL WeightedDecodedDL ShiftFlip cifar10_block cifar10_dls verify ham10000_table CropResize lesion_tfms ham10000_block
        ham10000_dls isic2018_test_dl submission""".split(): assert hasattr(everything, name), name

def test_the_table_of_what_works_is_what_is_tested():
    import test_callbacks, test_lookahead, test_losses, test_models
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
    for o in ('settings.ini', 'README.md', 'LICENSE', 'setup.py', 'pyproject.toml', 'CHANGELOG.md', 'SECURITY.md', 'CITATION.cff', 'fastai_l2rw/py.typed'):
        assert (unpacked/o).read_bytes() == (root/o).read_bytes()
    def files(folder, ext):
        found = [o.relative_to(folder) for name in ('fastai_l2rw', 'nbs', 'tests') for o in (folder/name).rglob(f'*.{ext}')]
        return {o for o in found if '.ipynb_checkpoints' not in o.parts}
    for ext in ('py', 'ipynb'): assert files(unpacked, ext) == files(root, ext)
    assert not list(unpacked.rglob('*.pyc'))

def check_long_description(text, readme):
    "The README, whose links and images lead to the project from any other page, too."
    links = re.compile(r'\]\(([^)\s]+)\)')
    parts = [re.split(r'(^```.*?^```$)', o.strip(), flags=re.M | re.S) for o in (text, readme)]
    assert parts[0][1::2] == parts[1][1::2] # code is as it was
    for a,b in zip(*(o[::2] for o in parts), strict=True):
        assert links.sub('', a) == links.sub('', b)
        for there,here in zip(links.findall(a), links.findall(b), strict=True):
            assert there.startswith(('https://', '#')) and there.endswith(here), there
            if there == here: continue
            assert (root/here.partition('#')[0]).exists(), here
            picture = here.endswith(('.png', '.svg', '.jpg'))
            assert there.startswith('https://raw.githubusercontent.com/' if picture else cfg['git_url'] + '/blob/'), there

def test_the_wheel_is_small_and_has_the_package(unpacked):
    wheel = backend(unpacked, 'build_wheel', 'wheel')
    assert wheel.stat().st_size <= 250_000
    names = {o for o in ZipFile(wheel).namelist() if '.dist-info/' not in o}
    assert names == {o.relative_to(root).as_posix() for o in (root/'fastai_l2rw').rglob('*') if o.suffix == '.py' and o.name != '_modidx.py' or o.name == 'py.typed'}

def test_what_is_imported_is_required():
    """At the top of a module: by the package's own requirements; elsewhere: by an extra, and an error says how to install it. No
    requirement is there for nothing."""
    distribution = dict(PIL='pillow', sklearn='scikit-learn')
    def needed(field): return {Requirement(o).name for o in cfg[field].split()}
    always,extras = set(),{}
    for file in (root/'fastai_l2rw').rglob('*.py'):
        tree = ast.parse(file.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, 'level', 0): continue
            for o in [o.name for o in node.names] if isinstance(node, ast.Import) else [node.module]:
                o = o.split('.')[0]
                if o in sys.stdlib_module_names or o == 'fastai_l2rw': continue
                o = distribution.get(o, o.replace('_', '-'))
                if node in tree.body: always.add(o)
                else: extras.setdefault(o, []).append(file)
    assert always == needed('requirements')
    optional = {k: v for k,v in extras.items() if k not in always}
    for name,files in optional.items():
        extra = next(o.removesuffix('_requirements') for o in cfg if o.endswith('_requirements') and o != 'test_requirements' and name in needed(o))
        for file in files:
            assert any(o in file.read_text(encoding='utf-8') for o in (f'fastai_l2rw[{extra}]', f'pip install {name}')), (file, name, extra)

def test_hints_are_what_mypy_accepts(tmp_path):
    "Of typical uses, and it finds a wrong one."
    pytest.importorskip('mypy')
    def mypy(file): return subprocess.run([sys.executable, '-m', 'mypy', str(file)], capture_output=True, text=True, cwd=root)
    done = mypy('tests/typed_uses.py')
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path/'wrong.py').write_text('from fastai_l2rw.all import imbalance\nfrom fastai_l2rw.studies.commands import l2rw_demo\nl2rw_demo(seeds="3")\nimbalance([0], tails=3)\n')
    done = mypy(tmp_path/'wrong.py')
    assert done.returncode == 1 and '"str"; expected "int"' in done.stdout and 'Unexpected keyword argument "tails"' in done.stdout, done.stdout

def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip('yaml')
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert (cff['version'], cff['license'], cff['repository-code']) == (cfg['version'], 'Apache-2.0', cfg['git_url'])
    assert {'cff-version', 'message', 'title', 'authors'} <= set(cff)

def documented_commands():
    "All that is typed in Markdown and in notebooks: README, results and docs."
    files = [root/'README.md', root/'results/README.md', *(root/'nbs').rglob('*.ipynb')]
    for file in files:
        text = file.read_text(encoding='utf-8')
        if file.suffix == '.ipynb':
            text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
        for line in re.findall(r'`(l2rw_\w+ [^`\n]*)`', text) + re.findall(r'^(l2rw_\w+ [^\n]*)$', text, flags=re.M): yield line

@pytest.mark.parametrize('spelling', ['as written', 'with hyphens', 'with underscores'])
def test_documented_commands_are_understood(monkeypatch, spelling):
    "By any version of fastcore; nothing is trained."
    from fastai_l2rw.studies import commands
    seen = []
    monkeypatch.setattr(commands, 'run_study', lambda name, options: seen.append(options) or 0)
    lines = list(documented_commands())
    assert len(lines) > 12
    for line in lines:
        name,*args = shlex.split(line.replace('l2rw_ham10000 ...', 'l2rw_ham10000 FOLDER'))
        if spelling != 'as written':
            args = [re.sub('(?<=\\w)[-_](?=\\w)', '-' if spelling == 'with hyphens' else '_', o) if o.startswith('--') else o for o in args]
        monkeypatch.setattr(sys, 'argv', [name, *args])
        with pytest.raises(SystemExit) as e: getattr(commands, name).main()
        assert e.value.code == 0, line
    if spelling == 'as written': assert {o.meta_per_class for o in seen if hasattr(o, 'meta_per_class')} == {5, 10}

def test_more_documented_options_are_understood(monkeypatch):
    "Those that a table gives without their command."
    from fastai_l2rw.studies import commands
    seen = []
    monkeypatch.setattr(commands, 'run_study', lambda name, options: seen.append(options) or 0)
    text = (root/'results/README.md').read_text(encoding='utf-8')
    options = re.findall(r'with `(--[^`]*)`', text)
    assert len(options) >= 4
    for o in options:
        for args in (o, o.replace('_', '-')):
            monkeypatch.setattr(sys, 'argv', ['l2rw_ham10000', 'FOLDER', *shlex.split(args)])
            with pytest.raises(SystemExit) as e: commands.l2rw_ham10000.main()
            assert e.value.code == 0, args
    assert {20} <= {o.meta_per_class for o in seen} and any(o.train_on_meta for o in seen)

def test_the_source_distribution_gives_its_metadata(unpacked):
    info = backend(unpacked, 'prepare_metadata_for_build_wheel', 'meta')
    metadata = HeaderParser().parsestr((info/'METADATA').read_text(encoding='utf-8'))
    assert (metadata['Name'], metadata['Version']) == (cfg['lib_name'], cfg['version'])
    assert metadata['Requires-Python'] == f">={cfg['min_python']}"
    assert metadata['License-Expression'] == 'Apache-2.0' and not [o for o in metadata.get_all('Classifier') if o.startswith('License')]
    assert f"Programming Language :: Python :: {cfg['min_python']}" in metadata.get_all('Classifier') and 'Typing :: Typed' in metadata.get_all('Classifier')
    assert {o.split(', ')[0] for o in metadata.get_all('Project-URL')} >= {'Documentation', 'Changelog', 'Issues'}
    check_long_description(metadata.get_payload(), (root/'README.md').read_text(encoding='utf-8'))
    needs = [Requirement(o) for o in metadata.get_all('Requires-Dist')]
    def found(extra): return {f'{o.name}{o.specifier}' for o in needs if (o.marker.evaluate(dict(extra=extra)) if o.marker else not extra)}
    def meant(*fields): return {f'{o.name}{o.specifier}' for field in fields for o in map(Requirement, cfg[f'{field}requirements'].split())}
    expected = {'': meant(''), 'test': meant('test_'), 'dev': meant('test_', 'dev_')}
    for o in cfg:
        if o.endswith('_requirements'): expected.setdefault(o.removesuffix('_requirements'), meant(o.removesuffix('requirements')))
    assert {'lite', 'timm', 'distributed', 'bench'} <= set(expected)
    assert {o: found(o) for o in ('', *metadata.get_all('Provides-Extra'))} == expected
    commands = ConfigParser()
    commands.read(info/'entry_points.txt', encoding='utf-8')
    assert dict(commands['console_scripts']) == dict(o.split('=') for o in cfg['console_scripts'].split())
