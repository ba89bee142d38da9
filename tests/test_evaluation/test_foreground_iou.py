"""The mean IoU without the background, worked out by hand."""

import pytest
import torch
from mmengine.registry import METRICS

from groupmamba_mm.evaluation import ForegroundIoUMetric


def sample(predicted, label):
    return dict(
        pred_sem_seg=dict(data=torch.tensor([predicted])),
        gt_sem_seg=dict(data=torch.tensor([label])),
    )


def test_it_is_registered():
    assert METRICS.get('ForegroundIoUMetric') is ForegroundIoUMetric


def test_values():
    metric = ForegroundIoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=('background', 'one', 'two', 'never'))
    metric.process(
        {}, [sample([[0, 0, 0, 1]], [[0, 0, 1, 1]]), sample([[2, 2, 0, 0]], [[2, 0, 0, 255]])]
    )
    found = metric.evaluate(2)
    background, one, two = 3 / 5, 1 / 2, 1 / 2
    assert found['mIoU'] == pytest.approx(100 * (background + one + two) / 3, abs=0.01)
    assert found['mIoU_foreground'] == pytest.approx(100 * (one + two) / 2, abs=0.01)
