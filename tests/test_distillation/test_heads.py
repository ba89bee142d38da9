"""The distilled objective (Eq. 10) with one head and with two, against hand-computed cases."""

import math

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from groupmamba_mm.distillation import DistilledLinearClsHead, DistilledTwoHeadClsHead

LABELS = (1, 0)
FEATURES = [[1.0, -1.0], [0.5, 2.0]]
TEACHER = [[0.0, 0.0, 4.0], [1.0, 0.0, 0.0]]  # says class 2, then class 0
# rows are classes
FOR_LABEL = [[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]]
FOR_TEACHER = [[-0.1, 0.6], [0.7, 0.0], [0.2, 0.2]]


def logits(weight):
    return [[sum(w * x for w, x in zip(row, features)) for row in weight] for features in FEATURES]


def log_softmax(row):
    total = math.log(sum(map(math.exp, row)))
    return [value - total for value in row]


def cross_entropy(weight, targets):
    """The mean over the batch; targets are probabilities."""
    rows = [
        -sum(t * value for t, value in zip(target, log_softmax(row)))
        for row, target in zip(logits(weight), targets)
    ]
    return sum(rows) / len(rows)


def one_hot(classes):
    return [[float(k == c) for k in range(3)] for c in classes]


def smoothed(targets, eps=0.1):
    return [[(1 - eps) * value + eps / 3 for value in row] for row in targets]


def make(kind, **options):
    init_default_scope('mmpretrain')
    head = MODELS.build(dict(type=kind, num_classes=3, in_channels=2, **options))
    layers = (
        dict(fc=FOR_LABEL) if 'Linear' in kind else dict(label_fc=FOR_LABEL, teacher_fc=FOR_TEACHER)
    )
    for name, weight in layers.items():
        layer = getattr(head, name)
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.zeros(3)
    return head


def losses_of(head, samples):
    feats = (torch.tensor(FEATURES),)
    return head.loss(feats, samples, torch.tensor(TEACHER))


KINDS = {'DistilledLinearClsHead': FOR_LABEL, 'DistilledTwoHeadClsHead': FOR_TEACHER}


@pytest.mark.parametrize('alpha', [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize('kind', KINDS)
def test_hard_distillation_of_labels(kind, alpha):
    head = make(kind, alpha=alpha, loss=dict(type='CrossEntropyLoss'))
    losses = losses_of(head, [DataSample().set_gt_label(label) for label in LABELS])
    assert set(losses) == {'loss_label', 'loss_teacher'}
    assert losses['loss_label'].item() == pytest.approx(
        alpha * cross_entropy(FOR_LABEL, one_hot(LABELS)), rel=1e-5
    )
    assert losses['loss_teacher'].item() == pytest.approx(
        (1 - alpha) * cross_entropy(KINDS[kind], one_hot((2, 0))), rel=1e-5
    )


@pytest.mark.parametrize('kind', KINDS)
def test_mixed_labels_and_smoothing_concern_the_label_alone(kind):
    mixed = [[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]]
    head = make(kind, loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'))
    losses = losses_of(head, [DataSample().set_gt_score(torch.tensor(row)) for row in mixed])
    assert losses['loss_label'].item() == pytest.approx(
        0.5 * cross_entropy(FOR_LABEL, smoothed(mixed)), rel=1e-5
    )
    assert losses['loss_teacher'].item() == pytest.approx(
        0.5 * cross_entropy(KINDS[kind], one_hot((2, 0))), rel=1e-5
    )


@pytest.mark.parametrize('kind', KINDS)
def test_soft_distillation(kind):
    head = make(
        kind, alpha=0.25, distill_loss=dict(type='DistillationLoss', kind='soft', temperature=2.0)
    )
    losses = losses_of(head, [DataSample().set_gt_label(label) for label in LABELS])
    expected = 0.0
    for student, teacher in zip(logits(KINDS[kind]), TEACHER):
        p = log_softmax([value / 2 for value in teacher])
        q = log_softmax([value / 2 for value in student])
        expected += sum(math.exp(a) * (a - b) for a, b in zip(p, q)) / 2
    assert losses['loss_teacher'].item() == pytest.approx(0.75 * 4 * expected, rel=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_accuracy_is_kept(kind):
    losses = losses_of(make(kind, cal_acc=True), [DataSample().set_gt_label(c) for c in LABELS])
    hits = [max(range(3), key=row.__getitem__) == c for row, c in zip(logits(FOR_LABEL), LABELS)]
    assert losses['accuracy_top-1'][0].item() == pytest.approx(50 * sum(hits))


@pytest.mark.parametrize(
    'kind, plain',
    [('DistilledLinearClsHead', 'LinearClsHead'), ('DistilledTwoHeadClsHead', 'TwoHeadClsHead')],
)
def test_without_a_teacher_the_same_parameters_predict_the_same(kind, plain):
    head = make(kind)
    other = MODELS.build(dict(type=plain, num_classes=3, in_channels=2))
    other.load_state_dict(head.state_dict())
    feats = (torch.tensor(FEATURES),)
    torch.testing.assert_close(other(feats), head(feats))


@pytest.mark.parametrize('alpha', [-0.1, 1.5])
def test_alpha_is_checked(alpha):
    for kind in (DistilledLinearClsHead, DistilledTwoHeadClsHead):
        with pytest.raises(ValueError, match=f'alpha must be from 0 .* to 1 .*got {alpha}'):
            kind(num_classes=3, in_channels=2, alpha=alpha)
