"""Every classification config: it builds, trains a step, and says what the recipe says.

The others are in test_dense_configs.py.
"""
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.engine.config_checks import load_config
from tests.conftest import REPO

CONFIGS = sorted(
    str(path.relative_to(REPO)) for path in (REPO / 'configs').rglob('*.py')
    if not {'_base_', 'mask_rcnn', 'upernet'} & set(path.parts)
    and not path.stem.endswith(('demo-det', 'demo-seg')))
IN1K = [path for path in CONFIGS if path.endswith('_in1k.py')]


def load(path):
    cfg = load_config(str(REPO / path), {})
    init_default_scope(cfg.default_scope)
    return cfg


def test_all_promised_configs_are_there():
    names = {Path(path).name for path in CONFIGS}
    for size in ('tiny', 'small', 'base'):
        assert {f'groupmamba-{size}_8xb128_in1k.py',
                f'groupmamba-official-{size}_8xb128_in1k.py'} <= names
    assert {'groupmamba-pico_demo-cls.py', 'groupmamba-official-pico_demo-cls.py'} <= names


@pytest.mark.parametrize('path', CONFIGS)
def test_builds_and_trains_a_step(path):
    cfg = load(path)
    model = build_model(cfg).train()
    num_classes = cfg.model.head.num_classes
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


@pytest.mark.parametrize('path', IN1K)
def test_recipe(path):
    """The published settings, Sec. 4.1 of the paper and the released recipe."""
    cfg = load(path)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05)
    assert tuple(optimizer.betas) == (0.9, 0.999) and optimizer.eps == 1e-8
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.
    warmup, cosine = cfg.param_scheduler
    assert (warmup.end, cosine.begin, cosine.end, cfg.train_cfg.max_epochs) == (20, 20, 300, 300)
    assert warmup.start_factor * optimizer.lr == pytest.approx(1e-6)
    assert cosine.eta_min_ratio * optimizer.lr == pytest.approx(1e-5)
    assert warmup.convert_to_iter_based and cosine.convert_to_iter_based
    # 8 processes of 128
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 1024
    assert cfg.model.backbone.drop_path_rate == 0.05
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [
        ('Mixup', 0.8), ('CutMix', 1.0)]
    steps = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert 'ColorJitter' not in steps
    augment = steps['RandAugment']
    assert (augment.num_policies, augment.magnitude_level, augment.magnitude_std) == (2, 9, 0.5)
    assert augment.policies == 'timm_increasing'
    assert (steps['RandomErasing'].erase_prob, steps['RandomErasing'].mode) == (0.25, 'rand')
    assert steps['RandomResizedCrop'].interpolation == 'bicubic'
    test_steps = {t.type: t for t in cfg.test_dataloader.dataset.pipeline}
    assert test_steps['ResizeEdge'].scale == 256 and test_steps['CenterCrop'].crop_size == 224


@pytest.mark.parametrize('path', [p for p in IN1K if 'tiny' in p])
def test_weight_decay_is_the_released_rule(path):
    """Decayed: two or more dimensions, and a name that does not end in '.bias'."""
    cfg = load(path)
    model = build_model(cfg)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in optim_wrapper.param_groups
             for p in group['params']}
    for name, parameter in model.named_parameters():
        # our GroupedLinear joins the groups' biases to two dimensions; they stay biases
        decayed = parameter.dim() >= 2 and not name.endswith('.bias')
        assert decay[id(parameter)] == (0.05 if decayed else 0.), name
    decayed_ssm = {name.rsplit('.', 1)[1] for name, p in model.named_parameters()
                   if '.ssm.' in name and decay[id(p)] > 0}
    assert decayed_ssm == {'x_proj_weight', 'dt_proj_weight', 'dt_proj_bias', 'A_log'}


def test_head_is_found_through_the_root_registry():
    load(CONFIGS[0])
    assert MODELS.get('TwoHeadClsHead') is not None
