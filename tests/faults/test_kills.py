"""Trainings of two processes that are killed or stopped, and resumed."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from groupmamba_mm.engine.run_control import EXIT_STOPPED

from .launching import Launch, differing, last_checkpoint

# slow enough to be hit, with a checkpoint every third of a second
OPTIONS = dict(seconds=0.03, minutes=0.005, resume=1)


def wait_for_write(folder, launch):
    """Wait until a checkpoint is being written."""
    while launch.alive() and not list(Path(folder).glob('*.partial')):
        time.sleep(0.0005)


def killed(folder, kills, seed):
    """A training that is killed so many times, every third time while it writes a checkpoint."""
    draw = random.Random(seed)
    number, hit_writes = 0, 0
    while number < kills:
        launch = Launch(folder, **OPTIONS)
        launch.wait_for('Checkpoints will be saved')
        if number % 3 == 2:
            wait_for_write(folder, launch)
        else:
            time.sleep(draw.uniform(0, 1.5))
        if not launch.alive():  # it finished first
            break
        launch.kill()
        hit_writes += bool(list(Path(folder).glob('*.partial')))
        number += 1
    assert Launch(folder, **OPTIONS).wait() == [0, 0]
    return number, hit_writes


def test_killed_and_resumed(tmp_path, whole):
    kills, _ = killed(tmp_path, 2, seed=0)
    assert kills > 0 and differing(last_checkpoint(tmp_path), whole) == []


@pytest.mark.faults
def test_twenty_kills(tmp_path, whole):
    kills = writes = runs = 0
    while kills < 20:
        folder = tmp_path / str(runs)
        more, hit = killed(folder, 20 - kills, seed=runs)
        kills, writes, runs = kills + more, writes + hit, runs + 1
        assert differing(last_checkpoint(folder), whole) == []
    print(f'{kills} kills in {runs} trainings, {writes} while a checkpoint was written')
    assert writes >= 2


def terminated(folder, index, **options):
    """A training that gets a signal in one process or both, or in workers too, and is resumed."""
    options = {**OPTIONS, **options}
    launch = Launch(folder, **options)
    while launch.alive() and not list(Path(folder).glob('*.pth')):  # all of them listen by then
        time.sleep(0.01)
    time.sleep(random.Random(index).uniform(0, 1.5))
    launch.kill([(0,), (1,), (0, 1)][index % 3], signal.SIGTERM, group=index % 2 == 1)
    codes = launch.wait()
    assert codes == [EXIT_STOPPED] * 2 or codes == [0, 0]
    if codes[0]:
        assert 'stopped by SIGTERM after iteration' in launch.log(0)
    assert Launch(folder, **options).wait() == [0, 0]
    return codes[0] == EXIT_STOPPED


def test_terminated_and_resumed(tmp_path, whole):
    """Also with an optimizer whose state is shared out (ZeRO), which changes no bit."""
    assert terminated(tmp_path, 1, zero=1)
    assert differing(last_checkpoint(tmp_path), whole) == []
    assert (
        last_checkpoint(tmp_path)['optimizer']['state'].keys() == whole['optimizer']['state'].keys()
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA GPUs')
@pytest.mark.faults
def test_terminated_with_sync_batch_norm(tmp_path):
    launch = Launch(tmp_path / 'whole', sync=1)
    assert launch.wait() == [0, 0], launch.log(0)[-3000:]
    assert terminated(tmp_path / 'stopped', 1, sync=1)
    whole, stopped = (last_checkpoint(tmp_path / name) for name in ('whole', 'stopped'))
    for key, value in whole['state_dict'].items():
        torch.testing.assert_close(stopped['state_dict'][key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.faults
def test_terminated_between_two_updates(tmp_path):
    """Each process goes on with the gradients that it had added up."""
    assert Launch(tmp_path / 'whole', sum=5, seconds=0).wait() == [0, 0]
    assert terminated(tmp_path / 'stopped', 1, sum=5)
    assert differing(*(last_checkpoint(tmp_path / name) for name in ('whole', 'stopped'))) == []


@pytest.mark.faults
def test_five_terminations(tmp_path, whole):
    stopped = index = 0
    while stopped < 5:
        folder = tmp_path / str(index)
        stopped += terminated(folder, index)
        index += 1
        assert differing(last_checkpoint(folder), whole) == []
