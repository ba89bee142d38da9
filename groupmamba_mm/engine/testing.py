"""Apply the command line of testing to a config, by one class for each library."""

import importlib
import os
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any

from mmengine.config import Config, ConfigDict

from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.errors import ConfigError

from .config_checks import type_name
from .loops import AMP_DTYPES

_PICKLE_SUFFIXES = ('.pkl', '.pickle')


def apply_test_options(
    cfg: Config,
    checkpoint: str,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    amp: str | None = None,
) -> None:
    """Apply the options that only testing has.

    Args:
        cfg (Config): The config, changed in place; its default_scope names the library.
        checkpoint (str): The checkpoint to test.
        out (str, optional): Where predictions go: a pickle (mmpretrain, mmdet) or a folder of
            label images (mmseg).
        show_dir (str, optional): Folder for annotated images.
        tta (bool): Whether to average over the mirrored image too, or over what the config's
            tta_model and tta_pipeline say. Defaults to False.
        amp (str, optional): 'bf16' or 'fp16'. Defaults to None, fp32, as is 'off'.

    Raises:
        ConfigError: If the config cannot do what was asked for.
    """
    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        raise ConfigError(
            f'config {cfg.filename} has no test_dataloader or no test_evaluator, so '
            'it cannot be tested; take a config of configs/'
        )
    cfg.resume = False
    cfg.load_from = checkpoint
    options = {'mmpretrain': ClassificationTest, 'mmdet': DetectionTest, 'mmseg': SegmentationTest}[
        cfg.default_scope
    ](cfg)
    options.drop_ema_hook()
    if out is not None:
        options.set_out(out)
    if show_dir is not None:
        options.set_show_dir(show_dir)
    if tta:
        options.set_tta()
    if amp is not None:
        options.set_amp(amp)


def trained_classes(checkpoint: str) -> tuple[str, ...] | None:
    """Read the class names that a checkpoint was trained with.

    Args:
        checkpoint (str): A file or an address.

    Returns:
        tuple[str] | None: The names, None if the checkpoint does not say.

    Raises:
        CheckpointError: If it cannot be read.
    """
    meta = load_checkpoint_file(checkpoint).get('meta')
    known = (meta.get('dataset_meta') if isinstance(meta, dict) else None) or {}
    classes = known.get('classes') or known.get('CLASSES')
    return None if classes is None else tuple(map(str, classes))


class TaskTest(ABC):
    """How one library writes, draws and averages predictions.

    Args:
        cfg (Config): The config, changed in place.
    """

    scope: str
    visualizer: str
    default_tta_model: dict[str, Any]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    @abstractmethod
    def set_out(self, out: str) -> None:
        """Write the predictions.

        Args:
            out (str): A file or a folder.

        Raises:
            ConfigError: If it is the wrong one of the two.
        """

    @abstractmethod
    def mirrored_pipeline(self, pipeline: list[dict]) -> list[dict]:
        """Make the pipeline for an image and its mirror image.

        Args:
            pipeline (list[dict]): The test pipeline.

        Returns:
            list[dict]: The pipeline that ends with TestTimeAug.
        """

    def set_show_dir(self, show_dir: str) -> None:
        """Draw the predictions into a folder.

        Args:
            show_dir (str): The folder.

        Raises:
            ConfigError: If it is a file.
        """
        if os.path.isfile(show_dir):
            raise ConfigError(f'--show-dir {show_dir} is a file; give a folder')
        if type_name(self.cfg.get('visualizer') or {}, 'Visualizer') in (
            'Visualizer',
            'SegLocalVisualizer',
        ):
            # mmengine's own cannot draw predictions, and mmseg's writes Latin letters only
            self.cfg.visualizer = dict(type=self.visualizer)
        hooks = list(self.cfg.get('custom_hooks') or [])
        self.cfg.custom_hooks = hooks + [dict(type='DrawPredictionsHook', out_dir=show_dir)]

    def set_tta(self) -> None:
        """Average over augmented copies of each image.

        Raises:
            ConfigError: If the task cannot.
        """
        dataset = self.cfg.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        if 'tta_pipeline' not in self.cfg:
            self.cfg.tta_pipeline = self.mirrored_pipeline(deepcopy(list(dataset.pipeline)))
        model = self.cfg.get('tta_model', self.default_tta_model)
        if any(_is_ema(hook) for hook in self.cfg.get('custom_hooks') or []):
            # The hook would not find its weights in the wrapped model, and say nothing.
            raise ConfigError(
                '--tta: the EMAHook of the config has evaluate_on_ema=False, and a '
                'checkpoint holds the averaged weights as its model; test without '
                '--tta'
            )
        self.cfg.model = ConfigDict(model, module=self.cfg.model)
        dataset.pipeline = self.cfg.tta_pipeline

    def set_amp(self, amp: str) -> None:
        """Test in mixed precision.

        Args:
            amp (str): 'bf16' or 'fp16', or 'off' for fp32.

        Raises:
            ConfigError: If the config has a test loop of its own.
        """
        kind = type_name(self.cfg.get('test_cfg') or {}, 'TestLoop')
        if kind not in ('TestLoop', 'AmpTestLoop'):
            raise ConfigError(
                f'--amp: test_cfg.type is {kind!r}, whose precision cannot be set; '
                'use TestLoop or leave --amp away'
            )
        self.cfg.test_cfg = (
            dict() if amp == 'off' else dict(type='AmpTestLoop', dtype=AMP_DTYPES[amp])
        )

    def drop_ema_hook(self) -> None:
        """Test the averaged weights, which a checkpoint holds as its model, without the hook.

        mmpretrain's hook can test the raw weights as well, and their predictions would take the
        place of the averaged ones' in the files of --out and --show-dir. With
        ``evaluate_on_ema=False`` it stays: so the raw weights are tested.
        """
        hooks = list(self.cfg.get('custom_hooks') or [])
        self.cfg.custom_hooks = [
            hook for hook in hooks if not (_is_ema(hook) and hook.get('evaluate_on_ema', True))
        ]

    def _add_dump(self, metric: dict, out: str) -> None:
        if os.path.splitext(out)[1] not in _PICKLE_SUFFIXES or os.path.isdir(out):
            raise ConfigError(
                f'--out {out}: {self.scope} writes its predictions to a pickle; '
                'give a file that ends in .pkl'
            )
        self.cfg.test_evaluator = _metrics(self.cfg) + [dict(metric, out_file_path=out)]


class ClassificationTest(TaskTest):
    """mmpretrain: a pickle of data samples; the score is the mean over both images."""

    scope = 'mmpretrain'
    visualizer = 'UniversalVisualizer'
    default_tta_model = dict(type='AverageClsScoreTTA')

    def set_out(self, out: str) -> None:
        """See :meth:`TaskTest.set_out`."""
        self._add_dump(dict(type='DumpResults'), out)

    def mirrored_pipeline(self, pipeline: list[dict]) -> list[dict]:
        """See :meth:`TaskTest.mirrored_pipeline`."""
        return pipeline[:-1] + [_test_time_aug(_flips(), pipeline[-1:])]


class DetectionTest(TaskTest):
    """mmdet: a pickle with run-length masks; the boxes of both images meet in one NMS."""

    scope = 'mmdet'
    visualizer = 'DetLocalVisualizer'
    default_tta_model = dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    )

    def set_out(self, out: str) -> None:
        """See :meth:`TaskTest.set_out`."""
        self._add_dump(dict(type='DumpDetResults'), out)

    def set_tta(self) -> None:
        """See :meth:`TaskTest.set_tta`."""
        if _predicts_masks(self.cfg.model):
            raise ConfigError(
                f'--tta: the model of {self.cfg.filename} predicts masks, and mmdet '
                'merges boxes only; test without --tta'
            )
        super().set_tta()

    def mirrored_pipeline(self, pipeline: list[dict]) -> list[dict]:
        """See :meth:`TaskTest.mirrored_pipeline`."""
        packing = dict(pipeline[-1])
        # The boxes are mirrored back by these.
        packing['meta_keys'] = (
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'flip',
            'flip_direction',
        )
        return pipeline[:-1] + [_test_time_aug(_flips(), [packing])]


class SegmentationTest(TaskTest):
    """mmseg: a folder of label images; the class probabilities of both images are averaged."""

    scope = 'mmseg'
    visualizer = 'NamedSegVisualizer'
    default_tta_model = dict(type='SegTTAModel')

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        if _metrics(cfg) and all(metric.get('format_only') for metric in _metrics(cfg)):
            dataset = cfg.test_dataloader.dataset  # of a server, which keeps the label maps
            while 'dataset' in dataset:
                dataset = dataset.dataset
            dataset.pipeline = [
                step
                for step in dataset.get('pipeline') or []
                if type_name(step) != 'LoadAnnotations'
            ]

    def set_out(self, out: str) -> None:
        """See :meth:`TaskTest.set_out`."""
        if os.path.splitext(out)[1] or os.path.isfile(out):
            raise ConfigError(
                f'--out {out}: mmseg writes one label image for each picture; give a folder'
            )
        hooks = list(self.cfg.get('custom_hooks') or [])
        self.cfg.custom_hooks = hooks + [dict(type='WriteLabelsHook', out_dir=out)]
        # they would write, and need a folder for it, no more than that
        self.cfg.test_evaluator = [
            metric for metric in _metrics(self.cfg) if not metric.get('format_only')
        ]

    def set_show_dir(self, show_dir: str) -> None:
        """See :meth:`TaskTest.set_show_dir`."""
        importlib.import_module('groupmamba_mm.visualization.seg_visualizer')  # registers it
        super().set_show_dir(show_dir)

    def mirrored_pipeline(self, pipeline: list[dict]) -> list[dict]:
        """See :meth:`TaskTest.mirrored_pipeline`."""
        # The ground truth must not be mirrored: the prediction is mirrored back.
        labels = [step for step in pipeline if type_name(step) == 'LoadAnnotations']
        images = [step for step in pipeline[:-1] if type_name(step) != 'LoadAnnotations']
        return images + [_test_time_aug(_flips(), labels, pipeline[-1:])]


def _metrics(cfg: Config) -> list[dict]:
    evaluator = cfg.get('test_evaluator') or []
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]


def _is_ema(hook: dict) -> bool:
    return type_name(hook) == 'EMAHook'


def _flips() -> list[dict]:
    # The original first: it lends the merged sample its ground truth and meta information.
    return [
        dict(type='RandomFlip', prob=0.0, direction='horizontal'),
        dict(type='RandomFlip', prob=1.0, direction='horizontal'),
    ]


def _test_time_aug(flips: list[dict], *steps: list[dict]) -> dict:
    singles = [[step] for group in steps for step in group]
    return dict(type='TestTimeAug', transforms=[flips] + singles)


def _predicts_masks(model: Any) -> bool:
    """Look for a mask head or a panoptic head anywhere in a model's config."""
    if isinstance(model, dict):
        heads = ('mask_head', 'panoptic_head')
        return any(
            (key in heads and value is not None) or _predicts_masks(value)
            for key, value in model.items()
        )
    return isinstance(model, (list, tuple)) and any(map(_predicts_masks, model))
