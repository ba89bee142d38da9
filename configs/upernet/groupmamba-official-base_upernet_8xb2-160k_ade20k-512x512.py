_base_ = [
    '../_base_/models/upernet_groupmamba.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/ade20k_adamw_160k.py',
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        arch='official-base',
        init_cfg=dict(
            type='Pretrained', checkpoint='checkpoints/official-base.pth', prefix='backbone.'
        ),
    ),
    decode_head=dict(in_channels=[96, 192, 424, 512]),
    auxiliary_head=dict(in_channels=424),
)
