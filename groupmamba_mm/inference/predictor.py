"""Predicting on single images, the same way for the three tasks."""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groupmamba_mm.checkpoint import read_tensors
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.model_zoo import config_path

from .building import build_with_weights
from .tasks import TASKS

with explain_missing('groupmamba_mm.inference'):
    from mmengine.config import Config
    from mmengine.dataset import Compose, pseudo_collate
    from mmengine.device import get_device
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import DATASETS, VISUALIZERS, DefaultScope

    from groupmamba_mm.datasets.loading import CheckedLoadImageFromFile
    from groupmamba_mm.engine.config_checks import load_config

#: Steps of a test pipeline that read ground truth, which images of one's own have none of.
_ANNOTATION_STEPS = ('LoadAnnotations', 'LoadPanopticAnnotations')
_LOADING_STEPS = ('LoadImageFromFile', 'CheckedLoadImageFromFile')

Image = str | Path | np.ndarray


class Predictor:
    """A trained model that takes images and gives classes, boxes or label maps, by name.

    Args:
        config: A config file, the name of one of ours, or a loaded config. It says what the task
            is, and how images are prepared.
        checkpoint: A checkpoint with every tensor of the model.
        device: None: a GPU if there is one.
        score_thr: Detections below this score are left out.
        top: Number of classes that a classifier names.

    Raises:
        ConfigError: The config has no test pipeline, or is of none of the three libraries.
        CheckpointError: The checkpoint cannot be read safely or does not fit.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path,
        device: str | None = None,
        score_thr: float = 0.3,
        top: int = 5,
    ) -> None:
        self.cfg = cfg = find_config(config)
        if cfg.get('test_dataloader') is None:
            raise ConfigError(
                f'config {cfg.filename} has no test_dataloader, whose pipeline says '
                'how images are prepared; take a config of configs/'
            )
        self.model = revert_sync_batchnorm(build_with_weights(cfg, checkpoint))
        self.model.to(device or get_device())
        dataset = cfg.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        self._load = CheckedLoadImageFromFile()
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self._pipeline = Compose(_image_steps(dataset.pipeline))
            self._visualizer = VISUALIZERS.build(
                dict(type=TASKS[cfg.default_scope].visualizer, name=f'predictor-{id(self)}')
            )
        meta = _dataset_meta(cfg, dataset, checkpoint)
        self.classes: Sequence[str] | None = meta.get('classes')
        self._visualizer.dataset_meta = dict(meta, palette=meta.get('palette') or 'random')
        self._visualizer.dataset_meta.setdefault('classes', None)
        self._task = TASKS[cfg.default_scope](self.classes, score_thr, top)

    @torch.inference_mode()
    def __call__(self, images: Image | Sequence[Image]) -> dict | list[dict]:
        """Predict.

        Args:
            images: A file or an array (H, W, 3), uint8, BGR as OpenCV reads it; or a sequence of
                them, which are computed together as far as their sizes allow.

        Returns:
            What was found in the image as plain data, or a list of that for a sequence: for a
            classifier ``label``, ``score`` and the ``top`` classes; for a detector ``instances``
            with ``label``, ``score`` and ``box`` (x1, y1, x2, y2) in pixels; for a segmenter each
            class's ``share`` of the pixels.

        Raises:
            DataError: A file is missing, cut off or no image.
        """
        is_one = isinstance(images, (str, Path, np.ndarray))
        samples = self.predict_samples([images] if is_one else images)
        results = [self._task.describe(sample) for sample in samples]
        return results[0] if is_one else results

    def read(self, image: Image) -> np.ndarray:
        """An image (H, W, 3), uint8, BGR; arrays are given back.

        Raises:
            DataError: The file is missing, cut off or no image.
        """
        if isinstance(image, np.ndarray):
            return image
        return self._load(dict(img_path=str(image)))['img']

    @torch.inference_mode()
    def predict_samples(self, images: Sequence[Image]) -> list[Any]:
        """The libraries' own data samples for images; see :meth:`__call__`."""
        by_shape = defaultdict(list)
        for index, image in enumerate(images):
            prepared = self.prepare(image, index)
            # some preprocessors take one size at a time
            by_shape[tuple(prepared['inputs'].shape)].append((index, prepared))
        samples = {}
        for group in by_shape.values():
            found = self.model.test_step(pseudo_collate([prepared for _, prepared in group]))
            samples.update(zip((index for index, _ in group), found))
        return [samples[index] for index in range(len(samples))]

    def prepare(self, image: Image, index: int = 0) -> dict[str, Any]:
        """An image as the config's test pipeline hands it to the model's preprocessor.

        Args:
            image: See :meth:`__call__`.
            index: Its number, which the libraries' evaluations want.
        """
        array = self.read(image)
        shape = array.shape[:2]
        path = image if isinstance(image, (str, Path)) else ''
        return self._pipeline(
            dict(img=array, img_path=str(path), img_shape=shape, ori_shape=shape, img_id=index)
        )

    def describe(self, sample: Any) -> dict[str, Any]:
        """A data sample as plain data; see :meth:`__call__`."""
        return self._task.describe(sample)

    def paint(self, image: Image, sample: Any) -> np.ndarray:
        """Draw what was predicted.

        Args:
            image: The image.
            sample: Its entry of :meth:`predict_samples`.

        Returns:
            (H, W, 3), uint8, BGR.
        """
        rgb = np.ascontiguousarray(self.read(image)[..., ::-1])
        self._task.draw(self._visualizer, rgb, sample)
        return np.ascontiguousarray(self._visualizer.get_image()[..., ::-1])


def find_config(config: str | Path | Config, cfg_options: dict[str, Any] | None = None) -> Config:
    """Load a config.

    Args:
        config: A file, the name of one of ours, or a loaded config, which is given back.
        cfg_options: Changes, as ``--cfg-options`` of the commands.

    Returns:
        The config.

    Raises:
        ConfigError: There is none, or it cannot be what was meant.
    """
    if isinstance(config, Config):
        return config
    path = Path(config)
    if path.suffix == '' and not path.exists():
        path = config_path(str(config))
    return load_config(str(path), cfg_options)


def _image_steps(pipeline: Sequence[dict]) -> list[dict]:
    """A test pipeline without the steps that read files."""
    return [
        deepcopy(step)
        for step in pipeline
        if step['type'].split('.')[-1] not in (*_ANNOTATION_STEPS, *_LOADING_STEPS)
    ]


def _dataset_meta(cfg: Config, dataset: dict, checkpoint: str | Path) -> dict[str, Any]:
    """Names and colours of the classes: the checkpoint's, else the config's, else the data set's."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        own = dict(getattr(DATASETS.get(dataset.type), 'METAINFO', {}))
    own.update(dataset.get('metainfo') or {})
    meta = read_tensors(checkpoint).get('meta')
    own.update((meta if isinstance(meta, dict) else {}).get('dataset_meta') or {})
    return {key.lower(): value for key, value in own.items()}
