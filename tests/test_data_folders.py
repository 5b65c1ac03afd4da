"Images and tables of any kind."
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import TensorImage
from fastai.vision.core import PILImage
from PIL import Image

from fastai_l2rw.data.folders import OpenRGB, check_images, image_files, image_problems, labels_from_csv, open_rgb, read_table

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
