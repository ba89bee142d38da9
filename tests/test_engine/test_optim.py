"""One parameter group for all parameters of the same settings."""
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import groupmamba_mm.engine  # noqa: F401, registers the constructor
from groupmamba_mm import GroupMamba
from tests.conftest import SMALL


def trained(constructor, paramwise_cfg):
    """A model after three steps, and its optimizer's groups."""
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(backbone=GroupMamba(SMALL['official']), head=nn.Linear(28, 3)))
    wrapper = build_optim_wrapper(model, dict(
        type='OptimWrapper', constructor=constructor, paramwise_cfg=paramwise_cfg,
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05)))
    for _ in range(3):
        features, = model.backbone(torch.rand(2, 3, 32, 32))
        wrapper.update_params(model.head(features).square().mean())
    return model, wrapper.optimizer.param_groups


@pytest.mark.parametrize('paramwise_cfg, count', [
    (dict(norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.), 2),
    (dict(flat_decay_mult=0., custom_keys={'head': dict(lr_mult=10.)}), 3),
    (None, 1),
])
def test_few_groups_train_as_many_do(paramwise_cfg, count):
    model, groups = trained('MergedOptimWrapperConstructor', paramwise_cfg)
    reference, single = trained('DefaultOptimWrapperConstructor', paramwise_cfg)
    assert len(groups) == count
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group['lr'], group['weight_decay'])
             for group in groups for p in group['params']}
    names = {id(p): name for name, p in reference.named_parameters()}
    assert found == {names[id(p)]: (group['lr'], group['weight_decay'])
                     for group in single for p in group['params']}
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters()):
        assert torch.equal(parameter, other), name
