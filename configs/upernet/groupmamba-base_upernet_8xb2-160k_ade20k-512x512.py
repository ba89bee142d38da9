_base_ = [
    '../_base_/models/upernet_groupmamba.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/ade20k_adamw_160k.py',
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/base.pth', prefix='backbone.'),
    ),
    decode_head=dict(in_channels=[128, 256, 496, 1012]),
    auxiliary_head=dict(in_channels=496),
)
