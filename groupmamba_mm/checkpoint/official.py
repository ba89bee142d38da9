"""Names of the released checkpoints and what they are called here."""
import re
from typing import Callable, Dict, Tuple

import torch
from torch import Tensor

#: Released names (counted from 1) and ours (counted from 0), of one tensor each.
_RENAMES: Tuple[Tuple[str, Callable[[re.Match], str]], ...] = tuple(
    (re.compile(pattern), replace) for pattern, replace in (
        (r'patch_embed1\.conv\.(.+)', lambda m: f'backbone.stem.convs.{m[1]}'),
        (r'patch_embed1\.proj\.(.+)', lambda m: f'backbone.stem.convs.9.{m[1]}'),
        (r'patch_embed1\.norm\.(.+)', lambda m: f'backbone.stem.norm.{m[1]}'),
        (r'patch_embed(\d)\.proj\.(.+)',
         lambda m: f'backbone.downsamples.{int(m[1]) - 2}.convs.{m[2]}'),
        (r'patch_embed(\d)\.norm\.(.+)',
         lambda m: f'backbone.downsamples.{int(m[1]) - 2}.norm.{m[2]}'),
        (r'norm([123])\.(.+)', lambda m: f'backbone.downsamples.{int(m[1]) - 1}.pre_norm.{m[2]}'),
        (r'norm4\.(.+)', lambda m: f'backbone.summary.norm4.{m[1]}'),
        (r'block(\d)\.(\d+)\.(.+)',
         lambda m: f'backbone.stages.{int(m[1]) - 1}.{m[2]}.{_rename_in_block(m[3])}'),
        (r'post_network\.0\.(.+)', lambda m: f'backbone.summary.{_rename_in_block(m[1])}'),
        (r'head\.(.+)', lambda m: f'head.label_fc.{m[1]}'),
        (r'dist_head\.(.+)', lambda m: f'head.teacher_fc.{m[1]}'),
    ))

_IN_BLOCK = (
    ('attn.fc', 'mixer.affinity.fc'),
    ('attn.ss2d', 'mixer.ss2d'),
    ('attn.', 'mixer.'),
    ('mlp.dwconv.dwconv', 'ffn.dwconv'),
    ('mlp.', 'ffn.'),
)

#: Tensors of the four units, which are one tensor here: their name in a unit, ours, and how the
#: four are joined along the groups.
_GROUPED = {
    'in_proj.weight': ('in_proj.weight', torch.stack),
    'conv2d.weight': ('conv2d.weight', torch.cat),
    'conv2d.bias': ('conv2d.bias', torch.cat),
    'x_proj_weight': ('ssm.x_proj_weight', torch.cat),
    'dt_projs_weight': ('ssm.dt_proj_weight', torch.cat),
    'dt_projs_bias': ('ssm.dt_proj_bias', torch.cat),
    'A_logs': ('ssm.A_log', torch.stack),
    'Ds': ('ssm.D', torch.cat),
    'out_norm.weight': ('out_norm.weight', torch.cat),
    'out_norm.bias': ('out_norm.bias', torch.cat),
    'out_proj.weight': ('out_proj.weight', torch.stack),
}
_UNIT = re.compile(r'(.+\.attn)\.mamba_g([1-4])\.(.+)')


def _rename_in_block(name: str) -> str:
    for old, new in _IN_BLOCK:
        if name.startswith(old):
            return new + name[len(old):]
    return name


def rename_official(name: str) -> str:
    """Our name of a released tensor that belongs to no unit; KeyError if there is none."""
    for pattern, replace in _RENAMES:
        match = pattern.fullmatch(name)
        if match:
            return replace(match)
    raise KeyError(name)


def convert_official(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Turn a released model's tensors into those of our ``ImageClassifier``.

    Args:
        state_dict: Tensors by their released names.

    Returns:
        The tensors by our names, the four units of each mixer joined into one tensor each.

    Raises:
        ValueError: A name that the released model does not have, or a unit without its three
            sisters; the message lists them.
    """
    converted, units, unknown = {}, {}, []
    for name, tensor in state_dict.items():
        match = _UNIT.fullmatch(name)
        if match and match[3] in _GROUPED:
            units.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
            continue
        try:
            converted[rename_official(name)] = tensor
        except KeyError:
            unknown.append(name)
    unknown += [f'{mixer}.mamba_g*.{name}' for (mixer, name), found in units.items()
                if sorted(found) != [1, 2, 3, 4]]
    if unknown:
        raise ValueError('not a released GroupMamba checkpoint: keys not understood or without '
                         f'all four units: {unknown}')
    for (mixer, name), found in units.items():
        ours, join = _GROUPED[name]
        converted[rename_official(f'{mixer}.ss2d.{ours}')] = join([found[i] for i in (1, 2, 3, 4)])
    return converted
