"""ImageNet-1K with the released augmentation, batch 128 a GPU.

The released recipe also names a colour jitter of 0.4; timm drops it when RandAugment is on, so that
it never took effect, and it is left out here.
"""

dataset_type = 'ImageNet'
data_root = 'data/imagenet'

# ImageNet's mean and standard deviation, RGB, 0 to 255
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]

# The workers decode, crop and resize; the rest of the augmentation runs on whole batches on the
# model's device. Its colours are RGB.
data_preprocessor = dict(
    type='AugmentingClsDataPreprocessor',
    num_classes=1000,
    mean=mean,
    std=std,
    to_rgb=True,
    augments=[
        dict(type='BatchRandomFlip', prob=0.5),
        dict(
            type='BatchRandAugment',
            policies='timm_increasing',
            num_policies=2,
            total_level=10,
            magnitude_level=9,
            magnitude_std=0.5,
            hparams=dict(pad_val=[round(x) for x in mean], interpolation='bicubic'),
        ),
        dict(
            type='BatchRandomErasing',
            erase_prob=0.25,
            mode='rand',
            min_area_ratio=0.02,
            max_area_ratio=1 / 3,
            fill_color=mean,
            fill_std=std,
        ),
    ],
)

train_pipeline = [
    dict(type='CheckedLoadImageFromFile'),
    dict(type='AntialiasedRandomResizedCrop', scale=224, interpolation='bicubic'),
    dict(type='PackInputs'),
]

test_pipeline = [
    dict(type='CheckedLoadImageFromFile'),
    dict(type='AntialiasedResizeEdge', scale=256, edge='short', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=12,
    collate_fn=dict(type='stack_samples'),
    dataset=dict(type=dataset_type, data_root=data_root, split='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)

val_dataloader = dict(
    batch_size=128,
    num_workers=12,
    collate_fn=dict(type='stack_samples'),
    dataset=dict(type=dataset_type, data_root=data_root, split='val', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
