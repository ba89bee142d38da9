"""Training with a teacher (Eq. 10); importing this module registers its parts, needs mmpretrain."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.distillation'):
    from .classifier import DistilledClassifier
    from .heads import DistilledLinearClsHead, DistilledTwoHeadClsHead
    from .loss import DistillationLoss
    from .teachers import ConfigTeacher, FrozenTeacher, Normalization, TimmTeacher

__all__ = [
    'ConfigTeacher',
    'DistillationLoss',
    'DistilledClassifier',
    'DistilledLinearClsHead',
    'DistilledTwoHeadClsHead',
    'FrozenTeacher',
    'Normalization',
    'TimmTeacher',
]
