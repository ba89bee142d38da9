"""mmengine's runner with checked checkpoints, and with several processes on CPUs."""

import gc
import importlib
import logging
import os
import re
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, is_distributed
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from groupmamba_mm.backbones.groupmamba import CUDA_GRAPH_MODES
from groupmamba_mm.checkpoint import (
    CheckpointError,
    expected_unused_keys,
    load_all_safely,
    load_checkpoint_file,
    load_matched,
    match_state_dict,
    state_dict_of,
)
from groupmamba_mm.checkpoint.matching import BATCH_COUNTERS, log_report, require_share
from groupmamba_mm.checkpoint.saving import newest_whole_checkpoint
from groupmamba_mm.errors import ConfigError, LaunchError

from .checkpointing import SafeCheckpointHook
from .config_checks import type_name
from .loops import AMP_ARGUMENTS
from .message_hub import DeferredMessageHub
from .optim import PLAIN_WRAPPERS, ZeroRedundancyOptimizer
from .provenance import describe_version
from .resuming import (
    position_meta,
    resume_at,
    schedules_of,
    warn_if_finished,
    warn_of_kept_schedule,
)
from .run_control import RunControlHook
from .run_log import ActionableFilter, keep_init_info_out, log_optimizer, log_run, names_of_hooks
from .train_loops import RESUMABLE_LOOPS

# Share of the model that ``load_from`` must fill when training starts from other weights: a new
# head may differ, a backbone alone is too little.
LOAD_FROM_MIN_SHARE = 0.8

# A process that is forked from this one, as the workers of a loader are, must not collect what is
# garbage here: pinned memory or a CUDA graph in it would end that process, where CUDA cannot run.
os.register_at_fork(after_in_child=gc.freeze)


@RUNNERS.register_module()
class CheckedRunner(Runner):
    """A runner that refuses checkpoints that do not fit and that also runs on several CPUs.

    It takes the arguments of :class:`mmengine.runner.Runner` and differs from it in this:

    - Checkpoints, those of ``init_cfg`` too, are read without running code. Testing and resuming
      need every tensor of the model, ``load_from`` in training a share of
      :data:`LOAD_FROM_MIN_SHARE`; the report is logged.
    - What a model needs for training alone, its method ``prepare_training`` gets before the data
      are read.
    - Without a GPU, processes started by torchrun, Slurm or MPI speak through gloo.
    - More processes than GPUs on a machine are refused before they wait for each other.
    - Without a GPU, a config with mixed precision trains in fp32 and says so.
    - What the package itself logs, such as the choice of the scan's backend, is in the run's log.
    - The host does not wait for the GPU in a step of training: see :class:`DeferredMessageHub`,
      :class:`.RunAheadHook`, which is a default hook, and the optimizer's wrappers.
    """

    _min_matched_share = 1.0
    _resuming = False
    _resumed_meta: dict[str, Any] = {}

    def train(self) -> nn.Module:
        """Train, see :meth:`mmengine.runner.Runner.train`.

        Returns:
            nn.Module: The trained model.
        """
        self._min_matched_share = LOAD_FROM_MIN_SHARE
        model = self.model.module if is_model_wrapper(self.model) else self.model
        if hasattr(model, 'prepare_training'):
            model.prepare_training()
        control = RunControlHook()
        self.register_hook(control)
        try:
            return super().train()
        finally:
            control.close()
            self._hooks.remove(control)
            for loop in (self._train_loop, self._val_loop):
                if isinstance(loop, BaseLoop):
                    end_workers(loop.dataloader)

    def val(self) -> dict:
        """Validate, see :meth:`mmengine.runner.Runner.val`.

        Returns:
            dict: The metrics.
        """
        self._min_matched_share = 1.0
        return super().val()

    def test(self) -> dict:
        """Test, see :meth:`mmengine.runner.Runner.test`.

        Returns:
            dict: The metrics.
        """
        self._min_matched_share = 1.0
        return super().test()

    def load_or_resume(self) -> None:
        """Load, or resume from the newest intact checkpoint of the work directory.

        A job that is requeued with ``--resume`` has no checkpoint yet when it starts first: this
        is said, and so is it when the training is finished.

        Raises:
            CheckpointError: If there are checkpoints and none of them is whole.
        """
        if not self._resume or self._load_from is not None or self._has_loaded:
            super().load_or_resume()
            return
        folders = [hook.folder(self) for hook in self.hooks if isinstance(hook, SafeCheckpointHook)]
        folder = (folders or [self.work_dir])[0]
        newest = newest_whole_checkpoint(folder, self.logger.warning)
        if newest is None:
            self.logger.warning(
                f'There is no checkpoint to resume in {folder}: training starts from the beginning.'
            )
            return
        self.resume(str(newest))
        warn_if_finished(self)

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'default',
    ) -> None:
        """Continue a training, see :meth:`mmengine.runner.Runner.resume`.

        Args:
            filename (str): The checkpoint.
            resume_optimizer (bool): Whether to resume the optimizer. Defaults to True.
            resume_param_scheduler (bool): Whether to resume the schedules. Defaults to True.
            map_location (str or Callable): Defaults to 'default', the current device.

        Raises:
            CheckpointError: If the checkpoint does not fit, or holds weights only.
        """
        self._min_matched_share = 1.0
        self._resuming = True
        of_config = schedules_of(self)
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        self._resuming = False
        warn_of_kept_schedule(self, of_config)
        resume_at(self, self._resumed_meta)

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: list = [(r'^module\.', '')],
    ) -> dict:
        """Load a checkpoint that was read safely and fits the model.

        Args:
            filename (str): A file or an ``http(s)://`` address.
            map_location (str or Callable): As in :func:`torch.load`. Defaults to 'cpu'.
            strict (bool): Whether every tensor of the model must match also when training starts
                from other weights. Defaults to False.
            revise_keys (list): Pairs of a pattern and its replacement for the keys. Defaults to
                taking 'module.' off their start.

        Returns:
            dict: The checkpoint.

        Raises:
            CheckpointError: If it cannot be read, does not fit, or, when training is resumed,
                holds weights only or an optimizer with other groups. The model is then unchanged.
        """
        checkpoint = load_checkpoint_file(filename, map_location)
        if self._resuming and not {'meta', 'message_hub'} <= checkpoint.keys():
            raise CheckpointError(
                f'checkpoint {filename} holds weights only (its keys: {list(checkpoint)[:5]}), so '
                'no training can be resumed from it; start from it with --cfg-options load_from='
            )
        if self._resuming:
            require_same_groups(checkpoint, self.optim_wrapper, filename)
        if 'state_dict' not in checkpoint:
            checkpoint = dict(state_dict=state_dict_of(checkpoint))
        checkpoint['state_dict'] = _revised(checkpoint['state_dict'], revise_keys)

        model = self.model
        # A model for test-time augmentation is saved without its wrapper, like a distributed one.
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        report = match_state_dict(
            model.state_dict(),
            checkpoint['state_dict'],
            expected_missing=[BATCH_COUNTERS],
            expected_unused=expected_unused_keys(model),
        )
        log_report(report, filename, self.logger)
        require_share(report, 1.0 if strict else self._min_matched_share, filename)

        if not self._resuming and self._min_matched_share < 1:
            # Training starts afresh from these weights, which are the averaged ones already, and a
            # hook would take the old average, old head included.
            checkpoint.pop('ema_state_dict', None)
            for key in set(checkpoint['state_dict']) - set(report.matched):
                del checkpoint['state_dict'][key]
        # Hooks see a checkpoint that fits. EMA exchanges the values of its tensors here.
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        load_matched(model, checkpoint['state_dict'], report)
        self._has_loaded = True
        self._resumed_meta = checkpoint.get('meta', {})
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, meta: dict | None = None, **kwargs: Any
    ) -> None:
        """Save a checkpoint, see :meth:`mmengine.runner.Runner.save_checkpoint`.

        All processes call this, the first one writes, and all of them fail if it cannot.

        Args:
            out_dir (str): The folder.
            filename (str): The name in it.
            *args: See mmengine's runner.
            meta (dict, optional): The epochs and iterations that are done, as 'epoch' and 'iter'.
            **kwargs: See mmengine's runner.

        Raises:
            CheckpointError: If the file cannot be written.
            NonFiniteError: If what would be saved is not finite.
        """
        for hook in self.hooks:
            if isinstance(hook, RunControlHook):
                hook.finish(self)
        meta = dict(meta or dict(epoch=self.epoch, iter=self.iter))
        meta.update(position_meta(self, meta), groupmamba_mm_version=describe_version())
        optimizer = getattr(self.optim_wrapper, 'optimizer', None)
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict()  # of all processes, to the one that writes
        failed = None
        try:
            super().save_checkpoint(out_dir, filename, *args, meta=meta, **kwargs)
        except CheckpointError as error:
            failed = str(error)
        if is_distributed():
            message = [failed]
            broadcast_object_list(message)
            (failed,) = message
        if failed is not None:
            raise CheckpointError(failed)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop of training, of mmengine's own kinds one that can begin anywhere.

        Args:
            loop (BaseLoop or dict): See :meth:`mmengine.runner.Runner.build_train_loop`.

        Returns:
            BaseLoop: The loop.
        """
        if isinstance(loop, dict):
            loop = dict(loop)
            if 'by_epoch' in loop and 'type' not in loop:
                loop['type'] = (
                    'EpochBasedTrainLoop' if loop.pop('by_epoch') else 'IterBasedTrainLoop'
                )
            loop['type'] = RESUMABLE_LOOPS.get(_name_of_type(loop['type']), loop['type'])
        return super().build_train_loop(loop)

    def setup_env(self, env_cfg: dict) -> None:
        """Set the process up, joining the others through gloo where there is no GPU.

        Args:
            env_cfg (dict): See :meth:`mmengine.runner.Runner.setup_env`.

        Raises:
            LaunchError: If this machine runs more processes than it has GPUs.
        """
        load_all_safely()
        if self.distributed:
            require_enough_gpus(self.launcher)
            dist_cfg = dict(env_cfg.get('dist_cfg', {}))
            if get_device() == 'cpu' and not is_distributed():
                init_cpu_processes(self.launcher, dist_cfg.get('timeout'))
            env_cfg = dict(env_cfg, dist_cfg=dict(dist_cfg, **store_of_restart()))
        super().setup_env(env_cfg)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Build the run's logger, and let the package's own one write where it writes.

        Args:
            *args: See :meth:`mmengine.runner.Runner.build_logger`.
            **kwargs: The same.

        Returns:
            MMLogger: The run's logger.
        """
        logger = super().build_logger(*args, **kwargs)
        package_logger = logging.getLogger('groupmamba_mm')
        package_logger.handlers[:] = logger.handlers
        package_logger.setLevel(logging.INFO)
        for handler in logger.handlers:
            handler.addFilter(ActionableFilter())
        return logger

    def _log_env(self, env_cfg: dict) -> None:
        log_run(self, env_cfg)

    def get_hooks_info(self) -> str:
        """List the hooks, see :meth:`mmengine.runner.Runner.get_hooks_info`.

        Returns:
            str: Their names in the order in which they are called.
        """
        return names_of_hooks(self.hooks)

    def _init_model_weights(self) -> None:
        model = self.model.module if is_model_wrapper(self.model) else self.model
        keep_init_info_out(model, self.log_dir)
        super()._init_model_weights()
        vars(model).pop('_dump_init_info', None)

    def build_message_hub(self, message_hub: dict | None = None) -> MessageHub:
        """Build what logged values are written to, see :class:`DeferredMessageHub`.

        Args:
            message_hub (dict, optional): Its arguments.

        Returns:
            MessageHub: The hub.
        """
        return DeferredMessageHub.get_instance(
            **{'name': self._experiment_name, **(message_hub or {})}
        )

    def register_default_hooks(self, hooks: dict[str, Hook | dict] | None = None) -> None:
        """Register the default hooks.

        :class:`.RunAheadHook` as ``run_ahead`` and :class:`.HealthHook` as ``health`` are among
        them, and :class:`.SafeCheckpointHook` stands for mmengine's own.

        Args:
            hooks (dict, optional): See :meth:`mmengine.runner.Runner.register_default_hooks`.
        """
        hooks = {'run_ahead': dict(type='RunAheadHook'), **(hooks or {})}
        if hooks['run_ahead'] is None:
            del hooks['run_ahead']
        checkpoint = hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
        if isinstance(checkpoint, dict) and _name_of_type(checkpoint['type']) == 'CheckpointHook':
            hooks['checkpoint'] = dict(checkpoint, type='SafeCheckpointHook')
        if not isinstance(hooks.get('health'), Hook):
            hooks['health'] = dict(dict(type='HealthHook'), **hooks.get('health') or {})
        super().register_default_hooks(hooks)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for several processes, on CPUs too.

        In :class:`FlatDataParallel`, or in DDP if the config has ``model_wrapper_cfg`` or
        ``find_unused_parameters=True``.

        Args:
            model_wrapper_cfg (dict, optional): Config of another wrapper.
            model (nn.Module): The model.

        Returns:
            nn.Module: The model, wrapped if there are several processes.
        """
        if self.distributed and not is_model_wrapper(model):
            if not model_wrapper_cfg and self.cfg.get('find_unused_parameters', False):
                model_wrapper_cfg = dict(find_unused_parameters=True)
            model_wrapper_cfg = dict(model_wrapper_cfg or dict(type='FlatDataParallel'))
            model_wrapper_cfg.setdefault('type', 'MMDistributedDataParallel')
            if model_wrapper_cfg['type'] == 'MMDistributedDataParallel':
                model_wrapper_cfg.setdefault('broadcast_buffers', False)  # as mmengine does
        if not self.distributed or get_device() != 'cpu' or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        # By name: mmcv has a class of its own.
        kinds = {type(module).__name__ for module in model.modules()}
        if self.cfg.get('sync_bn') or 'SyncBatchNorm' in kinds:
            self.logger.warning(
                'SyncBatchNorm needs GPUs: every process uses the statistics of '
                'its own images (BatchNorm) on these CPUs.'
            )
        model = revert_sync_batchnorm(model)
        return MODEL_WRAPPERS.build(model_wrapper_cfg, default_args=dict(module=model))

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate with the batch, accumulated steps counted, and say so.

        Args:
            optim_wrapper (OptimWrapper): Its learning rates are changed.
            auto_scale_lr (dict, optional): With ``enable`` and ``base_batch_size``.
        """
        if not (auto_scale_lr or {}).get('enable'):
            return
        base, loader = auto_scale_lr['base_batch_size'], self._train_dataloader
        images = loader['batch_size'] if isinstance(loader, dict) else loader.batch_size
        wrappers = (
            optim_wrapper.values()
            if isinstance(optim_wrapper, OptimWrapperDict)
            else [optim_wrapper]
        )
        for wrapper in wrappers:
            steps = getattr(wrapper, '_accumulative_counts', 1)
            size = images * self.world_size * steps
            before = wrapper.optimizer.param_groups[0]['lr']
            for group in wrapper.optimizer.param_groups:
                group['lr'] *= size / base
            self.logger.info(
                f'Learning rate scaled by {size / base:g}, from {before:g} to '
                f'{before * size / base:g}: an update is of {size} images '
                f'({images} in each of {self.world_size} processes, {steps} accumulated), and the '
                f'config is for {base}.'
            )

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        """Build the optimizer, in fp32 where there is no GPU.

        Args:
            optim_wrapper (OptimWrapper or dict): See
                :meth:`mmengine.runner.Runner.build_optim_wrapper`.

        Returns:
            OptimWrapper: The optimizer with its wrapper.

        Raises:
            ConfigError: If gradients are to be added up over steps of a backbone that is compiled
                to CUDA graphs: each replay writes its gradients over those of the one before.
        """
        if not isinstance(optim_wrapper, dict):
            return super().build_optim_wrapper(optim_wrapper)
        require_gradients_that_last(self.model, optim_wrapper)
        if get_device() == 'cpu':
            optim_wrapper = without_amp(optim_wrapper, self.logger)
        built = super().build_optim_wrapper(optim_wrapper)
        log_optimizer(built, self.logger)
        return built


def require_gradients_that_last(model: nn.Module, optim_wrapper: dict) -> None:
    """Refuse to add up gradients over steps that replay CUDA graphs.

    Args:
        model (nn.Module): What trains.
        optim_wrapper (dict): Config of an optimizer wrapper.

    Raises:
        ConfigError: If both are asked for.
    """
    count = optim_wrapper.get('accumulative_counts', 1)
    modes = [getattr(module, 'compile_mode', None) for module in model.modules()]
    replayed = [mode for mode in modes if mode in CUDA_GRAPH_MODES]
    if count > 1 and replayed:
        raise ConfigError(
            f'compile_mode={replayed[0]!r} with optim_wrapper.accumulative_counts={count}: CUDA '
            "graphs write each step's gradients over those of the step before; take "
            "compile_mode='default'"
        )


def require_same_groups(checkpoint: dict, optim_wrapper: OptimWrapper | dict, source: str) -> None:
    """Refuse to resume an optimizer whose parameters are grouped in another way.

    Args:
        checkpoint (dict): The checkpoint.
        optim_wrapper (OptimWrapper or dict): What trains now; one that is not built yet passes.
        source (str): Name of the checkpoint.

    Raises:
        CheckpointError: If the numbers of groups differ.
    """
    if not isinstance(optim_wrapper, OptimWrapper) or 'optimizer' not in checkpoint:
        return
    saved, built = (
        len(groups)
        for groups in (
            checkpoint['optimizer']['param_groups'],
            optim_wrapper.optimizer.param_groups,
        )
    )
    if saved != built:
        kind = 'Default' if saved > built else 'Merged'
        raise CheckpointError(
            f'the optimizer in checkpoint {source} has {saved} groups of parameters, the one of '
            f'this run has {built}; resume with the constructor that training was started with: '
            f'--cfg-options optim_wrapper.constructor={kind}OptimWrapperConstructor'
        )


def without_amp(optim_wrapper: dict, logger: logging.Logger) -> dict:
    """Turn the config of a mixed precision optimizer into its fp32 counterpart.

    Args:
        optim_wrapper (dict): Config of an optimizer wrapper.
        logger (logging.Logger): Told about the change.

    Returns:
        dict: The same config if its type is not in mixed precision, else a copy in fp32.
    """
    kind = type_name(optim_wrapper, 'OptimWrapper')
    if kind not in PLAIN_WRAPPERS:
        return optim_wrapper
    logger.warning(
        f'No GPU: training in fp32, not in the mixed precision of the config '
        f'({optim_wrapper.get("dtype", "float16")}).'
    )
    plain = {key: value for key, value in optim_wrapper.items() if key not in AMP_ARGUMENTS}
    return dict(plain, type=PLAIN_WRAPPERS[kind])


def processes_on_this_machine(launcher: str) -> int:
    """Count the processes that the launcher started on this machine.

    Args:
        launcher (str): 'pytorch', 'slurm' or 'mpi'.

    Returns:
        int: The number, 1 if the launcher does not say.
    """
    if launcher == 'slurm':
        # SLURM_TASKS_PER_NODE reads '8' or '8(x2),4'; SLURM_NTASKS_PER_NODE is set on request only.
        per_node = os.environ.get('SLURM_NTASKS_PER_NODE')
        per_node = per_node or os.environ.get('SLURM_TASKS_PER_NODE', '1')
        return int(per_node.split(',')[0].split('(')[0])
    variable = {'pytorch': 'LOCAL_WORLD_SIZE', 'mpi': 'OMPI_COMM_WORLD_LOCAL_SIZE'}[launcher]
    return int(os.environ.get(variable, 1))


def require_enough_gpus(launcher: str) -> None:
    """Refuse more processes than GPUs, on a machine whose GPUs are used.

    Args:
        launcher (str): 'pytorch', 'slurm' or 'mpi'.

    Raises:
        LaunchError: If a process would have no GPU of its own.
    """
    gpus = torch.cuda.device_count()
    processes = processes_on_this_machine(launcher)
    if 0 < gpus < processes:
        raise LaunchError(
            f'{processes} processes were started on a machine with {gpus} GPU(s) in sight; start '
            f'at most {gpus}, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU'
        )


def init_cpu_processes(launcher: str, timeout: int | None = None) -> None:
    """Join the processes of a launch through gloo.

    mmengine's own start asks for a GPU with every launcher.

    Args:
        launcher (str): 'pytorch', 'slurm' or 'mpi'. The last two get torch's environment variables
            from their own.
        timeout (int, optional): Seconds to wait for another process. Defaults to torch's.

    Raises:
        LaunchError: If the launcher's variables are not set.
    """
    names = {
        'slurm': dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID'),
        'mpi': dict(
            RANK='OMPI_COMM_WORLD_RANK',
            WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
            LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK',
        ),
        'pytorch': dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK'),
    }[launcher]
    unset = [name for name in names.values() if name not in os.environ]
    if unset:
        starter = {
            'slurm': 'tools/slurm_train.sh',
            'mpi': 'mpirun',
            'pytorch': 'tools/dist_train.sh',
        }[launcher]
        raise LaunchError(
            f'--launcher {launcher}: {", ".join(unset)} not set in the environment; '
            f'start with {starter}, or use --launcher none'
        )
    for name, source in names.items():
        os.environ[name] = os.environ[source]
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host()
    os.environ.setdefault('MASTER_PORT', '29500')
    options = {} if timeout is None else dict(timeout=timedelta(seconds=timeout))
    # Imported later, as DistributedDataParallel does, its functions would have the group for a
    # default argument and keep it, and with it gloo's threads, to the very end.
    importlib.import_module('torch.distributed.nn.functional')
    torch.distributed.init_process_group('gloo', **options, **store_of_restart())


def store_of_restart() -> dict[str, Any]:
    """Name a separate rendezvous store for processes that torchrun has restarted.

    torchrun keeps its store, in which the addresses of the processes that are gone still stand.

    Returns:
        dict: What ``init_process_group`` needs, nothing at the first start.
    """
    attempt = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    if attempt == 0 or os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return {}
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    store = torch.distributed.TCPStore(
        os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), world_size, is_master=False
    )
    return dict(
        store=torch.distributed.PrefixStore(f'restart_{attempt}', store),
        rank=rank,
        world_size=world_size,
    )


def end_workers(loader: DataLoader) -> None:
    """End the workers that a loader keeps between epochs.

    Left to the garbage collector, the queue that tells a worker to end may be gone before it is
    used, and each loader is then waited for without end for five seconds.

    Args:
        loader (DataLoader): The loader; it can be iterated over again.
    """
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def _name_of_type(kind: str | type) -> str:
    """Name a type as configs do, which is a class in one of mmengine's pure Python style."""
    return (kind if isinstance(kind, str) else kind.__name__).split('.')[-1]


def _first_host() -> str:
    """Name the machine of rank 0, which Slurm knows where there are several."""
    if int(os.environ.get('SLURM_NNODES', 1)) == 1:
        return '127.0.0.1'
    hosts = subprocess.run(
        ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return hosts.split()[0]


def _revised(state_dict: dict, revise_keys: list) -> dict:
    """Rename keys by patterns, keeping the modules' versions."""
    revised = {}
    for key, value in state_dict.items():
        for pattern, replacement in revise_keys:
            key = re.sub(pattern, replacement, key)
        revised[key] = value
    revised = OrderedDict(revised)
    revised._metadata = getattr(state_dict, '_metadata', OrderedDict())
    return revised
