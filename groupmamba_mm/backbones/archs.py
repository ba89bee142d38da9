"""The sizes of GroupMamba as data, and what makes up each of the two families."""

from dataclasses import dataclass, fields

from torch import nn

from groupmamba_mm.layers import (
    ClassBlock,
    Downsample,
    ModulatedGroupMambaLayer,
    NormedDownsample,
    OfficialBlock,
    OfficialStem,
    PaperStem,
    PoolNorm,
)


@dataclass(frozen=True)
class Family:
    """The parts in which the paper's model and the released one differ.

    Attributes:
        stem: From the image to the tokens of stage 1.
        downsample: From a stage to the next.
        block: What a stage is made of.
        summary: From the last stage's tokens to a classifier's feature vector.
        directions: The order of the four scanning directions over the groups.
    """

    stem: type[nn.Module]
    downsample: type[nn.Module]
    block: type[nn.Module]
    summary: type[nn.Module]
    directions: tuple[str, ...]


FAMILIES = {
    # Table 6, Eq. 3-9
    'paper': Family(
        stem=PaperStem,
        downsample=Downsample,
        block=ModulatedGroupMambaLayer,
        summary=PoolNorm,
        directions=('left-right', 'right-left', 'top-bottom', 'bottom-top'),
    ),
    # the layout of the published checkpoints
    'official': Family(
        stem=OfficialStem,
        downsample=NormedDownsample,
        block=OfficialBlock,
        summary=ClassBlock,
        directions=('left-right', 'top-bottom', 'right-left', 'bottom-top'),
    ),
}


@dataclass(frozen=True)
class Arch:
    """One size.

    Attributes:
        family: 'paper' or 'official'.
        stem_channels: Channels after the stem's first convolution.
        embed_dims: Channels C1..C4 of the stages.
        depths: Number of blocks of each stage.
        ffn_ratios: Hidden width of each stage's (outer) FFN over its channels.
    """

    family: str
    stem_channels: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    ffn_ratios: tuple[float, ...]


ARCHS = {
    'tiny': Arch('paper', 32, (96, 192, 368, 760), (2, 2, 9, 2), (8, 8, 2, 2)),
    'small': Arch('paper', 64, (96, 192, 384, 768), (2, 2, 20, 2), (8, 8, 2, 2)),
    'base': Arch('paper', 64, (128, 256, 496, 1012), (2, 2, 20, 2), (8, 8, 2, 2)),
    'official-tiny': Arch('official', 32, (64, 128, 348, 448), (3, 4, 9, 3), (8, 8, 4, 4)),
    'official-small': Arch('official', 64, (64, 128, 348, 512), (3, 4, 16, 3), (8, 8, 4, 4)),
    'official-base': Arch('official', 64, (96, 192, 424, 512), (3, 6, 21, 3), (8, 8, 4, 4)),
}


def resolve_arch(arch: str | dict) -> Arch:
    """Look a size up by name, or check one given as a dict.

    Args:
        arch: A name out of :data:`ARCHS`, or a dict with exactly the fields of :class:`Arch`.

    Returns:
        The size.

    Raises:
        ValueError: Unknown name, missing or unknown field, or a field with an impossible value.
        TypeError: Neither a name nor a dict.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'unknown arch {arch!r}; choose from {tuple(ARCHS)}, or give a dict '
                f'with the fields {tuple(f.name for f in fields(Arch))}'
            )
        return ARCHS[arch]
    if not isinstance(arch, dict):
        raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')
    names = {f.name for f in fields(Arch)}
    if set(arch) != names:
        raise ValueError(
            f'arch dict: missing fields {sorted(names - set(arch))}, unknown fields '
            f'{sorted(set(arch) - names)}; it takes exactly {sorted(names)}'
        )
    if arch['family'] not in FAMILIES:
        raise ValueError(
            f'arch dict: unknown family {arch["family"]!r}; choose from {tuple(FAMILIES)}'
        )
    stages = {name: tuple(arch[name]) for name in ('embed_dims', 'depths', 'ffn_ratios')}
    if len({len(values) for values in stages.values()}) != 1:
        raise ValueError(
            'arch dict: embed_dims, depths and ffn_ratios must have one value for '
            f'each stage, got {stages}'
        )
    for name, values in dict(stages, stem_channels=(arch['stem_channels'],)).items():
        whole = name != 'ffn_ratios'
        if not values or any(v <= 0 or (whole and v != int(v)) for v in values):
            raise ValueError(
                f'arch dict: {name} must be positive'
                f'{" whole numbers" if whole else ""}, got {values}'
            )
    return Arch(family=arch['family'], stem_channels=arch['stem_channels'], **stages)
