"""Both families against the authors' numbers and against an independent, slow fp64 model."""

import pytest
import torch

from groupmamba_mm import GroupMamba
from groupmamba_mm.checkpoint.official import convert_official
from tests import reference_models
from tests.conftest import SMALL, randomize

FIXTURE_ARCH = dict(
    family='official',
    stem_channels=16,
    embed_dims=(32, 48, 68, 96),
    depths=(1, 1, 2, 1),
    ffn_ratios=(8, 8, 4, 4),
)
TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures('no_tf32')


def official_state(backbone, num_classes=10, seed=0):
    """A state dict in the released names that fits ``backbone``, from the shapes the release has.

    The names are spelt out here, not produced by the converter under test.
    """
    gen = torch.Generator().manual_seed(seed)
    arch = backbone.arch
    state = {}

    def add(name, *shape, scale=None, shift=0.0):
        noise = torch.randn(*shape, generator=gen, dtype=torch.float64)
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1
        state[name] = shift + noise * (scale if scale is not None else fan_in**-0.5)

    def add_norm(name, width):
        add(f'{name}.weight', width, scale=0.3, shift=1.0)
        add(f'{name}.bias', width, scale=0.3)

    def add_layer(name, *shape, bias=True):
        add(f'{name}.weight', *shape)
        if bias:
            add(f'{name}.bias', shape[0], scale=0.3)

    def add_mixer(name, dim):
        width, rank = dim // 4, -(-(dim // 4) // 16)
        add(f'{name}.skip_scale', 1, scale=0.1, shift=1.0)
        add_layer(f'{name}.fc1', max(1, dim // 16), dim)
        add_layer(f'{name}.fc2', dim, max(1, dim // 16))
        add_norm(f'{name}.norm', dim)
        add_layer(f'{name}.proj', dim, dim)
        for unit in (f'{name}.mamba_g{i}' for i in (1, 2, 3, 4)):
            add(f'{unit}.x_proj_weight', 1, rank + 2, width)
            add(f'{unit}.dt_projs_weight', 1, width, rank)
            add(f'{unit}.dt_projs_bias', 1, width, scale=1.0, shift=-2.0)
            add(f'{unit}.A_logs', width, 1, scale=0.5)
            add(f'{unit}.Ds', width, scale=0.3, shift=1.0)
            add_norm(f'{unit}.out_norm', width)
            add_layer(f'{unit}.in_proj', 2 * width, width, bias=False)
            add_layer(f'{unit}.conv2d', width, 1, 3, 3)
            add_layer(f'{unit}.out_proj', width, width, bias=False)

    stem = arch.stem_channels
    for layer, (inputs, kernel) in {0: (3, 7), 3: (stem, 3), 6: (stem, 3)}.items():
        add_layer(f'patch_embed1.conv.{layer}', stem, inputs, kernel, kernel, bias=False)
        bn = f'patch_embed1.conv.{layer + 1}'
        add_norm(bn, stem)
        add(f'{bn}.running_mean', stem, scale=0.3)
        state[f'{bn}.running_var'] = 0.5 + torch.rand(stem, generator=gen, dtype=torch.float64)
        state[f'{bn}.num_batches_tracked'] = torch.tensor(7)
    before = stem
    for stage, (dim, depth, ratio) in enumerate(
        zip(arch.embed_dims, arch.depths, arch.ffn_ratios), 1
    ):
        add_layer(f'patch_embed{stage}.proj', dim, before, 3, 3)
        add_norm(f'patch_embed{stage}.norm', dim)
        for block in (f'block{stage}.{i}' for i in range(depth)):
            add_norm(f'{block}.norm2', dim)
            add_mixer(f'{block}.attn', dim)
            add_layer(f'{block}.mlp.fc1', dim * ratio, dim)
            add_layer(f'{block}.mlp.dwconv.dwconv', dim * ratio, 1, 3, 3)
            add_layer(f'{block}.mlp.fc2', dim, dim * ratio)
        add_norm(f'norm{stage}', dim)
        before = dim
    post, ratio = 'post_network.0', arch.ffn_ratios[-1]
    add_norm(f'{post}.norm1', before)
    add_norm(f'{post}.norm2', before)
    add_mixer(f'{post}.attn', before)
    add_layer(f'{post}.mlp.fc1', before * ratio, before)
    add_layer(f'{post}.mlp.fc2', before, before * ratio)
    add_layer('head', num_classes, before)
    add_layer('dist_head', num_classes, before)
    return state


def load_official(backbone, state):
    """Load released tensors into a backbone; returns the two heads' (weight, bias)."""
    ours = convert_official(state)
    prefix = 'backbone.'
    result = backbone.load_state_dict(
        {k[len(prefix) :]: v for k, v in ours.items() if k.startswith(prefix)}
    )
    assert not result.missing_keys and not result.unexpected_keys
    return [
        (ours[f'head.{name}.weight'], ours[f'head.{name}.bias'])
        for name in ('label_fc', 'teacher_fc')
    ]


def stage_outputs(backbone):
    """Collect the output of each stage's last block in a list that forward fills."""
    outputs = []
    for stage in backbone.stages:
        stage[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


def close(ours, expected, tolerance=TOLERANCE):
    """Largest error against the tolerance, scaled for tensors whose values exceed 1."""
    scale = max(1.0, expected.abs().max().item())
    error = (ours - expected).abs().max().item()
    assert error <= tolerance * scale, f'error {error:.2e} at scale {scale:.2e}'


on_devices = pytest.mark.parametrize(
    'device, backend, tolerance',
    [
        ('cpu', 'torch', TOLERANCE),
        pytest.param(
            'cuda',
            'triton',
            1e-3,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU'),
            ],
        ),
    ],
)


@on_devices
def test_parity_with_the_released_code_in_eval_mode(parity, device, backend, tolerance):
    backbone = GroupMamba(FIXTURE_ARCH, scan_backend=backend).eval()
    heads = load_official(backbone, parity['state_dict'])
    outputs = stage_outputs(backbone)
    with torch.no_grad():
        feature = backbone.to(device)(parity['input'].to(device))[0].cpu()
    logits = sum(torch.nn.functional.linear(feature, *head) for head in heads) / 2
    close(logits, parity['eval_logits'], tolerance)
    assert len(outputs) == len(parity['block_outputs']) == 4
    for ours, expected in zip(outputs, parity['block_outputs']):
        close(ours.cpu(), expected, tolerance)


@on_devices
def test_parity_with_the_released_code_in_training(parity, device, backend, tolerance):
    backbone = GroupMamba(FIXTURE_ARCH, scan_backend=backend).train()
    heads = load_official(backbone, parity['state_dict'])
    heads = [[tensor.clone().requires_grad_() for tensor in head] for head in heads]
    image = parity['train_input'].clone().requires_grad_()
    feature = backbone.to(device)(image.to(device))[0].cpu()
    label, teacher = (torch.nn.functional.linear(feature, *head) for head in heads)
    close(label, parity['train_head'], tolerance)
    close(teacher, parity['train_dist_head'], tolerance)
    (label.square().mean() + teacher.square().mean()).backward()
    close(image.grad, parity['train_input_grad'], tolerance)
    ours = {f'backbone.{k}': p.grad.cpu() for k, p in backbone.named_parameters()}
    for name, head in zip(('label_fc', 'teacher_fc'), heads):
        ours[f'head.{name}.weight'], ours[f'head.{name}.bias'] = (t.grad for t in head)
    expected = convert_official(parity['train_param_grads'])
    assert ours.keys() == expected.keys()
    for name in expected:
        close(ours[name], expected[name], tolerance)


@pytest.mark.parametrize('size', [(33, 65), (64, 32), (7, 90)])
@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_official_family_against_the_reference_model(size, dtype, tolerance):
    backbone = GroupMamba(SMALL['official']).to(dtype).eval()
    state = official_state(backbone)
    heads = load_official(backbone, state)
    image = torch.randn(
        2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    _expected, expected_heads, stages = reference_models.official_forward(image, state)
    outputs = stage_outputs(backbone)
    with torch.no_grad():
        (feature,) = backbone(image.to(dtype))
    assert feature.dtype == dtype
    for ours, stage in zip(outputs, stages):
        close(ours, stage.flatten(1, 2).to(dtype), tolerance)
    for head, target in zip(heads, expected_heads):
        weight, bias = (tensor.to(dtype) for tensor in head)
        close(torch.nn.functional.linear(feature, weight, bias), target.to(dtype), tolerance)


@pytest.mark.parametrize('size', [(33, 65), (64, 32), (7, 90)])
@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_paper_family_against_the_reference_model(size, dtype, tolerance):
    backbone = randomize(GroupMamba(SMALL['paper']).double()).eval()
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    image = torch.randn(
        2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    expected, stages = reference_models.paper_forward(image, state)
    outputs = stage_outputs(backbone)
    with torch.no_grad():
        (feature,) = backbone.to(dtype)(image.to(dtype))
    assert feature.dtype == dtype
    for ours, stage in zip(outputs, stages):
        close(ours, stage.flatten(1, 2).to(dtype), tolerance)
    close(feature, expected.to(dtype), tolerance)


@pytest.mark.parametrize('family', ['paper', 'official'])
def test_input_gradient_against_the_reference_model_on_non_square_input(family):
    backbone = GroupMamba(SMALL[family]).double().eval()
    if family == 'official':
        state = official_state(backbone)
        load_official(backbone, state)
    else:
        state = {k: v.clone() for k, v in randomize(backbone).state_dict().items()}
    image = torch.randn(
        1, 3, 20, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    grads = []
    for forward in (
        lambda x: stages_of(backbone, x),
        lambda x: getattr(reference_models, f'{family}_forward')(x, state)[-1],
    ):
        leaf = image.clone().requires_grad_()
        loss = sum(stage.square().mean() for stage in forward(leaf))
        grads.append(torch.autograd.grad(loss, leaf)[0])
    close(grads[0], grads[1], 1e-10)


def stages_of(backbone, image):
    outputs = stage_outputs(backbone)
    backbone(image)
    return outputs


@pytest.mark.parametrize('family', ['paper', 'official'])
def test_parameter_gradients_against_finite_differences(family):
    """One random direction through all parameters at once, H != W."""
    backbone = randomize(GroupMamba(SMALL[family]).double()).eval()
    image = torch.randn(
        1, 3, 33, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    gen = torch.Generator().manual_seed(4)
    params = list(backbone.parameters())
    steps = [torch.randn(p.shape, generator=gen, dtype=torch.float64) for p in params]

    weight = torch.randn(1, SMALL[family]['embed_dims'][-1], generator=gen, dtype=torch.float64)

    def loss():
        return (backbone(image)[0] * weight).sum()

    grads = torch.autograd.grad(loss(), params)
    slope = sum((g * s).sum() for g, s in zip(grads, steps)).item()
    values = []
    eps = 1e-7
    with torch.no_grad():
        for sign in (1, -2):
            for p, step in zip(params, steps):
                p.add_(step, alpha=sign * eps)
            values.append(loss().item())
    numeric = (values[0] - values[1]) / (2 * eps)
    assert abs(numeric - slope) <= 1e-5 * abs(slope)
