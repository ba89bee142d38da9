"""What mmpretrain's users are used to, for each task: look at data, print configs, find a learning
rate, publish a model.
"""

import csv
import hashlib
import math

import cv2
import numpy as np
import pytest
import torch

import groupmamba_mm
from groupmamba_mm.checkpoint import CheckpointError, load_checkpoint_file
from groupmamba_mm.engine.lr_finder import LrCurve, find_lr
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.inference import Predictor
from tests.conftest import RunsCode, load_tool
from tests.test_inference.test_predictor import CONFIGS, place  # noqa: F401, a fixture


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A few pictures of each task's demo data."""
    folder = tmp_path_factory.mktemp('data')
    tool = load_tool('dataset_converters/make_demo_data.py')
    for task in ('det', 'seg'):
        tool.make_scenes(folder, task, num_train=4, num_val=1)
    random = np.random.default_rng(0)
    for label in range(10):
        (folder / f'cls/train/{label}').mkdir(parents=True)
        picture = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f'cls/train/{label}/{label}.png'), picture)
    return folder


#: Less to compute in what is trained for some steps.
SMALLER = {
    'cls': [],
    'det': [
        'model.backbone.arch.embed_dims=[8,12,16,20]',
        'model.neck.in_channels=[8,12,16,20]',
        'model.train_cfg.rpn_proposal.max_per_img=100',
        'model.train_cfg.rcnn.sampler.num=32',
    ],
    'seg': [
        'model.backbone.arch.embed_dims=[8,12,16,20]',
        'model.decode_head.in_channels=[8,12,16,20]',
        'model.decode_head.channels=16',
        'model.auxiliary_head.in_channels=16',
    ],
}


def options(task, data):
    return [f'train_dataloader.dataset.data_root={data}/{task}/', 'train_dataloader.num_workers=0']


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_a_data_set_is_browsed(task, data, tmp_path, capsys, one_thread):
    tool = load_tool('analysis_tools/browse_dataset.py')
    common = [CONFIGS[task], '--out', str(tmp_path / 'seen'), '--number', '4']
    tool.main([*common, '--cfg-options', *options(task, data)])
    total = 10 if task == 'cls' else 4
    assert f'4 of {total} images' in capsys.readouterr().out
    seen = {path.stem: cv2.imread(str(path)) for path in (tmp_path / 'seen').iterdir()}
    assert sorted(seen)[::3] == ['000000', f'{total - 1:06d}'] and len(seen) == 4
    assert all(picture.std() > 0 for picture in seen.values())
    with pytest.raises(ConfigError, match='no val_dataloader'):
        tool.main([*common, '--phase', 'val', '--cfg-options', 'val_dataloader=None'])


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_a_config_is_printed_whole(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tool = load_tool('analysis_tools/print_config.py')
    tool.main([CONFIGS[task], '--cfg-options', 'optim_wrapper.optimizer.lr=0.5'])
    printed = capsys.readouterr().out
    (tmp_path / 'printed.py').write_text(printed)
    from mmengine.config import Config

    expected = groupmamba_mm.get_config(CONFIGS[task])
    expected.optim_wrapper.optimizer.lr = 0.5
    assert Config.fromfile('printed.py').to_dict() == expected.to_dict()
    with pytest.raises(ConfigError, match='there is no config'):
        tool.main(['none'])


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_a_learning_rate_is_found(task, data, tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    tool = load_tool('analysis_tools/find_lr.py')
    chosen = [*options(task, data), 'train_dataloader.batch_size=2', f'experiment_name=lr-{task}']
    chosen += SMALLER[task]
    tool.main(
        [CONFIGS[task], '--steps', '20', '--high', '1e-3', '--out', 'lr.png']
        + ['--cfg-options', *chosen]
    )
    assert '20 steps from 1e-06 to 0.001: the loss falls' in capsys.readouterr().out
    with open('lr.csv', encoding='utf-8') as file:
        rows = [(float(row['lr']), float(row['loss'])) for row in csv.DictReader(file)]
    assert [lr for lr, _ in rows] == pytest.approx(list(np.geomspace(1e-6, 1e-3, 20)))
    assert all(math.isfinite(loss) for _, loss in rows)
    assert cv2.imread('lr.png').std() > 0


def test_the_curve_knows_where_the_loss_falls_and_where_it_rises():
    """A loss that falls around a rate of 0.01 and rises again above 0.1."""
    curve, last = LrCurve(), 0.0
    for lr in np.geomspace(1e-6, 10, 300):
        last = float(lr)
        if curve.add(last, 2.3 - 2 / (1 + (0.01 / last) ** 2) + (last / 0.3) ** 2):
            break
    assert 0.3 < last < 5
    assert 0.003 < curve.steepest < 0.03
    assert 0.003 < curve.highest < 0.03
    for lr, loss in ((11, 40), (12, 1), (13, 40)):  # noise where it has diverged
        curve.add(lr, loss)
    assert curve.steepest < 0.03
    steps = len(curve.lrs)
    assert curve.add(1.0, math.nan) and len(curve.lrs) == steps


@pytest.mark.parametrize(
    'change, message', [(dict(low=1.0), 'must rise'), (dict(steps=5), '20 or more')]
)
def test_what_finds_nothing_is_refused(change, message, tmp_path):
    arguments = dict(dict(low=1e-6, high=1.0, steps=20), **change)
    with pytest.raises(ConfigError, match=message):
        find_lr(groupmamba_mm.get_config(CONFIGS['cls']), work_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_a_published_model_is_small_and_predicts_the_same(task, place, tmp_path, one_thread):  # noqa: F811
    tool = load_tool('model_converters/publish_model.py')
    whole = load_checkpoint_file(place / f'{task}.pth')
    whole['meta'].update(epoch=3, hostname='a-machine')
    whole.update(optimizer=dict(state={0: torch.zeros(10**6)}), ema_state_dict=whole['state_dict'])
    torch.save(whole, tmp_path / 'epoch_3.pth')
    path = tool.publish(str(tmp_path / 'epoch_3.pth'), tmp_path / 'out/model.pth')
    assert path.name == f'model-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
    assert path.stat().st_size < (tmp_path / 'epoch_3.pth').stat().st_size - 4e6
    published = torch.load(path, weights_only=True)  # readable without an allow-list
    assert published.keys() == {'meta', 'state_dict'} and 'hostname' not in published['meta']
    assert published['meta']['epoch'] == 3
    image = place / 'images/a.png'
    one, other = (
        Predictor(CONFIGS[task], file, 'cpu', 0.0) for file in (place / f'{task}.pth', path)
    )
    assert one(image) == other(image)
    with pytest.raises(CheckpointError, match='exists'):
        tool.publish(str(tmp_path / 'epoch_3.pth'), tmp_path / 'out/model.pth')
    assert [file.name for file in (tmp_path / 'out').iterdir()] == [path.name]


def test_nothing_of_code_is_published(tmp_path):
    torch.save(
        dict(state_dict=dict(a=torch.ones(1)), x=RunsCode(tmp_path / 'ran')), tmp_path / 'a.pth'
    )
    with pytest.raises(CheckpointError, match='run code'):
        load_tool('model_converters/publish_model.py').publish(
            str(tmp_path / 'a.pth'), tmp_path / 'b.pth'
        )
    assert not (tmp_path / 'ran').exists() and not (tmp_path / 'b.pth').exists()
