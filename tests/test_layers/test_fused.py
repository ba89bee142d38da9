"""Blocks from fused kernels against the plain blocks of the same weights."""

import copy

import pytest
import torch
from torch import nn

from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.errors import BackendError
from groupmamba_mm.layers import fused
from groupmamba_mm.ops import MIRRORED_DIRECTIONS, register_direction
from groupmamba_mm.ops.selective_scan import directions
from tests.kernel_testing import gpu, needs_triton

pytestmark = [pytest.mark.usefixtures('no_tf32'), needs_triton]

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

#: One stage, ragged widths: what the interpreter takes seconds for.
TINY = {
    family: dict(family=family, stem_channels=4, embed_dims=(12,), depths=(1,), ffn_ratios=(2,))
    for family in ('paper', 'official')
}


def build(arch, backend='torch', **options):
    torch.manual_seed(0)
    model = GroupMamba(arch=arch, scan_backend=backend, **options)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that do something
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE)


def with_backend(model, backend):
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, 'scan_backend'):
            module.scan_backend = backend
    return model


def gradients(model, image, precision=None):
    image = image.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=precision or torch.bfloat16, enabled=precision is not None):
        outputs = model(image)
    loss = sum(
        (y.float() * torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).sin()).sum()
        for y in outputs
    )
    loss.backward()
    return {
        'output': outputs[-1].detach(),
        'image': image.grad,
        **{name: p.grad for name, p in model.named_parameters()},
    }


def compare(model, image, tolerance, precision=None, without=()):
    truth = gradients(with_backend(model, 'torch'), image)
    results = gradients(with_backend(model, 'triton'), image, precision)
    assert all(truth.pop(name) is None and results[name] is None for name in without)
    largest = max(t.norm().item() for t in truth.values())
    for name, expected in truth.items():
        error = (results[name].double() - expected.double()).norm().item()
        # a norm after it makes skip_scale's gradient nearly vanish: measured by the others' size
        allowed = tolerance * max(expected.norm().item(), 1e-3 * largest)
        assert error <= allowed, f'{name}: {error:.1e} of {expected.norm().item():.1e}'


def check_error_of_autocast(model, image):
    """The error of all gradients together, against fp32: not more than with plain blocks."""
    truth = gradients(with_backend(model, 'torch'), image)

    def error(backend):
        results = gradients(with_backend(model, backend), image, torch.bfloat16)
        return sum((results[name].float() - truth[name]).square().sum() for name in truth).sqrt()

    assert error('triton') < 1.25 * error('torch')


@pytest.mark.parametrize('family', TINY)
def test_agrees_with_the_plain_blocks(family):
    compare(build(TINY[family]), torch.randn(1, 3, 12, 8, device=DEVICE), 1e-4)


@pytest.mark.parametrize('family', TINY)
def test_without_channel_affinity_and_shared_directions(family):
    image = torch.randn(1, 3, 8, 4, device=DEVICE)
    compare(build(TINY[family], channel_affinity=False), image, 1e-4)
    compare(build(TINY[family], share_directions=True, out_indices=(0,)), image, 1e-4)


@pytest.mark.parametrize('family', TINY)
def test_the_readings_from_the_other_corners(family):
    image = torch.randn(1, 3, 8, 12, device=DEVICE)
    model = build(TINY[family], directions=MIRRORED_DIRECTIONS, out_indices=(0,))
    compare(model, image, 1e-4)


@pytest.mark.parametrize('family', TINY)
def test_a_direction_of_ones_own_runs_module_by_module(family, monkeypatch, caplog):
    fused._reported.clear()
    monkeypatch.setattr(directions, '_registry', dict(directions._registry))
    register_direction(
        'from the right',
        lambda height, width: torch.arange(height * width).view(height, width).flip(1).flatten(),
    )
    image, names = torch.randn(1, 3, 8, 12, device=DEVICE), ('from the right', 'left-right')
    model = build(TINY[family], directions=names, out_indices=(0,))
    compare(model, image, 1e-4)
    assert 'the kernels do not know all of the directions' in caplog.text
    known = build(TINY[family], directions=(MIRRORED_DIRECTIONS[0], 'left-right'), out_indices=(0,))
    known.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(image)[0], known(image)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_residual_in_the_precision_of_autocast(backend):
    image, kept, rounded = torch.randn(1, 3, 8, 8, device=DEVICE), [], []
    arch = dict(TINY['official'], depths=(2,))
    for seen, options in ((kept, {}), (rounded, dict(residual_in_fp32=False))):
        model = build(arch, backend, **options).eval()
        exact = model(image)[0]
        model.stages[0][0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            seen.append(model(image)[0])
        assert (seen[1].float() - exact).norm() < 0.05 * exact.norm()
    assert rounded[0] == torch.bfloat16
    if DEVICE == 'cuda':  # the CPU's autocast does not keep LayerNorms in fp32
        assert kept[0] == torch.float32
        assert not torch.equal(kept[1].float(), rounded[1].float())


def test_drop_path_drops_whole_samples():
    arch = dict(TINY['official'], depths=(2,))
    block = build(arch, 'triton', drop_path_rate=0.5).stages[0][1].train()
    assert block.drop_path.p == pytest.approx(0.5)
    x = torch.randn(16, 2, 12, device=DEVICE)
    torch.manual_seed(0)
    with torch.no_grad():
        unchanged = (block(x, (2, 1)) == x).flatten(1).all(1)
    assert 0 < unchanged.sum() < 16
    block.eval()
    assert not (block(x, (2, 1)) == x).flatten(1).all(1).any()


def test_mixer_and_ffn_are_dropped_independently(monkeypatch):
    block = build(TINY['official'], 'triton').stages[0][0].train()
    block.drop_path.p = 0.5
    drawn = []
    draw = fused.draw_drop_path
    monkeypatch.setattr(fused, 'draw_drop_path', lambda *args: drawn.extend(draw(*args)) or drawn)
    with torch.no_grad():
        block(torch.randn(16, 2, 12, device=DEVICE), (2, 1))
    mixer, ffn = drawn
    assert {0.0, 2.0} == set(mixer.tolist()) == set(ffn.tolist())
    assert not torch.equal(mixer, ffn)


@pytest.mark.parametrize('family', TINY)
def test_one_graph_for_compile_and_export(family):
    torch.compiler.reset()
    model = build(TINY[family], 'triton', drop_path_rate=0.1).train()
    image = torch.randn(1, 3, 4, 4, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    compiled(image)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    exported = torch.export.export(model, (image,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(image)[0], model(image)[0])


def test_activation_checkpointing_gives_the_same_gradients():
    image = torch.randn(1, 3, 8, 4, device=DEVICE)
    plain = gradients(build(TINY['official'], 'triton'), image)
    recomputed = gradients(build(TINY['official'], 'triton', with_cp=True), image)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def build_of_groups_alone(monkeypatch, **options):
    """The paper's stage with the kernels of wide groups, and tokens that stay fp32 under autocast,
    as on a GPU: the CPU's does not keep LayerNorms in it."""
    from groupmamba_mm.ops.blocks import paper

    monkeypatch.setattr(paper, 'NARROWEST_GROUP', 1)
    monkeypatch.setattr(paper, 'NARROWEST_LINEAR_GROUP', 1)
    model = build(dict(TINY['paper'], depths=(3,)), **options)
    model.stages[0][0].register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    return model


def test_groups_by_themselves(monkeypatch):
    from groupmamba_mm.ops.blocks import paper

    calls = []
    for name in ('add_norm_forward', 'group_linear_forward', 'residual_ffn_forward'):

        def noted(*args, name=name, run=getattr(paper, name), **kwargs):  # noqa: B008
            calls.append((name, kwargs.get('wants_rounded')))
            return run(*args, **kwargs)

        monkeypatch.setattr(paper, name, noted)
    model, image = build_of_groups_alone(monkeypatch), torch.randn(2, 3, 16, 8, device=DEVICE)
    compare(model, image, 1e-4)  # fp32 has no such kernels
    assert {name for name, _ in calls} == {'add_norm_forward'}
    check_error_of_autocast(model, image)
    # of three layers the first is hooked, so that it hands on no branch
    assert calls.count(('add_norm_forward', True)) == 1
    assert calls.count(('group_linear_forward', None)) == 3
    assert calls.count(('residual_ffn_forward', None)) == 3


def test_checkpoints_of_groups_by_themselves(monkeypatch):
    image = torch.randn(1, 3, 8, 4, device=DEVICE)
    plain, recomputed = (
        gradients(
            build_of_groups_alone(monkeypatch, backend='triton', with_cp=with_cp),
            image,
            torch.bfloat16,
        )
        for with_cp in (False, True)
    )
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


class Doubled(nn.Linear):
    """A layer as a user would put in another's place."""

    def forward(self, x):
        return 2 * super().forward(x)


WATCHERS = {
    'forward hook': lambda layer, parent: layer.register_forward_hook(lambda *args: 2 * args[2]),
    'pre-hook': lambda layer, parent: layer.register_forward_pre_hook(
        lambda _, args: (2 * args[0],)
    ),
    'patched forward': lambda layer, parent: setattr(
        layer, 'forward', lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    ),
    'another type': lambda layer, parent: setattr(
        parent, 'fc1', Doubled(layer.in_features, layer.out_features).to(DEVICE)
    ),
    'parametrized': lambda layer, parent: nn.utils.parametrize.register_parametrization(
        layer, 'weight', nn.Softplus()
    ),
    'without bias': lambda layer, parent: setattr(layer, 'bias', None),
}


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('watcher', WATCHERS)
def test_what_somebody_hooked_or_replaced_counts(family, watcher, caplog):
    """Kernels read parameters past the submodules, so a block with such a one runs plainly."""
    model, image = build(TINY[family]), torch.randn(2, 3, 8, 4, device=DEVICE)
    with torch.no_grad():
        before = with_backend(model, 'triton')(image)[0]
    ffn = model.stages[0][0].ffn
    WATCHERS[watcher](ffn.fc1, ffn)
    fused._reported.clear()
    with torch.no_grad():
        expected = model(image)[0]
        torch.manual_seed(0)
        got = with_backend(model, 'triton')(image)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, before, atol=1e-3)
    assert 'ffn.fc1' in caplog.text and 'module by module' in caplog.text


def test_hooks_of_blocks_see_tensors():
    model = build(dict(TINY['official'], depths=(3,)), 'triton')
    image, seen = torch.randn(1, 3, 8, 4, device=DEVICE), []
    with torch.no_grad():
        expected = model(image)[0]
        model.stages[0][1].register_forward_hook(lambda *args: seen.append(args[2]))
        model.stages[0][1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        torch.testing.assert_close(model(image)[0], expected)
    assert [type(tensor) for tensor in seen] == [torch.Tensor] * 2


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize(
    'change',
    [lambda p: p.mul_(1.5), lambda p: p.data.mul_(1.5), lambda p: setattr(p, 'data', 1.5 * p.data)],
    ids=['in place', 'by data', 'other memory'],
)
def test_a_changed_weight_is_noticed(family, change):
    model, image = build(TINY[family], 'triton').eval(), torch.randn(1, 3, 8, 4, device=DEVICE)
    with torch.no_grad():
        before = model(image)[0]
        for name, parameter in model.stages.named_parameters():
            if name.endswith(('fc2.weight', 'in_proj.weight')):
                change(parameter)
        after = model(image)[0]
        assert not torch.allclose(before, after, atol=1e-3)
        torch.testing.assert_close(
            after, with_backend(model, 'torch')(image)[0], atol=1e-4, rtol=1e-4
        )


def test_fp64_has_no_kernels():
    model = build(TINY['official'], 'triton').double()
    with pytest.raises(BackendError, match='fp64'):
        model(torch.randn(1, 3, 4, 4, device=DEVICE, dtype=torch.float64))


full_sizes = pytest.mark.parametrize(
    'arch', [pytest.param(arch, marks=gpu) for arch in ('tiny', 'official-tiny', 'official-base')]
)


@full_sizes
def test_full_size(arch):
    compare(build(arch), torch.randn(2, 3, 96, 160, device=DEVICE), 1e-4)


@pytest.mark.parametrize('family', [pytest.param(family, marks=gpu) for family in TINY])
@pytest.mark.parametrize(
    'options',
    [
        dict(share_directions=True),
        dict(num_groups=1, directions=('top-bottom',)),
        dict(num_groups=2, d_state=3),
        dict(channel_affinity=False, out_indices=(0, 1)),
        dict(frozen_stages=1, with_cp=True),
    ],
    ids=str,
)
def test_options(family, options):
    """On a GPU, where PyTorch's convolutions choose other memory layouts than on a CPU."""
    arch = dict(TINY[family], embed_dims=(24, 36), depths=(1, 2), ffn_ratios=(2, 2))
    model, image = build(arch, **options), torch.randn(2, 3, 40, 56, device=DEVICE)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    compare(model, image, 1e-4, without=frozen)


@full_sizes
def test_autocast_loses_no_more_than_with_plain_blocks(arch):
    check_error_of_autocast(build(arch), torch.randn(2, 3, 96, 160, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA GPU')
@pytest.mark.parametrize('arch', ['tiny', 'official-tiny'])
def test_compiled_with_cuda_graphs(arch):
    torch.compiler.reset()
    model = nn.Sequential(build(arch, 'triton', out_indices=(0, 1, 2, 3)))
    image = torch.randn(2, 3, 64, 96, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, mode='reduce-overhead')
    with torch.no_grad():
        for _ in range(3):
            for got, expected in zip(compiled(image), model(image)):
                torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
