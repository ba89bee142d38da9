"""The six sizes in timm's registry: ``timm.create_model('groupmamba_official_tiny')``."""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from groupmamba_mm.backbones import ARCHS
from groupmamba_mm.backbones.archs import FAMILIES

from .classifier import HEADS, GroupMambaClassifier
from .pretrained import with_our_names


def _pretrained_cfg(arch: str) -> dict[str, Any]:
    """What timm's data pipeline and loader need to know; no weights are published here."""
    classifiers = tuple(f'head.{name}' for name in HEADS[ARCHS[arch].family].layers)
    return dict(
        url='',
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv='backbone.stem.convs.0',
        license='apache-2.0',
        classifier=classifiers[0] if len(classifiers) == 1 else classifiers,
    )


def _entry_point(arch: str) -> Callable[..., nn.Module]:
    name = f'groupmamba_{arch.replace("-", "_")}'

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        if overlay.get('file') or overlay.get('url'):
            # read, converted and reported by our own loader
            kwargs['pretrained_cfg_overlay'] = dict(overlay, custom_load=True)
        return build_model_with_cfg(
            partial(GroupMambaClassifier, arch),
            name,
            pretrained,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
            pretrained_filter_fn=checkpoint_filter_fn,
            **kwargs,
        )

    create.__name__ = name
    create.__doc__ = f'GroupMamba {arch}; see :class:`groupmamba_mm.models.GroupMambaClassifier`.'
    return create


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint to our names, as timm's loaders ask for.

    Args:
        state_dict: What a file held.
        model: The model.

    Returns:
        The tensors.
    """
    return with_our_names(state_dict, 'given to timm')


default_cfgs = generate_default_cfgs(
    {f'groupmamba_{arch.replace("-", "_")}': _pretrained_cfg(arch) for arch in ARCHS}
)

# what depends on the size and the device of its input is one node of an FX graph
for _family in FAMILIES.values():
    for _part in (_family.stem, _family.downsample, _family.block, _family.summary):
        register_notrace_module(_part)

for _arch in ARCHS:
    register_model(_entry_point(_arch))
