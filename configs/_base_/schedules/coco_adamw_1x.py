"""12 epochs of AdamW on COCO at batch 16, bf16 on GPUs."""

optim_wrapper = dict(
    # mmengine's default makes a group of every parameter, which is slow on a GPU
    constructor='MergedOptimWrapperConstructor',
    # a CPU trains in fp32 instead and says so
    type='SyncFreeAmpOptimWrapper',
    dtype='bfloat16',
    # bf16 has the range of fp32
    loss_scale=dict(enabled=False),
    # lr: the paper; weight decay: Swin's
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # what is decayed: as in the classification recipe, in the heads too
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)

param_scheduler = [
    # Swin's warm-up in mmdet
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=1000),
    # the paper; Swin's are 8 and 11
    dict(type='MultiStepLR', by_epoch=True, end=12, milestones=[9, 11], gamma=0.1),
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=16)
