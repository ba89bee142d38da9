"""Class names of any script in pictures: a font that has the letters, or numbers and a word."""

import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from groupmamba_mm.visualization import fonts, readable_names
from groupmamba_mm.visualization.seg_visualizer import NamedSegVisualizer

LETTERS = [chr(code) for code in range(32, 127)] + list('猫犬')


@pytest.fixture(autouse=True)
def settings():
    """Every test begins with matplotlib's own fonts."""
    listed = list(font_manager.fontManager.ttflist)
    with matplotlib.rc_context():
        yield
    font_manager.fontManager.ttflist[:] = listed


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A font with Latin and two Chinese letters, installed after matplotlib made its list."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (500, 700), (500, 0)):
        pen.lineTo(point)
    pen.closePath()
    glyph, names = pen.glyph(), ['.notdef'] + [f'u{ord(letter):04X}' for letter in LETTERS]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f'u{ord(letter):04X}' for letter in LETTERS})
    builder.setupGlyf(dict.fromkeys(names, glyph))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable(dict(familyName='Test Han', styleName='Regular'))
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    file = tmp_path / 'han.ttf'
    builder.save(str(file))
    monkeypatch.setattr(fonts.font_manager, 'findSystemFonts', lambda: [str(file)])
    return file


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(fonts.font_manager, 'findSystemFonts', list)
    own = [entry for entry in font_manager.fontManager.ttflist if 'matplotlib' in entry.fname]
    font_manager.fontManager.ttflist[:] = own


@pytest.mark.parametrize('family', ['sans-serif', 'monospace'])
def test_a_font_with_the_letters_is_taken(installed, family):
    names = ['cat', '猫', '犬 2']
    assert readable_names(names) == names
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # of matplotlib: a glyph is missing
        figure = plt.figure()
        for name in names:
            figure.text(0, 0, name, family=family)
        figure.canvas.draw()
        plt.close(figure)


def test_without_such_a_font_numbers_stand_for_names(no_fonts, monkeypatch):
    said = []
    monkeypatch.setattr(fonts, 'print_log', lambda text, **options: said.append(text))
    assert readable_names(['cat', '猫', 'œuvre', 'Ёж']) == ['cat', '#1', 'œuvre', 'Ёж']
    assert len(said) == 1 and '#1 猫' in said[0] and 'fonts-noto-cjk' in said[0]
    assert 'œuvre' not in said[0]


def test_latin_names_change_nothing(no_fonts):
    before = list(matplotlib.rcParams['font.sans-serif'])
    assert readable_names(['cat', 'café']) == ['cat', 'café']
    assert matplotlib.rcParams['font.sans-serif'] == before


def test_segments_are_named_in_their_script(installed, tmp_path):
    labels = torch.zeros(1, 60, 80, dtype=torch.long)
    labels[:, 20:, 40:] = 1
    sample = SegDataSample(pred_sem_seg=PixelData(data=labels))
    pictures = []
    for names in (['犬', '猫'], ['', '']):
        visualizer = NamedSegVisualizer(name=f'seg{len(pictures)}')
        visualizer.dataset_meta = dict(classes=readable_names(names), palette=[(0, 0, 0)] * 2)
        file = tmp_path / f'{len(pictures)}.png'
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            visualizer.add_datasample(
                'a', np.zeros((60, 80, 3), np.uint8), sample, draw_gt=False, out_file=str(file)
            )
        pictures.append(plt.imread(file))
    assert pictures[0].shape[:2] == (60, 80)
    assert (pictures[0] > 0.5).sum() > (pictures[1] > 0.5).sum()
