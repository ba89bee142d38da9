"""Detectors and segmenters on GroupMamba: odd and mixed sizes, DDP, frozen stages, inferencers."""

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmseg.apis import MMSegInferencer

from groupmamba_mm.analysis.building import build_model
from tests.conftest import REPO, SMALL
from tests.test_dense_configs import ADE, COCO_1X, batch_for, load, loss_of, small
from tests.test_tools.test_train_test_cli import free_port

DEMO = (
    'configs/demo/mask-rcnn_groupmamba-pico_demo-det.py',
    'configs/demo/groupmamba-pico_upernet_demo-seg.py',
)
#: One detector and one segmenter, of different families.
SMALL_CASES = [(COCO_1X['official-tiny'], 'official-tiny'), (ADE['tiny'], 'tiny')]


def build(path, size, **options):
    cfg = small(path, size)
    cfg.model.backbone.update(options)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 96)
    torch.manual_seed(0)
    return cfg, build_model(cfg).train()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{free_port()}', rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('path, size', SMALL_CASES)
def test_no_parameter_is_unused_under_ddp(path, size, with_cp, one_process, one_thread):
    """DDP that does not look for unused parameters fails in the step after one was."""
    cfg, model = build(path, size, with_cp=with_cp, drop_path_rate=0.3)
    model = revert_sync_batchnorm(model)  # needs GPUs; the runner does the same
    model = MMDistributedDataParallel(model, find_unused_parameters=False, broadcast_buffers=False)
    batch = batch_for(cfg, [(64, 96), (64, 96)])
    for _ in range(2):
        data = model.module.data_preprocessor(batch, training=True)
        loss, _ = model.module.parse_losses(model(**data, mode='loss'))
        loss.backward()


@pytest.mark.parametrize('path, size', SMALL_CASES)
def test_frozen_stages_stay_as_they_are(path, size, one_thread):
    cfg, model = build(path, size, frozen_stages=2)
    loss, _ = loss_of(model, batch_for(cfg, [(64, 96), (64, 96)]))
    loss.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = ('stem', 'stages.0', 'stages.1', 'downsamples.0')
    assert frozen and all(
        name.startswith(tuple(f'backbone.{part}' for part in parts)) for name in frozen
    )
    # the frozen stages' maps are used, so that their output norms still learn
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name


def test_an_image_does_not_see_the_others_of_its_batch(one_thread):
    """Images of different sizes are padded to the largest, with zeros."""
    cfg, model = build(COCO_1X['tiny'], 'tiny')
    model.eval()

    def maps(batch):
        data = model.data_preprocessor(batch)
        assert data['inputs'].shape[2:] == (64, 96)
        with torch.no_grad():
            return model.extract_feat(data['inputs'])

    first = batch_for(cfg, [(40, 90), (64, 70), (20, 96)])
    second = batch_for(cfg, [(40, 90), (50, 96), (64, 20)])
    for together, other, alone in zip(
        maps(first),
        maps(second),
        maps(dict(first, inputs=[first['inputs'][0], torch.zeros(3, 64, 96, dtype=torch.uint8)])),
    ):
        torch.testing.assert_close(together[0], other[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('path, size', SMALL_CASES)
def test_mixed_sizes_train_and_odd_sizes_are_tested(path, size, one_thread):
    cfg, model = build(path, size)
    loss, _ = loss_of(model, batch_for(cfg, [(41, 90), (64, 71)]))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    for height, width in ((33, 95), (70, 37)):
        with torch.no_grad():
            (result,) = model.test_step(batch_for(cfg, [(height, width)]))
        if cfg.default_scope == 'mmdet':
            found = result.pred_instances
            assert found.masks.shape[1:] == (height, width)
            assert (found.bboxes >= 0).all() and (found.bboxes[:, 2] <= width).all()
        else:
            assert result.pred_sem_seg.shape == (height, width)


@pytest.mark.parametrize('size', [(33, 95), (97, 36)])
@pytest.mark.parametrize('family', sorted(SMALL))
def test_maps_are_not_filled_up_inside(family, size):
    """A larger image that is cut is not the smaller one, but no row or column is made up."""
    from groupmamba_mm import GroupMamba

    backbone = GroupMamba(SMALL[family], out_indices=(0, 1, 2, 3)).eval()
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for features in backbone(image):
        # the last row and column depend on the last pixels, so they are of the image
        (corner,) = torch.autograd.grad(
            features[..., -1, -1].square().sum(), image, retain_graph=True
        )
        assert corner[..., -4:, -4:].abs().sum() > 0


def save(cfg, model, tmp_path):
    meta = dict(dataset_meta=dict(cfg.test_dataloader.dataset.metainfo))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'model.pth')
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    return str(tmp_path / 'model.pth'), str(tmp_path / 'image.png'), image


def test_mmdets_inferencer(tmp_path, one_thread):
    cfg = load(DEMO[0])
    torch.manual_seed(0)
    weights, file, image = save(cfg, build_model(cfg), tmp_path)
    inferencer = DetInferencer(str(REPO / DEMO[0]), weights, device='cpu', show_progress=False)
    results = [
        inferencer(source, pred_score_thr=0.0, return_datasamples=True)['predictions'][0]
        for source in (file, image)
    ]
    for result in results:
        assert result.pred_instances.masks.shape[1:] == (96, 128)
        assert torch.equal(result.pred_instances.scores, results[0].pred_instances.scores)
    assert inferencer.visualizer.dataset_meta['classes'][3] == 'three'


def test_mmsegs_inferencer(tmp_path, one_thread):
    cfg = load(DEMO[1])
    torch.manual_seed(0)
    model = build_model(cfg)
    weights, file, image = save(cfg, model, tmp_path)
    inferencer = MMSegInferencer(str(REPO / DEMO[1]), weights, device='cpu')
    inferencer.show_progress = False
    labels = [inferencer(source)['predictions'] for source in (file, image)]
    assert labels[0].shape == (96, 128) and (labels[0] == labels[1]).all()
    data = model.data_preprocessor(dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)]))
    with torch.no_grad():
        logits = model(data['inputs'], mode='tensor')
    logits = torch.nn.functional.interpolate(logits, (96, 128), mode='bilinear')
    assert (logits.argmax(1)[0].numpy() == labels[0]).mean() > 0.999
