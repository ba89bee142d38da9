"""Short logs: a summary of the run, and the details in files beside the log."""

import functools
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import mmengine.logging
import platformdirs
import torch
from filelock import FileLock
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.utils.dl_utils import collect_env
from torch import nn

from .provenance import describe_version

# What libraries warn of and nobody can act upon: our own or their own use of what will change, and
# names that metrics and data sets need not have.
_NOT_ACTIONABLE = (
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
    'has no metainfo',
    'Exp name: ',
    # said in short by log_optimizer
    'paramwise_options -- ',
    'all SyncBatchNorm (SyncBN) layers in the model will be',
)


# The same, of Python's warnings: how they begin.
_NOT_ACTIONABLE_WARNINGS = (
    'Default ``avg_non_ignore`` is False',  # of each loss, whatever its config says
    'The draw is False',
    'The shape of value will convert',
    'Setting (OMP|MKL)_NUM_THREADS',
    'faster_coco_eval is not installed',
)


class ActionableFilter(logging.Filter):
    """Passes only what a user can act upon."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide about one record.

        Args:
            record (logging.LogRecord): The record.

        Returns:
            bool: Whether it is written.
        """
        text = record.getMessage()
        return not any(part in text for part in _NOT_ACTIONABLE)


def quiet_debug_prints() -> None:
    """Let libraries' debug messages be debug messages.

    Without a logger, mmengine prints a message whatever its level is. The libraries print so that
    a package of another company could not be imported.
    """
    original = mmengine.logging.print_log

    def print_log(msg: Any, logger: Any = None, level: int = logging.INFO) -> None:
        if logger is not None or level > logging.DEBUG:
            original(msg, logger, level)

    mmengine.logging.print_log = print_log


def quiet_warnings() -> None:
    """Leave out warnings of libraries that nobody can act upon."""
    for text in _NOT_ACTIONABLE_WARNINGS:
        warnings.filterwarnings('ignore', message=text)


def import_formatter() -> None:
    """Import what mmengine formats configs with, one process of this user at a time.

    yapf writes its grammar to the user's cache at its first import. Processes that import it at
    once, as the first launch on a machine does, would read halves of that file.
    """
    folder = Path(platformdirs.user_cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / 'groupmamba_mm_formatter.lock'):
            import yapf
    except OSError:  # read-only: yapf writes nothing either
        import yapf  # noqa: F401


@functools.cache
def _environment() -> dict[str, Any]:
    return collect_env()  # which runs two compilers


@master_only
def log_run(runner: Runner, env_cfg: dict[str, Any]) -> None:
    """Log a summary of a run, and write its environment and config to files beside the log.

    Args:
        runner (Runner): The runner.
        env_cfg (dict): The config's ``env_cfg``.
    """
    folder = Path(runner.log_dir)
    # the compiler's flags are a page of their own
    env = _environment()
    lines = [f'{key}: {value}' for key, value in {**env, **env_cfg}.items()]
    (folder / 'environment.txt').write_text('\n'.join(lines) + '\n')
    files = 'environment.txt'
    if runner.cfg._cfg_dict:
        (folder / 'config.py').write_text(runner.cfg.pretty_text)
        files += ' and config.py'
    if torch.cuda.is_available():
        device = f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    else:
        device = f'CPU, {torch.get_num_threads()} thread(s)'
    runner.logger.info(
        f'groupmamba_mm {describe_version()}, torch {torch.__version__}, mmengine '
        f'{mmengine.__version__}; {runner.world_size} process(es) by launcher {runner.launcher}, '
        f'{device} each; seed {runner.seed}. {files} are in {os.path.relpath(folder)}'
    )


def log_optimizer(optim_wrapper: OptimWrapper, logger: logging.Logger) -> None:
    """Log the parameter groups, in a line for each set of options.

    Args:
        optim_wrapper (OptimWrapper): The optimizer with its wrapper.
        logger (logging.Logger): Where it is logged.
    """
    sets: dict[str, int] = {}
    for group in optim_wrapper.optimizer.param_groups:
        options = f'lr {group["lr"]:g}, weight decay {group.get("weight_decay", 0):g}'
        sets[options] = sets.get(options, 0) + len(group['params'])
    logger.info(
        f'{type(optim_wrapper.optimizer).__name__}: '
        + '; '.join(f'{count} tensors with {options}' for options, count in sets.items())
    )


def names_of_hooks(hooks: Any) -> str:
    """List hooks in the order in which they are called.

    Args:
        hooks (Iterable[Hook]): The hooks.

    Returns:
        str: Their names in a line.
    """
    return ', '.join(type(hook).__name__ for hook in hooks if isinstance(hook, Hook))


def keep_init_info_out(model: nn.Module, folder: str) -> None:
    """Write how each weight was initialised into a separate file.

    mmengine writes several lines for each into the log.

    Args:
        model (nn.Module): The model, not initialised yet.
        folder (str): Where ``initialization.txt`` is written.
    """

    @master_only
    def write() -> None:
        lines = [
            f'{name} {tuple(parameter.shape)}: '
            f'{model._params_init_info[parameter]["init_info"].strip()}'
            for name, parameter in model.named_parameters()
        ]
        Path(folder, 'initialization.txt').write_text('\n'.join(lines) + '\n')

    if hasattr(model, '_dump_init_info'):
        model._dump_init_info = write
