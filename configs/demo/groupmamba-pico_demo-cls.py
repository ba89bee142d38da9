_base_ = [
    '../_base_/models/groupmamba_cls.py',
    '../_base_/datasets/demo_cls.py',
    '../_base_/schedules/demo_adamw.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(
        arch=dict(
            family='paper',
            stem_channels=16,
            embed_dims=(32, 64, 96, 128),
            depths=(1, 1, 2, 1),
            ffn_ratios=(4, 4, 2, 2)),
        drop_path_rate=0.),
    head=dict(num_classes=10, in_channels=128),
    # a digit mixed with another one is no digit
    train_cfg=None)
