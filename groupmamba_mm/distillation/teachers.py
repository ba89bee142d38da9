"""Teachers, kept out of the student's optimizer, averages and checkpoints."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import mmengine.hub
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from groupmamba_mm.checkpoint import load_matched, match_state_dict, read_tensors, state_dict_of
from groupmamba_mm.checkpoint.matching import BATCH_COUNTERS, log_report
from groupmamba_mm.cuda_graph import captured
from groupmamba_mm.errors import CheckpointError, ConfigError
from groupmamba_mm.extras import explain_missing

from .folding import fold_norms

PRECISIONS = ('fp32', 'bf16')

# Layers whose weights autocast would cast in each forward pass, by their exact types: what is
# derived from them may compute something else from its weights first.
_CAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Normalization:
    """How images were prepared for a network: ``(pixel - mean) / std`` for each channel.

    Attributes:
        mean: Of each channel, in the channels' order, pixels from 0 to 255.
        std: The same for the standard deviation.
        rgb: Whether the channels are red, green, blue; else blue, green, red.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: bool = True

    @classmethod
    def of_preprocessor(cls, cfg: dict[str, Any]) -> 'Normalization':
        """Read the normalisation that the config of an mmpretrain ``data_preprocessor`` asks for.

        Args:
            cfg: The config; without a mean, images are taken as they are.

        Returns:
            The normalisation.
        """
        mean, std = cfg.get('mean'), cfg.get('std')
        return cls(
            tuple(mean or (0.0, 0.0, 0.0)), tuple(std or (1.0, 1.0, 1.0)), cfg.get('to_rgb', False)
        )

    def converted(self, images: Tensor, source: 'Normalization') -> Tensor:
        """Turn images that were normalised in another way into this one.

        Mixup, CutMix and the like commute with it, as they are linear in the pixels.

        Args:
            images: (B, 3, H, W), normalised as ``source`` says.
            source: Their normalisation.

        Returns:
            (B, 3, H, W).
        """
        if source == self:
            return images

        def as_column(values: tuple[float, ...]) -> Tensor:
            return _column(values, images.dtype, images.device)

        pixels = images * as_column(source.std) + as_column(source.mean)
        if source.rgb != self.rgb:
            pixels = pixels.flip(1)
        return (pixels - as_column(self.mean)) / as_column(self.std)


@lru_cache(maxsize=16)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the channels, (1, C, 1, 1), copied to a device once."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


class FrozenTeacher(ABC):
    """A trained network that gives logits and never changes.

    It is no ``nn.Module``, and its network is no child of the student, for then the network would
    be in the optimizer, the averaged copy (EMA), DDP's buckets, the checkpoints and the conversion
    to SyncBN; ``init_weights`` could overwrite it, and ``train()`` would move its statistics.
    Copies of a student share its teacher.

    The network is made and its checkpoint read by :meth:`load`, not before: a config with a teacher
    is built, counted and tested without the teacher's file.

    Args:
        checkpoint: A file or an address with the weights: a bare state dict, or one under
            'state_dict' or 'model'. No code in it is run.
        precision: 'fp32', or 'bf16' for autocast to bfloat16, with the weights of linear layers and
            convolutions cast once, and unless it is compiled with BatchNorm folded into the
            convolutions of timm's networks; the student's precision has no influence.
        channels_last: Whether the network runs in the channels-last memory layout.
        compile: Whether the network runs through ``torch.compile``.
        cuda_graph: Whether, on a GPU, the network is recorded with the first batch and replayed.
            Batches of another shape are computed launch by launch.
        own_stream: Whether, on a GPU, the network runs beside what the student does between
            :meth:`start` and its end. A replayed one never does: recordings share the workspace of
            the matrix products.

    Raises:
        ValueError: An option has a value outside its set.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        precision: str = 'fp32',
        channels_last: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
        own_stream: bool = True,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {PRECISIONS}, got {precision!r}')
        self.checkpoint = checkpoint
        self.precision = precision
        self.channels_last = channels_last
        self.compile = compile
        self.cuda_graph = cuda_graph
        self.own_stream = own_stream
        self.network: nn.Module | None = None
        self._run: Callable[[Tensor], Tensor] | None = None
        # the shape of the recorded batch, and its replay
        self._recorded: tuple[torch.Size, Callable[[Tensor], Tensor]] | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    @abstractmethod
    def normalization(self) -> Normalization:
        """The normalisation that the network expects."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network, whose forward takes images and gives logits.

        Returns:
            The network; unless :attr:`checkpoint` is set, with its trained weights.

        Raises:
            CheckpointError: The trained weights cannot be fetched.
            ConfigError: The network cannot be made.
        """

    @abstractmethod
    def count_classes(self, network: nn.Module) -> int:
        """Number of classes of a network that :meth:`build` made."""

    def load(self, num_classes: int) -> None:
        """Make the network and read its weights, once.

        Args:
            num_classes: Number of classes K of the student.

        Raises:
            CheckpointError: The weights are missing, damaged, would run code, or do not fit.
            ConfigError: The network cannot be made, or has other classes than the student.
        """
        if self.network is not None:
            return
        # the student draws the same first weights with and without a teacher
        with torch.random.fork_rng(devices=[]):
            network = self.build()
        found = self.count_classes(network)
        if found != num_classes:
            raise ConfigError(
                f'the teacher has {found} classes and the student {num_classes}; set '
                'model.teacher to one that was trained for the same classes'
            )
        if self.checkpoint is not None:
            try:
                self._read_weights(network)
            except CheckpointError as error:
                raise CheckpointError(
                    f'teacher: {error}; name its file with --cfg-options '
                    'model.teacher.checkpoint=FILE'
                ) from error
        self.use(network)

    def _read_weights(self, network: nn.Module) -> None:
        """Load :attr:`checkpoint` into a network; no key may be missing or left over."""
        weights = state_dict_of(read_tensors(self.checkpoint))
        report = match_state_dict(network.state_dict(), weights, expected_missing=[BATCH_COUNTERS])
        log_report(report, f'{self.checkpoint} (teacher)', MMLogger.get_current_instance())
        if not report.complete or report.unexpected:
            raise CheckpointError(
                f'{self.checkpoint} is not exactly the network: '
                + '; '.join(str(report).splitlines())
            )
        load_matched(network, weights, report)

    def use(self, network: nn.Module) -> None:
        """Freeze a network and use it as the teacher.

        Args:
            network: What :meth:`build` makes.
        """
        network.requires_grad_(False).eval()
        if self.precision == 'bf16':
            if not self.compile:
                fold_norms(network)
            for layer in network.modules():
                if type(layer) in _CAST_LAYERS:
                    layer.to(torch.bfloat16)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        self.network = network
        self._own_normalization = self.normalization
        self._run = torch.compile(network) if self.compile else network
        self._recorded = None

    def __call__(self, images: Tensor, source: Normalization) -> Tensor:
        """Compute the logits.

        Args:
            images: (B, 3, H, W), normalised and mixed for the student.
            source: The student's normalisation.

        Returns:
            (B, K) in fp32, without gradient.
        """
        return self.start(images, source)()

    @torch.no_grad()
    def start(self, images: Tensor, source: Normalization) -> Callable[[], Tensor]:
        """Start computing the logits.

        Args:
            images: (B, 3, H, W), normalised and mixed for the student.
            source: The student's normalisation.

        Returns:
            Gives the logits, (B, K) in fp32, without gradient. On a GPU the current stream then
            waits for them, the host does not.

        Raises:
            ConfigError: The network cannot be recorded in a CUDA graph.
        """
        device = images.device
        if next(self.network.parameters()).device != device:
            self.network.to(device)
        if device.type != 'cuda' or not self.own_stream or self.cuda_graph:
            logits = self._logits(images, source)
            return lambda: logits
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            logits = self._logits(images, source)
        images.record_stream(self._stream)

        def end() -> Tensor:
            current = torch.cuda.current_stream(device)
            current.wait_stream(self._stream)
            logits.record_stream(current)
            return logits

        return end

    def _logits(self, images: Tensor, source: Normalization) -> Tensor:
        def forward(images: Tensor) -> Tensor:
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            # also switches the autocast of the student off
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == 'bf16'):
                return self._run(images).float()

        device = images.device
        images = self._own_normalization.converted(images.float(), source)
        if device.type != 'cuda' or not self.cuda_graph:
            return forward(images)
        if self._recorded is None:
            try:
                self._recorded = images.shape, captured(forward, images)
            except RuntimeError as error:
                raise ConfigError(
                    f'the teacher cannot be recorded in a CUDA graph ({error}); run '
                    'it without: --cfg-options model.teacher.cuda_graph=False'
                ) from error
        shape, replay = self._recorded
        # a copy: a replay writes its logits over those of the one before
        return replay(images).clone() if images.shape == shape else forward(images)

    def __deepcopy__(self, memo: dict) -> 'FrozenTeacher':
        return self


@MODELS.register_module()
class TimmTeacher(FrozenTeacher):
    """A teacher by its timm name.

    Args:
        model_name: Such as 'regnety_160.deit_in1k'.
        checkpoint: See :class:`FrozenTeacher`. None: the weights that timm downloads for the name.
        num_classes: Number of classes of the checkpoint. None: those of timm's weights.
        mean: For each channel, RGB, 0 to 255. None: what timm states for the name.
        std: The same for the standard deviation.
        **kwargs: See :class:`FrozenTeacher`.
    """

    def __init__(
        self,
        model_name: str = 'regnety_160.deit_in1k',
        checkpoint: str | None = None,
        num_classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(checkpoint=checkpoint, **kwargs)
        if not _timm().is_model(model_name):
            near = difflib.get_close_matches(model_name, _timm().list_models(), n=5, cutoff=0.5)
            raise ValueError(f'timm has no model {model_name!r}; like it are {near}')
        if num_classes is not None and checkpoint is None:
            raise ValueError(
                f'num_classes={num_classes} belongs to a checkpoint, and none is '
                'given; leave it away, or name a file'
            )
        self.model_name = model_name
        self.options = {} if num_classes is None else dict(num_classes=num_classes)
        self.mean = mean
        self.std = std

    @property
    def normalization(self) -> Normalization:
        """See :class:`FrozenTeacher`."""
        stated = _timm().get_pretrained_cfg(self.model_name)  # for pixels from 0 to 1
        return Normalization(
            tuple(self.mean or (round(255 * value, 4) for value in stated.mean)),
            tuple(self.std or (round(255 * value, 4) for value in stated.std)),
        )

    def build(self) -> nn.Module:
        """See :meth:`FrozenTeacher.build`."""
        try:
            # with the classes that the weights are for: timm would replace the last layer by a
            # random one for any other number
            return _timm().create_model(
                self.model_name, pretrained=self.checkpoint is None, **self.options
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f'the weights of the teacher {self.model_name} could not be fetched ({error}); '
                'name a file with --cfg-options model.teacher.checkpoint=FILE'
            ) from error

    def count_classes(self, network: nn.Module) -> int:
        """See :meth:`FrozenTeacher.count_classes`."""
        return network.num_classes


@MODELS.register_module()
class ConfigTeacher(FrozenTeacher):
    """A teacher by an mmpretrain config.

    Args:
        config: A file, or a name such as 'mmpretrain::resnet/resnet50_8xb32_in1k.py'.
        checkpoint: See :class:`FrozenTeacher`.
        **kwargs: See :class:`FrozenTeacher`.
    """

    def __init__(self, config: str | Path, checkpoint: str, **kwargs) -> None:
        super().__init__(checkpoint=checkpoint, **kwargs)
        self.config = str(config)
        self._cfg: Config | None = None

    @property
    def cfg(self) -> Config:
        """The config, read once."""
        if self._cfg is None:
            try:
                self._cfg = (
                    mmengine.hub.get_config(self.config)
                    if '::' in self.config
                    else Config.fromfile(self.config)
                )
            except FileNotFoundError as error:
                raise ConfigError(
                    f'the config of the teacher, {self.config}, does not exist; set '
                    'model.teacher.config to the one it was trained with'
                ) from error
        return self._cfg

    @property
    def normalization(self) -> Normalization:
        """See :class:`FrozenTeacher`."""
        own = self.cfg.model.get('data_preprocessor') or {}
        return Normalization.of_preprocessor({**self.cfg.get('data_preprocessor', {}), **own})

    def build(self) -> nn.Module:
        """See :meth:`FrozenTeacher.build`."""
        model = self.cfg.model.copy()
        model.setdefault('data_preprocessor', self.cfg.get('data_preprocessor'))
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            return MODELS.build(model)

    def count_classes(self, network: nn.Module) -> int:
        """See :meth:`FrozenTeacher.count_classes`."""
        # mmpretrain's TimmClassifier has timm's network as `model`, its other classifiers a head
        return (network.model if hasattr(network, 'model') else network.head).num_classes


def _timm() -> ModuleType:
    with explain_missing('TimmTeacher'):
        import timm
    return timm
