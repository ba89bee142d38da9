"""What testing writes, with the folders of the pictures, and what validation shows."""

from types import SimpleNamespace

import mmpretrain.visualization  # noqa: F401, registers it
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from PIL import Image

from groupmamba_mm.engine.hooks import ExamplePredictionsHook, WriteLabelsHook, relative_name
from groupmamba_mm.engine.tracking import track_with


@pytest.mark.parametrize('reduced', [False, True])
def test_label_images_of_one_name_in_several_folders(tmp_path, reduced):
    root = tmp_path / 'images'
    dataset = SimpleNamespace(data_prefix=dict(img_path=str(root)))
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset))
    hook = WriteLabelsHook(str(tmp_path / 'out'))
    for label, folder in enumerate(('a', 'b', 'a/deep', '')):
        sample = SegDataSample(
            metainfo=dict(img_path=str(root / folder / 'x.jpg'), reduce_zero_label=reduced),
            pred_sem_seg=PixelData(data=torch.full((1, 4, 6), label)),
        )
        hook.after_test_iter(runner, 0, outputs=[sample])
    for label, folder in enumerate(('a', 'b', 'a/deep', '')):
        written = np.asarray(Image.open(tmp_path / 'out' / folder / 'x.png'))
        assert written.shape == (4, 6) and (written == label + reduced).all()


def test_images_outside_of_the_folders_keep_their_names():
    assert relative_name('/a/b/c.png', ['/x', '/a']) == 'b/c.png'
    assert relative_name('/a/b/c.png', ['/x']) == 'c.png'


def instances(path):
    boxes = dict(bboxes=torch.tensor([[1.0, 1, 20, 20]]), labels=torch.zeros(1, dtype=torch.long))
    return DetDataSample(
        metainfo=dict(img_path=path), pred_instances=InstanceData(**boxes, scores=torch.ones(1))
    )


def labels(path):
    maps = PixelData(data=torch.zeros(1, 32, 32, dtype=torch.long))
    return SegDataSample(metainfo=dict(img_path=path), pred_sem_seg=maps, gt_sem_seg=maps)


SAMPLES = {
    'mmpretrain': lambda path: (
        DataSample(metainfo=dict(img_path=path)).set_pred_label(0).set_pred_score(torch.ones(2))
    ),
    'mmdet': instances,
    'mmseg': labels,
}


@pytest.mark.parametrize('scope', SAMPLES)
def test_the_first_predictions_of_each_validation_are_shown(tmp_path, monkeypatch, scope):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / 'x.png')
    cfg = Config(dict(default_scope=scope))
    track_with(cfg, ['tensorboard'])
    cfg.visualizer.update(vis_backends=[dict(type='LocalVisBackend')], save_dir=str(tmp_path))
    with DefaultScope.overwrite_default_scope(scope):
        visualizer = VISUALIZERS.build(dict(cfg.visualizer, name=f'examples_{tmp_path.name}'))
    visualizer.dataset_meta = dict(classes=('one', 'two'), palette=[(0, 0, 0), (255, 0, 0)])
    hook = ExamplePredictionsHook(number=3)
    for step in (5, 6):
        runner = SimpleNamespace(visualizer=visualizer, iter=step)
        hook.before_val(runner)
        for batch in range(3):
            samples = [SAMPLES[scope](str(tmp_path / 'x.png')) for _ in range(2)]
            hook.after_val_iter(runner, batch, outputs=samples)
    assert sorted(file.name for file in tmp_path.rglob('example*')) == sorted(
        f'example_{number}.png_{step}.png' for number in range(3) for step in (5, 6)
    )
