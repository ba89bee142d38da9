"""What is benchmarked: the models of this project's configs, and timm's beside them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from groupmamba_mm.engine.config_checks import close_to, load_config
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.ops import check_backend

from .building import build_model

with explain_missing('the benchmark with peers'):
    import timm

OURS, PEER = 'ours', 'peer'
_ALL_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Subject:
    """A model that can be built for an image size.

    Attributes:
        name: What its rows are called.
        kind: 'ours' or 'peer'.
        dense: Whether the backbone with its maps is measured, not a classifier with its logits.
        cfg: The config, None for a peer.
    """

    name: str
    kind: str
    dense: bool
    cfg: Config | None = None

    @property
    def own_backend(self) -> str | None:
        """The ``scan_backend`` that the config asks for, None for another model's."""
        backbone = {} if self.cfg is None else self.cfg.model.get('backbone', {})
        return (
            backbone.get('scan_backend', 'auto') if backbone.get('type') == 'GroupMamba' else None
        )

    def build(self, size: tuple[int, int], backend: str | None = None) -> nn.Module:
        """Build the model.

        Args:
            size: (H, W) of the images, for peers whose parameters depend on it.
            backend: A GroupMamba's ``scan_backend``.

        Returns:
            The model in eval mode on the CPU, with its constructors' weights. It takes images and
            returns logits, or with :attr:`dense` the maps of all stages (the config's
            ``out_indices`` if it has some).
        """
        if self.cfg is None:
            return self._build_peer(size)
        cfg = copy.deepcopy(self.cfg)
        if backend is not None:
            cfg.model.backbone.scan_backend = backend
        if self.dense:
            if cfg.model.backbone.get('out_indices') is None:
                cfg.model.backbone.out_indices = _ALL_STAGES
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                return MODELS.build(cfg.model.backbone).eval()
        # mixing belongs to the preprocessor, which is not measured
        cfg.model.pop('train_cfg', None)
        return build_model(cfg)

    def _build_peer(self, size: tuple[int, int]) -> nn.Module:
        options = {}
        if timm.get_pretrained_cfg(self.name).fixed_input_size:
            options.update(img_size=size)
        if self.dense:
            # the last four levels: some models have one at stride 2 before them
            options.update(features_only=True, out_indices=(-4, -3, -2, -1))
        return timm.create_model(self.name, pretrained=False, **options).eval()


def find_subjects(
    configs: Sequence[str],
    peers: Sequence[str],
    archs: dict[str, Path],
    dense: bool = False,
    cfg_options: dict[str, Any] | None = None,
) -> list[Subject]:
    """Look up what is to be measured.

    Args:
        configs: Paths of configs, or names out of ``archs``.
        peers: timm's names of models.
        archs: Configs of classifiers by the names of their sizes.
        dense: Whether to measure the backbone of classification configs too. Those of detectors
            and segmenters are measured as backbones in any case.
        cfg_options: Changes of the configs by dotted keys.

    Returns:
        The configs' models, then the peers.

    Raises:
        ConfigError: A config or peer is unknown or given twice, or classifiers and dense models are
            mixed.
    """
    loaded = []
    for name in configs:
        if name not in archs and '/' not in name and not Path(name).suffix:
            raise ConfigError(
                f'{name} is neither a config file nor a size; '
                f'{close_to(name, archs) or "the sizes are " + ", ".join(archs)}'
            )
        path = str(archs.get(name, name))
        cfg = load_config(path, cfg_options)
        if cfg.get('model') is None:
            raise ConfigError(f'config {path} has no model; take one of configs/')
        loaded.append((path, cfg))
    _check_once([Path(path).stem for path, _ in loaded], 'config')
    for name in peers:
        _check_peer(name)
    _check_once(peers, 'peer')

    are_dense = {path: dense or cfg.default_scope != 'mmpretrain' for path, cfg in loaded}
    if len(set(are_dense.values())) > 1:
        classifier, other = (
            next(Path(path).stem for path, is_dense in are_dense.items() if is_dense is wanted)
            for wanted in (False, True)
        )
        raise ConfigError(
            f'{classifier} is a classifier and {other} is not, so their figures '
            'cannot be compared; add --dense to measure the backbones of both'
        )
    for path, cfg in loaded:
        if are_dense[path] and cfg.model.get('backbone') is None:
            raise ConfigError(
                f'config {path}: its {cfg.model.type} has no backbone to measure '
                'with --dense; leave it out'
            )
    for _, cfg in loaded:
        if cfg.model.get('backbone') is not None and 'compile_mode' in cfg.model.backbone:
            cfg.model.backbone.pop('compile_mode')  # rows say how they were compiled
    dense = dense or any(are_dense.values())
    return [Subject(Path(path).stem, OURS, dense, cfg) for path, cfg in loaded] + [
        Subject(name, PEER, dense) for name in peers
    ]


def check_backends(backends: Sequence[str]) -> None:
    """Refuse unknown scan backends.

    Args:
        backends: What was asked for.

    Raises:
        ConfigError: One is unknown; the message lists the names.
    """
    for backend in backends:
        try:
            check_backend(backend)
        except ValueError as error:
            raise ConfigError(f'--backend {backend}: {error}') from error


def _check_peer(name: str) -> None:
    if not timm.is_model(name):
        hint = close_to(name, timm.list_models()) or 'timm.list_models() lists the names'
        raise ConfigError(f'peer {name!r} is no model of timm {timm.__version__}; {hint}')
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(f'peer {name!r}: {error} Leave out what follows the dot') from error


def _check_once(names: Sequence[str], what: str) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ConfigError(f'{what} {name} is given twice; give each {what} once')
