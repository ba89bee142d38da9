"""Read all of a config's data before a long run, and say what is wrong with it."""
import argparse
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from tqdm import tqdm

from groupmamba_mm.datasets.loading import CheckedLoadImageFromFile
from groupmamba_mm.engine.cli import CfgOptions, run_command
from groupmamba_mm.engine.coco_checks import check_coco, check_coco_sizes, coco_facts
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.data_checks import check_data, has_label_maps, is_coco
from groupmamba_mm.engine.data_facts import classes_of, dataset_class, folder_of, plain_datasets
from groupmamba_mm.engine.seg_checks import LabelMaps, read_labels
from groupmamba_mm.errors import DataError

SPLITS = ('train', 'val', 'test')
#: Problems that are printed of a split.
MAX_SHOWN = 20

#: Facts and problems of a data set, each a line.
Report = Tuple[List[str], List[str]]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('--splits', nargs='+', choices=SPLITS, default=['train', 'val'],
                        help='what to read (default: train val)')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, default={},
                        metavar='KEY=VALUE', help='change the config, for example '
                        'train_dataloader.dataset.data_root=FOLDER')
    return parser.parse_args(argv)


def read_images(files: List[str]) -> Tuple[Dict[str, Tuple[int, int]], List[str]]:
    """Decode images.

    Args:
        files: Their paths.

    Returns:
        (H, W) of each one that could be read, and what is wrong with the others.
    """
    load, sizes, problems = CheckedLoadImageFromFile(), {}, []
    for file in tqdm(files, desc='images', mininterval=1):
        try:
            sizes[file] = load(dict(img_path=file))['img_shape']
        except DataError as error:
            problems.append(str(error))
    return sizes, problems


def read_coco(dataset: Dict, classes: Any, split: str) -> Report:
    """Check a COCO file with all its images."""
    content = check_coco(dataset, classes, split)
    folder = Path(folder_of(dataset, 'img'))
    names = {str(folder / image['file_name']): image['file_name'] for image in content['images']}
    sizes, problems = read_images(list(names))
    sizes = {names[file]: size for file, size in sizes.items()}
    return coco_facts(content), problems + check_coco_sizes(content, sizes)


def read_label_maps(maps: LabelMaps, classes: Any) -> Report:
    """Check all images and label maps of a segmentation data set."""
    pairs = maps.check_pairs()
    sizes, problems = read_images([str(image) for image, _ in pairs])
    pixels: Counter = Counter()
    for image, file in tqdm(pairs, desc='label maps', mininterval=1):
        try:
            pixels.update(maps.check_labels(file))
            shape = read_labels(file, maps.split).shape
        except DataError as error:
            problems.append(str(error))
            continue
        if sizes.get(str(image), shape) != shape:
            problems.append(f'label map {file} is {shape[0]}x{shape[1]} (H x W), its image '
                            '{}x{}'.format(*sizes[str(image)]))
    facts = [f'{len(pairs)} images with label maps, reduce_zero_label={maps.reduce_zero_label}']
    if classes is not None and maps.num_labels == len(classes):
        first = int(maps.reduce_zero_label)
        total = max(1, sum(pixels.values()))
        facts.append('share of the pixels: ' + ', '.join(
            f'{name} {pixels[label + first] / total:.2%}' for label, name in enumerate(classes)))
        never = [name for label, name in enumerate(classes) if not pixels[label + first]]
        if never:
            facts.append(f'never labelled: {", ".join(never)}')
    return facts, problems


def read_classification(cfg: Config, dataset: Dict) -> Report:
    """Check all images of a classification data set."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        built = DATASETS.build(dataset)
    infos = [built.get_data_info(index) for index in range(len(built))]
    _, problems = read_images([info['img_path'] for info in infos])
    labels = Counter(int(info['gt_label']) for info in infos if 'gt_label' in info)
    facts = [f'{len(infos)} images of {len(labels)} classes']
    if labels:
        facts.append(f'images of a class: {min(labels.values())} to {max(labels.values())}')
    return facts, problems


def reports(cfg: Config, splits: List[str]) -> Iterator[Tuple[str, Report]]:
    """Check the data sets one by one.

    Args:
        cfg: The config.
        splits: Which of 'train', 'val' and 'test'.

    Yields:
        The split and its report.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in plain_datasets(loader['dataset']) if loader else ():
            if cfg.default_scope == 'mmpretrain':
                yield split, read_classification(cfg, dataset)
                continue
            owner = dataset_class(dataset, cfg.default_scope)
            classes = classes_of(dataset, owner, split)
            if is_coco(owner):
                yield split, read_coco(dataset, classes, split)
            elif has_label_maps(owner):
                maps = LabelMaps(dataset, owner, classes, split)
                yield split, read_label_maps(maps, classes)
            else:
                yield split, ([f"data sets of the type {dataset['type']} are not known here: "
                               'nothing was read'], [])


def main(argv: Optional[List[str]] = None) -> None:
    """Check and print.

    Args:
        argv: The arguments, None for the process's own.

    Raises:
        DataError: Something is wrong.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    check_data(cfg, tuple(args.splits))
    total = 0
    for split, (facts, problems) in reports(cfg, args.splits):
        print(f'\n{split}')
        for line in facts:
            print(f'  {line}')
        for problem in problems[:MAX_SHOWN]:
            print(f'  wrong: {problem}')
        if len(problems) > MAX_SHOWN:
            print(f'  and {len(problems) - MAX_SHOWN} more')
        total += len(problems)
    if total:
        raise DataError(f'{total} problems in the data of {args.config}, listed above; mend them '
                        'before training')
    print('\nNothing wrong was found.')


if __name__ == '__main__':
    run_command(main)
