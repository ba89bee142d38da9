"""What every classification run shares."""

_base_ = ['mmpretrain::_base_/default_runtime.py']

custom_imports = dict(
    imports=[
        'groupmamba_mm',
        'groupmamba_mm.heads',
        'groupmamba_mm.distillation',
        'groupmamba_mm.datasets.loading',
        'groupmamba_mm.datasets.classification',
        'groupmamba_mm.engine',
    ]
)

default_hooks = dict(
    checkpoint=dict(
        type='CheckpointHook',
        interval=1,
        max_keep_ckpts=3,
        save_best='accuracy/top1',
        rule='greater',
    )
)
