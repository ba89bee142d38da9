"""Augmentations of batches beside mmpretrain's and timm's of single images."""

from functools import partial

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.datasets import transforms as single
from PIL import Image
from timm.data import auto_augment as timm_ops

from groupmamba_mm.datasets.classification import (
    BatchRandAugment,
    BatchRandomErasing,
    BatchRandomFlip,
    batch_augment,
)
from groupmamba_mm.datasets.classification.batch_ops import look_up
from groupmamba_mm.datasets.classification.operations import OPERATIONS, Operation
from groupmamba_mm.errors import ConfigError
from tests.pictures import picture

#: Of the ImageNet recipe; the colour is red, green, blue here.
RECIPE = dict(
    policies='timm_increasing',
    num_policies=2,
    magnitude_level=9,
    magnitude_std=0.5,
    total_level=10,
    hparams=dict(pad_val=[124, 116, 104], interpolation='bicubic'),
)
FACTORS = (-0.9, -0.3, 0.4, 0.9)
POINTWISE = [
    (single.Invert, (None,)),
    (single.AutoContrast, (None,)),
    (single.Equalize, (None,)),
    (single.Posterize, (0.0, 0.3, 1.0, 2.6, 4.0)),
    (single.Solarize, (0.0, 25.6, 100.2, 256.0)),
    (single.SolarizeAdd, (0.0, 99.7, 110.0)),
    (single.Brightness, FACTORS),
    (single.Contrast, FACTORS),
    (single.ColorTransform, FACTORS),
    (single.Sharpness, FACTORS),
]
GEOMETRIC = [
    (partial(single.Shear, direction='horizontal'), (-0.3, 0.13)),
    (partial(single.Shear, direction='vertical'), (-0.3, 0.13)),
    (partial(single.Translate, direction='horizontal'), (-0.45, 0.1337)),
    (partial(single.Translate, direction='vertical'), (-0.45, 0.1337)),
    (single.Rotate, (-30.0, 13.3)),
    (partial(single.Rotate, scale=1.2, center=(20.0, 31.0)), (25.0,)),
]


@pytest.fixture(scope='module')
def images():
    """(5, H, W, 3), blue, green, red: pictures, one of low contrast, one of a single colour."""
    pictures = [picture(60, 76, seed) for seed in range(3)]
    return np.stack([*pictures, 100 + pictures[0] // 8, np.full_like(pictures[0], 77)])


def to_batch(images):
    return torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).contiguous()


def to_images(batch):
    return batch.permute(0, 2, 3, 1).numpy()[..., ::-1].astype(int)


def run(transform, images, value):
    """The operation on a batch, of which each image has the same parameters."""
    operation = OPERATIONS[type(transform)]
    values = np.full(len(images), value, dtype=np.float64)
    parameters = operation.parameters(transform, values, *images.shape[1:3])
    arguments = [torch.from_numpy(parameters.astype(np.float32))] if parameters.size else []
    batch = to_batch(images)
    result = operation.function(transform)(batch, *arguments)
    return to_images(look_up(batch, result) if operation.makes_tables else result)


def make(kind, value, **options):
    argument = OPERATIONS[getattr(kind, 'func', kind)].argument
    options.update({argument: value} if argument else {})
    for name in ('random_negative_prob',):  # not all have it
        try:
            return kind(prob=1.0, **options, **{name: 0.0})
        except TypeError:
            return kind(prob=1.0, **options)


@pytest.mark.parametrize('kind, value', [(kind, v) for kind, values in POINTWISE for v in values])
def test_pointwise_operations_are_mmpretrains(images, kind, value):
    transform = make(kind, value)
    expected = np.stack([transform(dict(img=image.copy()))['img'] for image in images])
    assert np.abs(run(transform, images, value) - expected).max() <= 1


@pytest.mark.parametrize('kind, value', [(kind, v) for kind, values in GEOMETRIC for v in values])
@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic'])
def test_geometric_operations_are_mmpretrains(images, kind, value, interpolation):
    colors = ((104, 116, 124), (124, 116, 104))
    bgr, rgb = (make(kind, value, pad_val=color, interpolation=interpolation) for color in colors)
    expected = np.stack([bgr(dict(img=image.copy()))['img'] for image in images])
    difference = np.abs(run(rgb, images, value) - expected)
    # OpenCV rounds coordinates to 1/32 of a pixel, which another neighbour may be nearest to
    if interpolation == 'nearest':
        assert (difference > 0).mean() < 0.04
    else:
        assert difference.mean() < 0.5 and difference.max() <= 12


@pytest.mark.parametrize(
    'kind, name, value, argument',
    [
        (single.Invert, 'invert', None, ()),
        (single.AutoContrast, 'auto_contrast', None, ()),
        (single.Equalize, 'equalize', None, ()),
        (single.Posterize, 'posterize', 1.0, (1,)),
        (single.Solarize, 'solarize', 26.0, (26,)),
        (single.SolarizeAdd, 'solarize_add', 99.0, (99,)),
        *[
            (kind, name, v, (1 + v,))
            for v in FACTORS
            for kind, name in (
                (single.Brightness, 'brightness'),
                (single.Contrast, 'contrast'),
                (single.ColorTransform, 'color'),
                (single.Sharpness, 'sharpness'),
            )
        ],
    ],
)
def test_pointwise_operations_are_timms(images, kind, name, value, argument):
    result = run(make(kind, value), images, value)
    expected = np.stack(
        [
            np.array(getattr(timm_ops, name)(Image.fromarray(image[..., ::-1].copy()), *argument))
            for image in images
        ]
    )[..., ::-1].astype(int)
    # at the edges Pillow does not smooth
    assert np.abs(result - expected)[:, 1:-1, 1:-1].max() <= 2


@pytest.mark.parametrize(
    'kind, name, value, argument',
    [
        (GEOMETRIC[0][0], 'shear_x', 0.2, -0.2),
        (GEOMETRIC[1][0], 'shear_y', 0.2, -0.2),
        (GEOMETRIC[2][0], 'translate_x_rel', 0.25, -0.25),
        (GEOMETRIC[3][0], 'translate_y_rel', 0.25, -0.25),
        (single.Rotate, 'rotate', 27.0, -27.0),
    ],
)
def test_geometric_operations_are_timms_but_for_the_sign(images, kind, name, value, argument):
    """The sign is drawn. Shears differ by 0.1 pixels, and the bicubic filters are two."""
    soft = np.stack([cv2.GaussianBlur(image, (0, 0), 4) for image in images])
    rgb = make(kind, value, pad_val=(124, 116, 104), interpolation='bicubic')
    options = dict(fillcolor=(124, 116, 104), resample=Image.Resampling.BICUBIC)
    expected = np.stack(
        [
            np.array(
                getattr(timm_ops, name)(
                    Image.fromarray(image[..., ::-1].copy()), argument, **options
                )
            )
            for image in soft
        ]
    )[..., ::-1].astype(int)
    difference = np.abs(run(rgb, soft, value) - expected)
    assert np.quantile(difference, 0.95) <= 2  # the rest is at the border with the colour


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, instead of what is done: the values of each single transform."""
    values = {}

    def record(transform, magnitudes, height, width):
        values.setdefault(transform, []).append(magnitudes)
        return np.empty((len(magnitudes), 0))

    for kind, operation in OPERATIONS.items():
        monkeypatch.setitem(
            OPERATIONS,
            kind,
            Operation(operation.argument, record, lambda transform: lambda images: images),
        )
    return values


@pytest.mark.parametrize('std', [0.5, 0.0, 'inf'])
def test_operations_and_magnitudes_are_drawn_as_mmpretrain_does(drawn, std):
    np.random.seed(0)
    number, augment = 60000, BatchRandAugment(**dict(RECIPE, magnitude_std=std))
    augment(torch.zeros(number, 3, 1, 1, dtype=torch.uint8))
    assert set(drawn) == set(augment.transforms) and len(drawn) == 15
    for transform, values in drawn.items():
        assert len(values) == 2  # both operations of an image
        values = np.concatenate(values)
        # each of the two is this one in 1 of 15 cases, and then half of them stay
        expected = 2 * number * 0.5 / 15
        assert abs(len(values) - expected) < 5 * expected**0.5
        if transform.magnitude_range is None:
            continue
        reference = np.array(
            [transform.random_negative(transform.random_magnitude()) for _ in range(4000)]
        )
        spread = np.ptp(transform.magnitude_range)
        assert values.min() >= -spread - 256 * (spread == 256) and np.abs(values).max() <= 256
        for quantile in (0.03, 0.2, 0.45, 0.7, 0.97):
            near = np.quantile(reference, [quantile - 0.025, quantile + 0.025])
            low, high = near + np.array([-0.01, 0.01]) * spread
            assert low <= np.quantile(values, quantile) <= high
        negative = 0.5 if transform.random_negative_prob else 0
        assert abs((values < 0).mean() - negative) < 0.05


def test_policies_of_the_users_own(drawn):
    augment = BatchRandAugment(
        policies=[
            dict(type='Rotate', angle=20.0, prob=1.0, random_negative_prob=0.0),
            dict(type='Invert', prob=0.0),
        ],
        num_policies=1,
        magnitude_level=9,
    )
    augment(torch.zeros(1000, 3, 1, 1, dtype=torch.uint8))
    ((transform, (values,)),) = drawn.items()
    assert transform.angle == 20.0 and (values == 20).all() and 400 < len(values) < 600


def test_each_image_gets_its_own_operations_and_no_other(images):
    """The batch that is augmented is one whose images are augmented apart, in two operations."""
    batch = to_batch(np.stack([images[0]] * 64))
    np.random.seed(3)
    result = BatchRandAugment(**RECIPE)(batch.clone())
    changed = (result != batch).flatten(1).any(1)
    # of two operations each is left out in half of the cases; some change little
    assert 30 <= changed.sum() <= 62
    assert len(result[changed].flatten(1).unique(dim=0)) > 0.8 * changed.sum()
    np.random.seed(3)
    assert torch.equal(BatchRandAugment(**RECIPE)(batch.clone()), result)


def test_what_cannot_run_on_batches_is_refused():
    with pytest.raises(ConfigError, match='BatchRandAugment has no Cutout, only .*Rotate'):
        BatchRandAugment([dict(type='Cutout', shape=3)], num_policies=1, magnitude_level=9)
    with pytest.raises(ConfigError, match=r"Rotate: interpolation must be .* got 'lanczos'"):
        BatchRandAugment(
            [dict(type='Rotate', angle=3.0)],
            num_policies=1,
            magnitude_level=9,
            hparams=dict(interpolation='lanczos'),
        )


@pytest.mark.parametrize('direction, dim', [('horizontal', 3), ('vertical', 2)])
def test_half_of_the_images_are_flipped(images, direction, dim):
    batch = to_batch(np.stack([images[0]] * 400))
    result = BatchRandomFlip(direction=direction)(batch)
    flipped = (result == batch.flip(dim)).flatten(1).all(1)
    assert 150 < flipped.sum() < 250
    assert torch.equal(result[~flipped], batch[~flipped])


def test_flips_refuse_other_arguments():
    with pytest.raises(ValueError, match='prob must be from 0 to 1, got 2'):
        BatchRandomFlip(2)
    with pytest.raises(ValueError, match="direction must be .* got 'diagonal'"):
        BatchRandomFlip(direction='diagonal')


ERASING = dict(erase_prob=0.25, min_area_ratio=0.02, max_area_ratio=1 / 3)


def erased_areas(images):
    """Share of the images that have an area, and of those height, width, top and left."""
    boxes = []
    for image in images:
        rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
        if len(rows):
            assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            boxes.append((np.ptp(rows) + 1, np.ptp(columns) + 1, rows[0], columns[0]))
    return len(boxes) / len(images), np.array(boxes)


def test_erased_areas_are_drawn_as_mmpretrain_does():
    np.random.seed(0)
    number, size, options = 6000, (30, 40), dict(ERASING, mode='const', fill_color=(1, 1, 1))
    transform = single.RandomErasing(**options)
    reference = np.stack(
        [transform(dict(img=np.zeros((*size, 3), np.uint8)))['img'][..., 0] for _ in range(number)]
    )
    batch = torch.zeros(number, 3, *size, dtype=torch.uint8)
    areas = erased_areas(BatchRandomErasing(**options)(batch)[:, 0].numpy())
    expected = erased_areas(reference)
    assert abs(areas[0] - expected[0]) < 0.03
    for measure, other in zip(areas[1].T, expected[1].T):
        np.testing.assert_allclose(
            np.quantile(measure, [0.1, 0.3, 0.5, 0.7, 0.9]),
            np.quantile(other, [0.1, 0.3, 0.5, 0.7, 0.9]),
            atol=1.1,
        )


@pytest.mark.parametrize(
    'fill',
    [
        dict(mode='const', fill_color=(10, 20, 30)),
        dict(mode='rand', fill_color=(120.0, 110.0, 100.0), fill_std=(60.0, 50.0, 40.0)),
        dict(mode='rand'),
    ],
)
def test_erased_areas_are_filled_as_mmpretrain_does(fill):
    torch.manual_seed(0), np.random.seed(0)
    options = dict(fill, erase_prob=1.0, min_area_ratio=1.0, max_area_ratio=1.0, aspect_range=1.0)
    filled = BatchRandomErasing(**options)(torch.zeros(2, 3, 90, 90, dtype=torch.uint8))
    expected = single.RandomErasing(**options)(dict(img=np.zeros((90, 90, 3), np.uint8)))['img']
    levels = [0.02, 0.25, 0.5, 0.75, 0.98]
    for channel in range(3):
        np.testing.assert_allclose(
            np.quantile(filled[:, channel], levels),
            np.quantile(expected[..., channel], levels),
            atol=4,
        )
    if fill['mode'] == 'rand':
        assert not torch.equal(filled[0], filled[1])


def test_nothing_waits_for_the_device(monkeypatch, images):
    """All that is drawn goes to the device at once, and no result is asked for."""
    copies = []
    copy = batch_augment._to_device
    monkeypatch.setattr(batch_augment, '_to_device', lambda *args: copies.append(1) or copy(*args))
    for name in ('item', 'tolist', 'nonzero', 'cpu', '__bool__'):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, **kwargs: pytest.fail('a result'))
    batch = to_batch(np.stack([images[0]] * 64))
    for augment in (BatchRandomFlip(), BatchRandAugment(**RECIPE), BatchRandomErasing(**ERASING)):
        batch = augment(batch)
    assert len(copies) <= 1 + 2 * 2 + 2
