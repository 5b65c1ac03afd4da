"""What is told of each public name: a sentence, every parameter, what comes back, and what is raised. It is read from the source, so
nbdev need not be installed."""
import ast, importlib, json, pkgutil, re, tokenize
from functools import cache
from pathlib import Path
import pytest
from fastai.callback.core import Callback
from fasttransform import Transform
import fastai_l2rw

root = Path(__file__).parent.parent
package = Path(fastai_l2rw.__file__).parent
notebooks = sorted(o for o in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)
functions = (ast.FunctionDef, ast.AsyncFunctionDef)

class Source:
    "A module as it is written: its tree, its comments by line, and its functions and classes."
    def __init__(self, text, name='here'):
        self.name,self.tree = name,ast.parse(text)
        lines = iter(text.splitlines(keepends=True))
        tokens = tokenize.generate_tokens(lambda: next(lines, ''))
        self.comments = {t.start[0]: t.string.lstrip('#').strip() for t in tokens if t.type == tokenize.COMMENT}
        top = [o for o in self.tree.body if isinstance(o, (*functions, ast.ClassDef))]
        self.patches = [o for o in top if patched(o)]
        self.defs = {o.name: o for o in top if not patched(o)}

    def methods(self, cls):
        "All functions of a class, and those that are patched into it."
        body = self.defs[cls].body if isinstance(self.defs.get(cls), ast.ClassDef) else []
        return [*(o for o in body if isinstance(o, functions)), *(o for o in self.patches if patched(o) == cls)]

def decorators(node): return [ast.unparse(o) for o in getattr(node, 'decorator_list', [])]

def patched(node):
    "The name of the class that a function is made a method of by `@patch`."
    if any(re.match(r'patch\b', o) for o in decorators(node)): return ast.unparse(node.args.args[0].annotation)

@cache
def sources():
    names = sorted(o.name for o in pkgutil.walk_packages(fastai_l2rw.__path__, 'fastai_l2rw.') if not o.ispkg)
    def text(name): return package.joinpath(*name.split('.')[1:]).with_suffix('.py').read_text(encoding='utf-8')
    return {name: Source(text(name), name) for name in names}

@cache
def exported(module): return set(getattr(importlib.import_module(module), '__all__', ()))

def is_public(node): return not node.name.startswith('_') or node.name == '__init__'

def is_setter(node): return any(o.endswith('.setter') or 'set_prop=True' in o for o in decorators(node))

@cache
def public():
    "All that is public, as `(source, name, node)`: functions, classes and, with the name of their class, methods."
    res,classes = [],set().union(*map(exported, sources()))
    for module,source in sources().items():
        names = [o for o in source.defs if o in exported(module)]
        res += [(source, o, source.defs[o]) for o in names]
        owners = {*names, *(patched(o) for o in source.patches if patched(o) in classes)}
        res += [(source, f'{o}.{m.name}', m) for o in sorted(owners) for m in source.methods(o) if is_public(m) and not is_setter(m)]
    return res

def is_told_elsewhere(source, name):
    "Is it a method that another package calls, such as an event of a callback, and so as that package describes it?"
    cls,_,method = name.partition('.')
    cls = getattr(importlib.import_module(source.name), cls)
    if not method or not isinstance(cls, type): return False
    theirs = [o for o in cls.__mro__[1:] if not o.__module__.startswith('fastai_l2rw')]
    if issubclass(cls, Transform) and method in ('encodes', 'decodes', 'setups'): return True
    if issubclass(cls, Callback) and re.match('(before|after)_', method): return True
    return method != '__init__' and any(hasattr(o, method) for o in theirs)

def inside(node, kind, guards=()):
    "Nodes of a kind in a function, but not in functions inside it, each with the names of the exceptions that are caught around it."
    for o in ast.iter_child_nodes(node):
        if isinstance(o, kind): yield o,guards
        if isinstance(o, (*functions, ast.Lambda, ast.ClassDef)): continue
        if not isinstance(o, ast.Try): yield from inside(o, kind, guards)
        else:
            caught = [h for h in o.handlers if not any(r.exc is None for r,_ in inside(h, ast.Raise))] # others raise it again
            names = re.findall(r'\w+', ' '.join('BaseException' if h.type is None else ast.unparse(h.type) for h in caught))
            yield from inside(ast.Module(o.body, []), kind, (*guards, *names))
            for part in (o.handlers, o.orelse, o.finalbody): yield from inside(ast.Module(part, []), kind, guards)

def raised(source, name, node, seen=()):
    "Names of the exceptions that leave a function: those that it raises, or that a private function does which it calls."
    found = set()
    def note(names, guards): found.update(o for o in names if not {o, 'Exception', 'BaseException'} & set(guards))
    for o,guards in inside(node, ast.Raise):
        e = o.exc.func if isinstance(o.exc, ast.Call) else o.exc
        if isinstance(e, ast.Name) and e.id[0].isupper(): note([e.id], guards)
    helpers = {k: v for k,v in source.defs.items() if k.startswith('_') and isinstance(v, functions)}
    helpers |= {f'self.{o.name}': o for o in source.methods(name.split('.')[0]) if o.name.startswith('_')}
    for o,guards in inside(node, ast.Call):
        helper = helpers.get(ast.unparse(o.func))
        if helper is None or helper.name in seen or any(inside(helper, (ast.Yield, ast.YieldFrom))): continue
        note(raised(source, name, helper, (*seen, helper.name)), guards)
    return found

def faults(source, name, node, told_elsewhere=False):
    "What is missing in what is told of a public name."
    doc,is_init = ast.get_docstring(node) or '',name.endswith('.__init__')
    if not is_init:
        if not doc: yield 'there is no docstring'
        elif doc[-1] not in '.?' or '\n\n' in doc: yield 'the docstring is no sentence'
    if isinstance(node, ast.ClassDef):
        for o in node.body:
            if isinstance(o, ast.AnnAssign) and not o.target.id.startswith('_') and not source.comments.get(o.end_lineno):
                yield f'{o.target.id}: no comment'
        return
    if is_init: doc += ast.get_docstring(source.defs[name.split('.')[0]]) or ''
    for o in sorted(raised(source, name, node)):
        if not re.search(rf'\b{o}\b', doc) and not re.search(r'[Rr]aises[^.]* what `', doc):
            yield f'{o} is raised, which the docstring does not say'
    if told_elsewhere: return
    a = node.args
    params = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    if '.' in name and 'staticmethod' not in decorators(node): params = params[1:]
    lines = [o.lineno for o in params]
    positional = [*a.posonlyargs, *a.args]
    defaults = dict(zip([o.arg for o in positional[len(positional) - len(a.defaults):]], a.defaults)) | {o.arg: d for o,d in zip(a.kwonlyargs, a.kw_defaults)}
    for o in params:
        if o.lineno == node.lineno or lines.count(o.lineno) > 1 or not source.comments.get(o.end_lineno):
            yield f'{o.arg}: no comment in a line of its own'
        default = getattr(defaults.get(o.arg), 'value', None)
        if default is not None and o.annotation is None: yield f'{o.arg}: no type, though it is {default!r} by default'
    given = [o.value for o,_ in inside(node, (ast.Return, ast.Yield))]
    if is_init or not any(o is not None and getattr(o, 'value', 0) is not None for o in given): return
    after = max((o.end_lineno for o in params), default=node.lineno - 1) + 1
    if not any(source.comments.get(i) for i in range(after, node.body[0].lineno)): yield 'the docments do not say what comes back'

def test_every_public_name_is_documented():
    found = [f'{s.name}: {name}: {o}' for s,name,node in public() for o in faults(s, name, node, is_told_elsewhere(s, name))]
    assert not found, '\n'.join(found)

def test_the_walk_sees_all():
    "Every name that a module exports, from where it is written; and methods that are patched into a class of another module."
    assert len(sources()) > 30
    written = {name for _,name,_ in public()}
    for module in sources():
        for name in exported(module):
            o = getattr(importlib.import_module(module), name)
            if callable(o) and getattr(o, '__module__', '').startswith('fastai_l2rw'): assert name in written, (module, name)
    assert {'example_weights', 'MetaReweightCallback.__init__', 'MetaReweightCallback.item_weights', 'MetaCandidates.load', 'Scheme'} <= written

@pytest.mark.parametrize('text, expected', [
    ('def f(\n    x:int, # A number\n)->int: # Another\n    "One more."\n    return x + 1', []),
    ('def f(x:int):\n    "Print it."', ['x: no comment in a line of its own']),
    ('def f(\n    x=1, # A number\n):\n    "Print it."', ['x: no type, though it is 1 by default']),
    ('def f(\n    *args, # Numbers\n    **kwargs\n):\n    "Print them."', ['kwargs: no comment in a line of its own']),
    ('def f():\n    return', ['there is no docstring']),
    ('def f():\n    "Print"', ['the docstring is no sentence']),
    ('def f():\n    "Say it."\n    return 1', ['the docments do not say what comes back']),
    ('def f():\n    "Say it."\n    def g(): return 1\n    g()', []),
    ('def f():\n    "Say it."\n    raise ValueError', ['ValueError is raised, which the docstring does not say']),
    ('def f():\n    "Say it; raises `ValueError` today."\n    raise ValueError("no")', []),
    ('def f():\n    "Say it."\n    _g()\ndef _g(): raise OSError("no")', ['OSError is raised, which the docstring does not say']),
    ('def f():\n    "Say it."\n    try: _g()\n    except OSError: print("no")\ndef _g(): raise OSError("no")', []),
    ('def f():\n    "Say it."\n    try: _g()\n    except OSError: raise\ndef _g(): raise OSError("no")', ['OSError is raised, which the docstring does not say']),
    ('class f:\n    "A point."\n    x:int # Across\n    y:int', ['y: no comment']),
])
def test_what_is_missing_is_found(text, expected):
    source = Source(text)
    assert list(faults(source, 'f', source.defs['f'])) == expected

def test_methods_are_read_with_their_class():
    source = Source('class A:\n    "An A; raises `ValueError` for a bad one."\n    def __init__(self): self._check()\n    def _check(self): raise ValueError\n'
        '@patch\ndef run(\n    self:A,\n    x, # What\n):\n    "Run; raises `TypeError` for that."\n    self._stop()\n@patch\ndef _stop(self:A): raise KeyError')
    init,_,run,_ = source.methods('A')
    assert list(faults(source, 'A.__init__', init)) == []
    assert list(faults(source, 'A.run', run)) == ['KeyError is raised, which the docstring does not say']

# The site: nbs/_quarto.yml, nbs/sidebar.yml, and the notebooks, which nbdev_docs processes

def cells(file, kind):
    return [''.join(c['source']) for c in json.loads(file.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]

def directives(text): return set(re.findall(r'^#\|\s*(\w+)', text, flags=re.M))

def shown(file):
    "Names in the `show_doc` cells of a notebook."
    trees = [ast.parse(o) for o in cells(file, 'code') if 'show_doc(' in o and 'exec_doc' in directives(o)]
    return {ast.unparse(o) for t in trees for o in ast.walk(t) if isinstance(o, ast.Attribute)}

def test_the_site_shows_every_public_method():
    "nbdev adds exported functions, classes and patched methods by itself, and not what is in the body of a class."
    expected = {name for s,name,node in public() if '.' in name and not name.endswith('.__init__') and not patched(node) and not is_told_elsewhere(s, name)}
    assert len(expected) > 100
    assert set().union(*map(shown, notebooks)) == expected

def test_the_sidebar_has_every_notebook():
    yaml = pytest.importorskip('yaml')
    def files(o):
        if isinstance(o, str): return [o]
        return [f for x in (o if isinstance(o, list) else o['contents']) for f in files(x)]
    found = files(yaml.safe_load((root/'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar'])
    assert sorted(found) == sorted(o.relative_to(root/'nbs').as_posix() for o in notebooks)
    site = yaml.safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))
    assert {'nbdev.yml', 'sidebar.yml'} == set(site['metadata-files']) and (root/'nbs'/site['format']['html']['css']).exists()

def test_the_settings_of_the_site_agree():
    tomllib = pytest.importorskip('tomllib') # Python 3.11
    from configparser import ConfigParser
    settings = ConfigParser()
    settings.read(root/'settings.ini', encoding='utf-8')
    for name,value in tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['tool']['nbdev'].items():
        assert str(value) == settings['DEFAULT'][name], name
    site = (root/'nbs/nbdev.yml').read_text(encoding='utf-8')
    for name in ('title', 'description', 'git_url', 'doc_host', 'doc_baseurl'): assert settings['DEFAULT'][name] in site

@pytest.mark.parametrize('file', notebooks, ids=lambda o: o.stem)
def test_a_notebook_can_be_made_a_page(file):
    """For the site, nbdev runs what is exported and every other cell with an import in it, and nothing else: so such a cell can't have what
    needs the cells before it."""
    for o in cells(file, 'code'):
        if directives(o) & {'export', 'exporti', 'exports', 'eval'}: continue
        tree = ast.parse(re.sub('^[%!].*', '', o, flags=re.M))
        if not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)): continue
        known = set(vars(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        known |= {n.id for n in names if isinstance(n.ctx, ast.Store)} | {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
        known |= {n.name for n in ast.walk(tree) if isinstance(n, (*functions, ast.ClassDef))}
        imports = [a for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
        if any(a.name == '*' for a in imports): continue # it brings what nobody can tell
        known |= {(a.asname or a.name).split('.')[0] for a in imports}
        assert {n.id for n in names} <= known, o

@pytest.mark.parametrize('file', [*notebooks, *sorted(root.glob('*.md')), *sorted((root/'results').glob('*.md'))], ids=lambda o: o.relative_to(root).as_posix())
def test_links_lead_somewhere(file):
    "To a file, and to a heading in it, if one is named."
    text = '\n'.join(cells(file, 'markdown')) if file.suffix == '.ipynb' else file.read_text(encoding='utf-8')
    text = re.sub(r'^```.*?^```$|`[^`\n]*`', '`code`', text, flags=re.M | re.S)
    for target in re.findall(r'\]\(([^)\s]+)(?: "[^"]*")?\)', text):
        if re.match(r'\w+:', target): continue
        path,_,heading = target.partition('#')
        to = file.parent/path if path else file
        assert to.exists(), target
        assert to.resolve().is_relative_to(root), target
        if not heading: continue
        there = '\n'.join(cells(to, 'markdown')) if to.suffix == '.ipynb' else to.read_text(encoding='utf-8')
        slugs = {re.sub(r'[^\w\- ]', '', o.lower()).strip().replace(' ', '-') for o in re.findall(r'^#+ +(.+)$', there, flags=re.M)}
        assert heading.lower() in slugs, (target, slugs)
