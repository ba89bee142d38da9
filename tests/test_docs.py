"""The documents against the tree: commands and examples run, and what they name is there.

A code block of a document is run, unless a comment before it says why not: see :class:`Block`.
"""

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torchvision.io import write_png

import groupmamba_mm
from groupmamba_mm import GroupMamba
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.backbones.archs import ARCHS, FAMILIES
from groupmamba_mm.checks import check_quickly
from groupmamba_mm.datasets.benchmark_data import make_detection
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.ops.selective_scan import directions
from tests.conftest import load_tool

update_tables = load_tool('analysis_tools/update_tables.py')
numbers_of, read_metafiles = update_tables.numbers_of, update_tables.read_metafiles

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ('*.md', 'configs/**/*.md', 'docs/**/*.md')
    for path in ROOT.glob(pattern)
)


class Block(NamedTuple):
    """A code block, and what the comment before it says.

    Attributes:
        kind: ``file`` (write it there), ``run`` (Python, in the page's order), ``example`` (run by
            a test of this name), ``run small`` (shell commands run by ``test_docs_recipes.py``),
            ``run by`` (shell commands of another test), or empty: shell commands that are run here.
        what: The path, the name, what is made smaller, or the test.
        language: Of the fence.
        code: The text.
    """

    kind: str
    what: str
    language: str
    code: str


BLOCK = re.compile(
    r'^(?:<!-- (file|run small|run by|run|example)(?:: (.*?))? -->\n)?```(\w*)\n(.*?)^```',
    flags=re.DOTALL | re.MULTILINE,
)
PATH = re.compile(r'(?<![\w/.-])(?:configs|tools|groupmamba_mm|tests|requirements)/[\w./*-]*')
OPTION = re.compile(r'(?<![\w-])--[a-z][\w-]*')
FENCE = re.compile(r'^```\w*\n(.*?)^```', flags=re.DOTALL | re.MULTILINE)
SCRIPTS = sorted(
    path
    for path in (ROOT / 'tools').rglob('*')
    if path.suffix in ('.py', '.sh') and not path.name.startswith('_')
)


@cache
def text_of(document):
    return (ROOT / document).read_text(encoding='utf-8')


@cache
def blocks_of(document):
    return [Block(*found) for found in BLOCK.findall(text_of(document))]


def commands_of(text):
    """The scripts that code blocks call, with what follows on the line and its continuations."""
    blocks = ''.join(FENCE.findall(text)).replace('\\\n', ' ')
    return re.findall(r'^[^#\n]*?(tools/[\w/]+\.(?:py|sh))([^#\n]*)', blocks, flags=re.MULTILINE)


def fenced(code):
    return f'```\n{code}```'


@cache
def options_of(script):
    """The options that a script takes, those of the script it calls included."""
    text = script.read_text(encoding='utf-8')
    if script.suffix == '.py':
        found = set(re.findall(r"'(--[a-z][\w-]*)'", text)) | {'--help'}
        for call, module in (
            ('add_shared_arguments(parser)', 'engine/cli.py'),
            ('add_predictor_arguments(parser)', 'inference/arguments.py'),
        ):
            if call in text:
                shared = (ROOT / 'groupmamba_mm' / module).read_text(encoding='utf-8')
                found |= set(re.findall(r"'(--[a-z][\w-]*)'", shared))
                text += shared
        return found | ({'--cfg-options'} if 'add_cfg_options(' in text else set())
    if 'launch_torchrun' in text:  # its own options are read there
        text += (ROOT / 'tools' / '_launch.sh').read_text(encoding='utf-8')
    cases = re.findall(r'^\s*(--[^)\n]*)\)', text, flags=re.MULTILINE)
    found = {option for case in cases for option in OPTION.findall(case)}
    called = re.search(r'\$tools/(\w+\.py)" .*"\${@:\d}"', text)
    return found | (options_of(ROOT / 'tools' / called[1]) if called else set())


EXAMPLES = {
    block.what: block.code
    for document in DOCUMENTS
    for block in blocks_of(document)
    if block.kind == 'example'
}
#: Files that pages say to write, which are therefore not there.
WRITTEN = {
    block.what: block.code
    for document in DOCUMENTS
    for block in blocks_of(document)
    if block.kind == 'file'
}


def load_written(tmp_path, name):
    """Write a config of a page, its relative base made absolute, and load it."""
    path = tmp_path / Path(name).name
    text = WRITTEN[name].replace("'./", f"'{(ROOT / name).parent}/")
    path.write_text(text, encoding='utf-8')
    return load_config(str(path))


def test_configs_of_the_guides_are_short():
    assert len(WRITTEN) >= 5
    for name, text in WRITTEN.items():
        assert len(text.splitlines()) <= 15, name


def test_experiment_changes_what_it_says(tmp_path):
    cfg = load_written(tmp_path, 'configs/demo/my_experiment.py')
    assert cfg.optim_wrapper.optimizer.lr == 5e-4
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert cfg.randomness.seed == 1
    model = build_model(cfg)
    for stage in model.backbone.stages:
        for layer in stage:
            assert layer.vsss.num_groups == 2
            assert layer.vsss.mamba.plan == (('left-right', 'top-bottom'),)
            assert layer.vsss.mamba.ssm.d_state == 4
    assert model(torch.zeros(1, 3, 64, 64), mode='tensor').shape == (1, 10)


def test_plain_example_gives_the_maps_it_promises():
    names = {}
    exec(EXAMPLES['plain'], names)
    assert [tuple(m.shape) for m in names['maps']] == [
        (1, 96, 16, 24),
        (1, 192, 8, 12),
        (1, 368, 4, 6),
        (1, 760, 2, 3),
    ]


def test_readme_is_short_and_its_five_lines_run():
    assert len(text_of('README.md').splitlines()) <= 150
    names = {}
    exec(EXAMPLES['readme'], names)
    assert names['logits'].shape == (2, 10) and len(names['maps']) == 4


def test_table_of_the_readme_is_that_of_the_metafiles():
    rows = re.findall(
        r'^\| `((?:official-)?\w+)` \| (?:paper|official) \| (.*) \|$',
        text_of('README.md'),
        re.MULTILINE,
    )
    assert [name for name, _ in rows] == list(ARCHS)
    known = {
        model['Name']: numbers_of(model)
        for metafile in read_metafiles(ROOT).values()
        for model in metafile['Models']
    }
    for name, row in rows:
        cls = known[f'groupmamba-{name}_8xb128_in1k']
        distilled = known[f'groupmamba-{name}-distill_8xb128_in1k']
        det = known[f'mask-rcnn_groupmamba-{name}_fpn_1x_coco']
        seg = known[f'groupmamba-{name}_upernet_8xb2-160k_ade20k-512x512']
        assert row.split(' | ') == [
            f'{cls["Parameters"] / 1e6:.3f}',
            f'{cls["FLOPs"] / 1e9:.3f}',
            f'{distilled["Top 1 Accuracy"]} / {cls["Top 1 Accuracy"]}',
            f'{det["box AP"]} / {det["mask AP"]}' if det['box AP'] else '-',
            f'{seg["mIoU"]}' if seg['mIoU'] else '-',
        ], name


def test_speeds_of_the_readme_are_those_of_its_page():
    rows = re.findall(r'^\| [^|]+ \| ([\d,]+)(?: \([^|]*)? \|$', text_of('README.md'), re.MULTILINE)
    assert len(rows) == 4
    for number in rows:
        assert f' {number} images/s' in text_of('docs/speed.md')


def test_version_is_that_of_the_changelog_and_the_citation():
    version = groupmamba_mm.__version__
    released = re.findall(
        r'^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$', text_of('CHANGELOG.md'), re.MULTILINE
    )
    assert released[0] == version
    assert f'\nversion: {version}\n' in text_of('CITATION.cff')


def test_models_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES['create_model'], names)
    assert names['model'](torch.zeros(1, 4, 32, 32)).shape == (1, 10)
    assert len(names['maps'](torch.zeros(1, 3, 32, 32))) == 3
    exec(EXAMPLES['hub'], {})


@pytest.mark.parametrize(
    'name, printed',
    [
        ('timm_features', '[4, 8, 16, 32] [(1, 64, 24, 16)'),
        ('features_by_name', '[1, 448]'),
        ('predictor', "'label': 'digit "),
        ('inferencers', 'digit '),
    ],
)
def test_examples_print_what_they_say(name, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path)
    write_checkpoint(tmp_path / 'CHECKPOINT.pth', 'groupmamba-official-pico_demo-cls')
    exec(EXAMPLES[name], {})
    assert printed in capsys.readouterr().out


def test_parts_of_a_distilled_config(tmp_path):
    """What pages say of the loss and the teacher fits the classes that are built of it."""
    base = groupmamba_mm.config_path('groupmamba-tiny-distill_8xb128_in1k')
    models = {}
    for name in ('soft_labels', 'timm_teacher', 'config_teacher'):
        path = tmp_path / f'{name}.py'
        path.write_text(f"_base_ = ['{base}']\n{EXAMPLES[name]}", encoding='utf-8')
        models[name] = load_config(str(path)).model
    head = MODELS.build(models['soft_labels'].head)
    assert (head.alpha, head.distill_loss.kind, head.distill_loss.temperature) == (0.3, 'soft', 3)
    for name in ('timm_teacher', 'config_teacher'):
        options = models[name].teacher.to_dict()
        inspect.signature(MODELS.get(options.pop('type'))).bind(**options)


def test_detector_builds(tmp_path):
    path = tmp_path / 'my_detector.py'
    path.write_text(EXAMPLES[path.name], encoding='utf-8')
    model = build_model(load_config(str(path)))
    assert type(model).__name__ == 'MaskRCNN' and isinstance(model.backbone, GroupMamba)
    maps = model.extract_feat(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [256] * 5


def test_classes_of_other_data(tmp_path):
    """Where the page has ``...``, the places of two classes; the checks compare them with the rest."""
    for split in ('train', 'val'):
        make_detection(tmp_path, f'{split}.json', split, ('cat', 'dog'), images=4, threads=2)
    places = [
        f"ann_file='{split}.json', data_prefix=dict(img='{split}/')" for split in ('train', 'val')
    ]
    code = EXAMPLES['coco_classes']
    for place in places:
        code = code.replace('ann_file=..., data_prefix=...', place, 1)
    assert '...' not in code
    path = tmp_path / 'cats_and_dogs.py'
    base = groupmamba_mm.config_path('mask-rcnn_groupmamba-tiny_fpn_1x_coco')
    path.write_text(f"_base_ = ['{base}']\n{code}", encoding='utf-8')
    roots = {f'{split}_dataloader.dataset.data_root': str(tmp_path) for split in ('train', 'val')}
    options = {
        'val_evaluator.ann_file': str(tmp_path / 'val.json'),
        'model.backbone.init_cfg': None,
    }
    cfg = load_config(str(path), {**roots, **options})
    _, built = check_quickly(cfg, ('train', 'val'))
    assert {dataset.metainfo['classes'] for dataset in built.values()} == {('cat', 'dog')}


def test_options_table_is_the_signature():
    rows = re.findall(
        r'^\| `(\w+)` \| `([^`]+)` \|', text_of('docs/library.md'), flags=re.MULTILINE
    )
    parameters = inspect.signature(GroupMamba.__init__).parameters
    expected = [
        (name, repr(parameter.default)) for name, parameter in parameters.items() if name != 'self'
    ]
    assert rows == expected


@pytest.mark.parametrize('document', DOCUMENTS)
def test_paths_exist(document):
    missing = [
        path
        for path in PATH.findall(text_of(document))
        if path not in WRITTEN and not list(ROOT.glob(path.rstrip('./')))
    ]
    assert not missing


@pytest.mark.parametrize('document', DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in re.findall(r'\]\(([^)\s]+)\)', text_of(document)):
        if link.startswith(('http://', 'https://')):
            continue
        name, _, anchor = link.partition('#')
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        if anchor:
            page = target / 'README.md' if target.is_dir() else target
            titles = re.findall(r'^#+ (.*)$', page.read_text(encoding='utf-8'), re.MULTILINE)
            assert anchor in {re.sub(r'[^\w -]', '', t).lower().replace(' ', '-') for t in titles}


@pytest.mark.parametrize('document', DOCUMENTS)
def test_options_exist(document):
    text = text_of(document)
    for script, arguments in commands_of(text):
        assert set(OPTION.findall(arguments)) <= options_of(ROOT / script), (script, arguments)
    everywhere = set().union(*map(options_of, SCRIPTS))
    prose = FENCE.sub('', text)
    quoted = {option for code in re.findall(r'`([^`]+)`', prose) for option in OPTION.findall(code)}
    assert quoted <= everywhere


@pytest.mark.parametrize('document', DOCUMENTS)
def test_environment_variables_exist(document):
    sources = [
        path
        for folder in ('tools', 'tests', 'groupmamba_mm')
        for path in (ROOT / folder).rglob('*')
        if path.suffix in ('.py', '.sh')
    ]
    sources.remove(Path(__file__).resolve())
    known = '\n'.join(path.read_text(encoding='utf-8') for path in sources)
    others = {'NCCL_DEBUG'}  # read by NCCL
    for name in set(re.findall(r'\b([A-Z][A-Z_]+)=', text_of(document))) - others:
        assert re.search(rf'\b{name}\b', known), name


@pytest.mark.parametrize('document', DOCUMENTS)
def test_every_block_is_run(document):
    for block in blocks_of(document):
        if block.kind == 'run small':
            assert block.what, block.code
        elif block.kind == 'run by':
            test = (ROOT / block.what).read_text(encoding='utf-8')
            assert all(Path(script).stem in test for script, _ in commands_of(fenced(block.code)))
        elif block.kind == 'example':
            assert f"'{block.what}'" in Path(__file__).read_text(encoding='utf-8'), block.what
        elif block.language == 'bash':
            assert document in GUIDES, block.code
        elif block.language == 'python':
            assert block.kind, block.code
        if block.language == 'python':
            compile(block.code, document, 'exec')
        elif block.language == 'bash':
            done = subprocess.run(['bash', '-n'], input=block.code, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr


def test_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec('mkdocs') is None:
        pytest.skip('needs requirements/docs.txt: bash tools/install.sh --tests')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)],
        cwd=ROOT,
        env=dict(os.environ, NO_MKDOCS_2_WARNING='1'),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'api/backbones/index.html').read_text(encoding='utf-8')
    assert 'channel_affinity' in page and ':class:' not in re.sub(
        r'<details.*?</details>', '', page, flags=re.DOTALL
    )
    assert (tmp_path / 'search/search_index.json').stat().st_size > 100_000


def write_flowers(place):
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for level, name in enumerate(('daisy', 'rose')):
            (place / f'data/flowers/{split}/{name}').mkdir(parents=True)
            for index in range(4):
                image = (100 * level + random.integers(0, 99, (40, 48, 3))).astype(np.uint8)
                cv2.imwrite(str(place / f'data/flowers/{split}/{name}/{index}.jpg'), image)


def write_balloons(place):
    random = np.random.default_rng(0)
    (place / 'data/balloons/annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (place / 'data/balloons' / split).mkdir()
        images, annotations = [], []
        for index in range(2):
            image = random.integers(0, 255, (64, 80, 3), dtype=np.uint8)
            cv2.imwrite(str(place / f'data/balloons/{split}/{split}{index}.jpg'), image)
            images.append(dict(id=index, file_name=f'{split}{index}.jpg', height=64, width=80))
            for category in (1, 2):
                x = 30 * (category - 1) + 5
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=index,
                        category_id=category,
                        bbox=[x, 10, 20, 30],
                        area=600,
                        iscrowd=0,
                        segmentation=[[x, 10, x + 20, 10, x + 20, 40, x, 40]],
                    )
                )
        categories = [dict(id=1, name='balloon'), dict(id=2, name='string')]
        file = place / f'data/balloons/annotations/{split}.json'
        file.write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )


def write_streets(place):
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('images', 'labels'):
            (place / f'data/streets/{kind}/{split}').mkdir(parents=True)
        for index in range(2):
            image = random.integers(0, 255, (64, 80, 3), dtype=np.uint8)
            labels = np.repeat(random.integers(0, 3, (4, 80), dtype=np.uint8), 16, axis=0)
            cv2.imwrite(str(place / f'data/streets/images/{split}/{split}{index}.jpg'), image)
            cv2.imwrite(str(place / f'data/streets/labels/{split}/{split}{index}.png'), labels)


def write_picture(place):
    write_png(torch.zeros(3, 64, 64, dtype=torch.uint8), str(place / 'IMAGE.png'))


def write_photos(place):
    random = np.random.default_rng(0)
    (place / 'photos').mkdir()
    for index in range(3):
        image = random.integers(0, 255, (64, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(place / f'photos/{index}.jpg'), image)


def write_checkpoint(path, config):
    """A classifier's checkpoint, with random weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = build_model(groupmamba_mm.get_config(config))
    classes = [f'digit {i}' for i in range(model.head.num_classes)]
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)


def demo_weights(place):
    write_checkpoint(place / 'CHECKPOINT.pth', 'groupmamba-official-pico_demo-cls')


def trained_weights(place):
    write_checkpoint(place / 'work_dirs/RUN/epoch_300.pth', 'groupmamba-official-pico_demo-cls')


def released_weights(place):
    write_checkpoint(
        place / 'checkpoints/official-tiny.pth', 'groupmamba-official-tiny_8xb128_in1k'
    )


def released_file(place):
    """A file of the authors' layout."""
    write_checkpoint(place / 'ours.pth', 'groupmamba-official-tiny_8xb128_in1k')
    run_tool(
        str(ROOT / 'tools/model_converters/mmpretrain_to_official.py'),
        [str(place / 'ours.pth'), str(place / 'RELEASED.pth')],
    )


def make_demo_data(place):
    script = str(ROOT / 'tools/dataset_converters/make_demo_data.py')
    run_tool(script, [str(place / 'data/demo'), *FEW])


def run_tool(script, arguments):
    """Run a command in this process, which spares its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [script, *arguments])
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as ended:
            code = ended.code
        else:
            code = None
    assert not code, (script, arguments, code)


#: Images are loaded in the process itself, and checkpoints are small.
LIGHT = [
    f'{split}_dataloader.{option}'
    for split in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
] + ['default_hooks.checkpoint.save_optimizer=False', 'default_hooks.checkpoint.save_best=None']


#: A classifier's pictures are small, too.
CLS = [
    *LIGHT,
    'train_dataloader.dataset.pipeline.1.scale=32',
    'val_dataloader.dataset.pipeline.1.scale=32',
    'val_dataloader.dataset.pipeline.2.crop_size=32',
    'test_dataloader.dataset.pipeline.1.scale=32',
    'test_dataloader.dataset.pipeline.2.crop_size=32',
]


class Guide(NamedTuple):
    """How the commands of a page are run.

    Attributes:
        prepare: What is there before the first one; each is called with the folder.
        options: What is put after a script's arguments, so that minutes become seconds.
        names: What stands for the names that a reader fills in.
    """

    prepare: tuple = ()
    options: dict = {}
    names: dict = {}


DEMO = {
    'CONFIG': 'configs/demo/groupmamba-official-pico_demo-cls.py',
    'CHECKPOINT': 'CHECKPOINT.pth',
}
#: Of the demo data.
FEW = ['--num-train', '20', '--num-val', '10']


GUIDES = {
    'docs/train.md': Guide(
        options={'train.py': ['--dry-run', '--cfg-options', *LIGHT]}, prepare=(make_demo_data,)
    ),
    'docs/guides/finetune_folder.md': Guide(
        prepare=(write_flowers, released_weights),
        options={
            'train.py': [
                '--cfg-options',
                *CLS,
                'train_cfg.max_epochs=1',
                'train_dataloader.batch_size=4',
            ],
            'test.py': ['--cfg-options', *CLS],
        },
    ),
    'docs/guides/finetune_coco.md': Guide(
        prepare=(write_balloons, released_weights),
        options={
            name: [
                '--cfg-options',
                *LIGHT,
                'train_cfg.max_epochs=1',
                'train_dataloader.dataset.pipeline.2.scale=(96,64)',
                'val_dataloader.dataset.pipeline.1.scale=(96,64)',
                'test_dataloader.dataset.pipeline.1.scale=(96,64)',
            ]
            for name in ('train.py', 'test.py')
        },
    ),
    'docs/guides/finetune_label_maps.md': Guide(
        prepare=(write_streets, released_weights),
        options={
            name: [
                '--cfg-options',
                *LIGHT,
                'train_cfg.max_iters=1',
                'train_cfg.val_interval=1',
                'train_dataloader.dataset.pipeline.2.scale=(96,64)',
                'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
                'model.data_preprocessor.size=(64,64)',
                'val_dataloader.dataset.pipeline.1.scale=(96,64)',
                'test_dataloader.dataset.pipeline.1.scale=(96,64)',
            ]
            for name in ('train.py', 'test.py')
        },
    ),
    'docs/guides/distil.md': Guide(
        options={
            'make_demo_data.py': FEW,
            'train.py': ['--cfg-options', *LIGHT],
            'test.py': ['--cfg-options', *LIGHT],
        }
    ),
    'docs/inference.md': Guide(prepare=(write_picture, write_photos, demo_weights), names=DEMO),
    'docs/integrations.md': Guide(
        prepare=(make_demo_data, trained_weights),
        options={
            'browse_dataset.py': ['--cfg-options', *LIGHT],
            'find_lr.py': ['--steps', '20', '--cfg-options', *LIGHT],
        },
        names=DEMO,
    ),
    'docs/predict.md': Guide(
        prepare=(make_demo_data, demo_weights, released_file),
        options={'test.py': ['--cfg-options', *LIGHT]},
        names=DEMO,
    ),
    'docs/look_inside.md': Guide(prepare=(demo_weights,), names=DEMO),
    'configs/demo/README.md': Guide(options={'make_demo_data.py': FEW}),
    'configs/groupmamba/README.md': Guide(
        options={'benchmark.py': ['--warmup', '1', '--repeats', '1']}
    ),
    'configs/groupmamba/ablations/README.md': Guide(),
    'configs/mask_rcnn/README.md': Guide(options={'get_flops.py': ['--shape', '64', '64']}),
    'configs/upernet/README.md': Guide(options={'get_flops.py': ['--shape', '64', '64']}),
    'docs/guides/scan_direction.md': Guide(),
    'docs/guides/size_or_block.md': Guide(),
}


def run_shell(code, options, place, number):
    for count, line in enumerate(code.replace('\\\n', ' ').splitlines()):
        command = re.match(r'python tools/(\S+\.py)(.*)', line)
        if command is None:
            done = subprocess.run(['bash', '-euc', line], cwd=place, text=True, capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr
            continue
        words = subprocess.run(
            ['bash', '-euc', f'printf "%s\\n" {command[2]}'],
            cwd=place,
            text=True,
            capture_output=True,
        ).stdout.splitlines()
        more = list(options.get(Path(command[1]).name, []))
        if '--cfg-options' in more:  # mmengine keeps its loggers by the experiment's name
            more.append(f'experiment_name=docs{number}_{count}')
        run_tool(str(ROOT / 'tools' / command[1]), [*words, *more])


@pytest.fixture
def families_and_directions(monkeypatch):
    """What a guide registers is gone after it; official-tiny is shallow, which is enough to run."""
    shallow = dataclasses.replace(ARCHS['official-tiny'], depths=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHS, 'official-tiny', shallow)
    monkeypatch.setattr(directions, '_registry', dict(directions._registry))
    kept = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(kept)


@pytest.mark.slow
@pytest.mark.parametrize('document', sorted(GUIDES))
def test_guide_runs(document, tmp_path, monkeypatch, one_thread, families_and_directions):
    guide = GUIDES[document]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    for prepare in guide.prepare:
        prepare(tmp_path)
    names = {}
    for number, block in enumerate(blocks_of(document)):
        if block.kind == 'file':
            (tmp_path / block.what).write_text(block.code, encoding='utf-8')
        elif block.kind == 'run':
            exec(block.code, names)
        elif not block.kind and block.language == 'bash':
            code = re.sub(
                r'\b[A-Z]+\b', lambda found: guide.names.get(found[0], found[0]), block.code
            )
            run_shell(code, guide.options, tmp_path, f'{document}{number}')
