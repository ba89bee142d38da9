"""The paper's tables and its Figures 1 and 4, with what this project counted or measured beside.

Writes docs/paper.md and its pictures. What the paper states is in paper_results.yml beside this
file, what is counted here comes from the metafiles of the configs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import matplotlib
import yaml

from groupmamba_mm.backbones.archs import resolve_arch
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import DataError

matplotlib.use('Agg')
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_name('paper_results.yml')

_OURS, _OTHERS = 'tab:red', 'tab:gray'
_INTRODUCTION = """# The paper's tables and figures

Written by `python tools/analysis_tools/paper.py`; do not edit it by hand. What stands under
*counted here* was counted with this project's own modules: the paper's reading of the family /
the released layout. Everything else is **as published and not reproduced here**: nobody has trained
these configs for 300 epochs yet.

Figure 5 (loss curves, mean and shaded deviation) is drawn from your own runs by
`tools/analysis_tools/compare_runs.py`, Figures 3, 6 and 7 (truth above, prediction below) by
`tools/analysis_tools/prediction_grid.py`.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--check',
        action='store_true',
        help='write nothing, and end with exit code 1 if the page differs',
    )
    return parser.parse_args(argv)


def read_counts(root: Path) -> dict[str, tuple[float, float]]:
    """Parameters in millions and multiply-adds in 10^9 of each config's model.

    Args:
        root: The checkout.

    Returns:
        The counts by the config's name.
    """
    imported = yaml.safe_load((root / 'model-index.yml').read_text(encoding='utf-8'))['Import']
    models = [
        model
        for path in imported
        for model in yaml.safe_load((root / path).read_text(encoding='utf-8'))['Models']
    ]
    return {
        model['Name']: (model['Metadata']['Parameters'] / 1e6, model['Metadata']['FLOPs'] / 1e9)
        for model in models
    }


def make_table(table: dict[str, Any], counts: dict[str, tuple[float, float]]) -> str:
    """A table of the paper in Markdown, with the counts of our configs in two more columns.

    Args:
        table: An entry of ``tables`` in paper_results.yml.
        counts: What :func:`read_counts` returned.

    Returns:
        The table.

    Raises:
        DataError: It names a config or a row that there is not.
    """
    here = table['here']
    lost = (set(here) - {row[0] for row in table['rows']}) or {
        name for names in here.values() for name in names if name is not None
    } - set(counts)
    if lost:
        raise DataError(
            f'paper_results.yml, table {table["number"]}: no row or metafile has '
            f'{", ".join(sorted(lost))}; correct the name'
        )

    def cells(row: list) -> list[str]:
        found = [counts.get(name) for name in here.get(row[0], [])]
        if not found:
            return ['', '']
        return [
            ' / '.join('-' if pair is None else f'{pair[i]:.1f}{unit}' for pair in found)
            for i, unit in enumerate('MG')
        ]

    heads = [*table['columns'], 'params, counted here', 'MACs, counted here']
    rows = [[*map(str, row), *cells(row)] for row in table['rows']]
    rows = [[f'**{cell}**' if cell and row[0] in here else cell for cell in row] for row in rows]
    lines = [heads, ['---'] + ['---:'] * (len(heads) - 1), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def make_architectures(
    stated: dict[str, dict[str, Any]], counts: dict[str, tuple[float, float]]
) -> str:
    """Table 6, read from the code.

    Args:
        stated: ``architectures`` of paper_results.yml.
        counts: What :func:`read_counts` returned.

    Returns:
        The table in Markdown.

    Raises:
        DataError: The code's stem, widths or depths are not the paper's.
    """
    lines = [
        '| | stem | C1 to C4 | blocks | params, paper | MACs, paper | params, counted here '
        '| MACs, counted here |',
        '|---|---|---|---|---:|---:|---:|---:|',
    ]
    for size, paper in stated.items():
        arch = resolve_arch(size)
        code = dict(
            stem=[arch.stem_channels, arch.embed_dims[0]],
            channels=list(arch.embed_dims),
            blocks=list(arch.depths),
        )
        differing = [key for key, value in code.items() if value != paper[key]]
        if differing:
            raise DataError(
                f'{", ".join(differing)} of {size} in the code are not those of Table 6; one of '
                'archs.py and paper_results.yml is wrong'
            )
        params, macs = counts[f'groupmamba-{size}_8xb128_in1k']
        shapes = ' | '.join(', '.join(map(str, code[key])) for key in code)
        lines.append(
            f'| {size} | {shapes} | {paper["params"]} | {paper["MACs"]} | {params:.1f}M '
            f'| {macs:.1f}G |'
        )
    return '\n'.join(lines)


def draw_accuracy(table: dict[str, Any], out: Path) -> None:
    """Figure 1: top-1 over parameters, one line for each kind of model.

    Args:
        table: Table 1.
        out: The picture.
    """
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for name, _, image_size, params, _, top1 in table['rows']:
        kind, _, size = name.rpartition('-')
        if kind == 'DeiT' and image_size == 384:
            size = f'{size} at 384'
        kinds.setdefault(kind, []).append((float(params.rstrip('M')), top1, size))
    figure, axes = plt.subplots(figsize=(7, 4.4))
    colors = iter(['tab:blue', 'tab:orange', 'tab:green', 'black', *plt.cm.Dark2.colors])
    for kind, points in kinds.items():
        is_ours = kind == 'GroupMamba'
        points.sort()
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            marker='*' if is_ours else 'o',
            markersize=13 if is_ours else 4,
            linewidth=2.5 if is_ours else 1,
            color=_OURS if is_ours else next(colors),
            zorder=3 if is_ours else 2,
            label=kind,
        )
        for x, y, size in points:
            axes.annotate(size, (x, y), textcoords='offset points', xytext=(4, 4), fontsize=7)
    axes.set_xlabel('parameters [million]')
    axes.set_ylabel('top-1 on ImageNet-1K [%], as published')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc='lower right', ncols=2)
    _save(figure, out)


def draw_throughput(
    stated: list[dict[str, Any]], measured: list[dict[str, Any]], out: Path
) -> None:
    """Figure 4: top-1 over throughput, circles as large as the models; beside it measured speeds.

    Args:
        stated: ``throughput`` of paper_results.yml.
        measured: The rows of ``measured``.
        out: The picture.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for axes, points, title in (
        (panels[0], stated, 'as the paper states it: one A100, batch 128'),
        (panels[1], measured, 'speed measured here: one H100, bf16, compiled, batch 128'),
    ):
        for point in points:
            is_ours = point['name'].startswith(('GroupMamba', '+', 'official'))
            axes.scatter(
                point['speed'],
                point['top1'],
                s=8 * point['params'],
                color=_OURS if is_ours else _OTHERS,
                alpha=0.6,
                linewidths=0,
            )
            name = point['name'] + ('' if point.get('is_stated', True) else ' *')
            axes.annotate(
                name,
                (point['speed'], point['top1']),
                textcoords='offset points',
                xytext=(0, -18 if point.get('is_below') else 11),
                ha='center',
                fontsize=8,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel('images/s')
        axes.margins(0.22, 0.12)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('top-1 on ImageNet-1K [%], as published')
    _save(figure, out)


def _save(figure: plt.Figure, out: Path) -> None:
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={'Software': None})
    plt.close(figure)


def make_page(results: dict[str, Any], counts: dict[str, tuple[float, float]]) -> str:
    """The page in Markdown.

    Args:
        results: paper_results.yml.
        counts: What :func:`read_counts` returned.

    Returns:
        Its text.
    """
    parts = [_INTRODUCTION]
    for number, what in (
        (1, 'parameters and top-1, the numbers of Table 1'),
        (4, 'throughput and top-1, the area of a circle is the number of parameters'),
    ):
        parts.append(
            f'## Figure {number}: {what}\n\n![Figure {number}](images/paper_figure_{number}.png)\n'
        )
    parts[-1] += (
        '\nStarred speeds are worked out from how many times as fast the paper says its model is. The '
        f'speeds on the right are of [{Path(results["measured"]["source"]).stem}]'
        f'({Path(results["measured"]["source"]).name}).\n'
    )
    parts += [
        f'## Table {table["number"]}: {table["caption"]}\n\n{make_table(table, counts)}\n'
        for table in results['tables']
    ]
    parts.append(
        '## Table 6: architectures\n\nStem, widths and blocks are read from the code and compared '
        f'with the paper.\n\n{make_architectures(results["architectures"], counts)}\n'
    )
    return '\n'.join(parts)


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    """Write or check the page, and draw its pictures.

    Args:
        argv: The arguments, None for the process's own.
        root: The checkout.

    Raises:
        DataError: With ``--check``: the page differs.
    """
    args = parse_args(argv)
    results = yaml.safe_load(DATA.read_text(encoding='utf-8'))
    page, file = make_page(results, read_counts(root)), root / 'docs' / 'paper.md'
    if args.check:
        if not file.exists() or file.read_text(encoding='utf-8') != page:
            raise DataError(
                f'{file} differs from paper_results.yml or the metafiles; run '
                'python tools/analysis_tools/paper.py'
            )
        return
    images = root / 'docs' / 'images'
    draw_accuracy(results['tables'][0], images / 'paper_figure_1.png')
    draw_throughput(
        results['throughput'], results['measured']['rows'], images / 'paper_figure_4.png'
    )
    file.write_text(page, encoding='utf-8')
    print(f'Wrote {file} and its pictures in {images}')


if __name__ == '__main__':
    run_command(main)
