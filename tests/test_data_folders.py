"Images and tables of any kind."
import gzip, os, sys, tracemalloc
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import TensorImage
from fastai.vision.core import PILImage
from PIL import Image

from fastai_l2rw.data import folders
from fastai_l2rw.data.folders import OpenRGB, check_images, image_files, image_problems, labels_from_csv, only_usable, open_rgb, read_table
from fastai_l2rw.data.ham10000 import verify

noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
grey = noise[..., 0]

@pytest.mark.parametrize('image, expected', [
    (Image.fromarray(noise), noise),
    (Image.fromarray(grey), grey),
    (Image.fromarray(grey.astype(np.uint16)*257), grey),
    (Image.fromarray(grey.astype(np.int32)), grey),
    (Image.fromarray(grey.astype(np.float32)/255), grey),
    (Image.fromarray(noise).convert('RGBA'), noise),
    (Image.fromarray(noise).convert('CMYK'), noise),
    (Image.fromarray(grey > 100), (grey > 100)*np.uint8(255)),
    (Image.fromarray(np.zeros((20, 30), np.uint16)), 0*grey),
])
def test_images_of_any_kind_keep_their_content(image, expected, tmp_path):
    if expected.ndim == 2: expected = np.stack([expected]*3, -1)
    image.save(tmp_path/'x.tif')
    for o in (image, tmp_path/'x.tif', str(tmp_path/'x.tif'), (tmp_path/'x.tif').read_bytes()):
        opened = open_rgb(o)
        assert type(opened) is PILImage and opened.mode == 'RGB' and np.array_equal(np.asarray(opened), expected)

@pytest.mark.parametrize('o', [TensorImage(torch.tensor(noise).permute(2, 0, 1)), noise, PILImage.create(noise)])
def test_images_that_are_no_files(o): assert OpenRGB()(o).mode == 'RGB'

def test_large_jpegs_are_decoded_small(tmp_path):
    Image.fromarray(noise).resize((900, 600)).save(tmp_path/'x.jpg')
    assert [OpenRGB(o)(tmp_path/'x.jpg').size for o in (None, 600, 300, 224, 75, 10)] == [(900, 600), (900, 600), (450, 300), (450, 300), (113, 75), (113, 75)]

@pytest.mark.parametrize('ext', ['jpg', 'png', 'gif', 'tif', 'bmp', 'webp'])
def test_cut_off_images_are_found_by_the_quick_check_too(tmp_path, ext, monkeypatch):
    file = tmp_path/f'x.{ext}'
    Image.fromarray(noise).resize((200, 150)).save(file)
    assert all(ok for decode in (False, True) for _,ok in image_problems(file, decode))
    whole = file.read_bytes()
    for share in (0.2, 0.6):
        file.write_bytes(whole[:int(share*len(whole))])
        assert [[ok for _,ok in image_problems(file, decode)] for decode in (False, True)] == [[False]]*2
        with pytest.raises(ValueError, match=f'x.{ext} can.t be read'): open_rgb(file)

def test_bytes_after_the_end_do_no_harm(tmp_path):
    "Some cameras append data of their own."
    Image.fromarray(noise).save(tmp_path/'x.jpg')
    with open(tmp_path/'x.jpg', 'ab') as f: f.write(b'trailer'*100)
    assert image_problems(tmp_path/'x.jpg', decode=False) == []

def test_files_are_found_in_the_same_order_whoever_wrote_them(tmp_path):
    names = ['b/2.jpg', 'b/10.PNG', 'a/x y.jpeg', 'ä.gif', 'c/d/e/1.bmp']
    for i,order in enumerate((names, names[::-1])):
        for o in order:
            (tmp_path/str(i)/o).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/str(i)/o).touch()
    first,second = [[o.relative_to(tmp_path/str(i)).as_posix() for o in image_files(tmp_path/str(i))] for i in (0, 1)]
    assert first == second == ['a/x y.jpeg', 'b/10.PNG', 'b/2.jpg', 'c/d/e/1.bmp', 'ä.gif']
    assert len(check_images(image_files(tmp_path/'0'))) == 5

def test_labels_by_path(tmp_path):
    items = [Path('data/train/cat/1.jpg'), Path('data/train/dog/1.jpg')]
    for text in ('path,label\ntrain/cat/1.png,a\ntrain/dog/1.png,b\n', 'label;path\r\na;cat\\1\r\nb;.\\dog\\1\r\n', 'path,label\ncat/1,a\ndog/1,b\ndog/1,b\n'):
        (tmp_path/'l.csv').write_text(text)
        assert labels_from_csv(tmp_path/'l.csv', items).tolist() == ['a', 'b']
    (tmp_path/'l.csv').write_text('path,label\n1.jpg,a\n1.jpg,b\n')
    with pytest.raises(ValueError, match='different labels for 1 items: 1'): labels_from_csv(tmp_path/'l.csv', items)
    (tmp_path/'l.csv').write_text('path,label\ncat/1.jpg,a\ndog/1.jpg,\n')
    with pytest.raises(ValueError, match='no label for 1 of 2 items: data/train/dog/1.jpg'): labels_from_csv(tmp_path/'l.csv', items)

def test_tables_keep_names_as_they_are(tmp_path):
    (tmp_path/'t.csv').write_text('id,note\n007,"a, b"\nNA,None\n1e5,\n')
    df = read_table(tmp_path/'t.csv')
    assert df.id.tolist() == ['007', 'NA', '1e5'] and df.note.tolist()[:2] == ['a, b', 'None'] and pd.isna(df.note[2])

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no pipes')
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'x.png')
    assert image_problems(tmp_path/'x.png') == [('it is no file, but a pipe, a device or the like', False)]
    for o in (tmp_path/'x.png', str(tmp_path/'x.png')):
        with pytest.raises(ValueError, match="x.png can't be read: it is no file, but a pipe"): open_rgb(o)
    (tmp_path/'link.png').symlink_to('/dev/zero')
    with pytest.raises(ValueError, match="link.png can't be read: it is no file"): open_rgb(tmp_path/'link.png')

@pytest.mark.skipif(sys.platform in ('win32', 'darwin'), reason='file names are text there')
@pytest.mark.parametrize('names', [[b'a\\b.png', b'c.png'], [b'\xe4.png', 'ä.png'.encode(), b'\xff\xfe.png'], [b' x.png', b'y .png', b'z, "q".png'],
    [b'd\\e.png', b'd/e.png']])
def test_lists_of_files_with_odd_names(tmp_path, names):
    "What is saved can be read back: backslashes, bytes that are no UTF-8, spaces, commas and quotes."
    folder = tmp_path/'images'
    for o in names:
        file = folder/os.fsdecode(o)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(file, format='png')
    files = image_files(folder)
    (folder/'broken.png').write_bytes(b'x')
    problems = verify(folder, save=tmp_path/'usable.csv', progress=False)
    assert problems.item.tolist() == [folder/'broken.png']
    assert only_usable(image_files(folder), folder, tmp_path/'usable.csv') == files and len(files) == len(names)

def test_lists_from_elsewhere(tmp_path):
    "With backslashes between folders, as Windows has them, and in the encoding of an old spreadsheet."
    for o in ('a/x.png', 'a/ä.png'):
        (tmp_path/'i'/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'i'/o).touch()
    (tmp_path/'l.csv').write_bytes('item\na\\x.png\na\\ä.png\n'.encode('latin-1'))
    files = image_files(tmp_path/'i')
    assert only_usable(files, tmp_path/'i', tmp_path/'l.csv') == files and len(files) == 2

def test_large_tables_are_read_in_pieces(tmp_path, monkeypatch):
    "A packed table does not take many times its size in memory, and one that is too large to be meant is refused."
    lines = (f'HAM_{i:07},ISIC_{i:07},nv,histo,45.0\n' for i in range(120_000))
    with gzip.open(tmp_path/'t.gz', 'wt', compresslevel=1) as f: size = f.write('lesion_id,image_id,dx,dx_type,age\n' + ''.join(lines))
    tracemalloc.start()
    df = read_table(tmp_path/'t.gz', ['dx'])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(df) == 120_000 and df.image_id[119_999] == 'ISIC_0119999' and peak < 7*size
    monkeypatch.setattr(folders, '_largest_table', 2**20)
    with pytest.raises(ValueError, match="can't be read as a table: it has more than 1 MB, unpacked, which is too large to be meant"):
        read_table(tmp_path/'t.gz')

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'latin-1'])
@pytest.mark.parametrize('at', [0, 2**20 - 6, 2**20 - 5, 2**20 - 4])
def test_encodings_of_tables(tmp_path, encoding, at):
    "Also where a letter of two bytes is at the end of a piece."
    text = 'a,b\n' + ('x'*(at - 5) + ',\n' if at else '') + 'ä,ö\n'
    (tmp_path/'t.csv').write_bytes(text.encode(encoding))
    assert read_table(tmp_path/'t.csv').iloc[-1].tolist() == ['ä', 'ö']
    with open(tmp_path/'t.gz', 'wb') as f: f.write(gzip.compress(text.encode(encoding), 1)[:-4])
    with pytest.raises(ValueError, match="can't be read as a table"): read_table(tmp_path/'t.gz') # cut off
