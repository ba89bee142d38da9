"""What a user of the wheel does first; tools/try_wheel.sh runs it in an empty environment.

python -I tools/_wheel_trial.py bare    the wheel without an extra
python -I tools/_wheel_trial.py full    with those that the README names
"""

import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

import groupmamba_mm
from groupmamba_mm.errors import MissingExtraError

CLASSIFIER = 'groupmamba-official-pico_demo-cls'
DETECTOR = 'mask-rcnn_groupmamba-pico_demo-det'
SEGMENTER = 'groupmamba-pico_upernet_demo-seg'


@contextmanager
def timed(what):
    """Print what was done and how long it took."""
    start = time.perf_counter()
    yield
    print(f'- {what} ({time.perf_counter() - start:.1f} s)', flush=True)


def expect_extra(extra, call):
    """Call what needs an extra, and check that the error names it."""
    try:
        call()
    except MissingExtraError as error:
        if f"'groupmamba-mm[{extra}]'" in str(error):
            return
        raise
    raise AssertionError(f'{call} ran without the extra {extra}')


def bare():
    """Torch alone: a model runs, what needs more names its extra."""
    with timed('without an extra: a model runs, errors name mm, hub, demo and export'):
        model = groupmamba_mm.create_model('official-tiny', num_classes=10).eval()
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 10)
        assert len(groupmamba_mm.list_configs()) > 30
        expect_extra('mm', lambda: groupmamba_mm.get_config(CLASSIFIER))
        expect_extra('mm', lambda: __import__('groupmamba_mm.inference'))
        expect_extra('hub', lambda: model.save_pretrained('saved'))
        expect_extra('hub', lambda: groupmamba_mm.create_model('tiny', pretrained='hf://a/b'))
        expect_extra('demo', lambda: __import__('groupmamba_mm.datasets.demo_scenes'))
        from groupmamba_mm.export import export_model, exported_module

        module, names = exported_module(model)
        arguments = (module, names, 'onnx', Path('a.onnx'), (64, 64), True, {})
        expect_extra('export', lambda: export_model(*arguments))


def full():
    """Configs, models, the libraries' inferencers, exports and loading again."""
    import cv2
    import numpy as np
    import timm
    from mmengine.registry import DefaultScope

    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite('picture.png', picture)
    files = {}
    with timed('configs by name, models of the three tasks'):
        from groupmamba_mm.analysis.building import build_model

        assert CLASSIFIER in groupmamba_mm.list_configs()
        for name in (CLASSIFIER, DETECTOR, SEGMENTER):
            torch.manual_seed(0)
            model = build_model(groupmamba_mm.get_config(name))
            meta = dict(dataset_meta=dict(classes=[str(i) for i in range(11)]))
            files[name] = f'{name}.pth'
            torch.save(dict(state_dict=model.state_dict(), meta=meta), files[name])
    with timed('our Predictor for each'):
        from groupmamba_mm.inference import Predictor

        found = {
            name: Predictor(name, file, 'cpu', 0.0)('picture.png') for name, file in files.items()
        }
    with timed("mmpretrain's inferencer, by path and by name"):
        import mmpretrain

        path = str(groupmamba_mm.config_path(CLASSIFIER))
        inferencer = mmpretrain.ImageClassificationInferencer(path, files[CLASSIFIER], 'cpu')
        assert inferencer('picture.png')[0]['pred_class'] == found[CLASSIFIER]['label']
        named = mmpretrain.get_model('groupmamba-official-tiny')
        torch.save(dict(state_dict=named.state_dict()), 'named.pth')
        by_name = mmpretrain.ImageClassificationInferencer(
            'groupmamba-official-tiny', 'named.pth', 'cpu'
        )
        assert 0 <= by_name('picture.png')[0]['pred_label'] < 1000
    with timed("mmdet's inferencer, by a config's name"):
        from mmdet.apis import DetInferencer

        cfg = groupmamba_mm.get_config(DETECTOR)
        theirs = DetInferencer(cfg, files[DETECTOR], device='cpu')('picture.png', no_save_vis=True)
        scores = theirs['predictions'][0]['scores']
        ours = [entry['score'] for entry in found[DETECTOR]['instances']]
        np.testing.assert_allclose(scores, ours, atol=1e-4)
    with timed("mmseg's inferencer, by a config's name"):
        from mmseg.apis import MMSegInferencer

        cfg = groupmamba_mm.get_config(SEGMENTER)
        labels = MMSegInferencer(cfg, files[SEGMENTER], device='cpu')('picture.png')['predictions']
        share = np.bincount(labels.ravel()).max() / labels.size
        assert abs(share - max(found[SEGMENTER]['share'].values())) < 1e-4
    with timed('ONNX, torch.export and safetensors, and the last one loaded again'):
        from groupmamba_mm.export import export_model, exported_module
        from groupmamba_mm.inference import build_with_weights

        with DefaultScope.overwrite_default_scope('mmpretrain'):
            cfg = groupmamba_mm.get_config(CLASSIFIER)
            model = build_with_weights(cfg, files[CLASSIFIER])
        module, names = exported_module(model)
        for kind, suffix in (
            ('onnx', 'onnx'),
            ('torch-export', 'pt2'),
            ('safetensors', 'safetensors'),
        ):
            result = export_model(module, names, kind, Path(f'a.{suffix}'), (64, 64), True, {})
            assert max(result.differences.values()) < 1e-4
        arch = dict(cfg.model.backbone.arch)
        again = groupmamba_mm.create_model(arch, pretrained='a.safetensors', num_classes=10).eval()
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(again(image), module(image))
    with timed('save_pretrained, from_pretrained, timm'):
        again.save_pretrained('saved')
        loaded = groupmamba_mm.GroupMambaClassifier.from_pretrained('saved').eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(image), again(image))
        maps = timm.create_model('groupmamba_official_tiny', features_only=True)(image)
        assert len(maps) == 4


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    assert Path(groupmamba_mm.__file__).is_relative_to(sys.prefix), groupmamba_mm.__file__
    {'bare': bare, 'full': full}[sys.argv[1]]()
