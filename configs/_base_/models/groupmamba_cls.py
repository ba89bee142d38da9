"""The paper's family as a classifier: global average pooling, LN, one linear head."""

model = dict(
    type='ImageClassifier',
    backbone=dict(type='GroupMamba', drop_path_rate=0.05),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
    # label smoothing sits in the loss: it is linear in the label, so before or after the mixing
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
