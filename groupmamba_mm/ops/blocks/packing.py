"""Weights of a block as its kernels read them, and gradients back: one launch each way.

cuBLAS wants rows of a multiple of 8 values in the precision of the product, products of all groups
want zeros between the groups' weights, convolutions want their taps one by one. Packing anew for
each forward pass reads all weights of a model once, 0.05 ms on an H100 for 23 million, and has no
state that could be out of date: whatever changed a weight, the next pass sees it.
"""
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, round_up
from ..launch import is_abstract, launch
from ..tracing import noted

_BLOCK = 1024  # values of a program
_FIELDS = 16  # of an entry in the table that the kernels read


class Matrix(NamedTuple):
    """A parameter as a matrix, zero where there is nothing of it.

    The parameter has elements (g, p, o, i) of its groups, parts, outputs and inputs. Element
    (g, p, o, i) is in row (p * groups + g) * out_stored + o and column g * in_stored + i.

    Attributes:
        parameter: Its number in the list of parameters.
        groups, parts, outputs, inputs: How many there are.
        strides: Distances of (g, p, o, i) in the parameter, in elements.
        out_stored, in_stored: Outputs and inputs of a group with padding.
        rows, columns: Of the matrix.
        in_fp32: Whether it keeps full precision.
        has_gradient: Whether its gradient is made as such a matrix, to be gathered from there.
    """
    parameter: int
    groups: int
    parts: int
    outputs: int
    inputs: int
    strides: tuple[int, int, int, int]
    out_stored: int
    in_stored: int
    rows: int
    columns: int
    in_fp32: bool = False
    has_gradient: bool = True


def dense(parameter: int, outputs: int, inputs: int, rows: int, columns: int) -> Matrix:
    """A linear layer's weight (O, I), padded to (rows, columns)."""
    return Matrix(parameter, 1, 1, outputs, inputs, (0, 0, inputs, 1), rows, columns, rows, columns)


def vector(parameter: int, count: int, columns: int, in_fp32: bool = False) -> Matrix:
    """A bias (O,), padded to ``columns``."""
    return Matrix(parameter, 1, 1, 1, count, (0, 0, 0, 1), 1, columns, 1, columns, in_fp32, False)


def taps(parameter: int, count: int, channels: int, columns: int) -> Matrix:
    """A depthwise convolution's weight (C, 1, ...), tap by tap: (K, columns) in fp32."""
    return Matrix(parameter, 1, 1, count, channels, (0, 0, 1, count), count, columns, count,
                  columns, True, False)


def block_diagonal(parameter: int, groups: int, parts: int, outputs: int, inputs: int,
                   out_stored: int, in_stored: int, columns: int, multiple: int = 8) -> Matrix:
    """A grouped layer's weight (G, parts * O, I), with zeros between groups.

    One dense product for all groups: four times the arithmetic of a small share of the network,
    for rows that are read and written once, and aligned.
    """
    strides = (parts * outputs * inputs, outputs * inputs, inputs, 1)
    return Matrix(parameter, groups, parts, outputs, inputs, strides, out_stored, in_stored,
                  round_up(parts * groups * out_stored, multiple), columns)


class Rows(NamedTuple):
    """Where a parameter's gradient lies in rows of one group each, in fp32.

    Element (g, o, i) is at first + g * row + o * columns + i.

    Attributes:
        parameter: Its number in the list of parameters.
        groups: Number of groups G.
        first: Place of the first element.
        outputs, inputs: A group's values.
        columns: Distance of outputs.
        row: Distance of groups.
    """
    parameter: int
    groups: int
    first: int
    outputs: int
    inputs: int
    columns: int
    row: int


@triton.jit
def _field(table, entry, INDEX: tl.constexpr, FIELDS: tl.constexpr):
    return tl.load(table + entry * FIELDS + INDEX)


@triton.jit
def _pack(low, full, table, tiles, SOURCE: tl.constexpr, FIELDS: tl.constexpr,
          BLOCK: tl.constexpr):
    """One tile of one matrix. ``tiles`` says of each program which, and which tile of it."""
    program = tl.program_id(0)
    entry = tl.load(tiles + 2 * program)
    columns = _field(table, entry, 3, FIELDS)
    groups = _field(table, entry, 4, FIELDS)
    out_stored = _field(table, entry, 8, FIELDS)
    in_stored = _field(table, entry, 9, FIELDS)
    place = tl.load(tiles + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // columns, place % columns
    part, group, output = (row // out_stored) // groups, (row // out_stored) % groups, \
        row % out_stored
    exists = ((place < _field(table, entry, 2, FIELDS)) & (part < _field(table, entry, 5, FIELDS))
              & (output < _field(table, entry, 6, FIELDS))
              & (column % in_stored < _field(table, entry, 7, FIELDS))
              & (column // in_stored == group))
    source = _field(table, entry, 0, FIELDS).to(tl.pointer_type(SOURCE))
    at = (group * _field(table, entry, 10, FIELDS) + part * _field(table, entry, 11, FIELDS)
          + output * _field(table, entry, 12, FIELDS)
          + column % in_stored * _field(table, entry, 13, FIELDS))
    value = tl.load(source + at, mask=exists, other=0.).to(tl.float32)
    inside = place < _field(table, entry, 2, FIELDS)
    in_fp32 = _field(table, entry, 14, FIELDS) != 0
    target = _field(table, entry, 1, FIELDS) + place
    tl.store(low + target, value.to(low.dtype.element_ty), mask=inside & (in_fp32 == 0))
    tl.store(full + target, value, mask=inside & in_fp32)


@triton.jit
def _unpack(low, full, grads, table, tiles, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one parameter's gradient, gathered from the matrix that holds it."""
    program = tl.program_id(0)
    entry = tl.load(tiles + 2 * program)
    inputs = _field(table, entry, 7, FIELDS)
    outputs = _field(table, entry, 6, FIELDS)
    parts = _field(table, entry, 5, FIELDS)
    groups = _field(table, entry, 4, FIELDS)
    place = tl.load(tiles + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < _field(table, entry, 2, FIELDS)
    index = place // inputs
    group, part, output = index // outputs // parts, index // outputs % parts, index % outputs
    row = (part * groups + group) * _field(table, entry, 8, FIELDS) + output
    at = (_field(table, entry, 0, FIELDS) + row * _field(table, entry, 3, FIELDS)
          + group * _field(table, entry, 9, FIELDS) + place % inputs)
    in_fp32 = _field(table, entry, 14, FIELDS) != 0
    value = tl.load(low + at, mask=inside & (in_fp32 == 0), other=0.).to(tl.float32)
    value += tl.load(full + at, mask=inside & in_fp32, other=0.)
    tl.store(grads + _field(table, entry, 1, FIELDS) + place, value.to(grads.dtype.element_ty),
             mask=inside)


_SOURCES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Packing:
    """Matrices of a block's parameters in two buffers, one of each precision.

    Args:
        matrices: What is packed, and what gradients are gathered from.
        rows: Where other gradients are gathered from.
        rows_size: Elements of the buffer that holds these.
        numels: Elements of each parameter; gradients follow each other in their order.
    """

    def __init__(self, matrices: Sequence[Matrix], rows: Sequence[Rows], rows_size: int,
                 numels: Sequence[int]) -> None:
        self.matrices, self.numels = tuple(matrices), tuple(numels)
        self.sizes = [0, 0]  # of the buffers in low and in full precision
        self.offsets = []
        for m in self.matrices:
            self.offsets.append(self.sizes[m.in_fp32])
            self.sizes[m.in_fp32] += round_up(m.rows * m.columns, 64)  # each begins a cache line
        self.starts = [sum(self.numels[:i]) for i in range(len(self.numels) + 1)]
        self.total = self.starts[-1]
        self.rows = tuple(rows)
        self.rows_size = rows_size
        self._pack_entries = [
            [0, at, m.rows * m.columns, m.columns, m.groups, m.parts, m.outputs, m.inputs,
             m.out_stored, m.in_stored, *m.strides, int(m.in_fp32), 0]
            for m, at in zip(self.matrices, self.offsets)]
        self._unpack_entries = [
            [at, self.starts[m.parameter], m.groups * m.parts * m.outputs * m.inputs, m.columns,
             m.groups, m.parts, m.outputs, m.inputs, m.out_stored, m.in_stored, 0, 0, 0, 0, 0, 0]
            for m, at in zip(self.matrices, self.offsets) if m.has_gradient]
        self._unpack_entries += [
            [r.first, self.starts[r.parameter], r.groups * r.outputs * r.inputs, r.columns,
             r.groups, 1, r.outputs, r.inputs, 0, r.row, 0, 0, 0, 0, 1, 0] for r in self.rows]
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def pack(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The buffers, in ``dtype`` and in fp32, of the parameters as they are now."""
        first = parameters[0]
        low = torch.empty(self.sizes[0], dtype=dtype, device=first.device)
        full = torch.empty(self.sizes[1], dtype=torch.float32, device=first.device)
        if is_abstract(first):
            return low, full
        sources = () if noted() is not None else tuple(
            [parameters[m.parameter].data_ptr() for m in self.matrices])
        table, tiles = self._table((first.device, sources), self._pack_entries, sources)
        launch(_pack, (tiles.shape[0], ), low, full, table, tiles, SOURCE=_SOURCES[first.dtype],
               FIELDS=_FIELDS, BLOCK=_BLOCK, num_warps=4)
        return low, full

    def views(self, low: Tensor, full: Tensor) -> list[Tensor]:
        """The matrices in the buffers, one-dimensional if of one row."""
        return [
            torch.as_strided(full if m.in_fp32 else low,
                             (m.rows, m.columns) if m.rows > 1 else (m.columns, ),
                             (m.columns, 1) if m.rows > 1 else (1, ), at)
            for m, at in zip(self.matrices, self.offsets)]

    def unpack(self, low: Tensor, full: Tensor, grads: Tensor) -> None:
        """Gather the gradients of what is packed, or in rows, into their places in ``grads``.

        Args:
            low: Gradients of the matrices, as :meth:`pack` laid them out.
            full: Rows of other gradients, (G, row).
            grads: Of all parameters, one behind the other.
        """
        if is_abstract(low):
            return
        table, tiles = self._table((low.device, 'unpack'), self._unpack_entries, ())
        launch(_unpack, (tiles.shape[0], ), low, full, grads, table, tiles, FIELDS=_FIELDS,
               BLOCK=_BLOCK, num_warps=4)

    def _table(self, key: tuple, entries: list[list[int]],
               sources: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The entries and the programs' tiles on a device; made anew if a parameter moved."""
        found = self._tables.get(key)
        if found is None:
            device = key[0]
            if noted() is not None:
                return (torch.empty(1, _FIELDS, dtype=torch.int64, device=device),
                        torch.empty(1, 2, dtype=torch.int32, device=device))
            # In a thread of its own: in this one, memory may go to the pool of a CUDA graph, which
            # torch.compile takes back after its run.
            with ThreadPoolExecutor(max_workers=1) as thread:
                found = thread.submit(_make_table, entries, sources, device).result()
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            self._tables[key] = found
        return found


def _make_table(entries: list[list[int]], sources: tuple[int, ...],
                device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries, with the parameters' addresses if they are given, and tiles on a device."""
    entries = [[*(sources[i:i + 1] or entry[:1]), *entry[1:]] for i, entry in enumerate(entries)]
    tiles = [(i, tile) for i, entry in enumerate(entries)
             for tile in range(cdiv(entry[2], _BLOCK))]
    return (torch.tensor(entries, dtype=torch.int64).to(device),
            torch.tensor(tiles, dtype=torch.int32).to(device))


#: Tables kept of one kind of block: more than there are such blocks in a model.
_MOST_TABLES = 256
