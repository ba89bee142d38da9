"""The counts of detectors and segmenters against figures worked out by hand.

The backbone's own are tested in test_complexity.py.
"""

import pytest
import yaml

from groupmamba_mm.analysis import build_model, count_complexity
from groupmamba_mm.analysis.complexity import PRODUCTS, SCAN
from groupmamba_mm.analysis.detection import run_two_stage
from groupmamba_mm.backbones import ARCHS, GroupMamba
from groupmamba_mm.engine.config_checks import load_config
from tests.conftest import REPO


def count_large(model, size):
    """Products and scans at a size in multiples of 32, from those at two small ones.

    Both grow with the number of pixels, but for what works on pooled maps and stays the same. Of 32
    pixels the last map has one token, which needs no convolution.
    """
    small, large = (count_complexity(model, side).macs_by_kind for side in (64, 96))
    cells = size[0] * size[1] // 32**2
    return {kind: small[kind] + (large[kind] - small[kind]) // 5 * (cells - 4) for kind in small}


def conv(cells, in_channels, out_channels, kernel):
    return cells * in_channels * out_channels * kernel**2


def mask_rcnn_parts(dims, grids, classes=80, width=256, hidden=1024, mask_convs=4, shared=False):
    """Multiply-adds after the backbone, of maps on ``grids`` and 1000 and 100 boxes."""
    cells = [height * length for height, length in grids]
    neck = sum(conv(n, dim, width, 1) + conv(n, width, width, 3) for n, dim in zip(cells, dims))
    rpn = sum(conv(n, width, width, 3) + conv(n, width, 3 * 5, 1) for n in cells)
    outputs = 1 if shared else classes  # boxes and masks that all classes share
    box = 1000 * (49 * width * hidden + hidden**2 + hidden * (classes + 1 + 4 * outputs))
    mask = 100 * (
        mask_convs * conv(14**2, width, width, 3)
        + conv(14**2, width, width, 2)
        + conv(28**2, width, outputs, 1)
    )
    return neck + rpn + box + mask


@pytest.mark.parametrize('size', ['tiny', 'official-base'])
def test_published_count_of_mask_rcnn(size, one_thread):
    path = REPO / f'configs/mask_rcnn/mask-rcnn_groupmamba-{size}_fpn_1x_coco.py'
    models = yaml.safe_load((path.parent / 'metafile.yml').read_text())['Models']
    (published,) = (m['Metadata'] for m in models if m['Name'] == path.stem)
    found = count_large(GroupMamba(size, out_indices=(0, 1, 2, 3)), (1280, 800))
    grids = [(1280 // stride, 800 // stride) for stride in (4, 8, 16, 32)] + [(20, 13)]
    expected = sum(found.values()) + mask_rcnn_parts(ARCHS[size].embed_dims, grids)
    assert published['FLOPs'] == round(expected, -6)
    assert published['Scan FLOPs'] == round(found[SCAN], -6)


def test_run_two_stage_counts_what_the_formula_does(one_thread):
    cfg = load_config(str(REPO / 'configs/demo/mask-rcnn_groupmamba-pico_demo-det.py'))
    model = build_model(cfg)
    whole = count_complexity(model, (64, 96), run=run_two_stage)
    backbone = count_complexity(model.backbone, (64, 96))
    grids = [(16, 24), (8, 12), (4, 6), (2, 3)]
    parts = mask_rcnn_parts(
        (32, 96, 144, 192), grids, classes=10, width=64, hidden=256, mask_convs=2, shared=True
    )
    assert whole.macs == backbone.macs + parts
    assert whole.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('size', ['tiny', 'official-base'])
def test_published_count_of_upernet(size, one_thread):
    path = REPO / f'configs/upernet/groupmamba-{size}_upernet_8xb2-160k_ade20k-512x512.py'
    models = yaml.safe_load((path.parent / 'metafile.yml').read_text())['Models']
    (published,) = (m['Metadata'] for m in models if m['Name'] == path.stem)
    found = count_large(build_model(load_config(str(path))), (512, 2048))
    assert published['FLOPs'] == round(sum(found.values()), -6)
    assert published['Scan FLOPs'] == round(found[SCAN], -6)

    width, dims = 512, ARCHS[size].embed_dims
    cells = [(512 // stride) * (2048 // stride) for stride in (4, 8, 16, 32)]
    pyramid = sum(conv(scale**2, dims[3], width, 1) for scale in (1, 2, 3, 6))
    pyramid += conv(cells[3], dims[3] + 4 * width, width, 3)
    levels = sum(
        conv(n, dim, width, 1) + conv(n, width, width, 3) for n, dim in zip(cells, dims[:3])
    )
    end = conv(cells[0], 4 * width, width, 3) + conv(cells[0], width, 150, 1)
    backbone = count_large(GroupMamba(size, out_indices=(0, 1, 2, 3)), (512, 2048))
    assert found[PRODUCTS] == backbone[PRODUCTS] + pyramid + levels + end
