"""Convolutions in one with the BatchNorm behind them, as teachers in bf16 run."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models.regnet import RegNet, RegNetCfg
from torch import nn

from groupmamba_mm.distillation import folding
from groupmamba_mm.distillation.folding import FoldedConv, fold_norms
from tests.kernel_testing import gpu
from tests.openmmlab import RandomTeacher


@pytest.fixture(scope='module')
def network():
    """A small network of the default teacher's kind, with statistics as after training."""
    torch.manual_seed(0)
    cfg = RegNetCfg(depth=6, w0=32, wa=48, wm=2.0, group_size=16, se_ratio=0.25)
    network = RegNet(cfg, num_classes=7).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, BatchNormAct2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    return network


def kinds(network):
    return [type(module) for module in network.modules()]


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=gpu)])
def test_all_norms_are_folded_and_the_logits_stay(network, device):
    images = torch.randn(2, 3, 40, 33)
    expected = network(images)
    teacher = RandomTeacher(precision='bf16', channels_last=True, own_stream=False)
    teacher.use(copy.deepcopy(network).to(device))
    assert BatchNormAct2d not in kinds(teacher.network)
    assert kinds(teacher.network).count(FoldedConv) == kinds(network).count(BatchNormAct2d)
    normalization = teacher.normalization
    found = teacher(images.to(device), normalization).cpu()
    assert relative_error(found, expected) < 2e-2
    # autocast alone is as far away
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(found, expected) < 2 * relative_error(network(images), expected)


@pytest.mark.parametrize('options', [dict(), dict(precision='bf16', compile=True)])
def test_fp32_and_a_compiler_get_the_network_as_it_is(network, options):
    teacher = RandomTeacher(**options)
    teacher.use(copy.deepcopy(network))
    assert kinds(teacher.network) == kinds(network)


@pytest.mark.parametrize('device', [pytest.param('cuda', marks=gpu)])
def test_groups_run_in_the_kernel(network, device, monkeypatch):
    folded = copy.deepcopy(network).to(device)
    fold_norms(folded)
    images = torch.randn(1, 3, 20, 17, device=device)
    with torch.autocast('cuda', torch.bfloat16):
        monkeypatch.setattr(folding, 'resolve_backend', lambda *unused: 'torch')
        expected = folded(images)
        monkeypatch.setattr(folding, 'resolve_backend', lambda *unused: 'triton')
        found = folded(images)
    grouped = [m for m in folded.modules() if isinstance(m, FoldedConv) and m.packed is not None]
    assert len(grouped) == 6
    assert relative_error(found, expected) < 2e-2


def test_what_is_watched_or_of_another_kind_stays(network):
    network = copy.deepcopy(network)
    network.stem.bn.register_forward_hook(lambda *unused: None)
    layers = network.s1.b1
    layers.conv1.bn.act = nn.SiLU()
    layers.conv2.conv = nn.Sequential(layers.conv2.conv)
    images = torch.randn(1, 3, 20, 17)
    expected = network(images)
    fold_norms(network)
    assert kinds(network).count(BatchNormAct2d) == 2
    assert isinstance(layers.conv1.conv, FoldedConv) and isinstance(layers.conv1.bn, nn.SiLU)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(network(images), expected) < 2e-2
