"""Curves of training runs, read from the logs that tools/train.py writes."""

import json
import statistics
from pathlib import Path

from groupmamba_mm.errors import DataError
from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.analysis.curves'):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

#: A run's values of one key by step.
Curve = dict[int, float]


def read_run(work_dir: str) -> list[dict[str, float]]:
    """Read what a run logged; a resumed run has several logs.

    Args:
        work_dir: Where tools/train.py wrote.

    Returns:
        The records in the order of writing, each with its 'step'.

    Raises:
        DataError: There is no log.
    """
    logs = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not logs:
        raise DataError(
            f'{work_dir} has no log (*/vis_data/scalars.json); give a work directory '
            'of tools/train.py'
        )
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def curve_of(records: list[dict[str, float]], key: str, work_dir: str) -> Curve:
    """Pick one value from a run's records.

    Args:
        records: What :func:`read_run` returned.
        key: Its name.
        work_dir: Of the run, for the error.

    Returns:
        The values by step; where a resumed run logged a step again, the later one.

    Raises:
        DataError: The run did not log it.
    """
    curve = {record['step']: record[key] for record in records if key in record}
    if not curve:
        known = sorted({name for record in records for name in record} - {'step'})
        raise DataError(f'{work_dir}: no {key!r} was logged; there are {", ".join(known)}')
    return curve


def unit_of(records: list[dict[str, float]], key: str) -> str:
    """What a run counted the steps of a value in: 'epoch' or 'iteration'.

    mmengine counts validations as the training loop goes, in epochs or in iterations, and says
    neither in their records. Those of training have the iteration, and the epoch if there is one.

    Args:
        records: What :func:`read_run` returned.
        key: The value's name.

    Returns:
        The unit.
    """
    is_validation = not any('iter' in record for record in records if key in record)
    return 'epoch' if is_validation and any('epoch' in r for r in records) else 'iteration'


def mean_and_deviation(curves: list[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Average runs step by step.

    Args:
        curves: One for each run.

    Returns:
        The steps that all runs have, the means, and the sample standard deviations (0 for one run).
    """
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[step] for curve in curves] for step in steps]
    deviations = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return steps, [statistics.fmean(column) for column in columns], deviations


def draw(groups: dict[str, dict[str, list[Curve]]], units: dict[str, str], out: str) -> None:
    """Draw a panel for each key, with a curve and a shaded deviation for each group.

    Args:
        groups: The runs' curves by group and key.
        units: The keys in the order of the panels, with what their steps are counted in.
        out: The picture.
    """
    figure, panels = plt.subplots(1, len(units), figsize=(5 * len(units), 3.6), squeeze=False)
    for panel, (key, unit) in zip(panels[0], units.items()):
        for name, curves in groups.items():
            if key not in curves:
                continue
            steps, means, deviations = mean_and_deviation(curves[key])
            count = f' ({len(curves[key])} runs)' if len(curves[key]) > 1 else ''
            (line,) = panel.plot(
                steps, means, marker='.' if len(steps) < 12 else None, label=name + count
            )
            panel.fill_between(
                steps,
                [m - d for m, d in zip(means, deviations)],
                [m + d for m, d in zip(means, deviations)],
                color=line.get_color(),
                alpha=0.25,
                linewidth=0,
            )
        panel.set_xlabel(unit)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(key)
        panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.tight_layout()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
