_base_ = ['../groupmamba-tiny_8xb128_in1k.py']

# two groups have the first two directions of Eq. 6: left-right, right-left
model = dict(backbone=dict(num_groups=2))
