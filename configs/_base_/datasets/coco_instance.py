"""mmdet's COCO instance data, with training images that are checked when they are loaded.

Test images are loaded by mmdet's own transform, for which its inferencer looks by name.
"""

_base_ = ['mmdet::_base_/datasets/coco_instance.py']

# shorter side 800, longer side at most 1333, in training and test: Swin's for 1x
train_pipeline = [
    dict(type='CheckedLoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]

# 8 GPUs make the batch of 16, Swin's
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
