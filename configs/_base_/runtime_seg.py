"""What every segmentation run shares. mmseg's own base cannot be named by ``mmseg::``."""

custom_imports = dict(
    imports=['groupmamba_mm', 'groupmamba_mm.datasets.loading', 'groupmamba_mm.engine']
)

default_scope = 'mmseg'

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    # a run is counted in iterations
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=16000,
        max_keep_ckpts=3,
        save_best='mIoU',
        rule='greater',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)

env_cfg = dict(
    # batches have one size, so that the fastest convolutions are worth a search
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
