import builtins

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from groupmamba_mm.datasets import demo_scenes
from groupmamba_mm.datasets.demo_scenes import (
    ANGLE_RANGE,
    MIN_CONTRAST,
    MIN_VISIBLE_SHARE,
    SCALE_RANGE,
    SPLITS,
    compose_scene,
    render_background,
    split_columns,
    split_digits,
)

MULTI = {'image_size': 128, 'scale_range': (0.25, 0.5)}


@pytest.fixture(scope='module')
def single():
    return {split: [compose_scene(3, split, index) for index in range(60)] for split in SPLITS}


@pytest.fixture(scope='module')
def multi():
    return [
        compose_scene(3, 'train', index, num_digits=1 + index % 6, **MULTI) for index in range(36)
    ]


def _same(first, second):
    return (
        np.array_equal(first.image, second.image)
        and first.crop == second.crop
        and len(first.instances) == len(second.instances)
        and all(
            np.array_equal(a.mask, b.mask) and a.bbox == b.bbox and a.label == b.label
            for a, b in zip(first.instances, second.instances)
        )
    )


def test_same_arguments_same_scene(single, multi):
    assert _same(single['train'][5], compose_scene(3, 'train', 5))
    assert _same(multi[5], compose_scene(3, 'train', 5, num_digits=6, **MULTI))


def test_seed_split_and_index_each_change_the_scene(single):
    scene = single['train'][5]
    assert not _same(scene, compose_scene(4, 'train', 5))
    assert not _same(scene, single['val'][5])
    assert not _same(scene, single['train'][6])


def test_image_and_mask_form(single, multi):
    for scene in single['train'] + single['val'] + multi:
        side = len(scene.image)
        assert scene.image.shape == (side, side, 3) and scene.image.dtype == np.uint8
        for digit in scene.instances:
            assert digit.mask.shape == (side, side) and digit.mask.dtype == bool
            assert digit.label in range(10)
    assert {len(scene.image) for scene in multi} == {128}
    assert [len(scene.instances) for scene in multi] == [1 + i % 6 for i in range(36)]


def test_bbox_is_tight(single, multi):
    for scene in single['val'] + multi:
        for digit in scene.instances:
            x1, y1, x2, y2 = digit.bbox
            rest = digit.mask.copy()
            rest[y1:y2, x1:x2] = False
            assert not rest.any()
            inside = digit.mask[y1:y2, x1:x2]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_scale_angle_and_contrast_keep_their_ranges(single):
    digits = [scene.instances[0] for split in SPLITS for scene in single[split]]
    for digit in digits:
        x1, y1, x2, y2 = digit.bbox
        assert max(x2 - x1, y2 - y1) == pytest.approx(digit.scale * 64, abs=2)
        assert SCALE_RANGE[0] - 0.5 / 64 <= digit.scale <= SCALE_RANGE[1] + 0.5 / 64
        assert ANGLE_RANGE[0] <= digit.angle <= ANGLE_RANGE[1]
        assert digit.contrast >= MIN_CONTRAST
    assert np.ptp([digit.scale for digit in digits]) > 0.45
    assert np.ptp([digit.angle for digit in digits]) > 40


def test_angle_turns_counter_clockwise():
    # A slim one: its main axis follows the angle.
    index = next(
        index
        for index in split_digits('train')[1]
        if demo_scenes._load_scans()[0][index].any(axis=0).sum() <= 4
    )

    def lean(angle):
        rows, columns = np.nonzero(demo_scenes._turned_glyph(index, angle, 100) >= 0.5)
        (a, b), (_, d) = np.cov(columns, -rows)
        return np.degrees(0.5 * np.arctan2(2 * b, a - d)) % 180

    assert lean(20) - lean(0) == pytest.approx(20, abs=1)


def test_ink_is_where_the_mask_says(single, multi):
    for scene in single['train'] + single['val'] + multi:
        side = len(scene.image)
        background = np.round(render_background(scene.crop, side) * 255)
        change = np.abs(scene.image - background).max(axis=2)
        union = np.any([digit.mask for digit in scene.instances], axis=0)
        # Soft edges reach a little beyond the mask, nothing else changes.
        near = binary_dilation(union, np.ones((3, 3)), iterations=round(0.06 * side) + 2)
        assert not change[~near].any()
        assert change[~union].mean() < change[union].mean() / 4
    for scene in single['train'] + single['val']:
        background = np.round(render_background(scene.crop, 64) * 255)
        luma = (scene.image - background) @ demo_scenes.LUMA_WEIGHTS
        # The blur thins the ink at the rim of the mask, so a tenth may show less.
        mask = scene.instances[0].mask
        assert (np.abs(luma[mask]) > 0.25 * MIN_CONTRAST * 255).mean() > 0.9


def test_splits_share_no_digit(single):
    train, val = ([set(map(int, indices)) for indices in split_digits(split)] for split in SPLITS)
    targets = demo_scenes._load_scans()[1]
    for label in range(10):
        assert not train[label] & val[label]
        assert train[label] | val[label] == set(map(int, np.flatnonzero(targets == label)))
        assert len(val[label]) >= 30
    for split, members in (('train', train), ('val', val)):
        for scene in single[split]:
            digit = scene.instances[0]
            assert digit.source_index in members[digit.label]


def test_splits_share_no_photo_pixel(single):
    for width in (101, 427, 640):
        train, val = (split_columns(width, split) for split in SPLITS)
        assert train[0] == 0 and train[1] == val[0] and val[1] == width
    photos = demo_scenes._load_photos()
    used = set()
    for split in SPLITS:
        for scene in single[split]:
            crop = scene.crop
            height, width = photos[crop.photo].shape[:2]
            first, end = split_columns(width, split)
            assert first <= crop.x and crop.x + crop.side <= end
            assert 0 <= crop.y and crop.y + crop.side <= height
            used.add((split, crop.photo))
    assert len(used) == 4


def test_background_reads_only_its_crop(monkeypatch, single):
    crop = single['val'][0].crop
    expected = render_background(crop, 64)
    photos = demo_scenes._load_photos()
    altered = {name: np.zeros_like(photo) for name, photo in photos.items()}
    window = np.s_[crop.y : crop.y + crop.side, crop.x : crop.x + crop.side]
    altered[crop.photo][window] = photos[crop.photo][window]
    monkeypatch.setattr(demo_scenes, '_load_photos', lambda: altered)
    assert np.array_equal(render_background(crop, 64), expected)


def test_later_digits_cover_earlier_ones(multi):
    covered = 0
    for scene in multi:
        assert np.sum([digit.mask for digit in scene.instances], axis=0).max() == 1
        for digit in scene.instances:
            visible = digit.mask.sum()
            assert MIN_VISIBLE_SHARE * digit.full_area <= visible <= digit.full_area
            covered += visible < digit.full_area
        assert scene.instances[-1].mask.sum() == scene.instances[-1].full_area
    assert covered >= 5


def test_labels_are_drawn_or_given():
    given = compose_scene(0, 'val', 0, num_digits=3, labels=[7, 7, 2], **MULTI)
    assert [digit.label for digit in given.instances] == [7, 7, 2]
    drawn = {compose_scene(0, 'val', index).instances[0].label for index in range(60)}
    assert len(drawn) >= 8


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'split': 'test'}, "split is 'test': use one of 'train', 'val'"),
        ({'seed': -1}, 'seed is -1: use 0 or more'),
        ({'index': -2}, 'index is -2: use 0 or more'),
        ({'image_size': 63}, 'image_size is 63: use 64 or more'),
        ({'num_digits': 0}, 'num_digits is 0: use 1 or more'),
        ({'labels': [1, 2]}, 'labels has 2 entries but num_digits is 1'),
        ({'labels': [10]}, 'labels contains 10: use 0 to 9'),
        ({'scale_range': (0.5, 0.4)}, r'scale_range is \(0.5, 0.4\): use two shares'),
        ({'scale_range': (0.5, 1.1)}, r'scale_range is \(0.5, 1.1\): use two shares'),
        ({'scale_range': (0.1, 0.4)}, 'scale_range starts at 0.1, .* use 0.188 or more'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compose_scene(**{'seed': 0, 'split': 'train', 'index': 0, **arguments})


def test_too_many_digits(monkeypatch):
    monkeypatch.setattr(demo_scenes, 'SCENE_ATTEMPTS', 1)
    monkeypatch.setattr(demo_scenes, 'PLACE_ATTEMPTS', 5)
    with pytest.raises(RuntimeError, match='12 digits .* ask for fewer digits or a smaller'):
        compose_scene(0, 'train', 0, num_digits=12, scale_range=(0.9, 0.9))


def test_missing_scikit_learn(monkeypatch):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == 'sklearn':
            raise ModuleNotFoundError(name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', fail)
    with pytest.raises(ImportError, match=r"pip install 'groupmamba-mm\[demo\]'"):
        demo_scenes._sklearn_datasets()
