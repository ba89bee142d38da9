"""Reading checkpoints: what is read, what is refused, and that nothing refused ever runs."""

import pickle
import re
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from groupmamba_mm.checkpoint import CheckpointError, load_checkpoint_file, state_dict_of
from tests.conftest import REPO, RunsCode


class Line(BaseModel):
    """The smallest model that a Runner trains."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def forward(self, inputs, mode='tensor'):
        output = self.layer(torch.stack(inputs))
        return dict(loss=output.square().mean()) if mode == 'loss' else output


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint that mmengine's own Runner saved, with everything it puts in."""
    work_dir = tmp_path_factory.mktemp('work')
    data = [dict(inputs=torch.rand(2)) for _ in range(8)]
    runner = Runner(
        Line(),
        str(work_dir),
        experiment_name='loading',
        train_dataloader=dict(
            batch_size=4,
            num_workers=0,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2),
            dict(type='CosineAnnealingLR', T_max=2, by_epoch=True),
        ],
        custom_hooks=[dict(type='EMAHook')],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        log_level='WARNING',
    )
    runner.train()
    return work_dir / 'epoch_2.pth'


def test_a_runners_checkpoint_is_read_whole(trained):
    checkpoint = load_checkpoint_file(trained)
    assert {
        'meta',
        'state_dict',
        'ema_state_dict',
        'optimizer',
        'param_schedulers',
        'message_hub',
    } <= checkpoint.keys()
    losses = checkpoint['message_hub']['log_scalars']['train/loss']
    assert isinstance(losses, HistoryBuffer)
    assert len(losses.data[0]) == 4 and np.isfinite(losses.mean())
    assert state_dict_of(checkpoint)['layer.0.weight'].shape == (2, 2)


def test_the_allow_list_ends_with_the_call(trained):
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint_file(trained)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trained, weights_only=True)


@pytest.mark.parametrize('form', ['archive', 'pickle'])
def test_code_is_refused_and_not_run(tmp_path, form):
    marker = tmp_path / 'marker'
    content = dict(state_dict=dict(weight=torch.ones(2)), extra=RunsCode(marker))
    file = tmp_path / 'evil.pth'
    if form == 'archive':
        torch.save(content, file)
    else:
        with open(file, 'wb') as stream:
            pickle.dump(content['extra'], stream, protocol=2)
    with pytest.raises(CheckpointError, match=r'needs \w+\.system') as refusal:
        load_checkpoint_file(file)
    assert str(file) in str(refusal.value) and not marker.exists()


def test_getattr_reaches_nothing_but_the_statistics(tmp_path):
    class ReachesEval:
        def __reduce__(self):
            return getattr, (HistoryBuffer, 'register_statistics')

    file = tmp_path / 'sly.pth'
    torch.save(dict(state_dict=dict(weight=torch.ones(2)), extra=ReachesEval()), file)
    with pytest.raises(CheckpointError, match='getattr.register_statistics'):
        load_checkpoint_file(file)


def test_a_foreign_class_is_named(tmp_path):
    import argparse

    file = tmp_path / 'foreign.pth'
    torch.save(dict(model=dict(weight=torch.ones(2)), args=argparse.Namespace(lr=1)), file)
    with pytest.raises(CheckpointError, match='argparse.Namespace'):
        load_checkpoint_file(file)


@pytest.mark.parametrize('kept', [0.0, 0.02, 0.5, 0.99])
def test_truncated_files_are_refused(trained, tmp_path, kept):
    content = trained.read_bytes()
    file = tmp_path / 'cut.pth'
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf'cut\.pth .*{file.stat().st_size} bytes.*again'):
        load_checkpoint_file(file)


@pytest.mark.parametrize('content', [b'no checkpoint\n', b'\x00' * 100, b'<html>Not found</html>'])
def test_files_of_noise_are_refused(tmp_path, content):
    file = tmp_path / 'other.pth'
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f'{len(content)} bytes'):
        load_checkpoint_file(file)


def test_a_missing_file_is_told_with_its_neighbours(trained):
    with pytest.raises(CheckpointError, match=r'epoch_9\.pth does not exist.*epoch_1\.pth'):
        load_checkpoint_file(trained.parent / 'epoch_9.pth')
    with pytest.raises(CheckpointError, match='nor does its folder'):
        load_checkpoint_file(trained.parent / 'nowhere' / 'epoch_9.pth')


@pytest.mark.parametrize('content', [dict(a=1), [torch.ones(1)], dict(state_dict={})])
def test_a_file_without_tensors_is_no_checkpoint(tmp_path, content):
    file = tmp_path / 'no.pth'
    torch.save(content, file)
    with pytest.raises(CheckpointError, match='is no checkpoint'):
        load_checkpoint_file(file)


def test_addresses(trained, tmp_path, monkeypatch):
    assert load_checkpoint_file(trained.as_uri()).keys() >= {'state_dict'}
    with pytest.raises(CheckpointError, match='s3://'):
        load_checkpoint_file('s3://bucket/model.pth')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    monkeypatch.setattr(
        torch.hub, 'download_url_to_file', lambda url, file, **options: shutil.copy(trained, file)
    )
    assert 'state_dict' in load_checkpoint_file('https://example.org/a/model.pth')
    assert (tmp_path / 'hub' / 'checkpoints' / 'model.pth').is_file()


def test_a_failed_download_is_told(tmp_path, monkeypatch):
    def fail(url, file, **options):
        raise OSError('no route')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    with pytest.raises(CheckpointError, match='no route'):
        load_checkpoint_file('https://example.org/model.pth')


def test_the_tensors_are_found_under_each_name():
    weights = dict(weight=torch.ones(1))
    assert state_dict_of(dict(state_dict=weights)) is weights
    assert state_dict_of(dict(model=weights, epoch=3)) is weights
    assert state_dict_of(weights) is weights


OTHER_FILES = {
    'lfs': (
        b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n',
        'Git LFS.*pull',
    ),
    'html': (b'\n<!DOCTYPE html><html></html>', 'HTML or XML page'),
    'xml': (b'\xef\xbb\xbf<?xml version="1.0"?><Error>AccessDenied</Error>', 'HTML or XML page'),
    'json': (b'{"error": "rate limit"}', 'a text in JSON'),
    'gzip': (b'\x1f\x8b' + bytes(50), 'compressed with gzip; unpack'),
    'keras': (b'\x89HDF\r\n\x1a\n' + bytes(50), 'HDF5'),
    'numpy': (b'\x93NUMPY' + bytes(50), 'an array of numpy'),
}


@pytest.mark.parametrize('kind', OTHER_FILES)
def test_other_files_are_named_for_what_they_are(tmp_path, kind):
    content, message = OTHER_FILES[kind]
    file = tmp_path / 'weights.pth'
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint_file(file)
    assert str(file) in str(error.value) and 'damaged' not in str(error.value)


def test_archives_are_named(tmp_path):
    (tmp_path / 'weights.txt').touch()
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.write(tmp_path / 'weights.txt', 'weights.txt')
    with tarfile.open(tmp_path / 'b.pth', 'w') as archive:
        archive.add(tmp_path / 'weights.txt', 'weights.txt')
    for name, kind in (('a', 'ZIP'), ('b', 'tar')):
        with pytest.raises(CheckpointError, match=f'{kind} archive of weights.txt; unpack it'):
            load_checkpoint_file(tmp_path / f'{name}.pth')


@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth'])
def test_safetensors_are_read(tmp_path, name):
    safetensors = pytest.importorskip('safetensors.torch')
    tensors = {'backbone.x': torch.arange(3.0)}
    safetensors.save_file(tensors, tmp_path / name)
    loaded = state_dict_of(load_checkpoint_file(tmp_path / name))
    assert loaded.keys() == tensors.keys() and torch.equal(loaded['backbone.x'], torch.arange(3.0))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match='truncated or damaged'):
        load_checkpoint_file(tmp_path / 'cut.safetensors')


#: What reads pickles, by file: all of it refuses code.
READERS = {
    'groupmamba_mm/analysis/results.py': 2,  # a list of what may be asked for; torch, safely
    'groupmamba_mm/checkpoint/loading.py': 1,  # torch, safely
    'groupmamba_mm/ops/precompile.py': 2,  # between a process and its own workers
}


def test_nothing_else_reads_pickles():
    """Every path to a file's contents leads through the readers that are tested for code."""
    reads = re.compile(
        r'\bpickle\.loads?\(|Unpickler\)|\btorch\.load\(|joblib|dill|weights_only=False|'
        r'load_state_dict_from_url|hub\.load\(|allow_pickle=True|mmengine\.load\(|fileio\.load\('
    )
    found = {}
    for folder in ('groupmamba_mm', 'tools'):
        for file in (REPO / folder).rglob('*.py'):
            lines = [line for line in file.read_text().splitlines() if '"""' not in line]
            count = sum(bool(reads.search(line)) for line in lines)
            if count:
                found[str(file.relative_to(REPO))] = count
    assert found == READERS
