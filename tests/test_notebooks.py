"""The notebook runs from top to bottom in an empty folder, and its model has learnt something."""

import json

import matplotlib
import pytest

from tests.conftest import REPO


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    matplotlib.use('Agg')
    notebook = json.loads((REPO / 'notebooks/first_steps.ipynb').read_text(encoding='utf-8'))
    assert notebook['nbformat'] == 4
    names = {}
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            assert not cell['outputs']  # stored without, so that changes can be read
            exec(compile(''.join(cell['source']), cell['id'], 'exec'), names)
    assert names['score'] > 0.8
    assert 'epoch 4' in capsys.readouterr().out
    assert (tmp_path / 'digits-model/model.safetensors').is_file()
