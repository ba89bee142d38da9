"""Losses and gradients that are not finite: noticed without waiting for the GPU, explained, acted on."""

import os
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from groupmamba_mm.checkpoint.saving import newest_whole_checkpoint, save_new_file
from groupmamba_mm.errors import ConfigError, UserError

from .provenance import describe_version
from .randomness import seed_step

#: What follows when a loss or a gradient is not finite.
POLICIES = ('stop', 'skip', 'roll_back')

# Agreed on between processes as this minus the iteration, so that the first one is the largest.
_LAST_ITERATION = 2**62
# With fp16, a scale below this is one at which gradients overflow whatever it is.
_LEAST_LOSS_SCALE = 2.0**-10
_LOSS_SCALE_INTERVAL = 100
# Steps whose flags are on their way to the host at most.
_SLOTS = 64


class NonFiniteError(UserError, ArithmeticError):
    """A training whose loss or gradient is not finite."""


class RolledBack(Exception):
    """The runner went back to a checkpoint; its loop continues from there."""


@HOOKS.register_module()
class HealthHook(Hook):
    """Notice a loss or a gradient that is not finite, and keep it from the weights.

    An update with such a gradient is left out, on a GPU without waiting for it where the optimizer
    is fused. Some steps later all processes know, and one of these follows:

    - 'stop': the step is repeated to name the first module and tensor that were not finite; the
      weights before it, its batch and its random numbers are saved for ``replay_step.py``; the
      training ends. Checkpoints are whole and from before.
    - 'skip': the step is named in the log and the training continues. BatchNorm's statistics are set
      back too.
    - 'roll_back': the training continues from its newest checkpoint and leaves that update out.

    With fp16 and a loss scale, gradients overflow now and then, and the scaler leaves these steps
    out: then the loss counts here, and a scale so small that it cannot be the reason.

    The runner registers it in every training; ``default_hooks.health`` has its arguments.

    Args:
        policy (str): One of the three. Defaults to 'stop'.
        max_events (int): So many steps in all may be skipped or rolled back before the training
            stops. Defaults to 20.

    Raises:
        ConfigError: If an argument has another value.
    """

    priority = 'VERY_HIGH'  # before anything that could read or save what is not finite

    def __init__(self, policy: str = 'stop', max_events: int = 20) -> None:
        if policy not in POLICIES:
            raise ConfigError(
                f'default_hooks.health.policy must be one of {list(POLICIES)}, got {policy!r}'
            )
        if max_events < 0:
            raise ConfigError(
                f'default_hooks.health.max_events must be 0 or more, got {max_events}'
            )
        self.policy = policy
        self.max_events = max_events
        self.events = 0
        self.left_out: set = set()
        self._handles: list[Any] = []
        self._clear()

    def _clear(self) -> None:
        self._pending: deque[tuple[int, int, torch.cuda.Event | None]] = deque()
        self._failed: int | None = None
        self._reason: str | None = None
        self._tripped: Tensor | None = None
        self._bad_gradient: Tensor | None = None

    def before_train(self, runner: Runner) -> None:
        """Look at the gradients before each update from now on.

        Args:
            runner (Runner): The runner.
        """
        self._runner = runner
        # read as an array: the copy is there once its event is
        self._host = torch.zeros(_SLOTS, dtype=torch.bool, pin_memory=torch.cuda.is_available())
        self._host_view = self._host.numpy()
        self._buffers: list[Tensor] = []
        if self.policy == 'skip':
            self._buffers = [
                buffer for buffer in runner.model.buffers() if buffer.is_floating_point()
            ]
        self._saved_buffers = [buffer.clone() for buffer in self._buffers]
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        optimizer = runner.optim_wrapper.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]

    def after_train(self, runner: Runner) -> None:
        """Let the optimizer alone again.

        Args:
            runner (Runner): The runner.
        """
        self.close()

    def close(self) -> None:
        """Let the optimizer alone again, also after an error."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Remember the buffers that a step may spoil.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch, unused.
            data_batch (Any): The batch, unused.
        """
        self._bad_gradient = None
        if self._buffers:
            torch._foreach_copy_(self._saved_buffers, self._buffers)

    def _before_update(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """Leave an update out whose gradients are not finite."""
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group['params']
            if parameter.grad is not None
        ]
        if self._runner.iter in self.left_out:
            _drop_gradients(parameters)
            return
        if not parameters or self._scaler is not None:
            return
        wrapper = self._runner.optim_wrapper
        clips = bool(getattr(wrapper, 'clip_grad_kwargs', None))
        norm = getattr(wrapper, 'gradient_norm', None) if clips else None
        if norm is None:
            norms = torch._foreach_norm([parameter.grad for parameter in parameters], float('inf'))
            device = parameters[0].device
            norm = torch.stack([one.to(device, torch.float32) for one in norms]).max()
        bad = ~norm.isfinite()
        self._bad_gradient = bad
        if self.policy != 'skip' and self._tripped is not None:
            bad = bad | self._tripped  # the weights stay as they were at the first such step
        self._tripped = bad
        if getattr(optimizer, '_step_supports_amp_scaling', False):  # as torch's GradScaler asks
            optimizer.found_inf = bad.float()  # the kernel then changes nothing
            for buffer, saved in zip(self._buffers, self._saved_buffers):
                buffer.copy_(torch.where(bad, saved, buffer))
        elif bad:  # the host waits
            _drop_gradients(parameters)
            for buffer, saved in zip(self._buffers, self._saved_buffers):
                buffer.copy_(saved)

    def _after_update(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        if self._scaler is None and hasattr(optimizer, 'found_inf'):
            del optimizer.found_inf

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Note whether the step was finite, to be read later.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch, unused.
            data_batch (Any): The batch, unused.
            outputs (dict, optional): The losses.
        """
        if runner.iter in self.left_out:
            return
        flags = [
            ~value.detach().isfinite().all()
            for key, value in (outputs or {}).items()
            if 'loss' in key and isinstance(value, Tensor)
        ]
        if self._bad_gradient is not None:
            flags.append(self._bad_gradient)
        if self._scaler is not None and (runner.iter + 1) % _LOSS_SCALE_INTERVAL == 0:
            scale = self._scaler.get_scale()
            if scale < _LEAST_LOSS_SCALE:
                self._reason = (
                    f'the loss scale has fallen to {scale:g}, so the gradients overflow '
                    'at every step; train in bf16 (--amp bf16)'
                )
            flags.append(torch.tensor(self._reason is not None))
        if not flags:
            return
        # the GPU's, if there is one: nothing is to wait for it
        device = max((flag.device for flag in flags), key=lambda device: device.type == 'cuda')
        slot = runner.iter % len(self._host_view)
        if len(self._pending) == len(self._host_view):
            self.failure_code(wait=True)
        self._host[slot].copy_(
            torch.stack([one.to(device) for one in flags]).any(), non_blocking=True
        )
        event = None
        if device.type == 'cuda':
            event = torch.cuda.Event()
            event.record()
        self._pending.append((runner.iter, slot, event))

    def failure_code(self, wait: bool = False) -> int:
        """Say whether a step was found that was not finite.

        Args:
            wait (bool): Whether to wait for what the GPU has not computed yet.

        Returns:
            int: 0, or a number that is the larger the earlier the step was.
        """
        while self._pending and self._failed is None:
            iteration, slot, event = self._pending[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    break
            self._pending.popleft()
            if self._host_view[slot]:
                self._failed = iteration
        return 0 if self._failed is None else _LAST_ITERATION - self._failed

    def act(self, runner: Runner, failure: int, group: dist.ProcessGroup | None) -> None:
        """Do what the policy says. All processes call this at the same step.

        Args:
            runner (Runner): The runner.
            failure (int): What they agreed on, see :meth:`failure_code`.
            group (ProcessGroup, optional): Through which they speak.

        Raises:
            NonFiniteError: If the training stops.
            RolledBack: If it continues from a checkpoint.
        """
        iteration = _LAST_ITERATION - failure
        self.events += 1
        if self.policy == 'skip' and self.events <= self.max_events:
            runner.logger.warning(
                f'the loss or a gradient of iteration {iteration + 1} was not finite: its update '
                f'was left out ({self.events} of at most {self.max_events})'
            )
            self._failed = None
            return
        if self.policy == 'roll_back' and self.events <= self.max_events:
            self._roll_back(runner, iteration)
        report = self._reason or explain_step(runner, iteration)
        found = _gather((report, self._save(runner, iteration, report) if report else None), group)
        texts = [
            f'{text}{f" (process {rank})" if len(found) > 1 else ""}; replay it with python '
            f'tools/analysis_tools/replay_step.py CONFIG {file}'
            for rank, (text, file) in enumerate(found)
            if text
        ]
        limit = (
            ''
            if self.policy == 'stop'
            else (
                f', and {self.max_events} such steps were left out before '
                '(default_hooks.health.max_events)'
            )
        )
        raise NonFiniteError(
            f'the loss or a gradient of iteration {iteration + 1} is not finite{limit}: '
            + (
                texts[0]
                if texts
                else 'repeating the step gave finite numbers, so it was another '
                'process, or it depends on the order of sums'
            )
            + '. No checkpoint holds it. Lower the learning rate, clip the gradients, or set '
            'default_hooks.health.policy to skip or roll_back'
        )

    def _roll_back(self, runner: Runner, iteration: int) -> None:
        folder = runner.work_dir
        for hook in runner.hooks:
            folder = hook.folder(runner) if hasattr(hook, 'folder') else folder
        newest = newest_whole_checkpoint(folder, runner.logger.warning)
        if newest is None:
            raise NonFiniteError(
                f'the loss or a gradient of iteration {iteration + 1} is not finite, and there is '
                f'no checkpoint in {folder} to roll back to; save earlier: --checkpoint-minutes'
            )
        runner.logger.warning(
            f'the loss or a gradient of iteration {iteration + 1} was not finite: going back to '
            f'{newest}, and leaving that update out ({self.events} of at most {self.max_events})'
        )
        self._clear()
        self.left_out.add(iteration)
        runner.optim_wrapper.zero_grad()
        runner._resume = True  # mmengine's EMA hook asks
        runner.resume(str(newest))
        runner.optim_wrapper.initialize_count_status(runner.model, runner.iter, runner.max_iters)
        raise RolledBack

    def _save(self, runner: Runner, iteration: int, report: str) -> str:
        """Save what the step was made of."""
        file = os.path.join(
            runner.work_dir, f'nonfinite_iter_{iteration + 1}_process_{get_rank()}.pth'
        )
        step = dict(
            iteration=iteration,
            seed=runner.seed,
            rank=get_rank(),
            world_size=get_world_size(),
            report=report,
            version=describe_version(),
        )
        if os.path.exists(file):
            os.remove(file)
        save_new_file(
            dict(
                meta=step,
                state_dict=_bare(runner.model).state_dict(),
                batch=runner.train_loop.batches.load_again(iteration),
            ),
            file,
        )
        return file


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None  # torch's optimizers pass over such parameters


def _bare(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _gather(item: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [item]
    items = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def explain_step(runner: Runner, iteration: int) -> str | None:
    """Repeat a training step and find what was not finite first.

    Args:
        runner (Runner): The runner, with the weights from before the step.
        iteration (int): The step.

    Returns:
        str: The module and the tensor; None if all of it is finite.
    """
    batch = runner.train_loop.batches.load_again(iteration)
    return first_nonfinite(
        _bare(runner.model), runner.optim_wrapper, batch, runner.seed, iteration, get_rank()
    )


def first_nonfinite(
    model: nn.Module, optim_wrapper: OptimWrapper, batch: Any, seed: int, iteration: int, rank: int
) -> str | None:
    """Run one training step of a model without its update, and find what was not finite first.

    Args:
        model (nn.Module): The model, without a wrapper.
        optim_wrapper (OptimWrapper): Whose precision the step has.
        batch (Any): As its loader gives it.
        seed (int): The run's.
        iteration (int): The step, for its random numbers.
        rank (int): The process's number, for the same.

    Returns:
        str: The module and the tensor; None if all of it is finite.
    """
    for name, tensor in model.named_parameters():  # the step has spoilt BatchNorm's statistics
        if not _finite(tensor):
            return f'the weights before it hold {_describe(tensor)} in {name}'
    text = _first_in_batch(batch)
    if text is not None:
        return text
    watch = _Watch(model)
    eager = (
        torch.compiler.set_stance('force_eager')
        if hasattr(torch.compiler, 'set_stance')
        else nullcontext()
    )
    model.train()
    seed_step(seed, iteration, rank)
    with ExitStack() as stack:
        stack.enter_context(eager)
        stack.callback(watch.close)
        stack.callback(model.zero_grad)
        losses = model.train_step(batch, optim_wrapper=_BackwardOnly(optim_wrapper))
        if watch.first is not None:
            return watch.first
        for name, value in losses.items():
            if isinstance(value, Tensor) and not _finite(value):
                return f'{name} is {_describe(value)} while all that modules returned is finite'
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not _finite(parameter.grad):
                return f'the gradient of {name} has {_describe(parameter.grad)}'
    return None


class _BackwardOnly:
    """Stands for an optimizer whose weights do not change.

    Args:
        optim_wrapper (OptimWrapper): Whose precision is taken.
    """

    def __init__(self, optim_wrapper: OptimWrapper) -> None:
        self.optim_context = optim_wrapper.optim_context

    def update_params(self, loss: Tensor) -> None:
        """Compute the gradients.

        Args:
            loss (Tensor): The loss.
        """
        loss.backward()


class _Watch:
    """Look at what each module returns, and at its gradient.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.first: str | None = None
        self._handles = [
            module.register_forward_hook(self._forward_hook(name or 'the model', module))
            for name, module in model.named_modules()
        ]

    def close(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, name: str, module: nn.Module) -> Callable:
        place = f'{name} ({type(module).__name__})'

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for path, tensor in _tensors(output):
                self._note(tensor, f'the output{path} of {place}')
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda gradient, path=path: self._note(
                            gradient, f'the gradient by the output{path} of {place}'
                        )
                    )

        return look

    def _note(self, tensor: Tensor, what: str) -> None:
        if self.first is None and not _finite(tensor):
            self.first = f'{what} is the first that is not finite: {_describe(tensor)}'


def _first_in_batch(batch: Any) -> str | None:
    for path, tensor in _tensors(batch):
        if not _finite(tensor):
            return f'its batch holds {_describe(tensor)} in batch{path}'
    return None


def _tensors(value: Any, path: str = '') -> list[tuple[str, Tensor]]:
    """List the floating point tensors in nested containers, each with its place."""
    if isinstance(value, Tensor):
        return [(path, value)] if value.is_floating_point() else []
    if isinstance(value, dict):
        items = [(f'[{key!r}]', part) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f'[{index}]', part) for index, part in enumerate(value)]
    else:
        items = []
    return [found for name, part in items for found in _tensors(part, path + name)]


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def _describe(tensor: Tensor) -> str:
    bad = int((~tensor.detach().isfinite()).sum())
    kind = 'NaN' if tensor.detach().isnan().any() else 'infinite'
    return f'{bad} of {tensor.numel()} values {kind}, {str(tensor.dtype).removeprefix("torch.")}'
