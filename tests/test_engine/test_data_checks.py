"""What is wrong with COCO files and label maps, said before training starts."""
import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.data_checks import check_data
from groupmamba_mm.errors import ConfigError, DataError
from tests.conftest import REPO, load_tool

DEMO = {'det': REPO / 'configs/demo/mask-rcnn_groupmamba-pico_demo-det.py',
        'seg': REPO / 'configs/demo/groupmamba-pico_upernet_demo-seg.py'}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Six training and six validation scenes of each task."""
    folder = tmp_path_factory.mktemp('demo')
    tool = load_tool('dataset_converters/make_demo_data.py')
    for task in DEMO:
        tool.make_scenes(folder, task, num_train=6, num_val=6)
    return folder


@pytest.fixture
def data(made, tmp_path):
    """A copy of the scenes, to be damaged."""
    return shutil.copytree(made, tmp_path / 'demo')


def config(task, data, **options):
    options = {**located(task, data), **options}
    return load_config(str(DEMO[task]), options)


def located(task, data):
    """The options that say where the data are."""
    found = {f'{split}_dataloader.dataset.data_root': f'{data / task}/'
             for split in ('train', 'val', 'test')}
    if task == 'det':
        found.update({f'{split}_evaluator.ann_file': f'{data}/det/annotations/instances_val.json'
                      for split in ('val', 'test')})
    return found


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize('task', DEMO)
def test_whole_data_pass(made, task):
    check_data(config(task, made), ('train', 'val', 'test'))


def drop_category(content):
    content['categories'] = [c for c in content['categories'] if c['name'] != 'seven']
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] != 8]


COCO_DAMAGE = {
    'category': (drop_category, r'instances_train\.json of the train data has the categories zero, '
                 r'one, two, three, four and 4 more, and not seven; set metainfo=dict\(classes'),
    'image_id': (lambda c: c['annotations'][0].update(image_id=99), 'annotation 1 is of the image '
                 '99, which the file does not list'),
    'category_id': (lambda c: c['annotations'][0].update(category_id=0),
                    'annotation 1 has the category 0, and the file lists 1, 2, 3'),
    'masks': (lambda c: c['annotations'][1].pop('segmentation'),
              'annotation 2 has no segmentation, and the model learns masks'),
    'ids': (lambda c: c['annotations'][1].update(id=1), 'the id 1 stands at several annotations'),
    'empty': (lambda c: c['annotations'].clear(), 'has no annotation of the classes zero, one'),
    'no_images': (lambda c: c['images'].clear(), 'lists no images'),
    'form': (lambda c: c.pop('categories'), 'has no categories, so it is no COCO file'),
    'entry': (lambda c: c['images'][2].pop('height'), 'number 2 of its images has no height'),
    'file': (lambda c: c['images'][3].update(file_name='gone.png'),
             r'1 of the 6 images that .* lists are missing: .*train/gone\.png; restore'),
}


@pytest.mark.parametrize('case', COCO_DAMAGE)
def test_damaged_coco_files_are_refused(data, case):
    change, message = COCO_DAMAGE[case]
    edit(data / 'det/annotations/instances_train.json', change)
    with pytest.raises(DataError, match=message) as error:
        check_data(config('det', data), ('train', 'val'))
    assert '\n' not in str(error.value)


def test_missing_or_broken_annotation_files(data):
    file = data / 'det/annotations/instances_val.json'
    file.write_text('{"images": [')
    with pytest.raises(DataError, match='instances_val.json of the val data is not valid JSON'):
        check_data(config('det', data), ('train', 'val'))
    file.unlink()
    with pytest.raises(DataError, match='annotation file .*instances_val.json of the val data does '
                       'not exist'):
        check_data(config('det', data), ('train', 'val'))


def test_coco_classes_are_taken_where_the_config_has_none(made):
    cfg = config('det', made)
    for split in ('train', 'val', 'test'):
        del cfg[f'{split}_dataloader'].dataset['metainfo']
    cfg.model.roi_head.bbox_head.num_classes = cfg.model.roi_head.mask_head.num_classes = 80
    with pytest.raises(DataError, match=r'and not person, bicycle.*set metainfo=dict\(classes'):
        check_data(cfg, ('train', ))


def test_classes_must_be_the_same_everywhere(made):
    cfg = config('det', made)
    cfg.val_dataloader.dataset.metainfo = dict(classes=('zero', 'one'))
    with pytest.raises(ConfigError, match='the train data have the classes zero, one, two, three, '
                       'four and 5 more, the val data zero, one; set the same'):
        check_data(cfg, ('train', ))
    cfg.val_dataloader.dataset.metainfo = dict(classes='zero')
    with pytest.raises(ConfigError, match=r"val_dataloader.* is the text 'zero'; .*\('zero', \)"):
        check_data(cfg, ('train', ))


@pytest.mark.parametrize('task, key, message', [
    ('det', 'model.roi_head.mask_head.num_classes', r'mask_head\.num_classes is 80.* 10 classes'),
    ('seg', 'model.auxiliary_head.num_classes', r'auxiliary_head\.num_classes is 80.* 11 classes'),
])
def test_heads_must_have_the_classes_of_the_data(made, task, key, message):
    with pytest.raises(ConfigError, match=message):
        check_data(config(task, made, **{key: 80}), ('train', ))


def test_evaluators_must_read_the_same_file(made):
    other = {'val_evaluator.ann_file': f'{made}/det/annotations/instances_train.json'}
    with pytest.raises(ConfigError, match='val_evaluator.ann_file is .*_train.json, and the val '
                       'data are read from .*_val.json; set both'):
        check_data(config('det', made, **other), ('train', 'val'))


def test_one_process_a_machine_reads_annotations(data, monkeypatch):
    edit(data / 'det/annotations/instances_train.json', lambda content: content['images'].clear())
    monkeypatch.setenv('LOCAL_RANK', '1')
    check_data(config('det', data), ('train', 'val'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    with pytest.raises(DataError, match='lists no images'):
        check_data(config('det', data), ('train', 'val'))


def write_labels(file, change):
    labels = np.asarray(Image.open(file)).copy()
    Image.fromarray(change(labels)).save(file)


def test_label_maps_out_of_range(data):
    file = data / 'seg/annotations/train/000002.png'
    write_labels(file, lambda labels: np.where(labels > 0, 40, labels).astype(np.uint8))
    with pytest.raises(DataError, match=r'000002\.png of the train data has the value 40; with 11 '
                       'classes and reduce_zero_label=False, 0 to 10 and 255'):
        check_data(config('seg', data), ('train', ))


def test_label_maps_that_need_reduce_zero_label(data):
    # the usual mistake: classes from 1 on, and 0 for the rest
    write_labels(data / 'seg/annotations/val/000001.png',
                 lambda labels: np.where(labels > 0, 11, labels).astype(np.uint8))
    with pytest.raises(DataError, match='the value 11; .*if 0 stands .*set reduce_zero_label=True'):
        check_data(config('seg', data), ('val', ))
    reduced = {f'{split}_dataloader.dataset.reduce_zero_label': True for split in ('train', 'val')}
    check_data(config('seg', data, **reduced), ('train', 'val'))


def test_label_maps_in_colour_or_broken(data):
    file = data / 'seg/annotations/train/000000.png'
    write_labels(file, lambda labels: np.stack([labels] * 3, -1))
    with pytest.raises(DataError, match='000000.png of the train data has 3 channels'):
        check_data(config('seg', data), ('train', ))
    file.write_bytes(b'text')
    with pytest.raises(DataError, match='000000.png of the train data cannot be read'):
        check_data(config('seg', data), ('train', ))


def test_missing_files_and_other_suffixes(data):
    (data / 'seg/annotations/train/000004.png').unlink()
    with pytest.raises(DataError, match='1 of the 6 label maps of the train data are missing'):
        check_data(config('seg', data), ('train', ))
    other = config('seg', data, **{'train_dataloader.dataset.img_suffix': '.jpg'})
    with pytest.raises(DataError, match=r'no images that end in \.jpg; .*\.png: set img_suffix'):
        check_data(other, ('train', ))


class TestTool:
    """tools/analysis_tools/check_data.py, which reads everything."""

    @staticmethod
    def call(task, data, *options):
        where = [f'{key}={value}' for key, value in located(task, data).items()]
        load_tool('analysis_tools/check_data.py').main(
            [str(DEMO[task]), *options, '--cfg-options', *where])

    def test_counts(self, made, capsys):
        self.call('det', made)
        shown = capsys.readouterr().out
        assert '6 images (0 without annotations), 21 annotations (0 crowds, 0 of less' in shown
        assert 'annotations of a class: zero ' in shown and 'Nothing wrong was found.' in shown
        self.call('seg', made, '--splits', 'val')
        shown = capsys.readouterr().out
        assert 'train' not in shown.split()
        assert '6 images with label maps, reduce_zero_label=False' in shown
        assert 'share of the pixels: background 8' in shown or 'background 7' in shown

    def test_all_problems_are_listed(self, data, capsys):
        (data / 'det/train/000001.png').write_bytes(b'text')
        cv2.imwrite(str(data / 'det/train/000002.png'), np.zeros((100, 128, 3), np.uint8))
        with pytest.raises(DataError, match='2 problems in the data'):
            self.call('det', data)
        shown = capsys.readouterr().out
        assert '000001.png (4 bytes) cannot be decoded' in shown
        assert '000002.png is 100x128 (H x W), and the annotation file says 128x128' in shown

        Image.fromarray(np.zeros((100, 128), np.uint8)).save(
            data / 'seg/annotations/val/000003.png')
        with pytest.raises(DataError, match='1 problems in the data'):
            self.call('seg', data)
        assert '000003.png is 100x128 (H x W), its image 128x128' in capsys.readouterr().out

    def test_classification(self, tmp_path, capsys):
        load_tool('dataset_converters/make_demo_data.py').make_cls(
            tmp_path, num_train=20, num_val=10, skip_baseline=True)
        tool = load_tool('analysis_tools/check_data.py')
        options = [f'{split}_dataloader.dataset.data_root={tmp_path}/cls'
                   for split in ('train', 'val', 'test')]
        config = str(REPO / 'configs/demo/groupmamba-pico_demo-cls.py')
        tool.main([config, '--cfg-options', *options])
        assert '20 images of 10 classes' in capsys.readouterr().out
        (tmp_path / 'cls/val/3_three/000003.png').write_bytes(b'')
        with pytest.raises(DataError, match='1 problems'):
            tool.main([config, '--cfg-options', *options])
        assert '000003.png is empty' in capsys.readouterr().out
