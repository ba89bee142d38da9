"""The released model's two heads."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample

from groupmamba_mm.heads import TwoHeadClsHead

LABELS = (2, 0, 1)


@pytest.fixture
def head():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    head = TwoHeadClsHead(num_classes=4, in_channels=6, cal_acc=True)
    head.init_weights()
    return head


@pytest.fixture
def feats():
    return (torch.randn(3, 6, generator=torch.Generator().manual_seed(1)),)


def test_logits_are_the_mean_in_training_and_eval(head, feats):
    for mode in (True, False):
        label, teacher = head.train(mode).forward_heads(feats)
        torch.testing.assert_close(head(feats), (label + teacher) / 2)
        assert not torch.equal(label, teacher)


def test_both_heads_learn_the_label_with_half_the_weight_each(head, feats):
    samples = [DataSample().set_gt_label(label) for label in LABELS]
    losses = head.loss(feats, samples)
    expected = [
        sum(-torch.log_softmax(scores[i], -1)[label] for i, label in enumerate(LABELS)) / 3 / 2
        for scores in head.forward_heads(feats)
    ]
    torch.testing.assert_close(losses['loss_label_head'], expected[0])
    torch.testing.assert_close(losses['loss_teacher_head'], expected[1])
    hits = (head(feats).argmax(-1) == torch.tensor(LABELS)).float().mean() * 100
    assert losses['accuracy_top-1'][0].item() == pytest.approx(hits.item())


def test_soft_labels(head, feats):
    """Mixup and CutMix give probabilities instead of a class."""
    soft = torch.tensor([[0.3, 0.7, 0, 0], [0, 0, 0.5, 0.5], [1.0, 0, 0, 0]])
    samples = [DataSample().set_gt_score(score) for score in soft]
    init_default_scope('mmpretrain')
    soft_head = TwoHeadClsHead(4, 6, loss=dict(type='CrossEntropyLoss', use_soft=True))
    soft_head.load_state_dict(head.state_dict())
    losses = soft_head.loss(feats, samples)
    label, _ = head.forward_heads(feats)
    expected = -(soft * torch.log_softmax(label, -1)).sum(-1).mean() / 2
    torch.testing.assert_close(losses['loss_label_head'], expected)


def test_predictions_are_softmax_of_the_mean(head, feats):
    predictions = head.predict(feats)
    scores = torch.stack([sample.pred_score for sample in predictions])
    torch.testing.assert_close(scores, head(feats).softmax(-1))


def test_number_of_classes_is_checked():
    with pytest.raises(ValueError, match='num_classes must be at least 1, got 0'):
        TwoHeadClsHead(num_classes=0, in_channels=6)
