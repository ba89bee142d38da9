"""Resizing by torch beside Pillow's."""

import cv2
import numpy as np
import pytest
from mmengine.registry import TRANSFORMS
from mmpretrain.datasets import transforms

from groupmamba_mm.datasets.classification import (
    AntialiasedRandomResizedCrop,
    AntialiasedResizeEdge,
)
from groupmamba_mm.datasets.classification.resizing import resize_antialiased
from tests.pictures import picture


def assert_alike(image, reference):
    difference = np.abs(image.astype(int) - reference)
    assert image.shape == reference.shape and image.dtype == np.uint8
    # two roundings differ in their order
    assert (difference <= 1).mean() > 0.999 and difference.max() <= 8 and difference.mean() < 0.3


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [(375, 500), (120, 100), (224, 223), (700, 90)])
def test_crops_are_those_of_pillow(size, interpolation):
    image = picture(*size)
    new = AntialiasedRandomResizedCrop(224, interpolation=interpolation)
    old = transforms.RandomResizedCrop(224, interpolation=interpolation, backend='pillow')
    for seed in range(3):
        np.random.seed(seed)
        results = new(dict(img=image.copy()))
        np.random.seed(seed)
        expected = old(dict(img=image.copy()))
        assert_alike(results['img'], expected['img'])
        assert results['img_shape'] == expected['img_shape'] == (224, 224, 3)


@pytest.mark.parametrize('edge', ['short', 'long', 'width', 'height'])
@pytest.mark.parametrize('size', [(375, 500), (333, 251)])
def test_edges_are_those_of_pillow(size, edge):
    results, expected = (
        transform(dict(img=picture(*size)))
        for transform in (
            AntialiasedResizeEdge(256, edge),
            transforms.ResizeEdge(256, edge, backend='pillow', interpolation='bicubic'),
        )
    )
    assert_alike(results.pop('img'), expected.pop('img'))
    assert results == expected


def test_the_filter_widens():
    """Where OpenCV's would skip pixels."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    resized = resize_antialiased(stripes, (16, 16))
    assert np.abs(resized.astype(int) - 64).max() < 40
    skipped = cv2.resize(stripes, (16, 16), interpolation=cv2.INTER_CUBIC)
    assert np.abs(skipped.astype(int) - 64).max() >= 60


@pytest.mark.parametrize('transform', ['AntialiasedRandomResizedCrop', 'AntialiasedResizeEdge'])
def test_other_interpolations_and_images_are_refused(transform):
    with pytest.raises(ValueError, match="one of .*'bicubic'.*got 'lanczos'"):
        TRANSFORMS.build(dict(type=transform, scale=32, interpolation='lanczos'))
    built = TRANSFORMS.build(dict(type=transform, scale=32))
    with pytest.raises(ValueError, match='must be uint8 .* got float32'):
        built(dict(img=picture(40, 50).astype(np.float32)))
