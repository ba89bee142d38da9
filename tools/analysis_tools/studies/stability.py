"""Does a large model need the teacher? official-base on the demo data, at ever higher rates.

The teacher is trained first: tools/train.py configs/demo/regnety-002_demo-cls.py
"""

_options = {
    'model.backbone.arch': 'official-base',
    'model.backbone.drop_path_rate': 0.5,
    'model.head.in_channels': 512,
    'train_dataloader.batch_size': 128,
    'train_dataloader.num_workers': 8,
    'optim_wrapper.type': 'SyncFreeAmpOptimWrapper',
    'optim_wrapper.dtype': 'bfloat16',
    'optim_wrapper.loss_scale': dict(enabled=False),
    'train_cfg.max_epochs': 10,
    'param_scheduler.1.end': 10,
}

variants = {
    f'{teacher}, lr {lr:g}': {
        'config': f'configs/demo/groupmamba-official-pico{suffix}_demo-cls.py',
        'optim_wrapper.optimizer.lr': lr,
        **_options,
    }
    for lr in (1e-3, 4e-3, 1.6e-2, 6.4e-2)
    for teacher, suffix in (('without', ''), ('with the teacher', '-distill'))
}
seeds = [0, 1]
keys = ['loss', 'accuracy/top1']
