_base_ = ['../groupmamba-tiny-distill_8xb128_in1k.py']

# Table 4, D1 and D2: the four groups take them in turns
model = dict(backbone=dict(directions=('left-right', 'right-left')))
