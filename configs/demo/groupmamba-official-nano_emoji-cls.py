"""300 emoji on photographs, validated on drawings by another hand; needs a GPU for its time.

The data: tools/dataset_converters/make_emoji_data.py data/emoji
"""

_base_ = ['./groupmamba-official-pico_demo-cls.py']

data_root = 'data/emoji'
train_pipeline = [
    dict(type='CheckedLoadImageFromFile'),
    dict(type='RandomCrop', crop_size=96, padding=8, padding_mode='reflect'),
    dict(type='PackInputs'),
]

data_preprocessor = dict(num_classes=300)
train_dataloader = dict(
    batch_size=128, num_workers=8, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(batch_size=128, num_workers=4, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

model = dict(
    backbone=dict(
        arch=dict(
            family='official',
            stem_channels=32,
            embed_dims=(48, 96, 192, 288),
            depths=(2, 2, 4, 2),
            ffn_ratios=(4, 4, 4, 4),
        ),
        drop_path_rate=0.1,
    ),
    head=dict(num_classes=300, in_channels=288),
)

optim_wrapper = dict(
    type='SyncFreeAmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False)
)
auto_scale_lr = dict(base_batch_size=128)
