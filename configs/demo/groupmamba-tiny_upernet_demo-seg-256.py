_base_ = [
    '../_base_/models/upernet_groupmamba.py',
    '../_base_/datasets/demo_seg_256.py',
    '../_base_/runtime_seg.py',
    '../_base_/schedules/demo_adamw_gpu.py',
]

custom_imports = dict(
    imports=[
        'groupmamba_mm',
        'groupmamba_mm.datasets.loading',
        'groupmamba_mm.engine',
        'groupmamba_mm.evaluation',
    ]
)

# for the same reason as in the pico config
class_weight = [0.1] + [1.0] * 10

# the full-size model
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(arch='tiny', drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[96, 192, 368, 760], num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(
        in_channels=368, num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
)

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300, max_keep_ckpts=1))
