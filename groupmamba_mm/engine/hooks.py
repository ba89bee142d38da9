"""Hooks: the host ahead of the GPU in training, and drawn predictions in testing."""

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dataset import ConcatDataset
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image

from groupmamba_mm.visualization import readable_names


@HOOKS.register_module()
class RunAheadHook(Hook):
    """Let the host prepare the next steps while the GPU works, a few of them at most.

    The images are copied to the GPU without waiting until the steps before are done. With nothing
    left to wait for, the host could then run tens of steps ahead; a bound keeps the memory of
    batches that wait small, and the times in the log are those of the GPU's steps. When a line is
    logged, the host waits for all of the values in it; mmengine counts that to the ``data_time`` of
    the step that follows.

    Without a GPU it does nothing.

    Args:
        max_steps (int): Steps that are not done when the host begins another one. Defaults to 2.

    Raises:
        ValueError: If that is less than 1.
    """

    # before the timer's, so that waiting is a part of the step's time
    priority = 'ABOVE_NORMAL'

    def __init__(self, max_steps: int = 2) -> None:
        if max_steps < 1:
            raise ValueError(f'max_steps must be 1 or more, got {max_steps}')
        self.max_steps = max_steps
        self._ends: deque[torch.cuda.Event] = deque()

    def before_train(self, runner: Runner) -> None:
        """Make the copies of the data asynchronous.

        Args:
            runner (Runner): The runner.
        """
        for module in runner.model.modules():
            if isinstance(module, BaseDataPreprocessor):
                # most of the libraries' preprocessors have no argument for it
                module._non_blocking = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Wait for the step that is too far behind.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch.
            data_batch (Any): The batch, unused.
            outputs (dict, optional): The losses, unused.
        """
        if not torch.cuda.is_available():
            return
        end = torch.cuda.Event(blocking=True)  # sleeps while it waits: the workers need the core
        end.record()
        self._ends.append(end)
        if len(self._ends) > self.max_steps:
            self._ends.popleft().synchronize()


@HOOKS.register_module()
class DrawPredictionsHook(Hook):
    """Write an annotated copy of every tested image into one folder.

    The libraries' own hooks write below the work directory (mmdet), behind folders of the
    visualizer (mmseg), or over each other where two classes have files of the same name
    (mmpretrain). This one keeps the images' paths below their data set's image folder.

    Args:
        out_dir (str): The folder.
        score_thr (float): Boxes below this score are not drawn (mmdet). Defaults to 0.3.
    """

    priority = 'NORMAL'

    def __init__(self, out_dir: str, score_thr: float = 0.3) -> None:
        self.out_dir = Path(out_dir)
        self.score_thr = score_thr
        self.image_roots: list[str] = []

    def before_test(self, runner: Runner) -> None:
        """Look up the image folders of the test data.

        Args:
            runner (Runner): The runner.
        """
        self.image_roots = image_roots(runner.test_dataloader.dataset)
        meta = runner.visualizer.dataset_meta
        if meta and meta.get('classes'):
            runner.visualizer.dataset_meta = dict(meta, classes=readable_names(meta['classes']))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] = ()
    ) -> None:
        """Draw the predictions of one batch.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch.
            data_batch (Any): The batch, unused.
            outputs (Sequence): Data samples with predictions.
        """
        for sample in outputs:
            out_file = self.out_dir / relative_name(sample.img_path, self.image_roots)
            out_file.parent.mkdir(parents=True, exist_ok=True)
            paint(runner, out_file.stem, sample, self.score_thr, out_file=str(out_file))


@HOOKS.register_module()
class ExamplePredictionsHook(Hook):
    """Give drawn predictions of each validation's first images to the run's trackers.

    The libraries' own hooks paint every so many batches, which is none of a small data set.

    Args:
        number (int): How many. Defaults to 8.
        score_thr (float): Boxes below this score are not drawn (mmdet). Defaults to 0.3.
    """

    priority = 'NORMAL'

    def __init__(self, number: int = 8, score_thr: float = 0.3) -> None:
        self.number = number
        self.score_thr = score_thr
        self._done = 0

    def before_val(self, runner: Runner) -> None:
        """Begin with the first image.

        Args:
            runner (Runner): The runner.
        """
        self._done = 0

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] = ()
    ) -> None:
        """Draw the predictions of one batch, while some are left to be painted.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch, unused.
            data_batch (Any): The batch, unused.
            outputs (Sequence): Data samples with predictions.
        """
        for sample in outputs[: self.number - self._done]:
            # MLflow takes the kind of the image from the name
            paint(runner, f'example_{self._done}.png', sample, self.score_thr, step=runner.iter)
            self._done += 1


def paint(runner: Runner, name: str, sample: Any, score_thr: float, **where: Any) -> None:
    """Paint the prediction of an image with the visualizer of a task.

    Args:
        runner (Runner): The runner.
        name (str): What the picture is called.
        sample (Any): A data sample with a prediction.
        score_thr (float): Boxes below this score are not drawn.
        **where: ``out_file`` or ``step``, see the visualizers of the libraries.
    """
    image = mmcv.imfrombytes(get(sample.img_path), channel_order='rgb')
    if hasattr(runner.visualizer, 'visualize_cls'):
        runner.visualizer.visualize_cls(image, sample, name=name, **where)
    else:
        threshold = {'pred_score_thr': score_thr} if 'pred_instances' in sample else {}
        runner.visualizer.add_datasample(name, image, sample, **threshold, **where)


@HOOKS.register_module()
class WriteLabelsHook(Hook):
    """Write the predicted label map of every tested image into one folder.

    Label images keep the images' paths below their data set's image folder: mmseg's metrics drop
    the folders, so that one name in several of them is written over. Labels are as in the data
    set's files: with ``reduce_zero_label`` they begin with 1.

    Args:
        out_dir (str): The folder.
    """

    priority = 'NORMAL'

    def __init__(self, out_dir: str) -> None:
        self.out_dir = Path(out_dir)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] = ()
    ) -> None:
        """Write the predictions of one batch.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch, unused.
            data_batch (Any): The batch, unused.
            outputs (Sequence): Data samples with predictions.
        """
        roots = image_roots(runner.test_dataloader.dataset)
        for sample in outputs:
            labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
            labels = labels + bool(sample.get('reduce_zero_label', False))
            file = (self.out_dir / relative_name(sample.img_path, roots)).with_suffix('.png')
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels.astype(np.uint8)).save(file)


def relative_name(img_path: str, roots: list[str]) -> str:
    """Name an image by its path below one of its data set's folders.

    Args:
        img_path (str): The image.
        roots (list[str]): The folders.

    Returns:
        str: The path below the first folder that holds it, else the file's name alone.
    """
    for root in roots:
        relative = os.path.relpath(img_path, root)
        if not relative.startswith(os.pardir):
            return relative
    return os.path.basename(img_path)


def image_roots(dataset: Any) -> list[str]:
    """List the image folders of a data set, wrapped ones and parts of a union included."""
    if isinstance(dataset, ConcatDataset):
        return [root for part in dataset.datasets for root in image_roots(part)]
    if hasattr(dataset, 'dataset'):
        return image_roots(dataset.dataset)
    prefixes = getattr(dataset, 'data_prefix', {})
    # 'img_path' in mmpretrain and mmseg, 'img' in mmdet.
    return [prefixes[key] for key in ('img_path', 'img') if prefixes.get(key)]
