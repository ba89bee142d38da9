import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from tests.conftest import load_tool

SCRIPT = Path(__file__).resolve().parents[2] / 'tools/dataset_converters/make_demo_data.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool('dataset_converters/make_demo_data.py')


def _hashes(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob('*')) if path.is_file()}


def _small(tool, out, **changes):
    return tool.make_cls(out, **{'num_train': 30, 'num_val': 20, 'skip_baseline': True,
                                 **changes})


def test_layout(tool, tmp_path):
    _small(tool, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['cls']
    cls = tmp_path / 'cls'
    assert sorted(path.name for path in cls.iterdir()) == [
        'meta.json', 'preview.png', 'train', 'val']
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
    compose = tool.compose_scene

    def interrupt(seed, split, index, *args, **kwargs):
        if split == 'val':
            raise KeyboardInterrupt
        return compose(seed, split, index, *args, **kwargs)

    monkeypatch.setattr(tool, 'compose_scene', interrupt)
    with pytest.raises(KeyboardInterrupt):
        _small(tool, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_baseline_is_far_from_solving_it(tool, tmp_path, capsys, monkeypatch):
    # All of them take too long for a test.
    monkeypatch.setattr(tool, 'BASELINE_VARIANTS',
                        (('grey', 16, 0.01), ('grey', 32, 0.001)))
    counts = {'num_train': 400, 'num_val': 200}
    assert _small(tool, tmp_path, **counts)['baseline'] is None
    before = _hashes(tmp_path)
    # Measured later on, it is added to the pictures that are there.
    baseline = _small(tool, tmp_path, skip_baseline=False, **counts)['baseline']
    out = capsys.readouterr().out
    assert 0.1 < baseline['best']['accuracy'] < 0.6
    assert baseline['best']['accuracy'] == max(
        item['accuracy'] for item in baseline['variants'])
    assert f'{baseline["best"]["accuracy"]:.1%} of the validation pictures' in out
    after = _hashes(tmp_path)
    assert json.loads((tmp_path / 'cls/meta.json').read_text())['baseline'] == baseline
    assert {name for name in after if after[name] != before[name]} == {'cls/meta.json'}


@pytest.mark.parametrize('arguments, message', [
    (['--num-train', '0'], 'argument --num-train: 0 is too small: use 1 or more'),
    (['--num-val', '-5'], 'argument --num-val: -5 is too small: use 1 or more'),
    (['--num-val', 'many'], "argument --num-val: 'many' is not a whole number: use 1 or more"),
    (['--image-size', '63'], 'argument --image-size: 63 is too small: use 64 or more'),
    (['--seed', '-1'], 'argument --seed: -1 is too small: use 0 or more'),
])
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
    command = [sys.executable, str(SCRIPT), 'out', '--num-train', '10', '--num-val', '10',
               '--skip-baseline']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Wrote 10 training and 10 validation pictures' in done.stdout
    assert len(done.stderr.splitlines()) < 10


def test_refusal_is_one_line(tool, tmp_path):
    _small(tool, tmp_path)
    with pytest.raises(SystemExit, match=r'^error: .*--overwrite to replace it$'):
        tool.main([str(tmp_path), '--skip-baseline'])
