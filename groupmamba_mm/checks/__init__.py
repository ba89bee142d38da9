"""Checks of a config and its data: what the model will really be given, against the files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from groupmamba_mm.engine.cli import cause_of
from groupmamba_mm.engine.config_checks import type_name
from groupmamba_mm.errors import DataError, UserError
from groupmamba_mm.extras import explain_missing

from . import files, labels, plan
from .config import check_config, metrics_of
from .findings import Finding, Report
from .parts import Part, build, labels_of, parts_of
from .samples import batches, given, load

with explain_missing('groupmamba_mm.checks'):
    from mmengine.config import Config

__all__ = ['Finding', 'Report', 'build_quickly', 'check', 'check_quickly']


def check(
    cfg: Config, splits: Sequence[str], full: bool = False, trained: tuple[str, ...] | None = None
) -> tuple[Report, dict[str, Any]]:
    """Build the data sets of a config and compare them with the files, the model and each other.

    Args:
        cfg: The config.
        splits: Which of 'train', 'val' and 'test'; one without a loader is left out.
        full: Whether to read every file; else as much as takes seconds.
        trained: The classes that a checkpoint was trained with, None if none is tested.

    Returns:
        The report, and the data sets that were built, by split.
    """
    report, built = Report(), {}
    parts = [part for split in splits for part in parts_of(cfg, split)]
    report.add(check_config(cfg, parts))
    report.add(plan.check_plan(cfg, splits))
    for part in parts:
        # a file with gaps would end in an exception of the library that reads it
        if report.add(files.missing_paths(part)) and part.is_coco and part.is_local:
            report.add(files.read_coco(part, _needed(cfg, part)))
    if report.of('error'):
        return report, built
    for split in dict.fromkeys(part.split for part in parts):
        of_split = [part for part in parts if part.split == split]
        built[split] = _build(cfg, of_split)
        report.add(batches(cfg, split, len(built[split])))
    if 'train' in built:
        report.add(plan.unfinished_schedules(cfg, len(built['train'])))
    for part in parts:
        _check_part(cfg, part, full, report)
    report.add(labels.same_in_splits(parts, trained))
    report.add(labels.numbered_alike(parts))
    for part in parts:
        report.add(labels.ignored_alike(part, metrics_of(cfg, part.split)))
    for part in [part for part in parts if part.split == 'train'] or parts:
        report.add(labels.heads(cfg, part))
    report.add(files.shared_files(parts, full))
    return report, built


def check_quickly(
    cfg: Config, splits: Sequence[str], trained: tuple[str, ...] | None = None
) -> tuple[list[Finding], dict[str, Any]]:
    """Make the checks that take seconds, before a run.

    Args:
        cfg: The config.
        splits: Which of 'train', 'val' and 'test'.
        trained: The classes that a checkpoint was trained with.

    Returns:
        Warnings, and the data sets that were built, by split.

    Raises:
        ConfigError: If the config cannot be meant.
        DataError: If the data do not fit.
    """
    report, built = check(cfg, splits, trained=trained)
    report.require_no_error()
    return report.of('warning'), built


def build_quickly(cfg: Config, splits: Sequence[str]) -> dict[str, Any]:
    """Build the data sets of a config, in a process beside the one that makes the checks.

    Args:
        cfg: The config.
        splits: Which of 'train', 'val' and 'test'; one without a loader is left out.

    Returns:
        The data sets, by split.

    Raises:
        DataError: If files are missing or cannot be read, as :func:`check_quickly` says it.
    """
    report, parts = Report(), {split: parts_of(cfg, split) for split in splits}
    for of_split in parts.values():
        for part in of_split:
            report.add(files.missing_paths(part))
    report.require_no_error()
    return {split: _build(cfg, of_split) for split, of_split in parts.items() if of_split}


def _needed(cfg: Config, part: Part) -> tuple[str, ...]:
    """Keys that a data set's annotations need; () if it is used without annotations."""
    metrics = metrics_of(cfg, part.split)
    if part.split != 'train' and metrics and all(metric.get('format_only') for metric in metrics):
        return ()
    kinds = [
        kind
        for metric in metrics
        if metric.get('ann_file')
        for kind in (
            [metric['metric']]
            if isinstance(metric.get('metric', 'bbox'), str) and 'metric' in metric
            else metric.get('metric', [])
        )
    ]
    masks = part.split == 'train' and any(
        step.get('with_mask') for step in part.cfg.get('pipeline') or ()
    )
    needs = ['segmentation'] if masks or 'segm' in kinds else []
    needs += (
        ['iscrowd']
        if part.split != 'train' and any(type_name(metric) == 'CocoMetric' for metric in metrics)
        else []
    )
    return tuple(needs) or ('bbox',)


def _build(cfg: Config, parts: list[Part]) -> Any:
    try:
        return build(cfg, parts)
    except UserError:
        raise
    except Exception as error:
        # Each library has assertions of its own about what it reads.
        what = cause_of(error) or f'{type(error).__name__}: {error}'
        if 'at least one array to concatenate' in what:  # how an empty list of images ends
            raise DataError(
                f'{parts[0]} of {parts[0].root} have no image left after all filters; '
                'check filter_cfg, indices and img_suffix'
            ) from None
        if (odd := files.odd_line(parts[0])) is not None:
            raise DataError(str(odd)) from error
        raise DataError(
            f'{parts[0].key} cannot be built from {parts[0].root or "its files"}: '
            f'{" ".join(what.split())[:200]}; compare {parts[0].cfg.get("ann_file") or "the files"} '
            f'with what {type_name(parts[0].cfg)} reads'
        ) from error


def _check_part(cfg: Config, part: Part, full: bool, report: Report) -> None:
    if part.scope == 'mmseg' and part.is_local:
        if not report.add(files.missing_label_maps(part)):
            return
    report.add(labels.names_of_labels(part))
    report.add(labels.colours(part))
    report.add(files.passed_over(part, full))
    loaded, budget = load(part, full), cfg.get('max_bad_images', 0)
    if part.scope == 'mmpretrain' and part.is_local and part.cfg.get('ann_file'):
        report.add(
            replace(finding, severity='warning') if finding.how_many <= budget else finding
            for finding in files.missing_images(part)
        )
    unreadable = sum(finding.what == '' for finding in loaded.findings)
    whole = report.add(
        replace(finding, severity='warning')
        if finding.what == '' and unreadable <= budget
        else finding
        for finding in loaded.findings
    )
    if part.scope == 'mmseg':
        counts, read, unlabelled = loaded.counts, loaded.read, not loaded.labelled
    else:
        infos = list(part.infos(*[None] * full))
        counts, read = Counter(), len(infos)
        for info in infos:
            counts.update(labels_of(info))
        unlabelled = not any({'gt_label', 'instances'} & info.keys() for info in infos)
    if not unlabelled:
        report.add(labels.learnable(part, counts, read, loaded.ignored, full))
    if whole:
        report.add(given(cfg, part, loaded))
