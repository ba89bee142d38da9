"""160k iterations of AdamW on ADE20K at batch 16, bf16 on GPUs."""

optim_wrapper = dict(
    # mmengine's default makes a group of every parameter, which is slow on a GPU
    constructor='MergedOptimWrapperConstructor',
    # a CPU trains in fp32 instead and says so
    type='SyncFreeAmpOptimWrapper',
    dtype='bfloat16',
    # bf16 has the range of fp32
    loss_scale=dict(enabled=False),
    # lr: the paper; weight decay: Swin's
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # what is decayed: as in the classification recipe, in the heads too
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)

# Swin's
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=16)
