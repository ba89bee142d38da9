"""The installer and the commands without what they need: one line that says what is missing."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPO, load_tool

PROGRAMS = [
    'bash',
    'env',
    'cat',
    'sed',
    'grep',
    'sort',
    'paste',
    'mkdir',
    'rm',
    'dirname',
    'basename',
    'sha256sum',
    'cut',
    'nproc',
    'tail',
    'head',
    'tr',
    'mv',
    'cp',
    'sleep',
    'uname',
    'setsid',
    'mktemp',
    'flock',
]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the installer reads, and a PATH with a Python that is too old."""
    for name in ('tools', 'requirements'):
        shutil.copytree(REPO / name, tmp_path / 'gm' / name)
    (tmp_path / 'gm/groupmamba_mm').mkdir()
    shutil.copy(REPO / 'groupmamba_mm/version.py', tmp_path / 'gm/groupmamba_mm')
    for name in ('setup.py', 'pyproject.toml'):
        shutil.copy(REPO / name, tmp_path / 'gm')
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).symlink_to(shutil.which(name))
    (programs / 'python3').write_text('#!/bin/sh\nexit 1\n')
    (programs / 'python3').chmod(0o755)
    return tmp_path


def run(checkout, *arguments, script='install.sh', **variables):
    environment = dict(
        HOME=str(checkout / 'home'),
        PATH=str(checkout / 'bin'),
        GROUPMAMBA_CACHE=str(checkout / 'cache'),
        **variables,
    )
    done = subprocess.run(
        ['bash', str(checkout / 'gm/tools' / script), *arguments],
        text=True,
        env=environment,
        timeout=60,
        capture_output=True,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


@pytest.mark.parametrize(
    'absent', [['flock'], ['setsid'], ['flock', 'setsid', 'sha256sum', 'nproc']]
)
def test_missing_programs_are_named_together(checkout, absent):
    for name in absent:
        (checkout / 'bin' / name).unlink()
    code, output = run(checkout)
    assert code == 1 and f'install.sh: these programs are missing: {" ".join(absent)}.' in output
    assert 'brew install' in output and 'Another install' not in output
    assert not (checkout / 'cache').exists()


def test_an_old_python_is_told(checkout):
    code, output = run(checkout)
    assert code == 1 and 'the tested set is for Python 3.11 and 3.12' in output


def test_a_cache_that_cannot_be_written_is_told(checkout):
    (checkout / 'cache').touch()  # no folder can be made there, whoever asks
    code, output = run(checkout)
    assert code == 1 and output.endswith('GROUPMAMBA_CACHE=/path/to/folder bash tools/install.sh')
    assert f'install.sh: the cache {checkout}/cache cannot be written' in output


@pytest.mark.parametrize(
    'installed, wanted, done',
    [
        ('', ['--classification'], True),
        ('', [], False),
        (' dense', [], True),
        (' dense', ['--classification'], True),
        (' dense', ['--tests'], False),
        (' dense tests export docs analysis', [], True),
    ],
)
def test_nothing_is_written_where_nothing_is_to_be_done(checkout, installed, wanted, done):
    venv = checkout / 'gm/.venv/bin'
    venv.mkdir(parents=True)
    (venv / 'python').write_text('#!/bin/sh\nexit 0\n')
    (venv / 'python').chmod(0o755)
    # the key, made by the script's own function
    script = (checkout / 'gm/tools/install.sh').read_text()
    (checkout / 'gm/tools/key.sh').write_text(
        script[: script.index('leave_if_done()')] + '\ninstall_key\n'
    )
    _, key = run(checkout, script='key.sh')
    stamp = f'{key} runtime mminstall demo hub{installed}'
    (checkout / 'gm/.venv/groupmamba_mm.installed').write_text(stamp)
    (checkout / 'cache').touch()
    code, output = run(checkout, *wanted)
    if done:
        assert code == 0 and 'nothing to do' in output, output
    else:  # more is to be installed, and the cache is looked at
        assert code == 1 and 'cannot be written' in output, output


def test_what_is_installed_for_more_tasks_is_kept(checkout):
    """--classification beside mmdet and mmseg does not take mmcv's operators away."""
    venv = checkout / 'gm/.venv/bin'
    venv.mkdir(parents=True)
    (venv / 'python').write_text('#!/bin/sh\n[ "$2" != installed ] || echo dense\n')
    (venv / 'python').chmod(0o755)
    script = (checkout / 'gm/tools/install.sh').read_text()
    (checkout / 'gm/tools/kept.sh').write_text(
        script[: script.index('leave_if_done()')] + '\nchoose_requirements\necho "${wanted[*]}"\n'
    )
    for arguments in ([], ['--classification']):
        _, output = run(checkout, *arguments, script='kept.sh')
        assert output == 'runtime mminstall demo hub dense'


def test_help_of_the_tests_installs_nothing(checkout):
    code, output = run(checkout, '--help', script='run_tests.sh')
    assert code == 0 and 'Arguments go to pytest' in output and 'took' not in output
    assert not (checkout / 'cache').exists()


@pytest.mark.parametrize(
    'tool',
    sorted(
        str(path.relative_to(REPO / 'tools'))
        for path in (REPO / 'tools').rglob('*.py')
        if '\nfrom groupmamba_mm' in path.read_text() and path.name[0] != '_'
    ),
)
def test_commands_without_the_environment_say_so(tool):
    done = subprocess.run(
        [sys.executable, '-S', '-E', str(REPO / 'tools' / tool), '--help'],
        env=dict(os.environ, PYTHONPATH=''),
        text=True,
        capture_output=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith('error: ') and 'tools/install.sh' in last
    assert 'Traceback' not in done.stderr


@pytest.mark.skipif(shutil.which('g++') is None, reason='needs gcc')
def test_headers_are_precompiled_with_the_options_of_the_later_compilation(tmp_path):
    """gcc takes what was precompiled: with -Winvalid-pch -Werror it fails if it does not fit."""
    folder = tmp_path / 'mmcv/ops/csrc/common'
    folder.mkdir(parents=True)
    (folder / 'pytorch_cpp_helper.hpp').write_text('#pragma once\n#include <vector>\n')
    load_tool('_precompile_headers.py').main(str(tmp_path), 'g++', '-O2 -DNDEBUG -g0')
    # so that only the precompiled one is left
    (folder / 'pytorch_cpp_helper.hpp').write_text('#error not precompiled\n')
    (tmp_path / 'a.cpp').write_text('std::vector<int> a;\n')
    command = 'g++ -O2 -DNDEBUG -g0 -include pytorch_cpp_helper.hpp -Winvalid-pch -Werror -fPIC'
    defines = ['-DTORCH_API_INCLUDE_EXTENSION_H', '-DTORCH_EXTENSION_NAME=_ext']
    subprocess.run(
        [*command.split(), f'-I{folder}', '-c', 'a.cpp', '-o', 'a.o', '-std=c++17', *defines],
        cwd=tmp_path,
        check=True,
    )
