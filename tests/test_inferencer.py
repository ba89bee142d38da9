"""The model from mmpretrain's own entry point, which knows of no plugin."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain import ImageClassificationInferencer

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.engine.config_checks import load_config
from tests.conftest import REPO


@pytest.mark.parametrize('name', ['groupmamba-pico', 'groupmamba-official-pico'])
def test_classifies_files_and_arrays(name, tmp_path, one_thread):
    config = str(REPO / f'configs/demo/{name}_demo-cls.py')
    cfg = load_config(config, {})
    init_default_scope(cfg.default_scope)
    model = build_model(cfg)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)

    inferencer = ImageClassificationInferencer(
        config, pretrained=str(tmp_path / 'model.pth'), device='cpu'
    )
    (from_file,) = inferencer(str(tmp_path / 'image.png'))
    (from_array,) = inferencer(image)

    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    data = model.data_preprocessor(dict(inputs=tensor))
    with torch.no_grad():
        expected = model(data['inputs'], mode='tensor').softmax(-1)[0].numpy()
    for result in (from_file, from_array):
        np.testing.assert_allclose(result['pred_scores'], expected, atol=1e-5)
        assert result['pred_label'] == expected.argmax()
