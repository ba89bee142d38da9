"""Cases of the kernels' first-use check: whole blocks by kernels against the plain ones in fp64."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from groupmamba_mm.ops import tracing
from groupmamba_mm.ops.self_test import register_case

from .official_layer import OfficialBlock
from .paper_layer import ModulatedGroupMambaLayer

_DIRECTIONS = ('left-right', 'top-bottom', 'right-left', 'bottom-top')
_GRID = (9, 7)


def _case(block: Callable[..., nn.Module], channels: int, ffn_ratio: float) -> Callable:
    """Two blocks one after the other: outputs and all gradients."""

    def build(backend: str) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        blocks = nn.ModuleList(
            block(channels, (_DIRECTIONS,), ffn_ratio, 1, True, 0.0, backend) for _ in range(2)
        )
        with torch.no_grad():
            for name, parameter in blocks.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() < 2:
                    parameter.copy_(0.1 * noise + (0 if name.endswith('bias') else 1))
                else:
                    parameter.copy_(noise / parameter[0].numel() ** 0.5)
        return blocks

    def run(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, _GRID[0] * _GRID[1], channels, generator=generator)
        weight = torch.randn(x.shape, generator=generator).to(device)
        results = []
        for backend, dtype in (('triton', torch.float32), ('torch', torch.float64)):
            model, tokens = build(backend), x
            if tracing.noted() is None:
                model, tokens = model.to(device, dtype), x.to(device, dtype)
            elif backend == 'torch':
                return
            tokens = tokens.clone().requires_grad_()
            with torch.autocast(device.type, torch.bfloat16, enabled=backend == 'triton'):
                y = model[1](model[0](tokens, _GRID, False), _GRID)
            (y * weight).sum().backward()
            results.append(
                [('output', y.detach()), ('gradient of tokens', tokens.grad)]
                + [(f'gradient of {name}', p.grad) for name, p in model.named_parameters()]
            )
        for (name, got), (_, expected) in zip(*results):
            yield f'{run.__name__}, {name}', got, expected

    run.__name__ = f'{block.__name__} of {channels} channels'
    return run


# One for each set of kernels that a GPU may run; ops/blocks says at which widths.
register_case(_case(OfficialBlock, 64, 8))
register_case(_case(OfficialBlock, 348, 4))
register_case(_case(ModulatedGroupMambaLayer, 96, 8))
register_case(_case(ModulatedGroupMambaLayer, 384, 2))
