_base_ = [
    '../_base_/models/upernet_groupmamba.py',
    '../_base_/datasets/demo_seg.py',
    '../_base_/schedules/demo_adamw.py',
    '../_base_/runtime_seg.py',
]

custom_imports = dict(
    imports=[
        'groupmamba_mm',
        'groupmamba_mm.datasets.loading',
        'groupmamba_mm.engine',
        'groupmamba_mm.evaluation',
    ]
)

# Nine tenths of the pixels are background: weighted like the digits, it held training up for long
# where all digits have the same score.
class_weight = [0.1] + [1.0] * 10

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    # the backbone of groupmamba-pico_demo-cls.py, whose weights fit
    backbone=dict(
        arch=dict(
            family='paper',
            stem_channels=64,
            embed_dims=(32, 96, 144, 192),
            depths=(1, 1, 1, 1),
            ffn_ratios=(2, 2, 2, 2),
        ),
        drop_path_rate=0.0,
        init_cfg=dict(type='TruncNormal', layer=['Linear', 'GroupedLinear'], std=0.1),
    ),
    decode_head=dict(
        in_channels=[32, 96, 144, 192],
        channels=64,
        num_classes=11,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=144, channels=32, num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
)

train_cfg = dict(max_epochs=4, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-2,
        by_epoch=True,
        end=4,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=8)

# this run is counted in epochs
default_hooks = dict(
    logger=dict(log_metric_by_epoch=True), checkpoint=dict(by_epoch=True, interval=1)
)
log_processor = dict(by_epoch=True)

# fixes the first weights and the order of the pictures
randomness = dict(seed=0)
