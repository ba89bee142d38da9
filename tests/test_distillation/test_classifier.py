"""The classifier with a teacher: what the teacher sees, and all that must not reach it."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

from tests.conftest import SMALL

PREPROCESSOR = dict(num_classes=4, mean=[1.0, 2.0, 3.0], std=[10.0, 20.0, 30.0], to_rgb=True)
MIX = dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])


def make(head='DistilledLinearClsHead', family='paper', **options):
    init_default_scope('mmpretrain')
    cfg = ConfigDict(
        type='DistilledClassifier',
        backbone=dict(type='GroupMamba', arch=SMALL[family]),
        head=dict(type=head, num_classes=4, in_channels=SMALL[family]['embed_dims'][-1]),
        teacher=dict(type='RandomTeacher'),
        train_cfg=MIX,
        data_preprocessor=dict(PREPROCESSOR),
    )
    cfg.update(options)
    torch.manual_seed(0)
    return MODELS.build(cfg)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, 32, 40), dtype=torch.uint8, generator=generator)
    return dict(inputs=images, data_samples=[DataSample().set_gt_label(k) for k in range(4)])


def tensors_of(teacher):
    return {key: value.clone() for key, value in teacher.network.state_dict().items()}


def test_the_teacher_sees_the_mixed_batch_in_its_own_normalization():
    model = make().train()
    model.prepare_training()
    seen, student_saw = [], []
    model.teacher.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.backbone.register_forward_pre_hook(lambda module, args: student_saw.append(args[0]))
    mixed = []
    mix = model.data_preprocessor.batch_augments

    def spy(images, scores):
        mixed.append((images.clone(), *mix(images, scores)))
        return mixed[-1][1:]

    model.data_preprocessor.batch_augments = spy
    data = model.data_preprocessor(batch(), training=True)
    model(**data, mode='loss')
    before, after, _ = mixed[0]
    assert not torch.equal(before, after)
    assert student_saw[0] is data['inputs'] and torch.equal(student_saw[0], after)
    # pixels, RGB, of what the student got; the teacher of the tests wants BGR
    column = dict(
        zip(
            ('mean', 'std'),
            (torch.tensor(PREPROCESSOR[key]).view(3, 1, 1) for key in ('mean', 'std')),
        )
    )
    pixels = after * column['std'] + column['mean']
    own = model.teacher.normalization
    expected = (pixels.flip(1) - torch.tensor(own.mean).view(3, 1, 1)) / torch.tensor(own.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    'head, family', [('DistilledLinearClsHead', 'paper'), ('DistilledTwoHeadClsHead', 'official')]
)
def test_gradient_reaches_the_student_alone(head, family):
    model = make(head, family).train()
    data = model.data_preprocessor(batch(), training=True)
    losses = model(**data, mode='loss')
    assert set(losses) == {'loss_label', 'loss_teacher'}
    loss, _ = model.parse_losses(losses)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    for parameter in model.teacher.network.parameters():
        assert parameter.grad is None and not parameter.requires_grad


def test_the_teachers_term_is_that_of_its_answers():
    model = make().eval()
    data = model.data_preprocessor(batch(), training=True)
    losses = model(**data, mode='loss')
    answers = model.teacher(data['inputs'], model.normalization).argmax(1)
    logits = model(data['inputs'], mode='tensor')
    expected = nn.functional.cross_entropy(logits, answers) / 2
    torch.testing.assert_close(losses['loss_teacher'], expected)


def test_the_teacher_runs_beside_the_students_forward_pass(monkeypatch):
    model = make().eval()
    data = model.data_preprocessor(batch(), training=True)
    order = []
    start, extract = model.teacher.start, model.extract_feat

    def spy(*args):
        order.append('start')
        end = start(*args)
        return lambda: order.append('end') or end()

    monkeypatch.setattr(model.teacher, 'start', spy)
    monkeypatch.setattr(
        model, 'extract_feat', lambda images: order.append('student') or extract(images)
    )
    model(**data, mode='loss')
    assert order == ['start', 'student', 'end']


def test_nothing_that_happens_to_a_model_happens_to_its_teacher():
    model = make()
    model.prepare_training()
    network = model.teacher.network
    before = tensors_of(model.teacher)
    assert not any('teacher' in name for name, _ in model.named_modules())
    assert not any('teacher' in key for key in model.state_dict())
    optimized = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=1.0)))
    own = {id(parameter) for parameter in network.parameters()}
    assert not own & {id(p) for group in optimized.param_groups for p in group['params']}
    average = ExponentialMovingAverage(model)
    assert average.module.teacher is model.teacher
    assert not own & {id(parameter) for parameter in average.parameters()}
    model.init_weights()
    model.train()
    assert not network.training and not any(module.training for module in network.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    assert converted.teacher.network is network
    copy.deepcopy(model).double()
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_steps_leave_the_teacher_alone():
    model = make('DistilledTwoHeadClsHead', 'official').train()
    model.prepare_training()
    before = tensors_of(model.teacher)
    weight = model.head.label_fc.weight.detach().clone()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='AdamW', lr=0.1)))
    for seed in range(2):
        model.train_step(batch(seed), wrapper)
    assert not torch.equal(model.head.label_fc.weight, weight)
    for key, value in model.teacher.network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_predicting_needs_no_teacher():
    model = make().eval()
    model.teacher.build = None
    with torch.no_grad():
        data = model.data_preprocessor(batch(), training=False)
        predicted = model(**data, mode='predict')
    assert len(predicted) == 4 and model.teacher.network is None


def test_heads_and_teachers_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match='LinearClsHead takes no teacher; use the head Distilled'):
        make('LinearClsHead')
    with pytest.raises(TypeError, match='teacher must be a TimmTeacher or .*DistillationLoss'):
        make(teacher=dict(type='DistillationLoss'))
