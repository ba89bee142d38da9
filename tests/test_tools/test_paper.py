"""The page of the paper's tables and figures."""

import shutil

import pytest
import yaml
from PIL import Image

from groupmamba_mm.errors import DataError
from tests.conftest import REPO, load_tool

paper = load_tool('analysis_tools/paper.py')
RESULTS = yaml.safe_load(paper.DATA.read_text(encoding='utf-8'))
COUNTS = paper.read_counts(REPO)


def test_the_page_is_that_of_the_data():
    paper.main(['--check'])


def test_page_and_pictures_come_back(tmp_path):
    for path in (
        'model-index.yml',
        *yaml.safe_load((REPO / 'model-index.yml').read_text())['Import'],
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / path, tmp_path / path)
    with pytest.raises(DataError, match=r'run python tools/analysis_tools/paper\.py'):
        paper.main(['--check'], tmp_path)
    paper.main([], tmp_path)
    assert (tmp_path / 'docs/paper.md').read_text() == (REPO / 'docs/paper.md').read_text()
    for number in (1, 4):
        name = f'docs/images/paper_figure_{number}.png'
        with Image.open(tmp_path / name) as made, Image.open(REPO / name) as kept:
            assert made.size == kept.size
            assert len(made.convert('RGB').getcolors(1 << 24)) > 100


def test_what_the_paper_states_twice_is_the_same():
    """Tables 1, 3, 4, 5 and Figure 4 repeat each other's accuracies."""
    rows = {
        table['number']: {row[0]: dict(zip(table['columns'], row)) for row in table['rows']}
        for table in RESULTS['tables']
    }
    for size in 'TSB':
        assert rows[1][f'GroupMamba-{size}']['top-1'] == rows[3][f'GroupMamba-{size} with']['top-1']
    assert rows[4]['D1, D2, D3, D4']['top-1'] == rows[1]['GroupMamba-T']['top-1']
    assert rows[5]['GroupMamba-T']['top-1'] == rows[3]['GroupMamba-T without']['top-1']
    speeds = {point['name']: point for point in RESULTS['throughput']}
    assert speeds['+ CAM']['top1'] == rows[5]['GroupMamba-T']['top-1']
    assert speeds['+ distilled loss']['speed'] == rows[4]['D1, D2, D3, D4']['images/s on an A100']


def test_names_that_are_nowhere(capsys):
    table = dict(RESULTS['tables'][4], here={'GroupMamba-X': [None, None]})
    with pytest.raises(DataError, match='table 5: no row or metafile has GroupMamba-X'):
        paper.make_table(table, COUNTS)
    table = dict(RESULTS['tables'][4], here={'VMamba-T': ['vmamba', None]})
    with pytest.raises(DataError, match='vmamba'):
        paper.make_table(table, COUNTS)
    stated = {'tiny': dict(RESULTS['architectures']['tiny'], blocks=[2, 2, 8, 2])}
    with pytest.raises(DataError, match='blocks of tiny'):
        paper.make_architectures(stated, COUNTS)
