"""Classifiers in one line: the same numbers as mmpretrain's, weights of any origin, the Hub."""

import json

import pytest
import torch

import groupmamba_mm
from groupmamba_mm import GroupMamba, GroupMambaClassifier, create_model
from groupmamba_mm.checkpoint import CheckpointError, revert_to_official
from groupmamba_mm.models.pretrained import load_pretrained
from tests.conftest import SMALL, RunsCode, randomize

IMAGE = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def small(family, **options):
    return randomize(create_model(SMALL[family], **options)).eval()


@pytest.mark.parametrize('size', ['tiny', 'official-tiny'])
def test_logits_are_those_of_mmpretrains_classifier(size, tmp_path):
    pytest.importorskip('mmpretrain')
    from groupmamba_mm.analysis.building import build_model

    cfg = groupmamba_mm.get_config(f'groupmamba-{size}_8xb128_in1k')
    theirs = randomize(build_model(cfg)).eval()
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / 'epoch_1.pth')
    ours = create_model(size, pretrained=tmp_path / 'epoch_1.pth').eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGE), theirs(IMAGE, mode='tensor'))


def test_released_files_load_directly(tmp_path):
    model = small('official', num_classes=7)
    released = revert_to_official(model.state_dict())
    torch.save(released, tmp_path / 'flat.pth')
    torch.save(
        dict(
            model={k: torch.zeros_like(v) for k, v in released.items()},
            model_ema={f'module.{k}': v for k, v in released.items()},
            epoch=3,
        ),
        tmp_path / 'training.pth',
    )
    for name in ('flat.pth', 'training.pth'):
        loaded = create_model(SMALL['official'], tmp_path / name, num_classes=7).eval()
        torch.testing.assert_close(loaded(IMAGE), model(IMAGE))
    released.popitem()
    torch.save(released, tmp_path / 'short.pth')
    with pytest.raises(CheckpointError, match='nothing was loaded'):
        create_model(SMALL['official'], tmp_path / 'short.pth', num_classes=7)


def in_parts(state, folder):
    """A checkpoint in several files, as huggingface_hub writes it."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(state, folder, max_shard_size=20_000)
    assert len(list(folder.glob('*.safetensors'))) > 2
    return folder


#: Each kind of checkpoint, from a model's tensors and others that must not be taken.
KINDS = {
    'OpenMMLab': lambda state, raw: dict(state_dict=state, ema_state_dict=raw, meta={}),
    'bare': lambda state, raw: state,
    'timm': lambda state, raw: dict(state_dict=state, arch='groupmamba_tiny', epoch=3),
    'timm with averages': lambda state, raw: dict(state_dict=raw, state_dict_ema=state),
    'DDP': lambda state, raw: dict(model={f'module.{k}': v for k, v in state.items()}),
    'averages of DDP': lambda state, raw: dict(
        model=raw, model_ema={f'module.{k}': v for k, v in state.items()}
    ),
    'DDP twice': lambda state, raw: {f'module.module.{k}': v for k, v in state.items()},
}


@pytest.mark.parametrize('kind', [*KINDS, 'safetensors', 'several files'])
def test_every_kind_of_checkpoint_gives_the_same_model_and_report(kind, tmp_path):
    model = small('paper', num_classes=5)
    state = model.state_dict()
    raw = {key: torch.zeros_like(value) for key, value in state.items()}
    source = tmp_path / 'a.pth'
    if kind == 'safetensors':
        from safetensors.torch import save_file

        source = tmp_path / 'a.safetensors'
        save_file(state, source)
    elif kind == 'several files':
        source = in_parts(state, tmp_path)
    else:
        torch.save(KINDS[kind](state, raw), source)
    other = create_model(SMALL['paper'], num_classes=5)
    report = load_pretrained(other, source)
    assert str(report) == f"{len(state)} tensors match, 100% of the model's elements"
    torch.testing.assert_close(other.eval()(IMAGE), model(IMAGE))


def test_a_checkpoint_in_several_files_must_be_whole(tmp_path):
    in_parts(small('paper', num_classes=5).state_dict(), tmp_path)
    model = create_model(SMALL['paper'], num_classes=5)
    index = tmp_path / 'model.safetensors.index.json'
    assert load_pretrained(model, index).complete
    part = sorted(tmp_path.glob('*.safetensors'))[1]
    part.rename(tmp_path / 'elsewhere')
    with pytest.raises(CheckpointError, match=r'00002-of-.* does not exist'):
        load_pretrained(model, tmp_path)
    (tmp_path / 'elsewhere').rename(part)
    places = json.loads(index.read_text())['weight_map']
    index.write_text(json.dumps(dict(weight_map={**places, 'head.more': part.name})))
    with pytest.raises(CheckpointError, match=r'lack 1 of its tensors, head\.more'):
        load_pretrained(model, index)
    index.write_text('{}')
    with pytest.raises(CheckpointError, match='no weight_map'):
        load_pretrained(model, index)


def test_a_backbone_alone_and_a_dense_backbone(small_arch, tmp_path):
    family = small_arch['family']
    model = small(family, num_classes=5)
    torch.save(model.backbone.state_dict(), tmp_path / 'backbone.pth')
    report = load_pretrained(
        other := create_model(small_arch, num_classes=5), tmp_path / 'backbone.pth'
    )
    assert next(reason for _, reason in report.expected_missing) == (
        'the checkpoint has no classifier'
    )
    torch.testing.assert_close(other.eval().forward_features(IMAGE), model.forward_features(IMAGE))

    torch.save(model.state_dict(), tmp_path / 'classifier.pth')
    dense = create_model(
        small_arch, tmp_path / 'classifier.pth', features_only=True, out_indices=(0, 2)
    ).eval()
    assert isinstance(dense, GroupMamba)
    maps = dense(IMAGE)
    raw = model.forward_intermediates(IMAGE, indices=(0, 2), intermediates_only=True)
    for stage, found, wanted in zip((0, 2), maps, raw):
        normed = dense.out_norms[str(stage)](wanted.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, normed)


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_three_channel_weights_serve_other_images(small_arch, channels, tmp_path):
    model = small(small_arch['family'], num_classes=0)
    torch.save(model.state_dict(), tmp_path / 'rgb.pth')
    other = create_model(small_arch, tmp_path / 'rgb.pth', num_classes=0, in_chans=channels).eval()
    weight, given = (m.backbone.stem.convs[0].weight for m in (other, model))
    assert weight.shape[1] == channels
    if channels == 1:  # a grey image in all three channels
        grey = IMAGE[:, :1]
        torch.testing.assert_close(other(grey), model(grey.expand(-1, 3, -1, -1)))
    else:
        for channel in range(channels):
            torch.testing.assert_close(weight[:, channel], given[:, channel % 3] * 3 / channels)


def test_other_classes_keep_the_new_classifier(small_arch, tmp_path):
    model = small(small_arch['family'], num_classes=5)
    torch.save(model.state_dict(), tmp_path / 'five.pth')
    other = create_model(small_arch, num_classes=3)
    before = [layer.clone() for layer in other.head.state_dict().values()]
    report = load_pretrained(other, tmp_path / 'five.pth')
    assert all(torch.equal(a, b) for a, b in zip(before, other.head.state_dict().values()))
    assert '5 classes in the checkpoint, 3 in the model' in str(report)


def test_what_does_not_fit_or_runs_code_is_refused(tmp_path):
    torch.save(small('paper', num_classes=5).state_dict(), tmp_path / 'paper.pth')
    model = create_model(SMALL['official'], num_classes=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match='nothing was loaded'):
        load_pretrained(model, tmp_path / 'paper.pth')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.save(dict(model=dict(a=torch.ones(1)), b=RunsCode(tmp_path / 'ran')), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='run code'):
        load_pretrained(model, tmp_path / 'x.pth')
    assert not (tmp_path / 'ran').exists()
    (tmp_path / 'cut.safetensors').write_bytes(b'\x40\x00\x00\x00\x00\x00\x00\x00{')
    with pytest.raises(CheckpointError, match=r'cut\.safetensors is truncated or damaged'):
        load_pretrained(model, tmp_path / 'cut.safetensors')
    with pytest.raises(CheckpointError, match='does not exist'):
        load_pretrained(model, tmp_path / 'none.pth')


@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(out_indices=(0,)), ValueError, 'features_only=True'),
        (dict(pretrained=True), ValueError, 'publishes no weights'),
        (dict(global_pool='max'), ValueError, "global_pool must be one of .*got 'max'"),
        (dict(num_classes=-1), ValueError, 'num_classes'),
        (dict(patch_size=4), TypeError, 'patch_size'),
        (dict(in_channels=4), TypeError, 'in_channels'),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        create_model(SMALL['paper'], **options)
    with pytest.raises(ValueError, match='unknown arch .*official-tiny'):
        create_model('huge')


def test_saved_and_loaded_through_a_folder(small_arch, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    model = randomize(
        GroupMambaClassifier(
            small_arch, num_classes=5, num_groups=2, in_chans=4, drop_path_rate=0.1
        )
    )
    model.reset_classifier(6)
    randomize(model).eval().save_pretrained(tmp_path / 'saved')
    config = json.loads((tmp_path / 'saved/config.json').read_text())
    assert config['num_classes'] == 6 and config['num_groups'] == 2
    loaded = GroupMambaClassifier.from_pretrained(tmp_path / 'saved')
    image = torch.rand(1, 4, 32, 32)
    torch.testing.assert_close(loaded(image), model(image))
    assert loaded.config == {**model.config, 'arch': loaded.config['arch']}
    again = create_model(small_arch, tmp_path / 'saved', num_classes=6, num_groups=2, in_chans=4)
    torch.testing.assert_close(again.eval()(image), model(image))
    three = GroupMambaClassifier.from_pretrained(tmp_path / 'saved', num_classes=3)
    assert three(image).shape == (1, 3)

    (tmp_path / 'saved/config.json').unlink()
    with pytest.raises(CheckpointError, match='no config.json that names an arch'):
        GroupMambaClassifier.from_pretrained(tmp_path / 'saved')


def test_model_card_has_the_metafiles_numbers():
    with torch.device('meta'):
        card = GroupMambaClassifier('official-tiny').generate_model_card()
    assert card.data.license == 'apache-2.0'
    assert '| Top 1 Accuracy | 82.5 | paper |' in card.text
    assert '| Parameters | 23,361,917 | measured here |' in card.text
    custom = GroupMambaClassifier(SMALL['paper']).generate_model_card()
    assert 'of custom size' in custom.text and '| value |' not in custom.text


def test_pushed_is_what_is_saved(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    seen = {}

    class Repo:
        repo_id = 'me/model'

    monkeypatch.setattr(HfApi, 'create_repo', lambda self, repo_id, **kwargs: Repo)
    monkeypatch.setattr(
        HfApi,
        'upload_folder',
        lambda self, folder_path, **kwargs: (
            seen.update(
                {path.name for path in folder_path.iterdir()}
                and {path.name: path.read_bytes() for path in folder_path.iterdir()}
            )
            or 'url'
        ),
    )
    model = small('paper', num_classes=5)
    model.reset_classifier(2)
    model.push_to_hub('me/model')
    assert set(seen) == {'config.json', 'model.safetensors', 'README.md'}
    assert json.loads(seen['config.json'])['num_classes'] == 2


def test_a_repository_that_cannot_be_reached_is_told(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointError, match='nobody/nothing: there is neither such a file'):
        create_model(SMALL['paper'], 'nobody/nothing')
