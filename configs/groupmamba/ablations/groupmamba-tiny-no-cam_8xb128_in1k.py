_base_ = ['../groupmamba-tiny_8xb128_in1k.py']

# Fig. 4: one direction a group, before channel affinity modulation was added
model = dict(backbone=dict(channel_affinity=False))
