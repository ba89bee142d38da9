"""A font that has the letters of the class names."""

import logging
import string
from collections.abc import Sequence

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from mmengine.logging import print_log


def readable_names(names: Sequence[str]) -> list[str]:
    """Make matplotlib draw names in a font that has their letters.

    Args:
        names: The class names.

    Returns:
        The names; where no font has the letters of one, its number (``#3``) stands for it, which a
        warning says.
    """
    names = list(map(str, names))
    default = font_manager.findfont(font_manager.FontProperties(family=['sans-serif']))
    wanted = {letter for name in names for letter in name if letter.isprintable()}
    letters = _letters(default)
    if not wanted <= letters:
        letters = _choose(wanted | set(string.printable.strip()), letters)
    unreadable = {index: name for index, name in enumerate(names) if not set(name) <= letters}
    if unreadable:
        listed = ', '.join(f'#{index} {name}' for index, name in unreadable.items())
        print_log(
            f'No font on this machine has the letters of these class names, so that pictures '
            f'show their numbers: {listed}. Install one (Debian, Ubuntu: apt-get install '
            'fonts-noto-cjk for Chinese, Japanese and Korean, fonts-noto-core for other '
            'scripts)',
            logger='current',
            level=logging.WARNING,
        )
    return [f'#{index}' if index in unreadable else name for index, name in enumerate(names)]


def _choose(wanted: set[str], default: set[str]) -> set[str]:
    """Put the font that has most of the letters first; its letters."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # installed since matplotlib made its list
        if path not in known:
            font_manager.fontManager.addfont(path)
    entries = [
        entry
        for entry in font_manager.fontManager.ttflist
        if entry.style == 'normal'
        and entry.weight in (400, 'normal', 'regular')
        and not entry.name.startswith('Last Resort')
    ]  # boxes for all letters there are
    letters = {entry.name: _letters(entry.fname) for entry in entries}
    best = max(letters, key=lambda name: len(letters[name] & wanted), default=None)
    if best is None or len(letters[best] & wanted) <= len(default & wanted):
        return default
    for family in ('font.sans-serif', 'font.monospace'):  # mmpretrain's visualizer has the second
        others = [name for name in matplotlib.rcParams[family] if name != best]
        matplotlib.rcParams[family] = [best, *others]
    return letters[best]


def _letters(path: str) -> set[str]:
    return set(map(chr, FT2Font(path).get_charmap()))
