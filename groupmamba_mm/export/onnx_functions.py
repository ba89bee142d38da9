"""Parts of an exported model in ONNX's standard operators: the recurrence, and what runs faster so."""

from collections.abc import Sequence

import torch

from groupmamba_mm.extras import explain_missing
from groupmamba_mm.layers.grouped import GROUPED_LINEAR

with explain_missing('export to ONNX'):
    from onnxscript import FLOAT, graph, script
    from onnxscript import opset18 as op


@script(default_opset=op)
def recurrence(log_a: FLOAT[...], b: FLOAT[...]) -> FLOAT[...]:
    """h_t = exp(log_a_t) h_{t-1} + b_t along dim 1 of (B, L, ...), as ``recurrence`` computes it.

    The sequence is cut into about sqrt(L) chunks of sqrt(L) tokens. One ``Scan`` walks through the
    tokens of a chunk, all chunks at once, and keeps the product of the decays; a second one walks
    through the chunks and carries the states over. So there are 2 sqrt(L) short steps, and as many
    nodes for any L.
    """

    @graph()
    def token(h, decay, log_a_t, b_t):
        a_t = op.Exp(log_a_t)
        h_next = op.Add(op.Mul(h, a_t), b_t)
        decay_next = op.Mul(decay, a_t)
        h_out = op.Identity(h_next)
        decay_out = op.Identity(decay_next)
        return h_next, decay_next, h_out, decay_out

    @graph()
    def chunk(state, h_k, decay_k):
        state_next = op.Add(op.Mul(state, decay_k), h_k)
        entering = op.Identity(state)
        return state_next, entering

    full_shape = op.Shape(b)
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    zero = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    batch = op.Shape(b, start=0, end=1)
    length = op.Shape(b, start=1, end=2)
    log_a3 = op.Reshape(log_a, op.Concat(batch, length, rest, axis=0))
    b3 = op.Reshape(b, op.Concat(batch, length, rest, axis=0))
    width = op.Shape(b3, start=2, end=3)
    size = op.Cast(op.Ceil(op.Sqrt(op.Cast(length, to=1))), to=7)
    chunks = op.Div(op.Sub(op.Add(length, size), one), size)
    padded = op.Mul(chunks, size)
    # a decay of one and an input of zero after the last token
    pads = op.Concat(zero, zero, zero, zero, op.Sub(padded, length), zero, axis=0)
    by_chunk = op.Concat(batch, chunks, size, width, axis=0)
    log_a4 = op.Reshape(op.Pad(log_a3, pads), by_chunk)
    b4 = op.Reshape(op.Pad(b3, pads), by_chunk)
    h_start = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, chunks, width, axis=0))
    decay_start = op.Expand(op.Constant(value_float=1.0), op.Concat(batch, chunks, width, axis=0))
    h_end, decay_end, h, decay = op.Scan(
        h_start,
        decay_start,
        log_a4,
        b4,
        body=token,
        num_scan_inputs=2,
        scan_input_axes=[2, 2],
        scan_output_axes=[2, 2],
    )
    state_start = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, width, axis=0))
    _, entering = op.Scan(
        state_start,
        h_end,
        decay_end,
        body=chunk,
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    h = op.Add(h, op.Mul(decay, op.Unsqueeze(entering, two)))
    h = op.Reshape(h, op.Concat(batch, padded, width, axis=0))
    return op.Reshape(op.Slice(h, zero, length, one), full_shape)


@script(default_opset=op)
def softplus(x: FLOAT[...]) -> FLOAT[...]:
    """log(1 + exp(x)), which cannot overflow; onnxruntime's own operator takes twice as long."""
    one = op.Constant(value_float=1.0)
    return op.Add(op.Relu(x), op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), one)))


def einsum(equation: str, tensors: Sequence, path: None = None):
    """The linear layers of groups as MatMul, which onnxruntime runs faster than Einsum."""
    if equation != GROUPED_LINEAR:
        return op.Einsum(*tensors, equation=equation)
    x, weight = tensors
    y = op.MatMul(op.Transpose(x, perm=[0, 2, 1, 3]), op.Transpose(weight, perm=[0, 2, 1]))
    return op.Transpose(y, perm=[0, 2, 1, 3])


#: What is written for PyTorch's operators instead of the exporter's own choice.
TRANSLATIONS = {
    torch.ops.groupmamba_mm.recurrence.default: recurrence,
    torch.ops.aten.softplus.default: softplus,
    torch.ops.aten.einsum.default: einsum,
}
