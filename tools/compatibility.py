"""Run the CPU tests over sets of packages, and write the table of what works.

For each Python and each set (the oldest supported torch, the tested versions, the newest of
everything) a virtual environment is made in a temporary folder with what the package and its extras
hub, export and dev require, the tests run that need no OpenMMLab library, and the environment
removed. With --libraries the extra mm and the tests with mmpretrain, mmdet and mmseg follow, for
which mmcv's operators are compiled, 7 to 18 minutes a set.

The table keeps its rows for what is not run. Needs Linux, about 8 GB of disk, and nothing installed.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / 'docs' / 'compatibility.md'
PYTHONS = ('3.11', '3.12', '3.13')
KINDS = ('oldest', 'tested', 'newest')
#: Where the rows stand in the document.
HEAD = '| Python | set | torch | torchvision | timm | without OpenMMLab | with it | date |'
#: Tests that need torch, timm, huggingface_hub and onnxruntime alone.
PLAIN_TESTS = (
    'tests/test_backbones/test_truth.py',
    'tests/test_checkpoint/test_matching.py',
    'tests/test_export',
    'tests/test_layers/test_embedding.py',
    'tests/test_models',
    'tests/test_ops/test_selective_scan.py',
)
#: Tests of the libraries: names in their registries, inferencers, training losses of dense models.
LIBRARY_TESTS = (
    'tests/test_dense_models.py',
    'tests/test_inference',
    'tests/test_inferencer.py',
    'tests/test_library_loading.py',
    'tests/test_model_zoo.py',
)
#: What builds mmcv, as in tools/install.sh.
BUILD_TOOLS = ('setuptools>=77,<82', 'ninja', 'packaging', 'wheel')


def floor_of_torch() -> str:
    """The oldest supported torch, from the requirements."""
    text = (ROOT / 'requirements' / 'runtime.txt').read_text(encoding='utf-8')
    return re.search(r'^torch>=([\d.]+)', text, flags=re.MULTILINE)[1]


def requirements_of(kind: str) -> list[str]:
    """pip's arguments that choose the versions of a set.

    Args:
        kind: ``'oldest'``, ``'tested'`` or ``'newest'``.

    Returns:
        The arguments.
    """
    return {
        'oldest': [f'torch=={floor_of_torch()}.*'],
        'tested': ['torch', '--constraint', str(ROOT / 'requirements' / 'tested.txt')],
        'newest': ['torch', '--upgrade'],
    }[kind]


def requirement_files(*names: str) -> list[str]:
    """pip's arguments for files of ``requirements/``."""
    return [f'--requirement={ROOT / "requirements" / name}.txt' for name in names]


class Stopped(Exception):
    """A step of a set failed; the message is what the table says."""


def call(command: Sequence[object], failed: str, log: Path) -> None:
    """Run a command into the log.

    Args:
        command: The command.
        failed: What the table says if it fails.
        log: The log.

    Raises:
        Stopped: It fails.
    """
    with open(log, 'a', encoding='utf-8') as out:
        print('===', *command, file=out, flush=True)
        done = subprocess.run(list(map(str, command)), stdout=out, stderr=out, cwd=ROOT)
    if done.returncode:
        raise Stopped(failed)


def run_tests(python: Path, tests: Sequence[str], folder: Path, log: Path) -> str:
    """Run tests and say how they ended.

    Args:
        python: The environment's interpreter.
        tests: Files and folders of tests.
        folder: For temporary files.
        log: The log.

    Returns:
        Such as ``'120 passed, 1 failed (test_a)'``.
    """
    report = folder / 'report.xml'
    report.unlink(missing_ok=True)
    command = [python, '-m', 'pytest', '-q', '-m', 'not slow', '-p', 'no:cacheprovider']
    command += ['--timeout=1200', f'--junitxml={report}', f'--basetemp={folder / "pytest"}', *tests]
    # the package is not installed, and some tests leave the checkout
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    with open(log, 'a', encoding='utf-8') as out:
        subprocess.run(list(map(str, command)), stdout=out, stderr=out, cwd=ROOT, env=environment)
    if not report.is_file():
        return 'the tests did not start'
    cases = list(ElementTree.parse(report).iter('testcase'))
    failed = [
        case.get('name')
        for case in cases
        if case.find('failure') is not None or case.find('error') is not None
    ]
    skipped = sum(case.find('skipped') is not None for case in cases)
    said = f'{len(cases) - len(failed) - skipped} passed'
    said += f', {skipped} skipped' if skipped else ''
    if failed:
        said += f', **{len(failed)} failed** ({", ".join(failed[:3])}{" ..." * (len(failed) > 3)})'
    return said


def try_set(version: str, kind: str, libraries: bool, mmcv: Path | None, log: Path) -> list[str]:
    """One row of the table.

    Args:
        version: Of Python.
        kind: See :func:`requirements_of`.
        libraries: Whether the OpenMMLab libraries are tried too.
        mmcv: A wheel of mmcv that was compiled for the set; None: it is compiled.
        log: The log.

    Returns:
        Cells after Python and set, up to the date.
    """
    folder = Path(tempfile.mkdtemp(prefix='compatibility-'))
    python = folder / 'venv' / 'bin' / 'python'
    versions = ['', '', '']
    plain, with_libraries = 'not tried', 'not tried'
    chosen = requirements_of(kind)
    pip = [python, '-m', 'pip', '--disable-pip-version-check', 'install']
    try:
        make = [f'python{version}', '-m', 'venv', folder / 'venv']
        call(make, 'this Python makes no environment', log)
        call([*pip, *BUILD_TOOLS, *chosen], 'torch does not install', log)
        files = requirement_files('runtime', 'hub', 'export', 'tests')
        call([*pip, *chosen, *files], 'the requirements do not install', log)
        versions = installed(python, ('torch', 'torchvision', 'timm'))
        plain = run_tests(python, PLAIN_TESTS, folder, log)
        if libraries:
            with_libraries = 'mmcv does not compile'
            wanted = mmcv or 'onedl-mmcv'
            call([*pip, *chosen, '--no-build-isolation', wanted], with_libraries, log)
            failed = 'the libraries do not install'
            files = requirement_files('mminstall', 'dense', 'demo')
            call([*pip, *chosen, '--no-build-isolation', *files], failed, log)
            with_libraries = run_tests(python, LIBRARY_TESTS, folder, log)
    except Stopped as stop:
        if plain == 'not tried':
            plain = str(stop)
        else:
            with_libraries = str(stop)
    finally:
        shutil.rmtree(folder)
    return [*versions, plain, with_libraries]


def missing(versions: Sequence[str]) -> list[str]:
    """Those Pythons that do not start here; a version manager may have names of more."""
    commands = {version: shutil.which(f'python{version}') for version in versions}
    return [
        version
        for version, command in commands.items()
        if command is None or subprocess.run([command, '-c', ''], capture_output=True).returncode
    ]


def installed(python: Path, names: Sequence[str]) -> list[str]:
    """Versions of packages in an environment."""
    code = 'import sys; from importlib.metadata import version\nfor n in sys.argv[1:]: print(version(n))'
    done = subprocess.run([python, '-c', code, *names], capture_output=True, text=True, check=True)
    return done.stdout.split()


def write_row(version: str, kind: str, cells: Sequence[str]) -> None:
    """Put a row into the table, in the place of an older one.

    Args:
        version: Of Python.
        kind: The set.
        cells: The cells after these.
    """
    text = TABLE.read_text(encoding='utf-8')
    before, head, rest = text.partition(HEAD)
    _, rule, *rows = rest.split('\n')
    end = next(i for i, line in enumerate(rows) if not line.startswith('|'))
    rows, after = rows[:end], rows[end:]
    key = f'| {version} | {kind} |'
    cells = list(cells)
    for row in [row for row in rows if row.startswith(key)]:
        old = [cell.strip() for cell in row.split('|')[3:-2]]
        if cells[-1] == 'not tried' and old[:3] == cells[:3]:
            cells[-1] = old[-1]  # the libraries were tried before, with the same versions
        rows.remove(row)
    rows.append(f'{key} {" | ".join([*cells, date.today().isoformat()])} |')
    rows.sort(key=lambda row: (row.split('|')[1], KINDS.index(row.split('|')[2].strip())))
    TABLE.write_text('\n'.join([before + head, rule, *rows, *after]), encoding='utf-8')


def parse_args() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--python', nargs='+', choices=PYTHONS, default=PYTHONS)
    parser.add_argument('--set', nargs='+', choices=KINDS, default=KINDS, dest='kinds')
    parser.add_argument(
        '--libraries', action='store_true', help='try mmpretrain, mmdet and mmseg as well'
    )
    parser.add_argument(
        '--mmcv',
        type=Path,
        metavar='WHEEL',
        help='a wheel of mmcv compiled for the one Python and set that is tried '
        '(tools/install.sh keeps one); without it mmcv is compiled',
    )
    parser.add_argument(
        '--log', type=Path, default=Path('compatibility.log'), help='(default: %(default)s)'
    )
    args = parser.parse_args()
    if args.mmcv and (len(args.python), len(args.kinds), args.libraries) != (1, 1, True):
        parser.error('--mmcv needs --libraries, one --python and one --set')
    return args


def main() -> None:
    """Try the sets and write the table."""
    if platform.system() != 'Linux':
        sys.exit('error: the sets are for Linux')
    args = parse_args()
    if absent := missing(args.python):
        sys.exit(
            f'error: Python {", ".join(absent)} does not start here; put it on PATH as '
            f'python{absent[0]}, or name others with --python'
        )
    for version in args.python:
        for kind in args.kinds:
            cells = try_set(version, kind, args.libraries, args.mmcv, args.log)
            print(version, kind, *cells, sep=' | ', flush=True)
            write_row(version, kind, cells)
    print(f'{TABLE.relative_to(ROOT)} is written; what was done is in {args.log}')


if __name__ == '__main__':
    main()
