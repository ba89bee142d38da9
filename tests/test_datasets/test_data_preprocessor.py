"""What crosses from the workers, and the batch that the model gets."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate
from mmpretrain.datasets.transforms import PackInputs
from mmpretrain.models.utils import ClsDataPreprocessor
from mmpretrain.structures import DataSample
from torch.utils.data import DataLoader, Dataset

from groupmamba_mm.datasets.classification import (
    AugmentingClsDataPreprocessor,
    StackedSamples,
    stack_samples,
)
from groupmamba_mm.errors import ConfigError, DataError

NORMALIZATION = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
MIX = dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])
AUGMENTS = [
    dict(type='BatchRandomFlip', prob=0.5),
    dict(
        type='BatchRandAugment',
        policies='timm_increasing',
        num_policies=2,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[124, 116, 104], interpolation='bicubic'),
    ),
    dict(type='BatchRandomErasing', mode='rand', fill_color=[120.0, 110.0, 100.0], fill_std=50.0),
]


class Images(Dataset):
    """What a pipeline gives."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        return PackInputs()(
            dict(
                img=image,
                img_shape=(36, 40),
                img_path=f'{index}.png',
                sample_idx=index,
                gt_label=index % 3,
            )
        )


def listed():
    return default_collate([Images()[i] for i in range(6)])


def stacked():
    return stack_samples([Images()[i] for i in range(6)])


def prepare(kind, batch, training, seed=0, **options):
    options = {'num_classes': 3, **NORMALIZATION, **options}
    np.random.seed(seed), torch.manual_seed(seed)
    return kind(**options)(batch, training)


def assert_same(result, expected):
    torch.testing.assert_close(result['inputs'], expected['inputs'], rtol=0, atol=0)
    assert result['inputs'].is_contiguous()
    for sample, other in zip(result['data_samples'], expected['data_samples'], strict=True):
        assert isinstance(sample, DataSample)
        assert set(sample.all_keys()) == set(other.all_keys())
        for key, value in other.all_items():
            same = torch.equal if torch.is_tensor(value) else np.array_equal
            assert same(sample.get(key), value), key


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(to_onehot=True),
        dict(to_rgb=False),
        dict(pad_size_divisor=32, pad_value=3),
        dict(mean=None, std=None),
        dict(batch_augments=MIX),
    ],
)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('collated', [listed, stacked])
def test_without_augments_it_is_mmpretrains(options, training, collated):
    for seed in range(4):  # of Mixup and CutMix one is drawn
        expected = prepare(ClsDataPreprocessor, listed(), training, seed, **options)
        result = prepare(AugmentingClsDataPreprocessor, collated(), training, seed, **options)
        assert_same(result, expected)


def test_training_is_augmented_before_the_mixing_and_testing_is_not():
    options = dict(augments=AUGMENTS, batch_augments=MIX)
    batch = stacked()
    loaded = batch['inputs'].clone()
    plain = prepare(ClsDataPreprocessor, listed(), False, batch_augments=MIX)
    assert_same(prepare(AugmentingClsDataPreprocessor, batch, False, **options), plain)
    result = prepare(AugmentingClsDataPreprocessor, batch, True, **options)
    assert torch.equal(batch['inputs'], loaded)  # the loader's images are left as they are

    # the same by hand
    np.random.seed(0), torch.manual_seed(0)
    preprocessor = AugmentingClsDataPreprocessor(num_classes=3, **options, **NORMALIZATION)
    images = loaded.flip(1)
    for augment in preprocessor.augments:
        images = augment(images)
    images = (images - preprocessor.mean) / preprocessor.std
    scores = torch.nn.functional.one_hot(torch.arange(6) % 3)
    images, scores = preprocessor.batch_augments(images, scores)
    torch.testing.assert_close(result['inputs'], images, rtol=0, atol=0)
    for sample, score in zip(result['data_samples'], scores):
        assert torch.equal(sample.gt_score, score)


@pytest.mark.parametrize('to_rgb', [True, False])
def test_the_loaders_images_stay_and_colors_are_the_batchs(to_rgb):
    batch = stacked()
    loaded = batch['inputs'].clone()
    erase = dict(
        type='BatchRandomErasing',
        erase_prob=1.0,
        min_area_ratio=1.0,
        max_area_ratio=1.0,
        aspect_range=1.0,
        mode='const',
        fill_color=(1, 2, 3),
    )
    result = prepare(
        AugmentingClsDataPreprocessor,
        batch,
        True,
        augments=[erase],
        mean=None,
        std=None,
        to_rgb=to_rgb,
    )
    assert result['inputs'][:, :, 18, 20].unique(dim=0).tolist() == [[1, 2, 3]]
    assert torch.equal(batch['inputs'], loaded)


def test_autocast_does_not_reach_the_augmentations():
    expected = prepare(AugmentingClsDataPreprocessor, stacked(), True, augments=AUGMENTS)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = prepare(AugmentingClsDataPreprocessor, stacked(), True, augments=AUGMENTS)
    assert_same(result, expected)


def test_batches_cross_from_workers_as_they_are():
    for batch in DataLoader(Images(), 6, collate_fn=stack_samples, num_workers=1):
        assert isinstance(batch['data_samples'], StackedSamples) and len(batch['data_samples']) == 6
        assert_same(batch, listed())
    sizes = [len(pickle.dumps(batch()['data_samples'])) for batch in (stacked, listed)]
    assert sizes[0] < sizes[1] / 3


def test_mmpretrains_preprocessor_takes_them_too():
    expected = prepare(ClsDataPreprocessor, listed(), True, batch_augments=MIX)
    assert_same(prepare(ClsDataPreprocessor, stacked(), True, batch_augments=MIX), expected)


@pytest.mark.parametrize(
    'change',
    [
        lambda sample: sample.set_gt_label([0, 1]),
        lambda sample: sample.set_gt_score([0.5, 0.5, 0.0]),
        lambda sample: sample.pop('gt_label'),
    ],
)
def test_other_labels_stay_a_list(change):
    images = [Images()[i] for i in range(6)]
    change(images[2]['data_samples'])
    batch = stack_samples(images)
    assert isinstance(batch['data_samples'], list)


def test_several_labels_are_prepared_as_mmpretrain_does():
    results = []
    for kind, collate in (
        (ClsDataPreprocessor, default_collate),
        (AugmentingClsDataPreprocessor, stack_samples),
    ):
        images = [Images()[i] for i in range(6)]
        images[2]['data_samples'].set_gt_label([0, 1])
        results.append(prepare(kind, collate(images), True, to_onehot=True))
    assert_same(*results)
    assert results[0]['data_samples'][2].gt_score.tolist() == [1, 1, 0]


def test_images_without_labels_and_lists_of_images():
    """As inferencers and other loaders hand them over."""
    inputs = stacked()['inputs']
    for batch in (
        dict(inputs=inputs),
        dict(inputs=list(inputs), data_samples=stacked()['data_samples']),
    ):
        result = prepare(AugmentingClsDataPreprocessor, batch, False, augments=AUGMENTS)
        expected = prepare(ClsDataPreprocessor, dict(listed(), inputs=batch['inputs']), False)
        assert torch.equal(result['inputs'], expected['inputs'])


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(inputs=[torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]),
            r'a list with the sizes \[\(3, 4, 4\), \(3, 5, 4\)\].*make them one size',
        ),
        (dict(inputs=torch.zeros(6, 3, 4, 4)), 'take uint8 images, got torch.float32'),
        (
            dict(inputs=torch.zeros(6, 1, 4, 4, dtype=torch.uint8)),
            r'got a batch of shape \(6, 1, 4, 4',
        ),
        (dict(data_samples=[DataSample().set_gt_label([0, 1])] * 6), 'with one label each'),
    ],
)
def test_what_cannot_be_augmented_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        prepare(AugmentingClsDataPreprocessor, {**stacked(), **change}, True, augments=AUGMENTS)


def test_probabilities_need_a_number_of_classes():
    with pytest.raises(ConfigError, match='data_preprocessor has no num_classes'):
        prepare(AugmentingClsDataPreprocessor, stacked(), True, num_classes=None, to_onehot=True)


def test_it_is_a_cls_data_preprocessor():
    assert isinstance(AugmentingClsDataPreprocessor(), ClsDataPreprocessor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_gpu_gives_the_cpus_batch_and_is_not_waited_for():
    erase = dict(type='BatchRandomErasing', erase_prob=0.5, mode='const', fill_color=(1, 2, 3))
    options = dict(num_classes=3, augments=[*AUGMENTS[:2], erase], **NORMALIZATION)
    results = []
    for device in ('cpu', 'cuda'):
        preprocessor = AugmentingClsDataPreprocessor(**options).to(device)
        batch = stack_samples([Images()[i % 6] for i in range(60)])
        batch = dict(
            inputs=batch['inputs'].pin_memory(), data_samples=batch['data_samples'].pin_memory()
        )
        np.random.seed(0)
        results.append(preprocessor(batch, True))
    cpu, gpu = (result['inputs'] for result in results)
    grey_levels = (gpu.cpu() - cpu).abs() * preprocessor.std.cpu()
    assert (grey_levels < 1.1).float().mean() > 0.999 and grey_levels.mean() < 0.05

    # with the noise and the mixing, whose numbers the device draws
    options.update(augments=AUGMENTS, batch_augments=MIX)
    preprocessor = AugmentingClsDataPreprocessor(**options).to('cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(20):
            result = preprocessor(dict(batch), True)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.isfinite(result['inputs']).all()
    assert all(sample.gt_score.is_cuda for sample in result['data_samples'])
