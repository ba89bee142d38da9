"""Notice that another process of a training has died or stands still, and end with its name."""

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

#: Seconds between two looks.
INTERVAL = 2.0
#: Seconds for which a process on this machine may be stopped, as by SIGSTOP or a debugger.
STOPPED_SECONDS = 20.0
#: Seconds for which another machine may be silent.
SILENT_SECONDS = 40.0


class Peer(NamedTuple):
    """A process of the training."""

    rank: int
    machine: str
    pid: int

    def __str__(self) -> str:
        return f'process {self.rank} (pid {self.pid} on {self.machine})'


class Heartbeat:
    """A thread that watches the other processes of a training.

    Those of its own machine it asks the system for. Of each machine, the first process watches the
    first ones of the others, through the store by which the processes have found each other.
    A process that waits without end for another one cannot notice by itself, and may wait for long.

    Args:
        group (ProcessGroup): All processes, through a backend for the CPU.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        machine = socket.gethostname()
        # two "machines" of torchrun may be on one host, and one host may have two names
        if 'GROUP_RANK' in os.environ:
            machine += f', node {os.environ["GROUP_RANK"]}'
        own = Peer(dist.get_rank(), machine, os.getpid())
        peers: list[Peer] = [own] * dist.get_world_size()
        dist.all_gather_object(peers, own, group=group)
        self.neighbours = [peer for peer in peers if peer.machine == machine and peer != own]
        leaders: dict[str, Peer] = {}
        for peer in peers:
            leaders.setdefault(peer.machine, peer)
        self.own = own
        self.others = [peer for peer in leaders.values() if peer != own]
        self.watches_machines = leaders[machine] == own and len(leaders) > 1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name='heartbeat', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        store = self._connect() if self.watches_machines else None
        stopped_since: dict[int, float] = {}
        heard: dict[int, tuple] = {peer.rank: (None, time.monotonic()) for peer in self.others}
        beat = 0
        while not self._ended.wait(INTERVAL):
            for peer in self.neighbours:
                self._look_at(peer, stopped_since)
            if store is not None:
                beat += 1
                self._listen(store, beat, heard)

    def _look_at(self, peer: Peer, stopped_since: dict[int, float]) -> None:
        state = process_state(peer.pid)
        if state is None or state in 'ZX':
            self._end(
                f'{peer} has ended; what it wrote last says why, or the system killed it '
                '(memory: dmesg)'
            )
        if state not in 'Tt':
            stopped_since.pop(peer.rank, None)
        elif (
            time.monotonic() - stopped_since.setdefault(peer.rank, time.monotonic())
            > STOPPED_SECONDS
        ):
            self._end(
                f'{peer} has been stopped for {STOPPED_SECONDS:.0f} s (SIGSTOP or a debugger)'
            )

    def _connect(self) -> dist.Store:
        store = dist.TCPStore(
            os.environ['MASTER_ADDR'],
            int(os.environ['MASTER_PORT']),
            is_master=False,
            timeout=timedelta(seconds=SILENT_SECONDS / 4),
        )
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        return dist.PrefixStore(f'groupmamba_heartbeat/{attempt}', store)

    def _listen(self, store: dist.Store, beat: int, heard: dict[int, tuple]) -> None:
        """Say that this machine is there, and hear of the others."""
        try:
            store.set(str(self.own.rank), str(beat))
            for peer in self.others:
                said = store.get(str(peer.rank)) if store.check([str(peer.rank)]) else None
                if said != heard[peer.rank][0]:
                    heard[peer.rank] = said, time.monotonic()
        except (dist.DistError, RuntimeError):
            pass  # the machine with the store is silent too: the times below say for how long
        for peer in self.others:
            silent = time.monotonic() - heard[peer.rank][1]
            if silent > SILENT_SECONDS:
                self._end(
                    f'the machine of {peer} has been silent for {silent:.0f} s: it is down, '
                    'its process has ended, or the network is'
                )

    def _end(self, text: str) -> None:
        if self._ended.is_set():
            return
        sys.stdout.flush()
        print(
            f'error: process {self.own.rank} ends, as {text}. Start again with --resume',
            file=sys.stderr,
            flush=True,
        )
        # The main thread may be waiting where no exception reaches it.
        os._exit(1)


def process_state(pid: int) -> str | None:
    """Ask Linux for the state of a process on this machine.

    Args:
        pid (int): Its id.

    Returns:
        str: A letter as in ``ps``, such as 'R', 'S', 'T' (stopped) or 'Z' (ended); None if there
        is no such process.
    """
    try:
        # the name before the state may hold spaces and parentheses
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
