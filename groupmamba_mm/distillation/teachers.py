"""Trained networks that a student learns from, kept out of all that happens to the student."""
import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import mmengine.hub
import timm
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from groupmamba_mm.checkpoint import load_matching, read_tensors, state_dict_of
from groupmamba_mm.errors import CheckpointError, ConfigError

PRECISIONS = ('fp32', 'bf16')


@dataclass(frozen=True)
class Normalization:
    """How images were prepared for a network: ``(pixel - mean) / std`` for each channel.

    Attributes:
        mean: Of each channel, in the channels' order, pixels from 0 to 255.
        std: The same for the standard deviation.
        rgb: Whether the channels are red, green, blue; else blue, green, red.
    """
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    rgb: bool = True

    @classmethod
    def of_preprocessor(cls, cfg: Dict[str, Any]) -> 'Normalization':
        """Read the normalisation that the config of an mmpretrain ``data_preprocessor`` asks for.

        Args:
            cfg: The config; without a mean, images are taken as they are.

        Returns:
            The normalisation.
        """
        mean, std = cfg.get('mean'), cfg.get('std')
        return cls(tuple(mean or (0., 0., 0.)), tuple(std or (1., 1., 1.)),
                   cfg.get('to_rgb', False))

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

        def as_column(values: Sequence[float]) -> Tensor:
            return images.new_tensor(values).view(1, -1, 1, 1)

        pixels = images * as_column(source.std) + as_column(source.mean)
        if source.rgb != self.rgb:
            pixels = pixels.flip(1)
        return (pixels - as_column(self.mean)) / as_column(self.std)


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
        precision: 'fp32', or 'bf16' for autocast to bfloat16; the student's precision has no
            influence.
        channels_last: Whether the network runs in the channels-last memory layout.
        compile: Whether the network runs through ``torch.compile``.

    Raises:
        ValueError: An option has a value outside its set.
    """

    def __init__(self,
                 checkpoint: Optional[str] = None,
                 precision: str = 'fp32',
                 channels_last: bool = False,
                 compile: bool = False) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {PRECISIONS}, got {precision!r}')
        self.checkpoint = checkpoint
        self.precision = precision
        self.channels_last = channels_last
        self.compile = compile
        self.network: Optional[nn.Module] = None
        self._run: Optional[Callable[[Tensor], Tensor]] = None

    @property
    @abstractmethod
    def normalization(self) -> Normalization:
        """How the network wants its images."""

    @abstractmethod
    def build(self, num_classes: int) -> nn.Module:
        """Make the network, whose forward takes images and gives (B, num_classes) logits.

        Args:
            num_classes: What the student has.

        Returns:
            The network; unless :attr:`checkpoint` is set, with its trained weights.
        """

    def load(self, num_classes: int) -> None:
        """Make the network and read its weights, once.

        Args:
            num_classes: Number of classes K of the student.

        Raises:
            CheckpointError: The weights are missing, damaged, would run code, or do not fit.
            ConfigError: The network cannot be made.
        """
        if self.network is not None:
            return
        network = self.build(num_classes)
        if self.checkpoint is not None:
            load_matching(network, state_dict_of(read_tensors(self.checkpoint)),
                          source=f'{self.checkpoint} (teacher)', min_matched_share=1.0,
                          logger=MMLogger.get_current_instance())
        self.use(network)

    def use(self, network: nn.Module) -> None:
        """Freeze a network and take it as the teacher's.

        Args:
            network: What :meth:`build` makes.
        """
        network.requires_grad_(False).eval()
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        self.network = network
        self._run = torch.compile(network) if self.compile else network

    @torch.no_grad()
    def __call__(self, images: Tensor, source: Normalization) -> Tensor:
        """Compute the logits.

        Args:
            images: (B, 3, H, W), normalised and mixed for the student.
            source: The student's normalisation.

        Returns:
            (B, K) in fp32, without gradient.
        """
        if next(self.network.parameters()).device != images.device:
            self.network.to(images.device)
        images = self.normalization.converted(images.float(), source)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # also switches the autocast of the student off
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == 'bf16'):
            return self._run(images).float()

    def __deepcopy__(self, memo: Dict) -> 'FrozenTeacher':
        return self


@MODELS.register_module()
class TimmTeacher(FrozenTeacher):
    """A teacher by its timm name.

    Args:
        model_name: Such as 'regnety_160.deit_in1k'.
        checkpoint: See :class:`FrozenTeacher`. None: the weights that timm downloads for the name.
        mean: For each channel, RGB, 0 to 255. None: what timm states for the name.
        std: The same for the standard deviation.
        **kwargs: See :class:`FrozenTeacher`.
    """

    def __init__(self,
                 model_name: str = 'regnety_160.deit_in1k',
                 checkpoint: Optional[str] = None,
                 mean: Optional[Sequence[float]] = None,
                 std: Optional[Sequence[float]] = None,
                 **kwargs) -> None:
        super().__init__(checkpoint=checkpoint, **kwargs)
        if not timm.is_model(model_name):
            near = difflib.get_close_matches(model_name, timm.list_models(), n=5, cutoff=0.5)
            raise ValueError(f'timm has no model {model_name!r}; like it are {near}')
        self.model_name = model_name
        self.mean = mean
        self.std = std

    @property
    def normalization(self) -> Normalization:
        """See :class:`FrozenTeacher`."""
        stated = timm.get_pretrained_cfg(self.model_name)  # for pixels from 0 to 1
        return Normalization(
            tuple(self.mean or (round(255 * value, 4) for value in stated.mean)),
            tuple(self.std or (round(255 * value, 4) for value in stated.std)))

    def build(self, num_classes: int) -> nn.Module:
        """See :meth:`FrozenTeacher.build`."""
        try:
            return timm.create_model(self.model_name, pretrained=self.checkpoint is None,
                                     num_classes=num_classes)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f'the weights of the teacher {self.model_name} could not be fetched ({error}); '
                'name a file with --cfg-options model.teacher.checkpoint=FILE') from error


@MODELS.register_module()
class ConfigTeacher(FrozenTeacher):
    """A teacher by an mmpretrain config.

    Args:
        config: A file, or a name such as 'mmpretrain::resnet/resnet50_8xb32_in1k.py'.
        checkpoint: See :class:`FrozenTeacher`.
        **kwargs: See :class:`FrozenTeacher`.
    """

    def __init__(self, config: Union[str, Path], checkpoint: str, **kwargs) -> None:
        super().__init__(checkpoint=checkpoint, **kwargs)
        self.config = str(config)
        self._cfg: Optional[Config] = None

    @property
    def cfg(self) -> Config:
        """The config, read once."""
        if self._cfg is None:
            try:
                self._cfg = mmengine.hub.get_config(self.config) if '::' in self.config else \
                    Config.fromfile(self.config)
            except FileNotFoundError as error:
                raise ConfigError(f'the config of the teacher, {self.config}, does not exist; set '
                                  'model.teacher.config to the one it was trained with') from error
        return self._cfg

    @property
    def normalization(self) -> Normalization:
        """See :class:`FrozenTeacher`."""
        own = self.cfg.model.get('data_preprocessor') or {}
        return Normalization.of_preprocessor({**self.cfg.get('data_preprocessor', {}), **own})

    def build(self, num_classes: int) -> nn.Module:
        """See :meth:`FrozenTeacher.build`."""
        # the checkpoint has all weights, so none are fetched for the network's parts
        model = self.cfg.model.copy()
        model.setdefault('data_preprocessor', self.cfg.get('data_preprocessor'))
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            network = MODELS.build(model)
        return network
