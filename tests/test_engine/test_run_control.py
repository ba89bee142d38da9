"""Saving by time, and stopping on a signal."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.engine.checkpointing import SafeCheckpointHook
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.engine.run_control import EXIT_STOPPED, SIGNALS, RunStopped, SignalListener
from groupmamba_mm.errors import ConfigError
from tests.conftest import REPO
from tests.small_training import build


@HOOKS.register_module()
class SignalHook(Hook):
    """Send this process a signal at a step of training or of validation."""

    def __init__(self, number, train_iter=None, val_iter=None):
        self.number, self.train_iter, self.val_iter = number, train_iter, val_iter

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.train_iter:
            os.kill(os.getpid(), self.number)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.val_iter:
            os.kill(os.getpid(), self.number)


def signalled(work_dir, hook, **options):
    runner = build(work_dir, epochs=3, **options)
    runner.register_hook(hook)
    return runner


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize('iteration, name', [(3, 'latest.pth'), (6, 'latest.pth')])
def test_a_signal_saves_behind_the_step_and_ends(tmp_path, capfd, number, iteration, name):
    whole = build(tmp_path / 'whole', epochs=3, ema='EMAHook')
    whole.train()
    runner = signalled(tmp_path, SignalHook(number, train_iter=iteration), ema='EMAHook')
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(
        RunStopped,
        match=f'stopped by {number.name} after iteration {iteration}; '
        f'.*{name} is saved, continue with --resume',
    ):
        runner.train()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert f'{number.name}: saving after the next step' in capfd.readouterr().err
    meta = load_checkpoint_file(tmp_path / name)['meta']
    assert meta['iter'] == iteration
    resumed = build(tmp_path, epochs=3, ema='EMAHook', resume=True)
    resumed.train()
    saved, expected = (
        load_checkpoint_file(folder / 'epoch_3.pth') for folder in (tmp_path, tmp_path / 'whole')
    )
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in expected[part].items():
            assert torch.equal(saved[part][key], value), key
    assert not (tmp_path / 'latest.pth').exists()


def test_a_signal_in_a_validation_ends_it(tmp_path):
    runner = signalled(tmp_path, SignalHook(signal.SIGTERM, val_iter=4), val=True)
    with pytest.raises(RunStopped, match='after iteration 4; .*epoch_2.pth is saved'):
        runner.train()
    resumed = build(tmp_path, epochs=3, val=True, resume=True)
    resumed.train()
    assert len(resumed.message_hub.log_scalars['val/value'].data[0]) == 3


def test_the_second_signal_ends_at_once(tmp_path):
    code = (
        'import os, signal, time\n'
        'from groupmamba_mm.engine import run_control\n'
        'run_control._SAME_SIGNAL_SECONDS = 0.2\n'
        'listener = run_control.SignalListener()\n'
        'listener.start()\n'
        'os.kill(os.getpid(), signal.SIGTERM)\n'
        'os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes the same one on\n'
        'time.sleep(0.3)\n'
        'print("alive", flush=True)\n'
        'os.kill(os.getpid(), signal.SIGINT)\n'
        'print("still alive", flush=True)\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=dict(os.environ, PYTHONPATH=str(REPO)),
    )
    assert result.returncode == 128 + signal.SIGINT
    assert result.stdout == 'alive\n'
    assert 'SIGINT, the second signal: ending at once' in result.stderr


def test_a_listener_gives_the_signals_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    listener = SignalListener()
    listener.start()
    assert [signal.getsignal(number) for number in SIGNALS] != before
    listener.stop()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_command_that_is_stopped_has_a_code_of_its_own(capsys):
    def stopped():
        raise RunStopped('stopped by SIGTERM after iteration 3')

    with pytest.raises(SystemExit) as end:
        run_command(stopped)
    assert end.value.code == EXIT_STOPPED == 75
    assert capsys.readouterr().err == 'stopped by SIGTERM after iteration 3\n'


def test_minutes_save_between_the_intervals(tmp_path):
    saved = []
    original = SafeCheckpointHook.save_interim

    def save_interim(self, runner, meta):
        saved.append(meta['iter'])
        return original(self, runner, meta)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafeCheckpointHook, 'save_interim', save_interim)
        build(tmp_path, epochs=3, checkpoint=dict(interval=3, minutes=1e-9)).train()
    assert saved == [1, 2, 3, 4, 5, 6]
    # the last one is the interval's, and takes the place of those between
    assert [file.name for file in tmp_path.glob('*.pth')] == ['epoch_3.pth']
    with pytest.raises(ConfigError, match='minutes must be above 0, got -1'):
        SafeCheckpointHook(minutes=-1)
    with pytest.raises(ConfigError, match="on_write_error must be .*'ignore'"):
        SafeCheckpointHook(on_write_error='ignore')


def test_a_signal_saves_where_the_config_saves_nothing(tmp_path):
    runner = signalled(
        tmp_path,
        SignalHook(signal.SIGTERM, train_iter=2),
        checkpoint=dict(interval=-1, save_last=False),
    )
    with pytest.raises(RunStopped, match='latest.pth is saved'):
        runner.train()
