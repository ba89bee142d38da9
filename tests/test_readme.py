"""The documents against the tree: examples run, and what they name is there."""

import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

import groupmamba_mm
from groupmamba_mm import GroupMamba
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.engine.config_checks import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
DOCUMENTS = (
    'README.md',
    'CONTRIBUTING.md',
    'CHANGELOG.md',
    'configs/groupmamba/README.md',
    'configs/groupmamba/ablations/README.md',
    'configs/demo/README.md',
    'configs/mask_rcnn/README.md',
    'configs/upernet/README.md',
    'docs/distillation.md',
    'docs/compatibility.md',
    'docs/export.md',
    'docs/inference.md',
    'docs/integrations.md',
)
EXAMPLES = dict(
    re.findall(r'<!-- example: (\S+) -->\n```python\n(.*?)```', README, flags=re.DOTALL)
)
#: Where the README says to put an example, which is therefore not there.
EXPERIMENT = 'configs/demo/my_experiment.py'

PATH = re.compile(r'(?<![\w/.-])(?:configs|tools|groupmamba_mm|tests|requirements)/[\w./*-]*')
OPTION = re.compile(r'(?<![\w-])--[a-z][\w-]*')
FENCE = re.compile(r'^```\w*\n(.*?)^```', flags=re.DOTALL | re.MULTILINE)
SCRIPTS = sorted(
    path
    for path in (ROOT / 'tools').rglob('*')
    if path.suffix in ('.py', '.sh') and not path.name.startswith('_')
)


def text_of(document):
    return (ROOT / document).read_text(encoding='utf-8')


def commands_of(text):
    """The scripts that code blocks call, with what follows on the line and its continuations."""
    blocks = ''.join(FENCE.findall(text)).replace('\\\n', ' ')
    return re.findall(r'^[^#\n]*?(tools/[\w/]+\.(?:py|sh))([^#\n]*)', blocks, flags=re.MULTILINE)


@cache
def options_of(script):
    """The options that a script takes, those of the script it calls included."""
    text = script.read_text(encoding='utf-8')
    if script.suffix == '.py':
        found = set(re.findall(r"'(--[a-z][\w-]*)'", text)) | {'--help'}
        if 'add_shared_arguments(parser)' in text:
            cli = (ROOT / 'groupmamba_mm' / 'engine' / 'cli.py').read_text(encoding='utf-8')
            found |= set(re.findall(r"'(--[a-z][\w-]*)'", cli))
        return found
    if 'launch_torchrun' in text:  # its own options are read there
        text += (ROOT / 'tools' / '_launch.sh').read_text(encoding='utf-8')
    cases = re.findall(r'^\s*(--[^)\n]*)\)', text, flags=re.MULTILINE)
    found = {option for case in cases for option in OPTION.findall(case)}
    called = re.search(r'\$tools/(\w+\.py)" .*"\${@:\d}"', text)
    return found | (options_of(ROOT / 'tools' / called[1]) if called else set())


def example(tmp_path, name):
    """Write an example that is a config, its relative base made absolute, and load it."""
    folder = (ROOT / EXPERIMENT).parent
    path = tmp_path / name
    path.write_text(EXAMPLES[name].replace("'./", f"'{folder}/"), encoding='utf-8')
    return load_config(str(path))


def test_experiment_changes_what_it_says(tmp_path):
    name = Path(EXPERIMENT).name
    assert f'python tools/train.py {EXPERIMENT}' in README
    assert len(EXAMPLES[name].splitlines()) <= 15
    cfg = example(tmp_path, name)
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


def test_models_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES['create_model'], names)
    assert names['model'](torch.zeros(1, 4, 32, 32)).shape == (1, 10)
    assert len(names['maps'](torch.zeros(1, 3, 32, 32))) == 3
    exec(EXAMPLES['timm'], names)
    assert [m.shape[1] for m in names['model'](torch.zeros(1, 3, 32, 32))] == [128, 448]


def test_prediction_of_one_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = build_model(groupmamba_mm.get_config('groupmamba-official-pico_demo-cls'))
    torch.save(dict(state_dict=model.state_dict()), 'CHECKPOINT.pth')
    write_png(torch.zeros(3, 64, 64, dtype=torch.uint8), 'IMAGE.png')
    exec(EXAMPLES['predict'], {})
    assert "'label': " in capsys.readouterr().out


def test_detector_builds(tmp_path):
    model = build_model(example(tmp_path, 'my_detector.py'))
    assert type(model).__name__ == 'MaskRCNN' and isinstance(model.backbone, GroupMamba)
    maps = model.extract_feat(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [256] * 5


def test_options_table_is_the_signature():
    rows = re.findall(r'^\| `(\w+)` \| `([^`]+)` \|', README, flags=re.MULTILINE)
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
        if path != EXPERIMENT and not list(ROOT.glob(path.rstrip('./')))
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
    for name in re.findall(r'\b([A-Z][A-Z_]+)=', text_of(document)):
        assert re.search(rf'\b{name}\b', known), name
