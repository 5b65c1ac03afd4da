"Make README.md from nbs/index.ipynb; with --check, only say whether the two agree."
import posixpath, re, sys
from pathlib import Path
from nbconvert import MarkdownExporter
from nbformat import read

root = Path(__file__).parent.parent

def from_top(link):
    "A link as seen from the top folder; nbs/index.ipynb sees it from nbs/."
    target = link[1]
    return f']({target})' if ':' in target or target.startswith('#') else f"]({posixpath.normpath(f'nbs/{target}')})"

def readme():
    "nbs/index.ipynb in Markdown: no hidden cells, no directives, no outputs."
    nb = read(root/'nbs/index.ipynb', as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide', c.source)]
    for c in nb.cells:
        if c.cell_type == 'code': c.source,c.outputs = re.sub(r'^#\|.*\n', '', c.source, flags=re.M),[]
        else: c.source = re.sub(r'\]\(([^)]+)\)', from_top, c.source)
    text,_ = MarkdownExporter().from_notebook_node(nb)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__':
    file = root/'README.md'
    if '--check' not in sys.argv: file.write_text(readme(), encoding='utf-8')
    elif file.read_text(encoding='utf-8') != readme(): sys.exit('README.md differs from nbs/index.ipynb: run python .ci/readme.py')
