"""What happens to a training when one of its processes does, and restarts by a launcher."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from groupmamba_mm.engine import heartbeat
from groupmamba_mm.engine.heartbeat import process_state
from groupmamba_mm.engine.run_control import EXIT_STOPPED
from tests.conftest import REPO

from .launching import Launch, differing, free_port, last_checkpoint

SLOW = dict(seconds=0.05, epochs=40)


def test_a_process_that_dies_is_named_and_the_others_end(tmp_path):
    launch = Launch(tmp_path, **SLOW)
    launch.wait_for('Epoch(train)')
    start = time.monotonic()
    launch.kill([1])
    codes = launch.wait(timeout=60)
    assert codes[0] == 1 and time.monotonic() - start < 60
    last = launch.log(0).strip().splitlines()[-1]
    assert last.startswith('error: ') and f'process 1 (pid {launch.processes[1].pid}' in last


@pytest.mark.faults
def test_a_process_that_is_stopped_is_named_and_the_others_end(tmp_path):
    launch = Launch(tmp_path, **SLOW)
    launch.wait_for('Epoch(train)')
    start = time.monotonic()
    launch.kill([1], signal.SIGSTOP)
    launch.processes[0].join(60)
    assert launch.processes[0].exitcode == 1 and time.monotonic() - start < 60
    launch.kill()
    last = launch.log(0).strip().splitlines()[-1]
    assert f'process 1 (pid {launch.processes[1].pid}' in last
    assert 'has been stopped for 20 s' in last


@pytest.mark.faults
def test_a_machine_that_is_silent_is_named(tmp_path):
    """Each of the processes takes itself for a machine, so they know each other by the store only."""
    launch = Launch(tmp_path, machines=1, **SLOW)
    launch.wait_for('Epoch(train)')
    start = time.monotonic()
    launch.kill([1], signal.SIGSTOP)
    launch.processes[0].join(60)
    assert launch.processes[0].exitcode == 1 and time.monotonic() - start < 60
    launch.kill()
    assert 'the machine of process 1' in launch.log(0).strip().splitlines()[-1]


def test_states_of_processes():
    assert process_state(os.getpid()) == 'R'
    process = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    process.send_signal(signal.SIGSTOP)
    while process_state(process.pid) != 'T':
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process_state(process.pid) is None


def torchrun(work_dir, *arguments, options=(), **environment):
    return subprocess.Popen(
        [
            sys.executable,
            str(REPO / 'tools' / '_torchrun.py'),
            *arguments,
            str(REPO / 'tests' / 'faults' / 'small_run.py'),
            str(work_dir),
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
        env=dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS='1', **environment),
    )


@pytest.mark.faults
def test_two_machines(tmp_path, whole):
    port = free_port()
    nodes = [
        torchrun(
            tmp_path,
            '--nnodes=2',
            f'--node_rank={rank}',
            '--nproc_per_node=1',
            '--master_addr=127.0.0.1',
            f'--master_port={port}',
        )
        for rank in (0, 1)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert differing(last_checkpoint(tmp_path), whole) == []


@pytest.mark.faults
def test_torchrun_restarts_what_was_killed(tmp_path, whole):
    run = torchrun(
        tmp_path,
        '--nproc_per_node=2',
        '--max_restarts=2',
        '--rdzv_backend=c10d',
        f'--rdzv_endpoint=127.0.0.1:{free_port()}',
        '--local_addr=127.0.0.1',
        options=('seconds=0.05', 'minutes=0.005', 'pids=1'),
    )
    pids = tmp_path / 'pid_1'
    while not (tmp_path / 'latest.pth').exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    os.kill(int(pids.read_text()), signal.SIGKILL)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert 'resumed epoch' in output
    assert differing(last_checkpoint(tmp_path), whole) == []


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, EXIT_STOPPED), (signal.SIGKILL, 9)])
@pytest.mark.faults
def test_torchrun_ends_as_its_processes_do(tmp_path, number, code):
    run = torchrun(
        tmp_path,
        '--nproc_per_node=2',
        f'--master_port={free_port()}',
        options=('seconds=0.05', 'epochs=40', 'minutes=0.005', 'pids=1'),
    )
    while not (tmp_path / 'latest.pth').exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    pid = int((tmp_path / 'pid_1').read_text())
    os.kill(pid if number == signal.SIGKILL else run.pid, number)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == code and 'torch.distributed.run' not in output, output
    if number == signal.SIGKILL:
        assert (
            output.strip().splitlines()[-1] == f'error: process 1 (pid {pid}) was ended by SIGKILL'
        )
    else:
        assert 'stopped by SIGTERM after iteration' in output.strip().splitlines()[-1]


@pytest.mark.faults
def test_fewer_processes_go_on_behind_the_images_that_were_seen(tmp_path):
    launch = Launch(tmp_path, seconds=0.05)
    launch.wait_for('Epoch(train)')
    time.sleep(0.5)
    launch.kill(number=signal.SIGTERM)
    assert launch.wait() == [EXIT_STOPPED] * 2
    assert Launch(tmp_path, world_size=1, resume=1, seconds=0).wait() == [0]
    assert 'saved with 4 images a step, this run has 2' in (tmp_path / 'process_0.txt').read_text()
    meta = last_checkpoint(tmp_path)['meta']
    assert (meta['epoch'], meta['iter']) == (4, 48)


def test_two_processes_are_one_with_the_same_batch(tmp_path):
    """In fp64, without what draws numbers or counts the images of one process."""
    options = dict(exact=1, seconds=0)
    assert Launch(tmp_path / 'two', **options).wait() == [0, 0]
    assert Launch(tmp_path / 'one', world_size=1, batch=4, **options).wait() == [0]
    two, one = (last_checkpoint(tmp_path / name)['state_dict'] for name in ('two', 'one'))
    for key, value in one.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6, msg=key)
        assert (two[key] - value).abs().max() < 1e-12, key


def test_a_step_that_is_not_finite_in_one_process_is_named_in_both(tmp_path):
    launch = Launch(tmp_path, nan='1,8')
    assert launch.wait() == [1, 1]
    for rank in (0, 1):
        last = launch.log(rank).strip().splitlines()[-1]
        assert 'iteration 8 is not finite: the output of head.2 (Break)' in last, launch.log(rank)
        assert '(process 1)' in last and 'nonfinite_iter_8_process_1.pth' in last
    assert (tmp_path / 'nonfinite_iter_8_process_1.pth').exists()
    assert heartbeat.SILENT_SECONDS < 60 and heartbeat.STOPPED_SECONDS < 60
