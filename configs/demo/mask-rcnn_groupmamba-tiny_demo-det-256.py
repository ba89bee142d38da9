_base_ = [
    '../_base_/models/mask-rcnn_groupmamba_fpn.py',
    '../_base_/datasets/demo_det_256.py',
    '../_base_/runtime_det.py',
    '../_base_/schedules/demo_adamw_gpu.py',
]

norm_cfg = dict(type='GN', num_groups=32)

# The full-size model. From scratch and in few steps it learns with what the pico config has too:
# norms in neck and mask head, and boxes and masks that all classes share.
model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.0),
    neck=dict(in_channels=[96, 192, 368, 760], norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(num_classes=10, reg_class_agnostic=True),
        mask_head=dict(num_classes=10, class_agnostic=True, norm_cfg=norm_cfg),
    ),
    # six digits at most need fewer boxes than COCO's pictures
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=1000, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(max_per_img=200), rcnn=dict(max_per_img=20)),
)

# The first of the box head's layers sums up 12544 inputs: its steps are as large as those of the
# pico config's, which has 3136.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'shared_fcs.0': dict(lr_mult=0.25)}))

# this run is counted in iterations
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=300, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
