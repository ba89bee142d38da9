"""36 epochs of AdamW on COCO. The paper trains 1x only: the steps are Swin's."""

_base_ = ['./coco_adamw_1x.py']

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=1000),
    dict(type='MultiStepLR', by_epoch=True, end=36, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)
