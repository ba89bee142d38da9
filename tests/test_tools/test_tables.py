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

FOLDERS = [str(readme.parent.relative_to(ROOT)) for readme in update_tables.read_metafiles(ROOT)]
MODELS = [model for models in update_tables.read_metafiles(ROOT).values() for model in models]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the tool reads and writes."""
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        for name in ('README.md', 'metafile.yml'):
            shutil.copy(ROOT / folder / name, tmp_path / folder)
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


def test_a_number_the_paper_lacks_is_a_dash_and_one_of_ours_an_error(checkout):
    models = update_tables.read_metafiles(checkout)[checkout / 'configs/mask_rcnn/README.md']
    table = update_tables.make_table(models).splitlines()
    assert len({line.count('|') for line in table}) == 1
    base, = (line for line in table if 'groupmamba-base]' in line)
    assert base.endswith('| - | - | - | - |')
    del models[0]['Metadata']['FLOPs']
    with pytest.raises(DataError, match=r"FLOPs or its source is missing"):
        update_tables.make_table(models)


def test_marks_are_needed(checkout):
    readme = checkout / 'configs' / 'groupmamba' / 'README.md'
    readme.write_text(readme.read_text().replace(update_tables.END, ''))
    with pytest.raises(DataError, match='once each'):
        update_tables.main([], checkout)


def test_every_number_has_a_source():
    for model in MODELS:
        assert set(model['Sources']) == set(update_tables.numbers_of(model)), model['Name']
        assert set(model['Sources'].values()) <= SOURCES, model['Name']


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_config_of_the_folder_is_listed_by_its_name(folder):
    configs = sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob('*.py'))
    listed = [model for model in MODELS if Path(model['Config']).parent == Path(folder)]
    assert sorted(model['Config'] for model in listed) == configs
    for model in listed:
        assert model['Name'] == Path(model['Config']).stem


def test_openmmlab_can_read_the_index():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    index.check(silent=True)
    assert [model.name for model in index.models] == [model['Name'] for model in MODELS]
    for model in index.models:
        assert not model.check_errors
        assert model.full_model.paper['URL'].endswith('2407.13772')

    accuracies = [result.metrics['Top 1 Accuracy'] for model in index.models
                  for result in model.results or [] if result.task == 'Image Classification']
    assert accuracies and min(accuracies) > 80


# those of the others: tests/test_dense_configs.py, which builds them anyway
@pytest.mark.parametrize('name', [model['Name'] for model in MODELS
                                  if model['In Collection'] == 'GroupMamba'])
def test_parameters_are_those_of_the_built_model(name):
    [model] = [model for model in MODELS if model['Name'] == name]
    built = build_model(load_config(str(ROOT / model['Config'])))
    assert sum(p.numel() for p in built.parameters()) == model['Metadata']['Parameters']
