_base_ = [
    '../_base_/models/mask-rcnn_groupmamba_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='official-small',
        init_cfg=dict(
            type='Pretrained', checkpoint='checkpoints/official-small.pth', prefix='backbone.'
        ),
    ),
    neck=dict(in_channels=[64, 128, 348, 512]),
)
