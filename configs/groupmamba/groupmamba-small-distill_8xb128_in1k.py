_base_ = [
    '../_base_/models/groupmamba-distill_cls.py',
    '../_base_/datasets/imagenet_bs128_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/runtime_cls.py',
]

model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
