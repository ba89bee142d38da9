"""How the commands end when something is wrong: with one line that says what and what to do."""

import argparse
import gc
import inspect
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import mmengine.registry
import torch
from mmengine.config import DictAction
from mmengine.dist import barrier, is_distributed, is_main_process
from mmengine.registry import Registry

from groupmamba_mm.errors import UserError

from .config_checks import close_to
from .run_control import EXIT_STOPPED, RunStopped
from .run_log import import_formatter, quiet_debug_prints, quiet_warnings
from .warm_up import local_rank

# A worker's error reaches the main process as text that ends with 'package.Class: message'.
_WORKER_MARK = 'Original Traceback (most recent call last)'


class _CfgOptions(DictAction):
    """``--cfg-options key=value ...``, where a part without '=' is a usage error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string}: {value!r} is no key=value')
            try:
                self._parse_iterable(value.partition('=')[2])
            except (AssertionError, RecursionError):  # all that mmengine says of brackets
                parser.error(
                    f'{option_string}: cannot read {value!r}; lists are written [a,b] with every '
                    'bracket closed, and the entries of a dict one by one, as key.entry=value'
                )
        super().__call__(parser, namespace, values, option_string)


def add_cfg_options(parser: argparse.ArgumentParser, help: str = 'change the config') -> None:
    """Add ``--cfg-options``, which changes a command's config.

    Args:
        parser (argparse.ArgumentParser): The command's parser.
        help (str): What it is for.
    """
    parser.add_argument(
        '--cfg-options', nargs='+', action=_CfgOptions, default={}, metavar='KEY=VALUE', help=help
    )


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share.

    Args:
        parser (argparse.ArgumentParser): The command's parser.
    """
    parser.add_argument(
        '--work-dir',
        help='folder for logs and results; default: the '
        "config's work_dir, else ./work_dirs/<name of the config>",
    )
    add_cfg_options(
        parser,
        'change the config, for example train_cfg.max_epochs=10 '
        'optim_wrapper.optimizer.lr=5e-4; lists as key="[a,b]" without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes; dist_*.sh and slurm_*.sh set it',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        choices=['bf16', 'fp16', 'off'],
        const='bf16',
        help='mixed precision, bf16 unless fp16 is given; off: fp32; on a CPU, '
        'training is in fp32. Default: what the config says',
    )
    # torch.distributed.launch passes one or the other by its age; torchrun uses the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)


def is_first_here() -> bool:
    """Whether this is the first process of a launch on this machine.

    It alone compares data with files: annotations of COCO take gigabytes while they are read.
    """
    return local_rank() == 0


def run_command(main: Callable[[], None]) -> None:
    """Run a command and end it with exit code 1 and a last line ``error: ...`` if it fails.

    Args:
        main (Callable): The command. A :class:`UserError` is shown without its traceback, another
            exception with it.
    """
    quiet_debug_prints()
    quiet_warnings()
    import_formatter()
    gc.set_threshold(700)  # Python's own; tools/_environment.py raises it while modules are read
    gc.freeze()  # what was imported stays, so that no collection walks over it
    try:
        main()
        _leave_together()
    except RunStopped as stop:
        message = str(stop) if is_main_process() else ''
        _leave_together()
        _end(message, EXIT_STOPPED)
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        _end('error: interrupted; start again with --resume to continue', 130)
    except Exception as error:
        traceback.print_exc()
        _fail(error)


def _leave_together() -> None:
    """Wait for the other processes: one that ends early can pull gloo from under the rest.

    Gloo's threads end with the last reference to the group. Alive while the interpreter shuts down,
    they can abort the process (pytorch/pytorch#179291), which looks like a failed training.
    """
    if is_distributed():
        gc.collect()  # the runner is full of cycles, and its model's wrapper holds the group
        barrier()
        torch.distributed.destroy_process_group()


def _fail(error: BaseException) -> None:
    _end(f'error: {explain(error)}', 1)


def _end(message: str, code: int) -> None:
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def explain(error: BaseException) -> str:
    """Say in one line what went wrong and what to do.

    Args:
        error (BaseException): The exception.

    Returns:
        str: Its innermost cause's message, with a remedy for the mistakes that configs hold.
    """
    cause = _innermost(error)
    return _one_line(
        cause_of(error)
        or f'{type(cause).__name__}: {_message(cause)}; the traceback above says where'
    )


def cause_of(error: BaseException) -> str | None:
    """Name the cause of an error that the user can mend.

    Args:
        error (BaseException): The exception.

    Returns:
        str | None: What is wrong and the remedy, None if that is not known.
    """
    if isinstance(error, UserError):
        return _message(error)
    # The places where an argument went wrong are in the outer error, if it was raised from another.
    cause = _innermost(error)
    return _wrong_config(cause) or _unsafe_checkpoint(cause) or _network_or_memory(cause)


def _one_line(text: str) -> str:
    return ' '.join(text.split())


def _innermost(error: BaseException) -> BaseException:
    while True:
        deeper = error.__cause__
        if deeper is None and not error.__suppress_context__:
            deeper = error.__context__
        if deeper is None:
            return error
        error = deeper


def _message(error: BaseException) -> str:
    """Read an exception's text, and the last line of it when a worker sent it."""
    # str() of a KeyError puts quotes around the text.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if _WORKER_MARK in text:
        text = text.strip().splitlines()[-1]
        text = re.sub(r'^[\w.]*(Error|Exception): ', '', text)
    return text or type(error).__name__


def _wrong_config(cause: BaseException) -> str | None:
    """Compare what a config asks for with what the registry that was building it knows."""
    frame = _frame_of(cause.__traceback__, 'build_from_cfg')
    if frame is None or not isinstance(cause, (KeyError, TypeError)):
        return None
    name, arguments = frame.get('obj_type'), frame.get('args') or {}
    kind, owner = frame['registry'].name, frame.get('obj_cls')
    if isinstance(name, str) and owner is None:
        known = [
            known
            for registry in vars(mmengine.registry).values()
            if isinstance(registry, Registry) and registry.name == kind
            for known in _registered_names(registry)
        ]
        hint = close_to(name.split('.')[-1], known)
        return (
            f'there is no {kind} with the type {name!r}; {hint} If it is '
            'spelt right, the module that defines it was not imported: add it to custom_imports '
            'in the config'
        )
    if not callable(owner) or not isinstance(cause, TypeError):
        return None
    parameters = inspect.signature(owner).parameters
    unknown = [key for key in arguments if key not in parameters]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # one that its own bases refuse is named in the message alone
    refused = [key for key in unknown if not open_ended or f"'{key}'" in str(cause)]
    absent = [
        key
        for key, p in parameters.items()
        if p.default is p.empty
        and key not in arguments
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if refused:
        known = [
            name
            for base in getattr(owner, '__mro__', [owner])
            for name in inspect.signature(base).parameters
            if base is not object
        ]
        hint = close_to(refused[0], known) or 'remove it from the config'
        return f'{owner.__name__} takes no argument {refused[0]!r}; {hint}'
    if absent:
        return f'{owner.__name__} needs the argument {absent[0]!r}; add it to the config'
    return None


def _registered_names(registry: Registry) -> list[str]:
    names = list(registry.module_dict)
    for child in registry.children.values():
        names += _registered_names(child)
    return names


def _frame_of(trace: TracebackType | None, function: str) -> dict[str, Any] | None:
    """The variables of the innermost call of a function in a traceback."""
    found = None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == function:
            found = trace.tb_frame.f_locals
        trace = trace.tb_next
    return found


def _unsafe_checkpoint(cause: BaseException) -> str | None:
    """Explain what a checkpoint of a library's model zoo ends in, which torch itself refuses."""
    if not isinstance(cause, pickle.UnpicklingError):
        return None
    first_line = str(cause).partition('\n')[0]
    return (
        'a file was not loaded: it is damaged, or asks for what could run code '
        f'({first_line}); the log above names it. Download it again, or do not use it'
    )


def _network_or_memory(cause: BaseException) -> str | None:
    message = _message(cause).partition('\n')[0]
    if isinstance(cause, torch.OutOfMemoryError):
        return f'{message} Lower train_dataloader.batch_size or the image size, or train with --amp'
    if isinstance(cause, torch.distributed.DistNetworkError):
        place = ':'.join(os.environ.get(name, '?') for name in ('MASTER_ADDR', 'MASTER_PORT'))
        return (
            f'the processes cannot meet at {place} ({message}); if another launch has this port, '
            'choose another one, for example PORT=29511, else check that the first machine is up '
            'and can be reached'
        )
    return None
