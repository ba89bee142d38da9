_base_ = ['../groupmamba-tiny-distill_8xb128_in1k.py']

# Table 4, D1: the four groups are all scanned in the same direction
model = dict(backbone=dict(directions=('left-right',)))
