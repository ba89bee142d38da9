"""``init_cfg=dict(type='Pretrained')`` in all its forms, of our backbone and of other modules."""

import mmpretrain.models  # noqa: F401, registers the classifier
import pytest
import torch
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import groupmamba_mm.engine  # noqa: F401, registers the initialiser
from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.checkpoint import CheckpointError
from groupmamba_mm.engine.config_checks import load_config
from tests.conftest import SMALL, RunsCode, randomize

ARCH = SMALL['paper']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Checkpoints of one backbone, whole, in parts, renamed and of something else."""
    folder = tmp_path_factory.mktemp('weights')
    want = randomize(GroupMamba(ARCH)).state_dict()
    other = {f'backbone.layer1.{index}': torch.zeros(3) for index in range(5)}
    for name, state in (
        ('plain', want),
        ('backbone', {f'backbone.{k}': v for k, v in want.items()}),
        ('module', {f'module.backbone.{k}': v for k, v in want.items()}),
        ('encoder', {f'encoder.{k}': v for k, v in want.items()}),
        ('half', {f'backbone.{k}': v for k, v in list(want.items())[::2]}),
        ('other', other),
    ):
        torch.save(dict(state_dict=state), folder / f'{name}.pth')
    torch.save(dict(state_dict=want, extra=RunsCode(str(folder / 'ran'))), folder / 'evil.pth')
    return folder, want


def initialised(init_cfg):
    backbone = GroupMamba(ARCH, init_cfg=init_cfg)
    backbone.init_weights()
    return backbone.state_dict()


def same(state, want):
    return all(torch.equal(value, want[key]) for key, value in state.items())


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize(
    'name, prefix',
    [
        ('plain', None),
        ('plain', ''),
        ('backbone', 'backbone'),
        ('backbone', 'backbone.'),
        ('module', 'backbone'),
        ('encoder', 'encoder'),
    ],
)
def test_what_fits_is_loaded(files, name, prefix, several):
    folder, want = files
    init_cfg = dict(type='Pretrained', checkpoint=str(folder / f'{name}.pth'), prefix=prefix)
    first = dict(type='TruncNormal', layer='Linear', std=1.0)
    assert same(initialised([first, init_cfg] if several else init_cfg), want)


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize(
    'name, prefix, message',
    [
        ('other', 'backbone', r'does not fit.*0 tensors match'),
        ('half', 'backbone.', 'does not fit'),
        ('backbone', None, 'does not fit'),
        ('encoder', 'backbone', r'begin with encoder'),
        ('evil', None, 'could run code'),
        ('gone', None, 'does not exist'),
    ],
)
def test_what_does_not_fit_is_refused(files, name, prefix, message, several):
    folder, _ = files
    init_cfg = dict(type='Pretrained', checkpoint=str(folder / f'{name}.pth'), prefix=prefix)
    with pytest.raises(CheckpointError, match=message):
        initialised([init_cfg] if several else init_cfg)
    assert not (folder / 'ran').exists()


@pytest.mark.parametrize('name, fits', [('backbone', True), ('module', True), ('other', False)])
def test_a_whole_model_has_the_same_rules(files, name, fits):
    folder, want = files
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            dict(
                type='ImageClassifier',
                pretrained=str(folder / f'{name}.pth'),
                backbone=dict(type='GroupMamba', arch=ARCH),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=20),
            )
        )
    if fits:
        model.init_weights()
        assert same(model.backbone.state_dict(), want)
    else:
        with pytest.raises(CheckpointError, match='does not fit'):
            model.init_weights()


class Other(BaseModule):
    """A module of no library that knows the checkpoint."""

    def __init__(self, init_cfg):
        super().__init__(init_cfg)
        self.body, self.head = nn.Linear(20, 20), nn.Linear(20, 2)


def test_other_modules_may_have_a_new_head_and_no_less(tmp_path):
    source = Other(None)
    state = {f'net.{key}': value for key, value in source.state_dict().items()}
    file = tmp_path / 'other.pth'
    init_cfg = dict(type='Pretrained', checkpoint=str(file), prefix='net')
    torch.save({key: value for key, value in state.items() if 'head' not in key}, file)
    target = Other(init_cfg)
    target.init_weights()
    assert torch.equal(target.body.weight, source.body.weight)
    torch.save({key: value for key, value in state.items() if 'body' not in key}, file)
    with pytest.raises(CheckpointError, match='80% must match'):
        Other(init_cfg).init_weights()


def test_a_class_in_a_pure_python_config_is_the_checked_one(files, tmp_path):
    file = tmp_path / 'pure.py'
    file.write_text(
        'from mmengine.model import PretrainedInit\n'
        "default_scope = 'mmpretrain'\nmodel = dict(backbone=dict(init_cfg=dict("
        f'type=PretrainedInit, checkpoint={str(files[0] / "other.pth")!r})))\n'
    )
    cfg = load_config(str(file)).model.backbone.init_cfg
    assert cfg.type != PretrainedInit
    with pytest.raises(CheckpointError, match='does not fit'):
        initialised(cfg)
