"""The requirements files, the package built from them, and the scripts that install them."""

import itertools
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from groupmamba_mm.extras import EXTRAS
from tests.conftest import load_tool

ROOT = Path(__file__).resolve().parents[2]
#: Each extra, and its files in requirements/.
EXTRA_FILES = dict(
    mm=('mminstall', 'dense'),
    demo=('demo',),
    export=('export',),
    hub=('hub',),
    dev=('tests',),
    analysis=('analysis',),
    docs=('docs',),
    mamba=('optional',),
)
SCRIPTS = sorted(ROOT.glob('tools/**/*.sh')) + [ROOT / '.ci' / 'run']


def read_requirements(*names):
    files = [ROOT / 'requirements' / f'{name}.txt' for name in names]
    lines = [line for file in files for line in file.read_text().splitlines()]
    lines = [line.split('#', 1)[0].strip() for line in lines]
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}


def as_pairs(requirements):
    return {(canonicalize_name(r.name), str(r.specifier)) for r in requirements}


@pytest.fixture(scope='module')
def wheel_file(tmp_path_factory):
    """A wheel, built from a copy to leave no build folder behind."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    source.mkdir()
    for name in (
        'pyproject.toml',
        'setup.py',
        'MANIFEST.in',
        'README.md',
        'LICENSE',
        'model-index.yml',
    ):
        shutil.copy(ROOT / name, source)
    for name in ('requirements', 'configs', 'groupmamba_mm'):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__')
        )
    run = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--no-deps',
            '--no-build-isolation',
            '--wheel-dir',
            folder,
            source,
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    [path] = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def wheel(wheel_file):
    """Names and metadata of the wheel."""
    with zipfile.ZipFile(wheel_file) as archive:
        names = archive.namelist()
        [metadata] = [name for name in names if name.endswith('.dist-info/METADATA')]
        return names, Parser().parsestr(archive.read(metadata).decode())


def test_wheel_holds_every_module_the_configs_and_nothing_else(wheel):
    names, _ = wheel
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / 'groupmamba_mm').rglob('*.py')}
    expected |= {
        f'groupmamba_mm/.mim/{path.relative_to(ROOT)}'
        for path in [ROOT / 'model-index.yml', *(ROOT / 'configs').rglob('*.*')]
        if path.suffix != '.pyc'
    }
    assert {name for name in names if '.dist-info/' not in name} == expected


def test_wheel_brings_its_configs_along(wheel_file, tmp_path):
    """Away from the checkout: the bases of a config are found, and mmpretrain's names."""
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(tmp_path / 'site')
    (tmp_path / 'empty').mkdir()
    run = subprocess.run(
        [
            sys.executable,
            '-c',
            """
import groupmamba_mm, mmpretrain
assert len(groupmamba_mm.list_configs()) > 30
cfg = groupmamba_mm.get_config('mask-rcnn_groupmamba-tiny_fpn_1x_coco')
assert cfg.model.backbone.arch == 'tiny' and cfg.model.neck.in_channels == [96, 192, 368, 760]
assert 'groupmamba-official-base' in mmpretrain.list_models('groupmamba*')
print(groupmamba_mm.__file__, cfg.filename)
""",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path / 'empty',
        env=dict(os.environ, PYTHONPATH=str(tmp_path / 'site')),
    )
    assert run.returncode == 0, run.stderr
    module, config = run.stdout.splitlines()[-1].split()
    assert module.startswith(str(tmp_path / 'site')) and config.startswith(str(tmp_path / 'site'))


def test_wheel_names_and_version(wheel):
    _, metadata = wheel
    assert metadata['Name'] == 'groupmamba-mm'
    namespace = {}
    exec((ROOT / 'groupmamba_mm' / 'version.py').read_text(), namespace)
    assert metadata['Version'] == namespace['__version__']
    assert metadata['Requires-Python'] == '>=3.11'


def test_extras_are_the_requirements_files(wheel):
    _, metadata = wheel
    extras = metadata.get_all('Provides-Extra')
    assert sorted(extras) == sorted(EXTRA_FILES) == sorted(EXTRAS)
    required = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    always = [r for r in required if r.marker is None]
    assert as_pairs(always) == as_pairs(read_requirements('runtime').values())
    for extra in extras:
        brought = [r for r in required if r.marker and r.marker.evaluate({'extra': extra})]
        expected = read_requirements(*EXTRA_FILES[extra]).values()
        assert as_pairs(brought) == as_pairs(expected), extra


def test_errors_name_the_extra_that_brings_a_library():
    distributions = packages_distributions()
    for extra, modules in EXTRAS.items():
        required = set(read_requirements(*EXTRA_FILES[extra]))
        for module in modules:
            if module in distributions:
                names = {canonicalize_name(name) for name in distributions[module]}
                assert names & required, f'{module} is not of the extra {extra}'


@pytest.mark.parametrize('name', ['runtime', *itertools.chain(*EXTRA_FILES.values())])
def test_every_requirement_is_pinned_within_its_bounds(name):
    tested = read_requirements('tested')
    for package, requirement in read_requirements(name).items():
        assert package in tested, f'{package} of {name}.txt has no pin in tested.txt'
        pin = tested[package].specifier
        if package == 'transformers':  # not in the tested set; held where mmpretrain still imports
            assert pin == requirement.specifier
            continue
        [bound] = pin
        assert bound.operator == '==', f'{package} is not pinned to one version but {pin}'
        assert requirement.specifier.contains(bound.version), f'{requirement} excludes its pin'


def test_pins_known_to_break_otherwise():
    tested = {name: str(pin.specifier) for name, pin in read_requirements('tested').items()}
    # Both packages write into cv2/.
    assert tested['opencv-python'] == tested['opencv-python-headless']
    # onedl-mmcv needs 77 for its licence field, and torch refuses 82.
    assert 77 <= int(tested['setuptools'].removeprefix('==').split('.')[0]) < 81
    assert '<5' in tested['transformers']


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script_parses_and_stops_on_errors(script):
    run = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if not script.name.startswith('_'):  # sourced, so its caller's settings hold
        assert '\nset -euo pipefail\n' in script.read_text()


def test_ci_runs_linter_formatter_types_and_tests_and_the_forge_does_the_same():
    lines = (ROOT / '.ci' / 'run').read_text().splitlines()
    assert lines[-5:] == [
        'ruff check .',
        'ruff format --check .',
        'mypy',
        'bash tools/run_tests.sh -m slow',
        'bash tools/run_tests.sh',
    ]
    workflow = yaml.safe_load((ROOT / '.github/workflows/tests.yml').read_text())
    job = workflow['jobs']['tests']
    assert job['steps'][-1] == dict(run='.ci/run')
    assert job['strategy']['matrix']['python'] == ['3.11', '3.12']


def test_pre_commit_has_the_tested_ruff():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
    [revision] = [repo['rev'] for repo in hooks['repos'] if 'ruff' in repo['repo']]
    assert str(read_requirements('tested')['ruff'].specifier) == f'=={revision.removeprefix("v")}'


@pytest.mark.parametrize('path', sorted((ROOT / '.github').rglob('*.yml')), ids=lambda p: p.name)
def test_forms_and_workflows_are_whole(path):
    content = yaml.safe_load(path.read_text())
    if path.parent.name == 'ISSUE_TEMPLATE':
        assert content['name'] and content['description']
        for part in content['body']:
            assert part['type'] in ('input', 'textarea') and part['attributes']['label']
    else:
        assert True in content and content['jobs']  # YAML reads the key `on` as true


@pytest.mark.parametrize(
    'script, arguments, message',
    [
        (
            'install.sh',
            ['--fast'],
            "unknown argument '--fast'; accepted are --classification, --tests and --help",
        ),
        (
            'quickstart.sh',
            ['--task', 'pose'],
            "unknown task 'pose'; accepted are cls, det, seg and all",
        ),
        (
            'quickstart.sh',
            ['--family', 'vim'],
            "unknown family 'vim'; accepted are paper, official and both",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(script, arguments, message):
    run = subprocess.run(
        ['bash', ROOT / 'tools' / script, *arguments], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert message in run.stderr


def test_help_names_every_option():
    run = subprocess.run(
        ['bash', ROOT / 'tools' / 'install.sh', '--help'], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for option in ('--classification', '--tests', 'PYTHON', 'GROUPMAMBA_CACHE', 'MAX_JOBS'):
        assert option in run.stdout
    assert 'set -e' not in run.stdout


@pytest.fixture
def verify():
    """The module tools/_verify_install.py."""
    return load_tool('_verify_install.py')


def test_verify_names_what_moved_and_the_remedy(verify, monkeypatch):
    versions = {'transformers': '5.1.0', 'numpy': '2.3.0'}
    monkeypatch.setattr(verify, 'installed_version', versions.get)
    with pytest.raises(SystemExit) as stopped:
        verify.check_versions([])
    assert 'transformers is 5.1.0, tested is <5,>=4.53' in stopped.value.code
    assert 'numpy is 2.3.0, tested is ==2.2.6' in stopped.value.code
    assert "pip install 'numpy==2.2.6' 'transformers<5,>=4.53'" in stopped.value.code


def test_verify_refuses_packages_that_install_the_same_modules(verify, monkeypatch):
    monkeypatch.setattr(verify, 'installed_version', {'mmcv': '2.1.0'}.get)
    with pytest.raises(SystemExit, match='pip uninstall mmcv'):
        verify.check_clashes()


@pytest.mark.parametrize(
    'members, message', [(None, 'damaged'), ({'mmcv/__init__.py': ''}, 'no compiled operators')]
)
def test_verify_refuses_a_bad_mmcv_wheel(verify, tmp_path, members, message):
    path = tmp_path / 'onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl'
    if members is None:
        path.write_bytes(b'PK\x03\x04 cut short')
    else:
        with zipfile.ZipFile(path, 'w') as archive:
            for name, text in members.items():
                archive.writestr(name, text)
    with pytest.raises(SystemExit, match=message):
        verify.check_wheel(path, 'cpu')
    if members:
        verify.check_wheel(path, 'none')
