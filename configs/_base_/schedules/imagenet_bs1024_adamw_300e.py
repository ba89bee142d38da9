"""300 epochs of AdamW at batch 1024, the paper's schedule with the released details."""

optim_wrapper = dict(
    # mmengine's default makes a group of every parameter, which is slow on a GPU
    constructor='MergedOptimWrapperConstructor',
    # bf16 has the range of fp32, so its gradients need no scaling. The released recipe has fp16
    # with a scaler: --amp fp16. On a CPU it is fp32.
    type='SyncFreeAmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=dict(enabled=False),
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    # Decayed is what has two or more dimensions and is no bias, as in the released recipe; so are
    # A_log, x_proj_weight, dt_proj_weight and dt_proj_bias.
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)

# Warm-up and final rates are ratios, so that --auto-scale-lr scales all three.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-2,
        by_epoch=True,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# The averaged weights, 0.9999 of the old and 1e-4 of the new ones after each step, are validated
# and saved as the model; the raw ones are validated beside them. BatchNorm's statistics are
# averaged with the weights that they belong to.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ForeachExponentialMovingAverage',
        momentum=1e-4,
        update_buffers=True,
        evaluate_on_origin=True,
    )
]

auto_scale_lr = dict(base_batch_size=1024)
