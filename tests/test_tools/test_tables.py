"""metafile.yml against the READMEs, the configs and the models."""

import shutil
from pathlib import Path

import modelindex
import pytest

from groupmamba_mm.analysis import count_complexity
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import DataError
from tests.conftest import load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'analysis_tools' / 'update_tables.py'
SOURCES = {'paper', 'converted weights', 'measured here'}

update_tables = load_tool('analysis_tools/update_tables.py')

METAFILES = update_tables.read_metafiles(ROOT)
MODELS = [model for metafile in METAFILES.values() for model in metafile['Models']]
ABLATIONS = ROOT / 'configs' / 'groupmamba' / 'ablations'
FOLDERS = [str(readme.parent.relative_to(ROOT)) for readme in METAFILES]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the tool reads and writes."""
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        for name in ('README.md', 'metafile.yml'):
            shutil.copy(ROOT / folder / name, tmp_path / folder)
    return tmp_path


def change_ablations(checkout, old, new):
    path = checkout / ABLATIONS.relative_to(ROOT) / 'metafile.yml'
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


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
    own = dict.fromkeys(MODELS[0]['Sources'], 'measured here')
    path.write_text(f'{head}Sources: {own}{tail}')
    assert mark
    with pytest.raises(DataError, match='measured here and paper'):
        update_tables.main([], checkout)


def test_marks_are_needed(checkout):
    readme = checkout / 'configs' / 'groupmamba' / 'README.md'
    readme.write_text(readme.read_text().replace(update_tables.END, ''))
    with pytest.raises(DataError, match='once each'):
        update_tables.main([], checkout)


def test_a_missing_number_is_refused_and_a_null_is_a_dash(checkout):
    change_ablations(checkout, '      Published Throughput: 803\n', '')
    with pytest.raises(DataError, match='^groupmamba-tiny-4d-no-cam_8xb128_in1k: Published Thr'):
        update_tables.main([], checkout)
    change_ablations(
        checkout, '      Published Throughput: 1125\n', '      Published Throughput: null\n'
    )
    change_ablations(
        checkout,
        '      Scan FLOPs: 130000000\n',
        '      Scan FLOPs: 130000000\n      Published Throughput: 803\n',
    )
    update_tables.main([], checkout)
    [row] = [
        line
        for line in (checkout / ABLATIONS.relative_to(ROOT) / 'README.md').read_text().splitlines()
        if line.startswith('| [groupmamba-tiny-no-cam]')
    ]
    assert row.endswith('| 22 | - | - | - | 82.2 |')


def test_a_column_that_no_model_has_is_left_out():
    assert 'A100' not in (ROOT / 'configs' / 'groupmamba' / 'README.md').read_text()


def test_a_number_without_a_column_is_refused(checkout):
    change_ablations(checkout, 'Published Throughput: 803', 'Throughput: 803')
    with pytest.raises(DataError, match='^no column shows Throughput; '):
        update_tables.main([], checkout)


def test_a_borrowed_model_must_exist_and_gets_no_second_number(checkout):
    change_ablations(checkout, 'Saved Parameters: 46.4', 'Parameters: 46.4')
    with pytest.raises(DataError, match='groupmamba-tiny_8xb128_in1k: Parameters stands in'):
        update_tables.main([], checkout)
    change_ablations(checkout, '- Name: groupmamba-tiny_', '- Name: groupmamba-small-tiny_')
    with pytest.raises(DataError, match='groupmamba-small-tiny_8xb128_in1k is borrowed'):
        update_tables.main([], checkout)


def test_borrowed_rows_link_to_their_folder():
    table = (ABLATIONS / 'README.md').read_text()
    assert '| [groupmamba-tiny](../groupmamba-tiny_8xb128_in1k.py) | 21.887 ' in table
    assert '| [groupmamba-tiny-g1](groupmamba-tiny-g1_8xb128_in1k.py) | ' in table


def test_every_number_has_a_source():
    borrowed = [entry for metafile in METAFILES.values() for entry in metafile.get('Borrowed', [])]
    for entry in borrowed:
        assert set(entry['Sources']) == set(entry['Metadata']), entry['Name']
        assert set(entry['Sources'].values()) <= SOURCES, entry['Name']
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

    # the paper states none for some ablations and for dense models above tiny
    stated = [
        top1
        for model in index.models
        for result in model.results
        for top1 in result.metrics.values()
        if result.task == 'Image Classification' and top1 is not None
    ]
    assert stated and min(stated) > 80


# those of the others: tests/test_dense_configs.py, which builds them anyway
@pytest.mark.parametrize(
    'name', [model['Name'] for model in MODELS if model['In Collection'] == 'GroupMamba']
)
def test_parameters_are_those_of_the_built_model(name):
    [model] = [model for model in MODELS if model['Name'] == name]
    built = build_model(load_config(str(ROOT / model['Config'])))
    assert sum(p.numel() for p in built.parameters()) == model['Metadata']['Parameters']


def ablation_rows():
    rows = update_tables.rows_of(METAFILES[ABLATIONS / 'README.md'], {m['Name']: m for m in MODELS})
    return {model['Name']: update_tables.numbers_of(model) for model in rows}


def test_saved_parameters_are_those_of_the_parameters():
    rows = ablation_rows()
    one = rows['groupmamba-tiny-g1_8xb128_in1k']['Parameters']
    saved = {
        name: row['Saved Parameters']
        for name, row in rows.items()
        if row['Saved Parameters'] is not None
    }
    assert len(saved) == 4  # 1, 2, 4 and 8 groups
    for name, per_cent in saved.items():
        assert per_cent == round(100 * (1 - rows[name]['Parameters'] / one), 1), name


def test_the_groups_of_both_families_are_as_the_ablations_say():
    path = ROOT / 'configs' / 'groupmamba' / 'groupmamba-official-tiny_8xb128_in1k.py'
    text = ' '.join((ABLATIONS / 'README.md').read_text().split())
    counts = []
    for groups in (1, 2, 4):
        model = build_model(load_config(str(path), {'model.backbone.num_groups': groups}))
        counts.append(sum(p.numel() for p in model.parameters()))
    assert '{:,}, {:,} and {:,} parameters with 1, 2 and 4 groups'.format(*counts) in text
    official = [f'{100 * (1 - count / counts[0]):.1f} %' for count in counts[1:]]
    for groups, suffix, last in zip((2, 4, 8), ('-g2', '', '-g8'), official + ['348 channels']):
        row = ablation_rows()[f'groupmamba-tiny{suffix}_8xb128_in1k']
        assert (
            f'| {groups} | {row["Published Saved Parameters"]} % | '
            f'{row["Saved Parameters"]} % | {last} '
        ) in text


def test_the_wide_model_is_within_one_per_cent_of_both_published_counts():
    model = build_model(load_config(str(ABLATIONS / 'groupmamba-tiny-wide_8xb128_in1k.py')))
    found = count_complexity(model, 224)
    assert found.params == pytest.approx(31e6, rel=0.01)
    assert found.macs == pytest.approx(5.2e9, rel=0.01)
