"""Libraries that a run does not use are not imported, and are there for who asks for them."""

import pytest

from tests.kernel_testing import run_apart

MMDET = """
import sys
import groupmamba_mm.heads, groupmamba_mm.distillation
assert 'mmpretrain.models' in sys.modules and 'mmdet.models' not in sys.modules
import mmdet.models
from mmdet.registry import MODELS
from mmpretrain.models.utils import ResLayerExtraNorm
assert ResLayerExtraNorm is MODELS.get('ResLayerExtraNorm')
print(MODELS.get('ResLayerExtraNorm').__name__)
"""

TRANSFORMERS = """
import sys
import torch
import groupmamba_mm.engine
assert 'transformers' not in sys.modules
from mmengine.registry import OPTIMIZERS
weight = torch.nn.Parameter(torch.zeros(3))
optimizer = OPTIMIZERS.build(dict(type='Adafactor', params=[weight], lr=0.5))
print(type(optimizer).__module__, optimizer.param_groups[0]['lr'])
"""


@pytest.mark.parametrize('first', ['mmpretrain.models', 'mmdet.models'])
def test_libraries_that_are_imported_first_have_all_of_theirs(first):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    code = f'import groupmamba_mm, {first}, groupmamba_mm.heads, mmdet.models\n'
    done = run_apart('-c', code + MMDET.rpartition('import mmdet.models')[2])
    assert done.stdout.split()[-1] == 'ResLayerExtraNorm', done.stderr


def test_mmpretrain_comes_without_the_models_of_mmdet_which_get_its_class_later():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    done = run_apart('-c', MMDET)
    assert done.stdout.split()[-1] == 'ResLayerExtraNorm', done.stderr


def test_mmengine_comes_without_transformers_whose_optimizer_is_built_all_the_same(tmp_path):
    pytest.importorskip('mmengine')
    (tmp_path / 'transformers').mkdir()
    (tmp_path / 'transformers' / '__init__.py').write_text(
        'import torch\n\n\nclass Adafactor(torch.optim.SGD):\n    pass\n'
    )
    done = run_apart('-c', TRANSFORMERS, PYTHONPATH=str(tmp_path))
    assert done.stdout.split()[-2:] == ['transformers', '0.5'], done.stderr
