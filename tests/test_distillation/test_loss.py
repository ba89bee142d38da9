"""The teacher's term against hand-computed cases."""

import math

import pytest
import torch
from mmengine.registry import MODELS

from groupmamba_mm.distillation import DistillationLoss

LOGITS = [[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
TEACHER = [[3.0, 0.0, 1.0], [0.0, 1.0, 5.0]]


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def test_hard_is_the_cross_entropy_with_the_teachers_class():
    # the teacher says class 0, then class 2
    expected = -(math.log(softmax(LOGITS[0])[0]) + math.log(softmax(LOGITS[1])[2])) / 2
    loss = MODELS.build(dict(type='DistillationLoss', kind='hard'))
    found = loss(torch.tensor(LOGITS), torch.tensor(TEACHER))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_soft_is_the_divergence_times_the_squared_temperature(temperature):
    expected = 0.0
    for student, teacher in zip(LOGITS, TEACHER):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        expected += sum(a * math.log(a / b) for a, b in zip(p, q)) / len(LOGITS)
    loss = DistillationLoss('soft', temperature)
    found = loss(torch.tensor(LOGITS), torch.tensor(TEACHER))
    assert found.item() == pytest.approx(expected * temperature**2, rel=1e-5)


@pytest.mark.parametrize('options', [('hard',), ('soft', 2.0)])
def test_gradient_goes_to_the_student_alone(options):
    student = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(TEACHER, dtype=torch.float64, requires_grad=True)
    loss = DistillationLoss(*options)
    loss(student, teacher).backward()
    assert student.grad.abs().min() > 0 and teacher.grad is None
    assert torch.autograd.gradcheck(lambda logits: loss(logits, teacher.detach()), student)


def test_no_distance_no_soft_loss():
    logits = torch.randn(4, 5)
    assert DistillationLoss('soft', 2.0)(logits, logits).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(kind='medium'), "kind must be one of .*got 'medium'"),
        (dict(kind='soft', temperature=0), 'temperature must be positive, got 0'),
        (dict(kind='hard', temperature=2), "temperature=2 does nothing for kind='hard'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**options)


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match=r'teacher gives logits of shape \(2, 4\).*\(2, 3\)'):
        DistillationLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
