"""The paper's ablations, small: directions, groups, channel affinity and family, three seeds.

Table 4 and Figure 4 ask the same of ImageNet. The data: make_emoji_data.py data/emoji
"""

_config = 'configs/demo/groupmamba-official-nano_emoji-cls.py'
_four = ('left-right', 'right-left', 'top-bottom', 'bottom-top')
_changes = {
    'four groups, four directions': {},
    'D1': {'model.backbone.directions': _four[:1]},
    'D1 and D2': {'model.backbone.directions': _four[:2]},
    'one group': {'model.backbone.num_groups': 1},
    'two groups': {'model.backbone.num_groups': 2},
    'eight groups, eight directions': {
        'model.backbone.num_groups': 8,
        'model.backbone.directions': (*_four, *(f'{name}-mirrored' for name in _four)),
    },
    'no channel affinity': {'model.backbone.channel_affinity': False},
    "the paper's family": {
        'model.backbone.arch.family': 'paper',
        'model.head.type': 'LinearClsHead',
    },
}

_epochs = {'train_cfg.max_epochs': 20, 'param_scheduler.1.end': 20}
variants = {name: {'config': _config, **_epochs, **changes} for name, changes in _changes.items()}
seeds = [0, 1, 2]
keys = ['loss', 'accuracy/top1']
