"""The shell scripts that start trainings: restarts and signals, with fakes for what they start."""

import os
import signal
import stat
import subprocess

import pytest

from tests.conftest import REPO

#: Notes its arguments, then waits for a signal and ends with a code.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > {folder}/{name}_arguments
trap 'echo {name} got TERM; exit {code}' TERM
trap 'echo {name} got USR1; exit {code}' USR1
echo ready
for ((tick = 0; tick < {ticks}; tick++)); do sleep 0.05; done
exit {code}
"""


def fake_program(folder, name, code=0, ticks=0):
    file = folder / name
    file.write_text(STAND_IN.format(folder=folder, name=name, code=code, ticks=ticks))
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


def start(folder, script, *arguments, **environment):
    environment = {
        key: value
        for key, value in {**os.environ, **environment}.items()
        if not key.startswith('SLURM_') or key in environment
    }
    return subprocess.Popen(
        ['bash', str(REPO / 'tools' / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(environment, PATH=f'{folder}:{os.environ["PATH"]}'),
    )


def arguments_of(folder, name):
    return (folder / f'{name}_arguments').read_text().split()


@pytest.mark.parametrize('given', [['--max-restarts', '3'], ['--max-restarts=3']])
def test_restarts_are_torchruns(tmp_path, given):
    fake_program(tmp_path, 'python')
    assert (
        start(tmp_path, 'dist_train.sh', 'config.py', '2', '--work-dir', 'a b', *given).wait() == 0
    )
    arguments = arguments_of(tmp_path, 'python')
    assert '--max_restarts=3' in arguments and '--rdzv_backend=c10d' in arguments
    assert '--rdzv_endpoint=127.0.0.1:29500' in arguments
    script = next(
        index for index, argument in enumerate(arguments) if argument.endswith('train.py')
    )
    assert arguments[script + 1 :] == ['config.py', '--work-dir', 'a', 'b', '--launcher', 'pytorch']


def test_without_restarts_the_rendezvous_is_static(tmp_path):
    fake_program(tmp_path, 'python')
    assert (
        start(
            tmp_path,
            'dist_train.sh',
            'config.py',
            '2',
            NNODES='2',
            NODE_RANK='1',
            MASTER_ADDR='node0',
            PORT='29555',
        ).wait()
        == 0
    )
    arguments = arguments_of(tmp_path, 'python')
    assert {
        '--nnodes=2',
        '--node_rank=1',
        '--master_addr=node0',
        '--master_port=29555',
        '--max_restarts=0',
    } <= set(arguments)
    assert not any('rdzv' in argument for argument in arguments)


def test_fewer_machines_are_elastic(tmp_path):
    fake_program(tmp_path, 'python')
    assert (
        start(tmp_path, 'dist_train.sh', 'config.py', '2', NNODES='1:2', MASTER_ADDR='node0').wait()
        == 0
    )
    assert {'--nnodes=1:2', '--rdzv_backend=c10d', '--rdzv_endpoint=node0:29500'} <= set(
        arguments_of(tmp_path, 'python')
    )


def test_a_number_of_restarts_that_is_none_is_refused(tmp_path):
    run = start(tmp_path, 'dist_train.sh', 'config.py', '2', '--max-restarts', 'many')
    assert 'error: --max-restarts many is no number' in run.communicate()[0]
    assert run.returncode == 2


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_torchrun_and_has_a_code(tmp_path, number):
    fake_program(tmp_path, 'python', code=1, ticks=400)
    run = start(tmp_path, 'dist_train.sh', 'config.py', '2')
    assert run.stdout.readline() == 'ready\n'
    run.send_signal(number)
    output, _ = run.communicate(timeout=30)
    assert f'python got {number.name.removeprefix("SIG")}' in output and run.returncode == 75


def test_a_failure_keeps_its_code(tmp_path):
    fake_program(tmp_path, 'python', code=3)
    assert start(tmp_path, 'dist_train.sh', 'config.py', '2').wait() == 3


SLURM = ('slurm_train.sh', 'gpu', 'job', 'config.py', 'work')


@pytest.mark.parametrize(
    'environment, requeued',
    [(dict(SLURM_JOB_ID='77'), True), (dict(SLURM_JOB_ID='77', REQUEUE='0'), False), ({}, False)],
)
def test_a_batch_job_that_was_stopped_is_requeued(tmp_path, environment, requeued):
    fake_program(tmp_path, 'srun', code=75)
    fake_program(tmp_path, 'scontrol')
    run = start(tmp_path, *SLURM, **environment)
    output, _ = run.communicate()
    assert run.returncode == 75
    assert ('requeueing job 77' in output) == requeued
    assert (tmp_path / 'scontrol_arguments').exists() == requeued
    if requeued:
        assert arguments_of(tmp_path, 'scontrol') == ['requeue', '77']
    assert '--resume' not in arguments_of(tmp_path, 'srun')


def test_a_job_that_failed_is_not_requeued(tmp_path):
    fake_program(tmp_path, 'srun', code=1)
    fake_program(tmp_path, 'scontrol')
    assert start(tmp_path, *SLURM, SLURM_JOB_ID='77').wait() == 1
    assert not (tmp_path / 'scontrol_arguments').exists()


def test_a_requeued_job_resumes(tmp_path):
    fake_program(tmp_path, 'srun')
    assert start(tmp_path, *SLURM, SLURM_JOB_ID='77', SLURM_RESTART_COUNT='1').wait() == 0
    assert arguments_of(tmp_path, 'srun')[-1] == '--resume'
