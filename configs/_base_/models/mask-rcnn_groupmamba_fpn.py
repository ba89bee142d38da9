"""mmdet's Mask R-CNN with FPN, on GroupMamba."""

_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='GroupMamba',
        out_indices=(0, 1, 2, 3),
        # Swin's for 1x; the paper gives none
        drop_path_rate=0.2,
    ),
    # In bf16, mmdet's own would round boxes to 8 pixels, and mmcv's RoIAlign and NMS would fail.
    rpn_head=dict(type='Fp32RPNHead'),
    roi_head=dict(
        bbox_roi_extractor=dict(type='Fp32RoIExtractor'),
        mask_roi_extractor=dict(type='Fp32RoIExtractor'),
    ),
)
