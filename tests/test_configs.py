"""Every classification config: it builds, trains a step, and says what the recipe says.

The others are in test_dense_configs.py.
"""

import logging
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.checkpoint import revert_to_official
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.runner import without_amp
from groupmamba_mm.layers.channel_affinity import NoChannelAffinity
from groupmamba_mm.ops import DIRECTIONS, MIRRORED_DIRECTIONS
from tests.conftest import REPO

CONFIGS = sorted(
    str(path.relative_to(REPO))
    for path in (REPO / 'configs').rglob('*.py')
    if not {'_base_', 'mask_rcnn', 'upernet'} & set(path.parts)
    and '_demo-det' not in path.stem
    and '_demo-seg' not in path.stem
)
IN1K = [path for path in CONFIGS if path.endswith('_in1k.py')]
ABLATIONS = 'configs/groupmamba/ablations'
BACKBONE = 'model.backbone'
WIDE = dict(
    family='paper',
    stem_channels=32,
    embed_dims=(96, 192, 392, 1032),
    depths=(2, 2, 9, 2),
    ffn_ratios=(8, 8, 2, 2),
)
#: What each ablation changes, against which config of the folder above.
CHANGES = {
    'groupmamba-tiny-g1': ('groupmamba-tiny', {f'{BACKBONE}.num_groups': 1}),
    'groupmamba-tiny-g2': ('groupmamba-tiny', {f'{BACKBONE}.num_groups': 2}),
    'groupmamba-tiny-g8': (
        'groupmamba-tiny',
        {
            f'{BACKBONE}.num_groups': 8,
            f'{BACKBONE}.directions': (*DIRECTIONS, *MIRRORED_DIRECTIONS),
        },
    ),
    'groupmamba-tiny-d1-distill': (
        'groupmamba-tiny-distill',
        {f'{BACKBONE}.directions': ('left-right',)},
    ),
    'groupmamba-tiny-d1-d2-distill': (
        'groupmamba-tiny-distill',
        {f'{BACKBONE}.directions': ('left-right', 'right-left')},
    ),
    'groupmamba-tiny-no-cam': ('groupmamba-tiny', {f'{BACKBONE}.channel_affinity': False}),
    'groupmamba-tiny-4d-no-cam': (
        'groupmamba-tiny',
        {f'{BACKBONE}.channel_affinity': False, f'{BACKBONE}.share_directions': True},
    ),
    'groupmamba-tiny-g1-4d-no-cam': (
        'groupmamba-tiny',
        {
            f'{BACKBONE}.channel_affinity': False,
            f'{BACKBONE}.share_directions': True,
            f'{BACKBONE}.num_groups': 1,
        },
    ),
    'groupmamba-tiny-wide': (
        'groupmamba-tiny',
        {f'{BACKBONE}.arch': WIDE, 'model.head.in_channels': 1032},
    ),
}
#: The directions of each scan's groups that come of it, in the first layer.
ROW, BACK, COLUMN, UP = 'left-right', 'right-left', 'top-bottom', 'bottom-top'
PLANS = {
    'groupmamba-tiny-g1': ((ROW,),),
    'groupmamba-tiny-g2': ((ROW, BACK),),
    'groupmamba-tiny-g8': ((ROW, BACK, COLUMN, UP, *MIRRORED_DIRECTIONS),),
    'groupmamba-tiny-d1-distill': ((ROW,) * 4,),
    'groupmamba-tiny-d1-d2-distill': ((ROW, BACK) * 2,),
    'groupmamba-tiny-no-cam': ((ROW, BACK, COLUMN, UP),),
    'groupmamba-tiny-4d-no-cam': ((ROW,) * 4, (BACK,) * 4, (COLUMN,) * 4, (UP,) * 4),
    'groupmamba-tiny-g1-4d-no-cam': ((ROW,), (BACK,), (COLUMN,), (UP,)),
    'groupmamba-tiny-wide': ((ROW, BACK, COLUMN, UP),),
}


def load(path):
    cfg = load_config(str(REPO / path), {})
    init_default_scope(cfg.default_scope)
    return cfg


def test_all_promised_configs_are_there():
    names = {Path(path).name for path in CONFIGS}
    for size in ('tiny', 'small', 'base'):
        assert {
            f'groupmamba-{size}_8xb128_in1k.py',
            f'groupmamba-official-{size}_8xb128_in1k.py',
        } <= names
        assert {
            f'groupmamba-{size}-distill_8xb128_in1k.py',
            f'groupmamba-official-{size}-distill_8xb128_in1k.py',
        } <= names
    assert {
        'groupmamba-pico_demo-cls.py',
        'groupmamba-official-pico_demo-cls.py',
        'groupmamba-pico-distill_demo-cls.py',
        'regnety-002_demo-cls.py',
    } <= names
    assert {
        str(Path(path).relative_to(ABLATIONS)) for path in CONFIGS if path.startswith(ABLATIONS)
    } == {f'{name}_8xb128_in1k.py' for name in CHANGES}


@pytest.mark.parametrize('path', CONFIGS)
def test_builds_and_trains_a_step(path):
    cfg = load(path)
    if 'teacher' in cfg.model:
        cfg.model.teacher = dict(type='RandomTeacher')
    model = build_model(cfg).train()
    num_classes = cfg.data_preprocessor.num_classes
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    data = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    losses = model(**data, mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    model.eval()
    with torch.no_grad():
        logits = model(data['inputs'], mode='tensor')
        predicted = model(data['inputs'], samples, mode='predict')
    assert logits.shape == (2, num_classes)
    scores = torch.stack([sample.pred_score for sample in predicted])
    torch.testing.assert_close(scores, logits.softmax(-1))


@pytest.mark.parametrize('path', CONFIGS)
def test_data_sets_have_pipelines_that_build(path):
    cfg = load(path)
    from mmengine.registry import TRANSFORMS

    for split in ('train', 'val', 'test'):
        for transform in cfg[f'{split}_dataloader'].dataset.pipeline:
            TRANSFORMS.build(transform)


#: The published recipe: where a config says it, and what. "Paper" is its Sec. 4.1; the rest is the
#: released training script's.
RECIPE = {
    'optim_wrapper.optimizer.type': 'AdamW',  # paper
    'optim_wrapper.optimizer.lr': 1e-3,  # paper, at batch 1024
    'optim_wrapper.optimizer.betas': (0.9, 0.999),  # paper
    'optim_wrapper.optimizer.eps': 1e-8,
    'optim_wrapper.optimizer.weight_decay': 0.05,  # paper
    'optim_wrapper.clip_grad.max_norm': 5.0,
    'train_cfg.max_epochs': 300,  # paper
    'param_scheduler.0.type': 'LinearLR',
    'param_scheduler.0.start_factor': 1e-6 / 1e-3,  # of the learning rate
    'param_scheduler.0.end': 20,  # paper
    'param_scheduler.0.convert_to_iter_based': True,
    'param_scheduler.1.type': 'CosineAnnealingLR',  # paper
    'param_scheduler.1.eta_min_ratio': 1e-5 / 1e-3,
    'param_scheduler.1.begin': 20,
    'param_scheduler.1.end': 300,
    'param_scheduler.1.convert_to_iter_based': True,
    'auto_scale_lr.base_batch_size': 1024,  # paper
    'train_dataloader.batch_size': 1024 // 8,  # paper
    'custom_hooks.0.type': 'EMAHook',
    'custom_hooks.0.momentum': 1 - 0.9999,  # mmengine's is the weight of the new value
    'custom_hooks.0.update_buffers': True,
    'custom_hooks.0.evaluate_on_origin': True,
    'model.backbone.drop_path_rate': 0.05,
    'model.head.loss.type': 'LabelSmoothLoss',
    'model.head.loss.label_smooth_val': 0.1,  # paper
    'model.head.loss.mode': 'original',
    # half of the batches each, none unmixed
    'model.train_cfg': dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    ),
    'train.AntialiasedRandomResizedCrop.scale': 224,  # paper
    'train.AntialiasedRandomResizedCrop.interpolation': 'bicubic',
    'augments.BatchRandomFlip.prob': 0.5,
    'augments.BatchRandAugment.policies': 'timm_increasing',
    'augments.BatchRandAugment.num_policies': 2,
    'augments.BatchRandAugment.magnitude_level': 9,
    'augments.BatchRandAugment.total_level': 10,
    'augments.BatchRandAugment.hparams': dict(pad_val=[124, 116, 104], interpolation='bicubic'),
    'augments.BatchRandAugment.magnitude_std': 0.5,
    'augments.BatchRandomErasing.erase_prob': 0.25,
    'augments.BatchRandomErasing.mode': 'rand',
    'augments.BatchRandomErasing.min_area_ratio': 0.02,
    'augments.BatchRandomErasing.max_area_ratio': 1 / 3,
    'augments.BatchRandomErasing.fill_color': [123.675, 116.28, 103.53],
    'augments.BatchRandomErasing.fill_std': [58.395, 57.12, 57.375],
    'train.ColorJitter': None,  # 0.4 is set, and timm drops it beside RandAugment
    'test.AntialiasedResizeEdge.scale': 256,
    'test.AntialiasedResizeEdge.interpolation': 'bicubic',
    'test.CenterCrop.crop_size': 224,
    'sync_bn': None,
    # not the released script's: fp16 with a scaler there
    'optim_wrapper.type': 'SyncFreeAmpOptimWrapper',
    'optim_wrapper.dtype': 'bfloat16',
    'optim_wrapper.loss_scale': dict(enabled=False),
}
#: What distillation adds.
DISTILLATION = {
    'model.type': 'DistilledClassifier',
    'model.head.alpha': 0.5,
    'model.teacher.type': 'TimmTeacher',
    'model.teacher.model_name': 'regnety_160.deit_in1k',  # RegNetY-16GF: paper
    # not the released script's: fp32 there
    'model.teacher.precision': 'bf16',
}
#: Names of the released model's parameters with the decay of the released rule: two or more
#: dimensions, and a name that does not end in '.bias'.
DECAYED = {
    'patch_embed1.conv.0.weight': True,
    'patch_embed1.conv.1.weight': False,
    'patch_embed1.conv.1.bias': False,
    'patch_embed1.proj.weight': True,
    'patch_embed1.proj.bias': False,
    'block1.0.norm2.weight': False,
    'block1.0.attn.mamba_g1.in_proj.weight': True,
    'block1.0.attn.mamba_g2.conv2d.weight': True,
    'block1.0.attn.mamba_g2.conv2d.bias': False,
    'block1.0.attn.mamba_g3.x_proj_weight': True,
    'block1.0.attn.mamba_g3.dt_projs_weight': True,
    'block1.0.attn.mamba_g3.dt_projs_bias': True,
    'block1.0.attn.mamba_g4.A_logs': True,
    'block1.0.attn.mamba_g4.Ds': False,
    'block1.0.attn.mamba_g4.out_norm.weight': False,
    'block1.0.attn.skip_scale': False,
    'block1.0.attn.fc1.weight': True,
    'block1.0.attn.fc1.bias': False,
    'block1.0.mlp.dwconv.dwconv.weight': True,
    'head.weight': True,
    'head.bias': False,
    'dist_head.weight': True,
}


def stated(cfg, key):
    """What a config says at a dotted key; steps of pipelines and augments go by their type."""
    first, *rest = key.split('.')
    if first in ('train', 'test'):
        steps = {step.type: step for step in cfg[f'{first}_dataloader'].dataset.pipeline}
        found = steps.get(rest.pop(0))
    elif first == 'augments':
        found = {step.type: step for step in cfg.data_preprocessor.augments}[rest.pop(0)]
    else:
        found = cfg.get(first)
    for name in rest:
        found = found[int(name)] if name.isdecimal() else found[name]
    return found


@pytest.mark.parametrize('path', IN1K)
def test_recipe(path):
    cfg = load(path)
    facts = dict(RECIPE, **(DISTILLATION if '-distill_' in path else {}))
    for key, value in facts.items():
        found = stated(cfg, key)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), key
    if '-distill_' in path:
        two_heads = cfg.model.backbone.arch.startswith('official')
        assert cfg.model.head.type == f'Distilled{"TwoHead" if two_heads else "Linear"}ClsHead'
        assert cfg.model.head.get('distill_loss', dict(kind='hard')) == dict(kind='hard')
        assert cfg.model.teacher.checkpoint.endswith('/regnety_160-a5fe301d.pth')
    else:
        assert 'teacher' not in cfg.model


def weight_decays(path):
    """The parameters of a config's model by name, with the decay that its optimizer gives them."""
    cfg = load(path)
    model = build_model(cfg)
    optim_wrapper = build_optim_wrapper(model, without_amp(cfg.optim_wrapper, logging.getLogger()))
    decay = {
        id(p): group['weight_decay']
        for group in optim_wrapper.param_groups
        for p in group['params']
    }
    return {name: (parameter, decay[id(parameter)]) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('name', ['official-tiny', 'official-tiny-distill'])
def test_weight_decay_by_the_released_names(name):
    decays = {}
    for ours, (parameter, decay) in weight_decays(
        f'configs/groupmamba/groupmamba-{name}_8xb128_in1k.py'
    ).items():
        for released, tensor in revert_to_official({ours: parameter.detach()}).items():
            decays[released] = decay
            decayed = tensor.dim() >= 2 and not released.endswith('.bias')
            assert decay == (0.05 if decayed else 0.0), released
    assert len(decays) > 500
    for released, decayed in DECAYED.items():
        assert decays[released] == (0.05 if decayed else 0.0), released


@pytest.mark.parametrize('name', ['tiny', 'tiny-distill'])
def test_weight_decay_of_the_papers_family_follows_the_released_rule(name):
    decays = weight_decays(f'configs/groupmamba/groupmamba-{name}_8xb128_in1k.py')
    for ours, (parameter, decay) in decays.items():
        # our GroupedLinear joins the groups' biases to two dimensions; they stay biases
        decayed = parameter.dim() >= 2 and not ours.endswith('.bias')
        assert decay == (0.05 if decayed else 0.0), ours
    assert {
        ours.rsplit('.', 1)[1]
        for ours, (_, decay) in decays.items()
        if '.ssm.' in ours and decay > 0
    } == {'x_proj_weight', 'dt_proj_weight', 'dt_proj_bias', 'A_log'}


def flat(cfg, prefix=''):
    """The values of a config by their dotted keys; a changed arch counts as one value."""
    found = {}
    for key, value in cfg.items():
        if isinstance(value, dict) and key != 'arch':
            found.update(flat(value, f'{prefix}{key}.'))
        else:
            found[f'{prefix}{key}'] = value
    return found


@pytest.mark.parametrize('name', CHANGES)
def test_an_ablation_differs_in_what_its_name_says(name):
    base, changes = CHANGES[name]
    before = flat(load(f'configs/groupmamba/{base}_8xb128_in1k.py'))
    cfg = load(f'{ABLATIONS}/{name}_8xb128_in1k.py')
    after = flat(cfg)
    assert set(before) <= set(after)
    assert {
        key: value for key, value in after.items() if key not in before or value != before[key]
    } == changes
    layer = build_model(cfg).backbone.stages[0][0]
    assert layer.vsss.mamba.plan == PLANS[name]
    assert isinstance(layer.affinity, NoChannelAffinity) == ('no-cam' in name)


def test_head_is_found_through_the_root_registry():
    load(CONFIGS[0])
    assert MODELS.get('TwoHeadClsHead') is not None
