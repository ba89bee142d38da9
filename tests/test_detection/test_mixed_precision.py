"""The parts that compute in fp32, in and out of mixed precision, against mmdet's own."""

import pytest
import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

from groupmamba_mm.detection import Fp32RoIExtractor, Fp32RPNHead

SETTINGS = dict(
    roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
    out_channels=4,
    featmap_strides=[4, 8],
    finest_scale=28,
)
# Coordinates that bf16 rounds to multiples of 4 and 8, on both levels.
ROIS = torch.tensor([[0, 901.3, 3.7, 940.1, 41.2], [1, 610.6, 13.3, 790.9, 120.4]])


@pytest.fixture(autouse=True)
def scope():
    """Parts are looked up in mmdet, whichever library a test before used."""
    init_default_scope('mmdet')


def maps(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 4, 128 // stride, 1024 // stride, generator=generator)
        .to(dtype)
        .requires_grad_()
        for stride in (4, 8)
    ]


def test_they_are_registered():
    assert MODELS.get('Fp32RoIExtractor') is Fp32RoIExtractor
    assert MODELS.get('Fp32RPNHead') is Fp32RPNHead


def test_without_mixed_precision_it_is_its_base_class():
    features = maps()
    expected = SingleRoIExtractor(**SETTINGS)(features, ROIS)
    found = Fp32RoIExtractor(**SETTINGS)(features, ROIS)
    assert torch.equal(found, expected)
    scaled = Fp32RoIExtractor(**SETTINGS)(features, ROIS, roi_scale_factor=1.5)
    assert torch.equal(scaled, SingleRoIExtractor(**SETTINGS)(features, ROIS, 1.5))


def test_channels_last_maps_are_read_as_what_they_are():
    features = maps()
    expected = SingleRoIExtractor(**SETTINGS)(features, ROIS)
    turned = [f.detach().to(memory_format=torch.channels_last).requires_grad_() for f in features]
    assert not torch.allclose(SingleRoIExtractor(**SETTINGS)(turned, ROIS), expected)  # mmdet's own
    found = Fp32RoIExtractor(**SETTINGS)(turned, ROIS)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(turned, features))


def test_mmdets_own_fails_in_bf16():
    """A reason for the class."""
    with pytest.raises(RuntimeError, match='BFloat16'):
        SingleRoIExtractor(**SETTINGS)(maps(torch.bfloat16), ROIS)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_inside_of_mixed_precision_boxes_and_sums_stay_exact(dtype):
    features = maps(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = Fp32RoIExtractor(**SETTINGS)(features, ROIS)
    exact = [f.detach().float().requires_grad_() for f in features]
    expected = SingleRoIExtractor(**SETTINGS)(exact, ROIS)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for feature, reference in zip(features, exact):
        assert feature.grad.dtype == dtype
        torch.testing.assert_close(feature.grad.float(), reference.grad, atol=1e-2, rtol=1e-2)


def test_no_boxes():
    assert Fp32RoIExtractor(**SETTINGS)(maps(), torch.zeros(0, 5)).shape == (0, 4, 7, 7)


def rpn(head):
    torch.manual_seed(0)
    return head(
        in_channels=4,
        feat_channels=4,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        test_cfg=ConfigDict(
            nms_pre=50, max_per_img=20, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.7)
        ),
    )


def proposals(head):
    image = torch.randn(1, 4, 4, 160, generator=torch.Generator().manual_seed(0))
    sample = DetDataSample(metainfo=dict(img_shape=(32, 1280), scale_factor=(1.0, 1.0)))
    with torch.no_grad():
        return head.predict([image], [sample], rescale=False)[0].bboxes


def test_proposals_inside_of_mixed_precision_are_not_rounded():
    plain = proposals(rpn(RPNHead))
    assert torch.equal(proposals(rpn(Fp32RPNHead)), plain)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match='BFloat16'):  # the reason for the class
            proposals(rpn(RPNHead))
        found = proposals(rpn(Fp32RPNHead))
    assert found.dtype == torch.float32
    # a right edge that bf16 could not hold
    right = found[:, 2][found[:, 2] > 1024]
    assert len(right) and (right != right.bfloat16().float()).any()
