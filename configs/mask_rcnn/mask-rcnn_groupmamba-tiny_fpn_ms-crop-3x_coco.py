_base_ = [
    '../_base_/models/mask-rcnn_groupmamba_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_3x.py',
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='tiny',
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/tiny.pth', prefix='backbone.'),
    ),
    neck=dict(in_channels=[96, 192, 368, 760]),
)
