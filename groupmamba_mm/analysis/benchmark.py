"""Throughput, latency and memory of one model under one setting."""

import contextlib
import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groupmamba_mm.backbones.groupmamba import CUDA_GRAPH_MODES
from groupmamba_mm.cuda_graph import captured

#: What autocast computes in, by the names of the precisions. Without autocast: fp32, of which
#: 'tf32' lets the GPU's matrix units drop bits.
AUTOCAST = {'fp32': None, 'tf32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MEASURES = ('inference', 'latency', 'training')
COMPILE_MODES = ('default', *CUDA_GRAPH_MODES)
CONTIGUOUS, CHANNELS_LAST = 'contiguous', 'channels-last'
EAGER, CUDA_GRAPH = 'eager', 'cuda-graph'

#: What a row holds: the model, its setting, what was measured, why something was not.
COLUMNS = (
    'model',
    'kind',
    'params',
    'macs',
    'height',
    'width',
    'batch',
    'precision',
    'layout',
    'mode',
    'backend',
    'inference_img_s',
    'inference_ms',
    'inference_ms_q1',
    'inference_ms_q3',
    'inference_peak_gb',
    'latency_ms',
    'latency_ms_q1',
    'latency_ms_q3',
    'training_img_s',
    'training_ms',
    'training_ms_q1',
    'training_ms_q3',
    'training_peak_gb',
    'note',
)

# Batches that take turns as input, so that none stays in a cache: as many as fit in so many bytes.
_MAX_INPUTS, _INPUT_BYTES = 4, 2**30
# GPUs raise their clocks only after some work.
_WARMUP_SECONDS = 0.5

#: Takes images and does what is timed.
Step = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        size: (H, W) of the images in pixels.
        batch: Images of a step.
        precision: A name of :data:`AUTOCAST`.
        layout: Memory layout of images and weights, 'contiguous' or 'channels-last'.
        mode: 'eager', 'cuda-graph' (inference alone) or 'compile-' and one of
            :data:`COMPILE_MODES`.
        backend: The ``scan_backend`` of a GroupMamba, None for another model.
    """

    size: tuple[int, int]
    batch: int
    precision: str
    layout: str = CONTIGUOUS
    mode: str = EAGER
    backend: str | None = None

    def __str__(self) -> str:
        backend = '' if self.backend is None else f', scan {self.backend}'
        return (
            f'{self.size[0]}x{self.size[1]}, batch {self.batch}, {self.precision}, '
            f'{self.layout}, {self.mode}{backend}'
        )

    @property
    def compile_mode(self) -> str | None:
        """The mode for ``torch.compile``, None without."""
        prefix = 'compile-'
        return self.mode[len(prefix) :] if self.mode.startswith(prefix) else None

    @property
    def replays_graphs(self) -> bool:
        """Whether CUDA graphs hold the activations' memory."""
        return self.mode == CUDA_GRAPH or self.compile_mode in CUDA_GRAPH_MODES


@dataclass(frozen=True)
class Effort:
    """Device and duration of a measurement.

    Attributes:
        device: The device.
        warmup: Steps before the measured ones; on a GPU more if they take less than half a second.
        repeats: Measured steps, at least 1.
    """

    device: torch.device
    warmup: int
    repeats: int


@dataclass(frozen=True)
class Timing:
    """Quartiles of a step's duration in milliseconds."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> 'Timing':
        """Summarise at least one duration."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        return cls(*statistics.quantiles(samples, n=4, method='inclusive'))


def measure(
    model: nn.Module, setting: Setting, effort: Effort, measures: Sequence[str] = MEASURES
) -> dict[str, Any]:
    """Measure a model under one setting.

    Args:
        model: Takes images (B, 3, H, W) and returns logits (B, K), or a sequence of maps. It stays
            as it is: copies of it are run.
        setting: How it is run.
        effort: Device and duration of a measurement.
        measures: Names of :data:`MEASURES`.

    Returns:
        The measured values by the names of :data:`COLUMNS`, and 'note': what is missing, as the
        device's memory did not suffice. Values that were not measured are None, on a CPU the peak
        memory among them. Training is forward, backward and optimizer step of a classifier, forward
        and backward pass of a dense backbone.
    """
    row = {column: None for column in COLUMNS if column.startswith(MEASURES)}
    notes = []
    for name in measures:
        if name == 'training' and setting.mode == CUDA_GRAPH:
            continue
        batch = 1 if name == 'latency' else setting.batch
        try:
            timing, peak = _measure_one(name, model, setting, batch, effort)
        except torch.OutOfMemoryError as error:
            notes.append(f'{name}: out of memory ({str(error).partition(". ")[0]})')
        else:
            row.update(
                {
                    f'{name}_ms': timing.median,
                    f'{name}_ms_q1': timing.lower,
                    f'{name}_ms_q3': timing.upper,
                }
            )
            if name != 'latency':
                row.update({f'{name}_img_s': 1000 * batch / timing.median, f'{name}_peak_gb': peak})
        finally:
            # after the except clause, which keeps the failed step's tensors alive
            _clean_up(setting)
    return dict(row, note='; '.join(notes))


@torch.inference_mode()
def check_runs(model: nn.Module, setting: Setting, device: torch.device) -> None:
    """Run a model once on one image, so that what cannot run fails before hours of measuring.

    Args:
        model: The model; a copy of it is run.
        setting: How it is run; its mode does not matter here.
        device: Where.
    """
    with numerics(setting.precision):
        network = _placed(model, setting, device).eval()
        _forward(network, setting)(_make_images(1, setting, 1, device)[0])


@contextlib.contextmanager
def numerics(precision: str) -> Iterator[None]:
    """Set TF32 for a precision, and turn cuDNN's autotuner on."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = precision == 'tf32'
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def _measure_one(
    name: str, model: nn.Module, setting: Setting, batch: int, effort: Effort
) -> tuple[Timing, float | None]:
    """Time one kind of step and find its peak memory in GB, None on a CPU."""
    device, on_gpu = effort.device, effort.device.type == 'cuda'
    with numerics(setting.precision):
        if on_gpu:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        network = _placed(model, setting, device)
        image_bytes = 4 * 3 * batch * setting.size[0] * setting.size[1]
        sets = max(1, min(_MAX_INPUTS, _INPUT_BYTES // image_bytes))
        images = _make_images(sets, setting, batch, device)
        make = _training_step if name == 'training' else _inference_step
        step = make(network, setting, images[0])
        _warm_up(step, images, effort)
        if on_gpu:
            # cuDNN's and the compiler's trials took more memory than the steps to come
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run = _time_each if name == 'latency' or not on_gpu else _time_queue
        timing = Timing.of(run(step, images, effort))
        if not on_gpu:
            return timing, None
        peak = torch.cuda.max_memory_allocated() - before[0]
        if setting.replays_graphs:
            # a replayed graph allocates nothing: its memory is what stays reserved for it
            peak = max(peak, torch.cuda.memory_reserved() - before[1])
        return timing, (peak - (sets - 1) * image_bytes) / 1e9


def _placed(model: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    network = copy.deepcopy(model).to(device)
    if setting.layout == CHANNELS_LAST:
        network = network.to(memory_format=torch.channels_last)
    return network


def _make_images(sets: int, setting: Setting, batch: int, device: torch.device) -> list[Tensor]:
    """Random images as a preprocessor leaves them: fp32, mean 0, deviation 1."""
    layout = torch.channels_last if setting.layout == CHANNELS_LAST else torch.contiguous_format
    return [
        torch.randn(batch, 3, *setting.size, device=device).to(memory_format=layout)
        for _ in range(sets)
    ]


def _forward(network: nn.Module, setting: Setting) -> Step:
    """The forward pass under the setting's precision.

    Autocast is entered again for each step, as in a training loop: parameters are cast each time.
    """
    if setting.compile_mode is not None:
        network = torch.compile(network, mode=setting.compile_mode, dynamic=False)
    dtype = AUTOCAST[setting.precision]

    def run(images: Tensor) -> Any:
        if setting.replays_graphs and setting.mode != CUDA_GRAPH:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return network(images)

    return run


def _inference_step(network: nn.Module, setting: Setting, images: Tensor) -> Step:
    forward = torch.inference_mode()(_forward(network.eval(), setting))
    return captured(forward, images) if setting.mode == CUDA_GRAPH else forward


def _training_step(network: nn.Module, setting: Setting, images: Tensor) -> Step:
    """A classifier's step with loss and optimizer, or a dense backbone's forward and backward."""
    with torch.no_grad():
        outputs = _forward(network.eval(), Setting(setting.size, len(images), setting.precision))(
            images
        )
    network.train()
    forward = _forward(network, setting)
    if not isinstance(outputs, Tensor):
        # what a neck and heads would send back; the gradient of a plain sum is a constant
        gradients = [torch.randn_like(output) for output in outputs]

        def dense_step(images: Tensor) -> None:
            network.zero_grad(set_to_none=True)
            torch.autograd.backward(list(forward(images)), gradients)

        return dense_step

    labels = torch.randint(outputs.shape[1], (len(images),), device=images.device)
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05, fused=True
    )
    scaler = torch.amp.GradScaler(images.device.type, enabled=setting.precision == 'fp16')

    def step(images: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(forward(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def _warm_up(step: Step, images: list[Tensor], effort: Effort) -> None:
    on_gpu = effort.device.type == 'cuda'
    start, done = time.perf_counter(), 0
    while done < effort.warmup or (on_gpu and time.perf_counter() - start < _WARMUP_SECONDS):
        step(images[done % len(images)])
        done += 1
        if on_gpu:
            torch.cuda.synchronize()
            if done == 1:
                start = time.perf_counter()  # compiling is no warm-up for the clocks


def _time_queue(step: Step, images: list[Tensor], effort: Effort) -> list[float]:
    """Milliseconds of steps that are queued without waiting, as a loop over a data set does."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(effort.repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for index, mark in enumerate(marks[1:]):
        step(images[index % len(images)])
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def _time_each(step: Step, images: list[Tensor], effort: Effort) -> list[float]:
    """Milliseconds of steps that start when the one before is done."""
    samples = []
    if effort.device.type != 'cuda':
        for index in range(effort.repeats):
            start = time.perf_counter()
            step(images[index % len(images)])
            samples.append(1000 * (time.perf_counter() - start))
        return samples
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for index in range(effort.repeats):
        torch.cuda.synchronize()
        start.record()
        step(images[index % len(images)])
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


def _clean_up(setting: Setting) -> None:
    """Free the memory of a measurement, so that the next one starts with an empty device."""
    if setting.compile_mode is not None:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
