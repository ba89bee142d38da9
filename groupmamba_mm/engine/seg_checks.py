"""Checks of images with label maps."""
import os
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
from PIL import Image

from groupmamba_mm.errors import DataError
from .data_facts import folder_of, shown

#: Label maps that are read before every run; the tool reads all of them.
NUM_SAMPLED = 20


class LabelMaps:
    """The images and label maps of a data set.

    Args:
        dataset: Config of a data set of mmseg whose folders are there.
        owner: Its class.
        classes: The class names it is used with, None if unknown.
        split: 'train', 'val' or 'test', for messages.
    """

    def __init__(self, dataset: Dict, owner: type, classes: Optional[Tuple[str, ...]],
                 split: str) -> None:
        from inspect import signature
        defaults = {name: parameter.default
                    for name, parameter in signature(owner.__init__).parameters.items()}
        # a subclass passes what it does not name on to mmseg's own
        base = dict(img_suffix='.jpg', seg_map_suffix='.png', reduce_zero_label=False,
                    ignore_index=255)
        options = {name: dataset.get(name, defaults.get(name, value))
                   for name, value in base.items()}
        self.img_suffix: str = options['img_suffix']
        self.seg_map_suffix: str = options['seg_map_suffix']
        self.reduce_zero_label: bool = options['reduce_zero_label']
        self.ignore_index: int = options['ignore_index']
        # classes that are left out of a known data set are mapped when the labels are read
        own = getattr(owner, 'METAINFO', {}).get('classes')
        self.num_labels = len(own) if own else None if classes is None else len(classes)
        self.split = split
        self.img_dir = Path(folder_of(dataset, 'img_path'))
        self.label_dir = Path(folder_of(dataset, 'seg_map_path'))
        self.ann_file = dataset.get('ann_file') and os.path.join(
            dataset.get('data_root') or '', dataset['ann_file'])

    def check_pairs(self) -> List[Tuple[Path, Path]]:
        """Find the images and their label maps.

        Returns:
            Pairs of files, in order.

        Raises:
            DataError: There are no images of the suffix, or files are missing.
        """
        names = self._names()
        pairs = [(self.img_dir / f'{name}{self.img_suffix}',
                  self.label_dir / f'{name}{self.seg_map_suffix}') for name in names]
        for what, files, key in (('images', [image for image, _ in pairs], 'img_suffix'),
                                 ('label maps', [label for _, label in pairs], 'seg_map_suffix')):
            there = {}
            for file in files:
                if file.parent not in there:
                    there[file.parent] = set(
                        os.listdir(file.parent)) if file.parent.is_dir() else set()
            missing = [str(file) for file in files if file.name not in there[file.parent]]
            if missing:
                raise DataError(f'{len(missing)} of the {len(files)} {what} of the {self.split} '
                                f'data are missing: {shown(missing, 3)}; restore them, or correct '
                                f'data_prefix or {key}')
        return pairs

    def check_labels(self, file: Path) -> Dict[int, int]:
        """Check one label map's form and values.

        Args:
            file: The label map.

        Returns:
            Number of pixels of each value in the file.

        Raises:
            DataError: It cannot be read, has several channels, or a value that is no label.
        """
        labels = read_labels(file, self.split)
        values, counts = np.unique(labels, return_counts=True)
        found = {int(value): int(count) for value, count in zip(values, counts)}
        if self.num_labels is None:
            return found
        highest = self.num_labels if self.reduce_zero_label else self.num_labels - 1
        # with reduce_zero_label, mmseg makes 255 of 0, and leaves 255
        allowed = {255} if self.reduce_zero_label else {self.ignore_index}
        wrong = sorted(value for value in found if value > highest and value not in allowed)
        if wrong:
            raise DataError(f'label map {file} of the {self.split} data has the value '
                            f'{shown(wrong)}; {self._remedy(highest, wrong)}')
        return found

    def _remedy(self, highest: int, wrong: List[int]) -> str:
        ignored = 255 if self.reduce_zero_label else self.ignore_index
        text = (f'with {self.num_labels} classes and reduce_zero_label={self.reduce_zero_label}, '
                f'0 to {highest} and {ignored} (ignored) are right')
        if not self.reduce_zero_label and wrong == [highest + 1]:
            return (f"{text}; if 0 stands for 'other' and 1 to {highest + 1} for the classes, set "
                    'reduce_zero_label=True in the data sets')
        return f'{text}; correct the label maps, metainfo or reduce_zero_label'

    def _names(self) -> List[str]:
        if self.ann_file and os.path.isfile(self.ann_file):
            lines = Path(self.ann_file).read_text(encoding='utf-8').splitlines()
            return [line.strip() for line in lines if line.strip()]
        found = sorted(str(file.relative_to(self.img_dir)) for file in self.img_dir.rglob('*')
                       if file.is_file())
        names = [name[:-len(self.img_suffix)] for name in found if name.endswith(self.img_suffix)]
        if not names:
            others = sorted({Path(name).suffix for name in found})
            hint = (f'it has files that end in {", ".join(others)}: set img_suffix' if others
                    else 'it is empty')
            raise DataError(f'data folder {self.img_dir} of the {self.split} data has no images '
                            f'that end in {self.img_suffix}; {hint}')
        return names


def read_labels(file: Path, split: str) -> np.ndarray:
    """Read a label map.

    Args:
        file: The file.
        split: 'train', 'val' or 'test', for messages.

    Returns:
        (H, W), whole numbers; of a palette image its indices.

    Raises:
        DataError: It cannot be read or has several channels.
    """
    try:
        with Image.open(file) as image:
            labels = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f'label map {file} of the {split} data cannot be read ({error}); replace '
                        'it') from None
    if labels.ndim != 2:
        raise DataError(f'label map {file} of the {split} data has {labels.shape[2]} channels '
                        '(colours); write one channel with the number of the class')
    return labels.astype(np.int64)


def sampled(pairs: List[Tuple[Path, Path]]) -> List[Path]:
    """Choose label maps all over a list of pairs."""
    step = max(1, len(pairs) // NUM_SAMPLED)
    return [label for _, label in pairs[::step][:NUM_SAMPLED]]
