"""A training that takes a moment, for tests of what surrounds it."""

import os
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.registry import HOOKS, METRICS, MODELS
from mmengine.structures import BaseDataElement
from torch import nn

from groupmamba_mm.checkpoint import ExpectedKeys
from groupmamba_mm.engine import CheckedRunner


class Backbone(nn.Linear):
    def expected_unused_keys(self):
        return (ExpectedKeys(r'^norm4\.', 'norm of the class token'),)


@MODELS.register_module()
class SmallModel(BaseModel):
    def __init__(self, classes=2, width=20, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = Backbone(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs, mode='tensor'):
        output = self.head(self.norm(self.backbone(torch.stack(inputs))))
        if mode == 'predict':
            return [BaseDataElement(output=row) for row in output]
        return dict(loss=output.square().mean()) if mode == 'loss' else output


@MODELS.register_module()
class SmallTTA(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([index / 8, 1.0]))


class Interrupted(Exception):
    pass


@HOOKS.register_module()
class InterruptHook(Hook):
    """End a training after an iteration and what is saved at it."""

    priority = 'LOWEST'

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            raise Interrupted


@METRICS.register_module()
class EpochMetric(BaseMetric):
    """The number of the epoch, so that a later one is better."""

    default_prefix = None

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(value=float(MessageHub.get_current_instance().get_info('epoch')))


def build(
    work_dir,
    model=None,
    epochs=1,
    ema=None,
    val=False,
    scheduler=None,
    checkpoint=None,
    batch_size=4,
    stop_after=None,
    health=None,
    dataset=None,
    workers=0,
    metric='EpochMetric',
    val_dataset=None,
    **options,
):
    loader = dict(
        batch_size=batch_size,
        num_workers=workers,
        dataset=dataset or Points(),
        persistent_workers=workers > 0,
        sampler=dict(type='DefaultSampler', shuffle=dataset is not None),
    )
    if val:
        options.update(
            val_dataloader=dict(loader, dataset=val_dataset or loader['dataset']),
            val_cfg=dict(),
            val_evaluator=dict(type=metric),
        )
        checkpoint = dict(dict(save_best='value', rule='greater'), **(checkpoint or {}))
    options['default_hooks'] = dict(
        checkpoint=dict(dict(type='CheckpointHook', interval=1), **(checkpoint or {})),
        health=health,
    )
    options.setdefault('optim_wrapper', dict(optimizer=dict(type='AdamW', lr=0.1)))
    hooks = [dict(type=ema, momentum=0.5)] if ema else []
    hooks += [dict(type='InterruptHook', after=stop_after)] if stop_after else []
    return CheckedRunner(
        dict(dict(type='SmallModel'), **(model or {})),
        str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        param_scheduler=scheduler or dict(type='StepLR', step_size=1, gamma=0.5, end=9),
        custom_hooks=hooks,
        randomness=dict(seed=0),
        experiment_name=f'runner{os.urandom(4).hex()}',
        log_level='INFO',
        **options,
    )


def log_of(runner):
    return ''.join(file.read_text() for file in Path(runner.log_dir).glob('*.log'))
