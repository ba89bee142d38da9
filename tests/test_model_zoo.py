"""Configs by name, and the registries of other libraries, from a folder that holds nothing."""

import subprocess
import sys

import pytest

import groupmamba_mm
from groupmamba_mm.backbones import ARCHS
from groupmamba_mm.errors import ConfigError
from tests.conftest import REPO


def test_every_config_has_a_name_of_its_own():
    files = [
        path
        for path in (REPO / 'configs').rglob('*.py')
        if '_base_' not in path.relative_to(REPO).parts
    ]
    assert groupmamba_mm.list_configs() == sorted(path.stem for path in files)
    assert groupmamba_mm.list_configs('mask-rcnn_*official-tiny*1x*') == [
        'mask-rcnn_groupmamba-official-tiny_fpn_1x_coco'
    ]


def test_config_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = groupmamba_mm.get_config('groupmamba-tiny_8xb128_in1k')
    assert cfg.model.backbone.arch == 'tiny' and cfg.default_scope == 'mmpretrain'
    with pytest.raises(ConfigError, match='nearest are.*groupmamba-tiny_8xb128_in1k'):
        groupmamba_mm.get_config('groupmamba-tiny_8xb256_in1k')
    with pytest.raises(ConfigError, match=r'list_configs\(\)'):
        groupmamba_mm.get_config('?')


def run(code, folder):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_no_library(tmp_path):
    out = run(
        "import groupmamba_mm, sys; print({'mmengine', 'mmpretrain', 'timm'} & set(sys.modules))",
        tmp_path,
    )
    assert out == 'set()\n'


@pytest.mark.parametrize(
    'order',
    [
        "import groupmamba_mm, importlib.util; importlib.util.find_spec('mmpretrain')\nimport mmpretrain",
        'import mmpretrain, groupmamba_mm',
    ],
)
def test_mmpretrain_knows_our_models_by_name(order, tmp_path):
    out = run(
        f"""
{order}
names = mmpretrain.list_models('groupmamba')
for arch in {tuple(ARCHS)}:
    assert f'groupmamba-{{arch}}' in names and f'groupmamba-{{arch}}_8xb128_in1k' in names
assert 'groupmamba-tiny-g8_8xb128_in1k' in names
assert 'resnet50_8xb32_in1k' in mmpretrain.list_models()
model = mmpretrain.get_model('groupmamba-official-tiny')
print(type(model.backbone).__name__, type(model.head).__name__, model._metainfo.name)
""",
        tmp_path,
    )
    assert out.splitlines()[-1] == (
        'GroupMamba TwoHeadClsHead groupmamba-official-tiny_8xb128_in1k'
    )
