"""A rehearsal of a training: two steps, one batch of validation, one checkpoint."""

import contextlib
import copy
import gc
import io
import logging
import math
import resource
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import barrier, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from groupmamba_mm.checkpoint import map_checkpoint
from groupmamba_mm.engine.cli import cause_of
from groupmamba_mm.engine.config_checks import close_to, type_name
from groupmamba_mm.engine.health import NonFiniteError
from groupmamba_mm.errors import ConfigError, UserError

from .config import metrics_of
from .findings import Finding, shown
from .labels import HEADS
from .parts import build, leaves, parts_of, spread
from .plan import schedulers_of

#: Different images of a split for each process: more would say nothing new, and take seconds.
DIFFERENT = 32

#: What constructors of optimizers read of ``paramwise_cfg``, the libraries' and ours.
PARAMWISE_OPTIONS = (
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
    'custom_keys',
    'layer_decay_rate',
    'decay_rate',
    'decay_type',
    'num_layers',
)


class Excerpt:
    """Some images of a data set, which otherwise answers as the whole one.

    Args:
        dataset: The data set.
        indices: Which images; one that stands there twice is read once.
    """

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self._dataset, self._indices = dataset, list(indices)
        self._read: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        place = self._indices[index]
        if place not in self._read:
            self._read[place] = self._dataset[place]
        return copy.deepcopy(self._read[place])  # preprocessors change samples in place

    def get_data_info(self, index: int) -> dict[str, Any]:
        """The entry of an image."""
        return self._dataset.get_data_info(self._indices[index])

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == '_dataset':  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self._dataset, name)


@dataclass
class DryRun:
    """What a rehearsal measured.

    Args:
        batches: Images of a process in each of the two steps.
        seconds: Of the second step, of the batch of validation and of the checkpoint.
        checkpoint_bytes: Size of the checkpoint.
        memory: What the memory is of, and its bytes.
        rates: Numbers of parameters by their learning rates, before any schedule.
        metrics: Names that validation gives, None without validation.
        loss: Of the first step.
        parameters: Number of parameters.
        first_rate: Learning rate of the first step, of the first group.
        warnings: What may not have been meant.
    """

    batches: list[int]
    seconds: dict[str, float]
    checkpoint_bytes: int
    memory: tuple
    rates: dict[float, int]
    metrics: list[str] | None
    loss: float
    parameters: int
    first_rate: float
    warnings: list[Finding]

    def line(self) -> str:
        """The short form."""
        return '; '.join(text for _, text in self._rows())

    def page(self) -> str:
        """The long form."""
        return '\n'.join(f'  {name:<14}{text}' for name, text in self._rows())

    def _rows(self) -> Iterator[tuple]:
        first, second = self.batches
        yield (
            'step',
            (
                f'{self.seconds["step"]:.3g} s a step of {second} images '
                f'(the first: {first}), loss {self.loss:.4g}'
            ),
        )
        shares = [
            f'{rate:.3g} for {number / self.parameters:.0%}'
            for rate, number in sorted(self.rates.items(), reverse=True)[:4]
        ]
        size = f'{self.parameters / 1e6:.3g} M parameters'
        yield (
            'learning rate',
            (
                f'learning rate {", ".join(shares)} of {size}, '
                f'{self.first_rate:.3g} in the first step'
            ),
        )
        if self.metrics is not None:
            yield (
                'validation',
                (
                    f'{self.seconds["validation"]:.3g} s a batch of validation, '
                    f'metrics {shown(self.metrics)}'
                ),
            )
        yield (
            'checkpoint',
            (
                f'checkpoint of {self.checkpoint_bytes / 2**20:.3g} MiB written and '
                f'read in {self.seconds["checkpoint"]:.3g} s'
            ),
        )
        kind, size = self.memory
        yield 'memory', f'{size / 2**30:.3g} GiB of {kind}'


def dry_run(cfg: Config, built: dict[str, Any], compiled: bool) -> DryRun:
    """Rehearse a training in a runner of its own, which leaves no trace.

    The second step has as many images as the last batch of an epoch. Validation is of one batch,
    with the configured metrics; detections of any score count.

    Args:
        cfg: The config, as training will get it; unchanged.
        built: Data sets by split, as far as they are built; the others are added.
        compiled: Whether to compile a backbone that asks for it, which takes minutes.

    Returns:
        What was measured.

    Raises:
        ConfigError: A step, validation or the checkpoint fails.
    """
    for split in ('train', 'val'):
        parts = parts_of(cfg, split)
        if parts and split not in built:
            built[split] = build(cfg, parts)
    work_dir = Path(cfg.work_dir) / '.dry_run'
    rehearsal = Rehearsal(cfg, built, work_dir, compiled)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tables of a single batch
            return rehearsal.run()
    except NonFiniteError as error:
        # without the reproduction that it names, which goes with the rehearsal
        raise ConfigError(
            f'dry run: {str(error).partition("; replay it")[0]}; lower the learning '
            'rate, or train without --amp'
        ) from error
    except UserError:
        raise
    except Exception as error:
        # Whatever fails here would fail in the run, hours later.
        traceback.print_exc()
        what = cause_of(error) or f'{type(error).__name__}: {error}'
        raise ConfigError(
            f'dry run: {rehearsal.stage} fails ({" ".join(what.split())}){rehearsal.remedy}'
        ) from error
    finally:
        rehearsal.close()


class Rehearsal:
    """The runner of a dry run, step by step; see :func:`dry_run`."""

    def __init__(self, cfg: Config, built: dict[str, Any], work_dir: Path, compiled: bool) -> None:
        self.stage, self.remedy = 'building the run', ''
        self.full_cfg, self.built, self.work_dir = cfg, built, work_dir
        self.name = f'dry_run_{time.time_ns()}'
        # formatting a config takes a tenth of a second each time, and nobody reads this one
        own = Config(copy.deepcopy(cfg._cfg_dict), cfg.text, cfg.filename, format_python_code=False)
        self.cfg = self._shortened(own, compiled)
        self.runner: Runner | None = None

    def _shortened(self, cfg: Config, compiled: bool) -> Config:
        cfg.work_dir, cfg.experiment_name = str(self.work_dir), self.name
        cfg.log_level = logging.ERROR
        cfg.load_from = None if cfg.get('resume') else cfg.get('load_from')
        cfg.resume = False
        visualizer = cfg.get('visualizer') or dict(type='Visualizer')
        cfg.visualizer = ConfigDict(visualizer, vis_backends=None, name=self.name)
        hooks = cfg.get('default_hooks') or {}
        # a logger sets the peak of the GPU's memory back at each of its lines
        cfg.default_hooks = ConfigDict(
            {name: hook for name, hook in hooks.items() if name != 'visualization'},
            checkpoint=None,
            logger=None,
        )
        loop = cfg.train_cfg
        loop.pop('dynamic_intervals', None)
        self.by_epoch = 'max_epochs' in loop
        loop.update(dict(max_epochs=1) if self.by_epoch else dict(max_iters=2))
        loop.val_begin = 2**31  # validation comes after the steps, once
        for split in ('train', 'val'):
            loader = cfg.get(f'{split}_dataloader')
            if loader is None:
                continue
            loader.update(num_workers=0, persistent_workers=False)
            loader.pop('prefetch_factor', None)
            loader.sampler = dict(
                type='DefaultSampler' if self.by_epoch or split == 'val' else 'InfiniteSampler',
                shuffle=False,
            )
        if not compiled and (cfg.model.get('backbone') or {}).get('compile_mode'):
            cfg.model.backbone.compile_mode = None
        _accept_all_scores(cfg.model.get('test_cfg'))
        return cfg

    def run(self) -> DryRun:
        """Rehearse."""
        self.runner = runner = RUNNERS.build(self.cfg)
        self._require_heads()
        world, size = get_world_size(), runner._train_dataloader.get('batch_size', 1)
        here = math.ceil(len(self.built['train']) / world)
        dropped = runner._train_dataloader.get('drop_last') or not self.by_epoch
        last = size if dropped or here % size == 0 else here % size
        if here < size:
            size = last = here if not dropped else size
            runner._train_dataloader['drop_last'] = False
        self._give('train', world * (size + last))
        if runner._val_dataloader is not None:
            self._give('val', world * runner._val_dataloader.get('batch_size', 1))
        self.stage = f'a step of {size} images'
        if last != size:
            self.remedy = (
                f'; the last batch of an epoch has {last} of {size} images: if that is '
                'the reason, set train_dataloader.drop_last=True or another batch_size'
            )
        runner.train()
        hub = runner.message_hub
        losses = hub.get_scalar('train/loss').data[0]
        if not losses.any():
            raise ConfigError(
                'dry run: the loss of both steps is 0, so there is nothing to learn; check the '
                'labels, and that the head has more than one class'
            )
        seconds, metrics, self.remedy = dict(step=hub.get_scalar('train/time').current()), None, ''
        if runner.val_loop is not None:
            metrics = self._validate(seconds)
        size_on_disk = self._checkpoint(seconds)
        rates: dict[float, int] = {}
        for group in runner.optim_wrapper.optimizer.param_groups:
            rate = group.get('initial_lr', group['lr'])
            rates[rate] = rates.get(rate, 0) + sum(p.numel() for p in group['params'])
        first_rate = float(hub.get_scalar('train/lr').data[0][0])
        memory = (
            ('GPU memory at most', torch.cuda.max_memory_allocated())
            if torch.cuda.is_available()
            else (
                'memory of the process at most',
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
        )
        return DryRun(
            [size, last],
            seconds,
            size_on_disk,
            memory,
            rates,
            metrics,
            float(losses[0]),
            sum(rates.values()),
            first_rate,
            list(self._idle_options()),
        )

    def _idle_options(self) -> Iterator[Finding]:
        """Options for some of the weights that no weight has a name for, or nothing reads."""
        options = self.full_cfg.optim_wrapper.get('paramwise_cfg') or {}
        key, names = 'optim_wrapper.paramwise_cfg', dict(self.runner.model.named_parameters())
        for option in options:
            if option not in PARAMWISE_OPTIONS:
                hint = close_to(option, PARAMWISE_OPTIONS)
                yield Finding(
                    f'{key}.{option}', 'is no known option', hint or 'remove it', severity='warning'
                )
        for part in options.get('custom_keys') or ():
            if not any(part in name for name in names):
                words = {'.'.join(name.split('.')[: part.count('.') + 1]) for name in names}
                yield Finding(
                    f'{key}.custom_keys: {part!r}',
                    'is in the name of no parameter, so it changes nothing',
                    close_to(part, words) or 'remove it, or give a part of a name',
                    severity='warning',
                )

    def _give(self, split: str, number: int) -> None:
        dataset = self.built[split]
        different = min(number, DIFFERENT * get_world_size())
        indices = [index for index, _ in zip(spread(len(dataset)), range(different))]
        indices = (indices * math.ceil(number / len(indices)))[:number]
        getattr(self.runner, f'_{split}_dataloader')['dataset'] = Excerpt(dataset, indices)

    def _require_heads(self) -> None:
        """Compare the heads as they were built, defaults included, with the classes and labels."""
        wanted = dict(
            num_classes=len(self.built['train'].metainfo.get('classes') or ()),
            ignore_index=getattr(next(leaves(self.built['train'])), 'ignore_index', None),
        )
        for name, module in self.runner.model.named_modules():
            parts = name.split('.')
            if 'teacher' in parts or 'loss' in parts[-1] or not set(parts) & set(HEADS):
                continue
            for key, right in wanted.items():
                value = getattr(module, key, None)
                if right and isinstance(value, int) and value != right:
                    raise ConfigError(
                        f'model.{name}.{key} is {value} (the default, if the config does not '
                        f'say), and that of the train data is {right}; set it to that number'
                    )

    def _validate(self, seconds: dict[str, float]) -> list[str]:
        self.stage = 'validation of one batch'
        start = time.perf_counter()
        found = self.runner.val_loop.run() or {}
        metrics = sorted(found)
        seconds['validation'] = time.perf_counter() - start
        hook = (self.full_cfg.get('default_hooks') or {}).get('checkpoint') or {}
        wanted = hook.get('save_best') or []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            self._require_rule(hook, next(iter(found), '') if name == 'auto' else name)
            if metrics and name not in ('auto', *metrics):
                raise ConfigError(
                    f'default_hooks.checkpoint.save_best is {name!r}, and validation '
                    f'gives {", ".join(metrics)}; set it to one of these, to '
                    "'auto', or mend val_evaluator"
                )
        # others may go by what validation does not give
        by_metric = [
            (f'custom_hooks.{index}', hook)
            for index, hook in enumerate(self.full_cfg.get('custom_hooks') or ())
            if type_name(hook) == 'EarlyStoppingHook'
        ]
        by_metric += [
            (key, one) for key, one in schedulers_of(self.full_cfg) if 'Plateau' in type_name(one)
        ]
        for key, part in by_metric:
            name = part.get('monitor', 'loss')
            if metrics and name not in metrics:
                raise ConfigError(
                    f'{key}.monitor is {name!r}, and validation gives {", ".join(metrics)}; set it '
                    'to one of these, or mend val_evaluator'
                )
        return metrics

    def _require_rule(self, hook: Mapping[str, Any], metric: str) -> None:
        """Whether more or less of a metric is better must be known."""
        if not metric or hook.get('rule'):
            return
        try:
            CheckpointHook(save_best=metric)
        except ValueError as error:
            raise ConfigError(
                f'default_hooks.checkpoint.save_best is {hook["save_best"]!r}, and mmengine does '
                f'not know whether more or less of {metric} is better; set '
                "default_hooks.checkpoint.rule to 'greater' or 'less'"
            ) from error

    def _checkpoint(self, seconds: dict[str, float]) -> int:
        self.stage = f'writing and reading a checkpoint in {self.full_cfg.work_dir}'
        start = time.perf_counter()
        self.runner.save_checkpoint(str(self.work_dir), 'dry_run.pth', by_epoch=self.by_epoch)
        barrier()
        file = self.work_dir / 'dry_run.pth'
        if is_main_process():
            saved = map_checkpoint(file)['state_dict']
            model = getattr(self.runner.model, 'module', self.runner.model)
            if saved.keys() - model.state_dict().keys():
                raise RuntimeError('the checkpoint holds tensors that the model does not have')
        seconds['checkpoint'] = time.perf_counter() - start
        return file.stat().st_size if file.is_file() else 0

    def close(self) -> None:
        """Leave nothing behind."""
        for handler in self.runner.logger.handlers if self.runner is not None else ():
            if isinstance(handler, logging.FileHandler):
                handler.close()
        self.runner = None
        gc.collect()  # runners are full of cycles, which hold the memory of a whole training
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if is_main_process():
            shutil.rmtree(self.work_dir, ignore_errors=True)


def _accept_all_scores(part: Any) -> None:
    """Let a new model detect something, or its metrics would have nothing to count."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key == 'score_thr' and isinstance(value, (int, float)):
                part[key] = 0.0
            else:
                _accept_all_scores(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            _accept_all_scores(value)


def rehearse_test(runner: Runner) -> None:
    """Predict one batch and give it to the configured metrics, before all of a test.

    Args:
        runner: A runner whose test is not run, and whose weights are not loaded yet.

    Raises:
        ConfigError: The batch or a metric fails.
    """
    dataset, loader = runner.test_loop.dataloader.dataset, runner.cfg.test_dataloader
    size = get_world_size() * loader.get('batch_size', 1)
    excerpt = Excerpt(dataset, [index for index, _ in zip(spread(len(dataset)), range(size))])
    options = {key: value for key, value in loader.items() if key != 'prefetch_factor'}
    options.update(dataset=excerpt, num_workers=0, persistent_workers=False)
    metrics = [
        metric
        for metric in metrics_of(runner.cfg, 'test')
        if not (metric.get('format_only') or type_name(metric).startswith('Dump'))  # they write
    ]
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            evaluator = runner.build_evaluator(metrics)
            evaluator.dataset_meta = dataset.metainfo
            runner.model.eval()
            for batch in runner.build_dataloader(options):
                evaluator.process(runner.model.test_step(batch), batch)
            evaluator.evaluate(len(excerpt))
    except UserError:
        raise
    except Exception as error:
        # Whatever fails here would fail behind the last image.
        traceback.print_exc()
        what = cause_of(error) or f'{type(error).__name__}: {error}'
        raise ConfigError(
            f'the first batch of the test fails ({" ".join(what.split())}); mend test_evaluator '
            'or the data'
        ) from error


def hand_over(runner: Runner, built: dict[str, Any]) -> None:
    """Give a runner the data sets that the checks have built.

    Args:
        runner: A runner whose loaders are not built yet.
        built: Data sets by split.
    """
    for split, dataset in built.items():
        loader = getattr(runner, f'_{split}_dataloader')
        if isinstance(loader, Mapping):
            loader['dataset'] = dataset
