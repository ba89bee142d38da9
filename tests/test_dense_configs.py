"""Every detection and segmentation config: it builds, trains a step, and says what it should."""

import numpy as np
import pytest
import torch
import yaml
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.optim import build_optim_wrapper
from mmengine.registry import TRANSFORMS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.backbones import ARCHS
from groupmamba_mm.engine.config_checks import load_config
from tests.conftest import REPO, SMALL

CONFIGS = sorted(
    str(path.relative_to(REPO))
    for path in (REPO / 'configs').rglob('*.py')
    if {'mask_rcnn', 'upernet'} & set(path.parts)
    or '_demo-det' in path.stem
    or '_demo-seg' in path.stem
)
COCO_1X = {size: f'configs/mask_rcnn/mask-rcnn_groupmamba-{size}_fpn_1x_coco.py' for size in ARCHS}
ADE = {
    size: f'configs/upernet/groupmamba-{size}_upernet_8xb2-160k_ade20k-512x512.py' for size in ARCHS
}
COCO_3X = [path for path in CONFIGS if 'ms-crop-3x' in path]

#: The same model, trained on fewer of its boxes: what a test can wait for.
FEW_BOXES = {'model.train_cfg.rpn_proposal.max_per_img': 20, 'model.train_cfg.rcnn.sampler.num': 16}


def listed(path):
    """A config's entry in the metafile beside it."""
    models = yaml.safe_load((REPO / path).with_name('metafile.yml').read_text())['Models']
    [model] = [model for model in models if model['Config'] == path]
    return model['Metadata']


def load(path, options=None):
    cfg = load_config(str(REPO / path), {'model.backbone.init_cfg': None, **(options or {})})
    init_default_scope(cfg.default_scope)
    return cfg


def small(path, size):
    """A config with a small backbone of the same family."""
    arch = SMALL[ARCHS[size].family]
    dims = arch['embed_dims']
    if 'mask-rcnn' in path:
        cfg = load(path, {'model.neck.in_channels': list(dims), **FEW_BOXES})
    else:
        cfg = load(
            path,
            {
                'model.decode_head.in_channels': list(dims),
                'model.auxiliary_head.in_channels': dims[2],
            },
        )
    cfg.model.backbone.arch = arch
    return cfg


def detection_batch(sizes, num_classes):
    """Noise images with one box each, its mask the whole of it."""
    inputs, samples = [], []
    for number, (height, width) in enumerate(sizes):
        inputs.append(
            torch.randint(
                0,
                256,
                (3, height, width),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(number),
            )
        )
        mask = np.zeros((1, height, width), np.uint8)
        mask[:, 4 : height - 8, 8 : width - 4] = 1
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width),
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
                img_id=number,
                pad_shape=(height, width),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8.0, 4.0, width - 4.0, height - 8.0]]),
            labels=torch.tensor([number % num_classes]),
            masks=BitmapMasks(mask, height, width),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def segmentation_batch(sizes, num_classes):
    """Noise images with noise labels, some of them ignored."""
    inputs, samples = [], []
    for number, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        inputs.append(
            torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        )
        labels = torch.randint(0, num_classes, (1, height, width), generator=generator)
        labels[:, :3] = 255
        sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def batch_for(cfg, sizes):
    if cfg.default_scope == 'mmdet':
        return detection_batch(sizes, cfg.model.roi_head.bbox_head.num_classes)
    return segmentation_batch(sizes, cfg.model.decode_head.num_classes)


def loss_of(model, batch):
    data = model.data_preprocessor(batch, training=True)
    losses = model(**data, mode='loss')
    return model.parse_losses(losses)


def test_all_promised_configs_are_there():
    assert set(COCO_1X.values()) | set(ADE.values()) <= set(CONFIGS)
    assert len(COCO_3X) == 2


@pytest.mark.parametrize('path', [path for path in CONFIGS if path not in COCO_3X])
def test_builds_and_trains_a_step(path, one_thread):
    cfg = load(path)
    if cfg.default_scope == 'mmdet':
        cfg.merge_from_dict(FEW_BOXES)
    else:
        cfg.model.data_preprocessor.size = (32, 48)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if 'demo' not in path:
        assert sum(p.numel() for p in model.parameters()) == listed(path)['Parameters']
    loss, _ = loss_of(model, batch_for(cfg, [(32, 48), (32, 48)]))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize('path', COCO_3X)
def test_3x_is_the_model_of_1x(path):
    size = 'official-tiny' if 'official' in path else 'tiny'
    cfg, once = load(path), load(COCO_1X[size])
    assert cfg.model == once.model and cfg.optim_wrapper == once.optim_wrapper
    counts = ('Parameters', 'FLOPs', 'Scan FLOPs')
    assert all(listed(path)[key] == listed(COCO_1X[size])[key] for key in counts)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 36
    assert cfg.param_scheduler[1].milestones == [27, 33]
    steps = cfg.train_dataloader.dataset.pipeline
    resize, crop = steps[3].transforms
    assert [scale[0] for scale in resize[0].scales] == list(range(480, 801, 32))
    assert [step.type for step in crop] == [
        'RandomChoiceResize',
        'RandomCrop',
        'RandomChoiceResize',
    ]


@pytest.mark.parametrize('path', CONFIGS)
def test_pipelines_build_and_test_images_are_found_by_inferencers(path):
    cfg = load(path)
    for split in ('train', 'val', 'test'):
        for transform in cfg[f'{split}_dataloader'].dataset.pipeline:
            TRANSFORMS.build(transform)
    assert cfg.train_dataloader.dataset.pipeline[0].type == 'CheckedLoadImageFromFile'
    assert cfg.test_dataloader.dataset.pipeline[0].type == 'LoadImageFromFile'


@pytest.mark.parametrize('size', ARCHS)
def test_backbone_settings(size):
    for path, drop_path in ((COCO_1X[size], 0.2), (ADE[size], 0.3)):
        cfg = load_config(str(REPO / path))
        backbone = cfg.model.backbone
        assert (backbone.arch, backbone.drop_path_rate) == (size, drop_path)
        assert backbone.init_cfg == dict(
            type='Pretrained', checkpoint=f'checkpoints/{size}.pth', prefix='backbone.'
        )
        dims = list(ARCHS[size].embed_dims)
        if 'mask_rcnn' in path:
            assert cfg.model.neck.in_channels == dims
        else:
            assert cfg.model.decode_head.in_channels == dims
            assert cfg.model.auxiliary_head.in_channels == dims[2]


def check_optimizer(cfg, lr, weight_decay):
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype) == ('SyncFreeAmpOptimWrapper', 'bfloat16')
    assert wrapper.loss_scale == dict(enabled=False)
    optimizer = wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, weight_decay)
    assert tuple(optimizer.betas) == (0.9, 0.999) and 'clip_grad' not in wrapper


@pytest.mark.parametrize('path', COCO_1X.values())
def test_coco_recipe(path):
    """The paper's settings, and Swin's where it has none."""
    cfg = load(path)
    check_optimizer(cfg, 1e-4, 0.05)
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.end, warmup.by_epoch) == ('LinearLR', 1000, False)
    assert (steps.milestones, steps.gamma, steps.end) == ([9, 11], 0.1, 12)
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 16
    (resize,) = (t for t in cfg.train_dataloader.dataset.pipeline if t.type == 'Resize')
    assert resize.scale == (1333, 800) and resize.keep_ratio
    assert cfg.test_evaluator.metric == ['bbox', 'segm']


@pytest.mark.parametrize('path', ADE.values())
def test_ade20k_recipe(path):
    """The paper's settings, and Swin's where it has none."""
    cfg = load(path)
    check_optimizer(cfg, 6e-5, 0.01)
    warmup, poly = cfg.param_scheduler
    assert (warmup.end, warmup.by_epoch) == (1500, False)
    assert (poly.power, poly.begin, poly.end, poly.by_epoch) == (1.0, 1500, 160000, False)
    assert cfg.train_cfg.max_iters == 160000
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 16
    (crop,) = (t for t in cfg.train_dataloader.dataset.pipeline if t.type == 'RandomCrop')
    assert crop.crop_size == cfg.model.data_preprocessor.size == (512, 512)
    scales, flips, _, _ = cfg.tta_pipeline[1].transforms
    assert [step.scale for step in scales] == [
        (1024, 256),
        (1536, 384),
        (2048, 512),
        (2560, 640),
        (3072, 768),
        (3584, 896),
    ]
    assert [flip.prob for flip in flips] == [0.0, 1.0]
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.reduce_zero_label
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        assert head.num_classes == 150 and head.norm_cfg.type == 'SyncBN'


@pytest.mark.parametrize(
    'path, size', [(COCO_1X['tiny'], 'tiny'), (ADE['official-tiny'], 'official-tiny')]
)
def test_weight_decay_is_the_classification_rule(path, size):
    cfg = small(path, size)
    model = build_model(cfg)
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=cfg.optim_wrapper.optimizer,
        paramwise_cfg=cfg.optim_wrapper.paramwise_cfg,
    )
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wanted = cfg.optim_wrapper.optimizer.weight_decay
    decay = {
        id(p): group['weight_decay'] for group in wrapper.param_groups for p in group['params']
    }
    for name, parameter in model.named_parameters():
        decayed = parameter.dim() >= 2 and not name.endswith('.bias')
        assert decay[id(parameter)] == (wanted if decayed else 0.0), name


@pytest.mark.parametrize(
    'path, size', [(COCO_1X['tiny'], 'tiny'), (ADE['official-tiny'], 'official-tiny')]
)
def test_trains_and_tests_in_bf16(path, size, one_thread):
    cfg = small(path, size)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 96)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = batch_for(cfg, [(64, 96), (64, 96)])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = loss_of(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        results = model.test_step(batch_for(cfg, [(64, 96)]))
    if cfg.default_scope == 'mmdet':
        assert results[0].pred_instances.masks.shape[1:] == (64, 96)
    else:
        assert results[0].pred_sem_seg.shape == (64, 96)
