"""Triton kernels of the fused scan: projections, recurrence, skip, LayerNorm and gate in one pass.

A program owns one group of one image, or one segment of its sequence, and walks it in chunks of
``CHUNK`` tokens. Inside a chunk the recurrence is an associative scan over the tokens, between the
chunks the state is carried in registers. Directions are index arithmetic: nothing is ever
transposed or flipped in memory.

A long sequence at a small batch would leave the GPU idle, so it is cut into segments. A first pass
finds what each segment does to a state (how it decays it, and what it adds), a second one combines
this in a fixed order and walks all segments at once.

NARROW_LOW_RANK stands for narrow groups of one state and a rank of at most 2, as in the first two
stages. There the products with the projections' few columns are row sums and outer products: tensor
cores would pad them to 16 columns, and every tile for them takes a trip through shared memory.
Small tiles also leave registers for sums over the tokens that are reduced only once, at the end.

In the backward pass of wider groups a thread owns a channel and all tokens of a chunk (see
``_relayout_channel_per_thread``); sums over channels, which are expensive in this layout, are
products with ones, or are kept by the forward pass.

Without a norm only the projection to low rank, B and C and its gradient couple the channels of a
group. Wide groups are split there: NUM_CHANNEL_BLOCKS programs walk a sequence, each with BD of its
channels.
``project_kernel`` goes before them, ``project_backward_kernel`` behind the backward pass.

Names: d channels of a group, dp the same padded for aligned rows, N = ``d_state``, R = ``dt_rank``,
P = R + 2 N columns of the projection to (dt's low rank, B, C).
"""
import triton
import triton.language as tl

from ..kernel_functions import direction_of, exp, log1p_of_fraction, reciprocal, scan_position

#: None of them decides on a compiled version. Distances of tokens in memory, which a layer fixes,
#: are constants: loads are then known to be aligned.
_INTEGERS = ['L', 'H', 'W', 'directions', 'chunks', 'chunks_of_segment', 'segments']


@triton.jit
def _dot(a, b, KIND: tl.constexpr):
    """The product of two tiles: KIND 0 in bf16, 1 in TF32, 2 in fp32 proper, 3 in three of TF32."""
    if KIND == 0:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif KIND == 1:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision='tf32')
    elif KIND == 2:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision='ieee')
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision='tf32x3')


@triton.jit
def _combine(a1, b1, a2, b2):
    """h -> a h + b, the earlier tokens first."""
    return a1 * a2, b1 * a2 + b2


@triton.jit
def _combine_backward(a_right, p_right, g_right, a_left, p_left, g_left):
    """What enters from the right, q, becomes g + p q at the leftmost token, whose decay is a."""
    passed = p_left * a_right
    return a_left, passed * p_right, g_left + passed * g_right


@triton.jit
def _softplus(v):
    return tl.maximum(v, 0.) + log1p_of_fraction(exp(-tl.abs(v)))


@triton.jit
def _softplus_and_slope(v):
    """softplus(v) and its derivative sigmoid(v), from one exponential."""
    e = exp(-tl.abs(v))
    return tl.maximum(v, 0.) + log1p_of_fraction(e), tl.where(v < 0., e, 1.) * reciprocal(1. + e)


@triton.jit
def _add_pairs(a1, b1, a2, b2):
    return a1 + a2, b1 + b2


@triton.jit
def _later(a, b):
    return b


@triton.jit
def _relayout_channel_per_thread(tile):
    """The tile itself, behind a scan that does nothing but keep out the layout of a product.

    The compiler spreads the layout of a product's result over all that is computed from it. There a
    channel's tokens are in eight lanes, and scans and sums over them have to move data. Behind a
    scan, even one that does nothing, it takes the default layout, in which (with a warp for each 32
    channels) a thread owns a channel: scans and sums over tokens stay in its registers.
    """
    return tl.associative_scan(tile, 0, _later)


@triton.jit
def _row(tile, index, wanted):
    """The row of a tile at which ``index`` is ``wanted``."""
    return tl.sum(tl.where(index[:, None] == wanted, tile, 0.), 0)


@triton.jit
def _column(tile, index, n, FIRST: tl.constexpr, NARROW_LOW_RANK: tl.constexpr):
    """The column FIRST + n of a tile; if NARROW_LOW_RANK, of a tuple of columns, where n is 0."""
    if NARROW_LOW_RANK:
        return tile[FIRST]
    else:
        return tl.sum(tl.where(index[None, :] == FIRST + n, tile, 0.), 1)


@triton.jit
def _project(x_tile, x, to_low, P: tl.constexpr, NARROW_LOW_RANK: tl.constexpr, DOT: tl.constexpr,
             RELOAD_WEIGHTS: tl.constexpr):
    """The low rank, B and C of each token: a tile, or, if NARROW_LOW_RANK, a tuple of columns."""
    if NARROW_LOW_RANK:
        low = _row_sums(x, to_low, P)
    elif DOT == 0 and not RELOAD_WEIGHTS:  # bf16 tokens and fp32 weights, in two parts of bf16
        coarse = to_low.to(tl.bfloat16)
        rest = (to_low - coarse.to(tl.float32)).to(tl.bfloat16)
        low = tl.dot(x_tile, coarse, tl.dot(x_tile, rest))
    else:
        low = _dot(x_tile, to_low, DOT)
    return low


@triton.jit
def _step_size(low, to_dt, dt_bias, shape_of, R: tl.constexpr, NARROW_LOW_RANK: tl.constexpr,
               DOT: tl.constexpr, OWN_CHANNELS: tl.constexpr):
    """The step sizes before softplus, a tile of the shape of ``shape_of``.

    With OWN_CHANNELS a thread has a channel's tokens, in them and in all that is made of them.
    """
    if NARROW_LOW_RANK:
        dt_raw = tl.broadcast_to(dt_bias[None, :], shape_of.shape)
        for k in tl.static_range(R):
            dt_raw += low[k][:, None] * to_dt[k][None, :]
    else:
        FINE_DOT: tl.constexpr = DOT if DOT > 1 else 1
        # low is fp32: bf16 is too coarse for what dt is made of
        dt_raw = _dot(low, to_dt, FINE_DOT)
        if OWN_CHANNELS:
            dt_raw = _relayout_channel_per_thread(dt_raw)
        dt_raw += dt_bias[None, :]
    return dt_raw


@triton.jit
def _over_tokens(tile, NARROW_LOW_RANK: tl.constexpr):
    """The part of a sum over the tokens that is taken in every chunk: none in small tiles, which
    are added up as they are, with one sum at the end.
    """
    if NARROW_LOW_RANK:
        return tile
    else:
        return tl.sum(tile, 0)[None, :]


@triton.jit
def _sums_over_channels(a, b, first, second, oc, op, DOT: tl.constexpr, SCARCE: tl.constexpr):
    """A (CHUNK, BP) tile with the sums over the channels of two tiles in its columns first, second.

    By products with ones, unless shared memory is SCARCE: where a thread has all tokens of its
    channels, a sum over the channels is five shuffles for each token, twice as many instructions.
    """
    if DOT == 2 or SCARCE:
        sum_a, sum_b = tl.reduce((a, b), 1, _add_pairs)
        return tl.where(op[None, :] == first, sum_a[:, None],
                        tl.where(op[None, :] == second, sum_b[:, None], 0.))
    else:
        column = op[None, :] + 0 * oc[:, None]
        return (_dot(a, tl.where(column == first, 1., 0.), DOT)
                + _dot(b, tl.where(column == second, 1., 0.), DOT))


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([ROWS, COLUMNS], tl.float32), )
    return tiles


@triton.jit
def _row_sums(tile, weights, COUNT: tl.constexpr):
    """The columns of tile @ weights, a tuple."""
    sums = ()
    for k in tl.static_range(COUNT):
        sums = sums + (tl.sum(tile * weights[k][None, :], 1), )
    return sums


@triton.jit
def _add_products(sums, columns, tile, COUNT: tl.constexpr):
    """Tuple by tuple: sums + column * tile."""
    added = ()
    for k in tl.static_range(COUNT):
        added = added + (sums[k] + columns[k][:, None] * tile, )
    return added


@triton.jit
def _load_columns(x_proj_ptr, dt_proj_ptr, g, oc, D_IN: tl.constexpr, R: tl.constexpr,
                  P: tl.constexpr):
    """The weights of a few columns as tuples of vectors: to the low rank, B and C; to dt."""
    to_low = ()
    for k in tl.static_range(P):
        to_low = to_low + (_vector(x_proj_ptr + k * D_IN, g * P, oc, D_IN), )
    to_dt = ()
    for k in tl.static_range(R):
        weight = tl.load(dt_proj_ptr + (g * D_IN + oc) * R + k, mask=oc < D_IN, other=0.)
        to_dt = to_dt + (weight.to(tl.float32), )
    return to_low, to_dt


@triton.jit
def _weights_to_low(x_proj_ptr, g, oc, op, D_IN: tl.constexpr, P: tl.constexpr,
                    STAYS: tl.constexpr):
    """(BD, BP), to the low rank, B and C.

    With STAYS the compiler does not move the load, not even out of a loop without a store.
    """
    return tl.load(x_proj_ptr + g * P * D_IN + op[None, :] * D_IN + oc[:, None],
                   mask=(oc < D_IN)[:, None] & (op[None, :] < P), other=0.,
                   volatile=STAYS).to(tl.float32)


@triton.jit
def _weights_to_dt(dt_proj_ptr, g, oc, op, D_IN: tl.constexpr, R: tl.constexpr,
                   STAYS: tl.constexpr):
    """(BP, BD), from the low rank, zero in the other rows; STAYS as above."""
    return tl.load(dt_proj_ptr + g * D_IN * R + oc[None, :] * R + op[:, None],
                   mask=(oc < D_IN)[None, :] & (op[:, None] < R), other=0.,
                   volatile=STAYS).to(tl.float32)


@triton.jit
def _vector(ptr, g, oc, D_IN: tl.constexpr):
    return tl.load(ptr + g * D_IN + oc, mask=oc < D_IN, other=0.).to(tl.float32)


@triton.jit
def _matrix_A(A_log_ptr, g, oc, on, D_IN: tl.constexpr, N: tl.constexpr):
    """A = -exp(A_log), (BN, BD), zero where there is no channel or state."""
    valid = (oc < D_IN)[None, :] & (on < N)[:, None]
    A_log = tl.load(A_log_ptr + g * D_IN * N + oc[None, :] * N + on[:, None], mask=valid, other=0.)
    return tl.where(valid, -tl.exp(A_log.to(tl.float32)), 0.)


@triton.jit
def _kept_low(kept, op, ot, CHUNK: tl.constexpr, P: tl.constexpr):
    """The low rank, B and C of a chunk's tokens, (CHUNK, BP)."""
    return tl.load(kept + op[None, :] * CHUNK + ot[:, None], mask=(op < P)[None, :], other=0.)


@triton.jit
def _kept_column(kept, k, ot, CHUNK: tl.constexpr):
    """The k-th of them alone, (CHUNK,)."""
    return tl.load(kept + k * CHUNK + ot)


@triton.jit
def _states_of_chunk(n, dt, dt_x, B_n, A, h, on, ot, REVERSE: tl.constexpr,
                     CHANNEL_PER_THREAD: tl.constexpr):
    """State n of each token, (CHUNK, BD), with decay and update, from h at the chunk's start.

    CHANNEL_PER_THREAD: a thread has all tokens of its channels. Then h had better go into the first
    update: the prefixes, products of the decays, are not needed, and the compiler leaves them out.
    """
    decay = exp(dt * _row(A, on, n)[None, :])
    update = dt_x * B_n[:, None]
    if CHANNEL_PER_THREAD:
        started = tl.where(ot[:, None] == 0, update + decay * _row(h, on, n)[None, :], update)
        _, state = tl.associative_scan((decay, started), 0, _combine)
    else:
        prefix, state = tl.associative_scan((decay, update), 0, _combine, reverse=REVERSE)
        state += prefix * _row(h, on, n)[None, :]
    return decay, update, state


@triton.jit
def _place(NUM_CHANNEL_BLOCKS: tl.constexpr):
    """Group of an image, tile of its channels, and segment of this program.

    Tiles run side by side: where one ends and the next begins, both read and write parts of the
    same sector of memory, which has to be in the cache still.
    """
    program = tl.program_id(0)
    return program // NUM_CHANNEL_BLOCKS, program % NUM_CHANNEL_BLOCKS, tl.program_id(1)


@triton.jit(do_not_specialize=_INTEGERS)
def scan_forward_kernel(
        x_ptr, z_ptr, y_ptr, x_proj_ptr, dt_proj_ptr, dt_bias_ptr, A_log_ptr, D_ptr, norm_w_ptr,
        norm_b_ptr, kept_ptr, sums_ptr, ends_ptr,
        L, H, W, directions, chunks, chunks_of_segment, segments, eps,
        X_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr,
        G: tl.constexpr, D_IN: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
        BD: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
        HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr, KEEP: tl.constexpr,
        SAVED_STRIDE: tl.constexpr, SUMMARY_PASS: tl.constexpr, STAGES: tl.constexpr,
        DOT: tl.constexpr, RELOAD_WEIGHTS: tl.constexpr,
        NUM_CHANNEL_BLOCKS: tl.constexpr):
    """One segment of one group of one image; with SUMMARY_PASS what the segment does to a state."""
    P: tl.constexpr = R + 2 * N
    NARROW_LOW_RANK: tl.constexpr = N == 1 and R <= 2 and BD <= 32 and NUM_CHANNEL_BLOCKS == 1
    CHANNEL_PER_THREAD: tl.constexpr = NUM_CHANNEL_BLOCKS > 1
    program, tile, segment = _place(NUM_CHANNEL_BLOCKS)
    b, g = (program // G).to(tl.int64), program % G
    oc, op, on, ot = tl.arange(0, BD), tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, CHUNK)
    if NUM_CHANNEL_BLOCKS > 1:
        oc += tile * BD
    is_channel, is_stored = oc < D_IN, oc < DP
    if NARROW_LOW_RANK:
        to_low, to_dt = _load_columns(x_proj_ptr, dt_proj_ptr, g, oc, D_IN, R, P)
    elif not RELOAD_WEIGHTS:
        if NUM_CHANNEL_BLOCKS == 1:
            to_low = _weights_to_low(x_proj_ptr, g, oc, op, D_IN, P, False)
        to_dt = _weights_to_dt(dt_proj_ptr, g, oc, op, D_IN, R, False)
    dt_bias = _vector(dt_bias_ptr, g, oc, D_IN)
    A = _matrix_A(A_log_ptr, g, oc, on, D_IN, N)
    skip = _vector(D_ptr, g, oc, D_IN)
    if HAS_NORM:
        norm_w, norm_b = _vector(norm_w_ptr, g, oc, D_IN), _vector(norm_b_ptr, g, oc, D_IN)
    column, reverse, mirrored = direction_of(directions, g)
    is_state = is_channel[None, :] & (on < N)[:, None]
    in_state = on[:, None] * D_IN + oc[None, :]
    # in what is kept of a chunk: the states' first element and the length of their rows
    FIRST_STATE: tl.constexpr = (P + 2 * HAS_NORM) * CHUNK
    STATE_ROW: tl.constexpr = (SAVED_STRIDE - FIRST_STATE) // N

    h = tl.zeros([BN, BD], tl.float32)
    dt_sum = tl.zeros([BD], tl.float32)
    if not SUMMARY_PASS:
        for before in range(0, segment):
            at = (program * segments + before).to(tl.int64)
            total = tl.load(sums_ptr + at * D_IN + oc, mask=is_channel, other=0.)
            end = tl.load(ends_ptr + at * N * D_IN + in_state, mask=is_state, other=0.)
            h = exp(A * total[None, :]) * h + end

    first = segment * chunks_of_segment
    in_group = g * DP + oc[None, :]
    behind = tl.minimum(first + chunks_of_segment, chunks)
    for chunk in tl.range(first, behind, num_stages=STAGES):
        kept = kept_ptr + (program * chunks + chunk).to(tl.int64) * SAVED_STRIDE
        if KEEP:
            tl.store(kept + FIRST_STATE + on[:, None] * STATE_ROW + oc[None, :], h,
                     mask=(on < N)[:, None] & (oc < STATE_ROW)[None, :])
        t = chunk * CHUNK + ot
        is_token = t < L
        position = scan_position(t, L, H, W, column, reverse, mirrored)
        valid = is_token[:, None] & is_stored[None, :]
        if RELOAD_WEIGHTS:  # in shared memory for one product at a time, not all the while
            if NUM_CHANNEL_BLOCKS == 1:
                to_low = _weights_to_low(x_proj_ptr, g, oc, op, D_IN, P, SUMMARY_PASS)
            to_dt = _weights_to_dt(dt_proj_ptr, g, oc, op, D_IN, R, SUMMARY_PASS)
        x_tile = tl.load(x_ptr + b * L * X_TOKEN + position[:, None] * X_TOKEN + in_group,
                         mask=valid, other=0.)
        x = x_tile.to(tl.float32)
        if NUM_CHANNEL_BLOCKS > 1:
            low = _kept_low(kept, op, ot, CHUNK, P)
            B_n, C_n = _kept_column(kept, R, ot, CHUNK), _kept_column(kept, R + N, ot, CHUNK)
        else:
            low = _project(x_tile, x, to_low, P, NARROW_LOW_RANK, DOT, RELOAD_WEIGHTS)
            if KEEP:
                if NARROW_LOW_RANK:
                    for k in tl.static_range(P):
                        tl.store(kept + k * CHUNK + ot, low[k])
                else:
                    tl.store(kept + op[None, :] * CHUNK + ot[:, None], low, mask=(op < P)[None, :])
        # the norm's sums over channels cost more there than the scan gains
        dt = _softplus(_step_size(low, to_dt, dt_bias, x, R, NARROW_LOW_RANK, DOT, not HAS_NORM))
        dt_x = dt * x
        if SUMMARY_PASS:
            dt_sum += tl.sum(dt, 0)
        else:
            y = skip[None, :] * x
        for n in range(N):  # not unrolled: 16 states would take minutes to compile
            if NUM_CHANNEL_BLOCKS == 1:
                B_n = _column(low, op, n, R, NARROW_LOW_RANK)
            elif N > 1:
                B_n = _kept_column(kept, R + n, ot, CHUNK)
                C_n = _kept_column(kept, R + N + n, ot, CHUNK)
            _, _, state = _states_of_chunk(n, dt, dt_x, B_n, A, h, on, ot, False,
                                           CHANNEL_PER_THREAD)
            h = tl.where(on[:, None] == n, _row(state, ot, CHUNK - 1)[None, :], h)
            if not SUMMARY_PASS:
                if NUM_CHANNEL_BLOCKS == 1:
                    C_n = _column(low, op, n, R + N, NARROW_LOW_RANK)
                y += state * C_n[:, None]
        if not SUMMARY_PASS:
            if HAS_NORM:
                mean = tl.sum(y, 1) * (1. / D_IN)
                centred = tl.where(is_channel[None, :], y - mean[:, None], 0.)
                inverse_std = tl.rsqrt(tl.sum(centred * centred, 1) * (1. / D_IN) + eps)
                y = centred * inverse_std[:, None] * norm_w[None, :] + norm_b[None, :]
                if KEEP:
                    tl.store(kept + P * CHUNK + ot, mean)
                    tl.store(kept + (P + 1) * CHUNK + ot, inverse_std)
            if HAS_GATE:
                z = tl.load(z_ptr + b * L * Z_TOKEN + position[:, None] * Z_TOKEN + in_group,
                            mask=valid, other=0.).to(tl.float32)
                y = y * z * reciprocal(1. + exp(-z))
            tl.store(y_ptr + b * L * (G * DP) + position[:, None] * (G * DP) + in_group,
                     y.to(y_ptr.dtype.element_ty), mask=valid)
    if SUMMARY_PASS:
        at = (program * segments + segment).to(tl.int64)
        tl.store(sums_ptr + at * D_IN + oc, dt_sum, mask=is_channel)
        tl.store(ends_ptr + at * N * D_IN + in_state, h, mask=is_state)


@triton.jit(do_not_specialize=_INTEGERS)
def scan_backward_kernel(
        x_ptr, z_ptr, grad_y_ptr, grad_x_ptr, grad_z_ptr, x_proj_ptr, dt_proj_ptr, dt_bias_ptr,
        A_log_ptr, D_ptr, norm_w_ptr, norm_b_ptr, kept_ptr, sums_ptr, ends_ptr, partial_ptr,
        grad_low_ptr,
        L, H, W, directions, chunks, chunks_of_segment, segments, eps,
        X_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr, GRAD_Y_TOKEN: tl.constexpr,
        GRAD_X_TOKEN: tl.constexpr, GRAD_Z_TOKEN: tl.constexpr,
        G: tl.constexpr, D_IN: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
        BD: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
        HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr, SUMMARY_PASS: tl.constexpr,
        SAVED_STRIDE: tl.constexpr, ROW: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
        RELOAD_WEIGHTS: tl.constexpr, NUM_CHANNEL_BLOCKS: tl.constexpr):
    """The gradients of one segment, its chunks from the last to the first.

    The states are computed again from those that the forward pass kept at the chunks' starts; what
    it kept of each token (low rank, B, C, statistics of the norm) saves sums over channels. The
    gradient g of the state obeys g_t = C_t dy_t + a_{t+1} g_{t+1}, a recurrence from the end;
    q = a g of a chunk's first token is what is carried to the chunk before. With SUMMARY_PASS: what
    leaves the segment on its left if nothing enters on its right. A tile of a split group leaves
    its part of the gradient of low rank, B and C to ``project_backward_kernel``.
    """
    P: tl.constexpr = R + 2 * N
    FINE_DOT: tl.constexpr = DOT if DOT > 1 else 1
    NEEDS_Y: tl.constexpr = HAS_NORM or (HAS_GATE and not SUMMARY_PASS)
    NARROW_LOW_RANK: tl.constexpr = N == 1 and R <= 2 and BD <= 32 and NUM_CHANNEL_BLOCKS == 1
    CHANNEL_PER_THREAD: tl.constexpr = NUM_CHANNEL_BLOCKS > 1 or BD >= 64  # see Scan.tile
    SUM_ROWS: tl.constexpr = CHUNK if NARROW_LOW_RANK else 1
    program, tile, segment = _place(NUM_CHANNEL_BLOCKS)
    b, g = (program // G).to(tl.int64), program % G
    oc, op, on, ot = tl.arange(0, BD), tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, CHUNK)
    if NARROW_LOW_RANK:
        # here a chunk's tokens lie in its tiles from the last to the first: a reverse scan is the
        # dearer one, as it moves all its operands across the lanes, and the states' has fewer
        ot = CHUNK - 1 - ot
    if NUM_CHANNEL_BLOCKS > 1:
        oc += tile * BD
    is_channel, is_stored = oc < D_IN, oc < DP
    if NARROW_LOW_RANK:
        to_low, to_dt = _load_columns(x_proj_ptr, dt_proj_ptr, g, oc, D_IN, R, P)
    elif not RELOAD_WEIGHTS:
        if NUM_CHANNEL_BLOCKS == 1:
            to_low = _weights_to_low(x_proj_ptr, g, oc, op, D_IN, P, False)
        to_dt = _weights_to_dt(dt_proj_ptr, g, oc, op, D_IN, R, False)
    dt_bias = _vector(dt_bias_ptr, g, oc, D_IN)
    A = _matrix_A(A_log_ptr, g, oc, on, D_IN, N)
    skip = _vector(D_ptr, g, oc, D_IN)
    if HAS_NORM:
        norm_w, norm_b = _vector(norm_w_ptr, g, oc, D_IN), _vector(norm_b_ptr, g, oc, D_IN)
    column, reverse, mirrored = direction_of(directions, g)
    is_state = is_channel[None, :] & (on < N)[:, None]
    in_state = on[:, None] * D_IN + oc[None, :]
    FIRST_STATE: tl.constexpr = (P + 2 * HAS_NORM) * CHUNK
    STATE_ROW: tl.constexpr = (SAVED_STRIDE - FIRST_STATE) // N
    in_group = g * DP + oc[None, :]
    if NARROW_LOW_RANK:
        # at most four channels a thread: with the eight that it could load at once, the vectors of
        # a group and the sums over lanes would take too many registers
        in_group = tl.max_contiguous(in_group, [1, 4])
    elif STAGES == 1:
        # loaded, not copied to shared memory ahead: one channel a thread from the start, or the
        # compiler does half of the work twice, in the loads' layout and in the scans'
        in_group = tl.multiple_of(tl.max_contiguous(in_group, [1, 2]), [1, 1])
    x_ptr += b * L * X_TOKEN
    grad_y_ptr += b * L * GRAD_Y_TOKEN
    z_ptr += b * L * Z_TOKEN

    q = tl.zeros([BN, BD], tl.float32)
    if not SUMMARY_PASS:
        for i in range(0, segments - 1 - segment):
            at = (program * segments + segments - 1 - i).to(tl.int64)
            total = tl.load(sums_ptr + at * D_IN + oc, mask=is_channel, other=0.)
            end = tl.load(ends_ptr + at * N * D_IN + in_state, mask=is_state, other=0.)
            q = exp(A * total[None, :]) * q + end
    dt_sum = tl.zeros([SUM_ROWS, BD], tl.float32)
    if NARROW_LOW_RANK:
        grad_to_low, grad_to_dt = _zeros(P, CHUNK, BD), _zeros(R, CHUNK, BD)
    else:
        grad_to_low = tl.zeros([BP, BD], tl.float32)
        grad_to_dt = tl.zeros([BP, BD], tl.float32)
    grad_A = tl.zeros([CHUNK if NARROW_LOW_RANK else BN, BD], tl.float32)
    grad_bias = tl.zeros([SUM_ROWS, BD], tl.float32)
    grad_skip = tl.zeros([SUM_ROWS, BD], tl.float32)
    grad_norm_w = tl.zeros([SUM_ROWS, BD], tl.float32)
    grad_norm_b = tl.zeros([SUM_ROWS, BD], tl.float32)

    first = segment * chunks_of_segment
    behind = tl.minimum(first + chunks_of_segment, chunks)
    for i in tl.range(0, behind - first, num_stages=STAGES):
        chunk = behind - 1 - i
        if RELOAD_WEIGHTS:  # in shared memory for one product at a time, not all the while
            if NUM_CHANNEL_BLOCKS == 1:
                to_low = _weights_to_low(x_proj_ptr, g, oc, op, D_IN, P, SUMMARY_PASS)
            to_dt = _weights_to_dt(dt_proj_ptr, g, oc, op, D_IN, R, SUMMARY_PASS)
        t = chunk * CHUNK + ot
        is_token = t < L
        position = scan_position(t, L, H, W, column, reverse, mirrored)
        valid = is_token[:, None] & is_stored[None, :]
        x_tile = tl.load(x_ptr + position[:, None] * X_TOKEN + in_group, mask=valid, other=0.)
        grad_y = tl.load(grad_y_ptr + position[:, None] * GRAD_Y_TOKEN + in_group, mask=valid,
                         other=0.)
        z_tile = x_tile
        if HAS_GATE:
            z_tile = tl.load(z_ptr + position[:, None] * Z_TOKEN + in_group, mask=valid, other=0.)
        kept = kept_ptr + (program * chunks + chunk).to(tl.int64) * SAVED_STRIDE
        h = tl.load(kept + FIRST_STATE + on[:, None] * STATE_ROW + oc[None, :],
                    mask=(on < N)[:, None] & (oc < STATE_ROW)[None, :], other=0.)
        if NARROW_LOW_RANK:
            low = ()
            for k in tl.static_range(R):
                low = low + (_kept_column(kept, k, ot, CHUNK), )
        else:
            low = _kept_low(kept, op, ot, CHUNK, P)
        B_n, C_n = _kept_column(kept, R, ot, CHUNK), _kept_column(kept, R + N, ot, CHUNK)
        if HAS_NORM:
            mean = tl.load(kept + P * CHUNK + ot)
            inverse_std = tl.load(kept + (P + 1) * CHUNK + ot)[:, None]
        grad_y = grad_y.to(tl.float32)
        x = x_tile.to(tl.float32)
        dt, slope = _softplus_and_slope(
            _step_size(low, to_dt, dt_bias, x, R, NARROW_LOW_RANK, DOT, True))
        dt_x = dt * x

        if SUMMARY_PASS:
            dt_sum += _over_tokens(dt, NARROW_LOW_RANK)
        state = tl.zeros([CHUNK, BD], tl.float32)
        if NEEDS_Y:
            y = skip[None, :] * x
            for n in range(N):
                if N > 1:
                    B_n = _kept_column(kept, R + n, ot, CHUNK)
                    C_n = _kept_column(kept, R + N + n, ot, CHUNK)
                _, _, state = _states_of_chunk(n, dt, dt_x, B_n, A, h, on, ot, NARROW_LOW_RANK,
                                               CHANNEL_PER_THREAD)
                y += state * C_n[:, None]
        # back through gate and norm to the scan's own output
        if HAS_NORM:
            normed = (y - mean[:, None]) * inverse_std
            y = normed * norm_w[None, :] + norm_b[None, :]
        if HAS_GATE:
            z = z_tile.to(tl.float32)
            sigmoid = reciprocal(1. + exp(-z))
            if not SUMMARY_PASS:
                grad_z = grad_y * y * sigmoid * (1. + z * (1. - sigmoid))
                tl.store(grad_z_ptr + b * L * GRAD_Z_TOKEN + position[:, None] * GRAD_Z_TOKEN
                         + in_group, grad_z.to(grad_z_ptr.dtype.element_ty), mask=valid)
            grad_y = grad_y * z * sigmoid
        if HAS_NORM:
            if NARROW_LOW_RANK:
                grad_norm_w += grad_y * normed
                grad_norm_b += grad_y
            else:  # one reduction, so that the compiler leaves both in the scans' layout
                of_w, of_b = tl.reduce((grad_y * normed, grad_y), 0, _add_pairs)
                grad_norm_w += of_w[None, :]
                grad_norm_b += of_b[None, :]
            grad_y = grad_y * norm_w[None, :]
            total, total_normed = tl.reduce((grad_y, grad_y * normed), 1, _add_pairs)
            grad_y = inverse_std * (grad_y - (total * (1. / D_IN))[:, None]
                                    - normed * (total_normed * (1. / D_IN))[:, None])
        # all gradients below vanish with this one, and with x, whose padding is zero
        grad_y = tl.where(is_channel[None, :], grad_y, 0.)

        grad_dt = tl.zeros([CHUNK, BD], tl.float32)
        grad_dt_x = tl.zeros([CHUNK, BD], tl.float32)
        grad_low = tl.zeros([CHUNK, BP], tl.float32)
        grad_B, grad_C = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
        for n in range(N):
            A_n = _row(A, on, n)[None, :]
            if N > 1:
                B_n = _kept_column(kept, R + n, ot, CHUNK)
                C_n = _kept_column(kept, R + N + n, ot, CHUNK)
            decay, update = exp(dt * A_n), dt_x * B_n[:, None]
            flipped, grad_h = decay, grad_y * C_n[:, None]
            if not NARROW_LOW_RANK:  # in registers, which is for free
                flipped, grad_h = tl.flip(decay, 0), tl.flip(grad_h, 0)
            if CHANNEL_PER_THREAD:  # what enters goes into the last token, the state into the first
                grad_h = tl.where(ot[:, None] == 0, grad_h + _row(q, on, n)[None, :], grad_h)
                ones = tl.full([CHUNK, BD], 1., tl.float32)
                _, _, grad_h = tl.associative_scan((flipped, ones, grad_h), 0, _combine_backward)
            else:
                _, passed, grad_h = tl.associative_scan((flipped, flipped * 0. + 1., grad_h), 0,
                                                        _combine_backward)
                grad_h += passed * _row(q, on, n)[None, :]
            if not NARROW_LOW_RANK:
                grad_h = tl.flip(grad_h, 0)
            q = tl.where(on[:, None] == n, _row(decay * grad_h, ot, 0)[None, :], q)
            if not SUMMARY_PASS:
                if N > 1 or not NEEDS_Y:  # else the state of above is still at hand
                    _, _, state = _states_of_chunk(n, dt, dt_x, B_n, A, h, on, ot, NARROW_LOW_RANK,
                                                   CHANNEL_PER_THREAD)
                grad_log_decay = grad_h * (state - update)
                grad_dt += grad_log_decay * A_n
                grad_dt_x += grad_h * B_n[:, None]
                if NARROW_LOW_RANK:
                    grad_B, grad_C = tl.reduce((grad_h * dt_x, grad_y * state), 1, _add_pairs)
                    grad_A += grad_log_decay * dt
                else:
                    grad_low += _sums_over_channels(grad_h * dt_x, grad_y * state, R + n, R + N + n,
                                                    oc, op, DOT, STAGES == 1)
                    grad_A += tl.where(on[:, None] == n, tl.sum(grad_log_decay * dt, 0)[None, :],
                                       0.)
        if not SUMMARY_PASS:
            grad_raw = (grad_dt + grad_dt_x * x) * slope
            if CHANNEL_PER_THREAD:  # one reduction: see the norm's
                of_bias, of_skip = tl.reduce((grad_raw, grad_y * x), 0, _add_pairs)
                grad_bias += of_bias[None, :]
                grad_skip += of_skip[None, :]
            else:
                grad_bias += _over_tokens(grad_raw, NARROW_LOW_RANK)
                grad_skip += _over_tokens(grad_y * x, NARROW_LOW_RANK)
            grad_x = grad_y * skip[None, :] + grad_dt_x * dt
            if NARROW_LOW_RANK:
                columns_of_grad = _row_sums(grad_raw, to_dt, R) + (grad_B, grad_C)
                grad_to_dt = _add_products(grad_to_dt, low, grad_raw, R)
                grad_to_low = _add_products(grad_to_low, columns_of_grad, x, P)
                for k in tl.static_range(P):
                    grad_x += columns_of_grad[k][:, None] * to_low[k][None, :]
            else:
                grad_to_dt += _dot(tl.trans(low), grad_raw, FINE_DOT)
                grad_low += _dot(grad_raw, tl.trans(to_dt), DOT)
                if NUM_CHANNEL_BLOCKS > 1:
                    of_tile = grad_low_ptr + (program * NUM_CHANNEL_BLOCKS + tile).to(
                        tl.int64) * P * chunks * CHUNK
                    tl.store(of_tile + op[None, :] * (chunks * CHUNK) + t[:, None], grad_low,
                             mask=(op < P)[None, :])
                else:
                    grad_to_low += _dot(tl.trans(grad_low), x_tile, DOT)
                    grad_x += _relayout_channel_per_thread(_dot(grad_low, tl.trans(to_low), DOT))
            tl.store(grad_x_ptr + b * L * GRAD_X_TOKEN + position[:, None] * GRAD_X_TOKEN
                     + in_group, grad_x.to(grad_x_ptr.dtype.element_ty), mask=valid)

    if SUMMARY_PASS:
        at = (program * segments + segment).to(tl.int64)
        tl.store(sums_ptr + at * D_IN + oc, tl.sum(dt_sum, 0), mask=is_channel)
        tl.store(ends_ptr + at * N * D_IN + in_state, q, mask=is_state)
    else:
        # one row of partial sums: x_proj (P, d), dt_proj (d, R), A_log (d, N), then vectors of d
        row = partial_ptr + ((b * segments + segment) * G + g) * ROW
        if NARROW_LOW_RANK:
            for k in tl.static_range(P):
                tl.store(row + k * D_IN + oc, tl.sum(grad_to_low[k], 0), mask=is_channel)
            row += P * D_IN
            for k in tl.static_range(R):
                tl.store(row + oc * R + k, tl.sum(grad_to_dt[k], 0), mask=is_channel)
            row += R * D_IN
            grad_A = tl.sum(grad_A, 0)[None, :]
        else:
            if NUM_CHANNEL_BLOCKS == 1:
                tl.store(row + op[:, None] * D_IN + oc[None, :], grad_to_low,
                         mask=is_channel[None, :] & (op < P)[:, None])
            row += P * D_IN
            tl.store(row + oc[None, :] * R + op[:, None], grad_to_dt,
                     mask=is_channel[None, :] & (op < R)[:, None])
            row += R * D_IN
        tl.store(row + oc[None, :] * N + on[:, None], grad_A * A, mask=is_state)
        row += N * D_IN
        tl.store(row + oc, tl.sum(grad_bias, 0), mask=is_channel)
        tl.store(row + D_IN + oc, tl.sum(grad_skip, 0), mask=is_channel)
        tl.store(row + 2 * D_IN + oc, tl.sum(grad_norm_w, 0), mask=is_channel)
        tl.store(row + 3 * D_IN + oc, tl.sum(grad_norm_b, 0), mask=is_channel)


@triton.jit(do_not_specialize=_INTEGERS[:6])
def project_kernel(
        x_ptr, x_proj_ptr, kept_ptr, L, H, W, directions, chunks, X_TOKEN: tl.constexpr,
        G: tl.constexpr, D_IN: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
        BD: tl.constexpr, BP: tl.constexpr, CHUNK: tl.constexpr, SAVED_STRIDE: tl.constexpr,
        DOT: tl.constexpr, TOKENS: tl.constexpr):
    """Low rank, B and C of TOKENS tokens of one group, where the scans of its tiles read them."""
    P: tl.constexpr = R + 2 * N
    program = tl.program_id(0)
    b, g = (program // G).to(tl.int64), program % G
    op, t = tl.arange(0, BP), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column, reverse, mirrored = direction_of(directions, g)
    position = scan_position(t, L, H, W, column, reverse, mirrored)
    x_ptr += b * L * X_TOKEN + g * DP
    low = tl.zeros([TOKENS, BP], tl.float32)
    for first in range(0, D_IN, BD):
        oc = first + tl.arange(0, BD)
        to_low = _weights_to_low(x_proj_ptr, g, oc, op, D_IN, P, False)
        x_tile = tl.load(x_ptr + position[:, None] * X_TOKEN + oc[None, :],
                         mask=(t < L)[:, None] & (oc < DP)[None, :], other=0.)
        low += _project(x_tile, x_tile, to_low, P, False, DOT, False)
    kept = kept_ptr + (program * chunks + t // CHUNK).to(tl.int64) * SAVED_STRIDE + t % CHUNK
    tl.store(kept[:, None] + op[None, :] * CHUNK, low,
             mask=(t < chunks * CHUNK)[:, None] & (op < P)[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def project_backward_kernel(
        x_ptr, grad_x_ptr, x_proj_ptr, grad_low_ptr, partial_ptr, L, H, W, directions,
        chunks, chunks_of_segment, segments, X_TOKEN: tl.constexpr, GRAD_X_TOKEN: tl.constexpr,
        G: tl.constexpr, D_IN: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
        BD: tl.constexpr, BP: tl.constexpr, CHUNK: tl.constexpr, ROW: tl.constexpr,
        DOT: tl.constexpr, TOKENS: tl.constexpr):
    """One tile of one segment: add the projection's share to ``grad_x``; the gradient of x_proj."""
    P: tl.constexpr = R + 2 * N
    program, tile, segment = _place((DP + BD - 1) // BD)
    b, g = (program // G).to(tl.int64), program % G
    op, oc = tl.arange(0, BP), tile * BD + tl.arange(0, BD)
    column, reverse, mirrored = direction_of(directions, g)
    to_low = _weights_to_low(x_proj_ptr, g, oc, op, D_IN, P, False)
    x_ptr += b * L * X_TOKEN + g * DP
    grad_x_ptr += b * L * GRAD_X_TOKEN + g * DP
    grad_low_ptr += program.to(tl.int64) * P * chunks * CHUNK

    grad_to_low = tl.zeros([BP, BD], tl.float32)
    begin = segment * chunks_of_segment * CHUNK
    end = tl.minimum(begin + chunks_of_segment * CHUNK, L)
    # many programs on a multiprocessor, not tiles ahead, hide the loads: those take shared memory
    for first in tl.range(begin, end, TOKENS, num_stages=1):
        t = first + tl.arange(0, TOKENS)
        position = scan_position(t, L, H, W, column, reverse, mirrored)
        valid = (t < end)[:, None] & (oc < DP)[None, :]
        x_tile = tl.load(x_ptr + position[:, None] * X_TOKEN + oc[None, :], mask=valid, other=0.)
        at = grad_x_ptr + position[:, None] * GRAD_X_TOKEN + oc[None, :]
        grad_x = tl.load(at, mask=valid, other=0.).to(tl.float32)
        grad_low = tl.load(grad_low_ptr + op[:, None] * (chunks * CHUNK) + t[None, :],
                           mask=(op < P)[:, None] & (t < end)[None, :], other=0.)
        grad_to_low += _dot(grad_low, x_tile, DOT)
        grad_x += _dot(tl.trans(grad_low), tl.trans(to_low), DOT)
        tl.store(at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=valid)
    row = partial_ptr + ((b * segments + segment) * G + g) * ROW
    tl.store(row + op[:, None] * D_IN + oc[None, :], grad_to_low,
             mask=(oc < D_IN)[None, :] & (op < P)[:, None])
