"""The libraries' own loaders with models on our backbone: what fits, what is refused, what warned."""

import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint

import groupmamba_mm
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.checkpoint import CheckpointError
from tests.conftest import RunsCode
from tests.test_inference.test_predictor import CONFIGS, place  # noqa: F401, a fixture


def inferencer(task, checkpoint):
    cfg = CONFIGS[task]  # by name
    if task == 'cls':
        from mmpretrain import ImageClassificationInferencer

        cfg = str(groupmamba_mm.config_path(CONFIGS['cls']))
        return ImageClassificationInferencer(cfg, checkpoint or True, 'cpu')
    if task == 'det':
        from mmdet.apis import DetInferencer as Inferencer
    else:
        from mmseg.apis import MMSegInferencer as Inferencer
    return Inferencer(cfg, checkpoint, device='cpu')


def entry_point(task, checkpoint):
    """The functions beside the inferencers."""
    path = str(groupmamba_mm.config_path(CONFIGS[task]))
    if task == 'cls':
        from mmpretrain import get_model

        return get_model(path, checkpoint)
    if task == 'det':
        from mmdet.apis import init_detector as build
    else:
        from mmseg.apis import init_model as build
    return build(path, checkpoint, device='cpu')


@pytest.fixture(scope='module')
def wrong(place):  # noqa: F811
    """Checkpoints that must not be taken, for each task, by what is wrong with them."""
    files = {}
    for task in CONFIGS:
        state = torch.load(place / f'{task}.pth', weights_only=True)['state_dict']
        head = [key for key in state if not key.startswith(('backbone.', 'neck.'))]
        contents = dict(
            foreign={f'layer1.{i}.conv1.weight': torch.zeros(4) for i in range(3)},
            half=dict(list(state.items())[: len(state) // 2]),
            headless={key: value for key, value in state.items() if key not in head[-2:]},
        )
        for name, content in contents.items():
            files[task, name] = str(place / f'{task}-{name}.pth')
            torch.save(dict(state_dict=content, meta={}), files[task, name])
        files[task, 'evil'] = str(place / f'{task}-evil.pth')
        torch.save(dict(state_dict=state, x=RunsCode(place / 'ran')), files[task, 'evil'])
    return files


@pytest.mark.parametrize('kind', ['foreign', 'half', 'headless', 'evil'])
@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_inferencers_refuse_what_does_not_fit(task, kind, wrong, place, one_thread):  # noqa: F811
    with pytest.raises(CheckpointError, match='run code' if kind == 'evil' else 'does not fit'):
        inferencer(task, wrong[task, kind])
    assert not (place / 'ran').exists()


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_inferencers_warn_of_random_weights(task, one_thread):
    with pytest.warns(UserWarning, match='random'):
        inferencer(task, None)


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_entry_points_report_and_refuse(task, wrong, place, one_thread, monkeypatch):  # noqa: F811
    said = []
    monkeypatch.setattr(
        MMLogger, 'callHandlers', lambda self, record: said.append((record.levelno, record.msg))
    )
    whole = entry_point(task, str(place / f'{task}.pth'))
    reports = [entry for entry in said if 'Checkpoint given to mmengine' in entry[1]]
    assert [level for level, _ in reports] == [logging.INFO] and '100%' in reports[0][1]
    expected = torch.load(place / f'{task}.pth', weights_only=True)['state_dict']
    assert all(torch.equal(value, expected[key]) for key, value in whole.state_dict().items())
    for kind in ('foreign', 'half', 'evil'):
        with pytest.raises(CheckpointError):
            entry_point(task, wrong[task, kind])
    assert not (place / 'ran').exists()
    said.clear()
    entry_point(task, wrong[task, 'headless'])  # fine-tuning begins so
    assert [level for level, text in said if 'are missing in the checkpoint' in text] == [
        logging.WARNING
    ]


def test_models_of_others_load_as_before(tmp_path):
    from mmpretrain import get_model

    model = get_model('resnet18_8xb32_in1k')
    torch.save(dict(state_dict={'fc.weight': torch.zeros(2)}), tmp_path / 'a.pth')
    load_checkpoint(model, str(tmp_path / 'a.pth'))


def test_wrapped_models_are_compared_unwrapped(tmp_path):
    from mmengine.model import BaseTTAModel

    class Mean(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            raise NotImplementedError

    cfg = groupmamba_mm.get_config(CONFIGS['cls'])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = build_model(cfg)
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
        load_checkpoint(Mean(build_model(cfg)), str(tmp_path / 'a.pth'), strict=True)
