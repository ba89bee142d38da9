"""Converting released checkpoints, and back."""

import json
import os

import numpy as np
import pytest
import torch

from groupmamba_mm import GroupMamba
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.checkpoint import CheckpointError, load_checkpoint_file, revert_to_official
from groupmamba_mm.engine.config_checks import load_config
from tests.conftest import REPO, RunsCode, load_tool
from tests.reference_models import official_forward
from tests.test_backbones.test_truth import official_state

TOOL, BACK = (
    load_tool(f'model_converters/{name}.py')
    for name in ('official_to_mmpretrain', 'mmpretrain_to_official')
)


@pytest.fixture(scope='module')
def weights():
    state = official_state(GroupMamba('official-tiny'), num_classes=1000)
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def test_a_flat_state_dict_gives_the_same_logits_at_full_size(weights, tmp_path):
    torch.save(weights, tmp_path / 'released.pth')
    message = TOOL.convert(str(tmp_path / 'released.pth'), str(tmp_path / 'ours' / 'tiny.pth'))
    assert 'official-tiny, 1000 classes' in message and 'a flat state dict' in message
    converted = load_checkpoint_file(tmp_path / 'ours' / 'tiny.pth')
    assert converted['meta']['arch'] == 'official-tiny'
    cfg = load_config(str(REPO / 'configs/groupmamba/groupmamba-official-tiny_8xb128_in1k.py'), {})
    model = build_model(cfg)
    model.load_state_dict(converted['state_dict'])
    image = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    expected, _, _ = official_forward(image.double(), {k: v.double() for k, v in weights.items()})
    with torch.no_grad():
        logits = model(image, mode='tensor')
    scale = max(1.0, expected.abs().max().item())
    assert (logits - expected).abs().max() <= 1e-4 * scale


class ConfigNode(dict):
    """Like the config library's class: a dict with attributes of its own."""

    def __init__(self, items):
        super().__init__(items)
        self.frozen = True


def test_training_form_takes_the_averaged_weights(weights, tmp_path):
    ema = {f'module.{k}': v + 1 if v.is_floating_point() else v for k, v in weights.items()}
    config = ConfigNode(dict(MODEL=ConfigNode(dict(NAME='tiny')), DATA=['a', 1.5]))
    torch.save(
        dict(model=weights, model_ema=ema, epoch=3, max_accuracy=np.float64(1.0), config=config),
        tmp_path / 'training.pth',
    )
    with pytest.raises(CheckpointError, match='could run code'):
        load_checkpoint_file(tmp_path / 'training.pth')
    message = TOOL.convert(str(tmp_path / 'training.pth'), str(tmp_path / 'out.pth'))
    assert "'model_ema', the averaged weights" in message
    torch.save(dict(model_ema=ema), tmp_path / 'averaged.pth')
    assert "'model_ema'" in TOOL.convert(str(tmp_path / 'averaged.pth'), str(tmp_path / 'a.pth'))
    state = load_checkpoint_file(tmp_path / 'out.pth')['state_dict']
    assert torch.equal(state['head.label_fc.weight'], weights['head.weight'] + 1)


def test_an_object_that_no_dict_can_stand_for(weights, tmp_path):
    torch.save(dict(model=weights, config=REPO), tmp_path / 'path.pth')
    with pytest.raises(CheckpointError, match=r'Path.*no plain dict can stand for'):
        TOOL.convert(str(tmp_path / 'path.pth'), str(tmp_path / 'out.pth'))


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_checkpoint_is_not_run(weights, protocol, zipped, tmp_path):
    file = tmp_path / 'hostile.pth'
    torch.save(
        dict(model=weights, config=RunsCode(tmp_path / 'ran')),
        file,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match='hostile.pth'):
        TOOL.convert(str(file), str(tmp_path / 'out.pth'))
    assert not (tmp_path / 'ran').exists() and not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda w: w.pop('block1.0.attn.skip_scale'), 'is not exactly official-tiny.*missing'),
        (lambda w: w.update(extra=torch.zeros(1)), "keys not understood.*'extra'"),
        (lambda w: w.pop('block2.0.attn.mamba_g3.Ds'), r'mamba_g\*\.Ds'),
        (lambda w: w.update({'head.weight': torch.zeros(1000, 7)}), 'have another shape'),
        (
            lambda w: w.update({'patch_embed2.proj.weight': torch.zeros(96, 64, 3, 3)}),
            'none of the released sizes',
        ),
    ],
)
def test_what_is_not_exactly_a_released_model_is_refused(weights, tmp_path, change, message):
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / 'changed.pth')
    with pytest.raises(CheckpointError, match=message):
        TOOL.convert(str(tmp_path / 'changed.pth'), str(tmp_path / 'out.pth'))
    assert not (tmp_path / 'out.pth').exists()


def test_truncated_missing_and_existing_files(weights, tmp_path):
    torch.save(weights, tmp_path / 'released.pth')
    (tmp_path / 'short.pth').write_bytes((tmp_path / 'released.pth').read_bytes()[:100_000])
    for source, message in (('short.pth', 'truncated'), ('none.pth', 'does not exist')):
        with pytest.raises(CheckpointError, match=message):
            TOOL.convert(str(tmp_path / source), str(tmp_path / 'out.pth'))
    (tmp_path / 'out.pth').write_text('mine')
    with pytest.raises(CheckpointError, match='exists'):
        TOOL.convert(str(tmp_path / 'released.pth'), str(tmp_path / 'out.pth'))
    assert (tmp_path / 'out.pth').read_text() == 'mine'


def test_there_and_back_is_the_same_file(weights, tmp_path):
    torch.save(weights, tmp_path / 'released.pth')
    TOOL.convert(str(tmp_path / 'released.pth'), str(tmp_path / 'ours.pth'))
    BACK.convert(str(tmp_path / 'ours.pth'), str(tmp_path / 'back.pth'))
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    size = (tmp_path / 'back.pth').stat().st_size
    assert size < 1.1 * (tmp_path / 'released.pth').stat().st_size


def test_the_papers_family_has_no_released_form(tmp_path):
    state = {f'backbone.{k}': v for k, v in GroupMamba('tiny').state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'paper.pth')
    with pytest.raises(CheckpointError, match='not a classifier of the official family'):
        BACK.convert(str(tmp_path / 'paper.pth'), str(tmp_path / 'out.pth'))


@pytest.mark.parametrize(
    'size,released',
    [('official-tiny', 'tiny'), ('official-small', 'small'), ('official-base', 'base')],
)
def test_names_and_shapes_are_exactly_the_released_ones(size, released):
    """Against the list that came with the release, where it lies beside the parity fixture."""
    fixture = os.environ.get('GROUPMAMBA_PARITY_FIXTURE')
    if not fixture:
        pytest.skip('GROUPMAMBA_PARITY_FIXTURE does not name the parity fixture')
    with open(os.path.join(os.path.dirname(fixture), 'released_state_dict_shapes.json')) as file:
        expected = {name: tuple(shape) for name, shape in json.load(file)[released].items()}
    cfg = load_config(str(REPO / f'configs/groupmamba/groupmamba-{size}_8xb128_in1k.py'), {})
    ours = revert_to_official(build_model(cfg).state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == expected
