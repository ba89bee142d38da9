"""Checkpoints that survive interruptions, full disks and diverged models."""

import math
import os
import time
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from groupmamba_mm.checkpoint.saving import write_whole
from groupmamba_mm.errors import CheckpointError, ConfigError

#: What is saved between the checkpoints of the config's interval; each takes the place of the last.
INTERIM_NAME = 'latest.pth'


class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, whose files are written whole."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes, see :func:`groupmamba_mm.checkpoint.saving.write_whole`.

        Args:
            obj (bytes): The contents.
            filepath (str or Path): The file.
        """
        write_whole(obj, filepath)


register_backend('whole_file', WholeFileBackend, force=True)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Save checkpoints so that there is always a whole one to continue from.

    It takes the arguments of :class:`mmengine.hooks.CheckpointHook` and differs from it in this:

    - A file is written under another name, brought to the disk and renamed; old files are removed
      after that, not before.
    - Between its intervals, a checkpoint :data:`INTERIM_NAME` is saved by time, on a signal, and
      before a validation at which there is none. The next one of the interval replaces it.
    - What is saved after a validation knows its results, so that it is not repeated.
    - Paths in a checkpoint are looked up in the run's own folder, also after it was moved.

    Args:
        *args: See the parent.
        minutes (float, optional): Save whenever so many minutes have passed since the last
            checkpoint. Defaults to None, by interval alone.
        on_write_error (str): What follows when a checkpoint cannot be written: 'stop' ends the
            training, 'continue' warns and continues until the next one. Defaults to 'stop'.
        **kwargs: See the parent.

    Raises:
        ConfigError: If an argument has another value.
    """

    def __init__(
        self, *args: Any, minutes: float | None = None, on_write_error: str = 'stop', **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if on_write_error not in ('stop', 'continue'):
            raise ConfigError(
                "default_hooks.checkpoint.on_write_error must be 'stop' or "
                f"'continue', got {on_write_error!r}"
            )
        if minutes is not None and minutes <= 0:
            raise ConfigError(f'default_hooks.checkpoint.minutes must be above 0, got {minutes}')
        self.minutes = minutes
        self.on_write_error = on_write_error
        self.saved_iter, self.saved_time = -1, time.monotonic()

    def folder(self, runner: Runner) -> str:
        """Return the folder of the run's checkpoints.

        Args:
            runner (Runner): The runner.

        Returns:
            str: The folder.
        """
        if self.out_dir is None or self.out_dir == runner.work_dir:
            return runner.work_dir
        return os.path.join(self.out_dir, os.path.basename(runner.work_dir.rstrip(os.sep)))

    def before_train(self, runner: Runner) -> None:
        """Look up the folder and what a resumed training had saved in it.

        Args:
            runner (Runner): The runner.
        """
        folder = self.folder(runner)
        local = isinstance(get_file_backend(folder, backend_args=self.backend_args), LocalBackend)
        if local and self.backend_args is None:
            self.backend_args = dict(backend='whole_file')
        super().before_train(runner)
        self.saved_iter = runner.iter  # what was resumed from, or nothing worth a file yet
        self._best = {
            key: path and self.file_backend.join_path(folder, os.path.basename(path))
            for key, path in self._best.items()
        }

    def before_train_val(self, runner: Runner) -> None:
        """Save what is validated, unless it is saved already: a validation can be long, and fail.

        Args:
            runner (Runner): The runner.
        """
        if self.interval > 0 and self.saved_iter != runner.iter:
            self.save_interim(runner, dict(epoch=runner.epoch, iter=runner.iter))

    def after_train_val(self, runner: Runner) -> None:
        """Save the last checkpoint again, with the results in it.

        Args:
            runner (Runner): The runner.
        """
        if self.saved_iter != runner.iter or self.interval <= 0:
            return
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        if os.path.basename(self.last_ckpt or '') == INTERIM_NAME:
            self.save_interim(runner, meta)
        else:
            step = runner.epoch if self.by_epoch else runner.iter
            self._save_checkpoint_with_step(runner, step, meta)

    def save_interim(self, runner: Runner, meta: dict[str, int]) -> str:
        """Save between the intervals.

        Args:
            runner (Runner): The runner.
            meta (dict): The epochs and iterations that are done, as 'epoch' and 'iter'.

        Returns:
            str: The file.
        """
        self._write(runner, INTERIM_NAME, meta)
        return self.file_backend.join_path(self.out_dir, INTERIM_NAME)

    def _write(self, runner: Runner, name: str, meta: dict[str, int]) -> bool:
        """Save a whole state of the training, and tell mmengine's tools where."""
        before = self.last_ckpt
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                write_whole(
                    self.last_ckpt.encode(), os.path.join(runner.work_dir, 'last_checkpoint')
                )
        except CheckpointError as error:
            self.last_ckpt = before
            self._write_failed(runner, error)
            return False
        self.saved_iter, self.saved_time = meta['iter'], time.monotonic()
        return True

    def _write_failed(self, runner: Runner, error: CheckpointError) -> None:
        if self.on_write_error == 'stop':
            raise error
        runner.logger.warning(
            f'{error}. The training continues, as on_write_error="continue" says.'
        )

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, int]) -> None:
        """See the parent; old files are removed after the new one is there."""
        kept = [old for old in getattr(self, 'keep_ckpt_ids', []) if old != step] + [step]
        surplus = kept[: -self.max_keep_ckpts] if self.max_keep_ckpts > 0 else []
        if self.max_keep_ckpts > 0:
            runner.message_hub.update_info('keep_ckpt_ids', kept[len(surplus) :])
        if not self._write(runner, self.filename_tmpl.format(step), meta):
            if self.max_keep_ckpts > 0:
                runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            return
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept[len(surplus) :])
        self._remove([self.filename_tmpl.format(old) for old in surplus] + [INTERIM_NAME])

    @master_only
    def _remove(self, names: list[str]) -> None:
        for name in names:
            path = self.file_backend.join_path(self.out_dir, name)
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        """See the parent; the old best file is removed after the new one is there."""
        if not self.save_best:
            return
        for key, value in metrics.items():
            if key in self.key_indicators and value is not None and not math.isfinite(value):
                runner.logger.warning(f'{key} is {value}: this is not taken for the best')
                metrics = dict(metrics, **{key: None})
        before, info, last = self._best, self._best_info(runner), self.last_ckpt
        # The parent removes the old file first, and saves the last checkpoint again, which
        # after_train_val does.
        self._best, self.last_ckpt = dict.fromkeys(before), None
        try:
            super()._save_best_checkpoint(runner, metrics)
            self._best = {key: path or before.get(key) for key, path in self._best.items()}
        except CheckpointError as error:
            self._best = before
            runner.message_hub.update_info_dict(info)
            self._write_failed(runner, error)
        finally:
            self.last_ckpt = last
        old = {path for key, path in before.items() if path and path not in self._best.values()}
        self._remove([os.path.basename(path) for path in old])

    @property
    def _best(self) -> dict[str, str | None]:
        """The best file for each metric: the parent keeps one and several in different places."""
        if not self.save_best:
            return {}
        if len(self.key_indicators) == 1:
            return {self.key_indicators[0]: self.best_ckpt_path}
        return self.best_ckpt_path_dict

    @_best.setter
    def _best(self, paths: dict[str, str | None]) -> None:
        if self.save_best and len(self.key_indicators) == 1:
            (self.best_ckpt_path,) = paths.values()
        elif self.save_best:
            self.best_ckpt_path_dict = dict(paths)

    def _best_info(self, runner: Runner) -> dict[str, Any]:
        return {
            key: value
            for key, value in runner.message_hub.runtime_info.items()
            if key.startswith(('best_score', 'best_ckpt'))
        }
