"""Train, test, paint and draw the demo detector and segmenter by the commands, on a few scenes."""

import pickle
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from PIL import Image

from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError, DataError
from tests.conftest import REPO, SMALL, load_tool

CONFIGS = {'det': 'mask-rcnn_groupmamba-pico_demo-det', 'seg': 'groupmamba-pico_upernet_demo-seg'}
ADE = 'configs/upernet/groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'
#: A backbone that learns nothing in two steps, but fast.
SMALL_RUN = [
    'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0',
    'model.backbone.arch.embed_dims=[8,12,16,20]',
    'model.backbone.arch.stem_channels=8',
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.save_best=None',
]
WIDTHS = {
    'det': [
        'model.neck.in_channels=[8,12,16,20]',
        'model.test_cfg.rcnn.score_thr=0.0',
        'model.test_cfg.rcnn.max_per_img=300',
        'val_evaluator.metric_items=[mAP,mAP_50,AR@1000]',
    ],
    'seg': ['model.decode_head.in_channels=[8,12,16,20]', 'model.auxiliary_head.in_channels=16'],
}
#: What each run measured last, by its name, before any rounding for a log.
METRICS = {}


def call(tool, task, name, *arguments):
    """Run a command inside this process, which spares its imports, and return its exit code."""
    options = [
        f'{split}_dataloader.dataset.data_root=data/{task}/' for split in ('train', 'val', 'test')
    ]
    if task == 'det':
        options += [
            f'{split}_evaluator.ann_file=data/det/annotations/instances_val.json'
            for split in ('val', 'test')
        ]
    # mmengine keeps its loggers by the experiment's name and the second
    options += [*SMALL_RUN, *WIDTHS[task], f'experiment_name={name}']
    evaluate = Evaluator.evaluate

    def kept(self, size):
        METRICS[name] = evaluate(self, size)
        return METRICS[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, 'evaluate', kept)
        patch.setattr(
            sys,
            'argv',
            [
                tool,
                str(REPO / f'configs/demo/{CONFIGS[task]}.py'),
                *arguments,
                '--work-dir',
                name,
                '--cfg-options',
                *options,
            ],
        )
        try:
            runpy.run_path(str(REPO / 'tools' / tool), run_name='__main__')
        except SystemExit as ended:
            return ended.code
    return 0


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dense')
    tool = load_tool('dataset_converters/make_demo_data.py')
    for task in CONFIGS:
        tool.make_scenes(folder / 'data', task, num_train=4, num_val=3)
    return folder


@pytest.fixture(scope='module', params=sorted(CONFIGS))
def trained(request, place):
    """A task, its folder, and a first training."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert call('train.py', request.param, f'first_{request.param}') == 0
    return request.param, place


def where_test_data_are(task, place):
    """The options that say where the test data are."""
    options = [f'test_dataloader.dataset.data_root={place}/data/{task}/']
    if task == 'det':
        options.append(f'test_evaluator.ann_file={place}/data/det/annotations/instances_val.json')
    return options


def gallery(task, place, *options):
    results = {'det': 'out.pkl', 'seg': 'labels'}[task]
    tool = load_tool('analysis_tools/gallery.py')
    tool.main(
        [
            str(REPO / f'configs/demo/{CONFIGS[task]}.py'),
            str(place / results),
            '--out',
            str(place / f'{task}.png'),
            *options,
            '--cfg-options',
            *where_test_data_are(task, place),
        ]
    )
    return tool


def test_the_same_seed_gives_the_same_weights_and_metrics(trained, monkeypatch):
    task, place = trained
    monkeypatch.chdir(place)
    assert call('train.py', task, f'again_{task}') == 0
    metrics = METRICS[f'first_{task}']
    # next to nothing is learnt, but a few of the many boxes are right, and compared with them
    assert metrics[{'det': 'coco/bbox_AR@1000', 'seg': 'mIoU_foreground'}[task]] > 0
    assert {'det': 'coco/segm_mAP', 'seg': 'mIoU'}[task] in metrics
    assert metrics == METRICS[f'again_{task}']
    first, again = (
        load_checkpoint_file(place / f'{run}_{task}/epoch_1.pth') for run in ('first', 'again')
    )
    for name, tensor in first['state_dict'].items():
        assert torch.equal(tensor, again['state_dict'][name]), name


def test_testing_prints_writes_and_paints(trained, monkeypatch, capsys):
    task, place = trained
    monkeypatch.chdir(place)
    results = {'det': 'out.pkl', 'seg': 'labels'}[task]
    assert (
        call(
            'test.py',
            task,
            f'tested_{task}',
            f'first_{task}/epoch_1.pth',
            '--out',
            results,
            '--show-dir',
            f'painted_{task}',
        )
        == 0
    )
    log = next((place / f'tested_{task}').glob('*/*.log')).read_text()
    if task == 'det':
        assert re.search(r'coco/bbox_mAP: [\d.-]+ .*coco/segm_mAP: [\d.-]+', log)
        samples = pickle.loads((place / results).read_bytes())
        assert len(samples) == 3 and 'counts' in samples[0]['pred_instances']['masks'][0]
    else:
        assert re.search(r'mIoU: [\d.]+ .*mIoU_foreground: [\d.]+', log)
        assert sorted(file.name for file in (place / results).iterdir()) == [
            f'{index:06d}.png' for index in range(3)
        ]
    painted = sorted(place.glob(f'painted_{task}/**/*.png'))
    assert [file.name for file in painted] == [f'{index:06d}.png' for index in range(3)]
    assert all(np.asarray(Image.open(file)).std() > 0 for file in painted)

    for options in (['--num', '2'], ['--images', '000002.png', '000000.png']):
        gallery(task, place, *options, '--score-thr', '0')
        with Image.open(place / f'{task}.png') as picture:
            assert len(picture.convert('RGB').getcolors(1 << 24)) > 100
    with pytest.raises(DataError, match='9.png: not in the test data; there are 3'):
        gallery(task, place, '--images', '9.png')
    assert 'Wrote' in capsys.readouterr().out


def test_tta(trained, monkeypatch, capsys):
    task, place = trained
    monkeypatch.chdir(place)
    code = call('test.py', task, f'tta_{task}', f'first_{task}/epoch_1.pth', '--tta')
    if task == 'det':
        assert code == 1
        assert 'predicts masks, and mmdet merges boxes only' in capsys.readouterr().err
    else:
        assert code == 0
        assert 'mIoU' in next((place / f'tta_{task}').glob('*/*.log')).read_text()


def test_tta_of_the_ade20k_config_runs_at_six_scales(tmp_path, monkeypatch, one_thread):
    """Each image is seen at six sizes, mirrored and not; a small backbone and narrow heads."""
    from groupmamba_mm import GroupMamba

    arch = SMALL['paper']
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (tmp_path / f'ade/{kind}/{split}').mkdir(parents=True)
    random = np.random.default_rng(0)
    # long and flat, which keeps the largest of the six sizes small
    image = random.integers(0, 256, (16, 640, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'ade/images/validation/one.jpg')
    Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8)[:, None], 640, 1)).save(
        tmp_path / 'ade/annotations/validation/one.png'
    )
    config = tmp_path / 'small.py'
    config.write_text(f"""
_base_ = ['{REPO}/{ADE}']
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{arch}), init_cfg=None),
    decode_head=dict(in_channels={list(arch['embed_dims'])}, channels=8),
    auxiliary_head=dict(in_channels={arch['embed_dims'][2]}, channels=8))
test_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root='{tmp_path}/ade'))
""")
    cfg = load_config(str(config))
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=build_model(cfg).state_dict()), tmp_path / 'model.pth')
    seen, forward = [], GroupMamba.forward

    def watched(self, x):
        seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(GroupMamba, 'forward', watched)
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'test.py',
            str(config),
            str(tmp_path / 'model.pth'),
            '--tta',
            '--work-dir',
            str(tmp_path / 'tested'),
        ],
    )
    runpy.run_path(str(REPO / 'tools/test.py'), run_name='__main__')
    sizes = [tuple(x.shape[2:]) for x in seen]
    # the first image once more, for the metrics to be tried
    assert sizes == 2 * [
        size
        for width in (1024, 1536, 2048, 2560, 3072, 3584)
        for size in [(round(width / 40), width)] * 2
    ]
    for plain, mirrored in zip(seen[::2], seen[1::2]):
        assert torch.equal(plain, mirrored.flip(3))
    assert 'mIoU' in next((tmp_path / 'tested').glob('*/*.log')).read_text()


class TestGallery:
    @pytest.fixture
    def tool(self):
        return load_tool('analysis_tools/gallery.py')

    @pytest.mark.parametrize('has_masks', [True, False])
    def test_found_and_wrong(self, tool, has_masks):
        def squares(*labels_and_places, scores=None):
            masks = torch.zeros(len(labels_and_places), 20, 40)
            for mask, (_, x) in zip(masks, labels_and_places):
                mask[:10, x : x + 10] = 1
            found = InstanceData(
                labels=np.array([label for label, _ in labels_and_places]),
                bboxes=torch.tensor([[x, 0.0, x + 10, 10] for _, x in labels_and_places]),
            )
            if has_masks:
                found.masks = masks.bool().numpy()
            if scores is not None:
                found.scores = torch.tensor(scores)
            return found

        truth = squares((1, 0), (2, 20))
        right = squares((1, 1), (2, 21), scores=[0.9, 0.8])
        assert tool.count_found(truth, right) == 2
        # the second of two of one class
        twins = squares((1, 0), (1, 20))
        assert tool.count_found(twins, squares((1, 20), scores=[0.9])) == 1
        # another class, too far, and the same thing twice
        assert tool.count_found(truth, squares((2, 0), (1, 5), scores=[0.9, 0.8])) == 0
        assert tool.count_found(truth, squares((1, 0), (1, 1), scores=[0.9, 0.8])) == 1

    def test_errors(self, tool, place):
        config = str(REPO / f'configs/demo/{CONFIGS["det"]}.py')
        out = ['--out', str(place / 'g.png'), '--cfg-options', *where_test_data_are('det', place)]
        with pytest.raises(DataError, match='nowhere.pkl do not exist'):
            tool.main([config, 'nowhere.pkl', *out])
        (place / 'other.pkl').write_bytes(pickle.dumps([dict(pred_label=1)]))
        with pytest.raises(DataError, match="hold no list of a detector's predictions"):
            tool.main([config, str(place / 'other.pkl'), *out])
        with pytest.raises(ConfigError, match='prediction_grid.py draws'):
            tool.main([str(REPO / 'configs/demo/groupmamba-pico_demo-cls.py'), 'a.pkl', *out])
        seg = str(REPO / f'configs/demo/{CONFIGS["seg"]}.py')
        with pytest.raises(DataError, match='have no 00000.*png'):
            tool.main(
                [
                    seg,
                    str(place),
                    '--out',
                    str(place / 'g.png'),
                    '--cfg-options',
                    *where_test_data_are('seg', place),
                ]
            )
