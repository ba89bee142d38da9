"""The backbone in mmengine's root registry, where mmpretrain, mmdet and mmseg find it too."""

from mmengine.registry import MODELS

from .groupmamba import GroupMamba

MODELS.register_module(module=GroupMamba)
