_base_ = ['../groupmamba-tiny_8xb128_in1k.py']

# eight groups have the four directions twice over; the paper's other four are not stated
model = dict(backbone=dict(num_groups=8))
