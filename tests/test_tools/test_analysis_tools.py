"""The tools of tools/analysis_tools, as a user calls them."""
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groupmamba_mm.analysis.detection import run_two_stage
from groupmamba_mm.errors import ConfigError, DataError
from tests.conftest import load_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'groupmamba'
TINY = str(CONFIGS / 'groupmamba-official-tiny_8xb128_in1k.py')
DETECTOR = str(ROOT / 'configs' / 'demo' / 'mask-rcnn_groupmamba-pico_demo-det.py')
FLOPS, BENCHMARK, GRID, COMPARE, TEACHER = (
    f'analysis_tools/{name}.py' for name in (
        'get_flops', 'benchmark_cpu', 'prediction_grid', 'compare_runs', 'benchmark_teacher'))


class TestGetFlops:

    def test_table(self, capsys, one_thread):
        load_tool(FLOPS).main([TINY, TINY, '--shape', '32', '64'])
        output = capsys.readouterr().out
        rows = re.findall(
            r'^groupmamba-official-tiny\S+ +whole model +([\d,]+) +([\d.]+) +([\d.]+)$', output,
            re.MULTILINE)
        assert len(rows) == 2 and rows[0] == rows[1]
        assert rows[0][0] == '23,361,917'
        assert float(rows[0][1]) > float(rows[0][2]) > 0
        assert 'Image 32 x 64 (H x W), batch 1' in output
        assert '9*B*L*C*N + B*L*C for each selective scan' in output

    def test_options_change_the_model(self, capsys, one_thread):
        load_tool(FLOPS).main([
            TINY, '--shape', '32', '32', '--cfg-options', 'model.head.num_classes=10'])
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
        load_tool(FLOPS).main([DETECTOR, '--shape', '64', '96', '--cfg-options',
                               'model.rpn_head.feat_channels=32'])
        output = capsys.readouterr().out
        assert re.search(r'demo-det +whole model +[\d,]+ +[\d.]+ +[\d.]+$', output, re.MULTILINE)
        assert 'box head on 1000 dummy boxes and mask head on the first 100' in output

    @pytest.mark.parametrize('arguments', [
        [],
        [TINY, '--shape', '0', '32'],
        [TINY, '--shape', '32'],
    ])
    def test_usage_errors(self, arguments, capsys):
        with pytest.raises(SystemExit) as error:
            load_tool(FLOPS).main(arguments)
        assert error.value.code == 2
        assert 'error:' in capsys.readouterr().err

    def test_missing_config(self):
        with pytest.raises(ConfigError, match='nowhere.py does not exist'):
            load_tool(FLOPS).main(['nowhere.py'])


class TestBenchmarkCpu:

    def test_both_rows(self, capsys, one_thread):
        load_tool(BENCHMARK).main(
            ['--image-size', '193', '--repeats', '1', '--warmup', '1', '--threads', '1'])
        output = capsys.readouterr().out
        rows = dict(re.findall(r'^(\S.*?) +[\d.]+ +[\d.]+ - [\d.]+ +([\d.]+)$', output,
                               re.MULTILINE))
        assert set(rows) == {'groupmamba-official-tiny_8xb128_in1k', 'Swin-T (mmpretrain)'}
        assert rows['Swin-T (mmpretrain)'] == '1.00'
        assert float(rows['groupmamba-official-tiny_8xb128_in1k']) > 0
        for condition in ('CPU: ', f'PyTorch {torch.__version__}', '1 thread(s)', 'fp32',
                          '193 x 193', 'Batch 1'):
            assert condition in output

    def test_quartiles_in_milliseconds(self):
        tool = load_tool(BENCHMARK)
        assert tool.summarise([0.004, 0.001, 0.002, 0.005, 0.003]) == tool.Latency(2, 3, 4)
        assert tool.summarise([0.002]) == tool.Latency(2, 2, 2)

    def test_warmup_is_left_out_and_models_take_turns(self):
        tool, calls = load_tool(BENCHMARK), []
        models = {name: lambda image, name=name: calls.append(name) for name in 'ab'}
        tool.measure(models, torch.zeros(1), warmup=1, repeats=2)
        assert calls == ['a', 'b'] * 3

    def test_image_too_small_for_the_peer(self, capsys):
        with pytest.raises(SystemExit):
            load_tool(BENCHMARK).main(['--image-size', '192'])
        assert 'needs 193 or more' in capsys.readouterr().err

    def test_same_config_twice(self):
        with pytest.raises(ConfigError, match='given twice'):
            load_tool(BENCHMARK).main([TINY, TINY])


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
            scores = torch.full((NUM_CLASSES, ), 0.1)
            scores[predicted] = 0.8
            samples.append(
                dict(sample_idx=len(samples), gt_label=torch.tensor([label]),
                     pred_label=torch.tensor([predicted]), pred_score=scores))
    config = tmp_path / 'pico.py'
    config.write_text("default_scope = 'mmpretrain'\n"
                      'test_dataloader = dict(dataset=dict(\n'
                      f"    type='CustomDataset', data_root={str(tmp_path / 'data')!r}, "
                      'pipeline=[]))\n')
    write_results(tmp_path, samples)
    return tmp_path, samples


def write_results(folder, samples):
    (folder / 'results.pkl').write_bytes(pickle.dumps(samples))


def draw(folder, *options):
    tool = load_tool(GRID)
    tool.main([str(folder / 'pico.py'), str(folder / 'results.pkl'),
               '--out', str(folder / 'new' / 'grid.png'), *options])
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
        assert tuple(pixels[tool.TITLE + tool.TILE + tool.CAPTION + tool.GAP + 100, left[0]]
                     ) == colours[1]
        assert len(np.unique(row[left[0] + 4:left[0] + tool.TILE - 4], axis=0)) > 20

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

    @pytest.mark.parametrize('samples, message', [
        ([], 'hold no list of predictions'),
        ([dict(sample_idx=0)], 'prediction 0 has no pred_label, pred_score, gt_label'),
        ([dict(sample_idx=0, pred_label=torch.tensor([1, 2]), gt_label=torch.tensor([1]),
               pred_score=torch.ones(3))], 'several labels'),
    ])
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

    def test_missing_picture(self, results):
        tool = load_tool(GRID)
        with pytest.raises(DataError, match='gone.png cannot be read'):
            tool.read_tile(str(results[0] / 'gone.png'))

    def test_out_must_be_png(self, results, capsys):
        with pytest.raises(SystemExit):
            load_tool(GRID).main(['pico.py', 'results.pkl', '--out', 'grid.jpg'])
        assert 'end the name in .png' in capsys.readouterr().err


class TestCompareRuns:

    @staticmethod
    def write(folder, losses, accuracy):
        """Logs as mmengine writes them; the last loss comes from a resumed run's second log."""
        records = [dict(loss=loss, step=25 * i) for i, loss in enumerate(losses, 1)]
        for name, part in (('1', records[:-1] + [dict(loss=99., step=25 * len(losses))]),
                           ('2', records[-1:] + [{'accuracy/top1': accuracy, 'step': 2}])):
            log = folder / name / 'vis_data' / 'scalars.json'
            log.parent.mkdir(parents=True)
            log.write_text('\n'.join(map(json.dumps, part)) + '\n')
        return str(folder)

    def test_table_and_picture(self, tmp_path, capsys):
        a = [self.write(tmp_path / f'a{i}', (2., 1. + i), 90. + i) for i in (0, 2)]
        b = self.write(tmp_path / 'b', (3., 2.5, 2.25), 80.)
        out = tmp_path / 'new' / 'curves.png'
        load_tool(COMPARE).main(['--group', 'with', *a, '--group', 'without', b, '--out', str(out)])
        shown = capsys.readouterr().out
        assert '| with | 2 | 2 +- 1.4 (1, 3) | 91 +- 1.4 (90, 92) |' in shown
        assert '| without | 1 | 2.25 +- 0 (2.25) | 80 +- 0 (80) |' in shown
        picture = np.asarray(Image.open(out).convert('RGB'))
        assert picture.shape[1] > 2 * picture.shape[0] and picture.std() > 5

    def test_deviation_is_that_of_the_sample_at_common_steps(self):
        steps, means, deviations = load_tool(COMPARE).mean_and_deviation(
            [{1: 1., 2: 5., 3: 9.}, {1: 2., 2: 7.}, {1: 6., 2: 9.}])
        assert (steps, means) == ([1, 2], [3., 7.])
        assert deviations == [pytest.approx(7**.5), pytest.approx(2.)]

    def test_what_is_missing_is_told(self, tmp_path):
        tool, run = load_tool(COMPARE), self.write(tmp_path / 'a', (2., 1.), 90.)
        out = str(tmp_path / 'curves.png')
        with pytest.raises(DataError, match=r'nowhere has no log .*scalars\.json'):
            tool.main(['--group', 'a', str(tmp_path / 'nowhere'), '--out', out])
        with pytest.raises(DataError, match="no 'lr' was logged; there are accuracy/top1, loss"):
            tool.main(['--group', 'a', run, '--keys', 'lr', '--out', out])
        with pytest.raises(SystemExit):
            tool.main(['--group', 'a', '--out', out])


class TestBenchmarkTeacher:

    def test_table(self, capsys, monkeypatch, one_thread):
        tool = load_tool(TEACHER)
        variants = {name: options for name, options in tool.VARIANTS.items()
                    if 'compile' not in options}
        monkeypatch.setattr(tool, 'VARIANTS', variants)
        tool.main([str(ROOT / 'configs/demo/groupmamba-pico-distill_demo-cls.py'), '--batch', '2',
                   '--image-size', '32', '--repeats', '2', '--warmup', '1'])
        output = capsys.readouterr().out
        assert 'batch 2, 32 x 32; TF32 in convolutions' in output
        rows = dict(re.findall(r'^(\S.*\S) {3,}([\d.]+) +[-\d.]+% +[\d.]+$', output, re.MULTILINE))
        assert set(rows) == {'no teacher', *variants}
        assert all(float(step) > 0 for step in rows.values())

    def test_a_config_without_a_teacher_is_refused(self):
        with pytest.raises(ConfigError, match='has no teacher; give a .*-distill_'):
            load_tool(TEACHER).main([TINY])
