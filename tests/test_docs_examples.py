"""The Python in these pages of docs/ runs, in a folder with a checkpoint and a picture."""

import re

import pytest
import torch
from torchvision.io import write_png

import groupmamba_mm
from tests.conftest import REPO

PAGES = ('export', 'inference', 'integrations')


@pytest.mark.parametrize('page', PAGES)
def test_examples_run(page, tmp_path, monkeypatch, capsys, one_thread):
    from groupmamba_mm.analysis.building import build_model

    monkeypatch.chdir(tmp_path)
    model = build_model(groupmamba_mm.get_config('groupmamba-official-pico_demo-cls'))
    meta = dict(dataset_meta=dict(classes=[f'digit {i}' for i in range(10)]))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), 'CHECKPOINT.pth')
    write_png(torch.zeros(3, 64, 64, dtype=torch.uint8), 'IMAGE.png')
    text = (REPO / f'docs/{page}.md').read_text(encoding='utf-8')
    examples = re.findall(r'^```python\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)
    assert examples
    for example in examples:
        exec(compile(example, page, 'exec'), {})
    said = capsys.readouterr().out
    assert {'export': '[1, 448]', 'inference': 'digit', 'integrations': '[4, 8, 16, 32]'}[
        page
    ] in said
