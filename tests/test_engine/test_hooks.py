"""What testing writes: label images with the folders of their pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from groupmamba_mm.engine.hooks import WriteLabelsHook, relative_name


@pytest.mark.parametrize('reduced', [False, True])
def test_label_images_of_one_name_in_several_folders(tmp_path, reduced):
    root = tmp_path / 'images'
    dataset = SimpleNamespace(data_prefix=dict(img_path=str(root)))
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset))
    hook = WriteLabelsHook(str(tmp_path / 'out'))
    for label, folder in enumerate(('a', 'b', 'a/deep', '')):
        sample = SegDataSample(
            metainfo=dict(img_path=str(root / folder / 'x.jpg'), reduce_zero_label=reduced),
            pred_sem_seg=PixelData(data=torch.full((1, 4, 6), label)),
        )
        hook.after_test_iter(runner, 0, outputs=[sample])
    for label, folder in enumerate(('a', 'b', 'a/deep', '')):
        written = np.asarray(Image.open(tmp_path / 'out' / folder / 'x.png'))
        assert written.shape == (4, 6) and (written == label + reduced).all()


def test_images_outside_of_the_folders_keep_their_names():
    assert relative_name('/a/b/c.png', ['/x', '/a']) == 'b/c.png'
    assert relative_name('/a/b/c.png', ['/x']) == 'c.png'
