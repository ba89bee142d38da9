"""Merged parameter groups and fused kernels: the same options and the same training."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from groupmamba_mm import GroupMamba
from groupmamba_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from groupmamba_mm.engine.optim import merge_groups, with_fused
from groupmamba_mm.errors import ConfigError
from tests.conftest import SMALL

DECAY = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
CUSTOM = dict(
    DECAY,
    bias_lr_mult=2.0,
    custom_keys={'stem': dict(lr_mult=0.1), 'A_log': dict(decay_mult=0.0, betas=[0.8, 0.9])},
)
OPTIMIZER = dict(type='AdamW', lr=1e-2, betas=(0.9, 0.999), weight_decay=0.05)


def wrapper_of(model, merged=True, paramwise_cfg=DECAY):
    return build_optim_wrapper(
        model,
        dict(
            type='SyncFreeOptimWrapper',
            constructor=f'{"Merged" if merged else "Default"}OptimWrapperConstructor',
            optimizer=dict(OPTIMIZER),
            paramwise_cfg=paramwise_cfg,
            clip_grad=dict(max_norm=5.0),
        ),
    )


def options_by_name(model, wrapper):
    options = {
        id(p): {key: value for key, value in group.items() if key != 'params'}
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    return {name: options[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('paramwise_cfg,groups', [(DECAY, 2), (CUSTOM, 5), (None, 1)])
def test_options_are_the_default_constructors(small_arch, paramwise_cfg, groups):
    model = GroupMamba(arch=small_arch, frozen_stages=0 if paramwise_cfg is DECAY else -1)
    merged = wrapper_of(model, paramwise_cfg=paramwise_cfg)
    default = wrapper_of(model, merged=False, paramwise_cfg=paramwise_cfg)
    trained = sum(p.requires_grad for p in model.parameters())
    assert options_by_name(model, merged) == options_by_name(model, default)
    assert sum(len(group['params']) for group in merged.optimizer.param_groups) == trained
    assert len(merged.optimizer.param_groups) == groups
    assert len(default.optimizer.param_groups) == (trained if paramwise_cfg else 1)


def test_order_is_the_models():
    model = GroupMamba(arch=SMALL['official'])
    position = {id(p): i for i, p in enumerate(model.parameters())}
    orders = []
    for group in wrapper_of(model).optimizer.param_groups:
        order = [position[id(p)] for p in group['params']]
        assert order == sorted(order)
        orders.append(order)
    assert orders == sorted(orders)
    again = wrapper_of(copy.deepcopy(model))
    sizes = [len(group['params']) for group in again.optimizer.param_groups]
    assert sizes == [len(order) for order in orders]


def test_training_is_the_same():
    torch.manual_seed(0)
    models = [GroupMamba(arch=SMALL['paper'])]
    models.append(copy.deepcopy(models[0]))
    images = torch.randn(3, 2, 3, 16, 16)
    for model, merged in zip(models, (True, False)):
        wrapper = wrapper_of(model, merged)
        for image in images:
            wrapper.update_params(model(image)[0].square().mean())
    for ours, theirs in zip(*(model.parameters() for model in models)):
        assert torch.equal(ours, theirs)


def test_groups_given_are_left_alone():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [dict(params=[a]), dict(params=[b], lr=1.0), dict(params=[c])]
    assert [len(group['params']) for group in merge_groups(groups)] == [2, 1]
    assert [len(group['params']) for group in groups] == [1, 1, 1]


def test_a_shared_parameter_is_not_updated_twice():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match='bypass_duplicate=True'):
        wrapper_of(model)
    wrapper = wrapper_of(model, paramwise_cfg=dict(DECAY, bypass_duplicate=True))
    assert sum(len(group['params']) for group in wrapper.optimizer.param_groups) == 3


class Wrapped(nn.Module):
    """Any model around a backbone: a classifier, a detector, a segmenter."""

    def __init__(self):
        super().__init__()
        self.backbone = GroupMamba(SMALL['paper'], out_indices=(0, 1, 2, 3))
        self.neck, self.head = nn.Linear(2, 2), nn.Linear(2, 2)


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_layer_decay_falls_towards_the_stem(scope):
    model = Wrapped()
    with DefaultScope.overwrite_default_scope(scope):
        wrapper = build_optim_wrapper(
            model,
            dict(
                type='OptimWrapper',
                constructor='LayerDecayOptimWrapperConstructor',
                optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
                paramwise_cfg=dict(layer_decay_rate=0.5, bias_decay_mult=0.0),
            ),
        )
    rates = {
        id(p): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    assert set(rates) == {id(p) for p in model.parameters()}
    # the small arch has 5 layers: stem 0, layers 1 to 5, what follows 6
    names = dict(model.named_parameters())
    for start, depth in (
        ('backbone.stem.', 0),
        ('backbone.stages.0.0.', 1),
        ('backbone.downsamples.0.', 2),
        ('backbone.stages.2.1.', 4),
        ('backbone.stages.3.0.', 5),
        ('backbone.out_norms.', 6),
        ('neck.', 6),
        ('head.', 6),
    ):
        found = {rates[id(p)][0] for name, p in names.items() if name.startswith(start)}
        assert found == {0.5 ** (6 - depth)}, start
    assert rates[id(model.head.bias)][1] == 0.0 and rates[id(model.head.weight)][1] == 0.1
    assert len(wrapper.optimizer.param_groups) == 14


@pytest.mark.parametrize('rate', [None, 0, 1.5, '0.8'])
def test_layer_decay_needs_a_rate(rate):
    with pytest.raises(ConfigError, match=r'layer_decay_rate is .*; set it to a number'):
        LayerDecayOptimWrapperConstructor(
            dict(optimizer=dict(type='AdamW', lr=1.0)), dict(layer_decay_rate=rate)
        )


def test_layer_decay_needs_a_backbone_that_knows_its_layers():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match='Linear does not say how deep its layers lie'):
        build_optim_wrapper(
            model,
            dict(
                type='OptimWrapper',
                constructor='LayerDecayOptimWrapperConstructor',
                optimizer=dict(type='AdamW', lr=1.0),
                paramwise_cfg=dict(layer_decay_rate=0.5),
            ),
        )


def on_gpu(*parameters):
    """A model as far as the choice looks at it."""
    return SimpleNamespace(
        parameters=lambda: [
            SimpleNamespace(requires_grad=True, is_cuda=cuda, is_floating_point=lambda: True)
            for cuda in parameters
        ]
    )


@pytest.mark.parametrize(
    'optimizer, gpu, fused',
    [
        (dict(type='AdamW'), (True, True), True),
        (dict(type='SGD', lr=0.1), (True,), True),
        (dict(type=torch.optim.Adam), (True,), True),
        (dict(type='AdamW'), (True, False), None),
        (dict(type='AdamW'), (False,), None),
        (dict(type='AdamW', fused=False), (True,), False),
        (dict(type='AdamW', foreach=True), (True,), None),
        (dict(type='Rprop'), (True,), None),
        (dict(type='NoSuchOptimizer'), (True,), None),
    ],
)
def test_fused_kernels_are_chosen_where_there_are_some(optimizer, gpu, fused):
    given = dict(optimizer)
    assert with_fused(optimizer, on_gpu(*gpu)).get('fused') is fused
    assert optimizer == given


@pytest.mark.gpu
def test_the_optimizer_is_fused_on_a_gpu():
    model = torch.nn.Linear(2, 2)
    assert not any(group['fused'] for group in wrapper_of(model).optimizer.param_groups)
    assert all(group['fused'] for group in wrapper_of(model.cuda()).optimizer.param_groups)


def step(wrapper, model):
    wrapper.update_params(model(torch.ones(1, 2)).square().sum())


@pytest.mark.parametrize('before, after', [(False, True), (True, False), (None, True)])
def test_a_run_goes_on_with_its_own_kernels(before, after):
    """A checkpoint of another machine or version tells what was computed, not by which kernels."""

    def build(fused):
        model = torch.nn.Linear(2, 2)
        return model, build_optim_wrapper(
            model,
            dict(
                type='SyncFreeOptimWrapper',
                constructor='MergedOptimWrapperConstructor',
                optimizer=dict(OPTIMIZER, fused=fused),
                paramwise_cfg=DECAY,
            ),
        )

    torch.manual_seed(0)
    (saved_model, saved), (model, wrapper) = build(before), build(after)
    step(saved, saved_model)
    state = copy.deepcopy(saved.state_dict())
    if before is None:  # written before there were fused kernels
        for group in state['param_groups']:
            del group['fused']
    model.load_state_dict(saved_model.state_dict())
    given = copy.deepcopy(state['param_groups'])
    wrapper.load_state_dict(state)
    assert state['param_groups'] == given
    assert [group['fused'] for group in wrapper.optimizer.param_groups] == [after] * 2
    step(wrapper, model), step(saved, saved_model)
    for ours, theirs in zip(model.parameters(), saved_model.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_other_groups_are_refused():
    wrapper, other = (wrapper_of(torch.nn.Linear(2, 2), paramwise_cfg=cfg) for cfg in (DECAY, None))
    with pytest.raises(ValueError, match='different number of parameter groups'):
        wrapper.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match='different number of parameter groups'):
        other.load_state_dict(wrapper.state_dict())
