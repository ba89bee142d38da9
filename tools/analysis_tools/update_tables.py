"""Write the tables of the configs' READMEs from the metafiles that model-index.yml imports.

A table stands between the two lines :data:`BEGIN` and :data:`END` of the README.md beside a
metafile. Whatever was there before is replaced. A metafile's list ``Borrowed`` names models of
other metafiles whose rows stand before its own, and may add numbers to them that only its table
shows.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import yaml

from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BEGIN = '<!-- table of metafile.yml: begin -->'
END = '<!-- table of metafile.yml: end -->'

#: The columns: heading, the number's key in metafile.yml, its divisor and its format. A table has
#: those of which a model of it has the key.
COLUMNS: tuple[tuple[str, str, float, str], ...] = (
    ('params [M]', 'Parameters', 1e6, '.3f'),
    ('MACs [G]', 'FLOPs', 1e9, '.3f'),
    ('of it scans [G]', 'Scan FLOPs', 1e9, '.3f'),
    ('fewer params than one group [%]', 'Saved Parameters', 1, '.1f'),
    ('params [M]', 'Published Parameters', 1e6, 'g'),
    ('MACs [G]', 'Published FLOPs', 1e9, 'g'),
    ('fewer params than one group [%]', 'Published Saved Parameters', 1, 'g'),
    ('images/s on an A100', 'Published Throughput', 1, 'g'),
    ('top-1 [%]', 'Top 1 Accuracy', 1, '.1f'),
    ('box AP', 'box AP', 1, '.1f'),
    ('mask AP', 'mask AP', 1, '.1f'),
    ('mIoU', 'mIoU', 1, '.1f'),
    ('mIoU, multi-scale', 'mIoU(ms+flip)', 1, '.1f'),
)

#: Metadata that say how long a config trains and are no results.
SETTINGS = ('Epochs', 'Iterations')


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
        help='write nothing, and end with exit code 1 if a table differs',
    )
    return parser.parse_args(argv)


def read_metafiles(root: Path) -> dict[Path, dict[str, Any]]:
    """Read every metafile.

    Args:
        root: The checkout.

    Returns:
        Their contents by the README.md that has their table.
    """
    imported = yaml.safe_load((root / 'model-index.yml').read_text(encoding='utf-8'))['Import']
    return {
        root / Path(path).parent / 'README.md': yaml.safe_load(
            (root / path).read_text(encoding='utf-8')
        )
        for path in imported
    }


def numbers_of(model: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a model: its metadata and the metrics of its results, by their keys."""
    numbers = {key: value for key, value in model['Metadata'].items() if key not in SETTINGS}
    for result in model['Results']:
        numbers.update(result['Metrics'])
    return numbers


def rows_of(metafile: dict[str, Any], known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The models of a metafile's table: those borrowed from other metafiles, then its own.

    Args:
        metafile: The content of a metafile.
        known: The models of all metafiles by their names.

    Returns:
        The models, the borrowed ones with the numbers that this metafile adds.

    Raises:
        DataError: A borrowed model is not known, or has a number already that is added here.
    """
    borrowed = []
    for entry in metafile.get('Borrowed', []):
        name = entry['Name']
        if name not in known:
            raise DataError(
                f'{name} is borrowed, but in no metafile; name one of {", ".join(known)}'
            )
        twice = sorted(set(entry['Metadata']) & set(numbers_of(known[name])))
        if twice:
            raise DataError(
                f"{name}: {', '.join(twice)} stands in the model's own metafile, and a "
                'number has one place; remove it from Borrowed'
            )
        borrowed.append(
            dict(
                known[name],
                **{
                    field: dict(known[name][field], **entry[field])
                    for field in ('Metadata', 'Sources')
                },
            )
        )
    return borrowed + metafile['Models']


def make_table(models: list[dict[str, Any]], folder: Path) -> str:
    """Make a Markdown table with one row for each model.

    Args:
        models: The models of the rows.
        folder: Where the table will be, relative to the checkout, for its links.

    Returns:
        The table. The heading of a column says where its numbers are from; a null is a dash.

    Raises:
        DataError: A column has numbers of different origin, a model lacks one that others have, or
            has one without a column.
    """
    heads = ['config']
    rows = [[_link(model, folder)] for model in models]
    present = {key for model in models for key in numbers_of(model)}
    unknown = sorted(present - {key for _, key, _, _ in COLUMNS})
    if unknown:
        raise DataError(
            f'no column shows {", ".join(unknown)}; correct the name in metafile.yml, '
            'or add a column in update_tables.py'
        )
    for title, key, divisor, form in COLUMNS:
        if key not in present:
            continue
        lacking = [
            model['Name']
            for model in models
            if key not in numbers_of(model) or key not in model['Sources']
        ]
        if lacking:
            raise DataError(
                f'{", ".join(lacking)}: {key} or its source is missing; add it to '
                'metafile.yml, as null if the source states none'
            )
        sources = sorted({model['Sources'][key] for model in models})
        if len(sources) != 1:
            raise DataError(
                f'{key} is from {" and ".join(sources)}, and a column has one '
                'source; give each a key of its own in metafile.yml and a column in '
                'update_tables.py'
            )
        heads.append(f'{title}, {sources[0]}')
        for row, model in zip(rows, models):
            number = numbers_of(model)[key]
            row.append('-' if number is None else format(number / divisor, form))
    lines = [heads, ['---'] + ['---:'] * (len(heads) - 1), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _link(model: dict[str, Any], folder: Path) -> str:
    # without the batch and the data, which all rows of a table share
    name = re.split(r'_(?:8xb|fpn|upernet)', model['Name'])[0]
    recipe = ', 3x' if '3x' in model['Name'] else ''
    target = Path(os.path.relpath(model['Config'], folder)).as_posix()
    return f'[{name}{recipe}]({target})'


def with_table(text: str, table: str, path: Path) -> str:
    """Put a table between the marks of a text.

    Args:
        text: The text.
        table: The table.
        path: Where the text is from, for the error.

    Returns:
        The text with the table.

    Raises:
        DataError: The marks are not there once each, in order.
    """
    before, begin, rest = text.partition(f'{BEGIN}\n')
    _, end, after = rest.partition(f'{END}\n')
    if not begin or not end or BEGIN in rest or END in after:
        raise DataError(
            f'{path} must have the lines {BEGIN!r} and {END!r} once each, in this '
            'order; put them where the table belongs'
        )
    return f'{before}{begin}\n{table}\n\n{end}{after}'


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    """Write or check the tables.

    Args:
        argv: The arguments, None for the process's own.
        root: The checkout.

    Raises:
        DataError: With ``--check``: a table differs.
    """
    args = parse_args(argv)
    differing = []
    metafiles = read_metafiles(root)
    known = {
        model['Name']: model for metafile in metafiles.values() for model in metafile['Models']
    }
    for readme, metafile in metafiles.items():
        found = readme.read_text(encoding='utf-8')
        table = make_table(rows_of(metafile, known), readme.parent.relative_to(root))
        wanted = with_table(found, table, readme)
        if wanted == found:
            continue
        differing.append(str(readme.relative_to(root)))
        if not args.check:
            readme.write_text(wanted, encoding='utf-8')
            print(f'Wrote the table of {differing[-1]}')
    if differing and args.check:
        raise DataError(
            f'the table in {", ".join(differing)} differs from metafile.yml; run '
            'python tools/analysis_tools/update_tables.py'
        )


if __name__ == '__main__':
    run_command(main)
