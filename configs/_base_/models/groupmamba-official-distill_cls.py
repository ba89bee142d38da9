"""The released family as it was trained: a head for the label, one for the teacher's decision."""

_base_ = ['./groupmamba-distill_cls.py']

model = dict(head=dict(type='DistilledTwoHeadClsHead'))
