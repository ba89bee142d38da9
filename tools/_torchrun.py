"""torchrun, which ends as its processes do: with their last line, and with their exit code."""

import logging
import signal
import sys

import _environment  # noqa: F401
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from groupmamba_mm.engine.run_control import EXIT_STOPPED

if __name__ == '__main__':
    # it repeats, after a process's own last line, that the process failed
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    try:
        main()
    except SignalException:
        sys.exit(EXIT_STOPPED)  # its processes have got the signal, and saved
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f'error: process {rank} (pid {failure.pid}) was ended by {name}', file=sys.stderr)
        sys.exit(abs(failure.exitcode))
