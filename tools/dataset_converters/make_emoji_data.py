"""Make a classification data set of emoji on photographs: hundreds of classes, two hands and a third.

Each picture shows one emoji, turned, scaled and put somewhere on a piece of a photograph, beside a
smaller one of another class that it has to be told from. Training pictures are drawn by two hands
(Google's and Twitter's), validation pictures by a third (Facebook's) on other parts of the
photographs: what is measured is whether a class is known again in a drawing never seen. ImageNet's
folder layout::

    OUT/train/0000_grinning/000000.jpg ...    OUT/val/0000_grinning/...
    OUT/preview.jpg     a row for each of some classes: training pictures, then validation pictures
    OUT/meta.json       the arguments, and the versions of what was drawn from

The drawings are the npm packages emoji-datasource-google, -twitter and -facebook, which ``npm pack``
brings into the folder --cache once; put their .tgz files there yourself where npm cannot. The
photographs are scikit-image's.
"""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import cv2
import numpy as np
from tqdm import tqdm

from groupmamba_mm.datasets.demo_pictures import ignore_interrupts, write_picture
from groupmamba_mm.datasets.emoji_pictures import HANDS, compose, write_emoji
from groupmamba_mm.errors import DataError

#: Raise it with every change to the pictures.
VERSION = 1


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
    parser.add_argument('out', type=Path, metavar='OUT', help='folder that is made')
    parser.add_argument('--cache', type=Path, help="folder of npm's files (default: OUT.npm)")
    parser.add_argument('--num-classes', type=int, default=300, help='(default: %(default)s)')
    parser.add_argument('--num-train', type=int, default=36_000, help='(default: %(default)s)')
    parser.add_argument('--num-val', type=int, default=6_000, help='(default: %(default)s)')
    parser.add_argument('--image-size', type=int, default=96, help='side (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='processes (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace what is in OUT')
    args = parser.parse_args(argv)
    for name in ('num_classes', 'num_train', 'num_val', 'image_size', 'workers'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")}: 1 or more')
    return args


def fetch(hand: str, cache: Path) -> Path:
    """Have npm bring a package, unless it is there.

    Args:
        hand: Whose drawings.
        cache: The folder of the files.

    Returns:
        The file.

    Raises:
        DataError: npm is missing, or does not bring it.
    """
    name = f'emoji-datasource-{hand}'
    cache.mkdir(parents=True, exist_ok=True)
    if found := sorted(cache.glob(f'{name}-[0-9]*.tgz')):
        return found[-1]
    by_hand = f'or put its .tgz file into {cache} yourself (`npm pack {name}` on another machine)'
    if shutil.which('npm') is None:
        raise DataError(f'npm brings {name}, and is not installed: install it, {by_hand}')
    done = subprocess.run(['npm', 'pack', name], cwd=cache, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise DataError(f'npm does not bring {name} ({reason}): mend the network, {by_hand}')
    return max(cache.glob(f'{name}-[0-9]*.tgz'))


def choose_classes(archive: Path, number: int) -> list[dict[str, Any]]:
    """Those emoji that all hands have drawn, spread over all categories but flags.

    Args:
        archive: A package.
        number: How many.

    Returns:
        The package's entries, in its order.

    Raises:
        DataError: There are not so many.
    """
    with tarfile.open(archive) as file:
        known = json.load(file.extractfile('package/emoji.json'))
    hands = [f'has_img_{hand}' for of_split in HANDS.values() for hand in of_split]
    shared = [
        entry
        for entry in known
        if all(entry.get(hand) for hand in hands) and entry['category'] != 'Flags'
    ]  # some flags are the same
    shared.sort(key=lambda entry: entry['sort_order'])
    if number > len(shared):
        raise DataError(
            f'--num-classes is {number}, and {len(shared)} emoji have drawings of all hands'
        )
    return [shared[index * len(shared) // number] for index in range(number)]


def read_drawings(archive: Path, hand: str, names: Sequence[str]) -> list[np.ndarray]:
    """Read drawings from a package, RGBA of 64x64.

    Args:
        archive: The package.
        hand: Whose drawings these are.
        names: Names of the files.

    Returns:
        A uint8 array (H, W, 4) for each name.
    """
    wanted, found = set(names), {}
    with tarfile.open(archive) as file:
        for member in file:
            name = member.name.rpartition('/')[2]
            if name in wanted and member.name.endswith(f'img/{hand}/64/{name}'):
                content = np.frombuffer(file.extractfile(member).read(), np.uint8)
                image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
                found[name] = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)
    if missing := sorted(wanted - found.keys()):
        raise DataError(f'{archive} has no {missing[0]} of {len(missing)} drawings that it lists')
    return [found[name] for name in names]


def preview(args: argparse.Namespace, drawings: dict) -> np.ndarray:
    """Rows of some classes: four training pictures, then four validation pictures.

    Args:
        args: The command's arguments.
        drawings: By split and hand.

    Returns:
        Uint8 RGB.
    """
    number = args.num_classes
    rows = [
        np.hstack(
            [
                compose(args.seed, split, label + turn * number, args.image_size, drawings[split])
                for split in HANDS
                for turn in range(4)
            ]
        )
        for label in range(0, number, max(1, number // 12))
    ]
    return np.vstack(rows)


def main(argv: list[str] | None = None) -> None:
    """Fetch, draw and write.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    cache = args.cache or args.out.with_name(f'{args.out.name}.npm')
    wanted = {
        name: getattr(args, name)
        for name in ('num_classes', 'num_train', 'num_val', 'image_size', 'seed')
    }
    archives = {hand: fetch(hand, cache) for hands in HANDS.values() for hand in hands}
    meta = dict(version=VERSION, arguments=wanted, packages=[p.name for p in archives.values()])
    if args.out.exists() and any(args.out.iterdir()):
        file = args.out / 'meta.json'
        made = json.loads(file.read_text()) if file.is_file() else None
        if made == meta:
            print(f'{args.out} is already there, made with the same arguments: left as it is')
            return
        if not args.overwrite or made is None:
            raise DataError(
                f'{args.out} holds '
                + ('something else' if made is None else 'a set that was made otherwise')
                + '; choose another OUT'
                + ('' if made is None else ', or pass --overwrite')
            )
    classes = choose_classes(archives['google'], args.num_classes)
    files = [entry['image'] for entry in classes]
    drawings = {
        split: [read_drawings(archives[hand], hand, files) for hand in hands]
        for split, hands in HANDS.items()
    }
    names = [
        f'{label:04d}_{re.sub(r"[^0-9A-Za-z]+", "_", entry["short_name"])}'
        for label, entry in enumerate(classes)
    ]
    # beside its place, so that what is there is whole, and an interrupted run can be run again
    partial = args.out.with_name(f'{args.out.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for split in HANDS:
        for name in names:
            (partial / split / name).mkdir(parents=True)
    numbers = dict(train=args.num_train, val=args.num_val)
    jobs = [(split, index) for split, number in numbers.items() for index in range(number)]
    work = functools.partial(
        write_emoji,
        folder=partial,
        seed=args.seed,
        size=args.image_size,
        names=names,
        drawings=drawings,
    )
    with ProcessPoolExecutor(args.workers, initializer=ignore_interrupts) as pool:
        size = max(1, len(jobs) // (args.workers * 8))
        for _ in tqdm(pool.map(work, jobs, chunksize=size), total=len(jobs), desc='pictures'):
            pass
    write_picture(partial / 'preview.jpg', preview(args, drawings))
    (partial / 'meta.json').write_text(json.dumps(meta, indent=2))
    if args.out.exists():  # empty, or to be overwritten
        shutil.rmtree(args.out)
    partial.rename(args.out)
    print(f'Wrote {args.num_train} training and {args.num_val} validation pictures to {args.out}')


if __name__ == '__main__':
    try:
        main()
    except DataError as error:
        sys.exit(f'error: {error}')
