"""tools/train.py and tools/test.py as a user runs them, on images made here.

Every start imports torch and mmpretrain again, so there are few of them and each shows several
things; what needs no process of its own is tested in tests/test_engine.
"""

import json
import os
import pickle
import re
import runpy
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.datasets import CustomDataset

from groupmamba_mm.checkpoint import load_checkpoint_file
from tests.conftest import RunsCode
from tests.recording_hooks import digest

REPO = Path(__file__).resolve().parents[2]
TRAIN, TEST = str(REPO / 'tools' / 'train.py'), str(REPO / 'tools' / 'test.py')
FIRST = 'work_dirs/tiny/epoch_1.pth'

CONFIG = """
custom_imports = dict(imports=['groupmamba_mm.datasets.loading'], allow_failed_imports=False)
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet', depth=18, stem_channels=4, base_channels=4, norm_cfg=dict(type='BN')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=2, in_channels=32, topk=(1, ),
        loss=dict(type='CrossEntropyLoss')))
data_preprocessor = dict(num_classes=2, mean=[127.0] * 3, std=[60.0] * 3, to_rgb=True)
pipeline = [dict(type='CheckedLoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root='data', data_prefix='train', pipeline=pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='data', data_prefix='val', pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
optim_wrapper = dict(
    type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False),
    optimizer=dict(type='AdamW', lr=1e-3))
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
randomness = dict(seed=0)
"""

#: A student of the model that the config above trained.
STUDENT = """
_base_ = ['./tiny.py']
custom_imports = dict(
    imports=['groupmamba_mm.datasets.loading', 'groupmamba_mm.distillation',
             'tests.recording_hooks'], allow_failed_imports=False)
model = dict(
    type='DistilledClassifier', head=dict(type='DistilledLinearClsHead'),
    teacher=dict(type='ConfigTeacher', config='tiny.py', checkpoint='work_dirs/tiny/epoch_1.pth'),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)]))
custom_hooks = [
    dict(type='EMAHook', momentum=0.1, update_buffers=True, evaluate_on_origin=True),
    dict(type='TeacherHashHook'), dict(type='ThreadNamesHook')]
"""


def run(*command, cwd, **variables):
    """Run a command on the CPU and return its code, its output and its last line."""
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(REPO), **variables)
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = done.stdout.strip().splitlines()
    return done.returncode, done.stdout, lines[-1] if lines else ''


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def write_images(folder):
    random = np.random.RandomState(0)
    for split, number in (('train', 4), ('val', 2)):
        for name, level in (('dark', 50), ('light', 200)):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                image = level + random.randint(-40, 40, (16, 16, 3))
                cv2.imwrite(str(folder / split / name / f'{index}.png'), image.astype(np.uint8))


def call(tool, name, *arguments, options=(), config='tiny.py'):
    """Run a command inside this process, which spares its imports, and return its exit code."""
    # mmengine keeps its loggers by the experiment's name and the second.
    options = ['--cfg-options', f'experiment_name={name}', *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [tool, config, *arguments, *options])
        try:
            runpy.run_path(tool, run_name='__main__')
        except SystemExit as ended:
            return ended.code
    return 0


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a config and data, outside of the checkout."""
    folder = tmp_path_factory.mktemp('place')
    write_images(folder / 'data')
    (folder / 'tiny.py').write_text(CONFIG)
    (folder / 'student.py').write_text(STUDENT)
    return folder


@pytest.fixture(scope='module')
def trained(place):
    """The output of a first training in work_dirs/tiny."""
    code, output, _ = run(sys.executable, TRAIN, 'tiny.py', cwd=place)
    assert code == 0, output
    return place, output


def losses(work_dir):
    """Read every training loss that a work directory's runs logged, in order."""
    records = []
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        records += [json.loads(line) for line in log.read_text().splitlines()]
    return [record['loss'] for record in records if 'loss' in record]


def test_training_writes_a_checkpoint_and_says_that_it_is_fp32(trained):
    place, output = trained
    assert (place / 'work_dirs' / 'tiny' / 'epoch_1.pth').is_file()
    assert output.count('No GPU: training in fp32') == 1
    assert 'accuracy/top1' in output
    assert np.isfinite(losses(place / 'work_dirs' / 'tiny')).all()


def test_resuming_continues(trained, monkeypatch):
    place, _ = trained
    monkeypatch.chdir(place)
    work_dir = place / 'resumed'
    shutil.copytree(place / 'work_dirs' / 'tiny', work_dir)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    assert (
        call(
            TRAIN,
            'resuming',
            '--work-dir',
            'resumed',
            '--resume',
            '--no-validate',
            options=['train_cfg.max_epochs=2'],
        )
        == 0
    )
    output = max(work_dir.glob('*/*.log')).read_text()
    assert 'resumed epoch: 1, iter: 2' in output and "100% of the model's elements" in output
    assert (work_dir / 'epoch_2.pth').is_file() and 'Epoch(val)' not in output


def test_testing_prints_and_writes(trained):
    place, _ = trained
    code, output, _ = run(
        sys.executable,
        TEST,
        'tiny.py',
        FIRST,
        '--work-dir',
        'tested',
        '--out',
        'out.pkl',
        '--show-dir',
        'painted',
        '--tta',
        '--amp',
        cwd=place,
    )
    assert code == 0, output
    assert re.search(r'accuracy/top1: [\d.]+', output)
    assert len(pickle.loads((place / 'out.pkl').read_bytes())) == 4
    painted = sorted(
        str(file.relative_to(place / 'painted')) for file in (place / 'painted').rglob('*.png')
    )
    assert painted == ['dark/0.png', 'dark/1.png', 'light/0.png', 'light/1.png']


def test_a_broken_image_ends_with_one_line(trained):
    place, _ = trained
    before = (place / FIRST).read_bytes()
    shutil.copytree(place / 'data', place / 'broken')
    (place / 'broken' / 'train' / 'dark' / '0.png').write_bytes(b'text')
    code, output, last = run(
        sys.executable,
        TRAIN,
        'tiny.py',
        '--cfg-options',
        'train_dataloader.dataset.data_root=broken',
        'train_dataloader.num_workers=1',
        cwd=place,
    )
    assert code == 1 and 'Traceback' not in output, output
    assert re.search(r'^error: image broken/train/dark/0\.png \(4 bytes\) cannot be decoded', last)
    assert (place / FIRST).read_bytes() == before


BROKEN = {
    # The tool, its arguments, its --cfg-options, and what the last line must say.
    'option': (TRAIN, [], ['optim_wraper.lr=1'], 'did you mean optim_wrapper'),
    'type': (TRAIN, [], ['model.backbone.type=ResNett'], 'ResNet.*custom_imports'),
    'argument': (TRAIN, [], ['model.backbone.dept=18'], 'ResNet takes no .*depth'),
    'data': (
        TRAIN,
        [],
        ['val_dataloader.dataset.data_root=nowhere'],
        'data folder nowhere of the val data',
    ),
    'truncated': (TRAIN, ['--resume', 'cut.pth'], [], r'cut\.pth is truncated'),
    'missing': (TEST, ['nowhere.pth'], [], r'nowhere\.pth does not exist'),
    'other_model': (
        TEST,
        [FIRST],
        ['model.backbone.base_channels=8', 'model.head.in_channels=64'],
        r'does not fit.*layer1\.0\.conv1\.weight \(4x4x3x3 .*8x4x3x3',
    ),
    'other_head': (
        TEST,
        [FIRST],
        ['model.head.num_classes=3'],
        r'model\.head\.num_classes is 3, and the test data have 2 class folders',
    ),
    'out': (TEST, [FIRST, '--out', 'out.json'], [], r'ends in \.pkl'),
    'metric': (TEST, [FIRST], ['test_evaluator.topk=[5]'], 'first batch of the test fails .*Top-5'),
    'evil_test': (TEST, ['evil.pth'], [], r'evil\.pth was not loaded: .*system.*could run code'),
    'evil_resume': (TRAIN, ['--resume', 'evil.pth'], [], 'could run code'),
    'evil_init': (
        TRAIN,
        [],
        ['model.head.init_cfg.type=Pretrained', 'model.head.init_cfg.checkpoint=evil.pth'],
        'could run code',
    ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_what_is_broken_ends_with_one_line(trained, case, monkeypatch, capsys):
    place, _ = trained
    monkeypatch.chdir(place)
    before = (place / FIRST).read_bytes()
    (place / 'cut.pth').write_bytes(before[: len(before) // 2])
    torch.save(dict(load_checkpoint_file(place / FIRST), extra=RunsCode('ran')), 'evil.pth')
    tool, arguments, options, message = BROKEN[case]
    assert call(tool, case, *arguments, options=options) == 1
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert last.startswith('error: ') and re.search(message, last), last
    assert ('Traceback' in shown.err) == (case in ('type', 'argument', 'metric'))
    assert (place / FIRST).read_bytes() == before and 'accuracy' not in shown.out
    assert not (place / 'ran').exists()


@pytest.mark.parametrize('launcher', ['dist', pytest.param('slurm', marks=pytest.mark.slow)])
def test_two_processes_train_on_cpus(place, tmp_path, launcher):
    """With SyncBN in the config, as mmseg's bases have it, and fewer batches for each process."""
    options = ['--cfg-options', 'model.backbone.norm_cfg.type=SyncBN']
    port = dict(PORT=free_port())
    if launcher == 'dist':
        command = [
            'bash',
            str(REPO / 'tools' / 'dist_train.sh'),
            'tiny.py',
            '2',
            '--work-dir',
            'dist',
        ]
    else:
        port.update(fake_srun(tmp_path), GPUS='2', GPUS_PER_NODE='0', CPUS_PER_TASK='1')
        command = ['bash', str(REPO / 'tools' / 'slurm_train.sh'), 'cpu', 'job', 'tiny.py', 'slurm']
    code, output, _ = run(*command, *options, cwd=place, **port)
    assert code == 0, output
    assert 'SyncBatchNorm needs GPUs' in output
    assert (place / launcher / 'epoch_1.pth').is_file()
    # 8 images in batches of 4 on each of two processes make one step.
    found = losses(place / launcher)
    assert len(found) == 1 and np.isfinite(found).all()
    if launcher == 'slurm':
        assert '--gres' not in (tmp_path / 'srun_arguments').read_text()


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher(trained, monkeypatch):
    place, _ = trained
    monkeypatch.chdir(place)
    code, output, _ = run(
        'bash',
        str(REPO / 'tools' / 'dist_train.sh'),
        'student.py',
        '2',
        '--work-dir',
        'student',
        cwd=place,
        PORT=free_port(),
    )
    assert code == 0, output
    assert 'loss_label' in output and 'loss_teacher' in output
    # the averaged weights' accuracy and the raw ones'
    logged = ''.join(log.read_text() for log in place.glob('student/*/vis_data/scalars.json'))
    assert '"accuracy/top1"' in logged and '"accuracy/top1_origin"' in logged
    hashes = {(place / 'student' / f'teacher_hash_{rank}.txt').read_text() for rank in (0, 1)}
    assert len(hashes) == 1
    before, after = hashes.pop().split()
    assert before == after
    # threads of gloo that outlive the command can abort the process
    for rank in (0, 1) if sys.platform == 'linux' else ():
        in_training, at_end = (place / 'student' / f'threads_{rank}.txt').read_text().split('\n')
        assert 'gloo' in in_training and 'gloo' not in at_end
    trained_teacher = torch.nn.Module()
    trained_teacher.state_dict = lambda: load_checkpoint_file(place / FIRST)['state_dict']
    assert before == digest(trained_teacher)

    saved = load_checkpoint_file(place / 'student' / 'epoch_1.pth')
    plain = load_checkpoint_file(place / FIRST)
    for part in ('state_dict', 'ema_state_dict'):
        assert saved[part].keys() == plain[part].keys()
    assert len(saved['optimizer']['state']) == len(plain['optimizer']['state'])
    # nor is a teacher needed to test what it taught
    (place / FIRST).rename(place / 'hidden.pth')
    try:
        for config in ('student.py', 'tiny.py'):
            assert call(TEST, f'test_{config[:-3]}', 'student/epoch_1.pth', config=config) == 0
        assert call(TRAIN, 'no_teacher', config='student.py') == 1
    finally:
        (place / 'hidden.pth').rename(place / FIRST)


def test_a_missing_teacher_is_told_before_the_data_are_read(trained, monkeypatch, capsys):
    place, _ = trained
    monkeypatch.chdir(place)
    monkeypatch.setattr(CustomDataset, 'full_init', lambda self: pytest.fail('the data were read'))
    assert (
        call(TRAIN, 'gone', config='student.py', options=['model.teacher.checkpoint=gone.pth']) == 1
    )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(
        r'error: model\.teacher\.checkpoint: gone\.pth does not exist;.*teacher\.checkpoint=', last
    )


def fake_srun(folder):
    """Make an srun that starts two tasks here, as Slurm would set them up on one machine."""
    srun = folder / 'srun'
    srun.write_text(f"""#!/usr/bin/env bash
echo "$@" > {folder}/srun_arguments
while [[ $1 == -* ]]; do
    if [ "$1" = -p ]; then shift; fi
    shift
done
export SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_TASKS_PER_NODE=2 SLURM_NODELIST=localhost
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
wait $!
""")
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    return dict(PATH=f'{folder}:{os.environ["PATH"]}')


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_launchers_without_arguments_say_how_to_use_them(tmp_path, script):
    code, output, _ = run('bash', str(REPO / 'tools' / f'{script}.sh'), cwd=tmp_path)
    assert code == 2 and 'usage: ' in output
