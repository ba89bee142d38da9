"""Demo scenes of 256x256 pixels, for a GPU: make_demo_data.py data/demo-256 --task seg."""

_base_ = ['./demo_seg.py']

data_root = 'data/demo-256/seg'

train_dataloader = dict(
    num_workers=3,
    # the run is counted in iterations
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root=data_root),
)
val_dataloader = dict(num_workers=2, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
