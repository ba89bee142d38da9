"""The options of testing as changes of a config, for each library."""

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import autocast, loops

from groupmamba_mm.engine.loops import AmpTestLoop
from groupmamba_mm.engine.testing import apply_test_options
from groupmamba_mm.engine.training import apply_train_options, set_common_options
from groupmamba_mm.errors import ConfigError

EVALUATORS = dict(mmpretrain='Accuracy', mmdet='CocoMetric', mmseg='IoUMetric')
PACKING = dict(mmpretrain='PackInputs', mmdet='PackDetInputs', mmseg='PackSegInputs')


def make_config(scope, **changes):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(8, 8)),
        dict(type='LoadAnnotations'),
        dict(type=PACKING[scope]),
    ]
    if scope == 'mmpretrain':
        del pipeline[2]
    loader = dict(batch_size=2, num_workers=1, dataset=dict(type='Any', pipeline=pipeline))
    return Config(
        dict(
            default_scope=scope,
            model=dict(type='Model', backbone=dict(type='Backbone')),
            train_dataloader=dict(loader),
            test_dataloader=dict(loader),
            test_evaluator=dict(type=EVALUATORS[scope]),
            test_cfg=dict(),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW')),
            **changes,
        )
    )


@pytest.mark.parametrize('scope', EVALUATORS)
def test_the_checkpoint_is_loaded_and_not_resumed(scope):
    cfg = make_config(scope, resume=True)
    apply_test_options(cfg, 'a.pth')
    assert cfg.load_from == 'a.pth' and cfg.resume is False


@pytest.mark.parametrize(
    'scope, dump', [('mmpretrain', 'DumpResults'), ('mmdet', 'DumpDetResults')]
)
def test_out_is_a_pickle(scope, dump, tmp_path):
    cfg = make_config(scope)
    apply_test_options(cfg, 'a.pth', out='out.pkl')
    assert [metric.type for metric in cfg.test_evaluator] == [EVALUATORS[scope], dump]
    assert cfg.test_evaluator[1].out_file_path == 'out.pkl'
    for wrong in ('out', 'out.json', str(tmp_path)):
        with pytest.raises(ConfigError, match=r'--out .*ends in \.pkl'):
            apply_test_options(make_config(scope), 'a.pth', out=wrong)


def test_label_maps_that_a_server_keeps_are_not_read():
    cfg = make_config('mmseg')
    cfg.test_evaluator.format_only = True
    apply_test_options(cfg, 'a.pth', out='labels')
    assert 'LoadAnnotations' not in [step.type for step in cfg.test_dataloader.dataset.pipeline]
    assert cfg.test_evaluator == []


def test_out_is_a_folder_for_segmentation():
    cfg = make_config('mmseg')
    apply_test_options(cfg, 'a.pth', out='labels')
    assert cfg.custom_hooks == [dict(type='WriteLabelsHook', out_dir='labels')]
    assert [metric.type for metric in cfg.test_evaluator] == [EVALUATORS['mmseg']]
    with pytest.raises(ConfigError, match='give a folder'):
        apply_test_options(make_config('mmseg'), 'a.pth', out='out.pkl')


@pytest.mark.parametrize(
    'scope, visualizer',
    [
        ('mmpretrain', 'UniversalVisualizer'),
        ('mmdet', 'DetLocalVisualizer'),
        ('mmseg', 'NamedSegVisualizer'),
    ],
)
def test_show_dir_paints_with_the_librarys_visualizer(scope, visualizer, tmp_path):
    cfg = make_config(scope, custom_hooks=[dict(type='Other')])
    apply_test_options(cfg, 'a.pth', show_dir='painted')
    assert cfg.visualizer.type == visualizer
    assert [hook.type for hook in cfg.custom_hooks] == ['Other', 'DrawPredictionsHook']
    assert cfg.custom_hooks[1].out_dir == 'painted'
    own = make_config(scope, visualizer=dict(type='Own', name='mine'))
    apply_test_options(own, 'a.pth', show_dir='painted')
    assert own.visualizer == dict(type='Own', name='mine')
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='is a file'):
        apply_test_options(make_config(scope), 'a.pth', show_dir=str(tmp_path / 'file'))


@pytest.mark.parametrize(
    'scope, model',
    [('mmpretrain', 'AverageClsScoreTTA'), ('mmdet', 'DetTTAModel'), ('mmseg', 'SegTTAModel')],
)
def test_tta_mirrors_by_default(scope, model):
    cfg = make_config(scope)
    apply_test_options(cfg, 'a.pth', tta=True)
    assert cfg.model.type == model and cfg.model.module.type == 'Model'
    *before, augmentation = cfg.test_dataloader.dataset.pipeline
    assert augmentation.type == 'TestTimeAug'
    # The original comes first: it lends the result its ground truth.
    assert [flip.prob for flip in augmentation.transforms[0]] == [0.0, 1.0]
    assert augmentation.transforms[-1][0].type == PACKING[scope]
    if scope == 'mmseg':
        assert [step.type for step in before] == ['LoadImageFromFile', 'Resize']
        assert augmentation.transforms[1][0].type == 'LoadAnnotations'
    if scope == 'mmdet':
        assert 'flip_direction' in augmentation.transforms[-1][0].meta_keys


def test_tta_of_the_config_comes_first():
    cfg = make_config('mmseg', tta_model=dict(type='Mine'), tta_pipeline=[dict(type='Step')])
    cfg.test_dataloader.dataset = dict(type='RepeatDataset', dataset=cfg.test_dataloader.dataset)
    apply_test_options(cfg, 'a.pth', tta=True)
    assert cfg.model.type == 'Mine'
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type='Step')]


@pytest.mark.parametrize(
    'head',
    [
        dict(roi_head=dict(mask_head=dict(type='FCNMaskHead'))),
        dict(mask_head=dict(type='SOLOHead')),
        dict(panoptic_head=dict(type='MaskFormerHead')),
    ],
)
def test_tta_refuses_masks(head):
    cfg = make_config('mmdet')
    cfg.model.update(head)
    with pytest.raises(ConfigError, match='predicts masks'):
        apply_test_options(cfg, 'a.pth', tta=True)
    boxes = make_config('mmdet')
    boxes.model.roi_head = dict(mask_head=None)
    apply_test_options(boxes, 'a.pth', tta=True)


def test_tta_tests_the_averaged_weights_without_the_hook():
    cfg = make_config('mmpretrain', custom_hooks=[dict(type='EMAHook'), dict(type='Other')])
    apply_test_options(cfg, 'a.pth', tta=True)
    assert [hook.type for hook in cfg.custom_hooks] == ['Other']
    cfg = make_config('mmpretrain', custom_hooks=[dict(type=EMAHook), dict(type=print)])
    apply_test_options(cfg, 'a.pth')
    assert [hook['type'] for hook in cfg.custom_hooks] == [print]
    cfg = make_config('mmpretrain', custom_hooks=[dict(type='EMAHook', evaluate_on_ema=False)])
    with pytest.raises(ConfigError, match='evaluate_on_ema'):
        apply_test_options(cfg, 'a.pth', tta=True)


def test_amp_is_bf16_or_fp16():
    cfg = make_config('mmdet')
    apply_test_options(cfg, 'a.pth', amp='bf16')
    assert cfg.test_cfg == dict(type='AmpTestLoop', dtype='bfloat16')
    cfg = make_config('mmdet')
    cfg.test_cfg = dict(type='MultiTestLoop')
    with pytest.raises(ConfigError, match='MultiTestLoop'):
        apply_test_options(cfg, 'a.pth', amp='fp16')


@pytest.mark.skipif(torch.cuda.is_available(), reason='looks at the CPU type')
def test_the_amp_loop_hands_its_type_to_the_inner_autocast(monkeypatch):
    seen = []

    def run_iter(loop, idx, batch):
        # What mmengine's loop does with fp16=True.
        with autocast(enabled=loop.fp16):
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

    monkeypatch.setattr(loops.TestLoop, '__init__', lambda loop, fp16: setattr(loop, 'fp16', fp16))
    monkeypatch.setattr(loops.TestLoop, 'run_iter', run_iter)
    AmpTestLoop(dtype='bfloat16').run_iter(0, [])
    assert seen == [torch.bfloat16]
    with pytest.raises(ValueError, match='float64'):
        AmpTestLoop(dtype='float64')


def test_a_config_without_a_test_is_refused():
    cfg = make_config('mmdet')
    cfg.test_evaluator = None
    with pytest.raises(ConfigError, match='cannot be tested'):
        apply_test_options(cfg, 'a.pth')


@pytest.mark.parametrize('amp, loss_scale', [('bf16', dict(enabled=False)), ('fp16', 'dynamic')])
def test_training_in_mixed_precision(amp, loss_scale):
    cfg = make_config('mmseg')
    apply_train_options(cfg, amp=amp)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == loss_scale
    assert cfg.optim_wrapper.dtype == dict(bf16='bfloat16', fp16='float16')[amp]
    other = make_config('mmseg')
    other.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(ConfigError, match='ApexOptimWrapper'):
        apply_train_options(other, amp=amp)


@pytest.mark.parametrize('kind', ['OptimWrapper', 'SyncFreeOptimWrapper'])
def test_mixed_precision_comes_and_goes_for_each_wrapper(kind):
    cfg = make_config('mmpretrain')
    cfg.optim_wrapper.type = kind
    for amp, found in (('fp16', kind.replace('Optim', 'AmpOptim')), ('off', kind)):
        apply_train_options(cfg, amp=amp)
        assert cfg.optim_wrapper.type == found


def test_mixed_precision_is_switched_off():
    cfg = make_config('mmpretrain')
    apply_train_options(cfg, amp='bf16')
    apply_train_options(cfg, amp='off')
    assert cfg.optim_wrapper == dict(type='OptimWrapper', optimizer=dict(type='AdamW'))
    cfg.test_cfg = dict(type='AmpTestLoop', dtype='float16')
    apply_test_options(cfg, 'a.pth', amp='off')
    assert cfg.test_cfg == dict()


def test_training_options():
    cfg = make_config('mmdet', auto_scale_lr=dict(base_batch_size=16), val_cfg=dict())
    apply_train_options(cfg, resume='auto', auto_scale_lr=True, no_validate=True)
    assert cfg.resume and cfg.load_from is None and cfg.auto_scale_lr.enable
    assert cfg.val_cfg is None
    apply_train_options(cfg, resume='a.pth')
    assert cfg.resume and cfg.load_from == 'a.pth'
    with pytest.raises(ConfigError, match='base_batch_size'):
        apply_train_options(make_config('mmdet'), auto_scale_lr=True)


def test_loaders_and_work_dir():
    cfg = make_config('mmpretrain')
    cfg.test_dataloader.update(num_workers=0, persistent_workers=True, collate_fn='own')
    set_common_options(cfg, 'configs/a/tiny.py', None, 'none')
    assert cfg.work_dir == 'work_dirs/tiny' and cfg.runner_type == 'CheckedRunner'
    assert cfg.train_dataloader.collate_fn == dict(type='default_collate')
    assert cfg.train_dataloader.persistent_workers is True
    assert cfg.train_dataloader.pin_memory is torch.cuda.is_available()
    assert cfg.test_dataloader.collate_fn == 'own'
    assert cfg.test_dataloader.persistent_workers is False
    detection = make_config('mmdet', work_dir='mine')
    set_common_options(detection, 'tiny.py', None, 'slurm')
    assert 'collate_fn' not in detection.train_dataloader
    assert detection.work_dir == 'mine' and detection.launcher == 'slurm'
    set_common_options(detection, 'tiny.py', 'given', 'none')
    assert detection.work_dir == 'given'
