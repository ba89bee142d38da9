"""What a resumed training takes from its checkpoint, and warnings about the rest."""

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import gather, get_rank, get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

# What counts steps in the state of a schedule; the rest of it is the schedule itself.
_COUNTERS = ('last_step', '_global_step', '_last_value', 'verbose')


def total_batch_size(runner: Runner) -> int:
    """Count the images of a step over all processes.

    Args:
        runner (Runner): A runner that trains.

    Returns:
        int: The number.
    """
    return runner.world_size * runner.train_dataloader.batch_sampler.batch_size


def position_meta(runner: Runner, meta: dict[str, Any]) -> dict[str, Any]:
    """Add to a checkpoint's meta where in the data its training is.

    Args:
        runner (Runner): The runner.
        meta (dict): The epochs and iterations that are done, as 'epoch' and 'iter'.

    Returns:
        dict: The additions.
    """
    loop = runner.train_loop
    # at an epoch's end, the checkpoint counts the epoch that the loop is still in
    done = meta['iter'] - loop.epoch_start if meta['epoch'] == loop.epoch else 0
    return dict(
        batches_done=done,
        total_batch_size=total_batch_size(runner),
        validated_iter=loop.validated_iter,
        gradients=_summed_gradients(runner),
    )


def _summed_gradients(runner: Runner) -> dict[str, list[torch.Tensor]]:
    """Collect the gradients between two updates, which accumulation makes out of several steps.

    Each process has its own until the update averages them, and the first one gets them all.
    """
    if runner.optim_wrapper.should_update():
        return {}
    gradients = {
        name: gather(parameter.grad)
        for name, parameter in _unwrapped(runner).named_parameters()
        if parameter.grad is not None
    }
    return {name: [one.cpu().clone() for one in several] for name, several in gradients.items()}


def _unwrapped(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def resume_at(runner: Runner, meta: dict[str, Any]) -> None:
    """Set a runner's loop to where a checkpoint was saved.

    With another total batch size, the epoch continues after the images that were seen. A training
    that counts epochs then counts its iterations, also those of its schedules, anew from that.

    Args:
        runner (Runner): The runner, whose schedules are resumed.
        meta (dict): The checkpoint's.
    """
    loop, epoch, iteration = runner.train_loop, meta['epoch'], meta['iter']
    # mmengine's own checkpoints
    done = meta.get('batches_done')
    if done is None:
        done = iteration if loop.endless else iteration - epoch * len(runner.train_dataloader)
    saved, now = meta.get('total_batch_size'), total_batch_size(runner)
    if saved not in (None, now):
        runner.logger.warning(
            f'the checkpoint was saved with {saved} images a step, this run has {now}: the epoch '
            'goes on after the images that were seen, and the learning rate is what it was, which '
            'may not suit'
        )
        done = done * saved // now
        if not loop.endless:
            ratio = saved / now
            iteration = epoch * len(runner.train_dataloader) + done
            for schedule in _schedules(runner):
                if not schedule.by_epoch:
                    for key in (
                        'begin',
                        'end',
                        'total_iters',
                        'T_max',
                        'last_step',
                        '_global_step',
                        'step_size',
                    ):
                        if key in vars(schedule):
                            setattr(schedule, key, round(getattr(schedule, key) * ratio))
    loop.resume_at(epoch, iteration, done, meta.get('validated_iter', iteration))
    gradients = meta.get('gradients', {})
    for name, parameter in _unwrapped(runner).named_parameters():
        if name in gradients:
            several = gradients[name]
            own = (
                several[get_rank()]
                if len(several) == get_world_size()
                else torch.stack(several).mean(0)
            )
            parameter.grad = own.to(parameter)


def schedules_of(runner: Runner) -> list[dict[str, Any]]:
    """Copy the states of a runner's schedules.

    Args:
        runner (Runner): The runner.

    Returns:
        list[dict]: The states.
    """
    return [dict(schedule.state_dict()) for schedule in _schedules(runner)]


def _schedules(runner: Runner) -> Iterator[Any]:
    built = runner.param_schedulers or []
    groups = built.values() if isinstance(built, dict) else [built]
    for group in groups:
        yield from group


def warn_of_kept_schedule(runner: Runner, of_config: list[dict[str, Any]]) -> None:
    """Warn if the schedule in a checkpoint differs from the config's.

    Args:
        runner (Runner): The runner, resumed.
        of_config (list[dict]): The schedules as the config has them.
    """
    differences = []
    for schedule, asked in zip(_schedules(runner), of_config):
        kept = schedule.state_dict()
        differences += [
            f'{type(schedule).__name__}.{key}={_short(kept[key])} (config: {_short(value)})'
            for key, value in asked.items()
            if key not in _COUNTERS and key in kept and kept[key] != value
        ]
    if not differences:
        return
    ends = [
        schedule.end / (1 if schedule.by_epoch else len(runner.train_dataloader))
        for schedule in _schedules(runner)
    ]
    unit, last = (
        ('epoch', runner.max_epochs)
        if not runner.train_loop.endless
        else ('iteration', runner.max_iters)
    )
    stays = ''
    if unit == 'epoch' and max(ends) < last:
        stays = (
            f' From epoch {max(ends):g} to {last} the learning rate stays where the schedule ended.'
        )
    elif unit == 'iteration' and max(schedule.end for schedule in _schedules(runner)) < last:
        stays = f' Behind its end, up to iteration {last}, the learning rate stays where it ended.'
    runner.logger.warning(
        f'the schedule of the checkpoint is kept, not the one of the config: '
        f'{"; ".join(differences)}.{stays} For a new schedule start from the weights: '
        '--cfg-options load_from=FILE, without --resume'
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f'{text[:37]}...'


def warn_if_finished(runner: Runner) -> None:
    """Warn if a resumed training has nothing left to do.

    Args:
        runner (Runner): The runner, resumed.
    """
    if runner.iter < runner.max_iters:
        return
    done, option = (
        (f'{runner.iter} of {runner.max_iters} iterations', 'max_iters')
        if runner.train_loop.endless
        else (f'{runner.epoch} of {runner.max_epochs} epochs', 'max_epochs')
    )
    runner.logger.warning(
        f'this training is finished: {done} are done, so there is nothing left to train. To train '
        f'on, raise train_cfg.{option}; for a new schedule start from the weights: '
        '--cfg-options load_from=FILE, without --resume'
    )
