"""A study: variants and seeds, trained by tools/train.py, gone on with, and compared."""

import json

import pytest

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError, DataError
from tests.conftest import load_tool
from tests.test_tools.test_train_test_cli import CONFIG, write_images

STUDY = """
variants = {variants}
seeds = [0, 1]
keys = ['loss', 'accuracy/top1']
"""


@pytest.fixture
def tool():
    return load_tool('analysis_tools/run_study.py')


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    write_images(tmp_path / 'data')
    (tmp_path / 'tiny.py').write_text(CONFIG)

    def write(**changes):
        variants = {name: dict(config='tiny.py', **options) for name, options in changes.items()}
        (tmp_path / 'study.py').write_text(STUDY.format(variants=variants))
        return ['study.py', '--jobs', '2']

    return write


def test_it_trains_what_is_missing_and_compares(tool, study, tmp_path, capsys):
    rate = {'optim_wrapper.optimizer.lr': 0.01}
    tool.main(study(slow={}))
    tool.main(study(slow={}, fast=rate))
    said = capsys.readouterr().out
    assert '4 runs, 2 of them to be trained, 2 at once' in said
    table = (tmp_path / 'work_dirs/study/table.md').read_text().splitlines()
    assert [line.split(' | ')[:3] for line in table[2:]] == [
        ['| slow', '2', '-'],
        ['| fast', '2', '-'],
    ]
    losses = [
        json.loads(line)['loss']
        for seed in '01'
        for log in (tmp_path / f'work_dirs/study/fast/seed_{seed}').glob('*/vis_data/scalars.json')
        for line in log.read_text().splitlines()[1:2]
    ]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert table[3].split(' | ')[3].startswith(f'{sum(losses) / 2:.4g} +- ')
    assert (tmp_path / 'work_dirs/study/curves.png').stat().st_size > 10_000
    with pytest.raises(ConfigError, match="is of another config of 'fast'; remove it, or give"):
        tool.main(study(slow={}, fast={'optim_wrapper.optimizer.lr': 0.02}))


def test_a_training_that_is_not_finite_is_a_result(tool, study, tmp_path):
    tool.main(study(broken={'optim_wrapper.optimizer.lr': 1e30}))
    row = (tmp_path / 'work_dirs/study/table.md').read_text().splitlines()[2].split(' | ')
    assert row[:3] == ['| broken', '2', 'iteration 2, iteration 2'] and row[4] == '-'


def test_a_training_that_fails_is_named_and_the_others_are_done(tool, study, tmp_path):
    variants = dict(right={}, wrong={'train_dataloader.dataset.data_prefix': 'gone'})
    with pytest.raises(DataError, match='2 runs failed, the first: wrong, seed .*gone.*run again'):
        tool.main(study(**variants))
    assert len(list((tmp_path / 'work_dirs/study/right').glob('*/done.json'))) == 2


def test_a_study_that_lacks_something(tool, study, tmp_path):
    with pytest.raises(ConfigError, match='has no variants'):
        tool.main(study())
    (tmp_path / 'study.py').write_text(STUDY.format(variants={'a': {'b': 1}}))
    with pytest.raises(ConfigError, match=r"variants\['a'\] names no config"):
        tool.main(['study.py'])


@pytest.mark.parametrize('name, number', [('stability', 16), ('ablations', 24)])
def test_the_studies_of_the_repository_are_prepared(tool, name, number, tmp_path):
    """Their models build, whatever they change."""
    study = tool.TRAIN.parent / f'analysis_tools/studies/{name}.py'
    runs = tool.prepare(tool.Config.fromfile(study), tmp_path)
    assert len(runs) == number
    built = runs[:1] if name == 'stability' else runs[::3]  # its others differ in the rate
    for run in built:
        build_model(load_config(str(run.folder.with_suffix('.py'))))
