"""Writing down a benchmark: CSV, JSON, a Markdown table and a picture, row by row."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from groupmamba_mm.extras import explain_missing

from .benchmark import COLUMNS, CONTIGUOUS
from .subjects import OURS

with explain_missing('a report of the benchmark'):
    import matplotlib

    matplotlib.use('Agg')  # without a window
    from matplotlib import pyplot as plt

Row = dict[str, Any]

_HEADINGS = (
    'model',
    'params [M]',
    'MACs [G]',
    'setting',
    'inference [img/s]',
    'inference [ms]',
    'latency, batch 1 [ms]',
    'training [img/s]',
    'training [ms]',
    'memory, inference [GB]',
    'memory, training [GB]',
    'note',
)
#: What the picture's colours tell apart.
_SETTING = ('height', 'width', 'batch', 'precision', 'layout', 'mode', 'backend')
# In points, nearest first: where a label may stand beside its marker.
_PLACES = [
    (x, y)
    for distance in (6, 14, 24, 36, 50, 66)
    for x, y in (
        (distance, 0),
        (0, distance),
        (0, -distance),
        (-distance, 0),
        (distance, distance),
        (-distance, distance),
        (distance, -distance),
        (-distance, -distance),
    )
]


class Report:
    """The files of one run. All but the picture are complete after every row.

    Args:
        folder: Where they are written; made if it is not there.
        conditions: What the figures hold for, by headings.
    """

    def __init__(self, folder: Path, conditions: dict[str, str]) -> None:
        self.folder = folder
        self.conditions = conditions
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'results.csv', 'w', newline='') as file:
            csv.writer(file).writerow(COLUMNS)

    def add(self, row: Row) -> None:
        """Write a row down at once.

        Args:
            row: A value or None for each of ``COLUMNS``.
        """
        self.rows.append(row)
        with open(self.folder / 'results.csv', 'a', newline='') as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        (self.folder / 'results.json').write_text(
            json.dumps(dict(conditions=self.conditions, rows=self.rows), indent=1) + '\n'
        )
        (self.folder / 'results.md').write_text(
            f'{conditions_list(self.conditions)}\n\n{make_table(self.rows)}\n'
        )

    def draw(self) -> bool:
        """Draw throughput over parameters, if there is a throughput.

        Returns:
            Whether there was one.
        """
        panels = [
            name
            for name in ('inference', 'training')
            if any(row[f'{name}_img_s'] for row in self.rows)
        ]
        if panels:
            draw_throughput(
                self.rows,
                panels,
                self.folder / 'throughput.png',
                self.conditions.get('GPU', self.conditions['CPU']).split(',')[0],
            )
        return bool(panels)


def conditions_list(conditions: dict[str, str]) -> str:
    """The conditions as a Markdown list."""
    return '\n'.join(f'- {heading}: {text}' for heading, text in conditions.items())


def make_table(rows: list[Row]) -> str:
    """Make a Markdown table of rows, quartiles in brackets after their medians."""
    lines = [f'| {" | ".join(_HEADINGS)} |', '|---' + '|---:' * 2 + '|---' + '|---:' * 7 + '|---|']
    for row in rows:
        cells = [
            row['model'],
            _number(row['params'] / 1e6, '.4g'),
            _number(row['macs'] / 1e9, '.4g'),
            _setting(row, _SETTING),
            _number(row['inference_img_s']),
            _times(row, 'inference'),
            _times(row, 'latency'),
            _number(row['training_img_s']),
            _times(row, 'training'),
            _number(row['inference_peak_gb'], '.2f'),
            _number(row['training_peak_gb'], '.2f'),
            row['note'].replace('|', '/'),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def summarise(row: Row) -> str:
    """What a row measured, in one line for the screen."""
    parts = []
    for name in ('inference', 'training'):
        if row[f'{name}_ms'] is not None:
            memory = row[f'{name}_peak_gb']
            parts.append(
                f'{name} {_number(row[f"{name}_img_s"])} img/s, {_times(row, name)} ms'
                + ('' if memory is None else f', {memory:.2f} GB')
            )
    if row['latency_ms'] is not None:
        parts.insert(1, f'latency {_times(row, "latency")} ms')
    return '; '.join(filter(None, (*parts, row['note'])))


def _number(value: Any, spec: str = '') -> str:
    if value is None:
        return '-'
    return format(value, spec or (',.0f' if value >= 100 else '.3g'))


def _times(row: Row, name: str) -> str:
    values = [row[f'{name}_ms{part}'] for part in ('', '_q1', '_q3')]
    if values[0] is None:
        return '-'
    digits = 0 if values[1] >= 1000 else 1 if values[1] >= 100 else 2
    median, lower, upper = (f'{value:.{digits}f}' for value in values)
    return f'{median} ({lower}-{upper})'


def _setting(row: Row, columns: tuple[str, ...]) -> str:
    """Name those parts of a row's setting that are in ``columns``."""
    parts = []
    if 'height' in columns or 'width' in columns:
        parts.append(f'{row["height"]}x{row["width"]}')
    if 'batch' in columns:
        parts.append(f'batch {row["batch"]}')
    parts += [row[column] for column in ('precision', 'mode') if column in columns]
    if 'layout' in columns and row['layout'] != CONTIGUOUS:
        parts.append(row['layout'])
    if 'backend' in columns and row['backend'] is not None:
        parts.append(f'scan {row["backend"]}')
    return ', '.join(parts)


def short_names(names: list[str]) -> dict[str, str]:
    """Shorten a config's name to the size where that stays unambiguous."""
    short = {
        name: (re.search(r'groupmamba-([a-z]+(?:-[a-z]+)*)', name) or (None, name))[1]
        for name in names
    }
    return {
        name: label if list(short.values()).count(label) == 1 else name
        for name, label in short.items()
    }


def draw_throughput(rows: list[Row], panels: list[str], path: Path, device: str) -> None:
    """Draw throughput over parameters, the axes of the paper's Figure 4 without the accuracy.

    Args:
        rows: The rows; those without a throughput are left out.
        panels: 'inference', 'training' or both.
        path: The PNG.
        device: The device's name, for the title.
    """
    differing = tuple(
        column
        for column in _SETTING
        if len({row[column] for row in rows if row['kind'] == OURS or column != 'backend'} - {None})
        > 1
    )
    common = _setting(
        rows[0],
        tuple(
            column
            for column in ('height', 'width', 'batch', 'precision', 'mode')
            if column not in differing
        ),
    )
    labels = short_names(list(dict.fromkeys(row['model'] for row in rows)))
    settings = list(dict.fromkeys(_setting(row, differing) for row in rows))
    colours = {setting: f'C{index % 10}' for index, setting in enumerate(settings)}
    figure, axes = plt.subplots(1, len(panels), figsize=(6.8 * len(panels), 5.6), squeeze=False)
    for panel, name in zip(axes[0], panels):
        shown = [row for row in rows if row[f'{name}_img_s']]
        tops = {}
        for row in shown:
            x, y = row['params'] / 1e6, row[f'{name}_img_s']
            ours = row['kind'] == OURS
            colour = colours[_setting(row, differing)]
            panel.plot(
                x,
                y,
                'o' if ours else '^',
                markersize=8,
                color=colour,
                markerfacecolor=colour if ours else 'white',
                zorder=3,
            )
            tops[row['model']] = max(tops.get(row['model'], (x, y)), (x, y))
        panel.set_xlim(0, 1.2 * max(x for x, _ in tops.values()))
        panel.set_ylim(0, 1.15 * max(y for _, y in tops.values()))
        panel.set_xlabel('parameters [M]')
        panel.set_ylabel('images/s')
        panel.set_title(name)
        panel.grid(alpha=0.3)
        _label(
            panel,
            {labels[model]: top for model, top in tops.items()},
            [(row['params'] / 1e6, row[f'{name}_img_s']) for row in shown],
        )
    figure.suptitle(f'{device}: {common}', fontsize=11)
    _add_legend(figure, rows, colours)
    figure.savefig(path, dpi=130, bbox_inches='tight')
    plt.close(figure)


def _add_legend(figure: plt.Figure, rows: list[Row], colours: dict[str, str]) -> None:
    def handle(marker: str, face: str, colour: str, label: str) -> plt.Line2D:
        return plt.Line2D(
            [],
            [],
            linestyle='',
            marker=marker,
            markersize=8,
            color=colour,
            markerfacecolor=face,
            label=label,
        )

    handles = []
    if any(row['kind'] == OURS for row in rows):
        handles.append(handle('o', 'black', 'black', 'GroupMamba (this project)'))
    if any(row['kind'] != OURS for row in rows):
        handles.append(handle('^', 'white', 'black', 'peer (timm)'))
    if len(colours) > 1:
        handles += [
            handle('s', colour, colour, setting or CONTIGUOUS)
            for setting, colour in colours.items()
        ]
    figure.legend(
        handles=handles,
        loc='upper center',
        bbox_to_anchor=(0.5, 0.02),
        ncols=min(4, len(handles)),
        fontsize=9,
        frameon=False,
    )


def _label(
    panel: plt.Axes, tops: dict[str, tuple[float, float]], points: list[tuple[float, float]]
) -> None:
    """Write names beside points, each where it covers no marker and no other name."""
    figure = panel.figure
    figure.canvas.draw()
    renderer, frame = figure.canvas.get_renderer(), panel.get_window_extent()
    radius = 5 * figure.dpi / 72
    taken = [
        matplotlib.transforms.Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)
        for x, y in panel.transData.transform(points)
    ]
    for name, top in sorted(tops.items(), key=lambda item: -item[1][1]):
        for x, y in _PLACES:
            text = panel.annotate(
                name,
                top,
                (x, y),
                textcoords='offset points',
                fontsize=8,
                ha='center' if x == 0 else 'left' if x > 0 else 'right',
                va='center' if y == 0 else 'bottom' if y > 0 else 'top',
                arrowprops=dict(
                    arrowstyle='-',
                    lw=0.5,
                    color='grey',
                    shrinkA=0,
                    relpos=(0.5 if x == 0 else float(x < 0), 0.5 if y == 0 else float(y < 0)),
                )
                if x * x + y * y > 300
                else None,
            )
            text.update_positions(renderer)
            # an annotation's own extent counts its line in, which may cross what it likes
            box = matplotlib.text.Text.get_window_extent(text, renderer)
            inside = (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
            )
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = panel.annotate(name, top, (6, 6), textcoords='offset points', fontsize=8)
            box = text.get_window_extent(renderer)
        taken.append(box)
