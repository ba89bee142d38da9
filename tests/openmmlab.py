"""What all tests of parts for OpenMMLab's libraries share; ``conftest.py`` imports it."""

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from groupmamba_mm.distillation import FrozenTeacher, Normalization


@pytest.fixture(autouse=True)
def no_scope_or_logger_of_another_test():
    """mmengine's current scope and logger are global: a test's runner leaves its own behind."""
    for name, scope in list(DefaultScope._instance_dict.items()):
        if scope.scope_name == 'mmengine':  # a runner's without a library, of an earlier module
            DefaultScope._instance_dict.pop(name)
    kept = [(kind, dict(kind._instance_dict)) for kind in (DefaultScope, MMLogger)]
    yield
    for kind, instances in kept:
        kind._instance_dict.clear()
        kind._instance_dict.update(instances)


@MODELS.register_module()
class RandomTeacher(FrozenTeacher):
    """A teacher without a file: three channels pooled on a coarse grid, then a linear layer."""

    normalization = Normalization((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), rgb=False)

    def load(self, num_classes):
        """See :class:`FrozenTeacher`."""
        self.num_classes = num_classes
        super().load(num_classes)

    def build(self):
        """See :class:`FrozenTeacher`."""
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, self.num_classes),
        )

    def count_classes(self, network):
        """See :class:`FrozenTeacher`."""
        return network[-1].out_features
