"""A short schedule for the larger demo scenes: minutes on one GPU, bf16."""

optim_wrapper = dict(
    # a CPU trains in fp32 instead and says so
    type='SyncFreeAmpOptimWrapper',
    dtype='bfloat16',
    # bf16 has the range of fp32
    loss_scale=dict(enabled=False),
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='MergedOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=False, end=1200),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=1200, val_interval=300)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=8)

# fixes the first weights and the order of the pictures
randomness = dict(seed=0)
