"""The emoji data: which hands, which classes, the same pictures again, and what npm lacks."""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest

from groupmamba_mm.errors import DataError
from tests.conftest import load_tool

HANDS = ('google', 'twitter', 'facebook')
COLOURS = dict(google=(255, 0, 0), twitter=(0, 255, 0), facebook=(0, 0, 255))  # RGB
NAMES = ('cat', 'dog', 'tree', 'only_google', 'flag')


def add(archive, name, content):
    member = tarfile.TarInfo(f'package/{name}')
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def tool():
    return load_tool('dataset_converters/make_emoji_data.py')


@pytest.fixture
def cache(tmp_path):
    write_packages(tmp_path / 'npm')
    return tmp_path / 'npm'


def write_packages(folder):
    """Packages of drawings that are a square of their hand's colour."""
    folder.mkdir()
    known = [
        dict(
            image=f'{name}.png',
            short_name=name,
            sort_order=number,
            category='Flags' if name == 'flag' else 'Objects',
            **{f'has_img_{hand}': name != 'only_google' or hand == 'google' for hand in HANDS},
        )
        for number, name in enumerate(NAMES)
    ]
    for hand in HANDS:
        drawing = np.zeros((64, 64, 4), np.uint8)
        drawing[8:56, 8:56] = (*COLOURS[hand][::-1], 255)
        content = cv2.imencode('.png', drawing)[1].tobytes()
        with tarfile.open(folder / f'emoji-datasource-{hand}-1.0.0.tgz', 'w:gz') as archive:
            add(archive, 'emoji.json', json.dumps(known).encode())
            for name in NAMES:
                add(archive, f'img/{hand}/64/{name}.png', content)


def options(cache, out, *more):
    few = ['--num-classes', '3', '--num-train', '6', '--num-val', '3', '--image-size', '48']
    return [str(out), '--cache', str(cache), *few, *more]


def test_training_and_validation_are_of_other_hands(tool, cache, tmp_path):
    out = tmp_path / 'emoji'
    tool.main(options(cache, out))
    names = ['0000_cat', '0001_dog', '0002_tree']
    for split, number, hands in (('train', 6, HANDS[:2]), ('val', 3, HANDS[2:])):
        assert sorted(path.name for path in (out / split).iterdir()) == names
        pictures = sorted((out / split).rglob('*.jpg'))
        assert len(pictures) == number
        for path in pictures:
            image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB).astype(int)
            assert image.shape == (48, 48, 3)
            seen = {
                hand
                for hand in HANDS
                if (np.abs(image - COLOURS[hand]).max(axis=2) < 60).sum() > 100
            }
            assert seen and seen <= set(hands), path
    assert (out / 'preview.jpg').stat().st_size > 1000


def test_the_same_arguments_give_the_same_pictures(tool, cache, tmp_path, capsys):
    for name, workers in (('one', '1'), ('two', '2')):
        tool.main(options(cache, tmp_path / name, '--workers', workers))
    for path in (tmp_path / 'one').rglob('*.jpg'):
        other = tmp_path / 'two' / path.relative_to(tmp_path / 'one')
        assert path.read_bytes() == other.read_bytes()
    before = (tmp_path / 'one/meta.json').stat().st_mtime_ns
    tool.main(options(cache, tmp_path / 'one'))
    assert 'already there' in capsys.readouterr().out
    assert (tmp_path / 'one/meta.json').stat().st_mtime_ns == before
    with pytest.raises(DataError, match='made otherwise; choose another OUT, or pass --overwrite'):
        tool.main(options(cache, tmp_path / 'one', '--seed', '1'))
    tool.main(options(cache, tmp_path / 'one', '--seed', '1', '--overwrite'))


def test_an_interrupted_run_can_be_run_again(tool, cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tool, 'preview', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tool.main(options(cache, tmp_path / 'emoji'))
    assert not (tmp_path / 'emoji').exists()
    tool.main(options(cache, tmp_path / 'emoji'))
    assert (tmp_path / 'emoji/meta.json').exists() and not (tmp_path / 'emoji.partial').exists()


def test_what_is_no_data_set_stays(tool, cache, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.tex').write_text('')
    with pytest.raises(DataError, match='something else; choose another OUT$'):
        tool.main(options(cache, tmp_path / 'mine', '--overwrite'))
    assert (tmp_path / 'mine/thesis.tex').exists()


def test_more_classes_than_all_hands_have_drawn(tool, cache, tmp_path):
    with pytest.raises(DataError, match='--num-classes is 4, and 3 emoji have drawings of all'):
        tool.main(options(cache, tmp_path / 'emoji', '--num-classes', '4'))


def test_without_npm_it_says_what_to_do(tool, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    said = 'npm brings emoji-datasource-google, and is not installed: install it, or put its .tgz'
    with pytest.raises(DataError, match=said):
        tool.main(options(tmp_path / 'npm', tmp_path / 'emoji'))
    npm = tmp_path / 'npm_bin/npm'
    npm.parent.mkdir()
    npm.write_text('#!/bin/sh\necho no route to host >&2\nexit 1\n')
    npm.chmod(0o755)
    monkeypatch.setenv('PATH', f'{npm.parent}:/bin')
    with pytest.raises(DataError, match=r'does not bring .*\(no route to host\): mend the network'):
        tool.main(options(tmp_path / 'npm', tmp_path / 'emoji'))
