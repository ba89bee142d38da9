"""The commands that install, and those for large data and several GPUs, run as the pages have them.

Bash runs each block marked ``run small`` in a folder with this project's tools and configs. What is
smaller there: the configs that it names are the real ones with a small model, small images and a
single epoch (:func:`shrink`), the data have the layout of the real ones and few pictures, two CPU
processes stand for the GPUs, measurements take a step, and torch.compile gives back what it gets.
Where commands install or run tests (:func:`checkout`), the environment is the one that runs this.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import timm
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import ConfigDict

from groupmamba_mm import GroupMamba, get_config
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.backbones.archs import ARCHS
from groupmamba_mm.datasets.benchmark_data import make_detection, make_segmentation
from groupmamba_mm.engine.config_checks import load_config
from tests.conftest import SMALL, load_tool
from tests.test_docs import DEMO, DOCUMENTS, ROOT, blocks_of, demo_weights, make_demo_data
from tests.test_tools.test_train_test_cli import fake_srun, free_port

TEACHER = 'regnety_160-a5fe301d.pth'  # as the page on distillation calls the file


def write_imagenet(place):
    """A thousand class folders with a picture each, in both splits."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for index in range(1000):
            folder = place / f'imagenet/{split}/n{index:08d}'
            folder.mkdir(parents=True)
            picture = random.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f'{split}_{index}.JPEG'), picture)


def write_data(place):
    write_imagenet(place)
    (place / 'data').mkdir()
    (place / 'data/imagenet').symlink_to(place / 'imagenet')


def write_teacher(place):
    teacher = timm.create_model('regnety_002', num_classes=1000)
    torch.save(dict(model=teacher.state_dict()), place / TEACHER)


def write_backbone(place):
    """The weights of a classifier that detectors and segmenters begin with."""
    weights = GroupMamba(SMALL['paper']).state_dict()
    (place / 'checkpoints').mkdir()
    torch.save(
        dict(state_dict={f'backbone.{key}': value for key, value in weights.items()}),
        place / 'checkpoints/tiny.pth',
    )


def demo_teacher(place):
    config = 'regnety-002_demo-cls'
    file = place / f'work_dirs/{config}/epoch_1.pth'
    file.parent.mkdir(parents=True)
    torch.save(dict(state_dict=build_model(get_config(config)).state_dict()), file)


def write_coco(place):
    for split in ('train', 'val'):
        make_detection(
            place / 'data/coco',
            f'annotations/instances_{split}2017.json',
            f'{split}2017',
            CocoDataset.METAINFO['classes'],
            images=4,
            threads=2,
        )
    _tell_apart(place / 'data/coco/val2017')


def write_ade20k(place):
    for split in ('training', 'validation'):
        make_segmentation(
            place / 'data/ade/ADEChallengeData2016',
            f'images/{split}',
            f'annotations/{split}',
            ('.jpg', '.png'),
            classes=151,
            images=4,
            threads=2,
        )
    _tell_apart(place / 'data/ade/ADEChallengeData2016/images/validation')


def _tell_apart(folder):
    """Both splits are drawn alike, and validating on what is trained is refused."""
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes() + path.name.encode())


#: Numbers of pictures of the demo data, and those put in their places.
FEWER = {
    "'num_train': 8000, 'num_val': 600": "'num_train': 24, 'num_val': 10",
    "'num_train': 2000, 'num_val': 240": "'num_train': 8, 'num_val': 4",
}

#: What a study consists of.
KEYS = ('variants', 'seeds', 'keys')

TINY_TEST = """import pytest


def test_gradients():
    pass


@pytest.mark.slow
def test_all():
    pass
"""

#: A Python whose environments are the one that runs this, in which pip finds all in place.
OTHER_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && ln -s "$0" "$3/bin/python"; exit; fi
if [ "$1 $2" = "-m pip" ]; then exit; fi
exec {python} "$@"
"""


def checkout(place):
    """All of the repository, with an installer that has nothing to do, and a tiny test in each file
    that the commands name.
    """
    (place / 'tools').unlink()
    for name in ('tools', 'docs', 'requirements'):
        shutil.copytree(ROOT / name, place / name)
    for path in ROOT.iterdir():
        kept = path.name in ('.git', '.venv', '.device', 'data', 'work_dirs', 'tests')
        if not kept and not (place / path.name).exists():
            (place / path.name).symlink_to(path)
    (place / '.venv').symlink_to(sys.prefix)
    (place / 'tools/install.sh').write_text('echo "all is installed: $*"\n')
    script = place / 'tools/dataset_converters/make_demo_data.py'
    text = script.read_text()
    for number, fewer in FEWER.items():
        assert number in text
        text = text.replace(number, fewer)
    script.write_text(text)
    script = place / 'tools/quickstart.sh'
    assert 'epochs=4' in script.read_text()
    script.write_text(script.read_text().replace('epochs=4', 'epochs=2'))
    compatibility = load_tool('compatibility.py')
    named = (*compatibility.PLAIN_TESTS, *compatibility.LIBRARY_TESTS, 'tests/test_ops')
    for name in named:
        # a folder has no __init__.py here, so that each file needs a name of its own
        test = place / name
        test = test if test.suffix else test / f'{test.name}_tiny.py'
        test.parent.mkdir(parents=True, exist_ok=True)
        test.write_text(TINY_TEST)
    for version in compatibility.PYTHONS:
        other = place / f'bin/python{version}'
        other.write_text(OTHER_PYTHON.format(python=sys.executable))
        other.chmod(0o755)


def repository(place):
    subprocess.run(['git', 'init', '-q', str(place)], check=True)


def quickstart(place):
    """What the page begins with: the results of a training."""
    command = ['bash', str(place / 'tools/quickstart.sh')]
    subprocess.run(command, check=True, cwd=place, env=environment_in(place))


def small_study(place):
    """The study's variants at one learning rate, with the config's own model."""
    study = runpy.run_path(str(ROOT / 'tools/analysis_tools/studies/stability.py'))
    variants = {
        name: {'config': changes['config']}
        for name, changes in study['variants'].items()
        if changes['optim_wrapper.optimizer.lr'] == 1e-3
    }
    text = '\n'.join(
        f'{key} = {value!r}'
        for key, value in {**study, 'variants': variants}.items()
        if key in KEYS
    )
    (place / 'tools/analysis_tools/studies/stability.py').write_text(text)


def few_tests(place):
    shutil.copy(ROOT / 'pytest.ini', place)
    (place / 'tests').symlink_to(ROOT / 'tests')


def shrink(config: Path) -> None:
    """Put a small version in the place of a config: its parts are the same, their sizes are not."""
    cfg = load_config(str(config))
    backbone = cfg.model.get('backbone', {})
    if isinstance(backbone.get('arch'), str):  # the demo's models are small already
        arch = SMALL[ARCHS[backbone.arch].family]
        dims = list(arch['embed_dims'])
        backbone.arch = ConfigDict(arch)
        for part, value in (('head', dims[-1]), ('neck', dims), ('decode_head', dims)):
            if part in cfg.model:
                cfg.model[part].in_channels = value
        if 'auxiliary_head' in cfg.model:
            cfg.model.auxiliary_head.in_channels = dims[cfg.model.auxiliary_head.in_index]
    teacher = cfg.model.get('teacher', {})
    if 'model_name' in teacher:
        teacher.update(model_name='regnety_002', checkpoint=TEACHER)
    elif 'checkpoint' in teacher:
        teacher.checkpoint = re.sub(r'epoch_\d+', 'epoch_1', teacher.checkpoint)
    _shrink_parts(cfg._cfg_dict)
    if 'max_epochs' in cfg.train_cfg:
        cfg.train_cfg.max_epochs = 1
    else:
        cfg.train_cfg.update(max_iters=2, val_interval=2)
        cfg.default_hooks.checkpoint.interval = 2
    cfg.dump(config)


#: Sizes of images, by the transform that has them.
SIZES = {
    'AntialiasedRandomResizedCrop': dict(scale=32),
    'AntialiasedResizeEdge': dict(scale=40),
    'CenterCrop': dict(crop_size=32),
    'RandomCrop': dict(crop_size=(64, 64)),
    'RandomResize': dict(scale=(128, 64)),
    'Resize': dict(scale=(96, 64)),
    'SegDataPreProcessor': dict(size=(64, 64)),
}


def _shrink_parts(part):
    if isinstance(part, list | tuple):
        for one in part:
            _shrink_parts(one)
    elif isinstance(part, dict):
        for key, value in SIZES.get(part.get('type'), {}).items():
            if key in part:
                part[key] = value
        if 'dataset' in part and 'sampler' in part:  # a loader
            part.update(batch_size=min(2, part.batch_size), num_workers=0, persistent_workers=False)
            if part.dataset.type == 'ImageNet':
                part.dataset.indices = 8
        for value in list(part.values()):
            _shrink_parts(value)


class Recipe(NamedTuple):
    """How the blocks of a page are run.

    Attributes:
        prepare: What is there before the first one; each is called with the folder.
        names: What stands for the names that a reader fills in, and for large numbers.
        configs: Those that the commands name in another way than by their paths.
    """

    prepare: tuple = ()
    names: dict = {}
    configs: tuple = ()


#: Options of measurements, and those put in their places or behind them.
ONE_STEP = {
    '--repeats 15': '--repeats 1 --batch 1',
    '--compile --cuda-graph': '--compile --measure latency --warmup 1 --repeats 1',
    '--size 800x1344 --batch 2': '--size 64x96 --batch 1 --warmup 1 --repeats 1',
    '--workers 16': (
        '--workers 1 --images 40 --warmup 20 --iterations 20 --parts loader step run startup'
    ),
    '--agreement 4000 --batch 100': '--agreement 20 --batch 10 --repeats 1',
}


def trained(config, file='epoch_1.pth'):
    return f'work_dirs/{config}/{file}'


#: What the quickstart trains.
DEMO_CONFIGS = tuple(
    f'configs/demo/{name}.py'
    for name in (
        'groupmamba-pico_demo-cls',
        'groupmamba-official-pico_demo-cls',
        'mask-rcnn_groupmamba-pico_demo-det',
        'groupmamba-pico_upernet_demo-seg',
    )
)
#: A command that serves until it is stopped: until it has answered.
SERVED = (
    'mkdocs serve --dev-addr 127.0.0.1:$PORT & '
    'curl --silent --fail --retry 60 --retry-delay 1 --retry-connrefused '
    'http://127.0.0.1:$PORT/ > page.html; kill $!; grep -q GroupMamba page.html\n'
)

IMAGENET = dict(prepare=(write_data, write_teacher))
RECIPES = {
    'README.md': Recipe(prepare=(checkout,), configs=DEMO_CONFIGS),
    'CONTRIBUTING.md': Recipe(
        prepare=(checkout, repository, quickstart),
        names={'--num 8': '--num 2'},
        configs=DEMO_CONFIGS,
    ),
    'docs/install.md': Recipe(
        prepare=(checkout,), names={'mkdocs serve\n': SERVED}, configs=DEMO_CONFIGS
    ),
    'docs/compatibility.md': Recipe(prepare=(checkout,)),
    'docs/faults.md': Recipe(
        prepare=(few_tests,), names={'-m faults': '-m faults -k "torchrun_ends_as and 9"'}
    ),
    'docs/train.md': Recipe(**IMAGENET),
    'docs/distillation.md': Recipe(
        **IMAGENET,
        names={
            'data/demo\n': 'data/demo --num-train 60 --num-val 10\n',
            'in 0 1 2;': 'in 0 1;',
            'official-tiny-distill_8xb128_in1k.py\n': (
                'official-tiny-distill_8xb128_in1k.py --batch 2 --repeats 1\n'
            ),
        },
        configs=(
            'configs/demo/groupmamba-pico_demo-cls.py',
            'configs/demo/groupmamba-pico-distill_demo-cls.py',
        ),
    ),
    'docs/guides/imagenet.md': Recipe(
        prepare=(write_imagenet, write_teacher),
        names={
            '/path/to/imagenet': '$PWD/imagenet',
            'CHECKPOINT': trained('groupmamba-official-tiny_8xb128_in1k'),
        },
    ),
    'docs/speed.md': Recipe(names=ONE_STEP),
    'docs/speed_record.md': Recipe(names=ONE_STEP),
    'docs/training_speed.md': Recipe(
        prepare=(make_demo_data, demo_teacher),
        # the page on speed has the same command for all parts
        names={**ONE_STEP, '--workers 16': '--workers 1 --images 40 --iterations 20 --parts step'},
    ),
    'docs/guides/speed.md': Recipe(names=ONE_STEP),
    'docs/predict.md': Recipe(prepare=(make_demo_data, demo_weights), names=DEMO),
    'docs/scaling_plan.md': Recipe(
        prepare=(write_imagenet,),
        names={'NNODES=7:8': 'NNODES=1:1', '/local/imagenet': '$PWD/imagenet'},
    ),
    'docs/guides/several_machines.md': Recipe(prepare=(write_data, make_demo_data)),
    'configs/demo/README.md': Recipe(
        prepare=(checkout, small_study),
        names={'8000': '8 --num-val 8'},
        configs=(*DEMO_CONFIGS, 'configs/demo/groupmamba-official-pico-distill_demo-cls.py'),
    ),
    'configs/groupmamba/README.md': Recipe(**IMAGENET),
    'configs/mask_rcnn/README.md': Recipe(
        prepare=(write_coco, write_backbone),
        names={'CHECKPOINT': trained('mask-rcnn_groupmamba-tiny_fpn_1x_coco')},
    ),
    'configs/upernet/README.md': Recipe(
        prepare=(write_ade20k, write_backbone),
        names={
            'CHECKPOINT': trained('groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512', 'iter_2.pth')
        },
    ),
}


def for_two_processes(code):
    """The commands with two CPU processes in the place of the GPUs, Slurm's and machines'."""
    if 'NODE_RANK=0' in code:  # a process for each machine, the second one beside
        code = re.sub(r'(tools/dist_\w+\.sh \S+) \d+', r'\1 1', code)
        code = code.replace('MASTER_ADDR=node0', 'MASTER_ADDR=127.0.0.1')
        return f'{code.replace("NODE_RANK=0", "NODE_RANK=1").rstrip()} & \n{code}wait $!\n'
    code = re.sub(r'(tools/dist_train\.sh(?: \\\n +)? *\S+) \d+', r'\1 2', code)
    code = code.replace('MASTER_ADDR=node0', 'MASTER_ADDR=127.0.0.1')
    code = re.sub(r'(tools/dist_test\.sh \S+ \S+) \d+', r'\1 2', code)
    return re.sub(r'GPUS=\d+ GPUS_PER_NODE=\d+', 'GPUS=2 GPUS_PER_NODE=0', code)


def small_blocks(document):
    return [block for block in blocks_of(document) if block.kind == 'run small']


def test_every_such_block_has_its_recipe():
    assert {document for document in DOCUMENTS if small_blocks(document)} == set(RECIPES)


def environment_in(place):
    """The environment of the commands that are run there."""
    path = f'{place / "bin"}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return dict(
        os.environ,
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
        PATH=path,
        PYTHONPATH=str(ROOT),
        VIRTUAL_ENV=sys.prefix,
        TORCHDYNAMO_DISABLE='1',
        GPUS='2',
        GPUS_PER_NODE='0',
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('document', sorted(RECIPES))
def test_recipe_runs(document, tmp_path):
    recipe = RECIPES[document]
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    (tmp_path / 'bin').mkdir()
    fake_srun(tmp_path / 'bin')
    shrunk = set(recipe.configs)
    for config in shrunk:
        shrink(tmp_path / config)
    for prepare in recipe.prepare:
        prepare(tmp_path)
    environment = environment_in(tmp_path)
    for block in small_blocks(document):
        code = block.code
        for name, value in recipe.names.items():
            code = code.replace(name, value)
        named = set(re.findall(r'configs/[\w./-]+\.py', code))
        for config in named - shrunk:
            shrink(tmp_path / config)
        shrunk |= named
        port = free_port()
        code = re.sub(r'PORT=\d+', f'PORT={port}', for_two_processes(code))
        done = subprocess.run(
            ['bash', '-euxc', code],
            cwd=tmp_path,
            env=dict(environment, PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-6000:]
