_base_ = ['./groupmamba-pico_demo-cls.py']

model = dict(
    type='DistilledClassifier',
    head=dict(type='DistilledLinearClsHead', alpha=0.5),
    teacher=dict(
        type='ConfigTeacher',
        config='{{ fileDirname }}/regnety-002_demo-cls.py',
        # written by tools/train.py with that config
        checkpoint='work_dirs/regnety-002_demo-cls/epoch_6.pth',
    ),
)
