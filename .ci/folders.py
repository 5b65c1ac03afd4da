"Write small folders of random images in the layouts of CIFAR-10 and HAM10000, to try the commands on: python .ci/folders.py FOLDER"
import sys
from pathlib import Path
import numpy as np, pandas as pd
from PIL import Image

def photo(rng, size): return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))

def cifar10(path, rng, n_train=20, n_test=4):
    "Folders of a split and a class."
    for split,n in (('train', n_train), ('test', n_test)):
        for c in 'airplane automobile bird cat deer dog frog horse ship truck'.split():
            (path/split/c).mkdir(parents=True)
            for i in range(n): photo(rng, (32, 32)).save(path/split/c/f'{i}.png')

def ham10000(path, rng, lesions=8):
    "A folder of photographs and a table; each lesion is in two of them."
    (path/'HAM10000_images_part_1').mkdir(parents=True)
    kinds = [k for k in 'akiec bcc bkl df mel nv vasc'.split() for _ in range(lesions)]
    table = pd.DataFrame(dict(lesion_id=[f'HAM_{i:07}' for i in range(len(kinds))], dx=kinds)).loc[lambda o: o.index.repeat(2)]
    table.insert(1, 'image_id', [f'ISIC_{i:07}' for i in range(len(table))])
    for o in table.image_id: photo(rng, (36, 48)).save(path/'HAM10000_images_part_1'/f'{o}.jpg')
    table.to_csv(path/'HAM10000_metadata.csv', index=False)

if __name__ == '__main__':
    rng = np.random.default_rng(0)
    cifar10(Path(sys.argv[1])/'cifar10', rng)
    ham10000(Path(sys.argv[1])/'ham10000', rng)
