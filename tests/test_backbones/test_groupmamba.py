"""The backbone's options."""

import copy
import math

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from groupmamba_mm import GroupMamba
from groupmamba_mm.backbones import ARCHS
from groupmamba_mm.checkpoint import CheckpointError
from tests.conftest import SMALL, randomize


def image_of(*size, batch=2, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_registered_once_in_the_root_registry():
    assert MODELS.get('GroupMamba') is GroupMamba


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (32, 32), (33, 95), (100, 36)])
def test_strides_are_rounded_up_at_any_size(small_arch, size):
    backbone = GroupMamba(small_arch, out_indices=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        maps = backbone(image_of(*size))
    assert isinstance(maps, tuple)
    for stage, features in enumerate(maps):
        stride = 4 * 2**stage
        assert features.shape == (
            2,
            small_arch['embed_dims'][stage],
            -(-size[0] // stride),
            -(-size[1] // stride),
        )
        assert torch.isfinite(features).all()


def test_maps_are_contiguous_for_mmcvs_operators(small_arch):
    """mmcv's RoIAlign, for one, reads maps of another memory layout as if they had this one."""
    for features in GroupMamba(small_arch, out_indices=(0, 1, 2, 3))(image_of(64, 96)):
        assert features.is_contiguous()


def test_classifier_returns_one_vector_an_image(small_arch):
    features = GroupMamba(small_arch).eval()(image_of(1, 1))
    assert [f.shape for f in features] == [(2, small_arch['embed_dims'][-1])]


@pytest.mark.parametrize('out_indices', [None, (1, 2)])
@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(with_cp=True),
        dict(channel_affinity=False),
        dict(d_state=3),
        dict(share_directions=True),
        dict(num_groups=2),
        dict(num_groups=1),
        dict(directions=('left-right',)),
        dict(directions=('left-right', 'right-left')),
    ],
)
def test_every_parameter_gets_a_gradient(small_arch, out_indices, options):
    backbone = randomize(GroupMamba(small_arch, out_indices=out_indices, **options))
    maps = backbone(image_of(33, 48))
    sum((features * torch.randn_like(features)).sum() for features in maps).backward()
    # one token, one step from a zero state: nothing decays in the class block
    zero = {'summary.mixer.ss2d.ssm.A_log'}
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        if name in zero:
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad.abs().max() > 0, name


def test_eight_groups_where_the_widths_divide():
    arch = dict(SMALL['paper'], embed_dims=(8, 16, 24, 40))
    backbone = GroupMamba(
        arch, num_groups=8, directions=('left-right', 'right-left', 'top-bottom', 'bottom-top')
    )
    (plan,) = backbone.stages[0][0].vsss.mamba.plan
    assert plan == ('left-right', 'right-left', 'top-bottom', 'bottom-top') * 2
    assert backbone(image_of(32, 32))[0].shape == (2, 40)


def test_shared_directions_sum_the_scans(small_arch):
    """With one direction, sharing changes nothing; with two it is not the one nor the other."""
    shared = GroupMamba(small_arch, directions=('top-bottom',), share_directions=True).eval()
    plain = GroupMamba(small_arch, directions=('top-bottom',)).eval()
    both = GroupMamba(
        small_arch, directions=('top-bottom', 'left-right'), share_directions=True
    ).eval()
    for backbone in (plain, both):
        backbone.load_state_dict(randomize(shared).state_dict())
    image = image_of(32, 48)
    with torch.no_grad():
        assert torch.equal(shared(image)[0], plain(image)[0])
        assert not torch.allclose(shared(image)[0], both(image)[0])


def test_activation_checkpointing_gives_the_same_gradients(small_arch):
    grads, saved = [], []
    for with_cp in (False, True):
        backbone = randomize(
            GroupMamba(small_arch, drop_path_rate=0.5, with_cp=with_cp, out_indices=(0, 3))
        )
        sizes = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            loss = sum(f.square().mean() for f in backbone(image_of(64, 64)))
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in backbone.named_parameters()})
        saved.append(sum(sizes))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    assert saved[1] < saved[0] / 2  # it is real: most activations are not kept


def test_dense_backbone_builds_only_what_it_needs():
    dense = GroupMamba(SMALL['official'], out_indices=(0, 2))
    names = {name.split('.')[0] for name, _ in dense.named_parameters()}
    assert names == {'stem', 'stages', 'downsamples', 'out_norms'}
    assert set(dense.out_norms) == {'0', '2'}
    assert len(dense.stages) == 3
    # norm1 and norm2 stand in the path to stage 3
    assert [hasattr(d, 'pre_norm') for d in dense.downsamples] == [True, True]


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0, 1)])
def test_unused_classification_keys_are_exactly_the_announced_ones(small_arch, out_indices):
    dense = GroupMamba(small_arch, out_indices=out_indices)
    classifier = GroupMamba(small_arch)
    unused = set(classifier.state_dict()) - set(dense.state_dict())
    missing = set(dense.state_dict()) - set(classifier.state_dict())
    assert unused and missing
    assert all(any(keys.covers(k) for keys in dense.expected_unused_keys()) for k in unused)
    assert all(any(keys.covers(k) for keys in dense.expected_missing_keys()) for k in missing)
    assert not any(
        keys.covers(k) for keys in dense.expected_unused_keys() for k in dense.state_dict()
    )


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 3, 4])
def test_frozen_stages(small_arch, frozen_stages):
    backbone = GroupMamba(small_arch, frozen_stages=frozen_stages).train()
    for name, parameter in backbone.named_parameters():
        part, index = name.split('.')[:2]
        frozen = dict(
            stem=frozen_stages >= 0,
            stages=part == 'stages' and int(index) < frozen_stages,
            downsamples=part == 'downsamples' and int(index) + 1 < frozen_stages,
            summary=False,
        )[part]
        assert parameter.requires_grad is not frozen, name
    assert backbone.stem.training is (frozen_stages < 0)
    before = copy.deepcopy(backbone.state_dict())
    loss = backbone(image_of(64, 64))[0].square().mean()
    loss.backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], 0.1).step()
    changed = {n for n, t in backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert any(n.startswith('stem') for n in changed) is (frozen_stages < 0)
    assert any(n.startswith('summary') for n in changed)


def test_norm_eval_keeps_the_running_statistics(small_arch):
    for norm_eval in (False, True):
        backbone = GroupMamba(small_arch, norm_eval=norm_eval).train()
        bn = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
        before = bn.running_mean.clone()
        backbone(image_of(32, 32))
        assert torch.equal(bn.running_mean, before) is norm_eval


def test_drop_path_is_a_linear_ramp_over_the_layers(small_arch):
    backbone = GroupMamba(small_arch, drop_path_rate=0.4)
    rates = [block.drop_path.p for stage in backbone.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_layer_depth(small_arch):
    backbone = GroupMamba(small_arch, out_indices=(0, 1, 2, 3))
    depth = {
        name: backbone.get_layer_depth(f'backbone.{name}', 'backbone.')
        for name, _ in backbone.named_parameters()
    }
    assert {total for _, total in depth.values()} == {7}
    assert depth['stem.norm.weight'][0] == 0
    assert (
        depth[
            'stages.0.0.norm.weight'
            if small_arch['family'] == 'paper'
            else 'stages.0.0.norm2.weight'
        ][0]
        == 1
    )
    assert depth['downsamples.1.norm.weight'][0] == 3
    assert depth['downsamples.2.norm.weight'][0] == 5
    assert depth['out_norms.3.weight'][0] == 6
    assert backbone.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)
    assert {d for d, _ in depth.values()} == set(range(7))


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    backbone = GroupMamba('official-tiny')
    for module in backbone.modules():  # any other values, to see that all are set
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 7.0)
    backbone.init_weights()
    state = backbone.state_dict()
    assert not any((t == 7.0).all() for t in state.values() if t.is_floating_point())
    block = 'stages.3.1'
    assert state[f'{block}.ffn.fc1.weight'].std() == pytest.approx(0.02, rel=0.03)
    assert state[f'{block}.mixer.ss2d.in_proj.weight'].std() == pytest.approx(0.02, rel=0.03)
    assert not state[f'{block}.ffn.fc1.bias'].any()
    # fan_out: 9 taps x 448 channels; within a group of a depthwise convolution 9 x 1
    assert state['downsamples.2.convs.weight'].std() == pytest.approx(
        (2 / 9 / 448) ** 0.5, rel=0.03
    )
    assert state[f'{block}.ffn.dwconv.weight'].std() == pytest.approx((2 / 9) ** 0.5, rel=0.03)
    ssm = f'{block}.mixer.ss2d.ssm'
    dt = torch.nn.functional.softplus(state[f'{ssm}.dt_proj_bias'])
    assert 1e-3 <= dt.min() and dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2)
    assert not state[f'{ssm}.A_log'].any() and (state[f'{ssm}.D'] == 1).all()
    assert state[f'{ssm}.dt_proj_weight'].abs().max() <= 7**-0.5  # rank ceil(112 / 16)
    assert state[f'{ssm}.x_proj_weight'].abs().max() <= 112**-0.5


def test_a_log_counts_the_states():
    state = GroupMamba(SMALL['paper'], d_state=3).state_dict()
    a_log = state['stages.0.0.vsss.mamba.ssm.A_log']
    torch.testing.assert_close(a_log[0, 0].exp(), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize('arch', sorted(ARCHS))
def test_full_sizes_run_forward_on_a_non_square_image(arch):
    backbone = GroupMamba(arch).eval()
    with torch.no_grad():
        (feature,) = backbone(image_of(32, 64, batch=1))
    assert feature.shape == (1, ARCHS[arch].embed_dims[-1]) and torch.isfinite(feature).all()


def test_pretrained_init_cfg_loads_a_classifier_and_refuses_another_size(small_arch, tmp_path):
    classifier = randomize(GroupMamba(small_arch))
    path = str(tmp_path / 'cls.pth')
    torch.save(
        {'state_dict': {f'backbone.{k}': v for k, v in classifier.state_dict().items()}}, path
    )
    init_cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    dense = GroupMamba(small_arch, out_indices=(0, 1, 2, 3), init_cfg=init_cfg)
    dense.init_weights()
    for name, tensor in dense.state_dict().items():
        if not name.startswith('out_norms'):
            assert torch.equal(tensor, classifier.state_dict()[name]), name
    other = GroupMamba(dict(small_arch, embed_dims=(16, 24, 32, 40)), init_cfg=init_cfg)
    with pytest.raises(CheckpointError, match='does not fit'):
        other.init_weights()
    lost_prefix = GroupMamba(small_arch, init_cfg=dict(init_cfg, prefix='wrong.'))
    with pytest.raises(CheckpointError, match="begins with 'wrong.'"):
        lost_prefix.init_weights()


def test_compile_mode_compiles_the_call_and_nothing_else(monkeypatch, small_arch):
    calls = []

    def compile_(function, **options):
        calls.append(options)
        return lambda *args: (calls.append('run'), function(*args))[1]

    monkeypatch.setattr(torch, 'compile', compile_)
    plain = GroupMamba(small_arch)
    assert calls == []
    compiled = GroupMamba(small_arch, compile_mode='reduce-overhead')
    assert calls == [dict(mode='reduce-overhead', dynamic=False)]
    compiled.load_state_dict(plain.state_dict())
    assert list(compiled.state_dict()) == list(plain.state_dict())
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(compiled(image), plain(image))
    assert calls[1:] == []  # a CPU gains nothing
    monkeypatch.setattr(GroupMamba, '_runs_compiled', lambda self, image: self.training)
    torch.testing.assert_close(compiled(image), plain(image))
    assert calls[1:] == ['run']
    torch.testing.assert_close(copy.deepcopy(compiled)(image), plain(image))  # as EMA makes one
    compiled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(compiled.eval()(image), plain.eval()(image))
    assert calls[1:] == ['run']  # validation runs as without it, and copies are not compiled


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(arch='huge'), "unknown arch 'huge'; choose from .*'official-base'"),
        (dict(arch=dict(SMALL['paper'], family='swin')), "unknown family 'swin'"),
        (dict(arch=dict(family='paper')), r"missing fields \['depths', 'embed_dims'"),
        (dict(arch=dict(SMALL['paper'], depths=(1, 1))), 'one value for each stage'),
        (dict(arch=dict(SMALL['paper'], depths=(1, 0, 1, 1))), 'depths must be positive whole'),
        (dict(num_groups=3), '8 channels cannot be divided into 3 groups'),
        (dict(num_groups=0), 'num_groups must be at least 1, got 0'),
        (dict(directions=('diagonal',)), "unknown scan direction 'diagonal'"),
        (dict(num_groups=2, directions=('left-right',) * 4), '4 directions cannot be shared out'),
        (dict(scan_backend='cuda'), "unknown scan backend 'cuda'"),
        (dict(out_indices=(0, 4)), r'out_indices must be .* got \(0, 4\)'),
        (dict(out_indices=()), 'out_indices must be'),
        (dict(frozen_stages=5), 'frozen_stages must be -1 .* got 5'),
        (dict(drop_path_rate=1.0), r'drop_path_rate must be in \[0, 1\), got 1.0'),
        (dict(d_state=0), 'd_state must be at least 1, got 0'),
        (dict(compile_mode='fast'), "compile_mode must be one of .* got 'fast'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GroupMamba(**{'arch': SMALL['paper'], **options})


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32)])
def test_wrong_input_rank_or_channels(small_arch, shape):
    with pytest.raises(ValueError, match=r'images of shape \(B, 3, H, W\), got'):
        GroupMamba(small_arch)(torch.zeros(shape))
