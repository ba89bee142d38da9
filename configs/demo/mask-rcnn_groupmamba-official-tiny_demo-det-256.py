_base_ = ['./mask-rcnn_groupmamba-tiny_demo-det-256.py']

model = dict(backbone=dict(arch='official-tiny'), neck=dict(in_channels=[64, 128, 348, 448]))
