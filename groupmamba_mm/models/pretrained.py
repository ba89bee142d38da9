"""Weights into whole classifiers and dense backbones, whatever wrote them."""

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.checkpoint import (
    ExpectedKeys,
    LoadReport,
    convert_official,
    load_matching,
    read_tensors,
    state_dict_of,
)
from groupmamba_mm.checkpoint.loading import CHECKPOINT_SUFFIXES, INDEX_SUFFIX
from groupmamba_mm.checkpoint.matching import without_prefix
from groupmamba_mm.checkpoint.official import pick_official_weights
from groupmamba_mm.errors import CheckpointError
from groupmamba_mm.extras import explain_missing

#: The file of a folder or repository that ``save_pretrained`` writes.
HUB_WEIGHTS = 'model.safetensors'
_HUB_PREFIX = 'hf://'
_REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')
#: A key that every released checkpoint has, and no other.
_RELEASED_KEY = 'patch_embed1.norm.weight'


def load_pretrained(model: nn.Module, source: str | Path) -> LoadReport:
    """Load weights of any origin, report what was loaded, and refuse what does not fit.

    Takes checkpoints of this project's trainings, bare state dicts, the released files (converted
    on the way), backbones alone, and what ``save_pretrained`` wrote. Weights for three channels
    serve a model of others, as in timm; a classifier of other classes stays as it was.

    Args:
        model: A :class:`groupmamba_mm.models.GroupMambaClassifier`, or a
            :class:`groupmamba_mm.GroupMamba`.
        source: A file, an ``http(s)://`` address, a folder of ``save_pretrained``, or a repository
            of the Hugging Face Hub: ``'owner/name'`` or ``'hf://owner/name'``.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: It cannot be read, would run code, or does not fill the model.
        MissingExtraError: A library that the source needs is not installed.
    """
    weights = fit_to_model(read_weights(source), model)
    missing: list[ExpectedKeys] = []
    unused: list[ExpectedKeys] = []
    if isinstance(model, GroupMamba):
        missing += model.expected_missing_keys()
        unused += model.expected_unused_keys()
        unused.append(ExpectedKeys(r'^head\.', 'the classifier, which a backbone has no place for'))
    else:
        wanted = model.state_dict()
        found = {k: v for k, v in weights.items() if k.startswith('head.')}
        if not model.num_classes:
            unused.append(ExpectedKeys(r'^head\.', 'the model has no classifier'))
        elif not found:
            missing.append(ExpectedKeys(r'^head\.', 'the checkpoint has no classifier'))
        elif any(k in wanted and wanted[k].shape[0] != v.shape[0] for k, v in found.items()):
            classes = next(iter(found.values())).shape[0]
            reason = f'{classes} classes in the checkpoint, {model.num_classes} in the model'
            weights = {k: v for k, v in weights.items() if k not in found}
            missing.append(ExpectedKeys(r'^head\.', reason))
    return load_matching(
        model,
        weights,
        source=str(source),
        min_matched_share=1.0,
        expected_missing=missing,
        expected_unused=unused,
    )


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors by the names of :class:`GroupMambaClassifier`.

    Args:
        source: See :func:`load_pretrained`.

    Returns:
        The tensors; those of a backbone alone begin with ``'backbone.'`` too.

    Raises:
        CheckpointError: It cannot be read, would run code, or is a damaged released file.
    """
    return with_our_names(read_tensors(_find(source)), str(source))


def with_our_names(checkpoint: dict[str, Any], source: str) -> dict[str, Tensor]:
    """Bring what a checkpoint holds to the names of :class:`GroupMambaClassifier`.

    Args:
        checkpoint: What a file held, or a state dict.
        source: Name of the checkpoint, for the message.

    Returns:
        The tensors.

    Raises:
        CheckpointError: A released file with a tensor too many or too few.
    """
    released, _ = pick_official_weights(checkpoint)
    if _RELEASED_KEY in released:
        try:
            return convert_official(released)
        except ValueError as error:
            raise CheckpointError(f'checkpoint {source}: {error}') from error
    weights = without_prefix(state_dict_of(checkpoint), None, source)
    if any(key.startswith('stem.') for key in weights):
        return {f'backbone.{key}': value for key, value in weights.items()}
    return weights


def fit_to_model(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring names and the first convolution to what a model has.

    Args:
        weights: Tensors by the names of :class:`GroupMambaClassifier`.
        model: See :func:`load_pretrained`.

    Returns:
        The tensors by the model's names.
    """
    if isinstance(model, GroupMamba):
        weights = {key.removeprefix('backbone.'): value for key, value in weights.items()}
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    conv = model.get_submodule(name)
    weight = weights.get(f'{name}.weight')
    if weight is not None and weight.shape[1] != conv.in_channels:
        weights = {**weights, f'{name}.weight': _for_channels(weight, conv.in_channels)}
    return weights


def _for_channels(weight: Tensor, channels: int) -> Tensor:
    """timm's rule for other numbers of channels: one gets the sum, more get the three in turn."""
    given = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(channels / given), 1, 1)[:, :channels]
    return repeated * (given / channels)


def _find(source: str | Path) -> str | Path:
    text = str(source)
    if Path(text).is_dir():
        return _weights_in(Path(text))
    is_named = text.startswith(_HUB_PREFIX) or (
        _REPOSITORY.fullmatch(text)
        and not Path(text).exists()
        and Path(text).suffix not in CHECKPOINT_SUFFIXES
    )
    return hub_file(text.removeprefix(_HUB_PREFIX)) if is_named else source


def _weights_in(folder: Path) -> Path:
    """The weights in a folder of ``save_pretrained``, or the table of several files of them."""
    index = folder / f'{HUB_WEIGHTS}{INDEX_SUFFIX}'
    return (
        index if index.is_file() and not (folder / HUB_WEIGHTS).exists() else folder / HUB_WEIGHTS
    )


def hub_file(model_id: str, **options: Any) -> Path:
    """Find the weights of a folder or of a repository, which are downloaded if need be.

    Args:
        model_id: A folder, or ``'owner/name'``.
        **options: Of :func:`huggingface_hub.hf_hub_download`.

    Returns:
        The file.

    Raises:
        CheckpointError: There is no such repository, or no weights in it.
        MissingExtraError: huggingface_hub is not installed.
    """
    if Path(model_id).is_dir():
        return _weights_in(Path(model_id))
    with explain_missing(f'the repository {model_id}'):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return Path(hf_hub_download(model_id, HUB_WEIGHTS, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f'{model_id}: there is neither such a file nor such a folder, and {HUB_WEIGHTS} of a '
            f'repository of that name could not be fetched ({type(error).__name__}: '
            f'{str(error).strip().splitlines()[0]}); check the name'
        ) from error
