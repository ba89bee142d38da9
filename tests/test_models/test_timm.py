"""timm's contract for backbones, written anew; tools/run_timm_tests.sh runs timm's own file."""

import copy
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.models._manipulate import group_parameters

import groupmamba_mm
from groupmamba_mm.backbones import ARCHS
from groupmamba_mm.checkpoint import CheckpointError
from tests.conftest import RunsCode, randomize

NAMES = [f'groupmamba_{arch.replace("-", "_")}' for arch in ARCHS]
TINY = ['groupmamba_tiny', 'groupmamba_official_tiny']


@pytest.fixture(params=TINY)
def name(request):
    return request.param


def test_all_sizes_are_registered():
    assert sorted(timm.list_models('groupmamba*')) == sorted(NAMES)
    assert timm.list_pretrained('groupmamba*') == []
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('groupmamba_tiny', pretrained=True)


@pytest.mark.parametrize('name', NAMES)
def test_configs(name):
    """Shapes by the meta device, which computes nothing."""
    model = timm.create_model(name, device='meta', dtype=torch.bfloat16).eval()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {'meta'}
    cfg = model.default_cfg
    assert cfg['input_size'] == (3, 224, 224) and cfg['pool_size'] == (224 // 32, 224 // 32)
    image = torch.rand(2, 3, 32, 64, device='meta', dtype=torch.bfloat16)
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, 1, 2)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    assert model(image).shape == (2, 1000) and model(image).dtype == torch.bfloat16
    state = model.state_dict()
    classifiers = cfg['classifier']
    for layer in (
        cfg['first_conv'],
        *([classifiers] if isinstance(classifiers, str) else classifiers),
    ):
        assert f'{layer}.weight' in state


def test_heads(name):
    model = timm.create_model(name, device='meta', dtype=torch.bfloat16).eval()
    features = model.forward_features(torch.rand(2, 3, 32, 32, device='meta', dtype=torch.bfloat16))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model.forward_head(features).shape == (2, model.num_features)
    model.reset_classifier(0, '')
    assert model.forward_head(features).shape == features.shape
    model.reset_classifier(3)
    assert model.forward_head(features).shape == (2, 3, 1, 1)
    model.reset_classifier(3, 'avg')
    assert model.forward_head(features).shape == (2, 3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    bare = timm.create_model(name, num_classes=0, device='meta', dtype=torch.bfloat16)
    assert bare.forward_head(features).shape == (2, model.num_features)
    bare = timm.create_model(name, num_classes=0, global_pool='', device='meta')
    assert bare.forward_head(features).shape == features.shape


def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError):
        timm.create_model(name, not_a_model_arg=1, device='meta')


def test_gradients_reach_every_parameter(name):
    model = timm.create_model(name, num_classes=3).train()
    model(torch.rand(2, 3, 32, 32)).mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_checkpointing_changes_nothing(name):
    image = torch.rand(2, 3, 32, 64)
    grads = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3).eval()
        model.set_grad_checkpointing(enable)
        assert model.backbone.with_cp is enable
        out = model(image)
        out.square().mean().backward()
        grads.append([out, *(p.grad for p in model.parameters())])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('size', [(64, 64), (49, 70)])
def test_features_only(name, size):
    model = timm.create_model(name, features_only=True, out_indices=(1, 3), in_chans=4).eval()
    maps = model(torch.rand(2, 4, *size))
    assert model.feature_info.reduction() == [8, 32]
    for width, reduction, found in zip(model.feature_info.channels(), (8, 32), maps):
        assert found.shape == (2, width, *(math.ceil(s / reduction) for s in size))
    assert not [n for n, _ in model.named_parameters() if '.head.' in n or '.summary.' in n]


def test_intermediates(name):
    model = timm.create_model(name).eval()
    image = torch.rand(1, 3, 64, 96)
    info = FeatureInfo(model.feature_info, (0, 1, 2, 3))
    with torch.no_grad():
        last, maps = model.forward_intermediates(image)
        torch.testing.assert_close(last, model.forward_features(image))
        torch.testing.assert_close(last, maps[-1])
        assert [m.shape[1] for m in maps] == info.channels()
        assert [64 // m.shape[2] for m in maps] == info.reduction()
        rows = model.forward_intermediates(
            image, indices=2, output_fmt='NHWC', intermediates_only=True
        )
        for found, wanted in zip(rows, maps[2:]):
            torch.testing.assert_close(found.permute(0, 3, 1, 2), wanted)
        early, _ = model.forward_intermediates(image, indices=[-3], stop_early=True)
        torch.testing.assert_close(early, maps[1])
    for wrong in ([4], [-5], []):
        with pytest.raises(ValueError, match='stages must be'):
            model.forward_intermediates(image, indices=wrong)


@pytest.mark.parametrize('indices', [[0], [3], [0, 1, 2, 3]])
def test_pruning_leaves_nothing_unused(name, indices):
    model = timm.create_model(name, drop_rate=0.5).train()
    model.prune_intermediate_layers(indices)
    maps = model.forward_intermediates(torch.rand(1, 3, 32, 32), indices, intermediates_only=True)
    sum(m.sum() for m in maps).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.reset_classifier(7, 'avg')
    assert model.num_features == maps[-1].shape[1]
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 7)


def test_state_dict_round_trip_and_frozen_parts_stay_frozen(name):
    model = randomize(timm.create_model(name)).eval()
    other = timm.create_model(name).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(other(image), model(image))
    model.requires_grad_(False).reset_classifier(0, '')
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize('coarse', [False, True])
def test_groups_rise_with_depth(name, coarse):
    model = timm.create_model(name, device='meta')
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert all(groups[n] == 0 for n in groups if n.startswith('backbone.stem.'))
    if not coarse:
        depths = {
            n: model.backbone.get_layer_depth(n, 'backbone.')[0]
            for n in groups
            if n.startswith('backbone.stages.')
        }
        order = sorted(depths, key=lambda n: groups[n])
        assert [depths[n] for n in order] == sorted(depths.values())
    assert model.no_weight_decay() == set()


def test_fx_graph_computes_the_same(name):
    model = timm.create_model(name).eval()
    traced = timm.layers.create_feature_extractor(model, {'head_drop': 'pooled'})
    image = torch.rand(1, 3, 64, 32)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(image), pre_logits=True)
        torch.testing.assert_close(traced(image)['pooled'], pooled)


def test_files_go_through_our_loader(tmp_path):
    """Released names, other channels and classes, by timm's own argument for a file."""
    from groupmamba_mm.checkpoint import revert_to_official

    source = randomize(groupmamba_mm.create_model('official-tiny', num_classes=1000)).eval()
    torch.save(revert_to_official(source.state_dict()), tmp_path / 'released.pth')
    overlay = dict(file=str(tmp_path / 'released.pth'))
    whole = timm.create_model(
        'groupmamba_official_tiny', pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(whole(image), source(image))
    grey = timm.create_model(
        'groupmamba_official_tiny',
        pretrained=True,
        in_chans=1,
        num_classes=5,
        pretrained_cfg_overlay=overlay,
    ).eval()
    torch.testing.assert_close(
        grey.forward_features(image[:, :1]),
        source.forward_features(image[:, :1].expand(-1, 3, -1, -1)),
        rtol=1e-3,
        atol=1e-3,
    )
    maps = timm.create_model(
        'groupmamba_official_tiny',
        pretrained=True,
        features_only=True,
        pretrained_cfg_overlay=overlay,
    ).eval()
    torch.testing.assert_close(maps(image)[-1], source.forward_features(image))


def test_no_file_runs_code(tmp_path):
    """By timm's argument for a file of its own format, and by the one for pretrained weights."""
    torch.save(dict(state_dict={}, x=RunsCode(tmp_path / 'ran')), tmp_path / 'evil.pth')
    file = str(tmp_path / 'evil.pth')
    with pytest.raises(Exception, match='weights_only'):
        timm.create_model('groupmamba_tiny', checkpoint_path=file)
    with pytest.raises(CheckpointError, match='run code'):
        timm.create_model(
            'groupmamba_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=file)
        )
    assert not (tmp_path / 'ran').exists()


def test_custom_options_reach_the_backbone():
    model = timm.create_model('groupmamba_tiny', num_groups=2, d_state=2, device='meta')
    assert model.backbone.stages[0][0].vsss.mamba.ssm.d_state == 2
