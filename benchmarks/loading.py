"""How many images per second the loaders give, against what fastai's own factory methods give for the same files.

All loaders of a comparison are measured in turn, several times over, in one process, so that whatever else the computer
does meets all of them; the ratio is that of each turn, and the median of these is reported. Run from the repository root:

    OMP_WAIT_POLICY=PASSIVE python benchmarks/loading.py --cifar10_path path/to/cifar10 --ham10000_path path/to/HAM10000

Without OMP_WAIT_POLICY, PyTorch's threads wait for each other by spinning. On a computer with other work to do, both
sides are then many times slower, by chance more the one or the other.
"""
import json, os, platform, tempfile, time
from itertools import islice
from pathlib import Path

import fastai, numpy as np, pandas as pd, torch
from fastai.data.transforms import Normalize
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import cifar_stats
from fastai.vision.data import ImageDataLoaders
from fastcore.script import call_parse
from PIL import Image

from fastai_l2rw.data.cifar10 import ShiftFlip, cifar10_dls
from fastai_l2rw.data.ham10000 import ham10000_dls, ham10000_table, lesion_tfms

def rate(dl, batches, warm_up=3):
    "Images per second of a training loader, once it runs."
    it = iter(dl)
    for _ in range(warm_up): next(it)
    start = time.perf_counter()
    n = sum(len(x) for x,_ in islice(it, batches))
    return n/(time.perf_counter() - start)

def compare(what, repeats, batches, ours, **theirs):
    "A row per other loader: images per second, and the ratio."
    loaders,rates = dict(ours=ours, **theirs),[]
    for turn in range(repeats):
        rates.append({k: rate(dl, batches*(8 if 'CIFAR' in what and k == 'ours' else 1)) for k,dl in loaders.items()}) # ours pass so fast
        print(what, {k: round(v) for k,v in rates[-1].items()}, flush=True)
    df = pd.DataFrame(rates)
    return [dict(what=what, against=k, ours_per_s=round(df.ours.median()), theirs_per_s=round(df[k].median()),
                 ratio=round((df.ours/df[k]).median(), 2), lowest=round((df.ours/df[k]).min(), 2), highest=round((df.ours/df[k]).max(), 2)) for k in theirs]

def cifar10(path, repeats, batches):
    rows = []
    for name,tfms in (('no augmentation', list), ('shift, flip, normalise', lambda: [ShiftFlip(), Normalize.from_stats(*cifar_stats)]),
                      ('aug_transforms(), normalise', lambda: [*aug_transforms(), Normalize.from_stats(*cifar_stats)])):
        start = time.perf_counter()
        ours = cifar10_dls(path, batch_tfms=tfms())
        print(f'set up and decoded in {time.perf_counter() - start:.1f} s')
        theirs = {f'from_folder, {n} workers': ImageDataLoaders.from_folder(path, train='train', valid='test', bs=128, batch_tfms=tfms(), num_workers=n).train for n in (0, 2)}
        rows += compare(f'CIFAR-10, {name}', repeats, batches, ours.train, **theirs)
    return rows

def ham10000(path, size, what, repeats, batches):
    table = ham10000_table(path, valid_per_class=2, meta_per_class=1)
    with tempfile.TemporaryDirectory() as tmp:
        for o in table.itertuples():
            (Path(tmp)/o.label).mkdir(exist_ok=True)
            (Path(tmp)/o.label/o.path.name).symlink_to(o.path.resolve())
        ours,theirs = {},{}
        kwargs = lambda n: dict(bs=64, num_workers=n, batch_tfms=lesion_tfms())
        for n in (0, 2): ours[n] = ham10000_dls(path, size=size, valid_per_class=2, meta_per_class=1, **kwargs(n)).train
        for n in (0, 2): theirs[n] = ImageDataLoaders.from_folder(tmp, valid_pct=0.01, item_tfms=Resize(size), **kwargs(n)).train
        return [o for n in (0, 2) for o in compare(f'{what}, size={size}, {n} workers', repeats, batches, ours[n], **{f'from_folder, {n} workers': theirs[n]})]

def original_size(path, folder, n=600):
    "Some images of every kind in the size in which HAM10000 is distributed, 600 x 450."
    table = ham10000_table(path, valid_per_class=2, meta_per_class=1).groupby('label').head(n//7)
    (folder/'images').mkdir(parents=True)
    for o in table.path: Image.open(o).resize((600, 450), Image.Resampling.BICUBIC).save(folder/'images'/o.name, quality=90)
    table.rename(columns=dict(image='image_id', lesion='lesion_id', label='dx'))[['lesion_id', 'image_id', 'dx']].to_csv(folder/'HAM10000_metadata.csv', index=False)

@call_parse
def main(
    cifar10_path:str='', # Folder of CIFAR-10; default: leave it out
    ham10000_path:str='', # Folder of HAM10000; default: leave it out
    repeats:int=5, # Number of turns
    batches:int=25, # Number of batches in a turn
    out:Path=Path('results'), # Folder for the results
):
    "Compare loaders and write results/loading.json and results/loading.md."
    rows = []
    if cifar10_path: rows += cifar10(Path(cifar10_path), repeats, batches)
    if ham10000_path:
        rows += ham10000(Path(ham10000_path), 128, 'HAM10000 squeezed to 192 x 192', repeats, batches)
        with tempfile.TemporaryDirectory() as tmp:
            original_size(Path(ham10000_path), Path(tmp)/'ham')
            rows += ham10000(Path(tmp)/'ham', 224, 'HAM10000 at 600 x 450', repeats, 6)
    machine = f'{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()}), torch {torch.__version__}, fastai {fastai.__version__}, Python {platform.python_version()}'
    passive = f'OMP_WAIT_POLICY={os.environ["OMP_WAIT_POLICY"]} ' if 'OMP_WAIT_POLICY' in os.environ else ''
    out.mkdir(exist_ok=True)
    (out/'loading.json').write_text(json.dumps(dict(machine=machine, repeats=repeats, batches=batches, results=rows), indent=1) + '\n')
    head = '| loader | against | ours, images/s | theirs, images/s | ratio: median (lowest to highest) |\n|---|---|---|---|---|\n'
    body = ''.join(f"| {o['what']} | {o['against']} | {o['ours_per_s']:,} | {o['theirs_per_s']:,} | {o['ratio']} ({o['lowest']} to {o['highest']}) |\n" for o in rows)
    (out/'loading.md').write_text('# Loader throughput\n\n' + f'`{passive}python benchmarks/loading.py --cifar10_path ... --ham10000_path ... --repeats {repeats} --batches {batches}`\non {machine}, shared with other work.\n'
        'Both sides have the same transforms. All in one process, in turns.\n\n' + head + body)
    print(head + body)
