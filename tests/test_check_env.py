"""The check of the environment: what it finds in broken ones, and that each problem has a remedy."""

import shutil
from collections import namedtuple
from importlib import metadata

import pytest
import torch

from groupmamba_mm import check_env
from groupmamba_mm.check_env import (
    check_communication,
    check_doubles,
    check_gpu,
    check_limits,
    check_operators,
    check_versions,
    installed_versions,
)

GOOD = {'torch': '2.11.0', 'torchvision': '0.26.0', 'onedl-mmcv': '2.3.6', 'numpy': '2.2.6'}


def problems(findings):
    return [finding for finding in findings if finding.remedy]


def test_this_environment_is_well():
    installed = installed_versions()
    assert 'torch' in installed
    for check in (check_versions, check_doubles, check_communication):
        assert problems(check(installed)) == []


@pytest.mark.parametrize(
    'needs, text, remedy',
    [
        ('numpy<2', 'torchvision needs numpy<2, and 2.2.6 is installed', "pip install 'numpy<2'"),
        ('pillow>=9', 'torchvision needs pillow>=9, which is not installed', "install 'pillow>=9'"),
        ('Foo_Bar>1; extra == "all"', None, None),
        ('numpy>=2', None, None),
        ('pywin32; sys_platform == "win32"', None, None),
    ],
)
def test_versions_are_compared_with_each_other(monkeypatch, needs, text, remedy):
    monkeypatch.setattr(
        metadata, 'requires', lambda name: [needs] if name == 'torchvision' else None
    )
    found = problems(check_versions(GOOD))
    assert [finding.text for finding in found] == ([text] if text else [])
    assert all(remedy in finding.remedy for finding in found)


@pytest.mark.parametrize('version, bad', [('4.57.1', False), ('5.0.0', True), ('10.1', True)])
def test_transformers_that_break_mmpretrain_are_named(monkeypatch, version, bad):
    monkeypatch.setattr(metadata, 'requires', lambda name: None)
    found = problems(check_versions({'onedl-mmpretrain': '1.3.6', 'transformers': version}))
    assert len(found) == bad


@pytest.mark.parametrize(
    'more, text',
    [
        ({'mmcv': '2.2.0'}, 'mmcv 2.2.0 and onedl-mmcv 2.3.6 write into the same folder'),
        (
            {'opencv-python': '4.12', 'opencv-python-headless': '4.11'},
            'opencv-python 4.12 and opencv-python-headless 4.11 write',
        ),
        ({'opencv-python': '4.12', 'opencv-python-headless': '4.12'}, None),
    ],
)
def test_doubles_are_named(more, text):
    found = problems(check_doubles({**GOOD, **more}))
    assert [finding.text.startswith(text) for finding in found] == ([True] if text else [])


def test_operators_that_do_not_load_are_named(monkeypatch):
    original = check_env.importlib.import_module

    def import_module(name):
        if name == 'mmcv.ops':
            raise ImportError('libc10.so: undefined symbol: _ZN3c10')
        return original(name) if name == 'torchvision' else None

    monkeypatch.setattr(check_env.importlib, 'import_module', import_module)
    monkeypatch.setattr(check_env, '_LIBRARIES', ())
    found = problems(check_operators(GOOD))
    assert [finding.text for finding in found] == [
        'operators of mmcv: ImportError: libc10.so: undefined symbol: _ZN3c10'
    ]
    assert 'tools/install.sh' in found[0].remedy


def test_mmcv_without_operators_is_enough_for_classification(monkeypatch):
    find_spec = check_env.importlib.util.find_spec
    monkeypatch.setattr(
        check_env.importlib.util,
        'find_spec',
        lambda name: None if name == 'mmcv._ext' else find_spec(name),
    )
    monkeypatch.setattr(check_env, '_LIBRARIES', ())
    installed = {'onedl-mmcv': '2.3.6', 'onedl-mmpretrain': '1.3.6'}
    found = list(check_env.check_operators(installed))
    assert not any(finding.remedy for finding in found)
    assert 'segmentation: bash tools/install.sh' in found[-1].text


def test_a_driver_that_torch_does_not_see_is_named(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert problems(check_gpu(GOOD)) == []
    monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}')
    assert 'torch (built for' in problems(check_gpu(GOOD))[0].text


def test_small_limits_are_named(monkeypatch):
    Usage = namedtuple('Usage', 'free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(64e6))
    monkeypatch.setattr(check_env.resource, 'getrlimit', lambda limit: (1024, 524288))
    monkeypatch.setattr(check_env.os, 'access', lambda path, mode: False)
    found = problems(check_limits(GOOD))
    assert [finding.text.split(':')[0] for finding in found] == [
        'shared memory',
        'disk',
        'file descriptors',
        'cache of torch',
        'cache of triton',
    ]
    assert found[2].remedy == 'ulimit -n 524288'


def test_the_command_counts_problems(monkeypatch, capsys):
    monkeypatch.setattr(
        check_env,
        'CHECKS',
        {
            'One': lambda installed: iter([check_env.Finding('fine')]),
            'Two': lambda installed: iter([check_env.Finding('broken', 'fix it')]),
        },
    )
    assert check_env.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        'One:',
        '  fine',
        'Two:',
        '  PROBLEM: broken',
        '    fix with: fix it',
        '1 problem(s) found.',
    ]
