"""Compare a checkpoint with a model before loading, and say what fits."""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from groupmamba_mm.errors import CheckpointError
from groupmamba_mm.log import write_log

# How many groups of keys a report names before it only counts them.
MAX_SHOWN = 6


@dataclass(frozen=True)
class ExpectedKeys:
    """Keys that are known not to match, and why.

    Args:
        pattern (str): A regular expression, searched for in the key after ``prefix``.
        reason (str): Why such keys need not match; it stands in the report.
        prefix (str): What a key must begin with. Defaults to ''.
    """

    pattern: str
    reason: str
    prefix: str = ''

    def with_prefix(self, prefix: str) -> 'ExpectedKeys':
        """Return the same keys for a module that is a child called ``prefix``.

        Args:
            prefix (str): Put before the present prefix, with its dot: 'backbone.'.

        Returns:
            ExpectedKeys: A copy.
        """
        return replace(self, prefix=prefix + self.prefix)

    def covers(self, key: str) -> bool:
        """Say whether a key is one of these.

        Args:
            key (str): A key of a state dict.

        Returns:
            bool: True if it begins with the prefix and the pattern is found after that.
        """
        if not key.startswith(self.prefix):
            return False
        return re.search(self.pattern, key[len(self.prefix) :]) is not None


# Files from before BatchNorm counted its batches lack this; the count is no weight.
BATCH_COUNTERS = ExpectedKeys(r'num_batches_tracked$', 'counts batches, no weight')


@dataclass(frozen=True)
class LoadReport:
    """What of a checkpoint fits a model.

    Args:
        matched (tuple[str]): Keys of both with the same shape.
        missing (tuple[str]): Keys of the model that the checkpoint lacks.
        unexpected (tuple[str]): Keys of the checkpoint that the model lacks.
        mismatched (tuple): Keys of both with different shapes, as
            ``(key, shape in the checkpoint, shape in the model)``.
        expected_missing (tuple): ``(key, reason)`` of missing keys that were announced.
        expected_unused (tuple): ``(key, reason)`` of unexpected keys that were announced.
        matched_elements (int): Number of the model's elements that the checkpoint gives.
        wanted_elements (int): Number of the model's elements without those announced as missing.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple, tuple], ...]
    expected_missing: tuple[tuple[str, str], ...]
    expected_unused: tuple[tuple[str, str], ...]
    matched_elements: int
    wanted_elements: int

    @property
    def matched_share(self) -> float:
        """float: Share, from 0 to 1, of the wanted elements that the checkpoint gives."""
        if self.wanted_elements == 0:
            return 0.0
        return self.matched_elements / self.wanted_elements

    @property
    def complete(self) -> bool:
        """bool: Whether nothing of the model is left over that was not announced."""
        return bool(self.matched) and not self.missing and not self.mismatched

    def __str__(self) -> str:
        lines = [
            f'{len(self.matched)} tensors match, {_percent(self.matched_share)} of the '
            "model's elements"
        ]
        if self.mismatched:
            lines.append(
                f'{len(self.mismatched)} have another shape: '
                + _listed(
                    f'{key} ({_shape(found)} in the checkpoint, {_shape(wanted)} in the model)'
                    for key, found, wanted in self.mismatched
                )
            )
        if self.missing:
            lines.append(
                f'{len(self.missing)} are missing in the checkpoint: '
                + _listed(_groups(self.missing))
            )
        if self.unexpected:
            lines.append(
                f'{len(self.unexpected)} are not in the model: ' + _listed(_groups(self.unexpected))
            )
        lines += _reasons(self.expected_missing, 'missing as expected')
        lines += _reasons(self.expected_unused, 'unused as expected')
        return '\n'.join(lines)


def without_prefix(
    state_dict: Mapping[str, Any], prefix: str | None, source: str
) -> dict[str, Any]:
    """Take a module's tensors out of a checkpoint.

    Args:
        state_dict (Mapping): The checkpoint's tensors. 'module.' before every key, which wrappers
            for several GPUs leave behind, is dropped.
        prefix (str, optional): The module's place, with its dot at the end or without; '' or None
            for the whole checkpoint.
        source (str): Name of the checkpoint, for the message.

    Returns:
        dict: The tensors with the prefix, without it.

    Raises:
        CheckpointError: If there are none.
    """
    keys = {key: key for key in state_dict}
    while keys and all(key.startswith('module.') for key in keys):
        keys = {key[len('module.') :]: old for key, old in keys.items()}
    if prefix:
        dotted = prefix if prefix.endswith('.') else f'{prefix}.'
        found = {key[len(dotted) :]: old for key, old in keys.items() if key.startswith(dotted)}
        if not found:
            starts = sorted({key.partition('.')[0] for key in keys})
            raise CheckpointError(
                f'checkpoint {source} has no tensor whose name begins with {dotted!r} (the names '
                f'begin with {_listed(starts)}); set prefix to the part that is wanted, or leave '
                'it away for a checkpoint of the module alone'
            )
        keys = found
    return {key: state_dict[old] for key, old in keys.items()}


def match_state_dict(
    model_state: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    expected_missing: Iterable[ExpectedKeys] = (),
    expected_unused: Iterable[ExpectedKeys] = (),
) -> LoadReport:
    """Compare the keys and shapes of a checkpoint with those of a model.

    Args:
        model_state (Mapping): The model's ``state_dict()``.
        state_dict (Mapping): The checkpoint's tensors.
        expected_missing (Iterable[ExpectedKeys]): Keys of the model that the checkpoint may lack.
        expected_unused (Iterable[ExpectedKeys]): Keys of the checkpoint that the model may lack.

    Returns:
        LoadReport: The comparison; nothing is loaded.
    """
    expected_missing, expected_unused = tuple(expected_missing), tuple(expected_unused)
    matched, missing, mismatched, known_missing = [], [], [], []
    matched_elements = wanted_elements = 0
    for key, wanted in model_state.items():
        elements = wanted.numel() if isinstance(wanted, torch.Tensor) else 0
        if key not in state_dict:
            reason = _reason(key, expected_missing)
            if reason is None:
                missing.append(key)
                wanted_elements += elements
            else:
                known_missing.append((key, reason))
            continue
        wanted_elements += elements
        found_shape, wanted_shape = _shape_of(state_dict[key]), _shape_of(wanted)
        if found_shape == wanted_shape:
            matched.append(key)
            matched_elements += elements
        else:
            mismatched.append((key, found_shape, wanted_shape))

    unexpected, known_unused = [], []
    for key in state_dict:
        if key in model_state:
            continue
        reason = _reason(key, expected_unused)
        if reason is None:
            unexpected.append(key)
        else:
            known_unused.append((key, reason))
    return LoadReport(
        tuple(matched),
        tuple(missing),
        tuple(unexpected),
        tuple(mismatched),
        tuple(known_missing),
        tuple(known_unused),
        matched_elements,
        wanted_elements,
    )


def require_share(report: LoadReport, min_matched_share: float, source: str) -> None:
    """Refuse a checkpoint that fits too little of the model.

    Args:
        report (LoadReport): The comparison.
        min_matched_share (float): Wanted share of the model's elements, 1 for all of them.
        source (str): Name of the checkpoint, for the message.

    Raises:
        CheckpointError: If less than the share matches. With 1, also if any tensor is missing or
            of another shape.
    """
    if min_matched_share >= 1 and report.complete:
        return
    if min_matched_share < 1 and report.matched and report.matched_share >= min_matched_share:
        return
    details = '; '.join(str(report).splitlines())
    raise CheckpointError(
        f'checkpoint {source} does not fit the model, {_percent(min_matched_share)} must match '
        f'and nothing was loaded: {details}. Give the checkpoint of this config, or correct the '
        "config; for weights of a backbone alone use the backbone's init_cfg"
    )


def load_matched(module: nn.Module, state_dict: Mapping[str, Any], report: LoadReport) -> None:
    """Copy the matched tensors of a report into a module.

    Args:
        module (nn.Module): The model that the report was made for.
        state_dict (Mapping): The checkpoint's tensors.
        report (LoadReport): Names the tensors to copy.
    """
    fitting = OrderedDict((key, state_dict[key]) for key in report.matched)
    metadata = getattr(state_dict, '_metadata', None)
    if metadata is not None:
        # Modules read the version they were saved with from here.
        fitting._metadata = metadata  # type: ignore[attr-defined]
    module.load_state_dict(fitting, strict=False)


def load_matching(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    source: str,
    min_matched_share: float,
    expected_missing: Iterable[ExpectedKeys] = (),
    expected_unused: Iterable[ExpectedKeys] = (),
    logger: logging.Logger | None = None,
) -> LoadReport:
    """Load what fits and report it, or load nothing when too little fits.

    Args:
        module (nn.Module): The model.
        state_dict (Mapping): The checkpoint's tensors.
        source (str): Name of the checkpoint, for the report.
        min_matched_share (float): Wanted share of the model's elements, 1 for all of them.
        expected_missing (Iterable[ExpectedKeys]): Keys of the model that the checkpoint may lack.
        expected_unused (Iterable[ExpectedKeys]): Keys of the checkpoint that the model may lack.
        logger (logging.Logger, optional): Where the report goes. Defaults to the current one.

    Returns:
        LoadReport: What was loaded.

    Raises:
        CheckpointError: If less than the share matches.
    """
    report = match_state_dict(module.state_dict(), state_dict, expected_missing, expected_unused)
    log_report(report, source, logger)
    require_share(report, min_matched_share, source)
    load_matched(module, state_dict, report)
    return report


def log_report(report: LoadReport, source: str, logger: logging.Logger | None = None) -> None:
    """Write a report to the log, as a warning when it holds something that was not announced.

    Args:
        report (LoadReport): The comparison.
        source (str): Name of the checkpoint.
        logger (logging.Logger, optional): Defaults to the current one.
    """
    surprising = report.missing or report.mismatched or report.unexpected
    write_log(
        f'Checkpoint {source}:\n{report}', logging.WARNING if surprising else logging.INFO, logger
    )


def expected_unused_keys(model: nn.Module) -> tuple[ExpectedKeys, ...]:
    """Collect what a model's modules say about keys that they do not use.

    Args:
        model (nn.Module): Any of its modules, the model and its backbone among them, may have a
            method ``expected_unused_keys() -> tuple[ExpectedKeys]`` about its own keys.

    Returns:
        tuple[ExpectedKeys]: Their answers with the modules' names before the keys.
    """
    collected = []
    for name, module in model.named_modules():
        if hasattr(module, 'expected_unused_keys'):
            prefix = f'{name}.' if name else ''
            collected += [keys.with_prefix(prefix) for keys in module.expected_unused_keys()]
    return tuple(collected)


def _reason(key: str, expected: tuple[ExpectedKeys, ...]) -> str | None:
    return next((keys.reason for keys in expected if keys.covers(key)), None)


def _shape_of(value: Any) -> tuple:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _shape(shape: tuple) -> str:
    return 'x'.join(map(str, shape)) or 'scalar'


def _percent(share: float) -> str:
    # Rounded down: 100% is said of a whole only.
    return f'{int(share * 1000) / 10:g}%'


def _listed(entries: Iterable[str]) -> str:
    entries = list(entries)
    more = len(entries) - MAX_SHOWN
    return ', '.join(entries[:MAX_SHOWN]) + (f' and {more} more' if more > 0 else '')


def _groups(keys: Iterable[str]) -> list[str]:
    """Group keys by the module that is at most two names deep: ``backbone.stem.* (12)``."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault('.'.join(key.split('.')[:-1][:2]), []).append(key)
    return [
        members[0] if len(members) == 1 else f'{prefix}.* ({len(members)})'.lstrip('.')
        for prefix, members in groups.items()
    ]


def _reasons(expected: tuple[tuple[str, str], ...], what: str) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for key, reason in expected:
        by_reason.setdefault(reason, []).append(key)
    return [
        f'{len(keys)} {what} ({reason}): {_listed(_groups(keys))}'
        for reason, keys in by_reason.items()
    ]
