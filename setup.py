"Take the package's metadata from settings.ini, where nbdev keeps it."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
settings = ConfigParser()
settings.read(here/'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']
licenses = {'apache2': 'Apache-2.0'}
statuses = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
pythons = cfg['min_python'],'3.11','3.12','3.13'
repo,branch = cfg['git_url'],cfg['branch']
extras = {o.removesuffix('_requirements'): cfg[o].split() for o in cfg if o.endswith('_requirements')}
extras['dev'] = extras['test'] + extras['dev']

def absolute(link):
    "A link or an image of README.md as a page elsewhere, such as PyPI's, must have it; README.md sees it from the top folder."
    image,text,target = link.groups()
    if ':' in target or target.startswith('#'): return link[0]
    place = repo.replace('github.com', 'raw.githubusercontent.com') + f'/{branch}' if image else f'{repo}/blob/{branch}'
    return f'{image}[{text}]({place}/{target})'

class BuildWithoutIndex(build_py):
    "Leave out what only nbdev in a clone reads; it would be a tenth of the wheel."
    def find_package_modules(self, package, package_dir):
        return [o for o in super().find_package_modules(package, package_dir) if o[1] != '_modidx']

blocks = re.split(r'(^```.*?^```$)', (here/'README.md').read_text(encoding='utf-8'), flags=re.M | re.S) # prose, code, prose, ...
readme = ''.join(o if i % 2 else re.sub(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)', absolute, o) for i,o in enumerate(blocks))

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license_expression=licenses[cfg['license']],
    url=repo,
    project_urls={
        'Documentation': cfg['doc_host'] + cfg['doc_baseurl'],
        'Changelog': f'{repo}/blob/{branch}/CHANGELOG.md',
        'Issues': f'{repo}/issues',
        'Paper': 'https://arxiv.org/abs/1803.09050',
    },
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        'Intended Audience :: Science/Research',
        f"Natural Language :: {cfg['language']}",
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: {o}' for o in pythons),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Topic :: Software Development :: Libraries :: Python Modules',
        'Typing :: Typed',
    ],
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data={cfg['lib_path']: ['py.typed']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    cmdclass=dict(build_py=BuildWithoutIndex),
)
