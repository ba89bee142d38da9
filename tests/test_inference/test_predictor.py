"""Images of one's own: the same results as the libraries' entry points, from any kind of source."""

import io
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import groupmamba_mm
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.errors import CheckpointError, ConfigError, DataError
from groupmamba_mm.inference import Predictor
from tests.conftest import load_tool

CONFIGS = dict(
    cls='groupmamba-official-pico_demo-cls',
    det='mask-rcnn_groupmamba-pico_demo-det',
    seg='groupmamba-pico_upernet_demo-seg',
)
TOOL = load_tool('infer.py')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Checkpoints with names of classes, pictures of two sizes, one of them broken."""
    folder = tmp_path_factory.mktemp('place')
    for task, name in CONFIGS.items():
        torch.manual_seed(0)
        model = build_model(groupmamba_mm.get_config(name))
        meta = {}
        if task == 'cls':
            meta = dict(dataset_meta=dict(classes=[f'digit {i}' for i in range(10)]))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / f'{task}.pth')
    random = np.random.default_rng(0)
    (folder / 'images/below').mkdir(parents=True)
    for name, shape in (
        ('a.png', (64, 64, 3)),
        ('b.png', (64, 64, 3)),
        ('below/c.png', (48, 96, 3)),
    ):
        cv2.imwrite(str(folder / 'images' / name), random.integers(0, 256, shape, dtype=np.uint8))
    (folder / 'images/broken.jpg').write_bytes(b'\xff\xd8 nothing')
    video = cv2.VideoWriter(str(folder / 'v.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 5, (96, 64))
    for _ in range(3):
        video.write(random.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    video.release()
    return folder


def infer(place, task, source, *options):
    out = place / f'out-{task}'
    TOOL.main(
        [
            str(source),
            '--config',
            CONFIGS[task],
            '--checkpoint',
            str(place / f'{task}.pth'),
            '--out',
            str(out),
            '--device',
            'cpu',
            *options,
        ]
    )
    return out


def test_classes_are_those_of_mmpretrains_inferencer(place, one_thread):
    from mmpretrain import ImageClassificationInferencer

    config = groupmamba_mm.config_path(CONFIGS['cls'])
    predictor = Predictor(CONFIGS['cls'], place / 'cls.pth', device='cpu', top=3)
    image = str(place / 'images/a.png')
    (theirs,) = ImageClassificationInferencer(str(config), str(place / 'cls.pth'), 'cpu')(image)
    ours = predictor(image)
    assert ours['label'] == theirs['pred_class'] == f'digit {theirs["pred_label"]}'
    assert ours['score'] == pytest.approx(theirs['pred_score'], abs=1e-4)
    assert len(ours['top']) == 3 and ours['top'][0]['label'] == ours['label']
    assert predictor(cv2.imread(image)) == ours


def test_boxes_are_those_of_mmdets_inferencer(place, one_thread):
    from mmdet.apis import DetInferencer

    image = str(place / 'images/below/c.png')
    theirs = DetInferencer(
        groupmamba_mm.get_config(CONFIGS['det']), str(place / 'det.pth'), device='cpu'
    )(image, no_save_vis=True)['predictions'][0]
    ours = Predictor(CONFIGS['det'], place / 'det.pth', device='cpu', score_thr=0.0)(image)
    assert len(theirs['scores']) > 0
    assert [e['score'] for e in ours['instances']] == pytest.approx(theirs['scores'], abs=1e-4)
    np.testing.assert_allclose([e['box'] for e in ours['instances']], theirs['bboxes'], atol=0.06)
    assert {e['label'] for e in ours['instances']} <= {
        'zero',
        'one',
        'two',
        'three',
        'four',
        'five',
        'six',
        'seven',
        'eight',
        'nine',
    }


def test_shares_are_those_of_mmsegs_inferencer(place, one_thread):
    from mmseg.apis import MMSegInferencer

    image = str(place / 'images/below/c.png')
    theirs = MMSegInferencer(
        groupmamba_mm.get_config(CONFIGS['seg']), str(place / 'seg.pth'), device='cpu'
    )(image)['predictions']
    ours = Predictor(CONFIGS['seg'], place / 'seg.pth', device='cpu')(image)['share']
    numbers, counts = np.unique(theirs, return_counts=True)
    expected = {
        groupmamba_mm.get_config(CONFIGS['seg']).test_dataloader.dataset.metainfo['classes'][n]: c
        / theirs.size
        for n, c in zip(numbers, counts)
    }
    assert ours == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_a_folder(task, place, capsys, one_thread):
    capsys.readouterr()
    out = infer(place, task, place / 'images', '--batch-size', '2', '--score-thr', '0')
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line['image'] for line in lines] == [
        str(place / 'images' / name) for name in ('a.png', 'b.png', 'below/c.png')
    ]
    assert (out / 'predictions.jsonl').read_text() == said.out
    assert 'skipped: image' in said.err and 'broken.jpg' in said.err
    single = Predictor(CONFIGS[task], place / f'{task}.pth', 'cpu', 0.0)(
        place / 'images/below/c.png'
    )
    assert lines[2] == dict(image=lines[2]['image'], **single)
    for name, shape in (('a.png', (64, 64, 3)), ('below/c.png', (48, 96, 3))):
        painted = cv2.imread(str(out / 'painted' / name))
        assert painted.shape == shape
        assert not np.array_equal(painted, cv2.imread(str(place / 'images' / name)))


def test_other_sources(place, capsys, monkeypatch, one_thread):
    capsys.readouterr()
    infer(place, 'seg', place / 'images/*.png', '--no-paint')
    by_pattern = capsys.readouterr().out.splitlines()
    assert len(by_pattern) == 2
    content = (place / 'images/a.png').read_bytes()
    monkeypatch.setattr('sys.stdin', SimpleNamespace(buffer=io.BytesIO(content)))
    out = infer(place, 'seg', '-')
    from_stdin = json.loads(capsys.readouterr().out)
    assert from_stdin == dict(json.loads(by_pattern[0]), image='-')
    assert (out / 'painted/stdin.png').is_file()
    infer(place, 'seg', place / 'v.mp4', '--batch-size', '2')
    frames = [json.loads(line)['image'] for line in capsys.readouterr().out.splitlines()]
    assert frames == [f'{place / "v.mp4"}#{i}' for i in range(3)]
    painted = cv2.VideoCapture(str(out / 'painted/v.mp4'))
    assert painted.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and painted.get(cv2.CAP_PROP_FPS) == 5


def test_what_cannot_be_read_is_told(place, monkeypatch):
    for source, message in (
        (place / 'none.png', 'no file, no folder and no pattern'),
        (place / 'images/broken.jpg', 'none of its 1 files could be read'),
    ):
        with pytest.raises(DataError, match=message):
            infer(place, 'cls', source)
    (place / 'empty').mkdir()
    with pytest.raises(DataError, match='has no images'):
        infer(place, 'cls', place / 'empty')
    monkeypatch.setattr('sys.stdin', SimpleNamespace(buffer=io.BytesIO(b'text')))
    with pytest.raises(DataError, match=r'standard input \(4 bytes\) is no image'):
        infer(place, 'cls', '-')
    (place / 'bad.mp4').write_bytes(b'no video')
    with pytest.raises(DataError, match='video .*bad.mp4 cannot be read'):
        infer(place, 'cls', place / 'bad.mp4')
    with pytest.raises(CheckpointError, match='nothing was loaded'):
        Predictor(CONFIGS['seg'], place / 'cls.pth')
    with pytest.raises(ConfigError, match='there is no config'):
        Predictor('no-such-config', place / 'cls.pth')
