"""Names and layout of the released checkpoints, and what they are called here."""

from collections.abc import Sequence

import torch
from torch import Tensor

#: Released prefix and ours. The more special one stands first, on both sides.
_MODEL_PREFIXES = [
    ('patch_embed1.proj.', 'backbone.stem.convs.9.'),
    ('patch_embed1.conv.', 'backbone.stem.convs.'),
    ('patch_embed1.norm.', 'backbone.stem.norm.'),
    ('norm4.', 'backbone.summary.norm4.'),
    ('head.', 'head.label_fc.'),
    ('dist_head.', 'head.teacher_fc.'),
]
for _stage in (1, 2, 3):  # counted from 1 there, from 0 here
    _MODEL_PREFIXES += [
        (f'patch_embed{_stage + 1}.proj.', f'backbone.downsamples.{_stage - 1}.convs.'),
        (f'patch_embed{_stage + 1}.norm.', f'backbone.downsamples.{_stage - 1}.norm.'),
        (f'norm{_stage}.', f'backbone.downsamples.{_stage - 1}.pre_norm.'),
    ]

#: Where blocks are: the number of a block, if there is one, follows.
_BLOCK_PREFIXES = [(f'block{_stage}.', f'backbone.stages.{_stage - 1}.') for _stage in (1, 2, 3, 4)]
_CLASS_BLOCK_PREFIX = ('post_network.0.', 'backbone.summary.')

#: Inside a block.
_IN_BLOCK_PREFIXES = [
    ('attn.fc1.', 'mixer.affinity.fc1.'),
    ('attn.fc2.', 'mixer.affinity.fc2.'),
    ('attn.', 'mixer.'),
    ('mlp.dwconv.dwconv.', 'ffn.dwconv.'),
    ('mlp.', 'ffn.'),
    ('norm1.', 'norm1.'),
    ('norm2.', 'norm2.'),
]

#: Tensors of a mixer's four units, which are one tensor here: their name in a unit, ours below
#: ``ss2d``, and whether the four are stacked or concatenated.
_GROUPED = [
    ('in_proj.weight', 'in_proj.weight', 'stack'),
    ('conv2d.weight', 'conv2d.weight', 'cat'),
    ('conv2d.bias', 'conv2d.bias', 'cat'),
    ('x_proj_weight', 'ssm.x_proj_weight', 'cat'),
    ('dt_projs_weight', 'ssm.dt_proj_weight', 'cat'),
    ('dt_projs_bias', 'ssm.dt_proj_bias', 'cat'),
    ('A_logs', 'ssm.A_log', 'stack'),
    ('Ds', 'ssm.D', 'cat'),
    ('out_norm.weight', 'out_norm.weight', 'cat'),
    ('out_norm.bias', 'out_norm.bias', 'cat'),
    ('out_proj.weight', 'out_proj.weight', 'stack'),
]
_NUM_UNITS = 4
_UNIT_MARK = '.attn.mamba_g'
_SS2D_MARK = '.mixer.ss2d.'


def convert_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a released model's tensors into those of our ``ImageClassifier``.

    Args:
        state_dict: Tensors by their released names.

    Returns:
        The tensors by our names, the four units of each mixer joined into one tensor each.

    Raises:
        ValueError: A name that the released model does not have, or a unit without its three
            siblings; the message lists them.
    """
    converted: dict[str, Tensor] = {}
    units: dict[tuple, dict] = {}
    unknown: list[str] = []
    joins = {theirs: (ours, how) for theirs, ours, how in _GROUPED}
    for name, tensor in state_dict.items():
        block, mark, rest = name.partition(_UNIT_MARK)
        number, _, tensor_name = rest.partition('.')
        if mark and tensor_name in joins and number in ('1', '2', '3', '4'):
            units.setdefault((block, tensor_name), {})[int(number)] = tensor
            continue
        ours = _rename(name, 0)
        if ours is None:
            unknown.append(name)
        else:
            converted[ours] = tensor
    for (block, tensor_name), found in units.items():
        prefix = _rename_block(f'{block}.', 0)
        if prefix is None or len(found) != _NUM_UNITS:
            unknown.append(f'{block}{_UNIT_MARK}*.{tensor_name}')
            continue
        ours, how = joins[tensor_name]
        join = torch.stack if how == 'stack' else torch.cat
        converted[f'{prefix[:-1]}{_SS2D_MARK}{ours}'] = join([found[i] for i in sorted(found)])
    if unknown:
        raise ValueError(
            'not a released GroupMamba checkpoint: keys not understood or without '
            f'all four units: {unknown}'
        )
    return converted


def revert_to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: the tensors of our ``ImageClassifier`` by their released names.

    Args:
        state_dict: Tensors of a classifier of the official family with four groups.

    Returns:
        The tensors by their released names, a tensor for each of the four units.

    Raises:
        ValueError: A name that the released model has no counterpart of; the message lists them.
    """
    reverted: dict[str, Tensor] = {}
    unknown: list[str] = []
    splits = {ours: (theirs, how) for theirs, ours, how in _GROUPED}
    for name, tensor in state_dict.items():
        block, mark, tensor_name = name.partition(_SS2D_MARK)
        prefix = _rename_block(f'{block}.', 1) if mark else None
        if prefix is not None and tensor_name in splits and tensor.shape[0] % _NUM_UNITS == 0:
            theirs, how = splits[tensor_name]
            parts = tensor.unbind(0) if how == 'stack' else tensor.chunk(_NUM_UNITS)
            for number, part in enumerate(parts, 1):
                # a copy: a view would be saved with its whole storage
                reverted[f'{prefix[:-1]}{_UNIT_MARK}{number}.{theirs}'] = part.clone()
            continue
        renamed = None if mark else _rename(name, 1)
        if renamed is None:
            unknown.append(name)
        else:
            reverted[renamed] = tensor
    if unknown:
        raise ValueError(
            'not a classifier of the official family: the released model has no '
            f'counterpart of {unknown}'
        )
    return reverted


def pick_official_weights(checkpoint: dict) -> tuple[dict, str]:
    """Find the weights in one of the two forms of a released checkpoint.

    Args:
        checkpoint: What :func:`groupmamba_mm.checkpoint.read_tensors` returned.

    Returns:
        The tensors by their released names, and where they were: 'model_ema' if it is there (the
        averaged weights are the ones that were evaluated), else 'model', else 'flat'.
    """
    for form in ('model_ema', 'model'):
        if isinstance(checkpoint.get(form), dict):
            weights = checkpoint[form]
            break
    else:
        form, weights = 'flat', checkpoint
    # an averaged or distributed model is saved with its wrapper's name before each key
    return {key.removeprefix('module.'): value for key, value in weights.items()}, form


def _rename(name: str, source: int) -> str | None:
    """Rename a tensor that belongs to no unit; ``source`` is 0 for released names, 1 for ours."""
    renamed = _swap_prefix(name, _MODEL_PREFIXES, source)
    return _rename_block(name, source) if renamed is None else renamed


def _rename_block(name: str, source: int) -> str | None:
    """Rename a name that begins with a block, or such a beginning alone."""
    for pair in (*_BLOCK_PREFIXES, _CLASS_BLOCK_PREFIX):
        if not name.startswith(pair[source]):
            continue
        start, rest = pair[1 - source], name[len(pair[source]) :]
        if pair is not _CLASS_BLOCK_PREFIX:
            number, _, rest = rest.partition('.')
            if not number.isdecimal():
                return None
            start += f'{number}.'
        inner = _swap_prefix(rest, _IN_BLOCK_PREFIXES, source) if rest else ''
        return None if inner is None else start + inner
    return None


def _swap_prefix(name: str, pairs: Sequence[tuple[str, str]], source: int) -> str | None:
    for pair in pairs:
        if name.startswith(pair[source]):
            return pair[1 - source] + name[len(pair[source]) :]
    return None
