"""Teachers: what is read, how they want their images, and that they never change."""

import argparse
import copy
import subprocess

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import MODELS, init_default_scope

from groupmamba_mm.distillation import ConfigTeacher, Normalization, TimmTeacher
from groupmamba_mm.distillation import teachers as teachers_module
from groupmamba_mm.errors import CheckpointError, ConfigError
from tests.conftest import REPO, RunsCode
from tests.openmmlab import RandomTeacher

SMALL_TIMM = 'test_resnet.r160_in1k'
TIMM_MEAN_STD = Normalization((127.5,) * 3, (127.5,) * 3)
STUDENT = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    network = timm.create_model(SMALL_TIMM, num_classes=7)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


@pytest.fixture
def file(network, tmp_path):
    """A checkpoint as DeiT's: the tensors under 'model', with other things beside them."""
    path = tmp_path / 'teacher.pth'
    torch.save(
        dict(
            model=network.state_dict(),
            epoch=3,
            lr=np.float64(0.1),
            args=argparse.Namespace(lr=1e-3),
        ),
        path,
    )
    return str(path)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (2, 3, 40, 32), generator=torch.Generator().manual_seed(0)).float()


def make(file, **options):
    return TimmTeacher(SMALL_TIMM, file, num_classes=7, **options)


def normalized(pixels, normalization):
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (normalization.mean, normalization.std)
    )
    return ((pixels if normalization.rgb else pixels.flip(1)) - mean) / std


@pytest.mark.parametrize(
    'source',
    [
        STUDENT,
        Normalization((0.0,) * 3, (1.0,) * 3, rgb=False),
        Normalization((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), rgb=False),
    ],
)
def test_images_are_brought_into_the_teachers_normalization(pixels, source):
    """Pixels are RGB here."""
    target = Normalization((127.5, 100.0, 90.0), (127.5, 60.0, 50.0))
    found = target.converted(normalized(pixels, source), source)
    torch.testing.assert_close(found, normalized(pixels, target), atol=1e-5, rtol=1e-5)


def test_equal_normalizations_cost_nothing(pixels):
    assert STUDENT.converted(pixels, STUDENT) is pixels
    # the default teacher's are those of our configs
    assert TimmTeacher('regnety_160.deit_in1k').normalization == STUDENT


def test_a_timm_teacher_from_a_file(network, file, pixels):
    teacher = MODELS.build(
        dict(type='TimmTeacher', model_name=SMALL_TIMM, checkpoint=file, num_classes=7)
    )
    assert teacher.network is None
    assert teacher.normalization == TIMM_MEAN_STD
    teacher.load(num_classes=7)
    found = teacher(normalized(pixels, STUDENT), STUDENT)
    with torch.no_grad():
        expected = network(normalized(pixels, TIMM_MEAN_STD))
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    first = teacher.network
    teacher.load(num_classes=7)
    assert teacher.network is first


def test_the_normalization_can_be_given(file):
    teacher = TimmTeacher(SMALL_TIMM, file, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    assert teacher.normalization == Normalization((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


@pytest.mark.parametrize(
    'options, tolerance',
    [
        (dict(precision='bf16'), 0.05),
        (dict(channels_last=True), 1e-4),
        (dict(precision='bf16', channels_last=True), 0.05),
    ],
)
def test_options_change_the_speed_alone(file, pixels, options, tolerance):
    exact, other = make(file), make(file, **options)
    exact.load(7)
    other.load(7)
    images = normalized(pixels, STUDENT)
    expected, found = exact(images, STUDENT), other(images, STUDENT)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < tolerance * expected.norm()
    if options.get('precision') == 'bf16':
        assert not torch.equal(found, expected)
    if options.get('channels_last'):
        weight = next(p for p in other.network.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_that_are_cast_once_give_what_autocast_gives(network, file, pixels):
    teacher = make(file, precision='bf16')
    teacher.load(7)
    images = normalized(pixels, STUDENT)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = network(teacher.normalization.converted(images, STUDENT)).float()
    assert torch.equal(teacher(images, STUDENT), expected)
    types = {
        type(module): parameter.dtype
        for module in teacher.network.modules()
        for parameter in module.parameters(recurse=False)
    }
    assert types[torch.nn.Conv2d] == types[torch.nn.Linear] == torch.bfloat16
    assert types[torch.nn.BatchNorm2d] == torch.float32


def test_layers_that_compute_their_weights_keep_them_in_fp32():
    class Standardized(torch.nn.Linear):
        def forward(self, images):
            weight = self.weight - self.weight.mean()
            return torch.nn.functional.linear(images, weight, self.bias)

    teacher = RandomTeacher(precision='bf16')
    network = torch.nn.Sequential(Standardized(3, 4), torch.nn.MultiheadAttention(4, 2))
    teacher.use(network)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_numbers_of_the_channels_are_copied_once():
    arguments = ((1.0, 2.0, 3.0), torch.float32, torch.device('cpu'))
    column = teachers_module._column(*arguments)
    assert column.shape == (1, 3, 1, 1) and teachers_module._column(*arguments) is column


def test_a_start_and_its_end_are_a_call(file, pixels):
    teacher = make(file)
    teacher.load(7)
    images = normalized(pixels, STUDENT)
    end = teacher.start(images, STUDENT)
    assert torch.equal(end(), teacher(images, STUDENT)) and not end().requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize(
    'options',
    [
        dict(own_stream=False),
        dict(),
        dict(own_stream=False, cuda_graph=True),
        dict(cuda_graph=True),
        dict(cuda_graph=True, compile=True),
    ],
)
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_how_a_teacher_runs_on_a_gpu_changes_the_time_alone(file, options, precision, no_tf32):
    plain = make(file, precision=precision, own_stream=False)
    teacher = make(file, precision=precision, channels_last=True, **options)
    plain.load(7), teacher.load(7)
    kept = []
    # the last one is the smaller batch at the end of an epoch, the third is recorded already
    for index, size in enumerate((4, 4, 4, 3)):
        generator = torch.Generator('cuda').manual_seed(index)
        images = torch.randn(size, 3, 40, 32, device='cuda', generator=generator)
        end = teacher.start(images, STUDENT)
        images.mul(2).sum()  # the student's work
        kept.append((end(), plain(images, STUDENT)))
        del images
    for found, expected in kept:  # later replays left the earlier answers alone
        assert found.dtype == torch.float32 and not found.requires_grad
        tolerance = 1e-4 if precision == 'fp32' else 0.05
        assert (found - expected).norm() < tolerance * expected.norm()
    assert (teacher._recorded is not None) == bool(options.get('cuda_graph'))


@pytest.mark.gpu
def test_a_network_that_cannot_be_recorded_is_told():
    class Waits(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :4] * images.mean().item()

    teacher = RandomTeacher(cuda_graph=True)
    teacher.use(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), Waits()))
    with pytest.raises(ConfigError, match='model.teacher.cuda_graph=False'):
        teacher(torch.randn(2, 3, 8, 8, device='cuda'), STUDENT)


def test_the_compiled_network_is_the_one_that_runs(file, pixels, monkeypatch):
    compiled = []

    def compile(network):
        compiled.append(network)
        return lambda images: network(images) + 1

    monkeypatch.setattr(teachers_module.torch, 'compile', compile)
    plain, teacher = make(file), make(file, compile=True)
    for each in (plain, teacher):
        each.load(7)
    assert compiled == [teacher.network]
    images = normalized(pixels, STUDENT)
    torch.testing.assert_close(teacher(images, STUDENT), plain(images, STUDENT) + 1)


def test_the_students_autocast_has_no_influence(file, pixels):
    teacher = make(file)
    teacher.load(7)
    images = normalized(pixels, STUDENT)
    with torch.autocast('cpu', torch.bfloat16):
        inside = teacher(images, STUDENT)
    assert torch.equal(inside, teacher(images, STUDENT))


def test_a_copy_of_a_student_shares_the_teacher(file):
    teacher = make(file)
    teacher.load(7)
    assert copy.deepcopy([teacher])[0] is teacher


def test_a_config_teacher_and_what_training_saved_for_it(tmp_path, pixels):
    """The checkpoint of a Runner, which holds more than tensors, is tested end to end elsewhere."""
    config = str(REPO / 'configs/demo/regnety-002_demo-cls.py')
    teacher = MODELS.build(
        dict(type='ConfigTeacher', config=config, checkpoint=str(tmp_path / 'teacher.pth'))
    )
    assert teacher.normalization == STUDENT
    init_default_scope('mmpretrain')
    trained = teacher.build().eval()
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'teacher.pth')
    teacher.load(10)
    with torch.no_grad():
        expected = trained(normalized(pixels, STUDENT))
    torch.testing.assert_close(teacher(normalized(pixels, STUDENT), STUDENT), expected)


def test_a_config_of_mmpretrain_by_name():
    teacher = ConfigTeacher('mmpretrain::resnet/resnet18_8xb32_in1k.py', 'resnet18.pth')
    assert teacher.normalization == STUDENT
    assert teacher.count_classes(teacher.build()) == 1000


def test_missing_files_are_told(tmp_path):
    with pytest.raises(CheckpointError, match=r'gone\.pth does not exist'):
        TimmTeacher(SMALL_TIMM, str(tmp_path / 'gone.pth'), num_classes=7).load(7)
    with pytest.raises(ConfigError, match=r'gone\.py, does not exist; set model\.teacher\.config'):
        ConfigTeacher(str(tmp_path / 'gone.py'), 'a.pth').load(7)


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    'call',
    [
        lambda marker: RunsCode(marker),
        lambda marker: Calls(eval, f'open({str(marker)!r}, "w")'),
        lambda marker: Calls(exec, f'open({str(marker)!r}, "w")'),
        lambda marker: Calls(subprocess.getoutput, f'touch {marker}'),
        lambda marker: Calls(subprocess.Popen, ['touch', str(marker)]),
        lambda marker: Calls(open, str(marker), 'w'),
    ],
)
def test_code_is_refused_and_not_run(network, tmp_path, call):
    marker, path = tmp_path / 'marker', tmp_path / 'evil.pth'
    torch.save(dict(model=network.state_dict(), extra=call(marker)), path)
    with pytest.raises(CheckpointError, match='could run code'):
        TimmTeacher(SMALL_TIMM, str(path), num_classes=7).load(7)
    assert not marker.exists()


def test_damaged_and_other_files_are_refused(file, tmp_path):
    with open(file, 'rb') as stream:
        content = stream.read()
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match='truncated or damaged'):
        TimmTeacher(SMALL_TIMM, str(cut), num_classes=7).load(7)
    teacher = TimmTeacher('test_efficientnet.r160_in1k', file, num_classes=7)
    with pytest.raises(CheckpointError, match='teacher: .* is not exactly the network.*missing'):
        teacher.load(7)
    assert teacher.network is None
    with pytest.raises(CheckpointError, match=r'fc\.weight \(7x.*teacher\.checkpoint=FILE'):
        TimmTeacher(SMALL_TIMM, file, num_classes=8).load(8)


def test_a_file_with_more_than_the_network_is_refused(network, tmp_path):
    path = tmp_path / 'larger.pth'
    torch.save(dict(model=dict(network.state_dict(), more=torch.ones(3))), path)
    with pytest.raises(CheckpointError, match='1 are not in the model: more'):
        TimmTeacher(SMALL_TIMM, str(path), num_classes=7).load(7)


def test_a_file_without_counts_of_batches_is_taken(network, tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(
        {
            key: value
            for key, value in network.state_dict().items()
            if not key.endswith('num_batches_tracked')
        },
        path,
    )
    TimmTeacher(SMALL_TIMM, str(path), num_classes=7).load(7)


def test_other_classes_are_refused_at_once(file, monkeypatch):
    with pytest.raises(ConfigError, match='the teacher has 7 classes and the student 10; set'):
        TimmTeacher(SMALL_TIMM, file, num_classes=7).load(10)
    config = str(REPO / 'configs/demo/regnety-002_demo-cls.py')
    with pytest.raises(ConfigError, match='the teacher has 10 classes and the student 7'):
        ConfigTeacher(config, file).load(7)
    # timm's own weights keep their last layer, which timm would replace by a random one
    asked = {}
    monkeypatch.setattr(
        timm, 'create_model', lambda name, **options: asked.update(options) or torch.nn.Module()
    )
    teacher = TimmTeacher(SMALL_TIMM)
    teacher.build()
    assert asked == dict(pretrained=True)
    with pytest.raises(ValueError, match='num_classes=10 belongs to a checkpoint'):
        TimmTeacher(SMALL_TIMM, num_classes=10)


def test_a_teacher_leaves_the_students_random_numbers_alone(file):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    TimmTeacher(SMALL_TIMM, file, num_classes=7).load(7)
    assert torch.equal(torch.rand(3), expected)


def test_weights_that_cannot_be_fetched_are_told(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError('no route')

    monkeypatch.setattr(timm, 'create_model', fails)
    with pytest.raises(CheckpointError, match=r'no route\); name a file with .*teacher.checkpoint'):
        TimmTeacher(SMALL_TIMM).load(7)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"precision must be one of .*got 'fp64'"):
        RandomTeacher(precision='fp64')
    with pytest.raises(ValueError, match='no model .regnety_161.; like it are .*regnety_160'):
        TimmTeacher('regnety_161')
