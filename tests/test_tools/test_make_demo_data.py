import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from PIL import Image

from groupmamba_mm.datasets.demo_scenes import compose_scene
from tests.conftest import load_tool

SCRIPT = Path(__file__).resolve().parents[2] / 'tools/dataset_converters/make_demo_data.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool('dataset_converters/make_demo_data.py')


def _hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def _small(tool, out, **changes):
    return tool.make_cls(out, **{'num_train': 30, 'num_val': 20, 'skip_baseline': True, **changes})


def test_layout(tool, tmp_path):
    _small(tool, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['cls']
    cls = tmp_path / 'cls'
    assert sorted(path.name for path in cls.iterdir()) == [
        'meta.json',
        'preview.png',
        'train',
        'val',
    ]
    for split, count in (('train', 3), ('val', 2)):
        folders = sorted((cls / split).iterdir())
        assert [path.name for path in folders] == list(tool.CLASS_FOLDERS)
        for folder in folders:
            pictures = list(folder.iterdir())
            assert len(pictures) == count
            assert all(cv2.imread(str(path)).shape == (64, 64, 3) for path in pictures)
    meta = json.loads((cls / 'meta.json').read_text())
    assert meta['arguments'] == {'seed': 0, 'num_train': 30, 'num_val': 20, 'image_size': 64}
    assert meta['baseline'] is None


def test_image_size(tool, tmp_path):
    _small(tool, tmp_path, num_train=10, num_val=1, image_size=80)
    picture = tmp_path / 'cls/val/0_zero/000000.png'
    assert cv2.imread(str(picture)).shape == (80, 80, 3)


def test_same_seed_same_bytes(tool, tmp_path):
    for name, changes in (('a', {}), ('b', {}), ('c', {'seed': 1})):
        _small(tool, tmp_path / name, **changes)
    first, second, other = (_hashes(tmp_path / name) for name in 'abc')
    assert first == second
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_more_pictures_leave_the_first_as_they_are(tool, tmp_path):
    _small(tool, tmp_path / 'a')
    _small(tool, tmp_path / 'b', num_train=45, num_val=25)
    few, many = (_hashes(tmp_path / name) for name in 'ab')
    pictures = [name for name in few if Path(name).parts[1] in ('train', 'val')]
    assert len(pictures) == 50
    assert all(few[name] == many[name] for name in pictures)


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_several_processes_write_the_same_bytes(tool, tmp_path, task):
    # one more than two tasks of a process
    counts = ['--num-train', str(2 * tool.PICTURES_PER_TASK + 1), '--num-val', '5']
    for workers in ('1', '2'):
        tool.main(
            [
                str(tmp_path / workers),
                '--task',
                task,
                '--skip-baseline',
                *counts,
                '--workers',
                workers,
            ]
        )
    assert _hashes(tmp_path / '1') == _hashes(tmp_path / '2')


def test_an_error_in_a_worker_ends_the_run(tool, tmp_path):
    arguments = {'seed': 0, 'num_train': 2 * tool.PICTURES_PER_TASK, 'image_size': 64}
    with pytest.raises(tool.DataError, match='train/0_zero/000000.png could not be written'):
        list(tool._written(tool.write_digit, tmp_path / 'missing', 'train', arguments, workers=2))


def test_rerun_leaves_the_data_alone(tool, tmp_path, capsys):
    _small(tool, tmp_path)
    before = _hashes(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    for changes in ({}, {'overwrite': True}):
        _small(tool, tmp_path, **changes)
        assert 'already there, made with the same arguments' in capsys.readouterr().out
    assert _hashes(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == times


def test_other_arguments_need_overwrite(tool, tmp_path):
    _small(tool, tmp_path)
    before = _hashes(tmp_path)
    with pytest.raises(tool.DataError, match='seed=0, .*asked for is seed=7, .*--overwrite'):
        _small(tool, tmp_path, seed=7)
    assert _hashes(tmp_path) == before
    _small(tool, tmp_path, seed=7, overwrite=True)
    _small(tool, tmp_path / 'direct', seed=7)
    assert _hashes(tmp_path / 'cls') == _hashes(tmp_path / 'direct/cls')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['cls', 'direct']


def test_other_version_needs_overwrite(tool, tmp_path, monkeypatch):
    _small(tool, tmp_path)
    monkeypatch.setattr(tool, 'VERSION', 99)
    with pytest.raises(tool.DataError, match=r'version \d+\), .*version 99\): .*--overwrite'):
        _small(tool, tmp_path)


def test_missing_pictures_are_noticed(tool, tmp_path):
    _small(tool, tmp_path)
    (tmp_path / 'cls/val/0_zero/000000.png').unlink()
    with pytest.raises(tool.DataError, match='19 pictures in val, but should have 20.*overwrite'):
        _small(tool, tmp_path)
    _small(tool, tmp_path, overwrite=True)
    assert (tmp_path / 'cls/val/0_zero/000000.png').is_file()


@pytest.mark.parametrize('overwrite', [False, True])
def test_foreign_files_are_never_touched(tool, tmp_path, overwrite):
    note = tmp_path / 'cls/note.txt'
    note.parent.mkdir()
    note.write_text('mine')
    with pytest.raises(tool.DataError, match='was not made by this tool: choose another OUT'):
        _small(tool, tmp_path, overwrite=overwrite)
    assert list(_hashes(tmp_path)) == ['cls/note.txt']


def test_neighbours_are_left_alone(tool, tmp_path):
    note = tmp_path / 'det/note.txt'
    note.parent.mkdir()
    note.write_text('mine')
    (tmp_path / 'cls').mkdir()
    _small(tool, tmp_path)
    assert note.read_text() == 'mine'


def test_interrupted_run_leaves_nothing(tool, tmp_path, monkeypatch):
    write = tool.write_digit

    def interrupt(index, folder, split, **kwargs):
        if split == 'val':
            raise KeyboardInterrupt
        write(index, folder, split, **kwargs)

    monkeypatch.setattr(tool, 'write_digit', interrupt)
    with pytest.raises(KeyboardInterrupt):
        _small(tool, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_baseline_is_far_from_solving_it(tool, tmp_path, capsys, monkeypatch):
    # All of them take too long for a test.
    monkeypatch.setattr(tool, 'BASELINE_VARIANTS', (('grey', 16, 0.01), ('grey', 32, 0.001)))
    counts = {'num_train': 400, 'num_val': 200}
    assert _small(tool, tmp_path, **counts)['baseline'] is None
    before = _hashes(tmp_path)
    # Measured later on, it is added to the pictures that are there.
    baseline = _small(tool, tmp_path, skip_baseline=False, **counts)['baseline']
    out = capsys.readouterr().out
    assert 0.1 < baseline['best']['accuracy'] < 0.6
    assert baseline['best']['accuracy'] == max(item['accuracy'] for item in baseline['variants'])
    assert f'{baseline["best"]["accuracy"]:.1%} of the validation pictures' in out
    after = _hashes(tmp_path)
    assert json.loads((tmp_path / 'cls/meta.json').read_text())['baseline'] == baseline
    assert {name for name in after if after[name] != before[name]} == {'cls/meta.json'}


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--num-train', '0'], 'argument --num-train: 0 is too small: use 1 or more'),
        (['--num-val', '-5'], 'argument --num-val: -5 is too small: use 1 or more'),
        (['--num-val', 'many'], "argument --num-val: 'many' is not a whole number: use 1 or more"),
        (['--image-size', '63'], 'argument --image-size: 63 is too small: use 64 or more'),
        (['--seed', '-1'], 'argument --seed: -1 is too small: use 0 or more'),
    ],
)
def test_bad_arguments(tool, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        tool.main([str(tmp_path), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_picture_has_no_baseline(tool, tmp_path):
    with pytest.raises(tool.DataError, match='num_train is 1, .*--skip-baseline'):
        _small(tool, tmp_path, num_train=1, skip_baseline=False)
    _small(tool, tmp_path, num_train=1, num_val=1)


def test_out_is_a_file(tool, tmp_path):
    path = tmp_path / 'file'
    path.write_text('mine')
    with pytest.raises(SystemExit, match='file is not a folder: choose another OUT'):
        tool.main([str(path)])


def test_command_line(tmp_path):
    # From another folder, as a checkout that is not installed.
    command = [
        sys.executable,
        str(SCRIPT),
        'out',
        '--num-train',
        '10',
        '--num-val',
        '10',
        '--skip-baseline',
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Wrote 10 training and 10 validation pictures' in done.stdout
    assert len(done.stderr.splitlines()) < 10


def test_refusal_is_one_line(tool, tmp_path):
    _small(tool, tmp_path)
    with pytest.raises(SystemExit, match=r'^error: .*--overwrite to replace it$'):
        tool.main([str(tmp_path), '--skip-baseline'])


SCENES = {'num_train': 12, 'num_val': 7}


def test_coco_scenes_are_the_digits_visible_pixels(tool, tmp_path):
    from pycocotools import mask as coco_mask

    meta = tool.make_scenes(tmp_path, 'det', **SCENES)
    assert [path.name for path in tmp_path.iterdir()] == ['det']
    assert meta['arguments'] == {'seed': 0, 'image_size': 128, **SCENES}
    for split, count in (('train', 12), ('val', 7)):
        content = json.loads((tmp_path / f'det/annotations/instances_{split}.json').read_text())
        assert [image['id'] for image in content['images']] == list(range(1, count + 1))
        assert [c['name'] for c in content['categories']] == list(tool.CLASSES)
        assert len({a['id'] for a in content['annotations']}) == len(content['annotations'])
        for image in content['images']:
            scene = compose_scene(
                0,
                split,
                image['id'] - 1,
                128,
                num_digits=1 + (image['id'] - 1) % 6,
                scale_range=(0.25, 0.5),
            )
            picture = cv2.imread(str(tmp_path / 'det' / split / image['file_name']))
            assert (picture[..., ::-1] == scene.image).all()
            assert (image['height'], image['width']) == picture.shape[:2]
            found = [a for a in content['annotations'] if a['image_id'] == image['id']]
            masks = [coco_mask.decode(a['segmentation']).astype(bool) for a in found]
            assert sum(mask.astype(int) for mask in masks).max() == 1  # none overlap
            for annotation, mask, digit in zip(found, masks, scene.instances, strict=True):
                assert (mask == digit.mask).all()
                assert annotation['area'] == mask.sum()
                assert annotation['category_id'] == digit.label + 1
                x, y, width, height = annotation['bbox']
                assert mask[y : y + height, x : x + width].sum() == mask.sum()


def test_label_maps_are_the_same_scenes_with_a_palette(tool, tmp_path):
    tool.make_scenes(tmp_path, 'seg', **SCENES)
    tool.make_scenes(tmp_path, 'det', **SCENES)
    for split, count in (('train', 12), ('val', 7)):
        files = sorted((tmp_path / 'seg/annotations' / split).iterdir())
        assert len(files) == count
        for index, file in enumerate(files):
            name = file.name
            assert (tmp_path / 'seg/images' / split / name).read_bytes() == (
                tmp_path / 'det' / split / name
            ).read_bytes()
            scene = compose_scene(
                0, split, index, 128, num_digits=1 + index % 6, scale_range=(0.25, 0.5)
            )
            with Image.open(file) as picture:
                assert picture.mode == 'P'
                assert tuple(picture.getpalette()[:33]) == sum(tool.SEG_PALETTE, ())
                labels = tool.np.asarray(picture)
            for digit in scene.instances:
                assert (labels[digit.mask] == digit.label + 1).all()
            assert (labels > 0).sum() == sum(digit.mask.sum() for digit in scene.instances)


@pytest.mark.parametrize(
    'task, gone, message',
    [
        ('det', 'annotations/instances_val.json', 'has no instances_val.json'),
        ('det', 'train/000001.png', '11 pictures in train, but should have 12'),
        ('seg', 'annotations/val/000000.png', '6 label maps in val, but should have 7'),
    ],
)
def test_missing_parts_of_scenes_are_noticed(tool, tmp_path, task, gone, message):
    tool.make_scenes(tmp_path, task, **SCENES)
    (tmp_path / task / gone).unlink()
    with pytest.raises(tool.DataError, match=message):
        tool.make_scenes(tmp_path, task, **SCENES)
    tool.make_scenes(tmp_path, task, overwrite=True, **SCENES)
    assert (tmp_path / task / gone).is_file()


def test_only_the_tasks_asked_for_are_written(tool, tmp_path, capsys):
    few = ['--num-train', '4', '--num-val', '3', '--skip-baseline']
    tool.main([str(tmp_path / 'a'), '--task', 'seg', *few])
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['seg']
    tool.main([str(tmp_path / 'b'), '--task', 'all', *few])
    assert sorted(path.name for path in (tmp_path / 'b').iterdir()) == ['cls', 'det', 'seg']
    sizes = {
        task: json.loads((tmp_path / 'b' / task / 'meta.json').read_text())['arguments']
        for task in tool.TASKS
    }
    assert [sizes[task]['image_size'] for task in ('cls', 'det', 'seg')] == [64, 128, 128]
    assert {arguments['num_train'] for arguments in sizes.values()} == {4}


def test_configs_have_the_classes_and_colours_of_the_data(tool):
    from mmengine.config import Config

    for task, classes, palette in (
        ('det', tool.CLASSES, tool.SEG_PALETTE[1:]),
        ('seg', ('background', *tool.CLASSES), tool.SEG_PALETTE),
    ):
        cfg = Config.fromfile(str(SCRIPT.parents[2] / f'configs/_base_/datasets/demo_{task}.py'))
        assert cfg.metainfo.classes == classes
        assert tuple(cfg.metainfo.palette) == tuple(palette)
