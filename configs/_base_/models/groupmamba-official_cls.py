"""The released family as a classifier: class block, two linear heads, their mean at test time."""

_base_ = ['./groupmamba_cls.py']

model = dict(head=dict(type='TwoHeadClsHead'))
