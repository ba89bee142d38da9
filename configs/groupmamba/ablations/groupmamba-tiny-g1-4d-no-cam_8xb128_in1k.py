_base_ = ['./groupmamba-tiny-4d-no-cam_8xb128_in1k.py']

# "4-D scanning" read as no grouping at all, which has nearly twice the parameters
model = dict(backbone=dict(num_groups=1))
