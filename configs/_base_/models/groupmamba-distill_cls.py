"""The paper's family with the distilled objective (Eq. 10): one head, a RegNetY-16GF teacher."""

_base_ = ['./groupmamba_cls.py']

model = dict(
    type='DistilledClassifier',
    # alpha weights the label; the paper does not state it, the released recipe has one half
    head=dict(type='DistilledLinearClsHead', alpha=0.5),
    teacher=dict(
        type='TimmTeacher',
        model_name='regnety_160.deit_in1k',
        # DeiT's teacher; a file serves as well: --cfg-options model.teacher.checkpoint=FILE
        checkpoint='https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth',
        # the released script's teacher is in fp32: --cfg-options model.teacher.precision=fp32
        precision='bf16',
        channels_last=True,
        cuda_graph=True,
    ),
)
