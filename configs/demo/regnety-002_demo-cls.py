"""A small teacher of the kind that the published models had, for *-distill_demo-cls.py."""

_base_ = [
    '../_base_/datasets/demo_cls.py',
    '../_base_/schedules/demo_adamw.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    type='TimmClassifier',
    model_name='regnety_002',
    # the usual stride of 32 leaves 2x2 tokens of a picture, few to tell digits apart
    output_stride=16,
    num_classes=10,
    loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
)

optim_wrapper = dict(optimizer=dict(lr=3e-3))

randomness = dict(seed=0)
