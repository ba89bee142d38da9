"""metafile.yml against the READMEs, the configs and the models."""
import shutil
from pathlib import Path

import modelindex
import pytest

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import DataError
from tests.conftest import load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'analysis_tools' / 'update_tables.py'
SOURCES = {'paper', 'converted weights', 'measured here'}

update_tables = load_tool('analysis_tools/update_tables.py')

MODELS = [model for models in update_tables.read_metafiles(ROOT).values() for model in models]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the tool reads and writes."""
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    folder = tmp_path / 'configs' / 'groupmamba'
    folder.mkdir(parents=True)
    for name in ('README.md', 'metafile.yml'):
        shutil.copy(ROOT / 'configs' / 'groupmamba' / name, folder)
    return tmp_path


def test_tables_are_those_of_the_metafiles():
    update_tables.main(['--check'])


def test_check_finds_a_difference_and_writing_mends_it(checkout):
    folder = checkout / 'configs' / 'groupmamba'
    text = (folder / 'metafile.yml').read_text()
    (folder / 'metafile.yml').write_text(text.replace('84.5', '84.6'))
    before = (folder / 'README.md').read_text()
    with pytest.raises(DataError, match='configs/groupmamba/README.md differs .*update_tables'):
        update_tables.main(['--check'], checkout)
    assert (folder / 'README.md').read_text() == before
    update_tables.main([], checkout)
    update_tables.main(['--check'], checkout)
    after = (folder / 'README.md').read_text()
    assert '84.6' in after and after.replace('84.6', '84.5') == before


def test_a_column_of_two_sources_is_refused(checkout):
    path = checkout / 'configs' / 'groupmamba' / 'metafile.yml'
    head, mark, tail = path.read_text().rpartition('Sources: *sources')
    own = {key: 'measured here' for key in MODELS[0]['Sources']}
    path.write_text(f'{head}Sources: {own}{tail}')
    assert mark
    with pytest.raises(DataError, match='measured here and paper'):
        update_tables.main([], checkout)


def test_marks_are_needed(checkout):
    readme = checkout / 'configs' / 'groupmamba' / 'README.md'
    readme.write_text(readme.read_text().replace(update_tables.END, ''))
    with pytest.raises(DataError, match='once each'):
        update_tables.main([], checkout)


def test_every_number_has_a_source():
    for model in MODELS:
        assert set(model['Sources']) == set(update_tables.numbers_of(model)), model['Name']
        assert set(model['Sources'].values()) <= SOURCES, model['Name']


def test_every_config_of_the_folder_is_listed_by_its_name():
    configs = sorted((ROOT / 'configs' / 'groupmamba').glob('*.py'))
    assert sorted(model['Config'] for model in MODELS) == [
        str(path.relative_to(ROOT)) for path in configs]
    for model in MODELS:
        assert model['Name'] == Path(model['Config']).stem


def test_openmmlab_can_read_the_index():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    index.check(silent=True)
    assert [model.name for model in index.models] == [model['Name'] for model in MODELS]
    for model in index.models:
        assert not model.check_errors
        assert model.full_model.paper['URL'].endswith('2407.13772')
        assert model.results[0].metrics['Top 1 Accuracy'] > 80


@pytest.mark.parametrize('name', [model['Name'] for model in MODELS])
def test_parameters_are_those_of_the_built_model(name):
    [model] = [model for model in MODELS if model['Name'] == name]
    built = build_model(load_config(str(ROOT / model['Config'])))
    assert sum(p.numel() for p in built.parameters()) == model['Metadata']['Parameters']
