"""What every detection run shares."""

_base_ = ['mmdet::_base_/default_runtime.py']

custom_imports = dict(
    imports=[
        'groupmamba_mm',
        'groupmamba_mm.detection',
        'groupmamba_mm.datasets.loading',
        'groupmamba_mm.engine',
    ]
)

default_hooks = dict(
    checkpoint=dict(
        type='CheckpointHook',
        interval=1,
        max_keep_ckpts=3,
        save_best='coco/bbox_mAP',
        rule='greater',
    )
)
