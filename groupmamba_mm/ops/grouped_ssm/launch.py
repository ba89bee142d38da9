"""Shapes, buffers and launches of the fused scan's kernels; the only place that imports them."""
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..depthwise_conv import kernels as conv
from ..gpu import has_large_smem
from ..integers import cdiv, next_power_of_2, round_up
from ..launch import INTERPRETED, is_abstract, launch, rows_of
from ..sums import sum_parts
from . import kernels

DOT_BF16, DOT_TF32, DOT_IEEE, DOT_TF32X3 = range(4)
#: Shortest side of a product of tiles on a GPU. The interpreter has no such limit, and takes its
#: time for every element.
SHORTEST_SIDE = 4 if INTERPRETED else 16
#: Programs that keep a large GPU busy; with fewer, sequences are cut into segments, up to twice as
#: many programs (cutting costs a second pass over the tokens).
ENOUGH_PROGRAMS = 512
#: Tokens that a segment has at least.
SHORTEST_SEGMENT = 256

#: From so many weights of a projection on, padded, shared memory is scarce.
LARGE_WEIGHTS = 4096

#: Widest group that a program owns as a whole where no norm follows, forward and backward, and the
#: channels of a program in wider ones: as many as a warp has threads, each of which owns one.
WIDEST_WHOLE, WIDEST_WHOLE_BACKWARD, TILE_CHANNELS = 32, 64, 32
#: Tiles of the kernels for the projection of those, forward and backward.
PROJECT_TILE = dict(TOKENS=64, BD=64, num_warps=4)
PROJECT_BACKWARD_TILE = dict(TOKENS=32, BD=64, num_warps=2)

#: fp16's range is too small for gradients inside the kernels; the interpreter (on a CPU, for tests)
#: does not know bf16 products.
_DOT = {torch.bfloat16: DOT_TF32 if INTERPRETED else DOT_BF16, torch.float16: DOT_TF32,
        torch.float32: DOT_IEEE}

@dataclass(frozen=True)
class Scan:
    """What the kernels are told besides tensors.

    Attributes:
        height, width: The grid, H and W.
        groups: Number of groups G.
        channels: True channels d of a group.
        stored: Channels of a group as they lie in memory, dp >= d.
        dt_rank, d_state: R and N.
        directions: Of the groups, a :func:`direction_code`.
        eps: Of the LayerNorm.
        has_norm: Whether it follows.
    """
    height: int
    width: int
    groups: int
    channels: int
    stored: int
    dt_rank: int
    d_state: int
    directions: int
    eps: float
    has_norm: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def row(self) -> int:
        """Partial sums of one program: x_proj, dt_proj, A_log and four vectors."""
        return self.channels * (2 * self.dt_rank + 3 * self.d_state + 4)

    def is_split(self, backward: bool) -> bool:
        """Whether several programs share the channels of a group."""
        widest = WIDEST_WHOLE_BACKWARD if backward else WIDEST_WHOLE
        return self.stored > widest and not self.has_norm

    def block(self, backward: bool) -> int:
        """Channels of a program's tiles."""
        if self.is_split(backward):
            return TILE_CHANNELS
        return max(SHORTEST_SIDE, next_power_of_2(self.stored))

    def tiles(self, backward: bool) -> int:
        """Programs that share the channels of a group."""
        return cdiv(self.stored, self.block(backward))

    def tile(self, training: bool, backward: bool = False) -> tuple[int, int]:
        """Tokens of a chunk and warps of a program.

        Measured on an H100 (docs/speed_record.md) for groups of 16, 32, 48, 87, 112 and 184 channels.

        The chunk is the same in both passes of a training step: the backward pass reuses the
        states at the chunks' starts. A scan's rounding depends on chunk and warps: they follow from
        the shapes alone, so that results repeat bit by bit.
        """
        if INTERPRETED:
            return SHORTEST_SIDE, 1
        if self.is_split(backward):
            return 16, 1
        block = self.block(backward)
        if block <= 16:
            return 32, 2 if backward else 4 if training else 1
        if block <= 32:
            return (16, 2 if backward else 4) if training else (32, 2)
        if backward:
            # a thread has all tokens of a chunk: see _relayout_channel_per_thread
            return 16, min(32, block // 32)
        if block <= 64:
            return (16, 2) if training else (32, 2)
        if block <= 128:
            return 16, 4
        return 16, min(32, block // 64)

    def chunks(self, training: bool) -> int:
        return cdiv(self.height * self.width, self.tile(training)[0])

    def kept_row(self, training: bool) -> int:
        """What is kept of a chunk: of each token the outputs of x_proj and, in training, the norm's
        mean and inverse deviation, then the states at the chunk's start.
        """
        columns, chunk = self.dt_rank + 2 * self.d_state, self.tile(training)[0]
        if not training:
            return columns * chunk
        # rows that are aligned are copied four numbers at a time
        state = min(self.tiles(False) * self.block(False), round_up(self.channels, 16))
        return (columns + (2 if self.has_norm else 0)) * chunk + self.d_state * state

    def segments(self, batch: int, training: bool, backward: bool = False) -> tuple[int, int]:
        """Chunks of a segment, and number of segments."""
        chunks, chunk = self.chunks(training), self.tile(training)[0]
        programs = max(1, batch * self.groups * self.tiles(backward))  # an empty batch has none
        wanted = 1 if programs >= ENOUGH_PROGRAMS else cdiv(2 * ENOUGH_PROGRAMS, programs)
        most = max(1, chunks * chunk // SHORTEST_SEGMENT)
        chunks_of_segment = cdiv(chunks, min(wanted, most))
        return chunks_of_segment, cdiv(chunks, chunks_of_segment)

    def constants(self, dtype: torch.dtype, has_room: bool, training: bool,
                  backward: bool = False) -> dict:
        block, (chunk, warps) = self.block(backward), self.tile(training, backward)
        columns = max(SHORTEST_SIDE, next_power_of_2(self.dt_rank + 2 * self.d_state))
        # weights in bf16 take less of it, and the backward pass gains half of its time by keeping
        # them and by loading chunks ahead, where there is room
        is_bf16 = _DOT[dtype] == DOT_BF16
        weights = block * columns
        is_large = weights >= LARGE_WEIGHTS * (8 if backward and is_bf16 and has_room else 1)
        # chunks are loaded ahead, which takes shared memory
        if is_large or block > 256:
            stages = 1
        else:
            stages = 3 if backward and block <= 64 and weights < LARGE_WEIGHTS else 2
        # other products than these and bf16's take the weights' shared memory two or four times
        dot = DOT_TF32X3 if is_large and not is_bf16 else _DOT[dtype]
        if self.is_split(backward) and dot == DOT_IEEE:
            dot = DOT_TF32X3  # a warp has no registers for products without tensor cores
        constants = dict(
            G=self.groups, D_IN=self.channels, DP=self.stored, R=self.dt_rank, N=self.d_state,
            BD=block, BP=columns, BN=next_power_of_2(self.d_state), CHUNK=chunk,
            HAS_NORM=self.has_norm, SAVED_STRIDE=self.kept_row(training), STAGES=stages, DOT=dot,
            RELOAD_WEIGHTS=is_large, NUM_CHANNEL_BLOCKS=self.tiles(backward), num_warps=warps)
        if backward:
            constants['ROW'] = self.row
        if warps == 4 and block <= 128 and self.d_state == 1 and not backward:
            # four programs on a multiprocessor: from 32 channels on a fifth to a third faster
            constants['maxnreg'] = 128
        return constants


@functools.lru_cache(maxsize=4096)
def _constants(scan: Scan, dtype: torch.dtype, has_room: bool, training: bool,
               backward: bool = False) -> dict:
    """:meth:`Scan.constants`, remembered."""
    return scan.constants(dtype, has_room, training, backward)


@functools.lru_cache(maxsize=4096)
def scan_of(height: int, width: int, groups: int, channels: int, stored: int, dt_rank: int,
            d_state: int, directions: int, eps: float, has_norm: bool) -> Scan:
    """A :class:`Scan`, remembered."""
    return Scan(height, width, groups, channels, stored, dt_rank, d_state, directions, eps,
                has_norm)


def split_gate(xz: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    """x and z, channels side by side: tokens from PyTorch's convolutions may lie otherwise."""
    xz, _ = rows_of(xz)
    if not gated:
        return xz, None
    half = xz.shape[-1] // 2
    return xz[..., :half], xz[..., half:]


def ssm_forward(scan: Scan, xz: Tensor, gated: bool, parameters: tuple[Tensor | None, ...],
                taps: Tensor | None, conv_bias: Tensor | None, causal: bool,
                keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolution, scan, norm and gate of :func:`groupmamba_mm.ops.grouped_ssm`.

    A causal convolution's output is kept: to make it again, as that of one on the grid, took 2 % of
    a training step of the paper's small.

    Args:
        scan: Shapes and directions.
        xz: (B, L, 2 * G * dp), or (B, L, G * dp) without a gate.
        gated: Whether it has a z.
        parameters: x_proj, dt_proj, dt_bias, A_log, D, norm_weight and norm_bias, the last two or
            None.
        taps: (K, G * d) of the convolution, or None; see :func:`by_tap`.
        conv_bias: (G * d,).
        causal: Whether it runs along the scan, not on the grid.
        keep: Whether for a backward pass.

    Returns:
        y (B, L, G * dp), and what :func:`ssm_backward` needs: what is kept of the chunks, and the
        causal convolution's output, each or None.
    """
    x, z = split_gate(xz, gated)
    if taps is not None:
        x = _convolve(scan, x, taps, conv_bias, causal)
    y, kept = scan_forward(scan, x, z, *parameters, keep)
    return y, kept, x if keep and causal else None


def ssm_backward(scan: Scan, grad_y: Tensor, kept: Tensor, u: Tensor | None, xz: Tensor,
                 gated: bool, parameters: tuple[Tensor | None, ...], taps: Tensor | None,
                 conv_bias: Tensor | None, causal: bool, rows: Tensor | None = None,
                 dweight: Tensor | None = None, dbias: Tensor | None = None
                 ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`ssm_forward`.

    Args:
        rows, dweight, dbias: Where to write these, contiguous fp32; None for new tensors.

    Returns:
        Those of xz; of the parameters as one (G, row), see :func:`scan_backward`; of the
        convolution's weight (G * d, K) and bias, or None.
    """
    raw, z = split_gate(xz, gated)
    grad_xz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    grad_raw, grad_z = split_gate(grad_xz, gated)
    x = raw
    if taps is not None:
        x = u if causal else _convolve(scan, raw, taps, conv_bias, False)
    grad_x = grad_raw if taps is None else torch.empty_like(x)
    rows = scan_backward(scan, grad_y, kept, x, z, *parameters, grad_x, grad_z, rows)
    if taps is None:
        return grad_xz, rows, None, None
    out = dict(dx=grad_raw, dweight=dweight, dbias=dbias)
    if causal:
        _, dweight, dbias = conv.causal_conv_backward(
            raw, grad_x, taps, conv_bias, scan.grid, scan.directions, scan.groups,
            **out)
    else:
        _, dweight, dbias, _ = conv.grid_conv_backward(raw, grad_x, taps, conv_bias, scan.grid,
                                                       'silu', scan.groups, **out)
    return grad_xz, rows, dweight, dbias


def _convolve(scan: Scan, x: Tensor, taps: Tensor, bias: Tensor, causal: bool) -> Tensor:
    if causal:
        return conv.causal_conv_forward(x, taps, bias, scan.grid, scan.directions,
                                        scan.groups)
    return conv.grid_conv_forward(x, taps, bias, scan.grid, 'silu', scan.groups)


def scan_forward(scan: Scan, x: Tensor, z: Tensor | None, x_proj: Tensor, dt_proj: Tensor,
                 dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Tensor | None,
                 norm_bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Run the scan.

    Args:
        scan: Shapes and directions.
        x: (B, L, G * dp), zero in padded channels.
        z: The gate before SiLU, like ``x``, or None.
        x_proj, dt_proj, dt_bias, A_log, D: As in ``GroupedSSM``.
        norm_weight, norm_bias: (G * d,) or None, as the scan's ``has_norm`` says.
        keep: Whether what the backward pass reuses is written.

    Returns:
        y (B, L, G * dp) in the dtype of ``x``, and what is kept, (B, G, chunks, kept_row) fp32, or
        None.
    """
    batch, length, _ = x.shape
    y = torch.empty(batch, length, scan.groups * scan.stored, dtype=x.dtype, device=x.device)
    chunks = scan.chunks(keep)
    # split groups read there what is projected before
    kept = None
    if keep or scan.is_split(backward=False):
        kept = torch.empty(batch, scan.groups, chunks, scan.kept_row(keep), dtype=torch.float32,
                           device=x.device)
    if is_abstract(x):
        return y, kept if keep else None
    chunks_of_segment, segments = scan.segments(batch, keep)
    constants = _constants(scan, x.dtype, has_large_smem(x.device), keep)
    sums, ends = _segment_buffers(scan, batch, segments, x.device)
    x, x_token = rows_of(x)
    gate, gate_token = (x, x_token) if z is None else rows_of(z)
    norm = (D, D) if norm_weight is None else (norm_weight, norm_bias)
    buffer = _nothing(x.device) if kept is None else kept
    programs = batch * scan.groups * constants['NUM_CHANNEL_BLOCKS']

    def run(summary_pass: bool) -> None:
        launch(kernels.scan_forward_kernel, (programs, segments), x, gate, y, x_proj, dt_proj,
               dt_bias, A_log, D, *norm, buffer, sums, ends, length, scan.height, scan.width,
               scan.directions, chunks, chunks_of_segment, segments, scan.eps, X_TOKEN=x_token, Z_TOKEN=gate_token, HAS_GATE=z is not None,
               KEEP=keep and not summary_pass, SUMMARY_PASS=summary_pass, **constants)

    if scan.is_split(backward=False):
        tiles = cdiv(chunks * constants['CHUNK'], PROJECT_TILE['TOKENS'])
        launch(kernels.project_kernel, (batch * scan.groups, tiles), x, x_proj, kept, length,
               scan.height, scan.width, scan.directions, chunks, X_TOKEN=x_token,
               **_of_projection(constants, 'SAVED_STRIDE'), **PROJECT_TILE)
    if segments > 1:
        run(summary_pass=True)
    run(summary_pass=False)
    return y, kept if keep else None


def scan_backward(scan: Scan, grad_y: Tensor, kept: Tensor, x: Tensor, z: Tensor | None,
                  x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
                  norm_weight: Tensor | None, norm_bias: Tensor | None, grad_x: Tensor,
                  grad_z: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """The gradients: of ``x`` and ``z`` into the given tensors, of the parameters as one (G, row).

    A row has the sums for x_proj (P, d), dt_proj (d, R), A_log (d, N), dt_bias, D, norm_weight and
    norm_bias (d each). Sums run in a fixed order: they repeat bit by bit. ``rows`` is where to
    write them, None for a new tensor.
    """
    batch, length, _ = x.shape
    if is_abstract(x):
        return torch.empty(scan.groups, scan.row, dtype=torch.float32,
                           device=x.device) if rows is None else rows
    chunks = scan.chunks(True)
    chunks_of_segment, segments = scan.segments(batch, True, backward=True)
    sums, ends = _segment_buffers(scan, batch, segments, x.device)
    constants = _constants(scan, x.dtype, has_large_smem(x.device), True, backward=True)
    partial = torch.empty(batch * segments, scan.groups, scan.row, dtype=torch.float32,
                          device=x.device)
    grad_low = _nothing(x.device)
    if scan.is_split(backward=True):
        grad_low = torch.empty(batch, scan.groups, scan.tiles(backward=True),
                               scan.dt_rank + 2 * scan.d_state, chunks * constants['CHUNK'],
                               dtype=torch.float32, device=x.device)
    (x, x_token), (grad_y, grad_y_token) = rows_of(x), rows_of(grad_y)
    gate, grad_gate = (x, grad_x) if z is None else (z, grad_z)
    (gate, gate_token), (_, grad_x_token) = rows_of(gate), rows_of(grad_x)
    norm = (D, D) if norm_weight is None else (norm_weight, norm_bias)
    programs = batch * scan.groups * constants['NUM_CHANNEL_BLOCKS']

    def run(summary_pass: bool) -> None:
        launch(kernels.scan_backward_kernel, (programs, segments), x, gate, grad_y, grad_x,
               grad_gate, x_proj, dt_proj, dt_bias, A_log, D, *norm, kept, sums, ends, partial,
               grad_low, length, scan.height, scan.width, scan.directions, chunks,
               chunks_of_segment, segments, scan.eps, X_TOKEN=x_token,
               Z_TOKEN=gate_token, GRAD_Y_TOKEN=grad_y_token, GRAD_X_TOKEN=grad_x_token,
               GRAD_Z_TOKEN=rows_of(grad_gate)[1], HAS_GATE=z is not None,
               SUMMARY_PASS=summary_pass, **constants)

    if segments > 1:
        run(summary_pass=True)
    run(summary_pass=False)
    if scan.is_split(backward=True):
        tiles = cdiv(scan.stored, PROJECT_BACKWARD_TILE['BD'])
        launch(kernels.project_backward_kernel, (batch * scan.groups * tiles, segments), x, grad_x,
               x_proj, sum_parts(grad_low, dim=2), partial, length, scan.height, scan.width,
               scan.directions, chunks, chunks_of_segment, segments, X_TOKEN=x_token,
               GRAD_X_TOKEN=grad_x_token, **_of_projection(constants, 'ROW'),
               **PROJECT_BACKWARD_TILE)
    return sum_parts(partial, out=rows)


def _of_projection(constants: dict, *names: str) -> dict:
    """Those of the scan's constants that the kernels for split groups' projection take, too."""
    names = ('G', 'D_IN', 'DP', 'R', 'N', 'BP', 'CHUNK', 'DOT', *names)
    return {name: constants[name] for name in names}


def _nothing(device: torch.device) -> Tensor:
    """For pointers that are not followed."""
    return torch.empty(0, dtype=torch.float32, device=device)


def _segment_buffers(scan: Scan, batch: int, segments: int,
                     device: torch.device) -> tuple[Tensor, Tensor]:
    """What a segment does to a state: sum of dt, (B, G, S, d), and its end, (B, G, S, N, d)."""
    if segments == 1:
        return _nothing(device), _nothing(device)
    shape = (batch, scan.groups, segments)
    return (torch.empty(*shape, scan.channels, dtype=torch.float32, device=device),
            torch.empty(*shape, scan.d_state, scan.channels, dtype=torch.float32, device=device))
