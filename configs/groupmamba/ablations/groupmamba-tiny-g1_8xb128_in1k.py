_base_ = ['../groupmamba-tiny_8xb128_in1k.py']

# one group has one direction, the first of Eq. 6: left-right
model = dict(backbone=dict(num_groups=1))
