_base_ = [
    '../_base_/models/groupmamba-official_cls.py',
    '../_base_/datasets/demo_cls.py',
    '../_base_/schedules/demo_adamw.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(
        arch=dict(
            family='official',
            stem_channels=32,
            embed_dims=(32, 96, 144, 192),
            depths=(1, 1, 1, 1),
            ffn_ratios=(2, 2, 2, 2),
        ),
        drop_path_rate=0.0,
    ),
    head=dict(num_classes=10, in_channels=192),
    # a digit mixed with another one is no digit
    train_cfg=None,
)

# fixes the first weights, the order of the pictures and their shifts
randomness = dict(seed=0)
