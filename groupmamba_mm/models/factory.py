"""A model in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.layers import init_parameters

from .classifier import GroupMambaClassifier
from .pretrained import load_pretrained


def create_model(
    arch: str | dict,
    pretrained: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> nn.Module:
    """Build a classifier or a dense backbone, with weights if there are any.

    Args:
        arch: A size's name, ``'tiny'`` to ``'official-base'``, or a dict: see
            :class:`groupmamba_mm.GroupMamba`.
        pretrained: Where weights come from: a file, an address, a folder, a repository of the
            Hugging Face Hub; see :func:`load_pretrained`. None: the released initialisation.
        num_classes: Classes K of a classifier; 0: features (B, C4).
        in_chans: Channels of the image.
        features_only: Return a :class:`groupmamba_mm.GroupMamba` that gives a tuple of maps
            (B, C_i, H_i, W_i), each after a LayerNorm.
        out_indices: The stages (0 to 3) of those maps; None: all of them.
        drop_path_rate: Stochastic depth of the last layer.
        **options: Of :class:`groupmamba_mm.GroupMamba`, and of :class:`GroupMambaClassifier`
            without ``features_only``.

    Returns:
        The model, in training mode as any new module.

    Raises:
        ValueError: An option has a value outside its set.
        CheckpointError: The weights cannot be read safely or do not fit.
    """
    if not features_only:
        if out_indices is not None:
            raise ValueError(
                f'out_indices={out_indices!r} is for features_only=True; a '
                'classifier has one output'
            )
        model = GroupMambaClassifier(
            arch,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            **options,
        )
    else:
        stages = (0, 1, 2, 3) if out_indices is None else out_indices
        model = GroupMamba(
            arch, in_channels=in_chans, out_indices=stages, drop_path_rate=drop_path_rate, **options
        )
        init_parameters(model)
    if pretrained is not None:
        if isinstance(pretrained, bool):
            raise ValueError(
                f'pretrained={pretrained}: this package publishes no weights; give '
                'a file, an address, a folder or a repository, or None'
            )
        load_pretrained(model, pretrained)
    return model
