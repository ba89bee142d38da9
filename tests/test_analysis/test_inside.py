"""What a model looks at, against cases whose answer is known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.analysis.inside import area_of_share, effective_receptive_field, maps_of_groups
from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.ops import DIRECTIONS
from groupmamba_mm.ops.selective_scan import to_scan_order
from tests.conftest import REPO, load_tool

look_inside = load_tool('analysis_tools/look_inside.py')
CONFIG = str(REPO / 'configs/demo/groupmamba-official-pico_demo-cls.py')


def test_field_of_a_convolution():
    conv = nn.Conv2d(3, 2, 5, padding=2)
    nn.init.ones_(conv.weight)
    nn.init.ones_(conv.bias)
    field = effective_receptive_field(conv, [torch.rand(2, 3, 16, 20), torch.rand(1, 3, 16, 20)])
    expected = torch.zeros(16, 20)
    expected[6:11, 8:13] = 1
    assert torch.equal(field, expected)
    assert area_of_share(field, 0.99) == 25 / 320
    assert area_of_share(field, 0.2) == 9 / 320
    with pytest.raises(ValueError, match='depends on no pixel'):
        effective_receptive_field(lambda images: conv(images * 0), [torch.rand(1, 3, 16, 20)])


@pytest.mark.parametrize('d_state', [1, 2])
def test_a_group_sees_what_its_scan_has_read(small_arch, d_state):
    """At the centre a scan has read what comes before it in its direction, and nothing else."""
    torch.manual_seed(0)
    backbone = GroupMamba(small_arch, d_state=d_state, directions=DIRECTIONS).eval()
    grid, centre = (4, 6), 2 * 6 + 3
    maps = maps_of_groups(backbone, torch.rand(1, 3, 16, 24), 0, 0)
    assert [found.direction for found in maps] == list(DIRECTIONS)
    for found in maps:
        order = to_scan_order(torch.arange(24)[None], grid, found.direction)[0].tolist()
        read = order[: order.index(centre) + 1]
        seen = found.gradient.flatten().nonzero().flatten().tolist()
        assert sorted(read) == seen
        assert found.state.shape == grid and (found.state > 0).all()


def test_states_are_those_of_the_recurrence():
    torch.manual_seed(0)
    arch = dict(family='official', stem_channels=8, embed_dims=(8,), depths=(1,), ffn_ratios=(2,))
    backbone = GroupMamba(arch, d_state=2, num_groups=2).eval()
    image, seen = torch.rand(1, 3, 12, 8), []
    ssm = backbone.stages[0][0].mixer.ss2d.ssm
    ssm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    maps = maps_of_groups(backbone, image, 0, 0)
    dt, A, B, _ = (t.detach() for t in ssm.discretise(seen[0]))
    state, norms = torch.zeros(4, 2), []  # the first group reads row by row
    for t in range(6):
        decay = torch.exp(dt[0, t, :4, None] * A[:4])
        state = decay * state + dt[0, t, :4, None] * B[0, t, 0] * seen[0][0, t, :4, None]
        norms.append(state.norm())
    torch.testing.assert_close(maps[0].state.flatten(), torch.stack(norms))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A checkpoint with random weights, and an image."""
    folder = tmp_path_factory.mktemp('inside')
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG))
    torch.save(dict(state_dict=model.state_dict()), folder / 'a.pth')
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'a.png')
    return folder


@pytest.mark.parametrize(
    'command',
    [
        ['field', CONFIG, '--checkpoint', 'a.pth', '--size', '64', '--images', '1',
         '--peers', 'convnext_atto'],
        ['groups', CONFIG, 'a.pth', 'a.png'],
        ['cam', CONFIG, 'a.pth', 'a.png'],
        ['scans', 'a.png', '--all', '--grid', '3'],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_pictures(place, monkeypatch, capsys, one_thread, command):
    if command[0] == 'cam':
        pytest.importorskip('pytorch_grad_cam', reason="needs the extra 'analysis'")
    monkeypatch.chdir(place)
    look_inside.main([*command, '--out', 'out/picture.png'])
    with Image.open('out/picture.png') as picture:
        assert len(picture.convert('RGB').getcolors(1 << 24)) > 100
    shown = capsys.readouterr().out
    assert 'Wrote out/picture.png' in shown
    if command[0] == 'field':
        assert shown.count('%') == 3 * 4 and 'convnext_atto, untrained' in shown


def test_what_cannot_be_looked_into(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match="no model 'swin_tony'"):
        look_inside.main(['field', CONFIG, '--peers', 'swin_tony'])
    with pytest.raises(ConfigError, match='stages 0 to'):
        look_inside.main(['groups', CONFIG, 'a.pth', 'a.png', '--stage', '9'])
    with pytest.raises(ConfigError, match='no classifier'):
        look_inside.main(['field', str(REPO / 'configs/demo/groupmamba-pico_upernet_demo-seg.py')])
