"""Kernels that quantize a master weight for training: to its dense quantized weight, codes, scales and their gradient.

A program works on the complex (n, m) matrix chunk by chunk. An entry (i, j) of it is the 2x2 block of the real weight
at rows i, n + i and columns j, m + j; one block is one entry of U and one of W. What shares scales:

    tensor   all; each program takes every so-manieth chunk. A launch for each stage sums magnitudes, a row of
             ``partials`` for each program; the next launch adds the rows up, in each of its programs, and writes the
             mean down. No program waits for another. Launches go through the matrix to and fro (BACK), so that each
             begins with what the one before has left in the cache.
    row      a few rows, all columns: means and results in one launch, the weight read from device memory once.
    tile     one tile, likewise.

Sums are in float64 over float32 terms and rounded once, so that their order does not show in the means; there are no
atomics, so a result has the same bits in each run. The arithmetic is that of :mod:`fairy2i.phase_quant`, operation by
operation. Launch with ``enable_fp_fusion=False``: a fused multiply-add would round other than two operations do.

With a rotation a chunk is of whole blocks of columns: quarters are turned as they are loaded, and the results before
they are rounded and stored. Between the three lowest bits of the column and the next three, numbers go from thread to
thread; with eight columns a thread and 256 entries a warp they stay in a warp.

FAST code is for finite numbers and takes about half the instructions. Such an entry is real where |re| > |im| or
re = -im, and its sign is that of re, else of im: as the signs of p = re + im and q = re - im say, ties and all.
Programs look for what is not finite on the way, and where they find it do their work again as NaN and infinity need it.

*Block codes* are uint8 (ceil(T/2), n, m): byte s of a block has u and w of stage 2s in bits 0-1 and 2-3, and those of
stage 2s+1 in bits 4-5 and 6-7. At two stages one byte stands for four real weights.
"""

# mypy: ignore-errors
# a kernel is written in a language of its own: no types, and `a + b` to join tuples

import triton
import triton.language as tl

SCALE_MIN: tl.constexpr = tl.constexpr(1e-6)  # as in fairy2i.phase_quant


@triton.jit
def _first_chunk(first, every, rows, cols, BR: tl.constexpr, BC: tl.constexpr):
    """Return the walk of a program over chunks ``first``, ``first + every`` ... of a rectangle, and how many they are.

    A walk is the chunk's row and column, in chunks, what they go on by, and how many chunks there are down and across.
    """
    high, across = tl.cdiv(rows, BR), tl.cdiv(cols, BC)
    walk = (first // across, first % across, every // across, every % across, high, across)
    return walk, tl.cdiv(high * across - first, every)


@triton.jit
def _next_chunk(walk):
    i, j, down, right, high, across = walk
    j += right
    over = j >= across
    return i + down + over.to(tl.int32), tl.where(over, j - across, j), down, right, high, across


@triton.jit
def _place(walk, BR: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr):
    """Return the row and the column where a chunk begins; BACK counts from the other end."""
    i, j, _, _, high, across = walk
    if BACK:
        i = high - 1 - i
        j = across - 1 - j
    return i * BR, j * BC


@triton.jit
def _inside(r, c, rows, cols, BR: tl.constexpr, BC: tl.constexpr):
    """Return which entries of a chunk are in the rectangle."""
    return (tl.arange(0, BR) < rows - r)[:, None] & (tl.arange(0, BC) < cols - c)[None, :]


@triton.jit
def _steps(row_stride, col_stride, BR: tl.constexpr, BC: tl.constexpr):
    """Return how far each entry of a chunk is from the first, wide enough to address with."""
    return tl.arange(0, BR).to(tl.int64)[:, None] * row_stride + tl.arange(0, BC).to(tl.int64)[None, :] * col_stride


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    """Load, 0 outside; EVEN: nothing is outside."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, inside, 0)


@triton.jit
def _store(at, value, inside, EVEN: tl.constexpr):
    if EVEN:
        tl.store(at, value)
    else:
        tl.store(at, value, inside)


@triton.jit
def _butterflies(x, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Make of each pair of columns that differ in one bit sum and difference, for BITS bits one after the other."""
    HIGH: tl.constexpr = x.numel >> (FIRST + BITS)
    LOW: tl.constexpr = 1 << FIRST
    # these bits in front are what a thread has, and the others say which thread: so they move once
    y = tl.permute(tl.reshape(x, [HIGH, 1 << BITS, LOW]), (1, 0, 2))
    for k in tl.static_range(BITS):
        pairs = tl.reshape(y, [1 << (BITS - k - 1), 2, (HIGH * LOW) << k])
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        y = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
    return tl.reshape(tl.permute(tl.reshape(y, [1 << BITS, HIGH, LOW]), (1, 0, 2)), x.shape)


@triton.jit
def turn(x, TURNS: tl.constexpr):
    """Rotate the columns of a (rows, columns) tensor in blocks of 2^TURNS, an even power; 0: as they are."""
    if TURNS == 0:
        return x
    else:
        for k in tl.static_range(0, TURNS, 3):
            x = _butterflies(x, k, TURNS - k if TURNS - k < 3 else 3)
        return x * (1.0 / (1 << (TURNS // 2)))


@triton.jit
def _load_blocks(matrix, layout, r, c, steps, inside, EVEN: tl.constexpr, TURNS: tl.constexpr):
    """Return the quarters A11, A12, A21, A22 of a chunk, turned, as float32, 0 outside.

    ``layout``: strides, down, right.
    """
    row_stride, col_stride, down, right = layout
    at = matrix + (r.to(tl.int64) * row_stride + c.to(tl.int64) * col_stride) + steps
    a11 = turn(_load(at, inside, EVEN).to(tl.float32), TURNS)
    a12 = turn(_load(at + right, inside, EVEN).to(tl.float32), TURNS)
    a21 = turn(_load(at + down, inside, EVEN).to(tl.float32), TURNS)
    a22 = turn(_load(at + down + right, inside, EVEN).to(tl.float32), TURNS)
    return a11, a12, a21, a22


@triton.jit
def _parts(a11, a12, a21, a22):
    """Return (Re U, Im U, Re W, Im W)."""
    return (a11 + a22) * 0.5, (a21 - a12) * 0.5, (a11 - a22) * 0.5, (a12 + a21) * 0.5


# Finite numbers


@triton.jit
def _fast_parts(a11, a12, a21, a22, UNIT: tl.constexpr):
    """Return the parts, times 2 UNIT; real ones are no negative zeros."""
    return tl.fma(a11 + a22, UNIT, 0.0), (a21 - a12) * UNIT, tl.fma(a11 - a22, UNIT, 0.0), (a12 + a21) * UNIT


@triton.jit
def _fast_real(re, im):
    return (tl.abs(re) > tl.abs(im)) | (re == im * -1.0)  # `-im` would be a subtraction


@triton.jit
def _with_sign(scale, x):
    """Return the scale, positive, with the sign of x."""
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (sign | scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _fast_residual(re, im, scale_re, scale_im):
    """Return what a stage leaves over."""
    real = _fast_real(re, im)
    return tl.where(real, re - _with_sign(scale_re, re), re), tl.where(real, im, im - _with_sign(scale_im, im))


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


# All numbers


@triton.jit
def _encode(re, im):
    """Return where p = re + im and q = re - im count as positive."""
    p = re + im
    minus_q = im - re
    return tl.where(p == 0, re, p) >= 0, tl.where(minus_q == 0, p, minus_q) <= 0


@triton.jit
def _units(p_positive, q_positive):
    """Return the unit as float32 (re, im), entries in {-1, 0, 1}."""
    p = p_positive.to(tl.float32)
    q = q_positive.to(tl.float32)
    return p + q - 1, p - q


@triton.jit
def _times_unit(p_positive, real, re, im):
    """Return (re, im) times unit, part by part, as products would be: NaN where an infinite one meets a zero."""
    re_unit = tl.where(real, tl.where(p_positive, re, -re), re * 0.0)
    im_unit = tl.where(real, im * 0.0, tl.where(p_positive, im, -im))
    return re_unit, im_unit


@triton.jit
def _magnitudes(re, im, p_positive, real, inside):
    """Return value times unit, (re, im): the magnitude where the unit is on this axis, else 0; and 0 outside."""
    re, im = _times_unit(p_positive, real, re, im)
    return tl.where(inside, re, 0.0), tl.where(inside, im, 0.0)


@triton.jit
def _code(p_positive, real):
    return tl.where(real, 0, 2) + p_positive.to(tl.int32)


@triton.jit
def _code_units(code):
    p = code & 1
    return _units(p != 0, (p ^ ((code >> 1) & 1)) != 0)


@triton.jit
def _at_least_min(scale):
    return tl.where(scale < SCALE_MIN, SCALE_MIN, scale)  # keeps NaN


@triton.jit
def _mean(total, count):
    """Return total / count, float64, as a float32 scale."""
    return _at_least_min((total / tl.where(count < 1, 1.0, count)).to(tl.float32))


@triton.jit
def _load_scales(scales, groups, group, inside, STAGES: tl.constexpr, ROWS: tl.constexpr):
    """Return the scales of a group as a flat tuple, four for each stage: U re, U im, W re, W im; any dtype."""
    known = ()
    for k in tl.static_range(4 * STAGES):
        if ROWS:
            scale = tl.load(scales + k * groups + group, inside, 1.0)[:, None]
        else:
            scale = tl.load(scales + k * groups + group)
        known = known + (_at_least_min(scale.to(tl.float32)),)  # noqa: RUF005
    return known


@triton.jit
def _residual(re_u, im_u, re_w, im_w, known, STAGES: tl.constexpr):
    """Return what the first STAGES stages leave over."""
    for t in tl.static_range(STAGES):
        p_u, q_u = _encode(re_u, im_u)
        p_w, q_w = _encode(re_w, im_w)
        off_re_u, off_im_u = _times_unit(p_u, p_u == q_u, known[4 * t], known[4 * t + 1])
        off_re_w, off_im_w = _times_unit(p_w, p_w == q_w, known[4 * t + 2], known[4 * t + 3])
        re_u -= off_re_u
        im_u -= off_im_u
        re_w -= off_re_w
        im_w -= off_im_w
    return re_u, im_u, re_w, im_w


@triton.jit
def _own_sum(x, OWN: tl.constexpr, TURNS: tl.constexpr):
    """Add up OWN entries of a row, those of one thread, to take fewer registers: (BR, BC) -> (BR, BC / OWN)."""
    APART: tl.constexpr = x.shape[1] // OWN if TURNS > 0 else 1  # columns, as loads and turns leave them in a thread
    apart = tl.reshape(x, [x.shape[0], x.shape[1] // (OWN * APART), OWN, APART])
    return tl.reshape(tl.sum(apart, 2), [x.shape[0], x.shape[1] // OWN])


@triton.jit
def _group_sum(x, ROWS: tl.constexpr):
    """Add up each row, (BR, 1), or all."""
    return tl.sum(x, 1)[:, None] if ROWS else tl.sum(x)


@triton.jit
def _stage_sums(
    weight, layout, rows, cols, r_begin, c_begin, walk, count, known,
    STAGE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr, TURNS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Return the magnitudes of one stage over chunks of a rectangle, and how many entries of U and W are real.

    Each (BR, BC / OWN); the rectangle has its first entry at (r_begin, c_begin).
    """
    steps = _steps(layout[0], layout[1], BR, BC)
    sum_re_u = tl.zeros([BR, BC // OWN], tl.float64)
    sum_im_u = tl.zeros([BR, BC // OWN], tl.float64)
    sum_re_w = tl.zeros([BR, BC // OWN], tl.float64)
    sum_im_w = tl.zeros([BR, BC // OWN], tl.float64)
    real_u = tl.zeros([BR, BC // OWN], tl.int32)
    real_w = tl.zeros([BR, BC // OWN], tl.int32)
    for _ in range(count):
        r, c = _place(walk, BR, BC, BACK)
        walk = _next_chunk(walk)
        inside = _inside(r, c, rows, cols, BR, BC)
        a11, a12, a21, a22 = _load_blocks(weight, layout, r_begin + r, c_begin + c, steps, inside, False, TURNS)
        re_u, im_u, re_w, im_w = _parts(a11, a12, a21, a22)
        re_u, im_u, re_w, im_w = _residual(re_u, im_u, re_w, im_w, known, STAGE)
        p_u, q_u = _encode(re_u, im_u)
        p_w, q_w = _encode(re_w, im_w)
        size_re_u, size_im_u = _magnitudes(re_u, im_u, p_u, p_u == q_u, inside)
        size_re_w, size_im_w = _magnitudes(re_w, im_w, p_w, p_w == q_w, inside)
        sum_re_u += _own_sum(size_re_u.to(tl.float64), OWN, TURNS)
        sum_im_u += _own_sum(size_im_u.to(tl.float64), OWN, TURNS)
        sum_re_w += _own_sum(size_re_w.to(tl.float64), OWN, TURNS)
        sum_im_w += _own_sum(size_im_w.to(tl.float64), OWN, TURNS)
        real_u += _own_sum((inside & (p_u == q_u)).to(tl.int32), OWN, TURNS)
        real_w += _own_sum((inside & (p_w == q_w)).to(tl.int32), OWN, TURNS)
    return sum_re_u, sum_im_u, sum_re_w, sum_im_w, real_u, real_w


@triton.jit
def _fast_stage_sums(
    weight, layout, rows, cols, r_begin, c_begin, walk, count, known,
    STAGE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr, TURNS: tl.constexpr, EVEN: tl.constexpr,
    BACK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return the same as :func:`_stage_sums` where all numbers are finite; else a sum is not."""
    # half of a sum of two 16-bit numbers is exact: their halves can wait for the end
    NARROW: tl.constexpr = weight.dtype.element_ty != tl.float32 and TURNS == 0
    UNIT: tl.constexpr = 1.0 if NARROW else 0.5
    scales = ()
    for k in tl.static_range(4 * STAGE):
        scales = scales + (known[k] * 2.0 if NARROW else known[k],)  # noqa: RUF005
    steps = _steps(layout[0], layout[1], BR, BC)
    sum_re_u = tl.zeros([BR, BC // OWN], tl.float64)
    sum_im_u = tl.zeros([BR, BC // OWN], tl.float64)
    sum_re_w = tl.zeros([BR, BC // OWN], tl.float64)
    sum_im_w = tl.zeros([BR, BC // OWN], tl.float64)
    real_u = tl.zeros([BR, BC // OWN], tl.int32)
    real_w = tl.zeros([BR, BC // OWN], tl.int32)
    for _ in tl.range(0, count, num_stages=DEPTH):
        r, c = _place(walk, BR, BC, BACK)
        walk = _next_chunk(walk)
        inside = _inside(r, c, rows, cols, BR, BC)
        a11, a12, a21, a22 = _load_blocks(weight, layout, r_begin + r, c_begin + c, steps, inside, EVEN, TURNS)
        re_u, im_u, re_w, im_w = _fast_parts(a11, a12, a21, a22, UNIT)
        for t in tl.static_range(STAGE):
            re_u, im_u = _fast_residual(re_u, im_u, scales[4 * t], scales[4 * t + 1])
            re_w, im_w = _fast_residual(re_w, im_w, scales[4 * t + 2], scales[4 * t + 3])
        is_u, is_w = _fast_real(re_u, im_u), _fast_real(re_w, im_w)
        size_u = tl.maximum(tl.abs(re_u), tl.abs(im_u), propagate_nan=tl.PropagateNan.ALL)
        size_w = tl.maximum(tl.abs(re_w), tl.abs(im_w), propagate_nan=tl.PropagateNan.ALL)
        if not EVEN:
            is_u, is_w = is_u & inside, is_w & inside
            size_u, size_w = tl.where(inside, size_u, 0.0), tl.where(inside, size_w, 0.0)
        wide_u, wide_w = size_u.to(tl.float64), size_w.to(tl.float64)
        sum_re_u += _own_sum(tl.where(is_u, wide_u, 0.0), OWN, TURNS)
        sum_im_u += _own_sum(tl.where(is_u, 0.0, wide_u), OWN, TURNS)
        sum_re_w += _own_sum(tl.where(is_w, wide_w, 0.0), OWN, TURNS)
        sum_im_w += _own_sum(tl.where(is_w, 0.0, wide_w), OWN, TURNS)
        real_u += _own_sum(is_u.to(tl.int32), OWN, TURNS)
        real_w += _own_sum(is_w.to(tl.int32), OWN, TURNS)
    if NARROW:
        return sum_re_u * 0.5, sum_im_u * 0.5, sum_re_w * 0.5, sum_im_w * 0.5, real_u, real_w
    else:
        return sum_re_u, sum_im_u, sum_re_w, sum_im_w, real_u, real_w


@triton.jit
def _add_six(a, b, c, d, e, f, g, h, i, j, k, m):
    return a + g, b + h, c + i, d + j, e + k, f + m


@triton.jit
def _sum_six(six):
    """Return the sum of each of six tensors: at once, so that threads meet once."""
    flat = ()
    for k in tl.static_range(6):
        flat = flat + (tl.reshape(six[k], [six[k].numel], can_reorder=True),)  # noqa: RUF005
    return tl.reduce(flat, 0, _add_six)


@triton.jit
def _add_partials(partials, programs, entries, PROGRAMS: tl.constexpr):
    """Return the means of a stage from the sums of all programs: partials (6, programs) float64."""
    at = partials + tl.arange(0, PROGRAMS)
    there = tl.arange(0, PROGRAMS) < programs
    six = ()
    for k in tl.static_range(6):
        six = six + (tl.load(at + k * programs, there, 0.0),)  # noqa: RUF005
    re_u, im_u, re_w, im_w, real_u, real_w = _sum_six(six)
    return _mean(re_u, real_u), _mean(im_u, entries - real_u), _mean(re_w, real_w), _mean(im_w, entries - real_w)


@triton.jit
def _store_four(scales, k, groups, group, four, inside, ROWS: tl.constexpr):
    for i in tl.static_range(4):
        if ROWS:
            tl.store(scales + (k + i) * groups + group[:, None], four[i], inside[:, None])
        else:
            tl.store(scales + (k + i) * groups + group, four[i])


@triton.jit
def _write_chunks(
    weight, layout, dense, codes, m, plane, dense_down, rows, cols, r_begin, c_begin, walk, count, known,
    STAGES: tl.constexpr, MASTER: tl.constexpr, FROM_CODES: tl.constexpr, DENSE: tl.constexpr, CODES: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr, TURNS: tl.constexpr, EVEN: tl.constexpr,
    BACK: tl.constexpr, DEPTH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write the results of chunks of a rectangle; FAST: return a sum of magnitudes, finite where the results hold."""
    steps = _steps(layout[0], layout[1], BR, BC)
    steps_codes = _steps(m, 1, BR, BC)
    steps_dense = _steps(2 * m, 1, BR, BC)
    size = tl.zeros([BR, BC // OWN], tl.float32)
    for _ in tl.range(0, count, num_stages=DEPTH):
        r, c = _place(walk, BR, BC, BACK)
        walk = _next_chunk(walk)
        inside = _inside(r, c, rows, cols, BR, BC)
        r += r_begin
        c += c_begin
        if CODES or FROM_CODES:
            block = codes + (r.to(tl.int64) * m + c) + steps_codes
        if not FROM_CODES:
            a11, a12, a21, a22 = _load_blocks(weight, layout, r, c, steps, inside, EVEN, TURNS)
            if FAST:
                re_u, im_u, re_w, im_w = _fast_parts(a11, a12, a21, a22, 0.5)
                size += _own_sum((tl.abs(a11) + tl.abs(a22)) + (tl.abs(a12) + tl.abs(a21)), OWN, TURNS)
            else:
                re_u, im_u, re_w, im_w = _parts(a11, a12, a21, a22)
        for t in tl.static_range(STAGES):
            if FROM_CODES:
                if t % 2 == 0:
                    byte = _load(block + (t // 2) * plane, inside, EVEN).to(tl.int32)
                nibble = byte >> (4 * (t % 2))
                p_u, real_u = (nibble & 1) != 0, (nibble & 2) == 0
                p_w, real_w = (nibble & 4) != 0, (nibble & 8) == 0
            elif FAST:
                real_u, real_w = _fast_real(re_u, im_u), _fast_real(re_w, im_w)
                if CODES:
                    p_u = tl.where(real_u, re_u, im_u) >= 0
                    p_w = tl.where(real_w, re_w, im_w) >= 0
            else:
                p_u, q_u = _encode(re_u, im_u)
                p_w, q_w = _encode(re_w, im_w)
                real_u, real_w = p_u == q_u, p_w == q_w
            if CODES:
                nibble = _code(p_u, real_u) + _code(p_w, real_w) * 4
                if t % 2 == 0:
                    byte = nibble
                else:
                    byte += nibble * 16
                if t % 2 == 1 or t == STAGES - 1:
                    _store(block + (t // 2) * plane, byte.to(tl.uint8), inside, EVEN)
            if FAST and not FROM_CODES:
                add_re_u = tl.where(real_u, _with_sign(known[4 * t], re_u), 0.0)
                add_im_u = tl.where(real_u, 0.0, _with_sign(known[4 * t + 1], im_u))
                add_re_w = tl.where(real_w, _with_sign(known[4 * t + 2], re_w), 0.0)
                add_im_w = tl.where(real_w, 0.0, _with_sign(known[4 * t + 3], im_w))
            else:
                add_re_u, add_im_u = _times_unit(p_u, real_u, known[4 * t], known[4 * t + 1])
                add_re_w, add_im_w = _times_unit(p_w, real_w, known[4 * t + 2], known[4 * t + 3])
            if t == 0:
                out_re_u, out_im_u, out_re_w, out_im_w = add_re_u, add_im_u, add_re_w, add_im_w
            else:
                out_re_u += add_re_u
                out_im_u += add_im_u
                out_re_w += add_re_w
                out_im_w += add_im_w
            if not FROM_CODES and t + 1 < STAGES:
                re_u -= add_re_u
                im_u -= add_im_u
                re_w -= add_re_w
                im_w -= add_im_w
        if DENSE:
            kind: tl.constexpr = dense.dtype.element_ty
            at = dense + (r.to(tl.int64) * (2 * m) + c) + steps_dense
            _store(at, turn(out_re_u + out_re_w, TURNS).to(MASTER).to(kind), inside, EVEN)
            _store(at + m, turn(out_im_w - out_im_u, TURNS).to(MASTER).to(kind), inside, EVEN)
            _store(at + dense_down, turn(out_im_u + out_im_w, TURNS).to(MASTER).to(kind), inside, EVEN)
            _store(at + dense_down + m, turn(out_re_u - out_re_w, TURNS).to(MASTER).to(kind), inside, EVEN)
    return size


@triton.jit
def _write(
    weight, layout, dense, codes, m, plane, dense_down, rows, cols, r_begin, c_begin, walk, count, known,
    STAGES: tl.constexpr, MASTER: tl.constexpr, FROM_CODES: tl.constexpr, DENSE: tl.constexpr, CODES: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr, TURNS: tl.constexpr, EVEN: tl.constexpr,
    BACK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Quantize chunks of a rectangle with known scales; write the dense weight, the block codes, or both.

    FROM_CODES reads the block codes instead of the weight.
    """
    size = _write_chunks(
        weight, layout, dense, codes, m, plane, dense_down, rows, cols, r_begin, c_begin, walk, count, known,
        STAGES, MASTER, FROM_CODES, DENSE, CODES, BR, BC, OWN, TURNS, EVEN, BACK, DEPTH, True,
    )  # fmt: skip
    if not FROM_CODES:
        total = tl.sum(size)
        for k in tl.static_range(4 * STAGES):
            total += tl.sum(known[k]) if known[k].type.is_block() else known[k]
        if not _finite(total):
            _write_chunks(
                weight, layout, dense, codes, m, plane, dense_down, rows, cols, r_begin, c_begin, walk, count, known,
                STAGES, MASTER, False, DENSE, CODES, BR, BC, OWN, TURNS, EVEN, BACK, 1, False,
            )  # fmt: skip


@triton.jit
def _rectangle(n, m, height, width, program):
    """Return where the rectangle of a program begins and ends."""
    across = tl.cdiv(m, width)
    r_begin = program // across * height
    c_begin = program % across * width
    return r_begin, tl.minimum(r_begin + height, n), c_begin, tl.minimum(c_begin + width, m)


@triton.jit(do_not_specialize=["entries"])
def sum_stage_of_tensor(
    weight, scales, partials, n, m, row_stride, col_stride, down, right, entries,
    STAGE: tl.constexpr, PROGRAMS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
    TURNS: tl.constexpr, EVEN: tl.constexpr, BACK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum the magnitudes of stage STAGE: partials (T, 6, programs) float64; write the scales of the stage before."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    layout = (row_stride, col_stride, down, right)
    walk, count = _first_chunk(program, programs, n, m, BR, BC)
    known = ()
    if STAGE > 0:
        known = _load_scales(scales, 1, 0, True, STAGE - 1, False)
        last = _add_partials(partials + (STAGE - 1) * 6 * programs, programs, entries, PROGRAMS)
        if program == 0:
            _store_four(scales, 4 * (STAGE - 1), 1, 0, last, True, False)
        known = known + last
    sums = _sum_six(
        _fast_stage_sums(weight, layout, n, m, 0, 0, walk, count, known, STAGE, BR, BC, OWN, TURNS, EVEN, BACK, DEPTH)
    )
    total = sums[0] + sums[1] + sums[2] + sums[3]
    for k in tl.static_range(4 * STAGE):
        total += known[k]
    if not _finite(total):
        sums = _sum_six(_stage_sums(weight, layout, n, m, 0, 0, walk, count, known, STAGE, BR, BC, OWN, TURNS, BACK))
    at = partials + STAGE * 6 * programs + program
    for i in tl.static_range(6):
        tl.store(at + i * programs, sums[i].to(tl.float64))


@triton.jit(do_not_specialize=["entries", "summed"])
def write_tensor(
    weight, scales, partials, dense, codes, n, m, row_stride, col_stride, down, right, plane, dense_down, entries,
    summed,
    STAGES: tl.constexpr, MEAN: tl.constexpr, MASTER: tl.constexpr, FROM_CODES: tl.constexpr, DENSE: tl.constexpr,
    CODES: tl.constexpr, PROGRAMS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
    TURNS: tl.constexpr, EVEN: tl.constexpr, BACK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the results where all entries share their scales; MEAN adds up the last stage's ``summed`` partials."""
    program = tl.program_id(0)
    walk, count = _first_chunk(program, tl.num_programs(0), n, m, BR, BC)
    if MEAN:
        known = _load_scales(scales, 1, 0, True, STAGES - 1, False)
        last = _add_partials(partials + (STAGES - 1) * 6 * summed, summed, entries, PROGRAMS)
        if program == 0:
            _store_four(scales, 4 * (STAGES - 1), 1, 0, last, True, False)
        known = known + last
    else:
        known = _load_scales(scales, 1, 0, True, STAGES, False)
    layout = (row_stride, col_stride, down, right)
    _write(
        weight, layout, dense, codes, m, plane, dense_down, n, m, 0, 0, walk, count, known,
        STAGES, MASTER, FROM_CODES, DENSE, CODES, BR, BC, OWN, TURNS, EVEN, BACK, DEPTH,
    )  # fmt: skip


@triton.jit
def write_groups(
    weight, scales, dense, codes, n, m, row_stride, col_stride, down, right, plane, dense_down, height, width, groups,
    STAGES: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, MASTER: tl.constexpr, FROM_CODES: tl.constexpr,
    DENSE: tl.constexpr, CODES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
    TURNS: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the results where rows (ROWS: BR = height) or tiles have scales of their own; MEAN makes the scales too."""
    program = tl.program_id(0)
    r_begin, r_end, c_begin, c_end = _rectangle(n, m, height, width, program)
    if ROWS:
        group = r_begin + tl.arange(0, BR)
        mine = group < r_end
    else:
        group = program
        mine = True
    layout = (row_stride, col_stride, down, right)
    walk, count = _first_chunk(0, 1, r_end - r_begin, c_end - c_begin, BR, BC)
    if MEAN:
        known = ()
        for t in tl.static_range(STAGES):
            sum_re_u, sum_im_u, sum_re_w, sum_im_w, real_u, real_w = _stage_sums(
                weight, layout, r_end - r_begin, c_end - c_begin, r_begin, c_begin, walk, count, known,
                t, BR, BC, OWN, TURNS, False,
            )  # fmt: skip
            count_u = _group_sum(real_u, ROWS).to(tl.float64)
            count_w = _group_sum(real_w, ROWS).to(tl.float64)
            entries = m if ROWS else (r_end - r_begin) * (c_end - c_begin)
            four = (
                _mean(_group_sum(sum_re_u, ROWS), count_u),
                _mean(_group_sum(sum_im_u, ROWS), entries - count_u),
                _mean(_group_sum(sum_re_w, ROWS), count_w),
                _mean(_group_sum(sum_im_w, ROWS), entries - count_w),
            )
            _store_four(scales, 4 * t, groups, group, four, mine, ROWS)
            known = known + four
    else:
        known = _load_scales(scales, groups, group, mine, STAGES, ROWS)
    _write(
        weight, layout, dense, codes, m, plane, dense_down, r_end - r_begin, c_end - c_begin, r_begin, c_begin,
        walk, count, known, STAGES, MASTER, FROM_CODES, DENSE, CODES, BR, BC, OWN, TURNS, EVEN, False, DEPTH,
    )  # fmt: skip


@triton.jit
def sum_scale_gradients(
    grad, weight, codes, scales, sums, n, m, grad_row_stride, grad_col_stride, grad_down, grad_right,
    row_stride, col_stride, down, right, plane, height, width, groups,
    STAGES: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr, FROM_CODES: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, OWN: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Sum gradient times unit: sums (4 T, groups), in the order of the scales. SHARED: a column for each program."""
    group = tl.program_id(0)
    r_begin, r_end, c_begin, c_end = _rectangle(n, m, height, width, 0 if SHARED else group)
    mine = True
    if SHARED:
        walk, count = _first_chunk(group, groups, n, m, BR, BC)
        known = _load_scales(scales, 1, 0, True, STAGES, False)
    else:
        walk, count = _first_chunk(0, 1, r_end - r_begin, c_end - c_begin, BR, BC)
        if ROWS:
            group = r_begin + tl.arange(0, BR)
            mine = group < r_end
        known = _load_scales(scales, groups, group, mine, STAGES, ROWS)
    totals = ()  # of each thread; they meet once, in the end
    for _ in tl.static_range(4 * STAGES):
        totals = totals + (tl.zeros([BR, BC // OWN], tl.float64),)  # noqa: RUF005
    layout = (row_stride, col_stride, down, right)
    grad_layout = (grad_row_stride, grad_col_stride, grad_down, grad_right)
    steps = _steps(row_stride, col_stride, BR, BC)
    grad_steps = _steps(grad_row_stride, grad_col_stride, BR, BC)
    for _ in range(count):
        r, c = _place(walk, BR, BC, False)
        walk = _next_chunk(walk)
        inside = _inside(r, c, r_end - r_begin, c_end - c_begin, BR, BC)
        r += r_begin
        c += c_begin
        g11, g12, g21, g22 = _load_blocks(grad, grad_layout, r, c, grad_steps, inside, False, TURNS)
        grad_re_u, grad_im_u, grad_re_w, grad_im_w = g11 + g22, g21 - g12, g11 - g22, g12 + g21
        if not FROM_CODES:
            a11, a12, a21, a22 = _load_blocks(weight, layout, r, c, steps, inside, False, TURNS)
            re_u, im_u, re_w, im_w = _parts(a11, a12, a21, a22)
        more = ()
        for t in tl.static_range(STAGES):
            if FROM_CODES:
                if t % 2 == 0:
                    block = codes + (r.to(tl.int64) * m + c) + _steps(m, 1, BR, BC)
                    byte = _load(block + (t // 2) * plane, inside, False).to(tl.int32)
                unit_re_u, unit_im_u = _code_units(byte >> (4 * (t % 2)))
                unit_re_w, unit_im_w = _code_units(byte >> (4 * (t % 2) + 2))
            else:
                p_u, q_u = _encode(re_u, im_u)
                p_w, q_w = _encode(re_w, im_w)
                unit_re_u, unit_im_u = _units(p_u, q_u)
                unit_re_w, unit_im_w = _units(p_w, q_w)
                if t + 1 < STAGES:
                    re_u -= known[4 * t] * unit_re_u
                    im_u -= known[4 * t + 1] * unit_im_u
                    re_w -= known[4 * t + 2] * unit_re_w
                    im_w -= known[4 * t + 3] * unit_im_w
            products = (grad_re_u * unit_re_u, grad_im_u * unit_im_u, grad_re_w * unit_re_w, grad_im_w * unit_im_w)
            for i in tl.static_range(4):
                own = _own_sum(products[i].to(tl.float64), OWN, 0 if FROM_CODES else TURNS)
                more = more + (totals[4 * t + i] + own,)  # noqa: RUF005
        totals = more
    for k in tl.static_range(4 * STAGES):
        if ROWS:
            tl.store(sums + k * groups + group, tl.sum(totals[k], 1).to(sums.dtype.element_ty), mine)
        else:
            tl.store(sums + k * groups + group, tl.sum(totals[k]).to(sums.dtype.element_ty))
