_base_ = ['./groupmamba-tiny_upernet_demo-seg-256.py']

model = dict(
    backbone=dict(arch='official-tiny'),
    decode_head=dict(in_channels=[64, 128, 348, 448]),
    auxiliary_head=dict(in_channels=348),
)
