"""What is wrong with configs and data, said before training starts: kinds of faults, all tasks."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from mmengine.model import PretrainedInit
from PIL import Image

from groupmamba_mm.checks import check, check_quickly
from groupmamba_mm.checks.parts import spread
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError, DataError
from tests.conftest import REPO, load_tool

DEMO = {
    'cls': REPO / 'configs/demo/groupmamba-pico_demo-cls.py',
    'det': REPO / 'configs/demo/mask-rcnn_groupmamba-pico_demo-det.py',
    'seg': REPO / 'configs/demo/groupmamba-pico_upernet_demo-seg.py',
}
SPLITS = ('train', 'val', 'test')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Six scenes of each task for training and for validation, and three classes of images."""
    folder = tmp_path_factory.mktemp('demo')
    tool = load_tool('dataset_converters/make_demo_data.py')
    for task in ('det', 'seg'):
        tool.make_scenes(folder, task, num_train=6, num_val=6)
    random = np.random.RandomState(0)
    for split, number in (('train', 4), ('val', 2)):
        for name in 'abc':
            (folder / 'cls' / split / name).mkdir(parents=True)
            for index in range(number):
                cv2.imwrite(
                    str(folder / 'cls' / split / name / f'{index}.png'),
                    random.randint(0, 255, (64, 64, 3), np.uint8),
                )
    return folder


@pytest.fixture
def data(made, tmp_path):
    """A copy of the data, to be damaged."""
    return shutil.copytree(made, tmp_path / 'demo')


def config(task, data, **options):
    found = located(task, data)
    if task == 'cls':
        found.update({'model.head.num_classes': 3, 'data_preprocessor.num_classes': 3})
    return load_config(str(DEMO[task]), {**found, **options})


def located(task, data):
    """The options that say where the data are."""
    found = {f'{split}_dataloader.dataset.data_root': f'{data / task}/' for split in SPLITS}
    if task == 'det':
        found.update(
            {
                f'{split}_evaluator.ann_file': f'{data}/det/annotations/instances_val.json'
                for split in ('val', 'test')
            }
        )
    return found


def findings(cfg, severity='error', splits=('train', 'val'), full=False):
    return [str(finding) for finding in check(cfg, splits, full=full)[0].of(severity)]


def refused(cfg, message, splits=('train', 'val'), error=(DataError, ConfigError)):
    with pytest.raises(error, match=message) as raised:
        check_quickly(cfg, splits)
    assert '\n' not in str(raised.value)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def train_file(data):
    return data / 'det/annotations/instances_train.json'


def two_classes(cfg):
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(
            classes=('background', 'thing'), palette=[(0, 0, 0), (230, 25, 75)]
        )
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 2
    return cfg


def write_labels(folder, change):
    for file in sorted(folder.glob('*.png')):
        Image.fromarray(change(np.asarray(Image.open(file)))).save(file)


@pytest.mark.parametrize('task', DEMO)
def test_whole_data_pass(made, task):
    cfg = config(task, made)
    assert findings(cfg, splits=SPLITS) == []
    report, built = check(cfg, SPLITS, full=True)
    assert not report.of('error') and set(built) == set(SPLITS)
    facts = ' '.join(map(str, report.of('fact')))
    assert {
        'cls': '12 images; images of each class: a 4, b 4, c 4',
        'det': '; annotations of each class: zero ',
        'seg': '6 images; pixels of each class: background ',
    }[task] in facts
    assert [str(w) for w in report.of('warning') if 'test' in str(w)] == [] or task != 'cls'


def drop_category(content):
    content['categories'] = [c for c in content['categories'] if c['name'] != 'seven']
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] != 8]


COCO_FORM = {
    'category': (
        drop_category,
        r'train data has the categories zero, one, two, three, four and 4 '
        r'more, and not seven; set metainfo=dict\(classes',
    ),
    'image_id': (
        lambda c: c['annotations'][0].update(image_id=99),
        '1 annotations are of images that it does not list: 1 of the image 99',
    ),
    'category_id': (
        lambda c: c['annotations'][0].update(category_id=0),
        'a category that is none of 1, 2, 3.*1 has 0',
    ),
    'masks': (
        lambda c: c['annotations'][1].pop('segmentation'),
        '1 of its annotations have no segmentation: number 1',
    ),
    'ids': (lambda c: c['annotations'][1].update(id=1), '1 ids stand at several annotations: 1'),
    'box': (
        lambda c: c['annotations'][1].update(bbox=[1, 2, 3]),
        r'annotations have a bbox that '
        r'is not \[x, y, width, height\]: number 1 has \[1, 2, 3\]',
    ),
    'text': (
        lambda c: c['images'][1].update(width='128'),
        "1 of its images have a width that is not a number: number 1 has '128'",
    ),
    'null': (lambda c: c.update(annotations=None), 'has no annotations, so it is no COCO file'),
    'no_images': (lambda c: c['images'].clear(), 'lists no images'),
    'form': (lambda c: c.pop('categories'), 'has no categories, so it is no COCO file'),
    'entry': (lambda c: c['images'][2].pop('height'), '1 of its images have no height: number 2'),
    'file': (
        lambda c: c['images'][3].update(file_name='gone.png'),
        r'1 of the 6 images that .* lists are missing: .*train/gone\.png; restore',
    ),
    'same_name': (lambda c: c['categories'][1].update(name='zero'), 'and not one'),
    'twice': (
        lambda c: c['categories'].append(dict(id=11, name='nine')),
        'several categories called nine',
    ),
}


@pytest.mark.parametrize('case', COCO_FORM)
def test_damaged_coco_files_are_refused(data, case):
    change, message = COCO_FORM[case]
    edit(train_file(data), change)
    refused(config('det', data), message, error=DataError)


def test_missing_or_broken_annotation_files(data):
    file = data / 'det/annotations/instances_val.json'
    file.write_text('{"images": [')
    refused(config('det', data), 'instances_val.json of the val data is not valid JSON')
    file.unlink()
    refused(
        config('det', data), 'annotation file .*instances_val.json of the val data does not exist'
    )


NOTHING = {
    'empty': (lambda c: c['annotations'].clear(), 'no labelled annotations in 6 images'),
    'crowds': (lambda c: [a.update(iscrowd=1) for a in c['annotations']], '21 crowds or ignored'),
    'ignored': (lambda c: [a.update(ignore=1) for a in c['annotations']], '21 crowds or ignored'),
    'area': (lambda c: [a.update(area=-1) for a in c['annotations']], '21 smaller than a pixel'),
    'images': (
        lambda c: [i.update(width=0, height=0) for i in c['images']],
        'and the annotation file says 0x0',
    ),
    'shares': (
        lambda c: [a.update(bbox=[x / 128 for x in a['bbox']]) for a in c['annotations']],
        'boxes are in pixels',
    ),
    'outside': (
        lambda c: [a.update(bbox=[900, 900, 9, 9]) for a in c['annotations']],
        '21 outside of their image',
    ),
}


@pytest.mark.parametrize('case', NOTHING)
def test_a_detector_needs_something_to_learn(data, case):
    change, message = NOTHING[case]
    edit(train_file(data), change)
    refused(config('det', data), message)
    if case == 'images':
        return
    # in validation, it may be meant
    shutil.copy(train_file(data), data / 'det/annotations/instances_val.json')
    cfg = config('det', data, **{'val_dataloader.dataset.data_prefix.img': 'train/'})
    assert findings(cfg, splits=('val',)) == []
    assert any(
        message in warning or message[:4] in warning
        for warning in findings(cfg, 'warning', ('val',))
    )


def test_images_can_all_be_filtered_out(made):
    cfg = config('det', made)
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=4000)
    refused(cfg, 'no image left after all filters; check filter_cfg')


def test_annotations_that_are_left_out_are_counted(data):
    edit(train_file(data), lambda c: [a.update(area=0) for a in c['annotations'][:2]])
    assert any(
        'give 19 of 21 annotations to the model; left out: 2 smaller' in fact
        for fact in findings(config('det', data), 'fact')
    )
    edit(train_file(data), lambda c: [a.update(area=0) for a in c['annotations'][:15]])
    assert any('give 6 of 21' in warning for warning in findings(config('det', data), 'warning'))


@pytest.mark.parametrize('key', ['iscrowd', 'segmentation'])
def test_what_the_metric_reads_must_be_in_the_file(data, key):
    edit(
        data / 'det/annotations/instances_val.json',
        lambda c: [a.pop(key) for a in c['annotations'][1:]],
    )
    refused(config('det', data), f'val data is wrong: .* of its annotations have no {key}')


def test_a_test_file_needs_no_annotations(data):
    file = data / 'det/annotations/instances_val.json'
    for change in (lambda c: c['annotations'].clear(), lambda c: c.pop('annotations')):
        edit(file, change)
        cfg = config(
            'det',
            data,
            **{'test_evaluator.format_only': True, 'test_evaluator.outfile_prefix': 'x'},
        )
        assert findings(cfg, splits=('test',)) == []


@pytest.mark.parametrize('order', [(9, 8, 7, 6, 5, 4, 3, 2, 1, 0), (1, 0, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_classes_must_have_the_order_of_the_categories(made, order):
    cfg = config('det', made)
    names = cfg.train_dataloader.dataset.metainfo['classes']
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=tuple(names[i] for i in order))
    refused(
        cfg,
        f'another order than in the files: zero is number 0 in the files and {order[0]} '
        r"in classes.*\('zero', 'one'",
    )


def test_class_folders_and_names_must_have_one_order(made):
    cfg = config('cls', made)
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('c', 'b', 'a'))
    refused(cfg, 'another order than in the files: a is number 0 in the files and 2 in classes')
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('dog', 'cat', 'cat'))
    refused(cfg, 'has the class cat several times')


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda cls: shutil.rmtree(cls / 'val/b'),
            'val data have the classes a, c, and the train data '
            'have a, b, c: c is number 1 here and 2 there',
        ),
        (lambda cls: (cls / 'val/b').rename(cls / 'val/d'), 'c is number 1 here'),
        (lambda cls: (cls / 'val/c').rename(cls / 'val/C'), 'a is number 1 here and 0 there'),
        (lambda cls: shutil.copytree(cls / 'val/a', cls / 'val/_new'), 'a is number 1 here'),
        (
            lambda cls: shutil.copytree(cls / 'train/a', cls / 'train/.ipynb_checkpoints'),
            'hidden folder .ipynb_checkpoints for a class',
        ),
        (lambda cls: (cls / 'train/c').rename(cls / 'train/.c'), 'hidden folder .c'),
        (
            lambda cls: shutil.copytree(cls / 'train/a', cls / 'train/d'),
            r'num_classes is 3, and the train data have 4 class folders \(a, b, c, d\)',
        ),
        (
            lambda cls: [shutil.rmtree(cls / split / 'c') for split in ('train', 'val')],
            'num_classes is 3, and the train data have 2 class folders',
        ),
        (
            lambda cls: [
                shutil.rmtree(cls / split / 'c') or (cls / split / 'c').mkdir()
                for split in ('train',)
            ],
            None,
        ),
    ],
)
def test_class_folders_number_all_splits_alike(data, change, message):
    change(data / 'cls')
    if message is None:  # an empty folder is said, and numbers as it should
        assert findings(config('cls', data)) == []
        assert any(
            'have no images of 1 of 3 classes in 8 images: c' in warning
            for warning in findings(config('cls', data), 'warning')
        )
    else:
        refused(config('cls', data), message)


def annotate(data, split, labels):
    lines = [
        f'{name}/{file.name} {label}'
        for name, label in labels.items()
        for file in sorted((data / 'cls' / split / name).iterdir())
    ]
    (data / f'cls/{split}.txt').write_text('\n'.join(lines))
    return {f'{split}_dataloader.dataset.ann_file': f'{split}.txt'}


def test_annotation_files_of_classifiers(data):
    from_one = {}
    for split in ('train', 'val'):
        from_one |= annotate(data, split, dict(a=1, b=2, c=3))
    refused(config('cls', data, **from_one), 'have the label 3, and the model has 3 classes')
    moved = annotate(data, 'train', dict(a=0, b=1, c=2)) | annotate(
        data, 'val', dict(a=0, b=2, c=1)
    )
    refused(config('cls', data, **moved), 'val data call b number 2, and the train data call it 1')
    # one split by folders, the other by a file
    turned = annotate(data, 'train', dict(a=2, b=1, c=0))
    refused(config('cls', data, **turned), 'val data call a number 0, and .* call it 2')
    named = {'train_dataloader.dataset.metainfo.classes': ('a', 'b', 'c')}
    refused(config('cls', data, **turned, **named), 'a is number 2 in the files and 0 in classes')
    below = annotate(data, 'train', dict(a=-1, b=0, c=1))
    refused(
        config('cls', data, **below, **annotate(data, 'val', dict(a=-1, b=0, c=1))),
        'have the label -1, and the model has 3 classes, 0 to 2',
    )
    one = annotate(data, 'train', dict(a=1, b=1, c=1))
    refused(config('cls', data, **one), 'images of the class 1 only in 12 images')


def test_classes_must_be_the_same_everywhere(made):
    cfg = config('det', made)
    cfg.val_dataloader.dataset.metainfo = dict(classes=('zero', 'one'))
    refused(cfg, 'val data have the classes zero, one, and the train data have zero, one, two')
    cfg.val_dataloader.dataset.metainfo = dict(classes='zero')
    refused(cfg, r"val_dataloader.* is the text 'zero'; .*\('zero', \)", error=ConfigError)


def test_a_checkpoint_knows_its_classes(made):
    cfg = config('cls', made)
    check_quickly(cfg, ('test',), ('a', 'b', 'c'))
    with pytest.raises(DataError, match='the checkpoint was trained with b, a, c: a is number 0'):
        check_quickly(cfg, ('test',), ('b', 'a', 'c'))
    # human names for the same folders
    warnings, _ = check_quickly(cfg, ('test',), ('tench', 'goldfish', 'shark'))
    assert any('tench' in str(warning) for warning in warnings)


@pytest.mark.parametrize(
    'task, key, message',
    [
        (
            'det',
            'model.roi_head.mask_head.num_classes',
            r'mask_head\.num_classes is 80.* 10 classes',
        ),
        (
            'seg',
            'model.auxiliary_head.num_classes',
            r'auxiliary_head\.num_classes is 80.* 11 classes',
        ),
        ('cls', 'model.head.num_classes', r'head\.num_classes is 80.* 3 class folders'),
        ('cls', 'data_preprocessor.num_classes', r'data_preprocessor\.num_classes is 80'),
    ],
)
def test_heads_must_have_the_classes_of_the_data(made, task, key, message):
    refused(config(task, made, **{key: 80}), message, error=ConfigError)


def test_evaluators_must_read_the_same_file(made):
    other = {'val_evaluator.ann_file': f'{made}/det/annotations/instances_train.json'}
    refused(
        config('det', made, **other),
        'val_evaluator.ann_file is .*_train.json, and the val '
        'data are read from .*_val.json; set both',
        error=ConfigError,
    )


MASKS = {
    'white': (
        lambda m: ((m > 0) * 255).astype(np.uint8),
        True,
        r'of the class background only in 6 images, and \d+ pixels are ignored \(255\)',
    ),
    'one': (lambda m: np.zeros_like(m), True, 'background only in 6 images, and none of thing'),
    'ignored': (lambda m: np.full_like(m, 255), True, 'no labelled pixels in 6 images'),
    'grey': (lambda m: ((m > 0) * 128).astype(np.uint8), True, 'has the value 128; with 2 classes'),
    'white_of_eleven': (lambda m: ((m > 0) * 255).astype(np.uint8), False, 'and none of zero, one'),
    'bits': (
        lambda m: (m > 0) * np.uint16(258),
        False,
        'has the value 258, of whose 16 bits the pipeline keeps 8',
    ),
    'colour': (lambda m: np.stack([m] * 3, -1), False, '3 channels'),
    'range': (
        lambda m: np.where(m > 0, 40, m).astype(np.uint8),
        False,
        r'train/000000\.png of the train data has the value 40; with 11 classes and '
        'reduce_zero_label=False, 0 to 10 and 255',
    ),
}


@pytest.mark.parametrize('case', MASKS)
def test_label_maps_must_hold_the_classes(data, case):
    change, binary, message = MASKS[case]
    write_labels(data / 'seg/annotations/train', change)
    cfg = config('seg', data)
    refused(two_classes(cfg) if binary else cfg, message)


def test_label_maps_that_need_reduce_zero_label(data):
    # the usual mistake: classes from 1 on, and 0 for the rest
    write_labels(
        data / 'seg/annotations/val',
        lambda labels: np.where(labels > 0, 11, labels).astype(np.uint8),
    )
    refused(
        config('seg', data), 'the value 11; .*if 0 stands .*set reduce_zero_label=True', ('val',)
    )
    reduced = {f'{split}_dataloader.dataset.reduce_zero_label': True for split in ('train', 'val')}
    assert findings(config('seg', data, **reduced)) == []
    # and its reverse: the background is a class, and would be ignored
    write_labels(data / 'seg/annotations/train', lambda labels: (labels > 0).astype(np.uint8))
    refused(
        two_classes(config('seg', data, **reduced)), 'background only in 6 images, and', ('train',)
    )


def test_label_maps_that_cannot_be_read(data, monkeypatch):
    file = data / 'seg/annotations/train/000000.png'
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    refused(
        config('seg', data),
        r'000000\.png of the train data cannot be read \(.*decompression '
        r"bomb.*; cut it into tiles, or read it with .*imdecode_backend='cv2'",
    )
    monkeypatch.undo()
    file.write_bytes(b'text')
    refused(config('seg', data), '000000.png of the train data cannot be read')


def test_missing_files_and_other_suffixes(data):
    (data / 'seg/annotations/train/000004.png').unlink()
    refused(config('seg', data), '1 of the 6 label maps of the train data are missing')
    other = config('seg', data, **{'train_dataloader.dataset.img_suffix': '.jpg'})
    refused(other, 'no image left after all filters; check .*img_suffix')


def test_sizes_are_compared_as_images_are_loaded(data):
    file = data / 'det/train/000002.png'
    Image.fromarray(np.zeros((128, 100, 3), np.uint8)).save(file)
    refused(
        config('det', data),
        r'000002.png of the train data is loaded as 128x100 \(H x W\), '
        'and the annotation file says 128x128',
    )
    Image.fromarray(np.zeros((100, 128), np.uint8)).save(data / 'seg/annotations/val/000003.png')
    refused(
        config('seg', data),
        r'000003.png of the val data is loaded as 128x128 \(H x W\), and '
        'its label map is 100x128',
    )


def test_an_orientation_tag_turns_the_image(data):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(np.zeros((100, 128, 3), np.uint8)).save(
        data / 'det/train/turned.jpg', exif=exif
    )

    def turn(content):
        content['images'][0].update(file_name='turned.jpg', width=128, height=100)
        for annotation in content['annotations']:
            if annotation['image_id'] == content['images'][0]['id']:
                annotation['segmentation'] = [[1, 1, 20, 1, 20, 20]]

    edit(train_file(data), turn)
    refused(
        config('det', data),
        r'turned\.jpg of the train data is loaded as 128x100 .*100x128 '
        r'\(turned by its EXIF orientation',
    )
    edit(train_file(data), lambda c: c['images'][0].update(width=100, height=128))
    assert findings(config('det', data)) == []


@pytest.mark.parametrize('task, folder', [('cls', 'val/a'), ('seg', 'images/val')])
def test_images_that_are_stacked_have_one_size(data, task, folder):
    file = sorted((data / task / folder).iterdir())[1]
    cv2.imwrite(str(file), np.zeros((200, 140, 3), np.uint8))
    if task == 'seg':
        cv2.imwrite(str(data / 'seg/annotations/val' / file.name), np.zeros((200, 140), np.uint8))
    refused(
        config(task, data),
        rf'val_dataloader.dataset.pipeline gives images of several sizes '
        rf'.*200x140 .*{file.name}.*batch_size=.* stacks them; add a transform',
    )
    assert findings(config(task, data, **{'val_dataloader.batch_size': 1})) == []


def test_broken_images_are_all_listed(data, capsys):
    (data / 'det/train/000001.png').write_bytes(b'text')
    whole = (data / 'det/val/000002.png').read_bytes()
    (data / 'det/val/000002.png').write_bytes(whole[: len(whole) // 2])
    cfg = config('det', data)
    shown = findings(cfg, full=True)
    assert len(shown) == 2 and '000001.png (4 bytes) cannot be decoded' in shown[0]
    assert '000002.png is cut off' in shown[1]
    tool = load_tool('analysis_tools/check_data.py')
    options = [f'{key}={value}' for key, value in located('det', data).items()]
    with pytest.raises(DataError, match='the first of 2 errors'):
        tool.main([str(DEMO['det']), '--cfg-options', *options])
    assert capsys.readouterr().out.count('error: ') == 2


def test_the_tool_reports(made, capsys):
    options = [f'{key}={value}' for key, value in located('seg', made).items()]
    load_tool('analysis_tools/check_data.py').main(
        [str(DEMO['seg']), '--splits', 'val', '--cfg-options', *options]
    )
    shown = capsys.readouterr().out
    assert 'train' not in shown.split() and 'Nothing wrong was found' in shown
    assert 'fact: the val data have 6 images; pixels of each class: background ' in shown


def test_files_that_are_left_out_are_named(data):
    cls = data / 'cls/train/a'
    (cls / '0.png').rename(cls / '0.webp')
    (cls / 'gone.png').symlink_to('nowhere.png')
    (cls / 'notes.txt').touch()
    (cls / 'link.png').symlink_to(data / 'cls/train/b/0.png')  # a good link is an image
    warnings = ' '.join(findings(config('cls', data), 'warning'))
    assert '1 files' in warnings and '0.webp; rename them, or set img_suffix' in warnings
    assert 'gone.png' in warnings and 'links to nothing' in warnings and 'link.png' not in warnings
    assert any('end in .txt' in fact for fact in findings(config('cls', data), 'fact'))


def test_train_and_val_share_no_images(data):
    cfg = config(
        'seg',
        data,
        **{
            'val_dataloader.dataset.data_prefix.img_path': 'images/train',
            'val_dataloader.dataset.data_prefix.seg_map_path': 'annotations/train',
        },
    )
    assert any('share 6 of 6 images with the train data' in w for w in findings(cfg, 'warning'))
    target = data / 'cls/train/a/0.png'
    (data / 'cls/val/a/0.png').unlink()
    (data / 'cls/val/a/0.png').symlink_to(target)
    warnings = findings(config('cls', data), 'warning')
    assert any('share 1 of 6 images' in warning for warning in warnings)


def test_images_that_stand_twice(data):
    """Copies have the content of what they were copied from, whatever they are called."""
    cls = data / 'cls'
    shutil.copy(cls / 'train/a/0.png', cls / 'val/a/copy.png')
    shutil.copy(cls / 'train/a/1.png', cls / 'train/b/copy.png')
    warnings = ' '.join(findings(config('cls', data), 'warning'))
    assert 'val data share 1 of 7 images with the train data' in warnings
    assert 'train data have 1 images several times, 1 of them with different labels' in warnings
    # the same first and last bytes, and the same length
    content = bytearray(cv2.imencode('.bmp', np.zeros((99, 99, 3), np.uint8))[1].tobytes())
    (cls / 'train/c/new.bmp').write_bytes(content)
    content[len(content) // 2] = 1
    (cls / 'val/c/new.bmp').write_bytes(content)
    again = ' '.join(findings(config('cls', data), 'warning'))
    assert 'share 1 of 8 images' in again
    edit(train_file(data), lambda c: c['images'].append(dict(c['images'][0], id=99)))
    warnings = findings(config('det', data), 'warning')
    assert any('have 1 images several times, 1 of them with different' in w for w in warnings)


INSTANCES = {
    'corners': (
        lambda a: a.update(bbox=[*a['bbox'][:2], *map(sum, zip(a['bbox'][:2], a['bbox'][2:]))]),
        ('6 of 6 images .* most of which overlap their own masks by less', 'reach beyond their'),
    ),
    'masks': (
        lambda a: a.update(segmentation=[[1, 1, 3, 1, 3, 3]]),
        ('6 of 6 images .* most of which overlap their own masks by less',),
    ),
    'points': (
        lambda a: a.update(segmentation=[[1, 1, 3, 3]]),
        ('6 of 6 images .* the pipeline ignores: their masks have fewer than 3 points',),
    ),
}


@pytest.mark.parametrize('case', INSTANCES)
def test_boxes_and_masks_must_fit(data, case):
    change, messages = INSTANCES[case]
    edit(train_file(data), lambda c: [change(annotation) for annotation in c['annotations']])
    warnings = ' '.join(findings(config('det', data), 'warning', ('train',)))
    assert all(re.search(message, warnings) for message in messages), warnings


def test_batches(made):
    options = {'train_dataloader.batch_size': 16, 'train_dataloader.drop_last': True}
    refused(config('cls', made, **options), 'drop_last=True leaves no batch')
    warnings = findings(config('seg', made, **{'train_dataloader.batch_size': 5}), 'warning')
    assert any('the last batch has one image, of which BatchNorm' in w for w in warnings)


def test_wrapped_and_joined_data_sets(data):
    cfg = config('det', data)
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=2,
        dataset=dict(type='ConcatDataset', datasets=[dataset, dataset]),
    )
    assert findings(cfg) == []
    edit(train_file(data), lambda c: c['annotations'][0].update(image_id=99))
    refused(cfg, 'annotations are of images that it does not list')


# configs


def child(tmp_path, text, base='cls'):
    file = tmp_path / 'child.py'
    file.write_text(f"_base_ = ['{DEMO[base]}']\n{text}")
    return str(file)


@pytest.mark.parametrize(
    'text',
    ["data_root = 'mine'", "dataset_type = 'ImageNet'", "data_root = 'mine'\nwork_dir = 'x'"],
)
def test_variables_that_a_base_has_used_already_are_told(tmp_path, made, text):
    cfg = load_config(child(tmp_path, text))
    refused(
        cfg,
        r"child\.py: (data_root|dataset_type) = '\w+' is read by nothing: the base",
        error=ConfigError,
    )


def test_variables_that_are_read_are_fine(tmp_path, made):
    text = f"data_root = '{made}/cls'\n" + '\n'.join(
        f'{split}_dataloader = dict(dataset=dict(data_root=data_root))' for split in SPLITS
    )
    text += '\nmodel = dict(head=dict(num_classes=3))\ndata_preprocessor = dict(num_classes=3)'
    assert findings(load_config(child(tmp_path, text))) == []
    with pytest.raises(ConfigError, match="nothing reads the variable 'data_root' any more"):
        load_config(str(DEMO['cls']), dict(data_root='mine'))


@pytest.mark.parametrize(
    'init_cfg, message',
    [
        (dict(checkpoint='a.pth'), 'is no initialiser; give None, a dict such as'),
        ('a.pth', "init_cfg is 'a.pth', which is no initialiser"),
        ([dict(type='TruncNormal', layer='Linear', std=0.1), 'x'], r"init_cfg.1 is 'x'"),
        (dict(type='Pretained', checkpoint='x'), 'Pretained.*of which no initialiser can be made'),
        (dict(type='Pretrained'), 'of which no initialiser can be made'),
        (dict(type='Constant', value=1), 'of which no initialiser can be made'),
        (
            dict(type='Constant', val=1, layer='Conv2d', override=dict(type='Constant')),
            'override is .* without a name',
        ),
    ],
)
def test_initialisers_have_a_form(made, init_cfg, message):
    cfg = config('cls', made)
    cfg.model.backbone.pop('init_cfg')
    cfg.model.backbone['init_cfg'] = init_cfg
    refused(cfg, message, error=ConfigError)


def test_weights_to_start_from_must_be_there(made, tmp_path):
    (tmp_path / 'here.pth').touch()
    good = [
        dict(type='Pretrained', checkpoint=str(tmp_path / 'here.pth')),
        dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ]
    cfg = config('cls', made)
    cfg.model.backbone.init_cfg = good
    assert findings(cfg) == []
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='checkpoints/tiny.pth')
    refused(
        cfg,
        r'^model\.backbone\.init_cfg\.checkpoint: checkpoints/tiny\.pth does not exist; '
        r'.*--cfg-options model\.backbone\.init_cfg=None',
    )
    cfg.model.backbone.init_cfg = None
    cfg.model.pretrained = 'gone.pth'
    refused(cfg, r'^model\.pretrained: gone\.pth does not exist')


@pytest.mark.parametrize('key', ['val_cfg', 'val_evaluator', 'val_dataloader'])
def test_validation_is_whole_or_not_there(made, key):
    cfg = config('cls', made)
    cfg[key] = None
    refused(cfg, f'{key} of the config: missing, and it has .*; set all of them, or none')


@pytest.mark.parametrize(
    'task, constructor',
    [
        ('seg', 'LearningRateDecayOptimizerConstructor'),
        ('det', 'LayerDecayOptimizerConstructor'),
        ('det', 'mmpretrain.LearningRateDecayOptimWrapperConstructor'),
    ],
)
def test_layer_decay_of_another_library_is_told(made, task, constructor):
    cfg = config(task, made, **{'optim_wrapper.constructor': constructor})
    refused(cfg, "set it to 'LayerDecayOptimWrapperConstructor'", error=ConfigError)


def test_missing_data_is_named_with_its_key(data):
    root = {'train_dataloader.dataset.data_root': f'{data}/no'}
    refused(config('cls', data, **root), f'{data}/no of the train data.*dataset.data_root')
    file = {'train_dataloader.dataset.ann_file': 'meta/no.txt'}
    refused(config('cls', data, **file), 'meta/no.txt.*dataset.ann_file')
    prefix = {'train_dataloader.dataset.data_prefix.img_path': 'no_images'}
    refused(config('seg', data, **prefix), 'no_images.*dataset.data_prefix')
    shutil.rmtree(data / 'cls/train')
    (data / 'cls/train').mkdir()
    refused(config('cls', data), 'train_dataloader.dataset cannot be built from .*Found 0 files')


def test_spread_takes_each_once():
    for total in (1, 2, 7, 100):
        assert sorted(spread(total)) == list(range(total))
    first = list(spread(1000))[:10]
    assert np.diff(sorted(first)).max() < 250


def test_pure_python_types_are_named(tmp_path):
    file = tmp_path / 'pure.py'
    file.write_text(
        'from mmengine.model import PretrainedInit\n'
        "default_scope = 'mmpretrain'\nmodel = dict(backbone=dict(init_cfg=dict("
        "type=PretrainedInit, checkpoint='x')))\n"
    )
    cfg = load_config(str(file))
    assert cfg.model.backbone.init_cfg.type == 'Pretrained' != PretrainedInit


def test_images_are_not_augmented_twice(made):
    cfg = config('cls', made)
    cfg.data_preprocessor.augments = [dict(type='BatchRandomFlip')]
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline.insert(1, dict(type='RandomFlip', prob=0.5))
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=dataset)
    refused(cfg, 'RandomFlip is in .* twice; take it out of the pipeline', error=ConfigError)
    cfg.data_preprocessor.augments = []
    assert findings(cfg) == []
