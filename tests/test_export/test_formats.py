"""Exported files compute what PyTorch computes, at sizes they were not recorded with."""

import json

import pytest
import torch

from groupmamba_mm import create_model
from groupmamba_mm.checkpoint import CheckpointError
from groupmamba_mm.errors import ConfigError, ExportError
from groupmamba_mm.export import export_model, exported_module
from groupmamba_mm.export.formats import TorchExportFormat
from groupmamba_mm.layers.grouped import grouped_linear
from groupmamba_mm.models.pretrained import load_pretrained
from groupmamba_mm.ops.selective_scan.recurrence import recorded_recurrence, recurrence
from tests.conftest import REPO, SMALL, load_tool, randomize

#: Two stages of one layer: what a graph costs is paid for each layer.
TWO = {
    family: dict(arch, embed_dims=arch['embed_dims'][:2], depths=(1, 1), ffn_ratios=(2, 2))
    for family, arch in SMALL.items()
}
#: One stage, for sizes that are symbols: those cost many times more.
ONE = dict(SMALL['official'], embed_dims=(8,), depths=(1,), ffn_ratios=(2,))


def export(arch, kind, path, size=(32, 32), fixed=True, **options):
    module, names = exported_module(randomize(create_model(arch, num_classes=5, **options)))
    return export_model(module, names, kind, path, size, fixed, dict(config='small.py'))


@pytest.mark.parametrize('length', [1, 2, 8, 9, 64, 65, 200, 513, 4097])
def test_recorded_recurrence_is_the_recurrence(length):
    gen = torch.Generator().manual_seed(length)
    log_a = -3 * torch.rand(2, length, 3, 2, dtype=torch.float64, generator=gen)
    b = torch.randn(2, length, 3, 2, dtype=torch.float64, generator=gen)
    torch.testing.assert_close(recorded_recurrence(log_a, b), recurrence(log_a.exp(), b))
    strong = recorded_recurrence(1e4 * log_a, b)  # products that underflow
    torch.testing.assert_close(strong, recurrence((1e4 * log_a).exp(), b))


@pytest.mark.parametrize('length', [1, 2, 7, 50, 65, 1000])
def test_onnx_recurrence_is_the_recurrence(length):
    onnxruntime = pytest.importorskip('onnxruntime')
    from onnxscript import FLOAT

    from groupmamba_mm.export import onnx_functions

    kind = FLOAT['B', 'L', 'D', 'N']
    model = onnx_functions.recurrence.to_model_proto(input_types=[kind, kind], output_types=[kind])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    gen = torch.Generator().manual_seed(length)
    log_a = -torch.rand(2, length, 3, 2, generator=gen)
    b = torch.randn(2, length, 3, 2, generator=gen)
    (out,) = session.run(None, dict(log_a=log_a.numpy(), b=b.numpy()))
    torch.testing.assert_close(torch.from_numpy(out), recurrence(log_a.exp(), b))


@pytest.mark.filterwarnings('ignore')
def test_onnx_functions_are_pytorchs_operators(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    from groupmamba_mm.export.onnx_functions import TRANSLATIONS

    class Operators(torch.nn.Module):
        def forward(self, x, weight):
            y = torch.nn.functional.softplus(grouped_linear(x, weight))
            return y, torch.einsum('blgo,goi->bi', y, weight)

    gen = torch.Generator().manual_seed(0)
    x, weight = 30 * torch.randn(2, 7, 3, 5, generator=gen), torch.randn(3, 4, 5, generator=gen)
    program = torch.onnx.export(
        Operators(), (x, weight), dynamo=True, verbose=False, custom_translation_table=TRANSLATIONS
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(
        None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), (x, weight))}
    )
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count('Einsum') == 1 and 'Softplus' not in kinds
    for output, wanted in zip(found, Operators()(x, weight)):
        assert wanted.max() > 100  # where exp(x) alone would overflow
        torch.testing.assert_close(torch.from_numpy(output), wanted)


@pytest.mark.parametrize('family', sorted(TWO))
def test_onnx_of_one_size(family, tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    result = export(TWO[family], 'onnx', path)
    assert result.differences.keys() == {(1, 3, 32, 32)}
    model = onnx.load(path)
    assert {entry.domain for entry in model.opset_import} == {''}  # standard operators alone
    assert {p.key: p.value for p in model.metadata_props}['config'] == 'small.py'
    larger = tmp_path / 'larger.onnx'
    export(TWO[family], 'onnx', larger, size=(96, 64))
    kinds = [[node.op_type for node in onnx.load(file).graph.node] for file in (path, larger)]
    assert len(kinds[0]) == len(kinds[1])
    with pytest.raises(CheckpointError, match='exists'):
        export(TWO[family], 'onnx', path)


@pytest.mark.slow
def test_onnx_of_any_size(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    result = export(ONE, 'onnx', path, size=(56, 40), fixed=False)
    assert len(result.differences) == 4 and max(result.differences.values()) < 1e-4
    module, _ = exported_module(randomize(create_model(ONE, num_classes=5)))
    session = onnxruntime.InferenceSession(str(path))
    for shape in ((1, 3, 9, 17), (4, 3, 130, 33)):
        image = torch.randn(shape)
        found = torch.from_numpy(session.run(None, dict(image=image.numpy()))[0])
        torch.testing.assert_close(found, module(image), rtol=1e-3, atol=1e-4)


def test_program_of_a_dense_backbone(tmp_path):
    arch = TWO['paper']
    backbone = randomize(create_model(arch, features_only=True, out_indices=(0, 1)))
    module, names = exported_module(backbone)
    assert module is backbone and names == ('stage1', 'stage2')
    path = tmp_path / 'backbone.pt2'
    result = export_model(module, names, 'torch-export', path, (32, 48), True, {})
    assert max(result.differences.values()) < 1e-5
    program = torch.export.load(str(path))
    assert not [node for node in program.graph.nodes if 'groupmamba' in str(node.target)]


@pytest.mark.slow
def test_program_of_any_size(tmp_path):
    result = export(ONE, 'torch-export', tmp_path / 'a.pt2', size=(48, 64), fixed=False)
    assert len(result.differences) == 4


def test_safetensors_load_again(tmp_path):
    path = tmp_path / 'a.safetensors'
    export(SMALL['paper'], 'safetensors', path)
    other = create_model(SMALL['paper'], num_classes=5)
    assert load_pretrained(other, path).complete
    expected = randomize(create_model(SMALL['paper'], num_classes=5)).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())


def test_a_file_that_computes_something_else_is_removed(tmp_path, monkeypatch):
    wrong = TorchExportFormat.load
    monkeypatch.setattr(
        TorchExportFormat,
        'load',
        lambda self, path: lambda image: [1.001 * output for output in wrong(self, path)(image)],
    )
    with pytest.raises(ExportError, match='differs from PyTorch by 1.0e-03'):
        export(TWO['paper'], 'torch-export', tmp_path / 'a.pt2')
    assert not (tmp_path / 'a.pt2').exists()


def test_models_on_other_backbones_are_refused():
    with pytest.raises(ConfigError, match='the backbone is Linear'):
        exported_module(torch.nn.Linear(1, 1))


@pytest.mark.filterwarnings('ignore')
def test_torchscript_traces_and_its_exporter_are_right(small_arch, tmp_path):
    """The tracer follows sizes; writes into views would be lost in it."""
    model = randomize(create_model(small_arch, num_classes=5)).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(model, (image,))
        for shape in ((2, 3, 64, 64), (1, 3, 96, 33), (3, 3, 20, 9)):
            other = torch.randn(shape)
            torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)
        onnxruntime = pytest.importorskip('onnxruntime')
        torch.onnx.export(
            model, (image,), str(tmp_path / 'a.onnx'), dynamo=False, input_names=['image']
        )
        session = onnxruntime.InferenceSession(str(tmp_path / 'a.onnx'))
        found = torch.from_numpy(session.run(None, dict(image=image.numpy()))[0])
        torch.testing.assert_close(found, model(image), rtol=1e-4, atol=1e-4)


def test_transforms_of_torch_func(small_arch):
    model = randomize(create_model(small_arch, num_classes=5)).double().eval()
    image, step = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64).unbind(0)
    value, slope = torch.func.jvp(model, (image,), (step,))
    torch.testing.assert_close(value, model(image))
    near = (model(image + 1e-6 * step) - model(image - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(slope, near, rtol=1e-4, atol=1e-6)
    weights = dict(model.named_parameters())
    grads = torch.func.grad(lambda w: torch.func.functional_call(model, w, (image,)).sum())(weights)
    model(image).sum().backward()
    for name, parameter in weights.items():
        torch.testing.assert_close(grads[name], parameter.grad)


def test_the_command_writes_and_says_what(tmp_path, capsys):
    pytest.importorskip('mmpretrain')
    from groupmamba_mm.analysis.building import build_model
    from groupmamba_mm.engine.config_checks import load_config

    tool = load_tool('export.py')
    config = str(REPO / 'configs/demo/groupmamba-pico_demo-cls.py')
    model = build_model(load_config(config))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    out = tmp_path / 'a.safetensors'
    tool.main(
        [
            config,
            str(tmp_path / 'a.pth'),
            '--format',
            'safetensors',
            '--out',
            str(out),
            '--size',
            '32',
        ]
    )
    said = capsys.readouterr().out
    assert f'Wrote {out}' in said and '1x3x32x48: differs from PyTorch by 0.0e+00' in said
    from safetensors import safe_open

    with safe_open(out, 'pt') as file:
        assert json.loads(file.metadata()['mean']) == pytest.approx([123.675, 116.28, 103.53])
    torch.save(model.backbone.state_dict(), tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match='nothing was loaded'):
        tool.main([config, str(tmp_path / 'b.pth'), '--out', str(tmp_path / 'b.onnx')])
