"""The benchmark of a training: what it makes, what it reads, and a run from end to end."""

import json
import os
import re
import subprocess
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from groupmamba_mm.analysis import training_benchmark, training_clock
from groupmamba_mm.analysis.training_benchmark import (
    Contestant,
    PartError,
    Plan,
    make_data,
    make_tables,
    measure,
    peers_of,
    prepare,
    read_log,
)
from groupmamba_mm.analysis.training_clock import PHASES, TrainingClockHook
from groupmamba_mm.datasets import benchmark_data
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError
from tests.conftest import REPO, load_tool

DEMO = str(REPO / 'configs/demo/groupmamba-pico_demo-cls.py')
IMAGENET = str(REPO / 'configs/groupmamba/groupmamba-official-tiny_8xb128_in1k.py')
DISTILLED = str(REPO / 'configs/demo/groupmamba-official-pico-distill_demo-cls.py')
COCO = str(REPO / 'configs/mask_rcnn/mask-rcnn_groupmamba-official-tiny_fpn_1x_coco.py')
ADE = str(REPO / 'configs/upernet/groupmamba-official-tiny_upernet_8xb2-160k_ade20k-512x512.py')
TOOL = 'analysis_tools/benchmark_training.py'


def plan_of(tmp_path, **changes):
    return Plan(
        **{**dict(parts=('loader',), out=tmp_path, warmup=1, iterations=2, timeout=200), **changes}
    )


# Data


def test_pictures_have_the_bytes_of_photographs():
    rng = np.random.default_rng(0)
    pictures = [benchmark_data.paint((500, 375), rng) for _ in range(8)]
    assert all(picture.shape == (375, 500, 3) and picture.dtype == np.uint8 for picture in pictures)
    quality = [cv2.IMWRITE_JPEG_QUALITY, benchmark_data._JPEG_QUALITY]
    sizes = [len(cv2.imencode('.jpg', picture, quality)[1]) for picture in pictures]
    assert 50e3 < np.mean(sizes) < 70e3  # ImageNet's about 60 KB at this size
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize('path', [DEMO, IMAGENET, COCO, ADE])
def test_data_that_are_made_are_a_configs_data(tmp_path, path, monkeypatch):
    """The config's own loader reads them."""
    monkeypatch.setattr(benchmark_data, 'default_threads', lambda: 1)
    cfg = load_config(path)
    if path == IMAGENET:  # a thousand folders take their time
        cfg.model.head.num_classes = 4
    make_data(cfg, tmp_path, images=6)
    loader = cfg.train_dataloader
    loader.update(batch_size=3, num_workers=0, persistent_workers=False)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        batch = next(iter(Runner.build_dataloader(loader, seed=0)))
    assert len(batch['inputs']) == 3
    (root,) = tmp_path.iterdir()
    before = {file: file.stat().st_mtime_ns for file in root.rglob('*.*')}
    make_data(
        load_config(path, {'model.head.num_classes': 4} if path == IMAGENET else None),
        tmp_path,
        images=6,
    )
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob('*.*')}
    pictures = [
        cv2.imread(str(file)) for file in before if file.suffix.lower() in ('.jpg', '.jpeg')
    ]
    assert len(pictures) >= 6 and all(picture.shape[2] == 3 for picture in pictures)
    if path == COCO:
        file = json.loads((root / 'annotations/instances.json').read_text())
        assert len(file['categories']) == 80 and 3 <= len(file['annotations']) / 6 < 12
    if path == ADE:
        for file in (root / 'images').iterdir():
            labels = cv2.imread(
                str(root / 'annotations' / f'{file.stem}.png'), cv2.IMREAD_UNCHANGED
            )
            assert labels.shape == cv2.imread(str(file)).shape[:2] and labels.max() <= 150


def test_data_that_were_not_finished_are_made_again(tmp_path, monkeypatch):
    made = []

    def fails_once(root, *args):
        root.mkdir(exist_ok=True)
        made.append(root)
        if len(made) == 1:
            raise OSError('disk full')

    monkeypatch.setattr(benchmark_data, 'make_classification', fails_once)
    with pytest.raises(OSError):
        make_data(load_config(DEMO), tmp_path, 6)
    for _ in range(2):
        make_data(load_config(DEMO), tmp_path, 6)
    assert len(made) == 2


# Configs


def test_no_weights_are_read_and_the_recipe_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(training_benchmark, 'make_data', lambda *args: None)
    cfg, before = load_config(COCO), load_config(COCO)
    prepare(cfg, 'name', plan_of(tmp_path, batch=3, workers=0), None, 10)
    assert 'Pretrained' not in cfg.pretty_text
    assert cfg.optim_wrapper == before.optim_wrapper
    assert cfg.param_scheduler == before.param_scheduler
    loader = cfg.train_dataloader
    assert (loader.batch_size, loader.num_workers) == (3, 0)
    assert loader.dataset.dataset.pipeline == before.train_dataloader.dataset.pipeline
    # enough for all iterations without another epoch
    assert loader.dataset.times * 10 >= 3 * 3
    assert cfg.val_dataloader is None and cfg.get('custom_hooks') == before.get('custom_hooks')


def test_a_teacher_gets_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(training_benchmark, 'make_data', lambda *args: None)
    cfg = load_config(DISTILLED)
    prepare(cfg, 'name', plan_of(tmp_path), None, 10)
    assert torch.load(cfg.model.teacher.checkpoint, weights_only=True)


def test_peers_train_on_the_same_data_with_the_same_runner():
    loader, swin = peers_of(load_config(IMAGENET), 'name')
    assert loader.only_loader and loader.name == 'timm loader'
    own = load_config(IMAGENET)
    assert swin.cfg.model.backbone.type == 'SwinTransformer'
    for key in ('optim_wrapper', 'train_dataloader', 'custom_hooks', 'param_scheduler'):
        assert swin.cfg[key] == own[key], key
    assert swin.cfg.model.train_cfg == own.model.train_cfg
    for path, name in ((COCO, 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco'), (ADE, 'swin-tiny-patch4')):
        (peer,) = peers_of(load_config(path), 'name')
        assert peer.name.startswith(name) and peer.cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert (
            peer.cfg.train_dataloader.dataset.type
            == load_config(path).train_dataloader.dataset.type
        )
    (peer,) = peers_of(load_config(COCO), 'mask-rcnn_groupmamba_ms-crop-3x')
    assert peer.name == 'mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco'


# Measuring


class Ticks:
    """A clock that goes on by what each mark says."""

    on_gpu = False

    def __init__(self, durations):
        self.now, self.durations = 0.0, iter(durations)

    def mark(self):
        self.now += next(self.durations)
        return self.now

    def milliseconds(self, start, end):
        return end - start

    def wait(self):
        pass


def test_phases_of_an_iteration_are_told_apart(tmp_path):
    out = tmp_path / 'clock.json'
    hook = TrainingClockHook(str(out), warmup=1, iterations=2)
    wrapper = SimpleNamespace(
        scale_loss=lambda loss: loss, backward=lambda loss: None, step=lambda: None
    )
    runner = SimpleNamespace(optim_wrapper=wrapper, iter=0)
    # data, forward, backward, optimizer, hooks
    hook.clock = Ticks([1, 2, 3, 4, 5] * 2 + [3, 4, 5, 6, 7])
    hook.before_train(runner)
    with pytest.raises(SystemExit):
        for runner.iter in range(9):
            hook.before_train_iter(runner, runner.iter)
            assert wrapper.scale_loss(7) == 7
            wrapper.backward(7)
            wrapper.step()
            hook.after_train_iter(runner, runner.iter)
    assert runner.iter == 2
    result = json.loads(out.read_text())
    assert result['phases'] == dict(zip(PHASES, [2.0, 3.0, 4.0, 5.0, 6.0]))


def test_the_log_is_read_behind_the_warm_up(tmp_path):
    folder = tmp_path / 'x' / 'vis_data'
    folder.mkdir(parents=True)
    records = [dict(iter=step, time=step / 10, loss=1.0) for step in range(10, 60, 10)]
    lines = [json.dumps(record) for record in [*records, {'accuracy/top1': 3.0, 'iter': 50}]]
    (folder / 'scalars.json').write_text('\n'.join(lines))
    # the line of iteration 30 averages over 21 to 30
    assert [record['iter'] for record in read_log(tmp_path, 20)] == [30, 40, 50]
    assert [record['iter'] for record in read_log(tmp_path, 25)] == [40, 50]


def contestant():
    cfg = Config(dict(train_dataloader=dict(batch_size=4)))
    return Contestant('model', 'ours', cfg)


def test_what_fails_is_noted_and_the_rest_measured(tmp_path, monkeypatch):
    def fails(*args):
        raise PartError('no memory')

    monkeypatch.setattr(
        training_benchmark,
        '_MEASURES',
        dict(
            loader=lambda *args: dict(loader_img_s=5.0),
            step=fails,
            run=lambda contestant, plan, gpus: dict(run_img_s=7.0 * gpus),
        ),
    )
    rows = measure(contestant(), plan_of(tmp_path, parts=('loader', 'step', 'run'), gpus=(1, 2)))
    assert [row.get('loader_img_s') for row in rows] == [5.0, None]
    assert [row['run_img_s'] for row in rows] == [7.0, 14.0]
    assert all(row['note'] == 'step: no memory' for row in rows)
    table = make_tables(rows)
    assert '| model | 2 | 4 | - | - | 14 |' in table and 'step: no memory' in table


def test_a_part_that_hangs_or_fails_is_ended_with_all_its_processes(tmp_path):
    # as torchrun's processes are
    child = (
        'import subprocess, sys, time; '
        'subprocess.Popen(["sleep", "77.77"], start_new_session=True); '
    )
    with pytest.raises(PartError, match='not done in 3 s; give a longer --timeout'):
        training_benchmark._run(
            ['-c', f'{child} time.sleep(60)'], 1, plan_of(tmp_path, timeout=3), {}
        )
    with pytest.raises(PartError, match='exit code 1: ValueError: too small'):
        training_benchmark._run(['-c', 'raise ValueError("too small")'], 1, plan_of(tmp_path), {})
    end = time.monotonic() + 20  # a killed process is gone a little later
    while (
        'sleep 77.77'
        in subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout
    ):
        assert time.monotonic() < end


def test_memory_of_all_processes_is_seen(tmp_path):
    program = (
        'import os, time; os.fork() or os.setsid(); '
        'block = bytearray(os.urandom(1)) * (200 * 2**20); time.sleep(4); os._exit(0)'
    )
    peak = training_benchmark._run(['-c', program], 1, plan_of(tmp_path), {})
    assert 0.4 < peak < 0.6


# From end to end


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    """Without the start, which is the same run with empty caches, and without peers, for time."""
    out = tmp_path / 'out'
    tool = load_tool(TOOL)
    before = dict(os.environ)
    os.environ['OMP_NUM_THREADS'] = '1'
    try:
        tool.main(
            [
                DEMO,
                '--parts',
                'loader',
                'step',
                'run',
                '--batch',
                '2',
                '--workers',
                '1',
                '--images',
                '20',
                '--warmup',
                '20',
                '--iterations',
                '5',
                '--out',
                str(out),
                '--cfg-options',
                'train_cfg.max_epochs=1',  # which would end it after ten iterations
            ]
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
    output = capsys.readouterr().out
    assert 'groupmamba-pico_demo-cls, 1 process(es): run' in output
    (row,) = json.loads((out / 'results.json').read_text())['rows']
    assert row['note'] == '' and row['batch'] == 2
    for key in ('loader_img_s', 'step_img_s', 'run_img_s', 'host_gb'):
        assert row[key] > 0, key
    # the phases make up the iteration that the runner logs: a mean beside a median, of five
    # iterations on a machine that does other work too
    assert 1 / 3 < sum(row['phases_ms'].values()) / row['run_ms'] < 3
    assert re.search(r'\| groupmamba-pico_demo-cls \| 1 \| 2 \|', (out / 'results.md').read_text())


def test_timms_loader_reads_the_same_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_data, 'default_threads', lambda: 1)
    cfg = load_config(DEMO)
    prepare(cfg, 'name', plan_of(tmp_path, batch=2, workers=0), None, 10)
    from groupmamba_mm.analysis.training_parts import measure_timm_loader

    assert measure_timm_loader(cfg, 1, 3)['loader_img_s'] > 0
    # what Pillow 13 refuses: no bit left
    from PIL import Image
    from timm.data import auto_augment

    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        auto_augment.NAME_TO_OP[name](Image.new('RGB', (4, 4)), 0)


def test_what_cannot_be_meant_is_refused(tmp_path, capsys, monkeypatch):
    tool = load_tool(TOOL)
    with pytest.raises(SystemExit):
        tool.main([DEMO, '--warmup', str(training_clock.STARTED - 1)])
    assert '--warmup: at least 20' in capsys.readouterr().err
    with pytest.raises(ConfigError, match='--data-root is one folder, .* of mmdet, mmpretrain'):
        tool.main([DEMO, COCO, '--parts', 'loader', '--data-root', str(tmp_path)])
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ConfigError, match=r'--gpus 4: this machine has 2 GPU\(s\)'):
        tool.main([DEMO, '--parts', 'loader', '--gpus', '1', '4'])
