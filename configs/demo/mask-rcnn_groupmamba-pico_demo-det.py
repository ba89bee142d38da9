_base_ = [
    '../_base_/models/mask-rcnn_groupmamba_fpn.py',
    '../_base_/datasets/demo_det.py',
    '../_base_/schedules/demo_adamw.py',
    '../_base_/runtime_det.py',
]

norm_cfg = dict(type='GN', num_groups=8)

model = dict(
    data_preprocessor=dict(pad_size_divisor=1),
    # the backbone of groupmamba-pico_demo-cls.py, whose weights fit
    backbone=dict(
        arch=dict(
            family='paper',
            stem_channels=64,
            embed_dims=(32, 96, 144, 192),
            depths=(1, 1, 1, 1),
            ffn_ratios=(2, 2, 2, 2),
        ),
        drop_path_rate=0.0,
        init_cfg=dict(type='TruncNormal', layer=['Linear', 'GroupedLinear'], std=0.1),
    ),
    # norms, and boxes and masks that all classes share, learn in fewer steps
    neck=dict(in_channels=[32, 96, 144, 192], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # boxes have 20 to 64 pixels a side
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        # boxes of less than 64 pixels are cut out of the level of stride 4
        bbox_roi_extractor=dict(out_channels=64, finest_scale=32),
        bbox_head=dict(
            in_channels=64, fc_out_channels=256, num_classes=10, reg_class_agnostic=True
        ),
        mask_roi_extractor=dict(out_channels=64, finest_scale=32),
        mask_head=dict(
            num_convs=2,
            in_channels=64,
            conv_out_channels=64,
            num_classes=10,
            class_agnostic=True,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)

train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-2,
        by_epoch=True,
        end=3,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=8)

# fixes the first weights, the order of the pictures and the boxes that are sampled
randomness = dict(seed=0)
