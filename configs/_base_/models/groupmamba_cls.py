"""The paper's family as a classifier: global average pooling, LN, one linear head."""
model = dict(
    type='ImageClassifier',
    # Training passes on a GPU are replayed as CUDA graphs, which take the kernels' time alone.
    # With gradient accumulation set compile_mode to 'default', with images of many sizes to None.
    backbone=dict(type='GroupMamba', drop_path_rate=0.05, compile_mode='reduce-overhead'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02)),
    # label smoothing sits in the loss: it is linear in the label, so before or after the mixing
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
