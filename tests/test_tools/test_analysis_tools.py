"""The tools of tools/analysis_tools, as a user calls them."""

import contextlib
import csv
import io
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import groupmamba_mm
from groupmamba_mm.analysis.benchmark import COLUMNS
from groupmamba_mm.analysis.detection import run_two_stage
from groupmamba_mm.analysis.subjects import find_subjects
from groupmamba_mm.distillation import ConfigTeacher
from groupmamba_mm.errors import ConfigError, DataError, UserError
from tests.conftest import RunsCode, load_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'groupmamba'
TINY = str(CONFIGS / 'groupmamba-official-tiny_8xb128_in1k.py')
PICO = str(ROOT / 'configs' / 'demo' / 'groupmamba-pico_demo-cls.py')
DETECTOR = str(ROOT / 'configs' / 'demo' / 'mask-rcnn_groupmamba-pico_demo-det.py')
FLOPS, BENCHMARK, GRID, COMPARE, TEACHER = (
    f'analysis_tools/{name}.py'
    for name in ('get_flops', 'benchmark', 'prediction_grid', 'compare_runs', 'benchmark_teacher')
)


class TestGetFlops:
    def test_table(self, capsys, one_thread):
        load_tool(FLOPS).main([TINY, TINY, '--shape', '32', '64'])
        output = capsys.readouterr().out
        rows = re.findall(
            r'^groupmamba-official-tiny\S+ +whole model +([\d,]+) +([\d.]+) +([\d.]+)$',
            output,
            re.MULTILINE,
        )
        assert len(rows) == 2 and rows[0] == rows[1]
        assert rows[0][0] == '23,361,917'
        assert float(rows[0][1]) > float(rows[0][2]) > 0
        assert 'Image 32 x 64 (H x W), batch 1' in output
        assert '9*B*L*C*N + B*L*C for each selective scan' in output

    def test_options_change_the_model(self, capsys, one_thread):
        load_tool(FLOPS).main(
            [TINY, '--shape', '32', '32', '--cfg-options', 'model.head.num_classes=10']
        )
        assert f'{23_361_917 - 2 * 990 * 449:,}' in capsys.readouterr().out

    def test_what_is_counted(self):
        model = torch.nn.Module()
        model.backbone = torch.nn.Identity()
        parts = load_tool(FLOPS).counted_parts
        assert parts(model, 'mmdet') == [('backbone', model.backbone, None)]
        assert parts(model, 'mmpretrain') == [('whole model', model, None)]
        assert [name for name, _, _ in parts(model, 'mmseg')] == ['whole model', 'backbone']
        model.with_rpn = model.with_roi_head = True
        whole, _ = parts(model, 'mmdet')
        assert whole == ('whole model', model, run_two_stage)

    def test_whole_detector(self, capsys, one_thread):
        load_tool(FLOPS).main(
            [DETECTOR, '--shape', '64', '96', '--cfg-options', 'model.rpn_head.feat_channels=32']
        )
        output = capsys.readouterr().out
        assert re.search(r'demo-det +whole model +[\d,]+ +[\d.]+ +[\d.]+$', output, re.MULTILINE)
        assert 'box head on 1000 dummy boxes and mask head on the first 100' in output

    @pytest.mark.parametrize(
        'arguments', [[], [TINY, '--shape', '0', '32'], [TINY, '--shape', '32']]
    )
    def test_usage_errors(self, arguments, capsys):
        with pytest.raises(SystemExit) as error:
            load_tool(FLOPS).main(arguments)
        assert error.value.code == 2
        assert 'error:' in capsys.readouterr().err

    def test_missing_config(self):
        with pytest.raises(ConfigError, match='nowhere.py does not exist'):
            load_tool(FLOPS).main(['nowhere.py'])


class TestBenchmark:
    @pytest.fixture(scope='class')
    def run(self, tmp_path_factory):
        """One run on the CPU: what it printed, its folder, its rows as JSON has them."""
        out, threads = tmp_path_factory.mktemp('benchmark') / 'new', torch.get_num_threads()
        screen = io.StringIO()
        try:
            with contextlib.redirect_stdout(screen):
                load_tool(BENCHMARK).main(
                    [
                        PICO,
                        '--peers',
                        'test_convnext',
                        '--size',
                        '32',
                        '--batch',
                        '2',
                        '--backend',
                        'torch',
                        '--channels-last',
                        '--device',
                        'cpu',
                        '--warmup',
                        '1',
                        '--repeats',
                        '3',
                        '--threads',
                        '1',
                        '--out',
                        str(out),
                    ]
                )
        finally:
            torch.set_num_threads(threads)
        return screen.getvalue(), out, json.loads((out / 'results.json').read_text())['rows']

    def test_rows(self, run):
        rows = run[2]
        assert [
            (row['model'], row['kind'], row['precision'], row['layout'], row['backend'])
            for row in rows
        ] == [
            (Path(PICO).stem, 'ours', 'fp32', 'contiguous', 'torch'),
            ('test_convnext', 'peer', 'fp32', 'contiguous', None),
            ('test_convnext', 'peer', 'fp32', 'channels-last', None),
        ]
        for row in rows:
            assert (row['height'], row['width'], row['batch'], row['mode']) == (32, 32, 2, 'eager')
            assert row['params'] == (893_671 if row['kind'] == 'ours' else 272_128)
            assert row['macs'] > 1e6 and row['note'] == ''
            for name in ('inference', 'latency', 'training'):
                assert 0 < row[f'{name}_ms_q1'] <= row[f'{name}_ms'] <= row[f'{name}_ms_q3']
            for name in ('inference', 'training'):
                assert row[f'{name}_img_s'] == pytest.approx(2000 / row[f'{name}_ms'])
                assert row[f'{name}_peak_gb'] is None

    def test_files_agree(self, run):
        screen, out, rows = run
        with open(out / 'results.csv', newline='') as file:
            found = list(csv.DictReader(file))
        assert tuple(found[0]) == COLUMNS
        assert [
            {key: '' if value is None else str(value) for key, value in row.items()} for row in rows
        ] == found
        table = re.search(r'(?:^\|.*\n)+', (out / 'results.md').read_text(), re.MULTILINE)[0]
        assert table in screen and len(table.splitlines()) == 2 + len(rows)
        assert len({line.count('|') for line in table.splitlines()}) == 1
        with Image.open(out / 'throughput.png') as picture:
            assert picture.width > 1000
            assert len(picture.convert('RGB').getcolors(picture.width * picture.height)) > 50

    def test_conditions(self, run):
        for text in (
            f'torch {torch.__version__.partition("+")[0]}',
            f'timm {timm.__version__}',
            'triton ',
            'mamba-ssm ',
            'CPU: ',
            '1 thread(s)',
            'without data loading and preprocessor',
            'TF32 on in rows with tf32',
            'fused AdamW',
            '32x32; batch 2',
            'medians and quartiles of 3 steps',
            'at least 1 of warm-up',
            f'groupmamba-mm: {groupmamba_mm.__version__}',
        ):
            assert text in run[0]
            assert text in (run[1] / 'results.md').read_text()
        assert '[3/3] test_convnext, 32x32, batch 2, fp32, channels-last, eager\n' in run[0]

    def test_dense_backbones(self, tmp_path, capsys, one_thread):
        load_tool(BENCHMARK).main(
            [
                DETECTOR,
                PICO,
                '--dense',
                '--peers',
                'test_convnext',
                '--size',
                '32x64',
                '--device',
                'cpu',
                '--warmup',
                '1',
                '--repeats',
                '1',
                '--out',
                str(tmp_path / 'out'),
            ]
        )
        rows = json.loads((tmp_path / 'out' / 'results.json').read_text())['rows']
        assert [row['batch'] for row in rows] == [1, 1, 1]
        assert rows[0]['params'] == rows[1]['params'] != rows[2]['params']
        assert all(row['training_ms'] > 0 for row in rows)
        assert 'forward and backward pass, random gradients' in capsys.readouterr().out

    def test_interrupted_run_keeps_its_rows(self, tmp_path, capsys, monkeypatch):
        tool = load_tool(BENCHMARK)

        def measure(model, setting, effort, measures):
            if setting.batch == 2:
                raise KeyboardInterrupt
            return dict(dict.fromkeys(COLUMNS[11:-1], 3.0), note='')

        monkeypatch.setattr(tool, 'measure', measure)
        with pytest.raises(SystemExit) as end:
            tool.main(
                [
                    PICO,
                    '--peers',
                    '--size',
                    '32',
                    '--batch',
                    '1',
                    '2',
                    '--device',
                    'cpu',
                    '--out',
                    str(tmp_path),
                ]
            )
        assert end.value.code == 130
        assert 'Interrupted: 1 of 2 rows are in' in capsys.readouterr().out
        assert len((tmp_path / 'results.csv').read_text().splitlines()) == 2
        assert Path(PICO).stem in (tmp_path / 'results.md').read_text()
        assert (tmp_path / 'throughput.png').exists()

    def test_modes(self):
        tool = load_tool(BENCHMARK)
        args = tool.parse_args(
            [
                '--compile',
                '--cuda-graph',
                '--size',
                '32',
                '--batch',
                '1',
                '--precision',
                'fp32',
                '--backend',
                'torch',
                'auto',
            ]
        )
        args.compile = ['default', 'max-autotune']
        ours, peer = find_subjects([PICO], ['test_convnext'], {})
        modes = ['eager', 'cuda-graph', 'compile-default', 'compile-max-autotune']
        assert [(setting.backend, setting.mode) for setting in tool.settings_of(ours, args)] == [
            (backend, mode) for backend in ('torch', 'auto') for mode in modes
        ]
        assert [setting.mode for setting in tool.settings_of(peer, args)] == modes

    @pytest.mark.parametrize(
        'arguments',
        [
            ['--size', '22x'],
            ['--size', '0'],
            ['--batch', '0'],
            ['--precision', 'fp8'],
            ['--precision', 'fp32', 'fp32'],
            ['--compile', 'fast'],
            ['--repeats', '0'],
            ['--measure', 'speed'],
            ['--device', 'tpu'],
            ['--cfg-options', 'model'],
        ],
    )
    def test_usage_errors(self, arguments, capsys):
        with pytest.raises(SystemExit) as error:
            load_tool(BENCHMARK).main(arguments)
        assert error.value.code == 2
        assert f'{arguments[0]}: ' in capsys.readouterr().err

    @pytest.mark.parametrize(
        'arguments, message',
        [
            (['--peers', 'convnext_tinny'], "'convnext_tinny' is no model of timm .*convnext_tiny"),
            (['--peers', 'vgg11.mine'], "'vgg11.mine': Invalid pretrained tag .* Leave out"),
            (['--peers', 'vgg11', 'vgg11'], 'peer vgg11 is given twice; give each peer once'),
            (['official-tiy'], 'neither a config file nor a size; did you mean official-tiny'),
            (['configs/nowhere.py'], 'nowhere.py does not exist'),
            (['tiny', 'tiny'], 'given twice'),
            (['tiny', DETECTOR], 'tiny_8xb128_in1k is a classifier and .* add --dense'),
            (['--backend', 'cuda'], "--backend cuda: unknown scan backend 'cuda'; choose from"),
            (['--precision', 'tf32'], 'tf32 is for GPUs, .* choose fp32 or bf16'),
            (['--precision', 'fp16'], 'fp16 is for GPUs'),
            (['--cuda-graph'], '--cuda-graph needs a GPU'),
            (
                [PICO, '--size', '32', '--cfg-options', 'model.head.in_channels=5'],
                'demo-cls cannot be run with 32x32, batch 2, fp32, .*; change that, or leave it out',
            ),
        ],
    )
    def test_errors_come_before_measuring(self, arguments, message, tmp_path, monkeypatch):
        tool = load_tool(BENCHMARK)
        monkeypatch.setattr(tool, 'measure', None)
        with pytest.raises(ConfigError, match=message):
            tool.main([*arguments, '--device', 'cpu', '--out', str(tmp_path / 'out')])
        assert not (tmp_path / 'out').exists()

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        with pytest.raises(ConfigError, match='sees no GPU; check nvidia-smi .* --device cpu'):
            load_tool(BENCHMARK).main(['--device', 'cuda'])

    def test_earlier_results_are_not_overwritten(self, tmp_path):
        (tmp_path / 'results.csv').write_text('hours of work')
        with pytest.raises(ConfigError, match='results.csv of an earlier run; give another'):
            load_tool(BENCHMARK).main(['--device', 'cpu', '--out', str(tmp_path)])
        with pytest.raises(ConfigError, match='is a file; give a folder'):
            load_tool(BENCHMARK).main(['--device', 'cpu', '--out', str(tmp_path / 'results.csv')])


NUM_CLASSES, PER_CLASS = 3, 4


@pytest.fixture
def results(tmp_path):
    """A config with a data set of 12 pictures, and results in which the first class is missed."""
    generator = np.random.default_rng(0)
    samples = []
    for label in range(NUM_CLASSES):
        folder = tmp_path / 'data' / f'class_{label}'
        folder.mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = generator.integers(0, 256, (20 + 10 * label, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{number}.png')
            predicted = max(label, 1)
            scores = torch.full((NUM_CLASSES,), 0.1)
            scores[predicted] = 0.8
            samples.append(
                dict(
                    sample_idx=len(samples),
                    gt_label=torch.tensor([label]),
                    pred_label=torch.tensor([predicted]),
                    pred_score=scores,
                )
            )
    config = tmp_path / 'pico.py'
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        'test_dataloader = dict(dataset=dict(\n'
        f"    type='CustomDataset', data_root={str(tmp_path / 'data')!r}, "
        'pipeline=[]))\n'
    )
    write_results(tmp_path, samples)
    return tmp_path, samples


def write_results(folder, samples):
    (folder / 'results.pkl').write_bytes(pickle.dumps(samples))


def draw(folder, *options):
    tool = load_tool(GRID)
    tool.main(
        [
            str(folder / 'pico.py'),
            str(folder / 'results.pkl'),
            '--out',
            str(folder / 'new' / 'grid.png'),
            *options,
        ]
    )
    return tool, Image.open(folder / 'new' / 'grid.png')


class TestPredictionGrid:
    @pytest.mark.parametrize('num', [1, 6, 50])
    def test_size(self, results, num, capsys):
        tool, image = draw(results[0], '--num', str(num))
        assert image.size == tool.grid_size(min(num, NUM_CLASSES * PER_CLASS))
        assert 'Top-1 accuracy 66.7% (8 of 12 test images)' in capsys.readouterr().out

    def test_counts_of_right_and_wrong(self, results, capsys):
        draw(results[0], '--num', '6')
        assert 'shown: 4 of 8 right and 2 of 4 wrong' in capsys.readouterr().out
        draw(results[0], '--num', '6', '--wrong-first')
        assert 'shown: 2 of 8 right and 4 of 4 wrong' in capsys.readouterr().out

    def test_frames_and_pictures(self, results):
        tool, image = draw(results[0], '--num', '5', '--wrong-first')
        pixels = np.asarray(image.convert('RGB'))
        colours = [tuple(bytes.fromhex(colour[1:])) for colour in (tool.WRONG, tool.RIGHT)]
        row = pixels[tool.TITLE + tool.TILE // 2]  # through the middle of the first row's pictures
        left = [tool.MARGIN + column * (tool.TILE + tool.GAP) for column in range(4)]
        # four wrong ones come first and fill the first row of four
        assert tool.grid_shape(5) == (2, 4)
        assert all(tuple(row[x]) == colours[0] for x in left)
        assert (
            tuple(pixels[tool.TITLE + tool.TILE + tool.CAPTION + tool.GAP + 100, left[0]])
            == colours[1]
        )
        assert len(np.unique(row[left[0] + 4 : left[0] + tool.TILE - 4], axis=0)) > 20

    def test_seed(self, results):
        tool, _ = draw(results[0])
        predictions = tool.read_predictions(str(results[0] / 'results.pkl'))
        chosen = [tool.choose(predictions, 5, seed, False) for seed in (0, 0, 1)]
        assert chosen[0] == chosen[1] != chosen[2]

    def test_long_names(self):
        name = load_tool(GRID).short_name
        assert name(['tench, Tinca tinca'], 0) == 'tench'
        assert name(None, 7) == '7'
        assert len(name(['a' * 80], 0)) == load_tool(GRID).NAME_LENGTH

    def test_results_of_other_data(self, results):
        folder, samples = results
        samples[0]['gt_label'] = torch.tensor([2])
        write_results(folder, samples)
        with pytest.raises(DataError, match='image 0 has the label 2 there and 0 in the test data'):
            draw(folder)

    @pytest.mark.parametrize(
        'samples, message',
        [
            ([], 'hold no list of predictions'),
            ([dict(sample_idx=0)], 'prediction 0 has no pred_label, pred_score, gt_label'),
            (
                [
                    dict(
                        sample_idx=0,
                        pred_label=torch.tensor([1, 2]),
                        gt_label=torch.tensor([1]),
                        pred_score=torch.ones(3),
                    )
                ],
                'several labels',
            ),
        ],
    )
    def test_other_pickles(self, results, samples, message):
        write_results(results[0], samples)
        with pytest.raises(DataError, match=message):
            draw(results[0])

    def test_no_pickle_and_no_file(self, results):
        (results[0] / 'results.pkl').write_text('accuracy 99 %')
        with pytest.raises(DataError, match='cannot be unpickled'):
            draw(results[0])
        (results[0] / 'results.pkl').unlink()
        with pytest.raises(DataError, match='do not exist'):
            draw(results[0])

    def test_code_in_results_is_refused(self, results, tmp_path):
        """In the pickle itself, or in a tensor's storage, which torch would unpickle."""

        class InStorage:
            def __reduce__(self):
                buffer = io.BytesIO()
                torch.save(RunsCode(tmp_path / 'ran'), buffer)
                return torch.storage._load_from_bytes, (buffer.getvalue(),)

        for sample in (RunsCode(tmp_path / 'ran'), InStorage()):
            write_results(results[0], [sample])
            with pytest.raises(DataError, match='cannot be unpickled'):
                draw(results[0])
            assert not (tmp_path / 'ran').exists()

    def test_missing_picture(self, results):
        tool = load_tool(GRID)
        with pytest.raises(DataError, match='gone.png does not exist'):
            tool.read_tile(str(results[0] / 'gone.png'))

    def test_out_must_be_png(self, results, capsys):
        with pytest.raises(SystemExit):
            load_tool(GRID).main(['pico.py', 'results.pkl', '--out', 'grid.jpg'])
        assert 'end the name in .png' in capsys.readouterr().err


class TestCompareRuns:
    @staticmethod
    def write(folder, losses, accuracy):
        """Logs as mmengine writes them; the last loss comes from a resumed run's second log."""
        records = [
            dict(loss=loss, epoch=1, iter=25 * i, step=25 * i) for i, loss in enumerate(losses, 1)
        ]
        for name, part in (
            ('1', records[:-1] + [dict(loss=99.0, step=25 * len(losses))]),
            ('2', records[-1:] + [{'accuracy/top1': accuracy, 'step': 2}]),
        ):
            log = folder / name / 'vis_data' / 'scalars.json'
            log.parent.mkdir(parents=True)
            log.write_text('\n'.join(map(json.dumps, part)) + '\n')
        return str(folder)

    def test_table_and_picture(self, tmp_path, capsys):
        a = [self.write(tmp_path / f'a{i}', (2.0, 1.0 + i), 90.0 + i) for i in (0, 2)]
        b = self.write(tmp_path / 'b', (3.0, 2.5, 2.25), 80.0)
        out = tmp_path / 'new' / 'curves.png'
        load_tool(COMPARE).main(['--group', 'with', *a, '--group', 'without', b, '--out', str(out)])
        shown = capsys.readouterr().out
        assert '| with | 2 | 2 +- 1.4 (1, 3) | 91 +- 1.4 (90, 92) |' in shown
        assert '| without | 1 | 2.25 +- 0 (2.25) | 80 +- 0 (80) |' in shown
        picture = np.asarray(Image.open(out).convert('RGB'))
        assert picture.shape[1] > 2 * picture.shape[0] and picture.std() > 5

    def test_deviation_is_that_of_the_sample_at_common_steps(self):
        steps, means, deviations = load_tool(COMPARE).mean_and_deviation(
            [{1: 1.0, 2: 5.0, 3: 9.0}, {1: 2.0, 2: 7.0}, {1: 6.0, 2: 9.0}]
        )
        assert (steps, means) == ([1, 2], [3.0, 7.0])
        assert deviations == [pytest.approx(7**0.5), pytest.approx(2.0)]

    @pytest.mark.parametrize(
        'key, record, unit',
        [
            ('loss', dict(iter=10, step=10), 'iteration'),
            ('loss', dict(iter=10, epoch=1, step=10), 'iteration'),
            ('mIoU', dict(iter=10, step=10), 'iteration'),
            ('accuracy/top1', dict(iter=10, epoch=1, step=10), 'epoch'),
        ],
    )
    def test_units_of_the_steps(self, key, record, unit):
        records = [dict(loss=1.0, **record), {'mIoU': 2.0, 'accuracy/top1': 3.0, 'step': 10}]
        assert load_tool(COMPARE).unit_of(records, key) == unit

    def test_what_is_missing_is_told(self, tmp_path):
        tool, run = load_tool(COMPARE), self.write(tmp_path / 'a', (2.0, 1.0), 90.0)
        out = str(tmp_path / 'curves.png')
        with pytest.raises(DataError, match=r'nowhere has no log .*scalars\.json'):
            tool.main(['--group', 'a', str(tmp_path / 'nowhere'), '--out', out])
        with pytest.raises(
            DataError, match="no 'lr' was logged; there are accuracy/top1, epoch, iter, loss"
        ):
            tool.main(['--group', 'a', run, '--keys', 'lr', '--out', out])
        with pytest.raises(SystemExit):
            tool.main(['--group', 'a', '--out', out])


class TestBenchmarkTeacher:
    def test_table(self, capsys, monkeypatch, one_thread):
        tool = load_tool(TEACHER)
        variants = tool.VARIANTS
        monkeypatch.setattr(tool, 'GPU_VARIANTS', {})
        tool.main(
            [
                str(ROOT / 'configs/demo/groupmamba-pico-distill_demo-cls.py'),
                '--batch',
                '2',
                '--image-size',
                '32',
                '--repeats',
                '2',
                '--warmup',
                '1',
            ]
        )
        output = capsys.readouterr().out
        assert 'batch 2, 32 x 32; TF32 in convolutions' in output
        rows = dict(re.findall(r'^(\S.*\S) {3,}([\d.]+) +[-\d.]+% +[\d.]+$', output, re.MULTILINE))
        assert set(rows) == {'no teacher', *variants}
        assert all(float(step) > 0 for step in rows.values())

    def test_other_decisions_are_counted(self, tmp_path, capsys, monkeypatch, one_thread):
        tool = load_tool(TEACHER)
        variants = dict(tool.VARIANTS, wrong=dict(precision='bf16'))
        monkeypatch.setattr(tool, 'VARIANTS', variants)
        monkeypatch.setattr(tool, 'GPU_VARIANTS', {})
        teacher = ConfigTeacher(str(ROOT / 'configs/demo/regnety-002_demo-cls.py'), 'unused')
        torch.manual_seed(0)
        torch.save(teacher.build().state_dict(), tmp_path / 'teacher.pth')
        for name in 'ab':
            (tmp_path / 'data/train' / name).mkdir(parents=True)
            for index in range(5):
                picture = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
                Image.fromarray(picture).save(tmp_path / f'data/train/{name}/{index}.png')
        make = tool.make_teachers

        def with_a_wrong_one(cfg, network):
            teachers = make(cfg, network)
            answer = teachers[tool.EXACT]
            teachers['wrong'] = lambda *args: -answer(*args)
            return teachers

        monkeypatch.setattr(tool, 'make_teachers', with_a_wrong_one)
        tool.main(
            [
                str(ROOT / 'configs/demo/groupmamba-pico-distill_demo-cls.py'),
                '--batch',
                '4',
                '--agreement',
                '6',
                '--cfg-options',
                f'train_dataloader.dataset.data_root={tmp_path}/data',
                'train_dataloader.num_workers=0',
                f'model.teacher.checkpoint={tmp_path}/teacher.pth',
            ]
        )
        output = capsys.readouterr().out
        assert '6 training images, augmented and mixed' in output
        rows = dict(re.findall(r'^(\S.*\S) {2,}(\d+) \([\d.]+%\)$', output, re.MULTILINE))
        assert set(rows) == set(variants) and rows['fp32'] == '0' and rows['wrong'] == '6'

    def test_a_config_without_a_teacher_is_refused(self):
        for options in ([], ['--agreement', '4']):
            with pytest.raises(ConfigError, match='has no teacher; give a .*-distill_'):
                load_tool(TEACHER).main([TINY, *options])


def test_architecture_is_drawn_from_the_modules(tmp_path, monkeypatch):
    draw = load_tool('analysis_tools/draw_architecture.py')
    backbone = groupmamba_mm.GroupMamba('official-tiny')
    assert draw.directions_of(backbone)[:2] == ('left-right', 'top-bottom')
    stages = draw.stages_of(backbone)
    assert stages[1] == ('stem', 'OfficialStem\n64 x 56 x 56')
    assert stages[5] == ('stage 4', '3 layers\n448 x 7 x 7')
    picture = str(tmp_path / 'a.png')
    monkeypatch.setattr(sys, 'argv', ['draw', 'official-tiny', '--out', picture])
    draw.main()
    more = ['--predictions', f'classification={picture}', 'detection=missing.png']
    monkeypatch.setattr(sys, 'argv', ['draw', 'official-tiny', '--out', picture, *more])
    with pytest.raises(UserError, match='detection=missing.png: give TITLE=FILE'):
        draw.main()
    monkeypatch.setattr(sys, 'argv', ['draw', 'tiny', '--out', picture, *more[:2]])
    draw.main()
