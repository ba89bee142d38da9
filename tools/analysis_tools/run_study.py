"""Train every variant of a study with every seed, and compare them: a table and curves.

A study is a file of tools/analysis_tools/studies/: ``variants``, by name, each with the ``config``
and what it changes there; ``seeds``; and the ``keys`` of the log that are compared. Run again, the
command goes on with the runs that are missing. A training that ends because its loss or gradient is
not finite is a result, another error is not.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import torch
from mmengine.config import Config

from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.analysis.curves import curve_of, draw, read_run, unit_of
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError, DataError

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'
NOT_FINITE = re.compile(
    r'error: (?:dry run: )?the loss or a gradient of iteration (\d+) is not finite'
)


class Run(NamedTuple):
    """A training of a study.

    Attributes:
        variant: Its name.
        seed: Of the random numbers.
        folder: Its work directory, with its config beside it and, when it is over, ``done.json``.
    """

    variant: str
    seed: int
    folder: Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('study', type=Path, help='file of tools/analysis_tools/studies/')
    parser.add_argument(
        '--jobs',
        type=positive_int,
        help='trainings at once, on the GPUs in turn (default: one on each GPU)',
    )
    parser.add_argument(
        '--out', type=Path, help='folder of the runs and results (default: work_dirs/STUDY)'
    )
    return parser.parse_args(argv)


def prepare(study: Config, out: Path) -> list[Run]:
    """Write the configs of all runs.

    Args:
        study: The study's file.
        out: Where the runs go.

    Returns:
        The runs.

    Raises:
        ConfigError: The file lacks something, a variant's config has an error, or what is there
            already was trained with another one.
    """
    for name in ('variants', 'seeds', 'keys'):
        if not study.get(name):
            raise ConfigError(f'{study.filename} has no {name}; see tools/analysis_tools/studies/')
    runs = []
    for variant, changes in study.variants.items():
        options = dict(changes)
        if 'config' not in options:
            raise ConfigError(f'{study.filename}: variants[{variant!r}] names no config')
        cfg = load_config(options.pop('config'), options)
        for seed in study.seeds:
            folder = out / re.sub(r'\W+', '_', variant) / f'seed_{seed}'
            cfg.merge_from_dict({'randomness.seed': seed})
            file = folder.with_suffix('.py')  # the runner writes one of its own into the folder
            if file.exists() and file.read_text(encoding='utf-8') != cfg.pretty_text:
                raise ConfigError(
                    f'{folder} is of another config of {variant!r}; remove it, or give another --out'
                )
            folder.mkdir(parents=True, exist_ok=True)
            cfg.dump(str(file))
            runs.append(Run(variant, seed, folder))
    return runs


def train(run: Run, gpu: int | None) -> None:
    """Train once, and write down how it ended.

    Args:
        run: The run.
        gpu: Number of its GPU, None for a CPU.

    Raises:
        DataError: It ended with an error.
    """
    environment = dict(os.environ)
    if gpu is not None:
        visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
        environment['CUDA_VISIBLE_DEVICES'] = visible[gpu] if visible != [''] else str(gpu)
    command = [sys.executable, TRAIN, run.folder.with_suffix('.py'), '--work-dir', run.folder]
    log, start = run.folder / 'output.log', time.time()
    with open(log, 'w', encoding='utf-8') as file:
        code = subprocess.run(
            [*map(str, command), '--resume'], stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    last = (log.read_text(encoding='utf-8', errors='replace').strip().splitlines() or [''])[-1]
    broke = NOT_FINITE.match(last)
    if code and not broke:
        raise DataError(f'{run.variant}, seed {run.seed}: {last.removeprefix("error: ")} ({log})')
    done = dict(broke=int(broke[1]) if broke else None, seconds=time.time() - start)
    (run.folder / 'done.json').write_text(json.dumps(done))


def train_all(runs: list[Run], jobs: int) -> None:
    """Train what is missing, with a line for each that ends.

    Args:
        runs: The runs.
        jobs: How many at once.

    Raises:
        DataError: Some ended with an error; the others are done.
    """
    missing = [run for run in runs if not (run.folder / 'done.json').exists()]
    places: Queue[int | None] = Queue()
    gpus = torch.cuda.device_count()
    for job in range(jobs):
        places.put(job % gpus if gpus else None)

    def one(run: Run) -> None:
        place = places.get()
        try:
            train(run, place)
        finally:
            places.put(place)

    start, failed = time.time(), []
    print(f'{len(runs)} runs, {len(missing)} of them to be trained, {jobs} at once', flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(one, run): run for run in missing}
        for number, done in enumerate(as_completed(waiting), 1):
            run, error = waiting[done], done.exception()
            if error is not None:
                failed.append(error)
            print(
                f'{number} of {len(missing)} after {time.time() - start:.0f} s: {run.variant}, seed '
                f'{run.seed}' + (f' FAILED: {error}' if error else ''),
                flush=True,
            )
    if failed:
        raise DataError(f'{len(failed)} runs failed, the first: {failed[0]}; mend it and run again')


def records_of(run: Run) -> list[dict[str, float]]:
    """What a run logged; one that broke in its rehearsal has no log."""
    done = json.loads((run.folder / 'done.json').read_text())
    has_log = any(run.folder.glob('*/vis_data/scalars.json'))
    return read_run(str(run.folder)) if has_log or not done['broke'] else []


def rows_of(runs: list[Run], keys: list[str]) -> Iterator[list[str]]:
    """The lines of the table: for each variant its runs' last values, and what a run costs.

    Args:
        runs: The runs, all over.
        keys: What is compared.

    Yields:
        The cells of a line.
    """
    yield ['', 'runs', 'not finite', *(f'{key}, last' for key in keys), 's', 'GPU [GB]']
    for variant in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == variant]
        done = [json.loads((run.folder / 'done.json').read_text()) for run in own]
        broke = [f'iteration {one["broke"]}' for one in done if one['broke']]
        records = [records_of(run) for run in own]
        cells = []
        for key in keys:
            ends = [[r[key] for r in logged if key in r] for logged in records]
            cells.append(_mean([values[-1] for values in ends if values]))
        memory = [r['memory'] for logged in records for r in logged if 'memory' in r]
        seconds = statistics.median(one['seconds'] for one in done)
        yield [
            variant,
            str(len(own)),
            ', '.join(broke) or '-',
            *cells,
            f'{seconds:.0f}',
            f'{max(memory) / 1e3:.2g}' if memory else '-',
        ]


def _mean(values: list[float]) -> str:
    if not values:
        return '-'
    deviation = f' +- {statistics.stdev(values):.2g}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.4g}{deviation}'


def main(argv: list[str] | None = None) -> None:
    """Train, compare and draw.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    study = Config.fromfile(args.study)
    out = args.out or Path('work_dirs') / args.study.stem
    runs = prepare(study, out)
    train_all(runs, args.jobs or torch.cuda.device_count() or 1)
    keys = list(study['keys'])
    head, *rows = rows_of(runs, keys)
    lines = [head, ['---'] * len(head), *rows]
    table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    groups: dict[str, dict[str, Any]] = {}
    units = {}
    for run in runs:
        records = records_of(run)
        for key in keys:
            if any(key in record for record in records):  # a run that broke was not validated
                curve = curve_of(records, key, str(run.folder))
                units[key] = unit_of(records, key)
                groups.setdefault(run.variant, {}).setdefault(key, []).append(curve)
    (out / 'table.md').write_text(table + '\n')
    print(f'{table}\nWrote {out / "table.md"}')
    if units:  # none if all broke in their rehearsals
        draw(groups, {key: units[key] for key in keys if key in units}, str(out / 'curves.png'))
        print(f'Wrote {out / "curves.png"}')


if __name__ == '__main__':
    run_command(main)
