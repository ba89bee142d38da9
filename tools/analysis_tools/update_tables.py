"""Write the tables of the configs' READMEs from the metafiles that model-index.yml imports.

A table stands between the two lines :data:`BEGIN` and :data:`END` of the README.md beside a
metafile. Whatever was there before is replaced.
"""
import argparse
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml

from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BEGIN = '<!-- table of metafile.yml: begin -->'
END = '<!-- table of metafile.yml: end -->'

#: The columns: heading, the number's key in metafile.yml, its divisor and its format. A table has
#: those of which one of its models has the number.
COLUMNS: Tuple[Tuple[str, str, float, str], ...] = (
    ('params [M]', 'Parameters', 1e6, '.3f'),
    ('MACs [G]', 'FLOPs', 1e9, '.3f'),
    ('of it scans [G]', 'Scan FLOPs', 1e9, '.3f'),
    ('params [M]', 'Published Parameters', 1e6, 'g'),
    ('MACs [G]', 'Published FLOPs', 1e9, 'g'),
    ('top-1 [%]', 'Top 1 Accuracy', 1, '.1f'),
    ('without distillation', 'Top 1 Accuracy without Distillation', 1, '.1f'),
    ('box AP', 'box AP', 1, '.1f'),
    ('mask AP', 'mask AP', 1, '.1f'),
    ('mIoU', 'mIoU', 1, '.1f'),
    ('mIoU, multi-scale', 'mIoU(ms+flip)', 1, '.1f'),
)

#: Of these numbers a model may have none: the paper gives them for some sizes only.
OPTIONAL = ('Published Parameters', 'Published FLOPs', 'box AP', 'mask AP', 'mIoU',
            'mIoU(ms+flip)')


#: Metadata that say how long a config trains and are no results.
SETTINGS = ('Epochs', 'Iterations')


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true',
                        help='write nothing, and end with exit code 1 if a table differs')
    return parser.parse_args(argv)


def read_metafiles(root: Path) -> Dict[Path, List[Dict[str, Any]]]:
    """Read the models of every metafile.

    Args:
        root: The checkout.

    Returns:
        The models by the README.md that has their table.
    """
    imported = yaml.safe_load((root / 'model-index.yml').read_text(encoding='utf-8'))['Import']
    return {
        root / Path(path).parent / 'README.md':
        yaml.safe_load((root / path).read_text(encoding='utf-8'))['Models']
        for path in imported
    }


def numbers_of(model: Dict[str, Any]) -> Dict[str, float]:
    """The numbers of a model: its metadata and the metrics of its results, by their keys."""
    numbers = {key: value for key, value in model['Metadata'].items() if key not in SETTINGS}
    for result in model.get('Results', []):
        numbers.update(result['Metrics'])
    return numbers


def make_table(models: List[Dict[str, Any]]) -> str:
    """Make a Markdown table with one row for each model.

    Args:
        models: The models of a metafile.

    Returns:
        The table. The heading of a column says where its numbers are from.

    Raises:
        DataError: A column has numbers of different origin, or a model lacks one.
    """
    heads = ['config']
    rows = [[_link(model)] for model in models]
    numbers = [numbers_of(model) for model in models]
    for title, key, divisor, form in COLUMNS:
        if not any(key in found for found in numbers):
            continue
        lacking = [model['Name'] for model, found in zip(models, numbers)
                   if (key not in found and key not in OPTIONAL)
                   or (key in found and key not in model['Sources'])]
        if lacking:
            raise DataError(f'{", ".join(lacking)}: {key} or its source is missing; add it to '
                            'metafile.yml')
        sources = sorted({model['Sources'][key] for model, found in zip(models, numbers)
                          if key in found})
        if len(sources) != 1:
            raise DataError(f'{key} is from {" and ".join(sources)}, and a column has one '
                            'source; give each a key of its own in metafile.yml and a column in '
                            'update_tables.py')
        heads.append(f'{title}, {sources[0]}')
        for row, found in zip(rows, numbers):
            row.append(format(found[key] / divisor, form) if key in found else '-')
    lines = [heads, ['---'] + ['---:'] * (len(heads) - 1), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _link(model: Dict[str, Any]) -> str:
    # without the batch and the data, which all rows of a table share
    name = re.split(r'_(?:8xb|fpn|upernet)', model['Name'])[0]
    recipe = '' if '3x' not in model['Name'] else ', 3x'
    return f"[{name}{recipe}]({Path(model['Config']).name})"


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
        raise DataError(f'{path} must have the lines {BEGIN!r} and {END!r} once each, in this '
                        'order; put them where the table belongs')
    return f'{before}{begin}\n{table}\n\n{end}{after}'


def main(argv: Optional[List[str]] = None, root: Path = ROOT) -> None:
    """Write or check the tables.

    Args:
        argv: The arguments, None for the process's own.
        root: The checkout.

    Raises:
        DataError: With ``--check``: a table differs.
    """
    args = parse_args(argv)
    differing = []
    for readme, models in read_metafiles(root).items():
        found = readme.read_text(encoding='utf-8')
        wanted = with_table(found, make_table(models), readme)
        if wanted == found:
            continue
        differing.append(str(readme.relative_to(root)))
        if not args.check:
            readme.write_text(wanted, encoding='utf-8')
            print(f'Wrote the table of {differing[-1]}')
    if differing and args.check:
        raise DataError(f'the table in {", ".join(differing)} differs from metafile.yml; run '
                        'python tools/analysis_tools/update_tables.py')


if __name__ == '__main__':
    run_command(main)
