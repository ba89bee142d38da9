"""Measuring one model: steps, statistics, memory that does not suffice, the files' contents."""

import gc
import weakref

import pytest
import torch
from torch import nn

from groupmamba_mm.analysis import benchmark, conditions
from groupmamba_mm.analysis.benchmark import COLUMNS, Effort, Setting, Timing, measure
from groupmamba_mm.analysis.benchmark_report import Report, make_table, short_names

CPU = torch.device('cpu')
EFFORT = Effort(CPU, warmup=1, repeats=2)
SETTING = Setting((4, 6), 3, 'fp32')


class Probe(nn.Module):
    """A linear classifier that writes down how it is called.

    Args:
        full_from: Images from which the memory does not suffice in training.
        dense: Whether two maps are returned instead of logits.
    """

    calls = []

    def __init__(self, full_from=None, dense=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2)
        self.full_from = full_from
        self.dense = dense

    def forward(self, images):
        self.calls.append(
            (
                self.training,
                len(images),
                images.abs().sum().item(),
                torch.is_autocast_enabled('cpu'),
                images.is_contiguous(),
            )
        )
        maps = self.conv(images)
        if self.training and self.full_from is not None and len(images) >= self.full_from:
            self.held = weakref.ref(maps)
            Probe.last_held = self.held
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB. GPU 0 ...')
        return (maps, maps * 2) if self.dense else maps.mean((2, 3))


@pytest.fixture(autouse=True)
def no_calls():
    Probe.calls.clear()


def test_every_step_is_run_on_random_images():
    row = measure(Probe(), SETTING, EFFORT)
    training, lengths, sums, autocast, contiguous = zip(*Probe.calls)
    # inference, latency, training with one forward pass before that tells the number of classes
    assert list(lengths) == [3] * 3 + [1] * 3 + [3] * 4
    assert list(training) == [False] * 7 + [True] * 3
    assert all(sums) and len(set(sums)) == 3 * EFFORT.repeats
    assert not any(autocast) and all(contiguous)
    assert set(row) | set(COLUMNS[:11]) == set(COLUMNS)
    assert row['inference_img_s'] == pytest.approx(3000 / row['inference_ms'])
    assert row['training_img_s'] == pytest.approx(3000 / row['training_ms'])
    assert row['training_peak_gb'] is None and row['note'] == ''


def test_the_model_is_left_as_it_is():
    model = Probe().train()
    before = model.conv.weight.clone()
    measure(model, SETTING, EFFORT)
    assert model.training and model.conv.weight.grad is None
    assert torch.equal(model.conv.weight, before)


def test_training_changes_a_classifier_and_not_a_backbone(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, **kwargs: steps.append(self))
    measure(Probe(), SETTING, EFFORT, ['training'])
    assert len(steps) == 3 and steps[0].defaults['fused'] is True
    row = measure(Probe(dense=True), SETTING, EFFORT, ['training'])
    assert len(steps) == 3 and row['training_ms'] > 0


def test_what_is_not_asked_for_is_none():
    row = measure(Probe(), SETTING, EFFORT, ['latency'])
    assert row['latency_ms'] > 0
    assert row['inference_ms'] is None and row['training_img_s'] is None
    assert {length for _, length, *_ in Probe.calls} == {1}


def test_precision_and_layout_reach_the_model():
    setting = Setting((4, 6), 3, 'bf16', layout=benchmark.CHANNELS_LAST)
    measure(Probe(), setting, EFFORT, ['inference'])
    assert all(autocast and not contiguous for *_, autocast, contiguous in Probe.calls)


@pytest.mark.parametrize('precision', ['fp32', 'tf32', 'bf16'])
def test_tf32_is_set_and_put_back(precision):
    def state():
        return (
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.benchmark,
        )

    before = state()
    with benchmark.numerics(precision):
        assert state() == (precision == 'tf32', precision == 'tf32', True)
    assert state() == before


def test_compile_mode(monkeypatch):
    calls = []

    def compiled(network, **options):
        calls.append(options)
        return network

    monkeypatch.setattr(torch, 'compile', compiled)
    measure(Probe(), Setting((4, 6), 3, 'fp32', mode='compile-default'), EFFORT)
    # one batch size each: none may fall back on kernels for any shape
    assert calls == [dict(mode='default', dynamic=False)] * 3


def test_a_cuda_graph_is_for_inference():
    graph = Setting((4, 6), 3, 'fp32', mode='cuda-graph')
    assert graph.replays_graphs and graph.compile_mode is None
    assert Setting((4, 6), 3, 'fp32', mode='compile-reduce-overhead').replays_graphs
    assert not Setting((4, 6), 3, 'fp32', mode='compile-default').replays_graphs
    assert measure(Probe(), graph, EFFORT, ['training'])['training_ms'] is None
    assert not Probe.calls


def test_too_little_memory_is_a_note_and_the_rest_is_measured():
    row = measure(Probe(full_from=2), SETTING, EFFORT, ['training', 'inference', 'latency'])
    assert row['note'] == 'training: out of memory (CUDA out of memory)'
    assert row['training_ms'] is None and row['training_img_s'] is None
    assert row['inference_ms'] > 0 and row['latency_ms'] > 0
    gc.collect()
    assert Probe.last_held() is None  # what the failed step had allocated is free again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('mode', ['eager', 'cuda-graph'])
def test_on_a_gpu(mode):
    effort = Effort(torch.device('cuda'), warmup=2, repeats=5)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    row = measure(model, Setting((64, 96), 32, 'fp16', mode=mode), effort)
    assert row['note'] == '' and row['inference_ms'] > 0 and row['latency_ms'] > 0
    assert (row['training_ms'] is None) == (mode == 'cuda-graph')
    # the image in fp32, the map in fp16 at least twice
    least = 32 * 3 * 64 * 96 * 4 + 2 * 32 * 64 * 62 * 94 * 2
    assert least < row['inference_peak_gb'] * 1e9 < 10 * least


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match='Kernel size'):
        measure(Probe(), Setting((1, 1), 3, 'fp32'), EFFORT)


def test_quartiles():
    assert Timing.of([4.0, 1.0, 2.0, 5.0, 3.0]) == Timing(2, 3, 4)
    assert Timing.of([2.0]) == Timing(2, 2, 2)


def make_row(**values):
    return (
        dict(
            dict.fromkeys(COLUMNS),
            model='m',
            kind='ours',
            params=1_500_000,
            macs=2e9,
            height=32,
            width=48,
            batch=2,
            precision='bf16',
            layout='contiguous',
            mode='eager',
            backend='torch',
            note='',
        )
        | values
    )


def test_table():
    rows = [
        make_row(
            inference_img_s=12_345.6,
            inference_ms=10.25,
            inference_ms_q1=10.1,
            inference_ms_q3=10.5,
            training_peak_gb=4.8,
        ),
        make_row(kind='peer', backend=None, layout='channels-last', note='a|b'),
    ]
    first, second = make_table(rows).splitlines()[2:]
    assert first == (
        '| m | 1.5 | 2 | 32x48, batch 2, bf16, eager, scan torch | 12,346 | '
        '10.25 (10.10-10.50) | - | - | - | - | 4.80 |  |'
    )
    assert second.startswith('| m | 1.5 | 2 | 32x48, batch 2, bf16, eager, channels-last | - |')
    assert second.endswith('| a/b |')


def test_nothing_to_draw(tmp_path):
    report = Report(tmp_path, dict(CPU='a CPU'))
    report.add(make_row(note='inference: out of memory'))
    assert report.draw() is False and not (tmp_path / 'throughput.png').exists()


def test_short_names():
    names = [
        'groupmamba-official-tiny_8xb128_in1k',
        'groupmamba-tiny_8xb128_in1k',
        'resnet10t',
        'mask-rcnn_groupmamba-tiny_fpn_1x_coco',
    ]
    assert list(short_names(names).values()) == ['official-tiny', *names[1:]]


def test_environment(monkeypatch):
    monkeypatch.setenv('GROUPMAMBA_SOMETHING', 'on')
    monkeypatch.setenv('GROUPMAMBA_FOLDER', '/home/somebody')
    found = conditions.describe_environment(CPU)
    assert 'GROUPMAMBA_SOMETHING=on' in found['environment']
    assert 'somebody' not in ' '.join(found.values())
    assert (
        'GPU' not in found
        and found['CPU']
        and f'torch {torch.__version__[:3]}' in found['versions']
    )
    assert conditions.package_version('no-such-package-here') == 'not installed'


def test_outside_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(conditions.groupmamba_mm, '__file__', str(tmp_path / '__init__.py'))
    assert conditions.commit() is None
