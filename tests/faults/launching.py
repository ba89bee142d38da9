"""Start small trainings of several processes, from a server that has imported everything."""

import multiprocessing
import os
import signal
import socket
import time

import torch

from groupmamba_mm.checkpoint import load_checkpoint_file

# mmengine asks for GPUs when it is imported; asked through CUDA, they are of no use after a fork
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['tests.faults.small_run'])


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def _run(rank, world_size, port, work_dir, options, environment):
    from tests.faults import small_run

    os.setsid()  # a group of its own, with its workers, as torchrun makes it
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        **environment,
    )
    log = os.open(f'{work_dir}/process_{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    small_run.main([work_dir, *(f'{key}={value}' for key, value in options.items())])


class Launch:
    """Processes of one training.

    Args:
        work_dir: Its folder.
        world_size: How many.
        environment: Variables for all of them.
        **options: See ``small_run.py``.
    """

    def __init__(self, work_dir, world_size=2, environment=None, **options):
        os.makedirs(work_dir, exist_ok=True)
        self.work_dir = work_dir
        port = free_port()
        self.processes = [
            _CONTEXT.Process(
                target=_run,
                args=(rank, world_size, port, str(work_dir), options, environment or {}),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def log(self, rank):
        """What a process has written so far."""
        path = f'{self.work_dir}/process_{rank}.txt'
        return open(path).read() if os.path.exists(path) else ''

    def wait_for(self, text, rank=0, timeout=120):
        """Wait until a process has written a text."""
        end = time.monotonic() + timeout
        while text not in self.log(rank):
            assert time.monotonic() < end and self.alive(), f'no {text}: {self.log(rank)[-2000:]}'
            time.sleep(0.01)

    def alive(self):
        """Whether any process runs."""
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout=240):
        """Wait for the end, and return the exit codes."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert None not in codes, f'still running: {codes}; {self.log(0)[-2000:]}'
        return codes

    def kill(self, ranks=None, number=signal.SIGKILL, group=False):
        """Send processes a signal, by default the one that ends them at once, or to workers too."""
        ranks = range(len(self.processes)) if ranks is None else ranks
        for rank in ranks:
            if self.processes[rank].is_alive():
                (os.killpg if group else os.kill)(self.processes[rank].pid, number)
        if number == signal.SIGKILL:
            for rank in ranks:
                self.processes[rank].join()


def last_checkpoint(folder):
    """The checkpoint of a finished training."""
    return load_checkpoint_file(f'{folder}/epoch_4.pth')


def differing(one, other):
    """The tensors and histories of two checkpoints that are not bit by bit the same."""
    found = [
        f'{part}.{key}'
        for part in ('state_dict', 'ema_state_dict')
        for key, value in one[part].items()
        if not torch.equal(value, other[part][key])
    ]
    for key in ('train/loss', 'train/lr', 'val/value'):
        histories = [
            part['message_hub']['log_scalars'][key].data[0].tolist() for part in (one, other)
        ]
        found += [key] if histories[0] != histories[1] else []
    return found
