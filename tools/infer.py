"""Predict on images of one's own: classes, boxes with masks, or label maps, as the config says.

INPUT is an image, a folder, a pattern in quotes, a video, or - for an image on standard input.
Each image gives a line of JSON on standard output, which is also in predictions.jsonl of --out,
and an annotated copy there. Files that are broken are named on standard error and left out.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import TextIO

import _environment  # noqa: F401, before what may be missing
import cv2
from mmengine.utils import ProgressBar

from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import DataError
from groupmamba_mm.inference import Predictor, find_config
from groupmamba_mm.inference.arguments import add_predictor_arguments
from groupmamba_mm.inference.sources import (
    Source,
    find_files,
    frames_per_second,
    is_video,
    read_frames,
    read_stdin,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('input', metavar='INPUT', help='image, folder, "pattern", video, or -')
    add_predictor_arguments(parser)
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/infer'),
        help='folder to write (default: %(default)s)',
    )
    parser.add_argument('--no-paint', action='store_true', help='write no pictures')
    parser.add_argument(
        '--batch-size', type=positive_int, default=1, help='images at once (default: %(default)s)'
    )
    return parser.parse_args(argv)


class Writer:
    """Predicts, prints, and paints in batches.

    Args:
        predictor: The model.
        folder: Where annotated copies go; None: nowhere.
        lines: The file of results.
        batch_size: Images at once.
    """

    def __init__(
        self, predictor: Predictor, folder: Path | None, lines: TextIO, batch_size: int
    ) -> None:
        self.predictor = predictor
        self.folder = folder
        self.lines = lines
        self.batch_size = batch_size
        self.count = 0

    def run(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Predict on images and write what was found.

        Args:
            sources: The images.

        Yields:
            The annotated copies, with the names of the images; the images themselves if nothing is
            painted.
        """
        sources = iter(sources)
        while batch := list(islice(sources, self.batch_size)):
            samples = self.predictor.predict_samples([source.image for source in batch])
            for source, sample in zip(batch, samples):
                self.count += 1
                line = json.dumps(dict(image=source.name, **self.predictor.describe(sample)))
                print(line, flush=True)
                print(line, file=self.lines, flush=True)
                if self.folder is not None:
                    yield Source(source.name, self.predictor.paint(source.image, sample))
                else:
                    yield source


def readable(predictor: Predictor, files: list[Path]) -> Iterator[Source]:
    """Read files, and report those that cannot be read.

    Args:
        predictor: Reads them.
        files: The files.

    Yields:
        The images that could be read.
    """
    progress = ProgressBar(len(files), file=sys.stderr) if len(files) > 1 else None
    for file in files:
        try:
            yield Source(str(file), predictor.read(file))
        except DataError as error:
            print(f'skipped: {error}', file=sys.stderr)
        if progress is not None:
            progress.update()


def paint_video(writer: Writer, path: Path, target: Path) -> None:
    """Predict on a video, and write an annotated one.

    Args:
        writer: Predicts.
        path: The video.
        target: The annotated one.
    """
    video = None
    for painted in writer.run(read_frames(path)):
        if writer.folder is None:
            continue
        if video is None:
            height, width = painted.image.shape[:2]
            video = cv2.VideoWriter(
                str(target),
                cv2.VideoWriter_fourcc(*'mp4v'),
                frames_per_second(path),
                (width, height),
            )
        video.write(painted.image)
    if video is not None:
        video.release()


def main(argv: list[str] | None = None) -> None:
    """Find the images, predict and write.

    Args:
        argv: The arguments, None for the process's own.

    Raises:
        DataError: No image could be read.
    """
    args = parse_args(argv)
    files = [] if args.input == '-' else find_files(args.input)
    with redirect_stdout(sys.stderr):  # what libraries say is no result
        cfg = find_config(args.config, args.cfg_options)
        predictor = Predictor(cfg, args.checkpoint, args.device, args.score_thr, args.top)
    folder = None if args.no_paint else args.out / 'painted'
    args.out.mkdir(parents=True, exist_ok=True)
    root = Path(args.input) if Path(args.input).is_dir() else None
    with open(args.out / 'predictions.jsonl', 'w', encoding='utf-8') as lines:
        writer = Writer(predictor, folder, lines, args.batch_size)
        if folder is not None:
            folder.mkdir(exist_ok=True)
        for video in filter(is_video, files):
            paint_video(writer, video, args.out / 'painted' / f'{video.stem}.mp4')
        images = [file for file in files if not is_video(file)]
        sources = [read_stdin()] if args.input == '-' else readable(predictor, images)
        for painted in writer.run(sources):
            if folder is not None:
                name = Path(painted.name)
                inside = name.relative_to(root) if root else Path(name.name)
                target = folder / (inside if args.input != '-' else Path('stdin')).with_suffix(
                    '.png'
                )
                target.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(target), painted.image)
    if writer.count == 0:
        raise DataError(f'{args.input}: none of its {len(files)} files could be read')
    where = '' if folder is None else f', annotated copies in {folder}'
    print(f'{writer.count} images: {args.out / "predictions.jsonl"}{where}', file=sys.stderr)


if __name__ == '__main__':
    run_command(main)
