"""Images that are whole, missing, empty, cut off or no images."""

import timeit

import cv2
import mmcv
import numpy as np
import pytest
from mmengine.registry import TRANSFORMS
from torch.utils.data import DataLoader, Dataset

from groupmamba_mm.datasets import loading
from groupmamba_mm.datasets.loading import CheckedLoadImageFromFile
from groupmamba_mm.engine.cli import explain
from groupmamba_mm.errors import DataError

IMAGE = np.random.RandomState(0).randint(0, 255, (20, 30, 3), dtype=np.uint8)


@pytest.fixture(params=['jpg', 'png', 'bmp'])
def image_file(request, tmp_path):
    file = tmp_path / f'image.{request.param}'
    cv2.imwrite(str(file), IMAGE)
    return file


def load(file, **options):
    return CheckedLoadImageFromFile(**options).transform(dict(img_path=str(file)))


def test_it_is_registered():
    assert TRANSFORMS.get('CheckedLoadImageFromFile') is CheckedLoadImageFromFile


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_whole_images_are_loaded(image_file, backend):
    results = load(image_file, imdecode_backend=backend)
    assert results['img'].shape == (20, 30, 3) and results['img'].dtype == np.uint8
    assert results['img_shape'] == results['ori_shape'] == (20, 30)
    if image_file.suffix != '.jpg':
        np.testing.assert_array_equal(results['img'], IMAGE)
    assert load(image_file, to_float32=True)['img'].dtype == np.float32


def test_a_tail_behind_the_end_is_harmless(image_file):
    image_file.write_bytes(image_file.read_bytes() + b'\x00' * 10)
    assert load(image_file)['img'].shape == (20, 30, 3)


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('content', [b'', b'no image', b'\x00' * 500])
def test_other_files_are_refused(tmp_path, content, backend):
    file = tmp_path / 'image.jpg'
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf'{file} .*{len(content)} bytes.*replace the file'):
        load(file, imdecode_backend=backend)


@pytest.mark.parametrize('kept', [0.05, 0.5, 0.99])
def test_cut_images_are_refused(image_file, kept):
    if image_file.suffix == '.bmp':
        pytest.skip('a bitmap has no mark at its end')
    content = image_file.read_bytes()
    image_file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=str(image_file)):
        load(image_file)


def test_the_check_costs_little_beside_decoding():
    content = cv2.imencode('.jpg', np.tile(IMAGE, (40, 40, 1)))[1].tobytes()
    checking, decoding = (
        min(timeit.repeat(call, number=1, repeat=5))
        for call in (lambda: loading._is_cut_off(content), lambda: mmcv.imfrombytes(content))
    )
    assert checking < decoding / 20


def test_missing_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r'none\.png does not exist'):
        load(tmp_path / 'none.png')


class Damaged(Dataset):
    def __init__(self, file):
        self.file = file

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return load(self.file)


def test_the_message_crosses_from_a_worker(tmp_path):
    file = tmp_path / 'broken.png'
    file.write_bytes(b'text')
    with pytest.raises(DataError) as error:
        list(DataLoader(Damaged(file), num_workers=1))
    assert str(error.value).splitlines()[-1].endswith('remove it from the data')
    assert explain(error.value).startswith(f'image {file} (4 bytes) cannot be decoded')
