"""Kernels that quantize a master weight for training: to its dense quantized weight, codes, scales and their gradient.

A program works on a *rectangle* of the complex (n, m) matrix, chunk by chunk. An entry (i, j) of it is the 2x2 block of
the real weight at rows i, n + i and columns j, m + j; one block is one entry of U and one of W. The rectangle is what
shares scales, or a part of it:

    tensor   a band of rows. A launch for each stage sums magnitudes, a row of ``partials`` for each program; the next
             launch adds the rows up, in each of its programs, and writes the mean down. No program waits for another.
    row      a few rows, all columns: means and results in one launch, the weight read from device memory once.
    tile     one tile, likewise.

Sums are in float64 over float32 terms and rounded once, so that their order does not show in the means; there are no
atomics, so a result has the same bits in each run. The arithmetic is that of :mod:`fairy2i.phase_quant`, operation by
operation. Launch with ``enable_fp_fusion=False``: a fused multiply-add would round other than two operations do.

*Block codes* are uint8 (ceil(T/2), n, m): byte s of a block has u and w of stage 2s in bits 0-1 and 2-3, and those of
stage 2s+1 in bits 4-5 and 6-7. At two stages one byte stands for four real weights.
"""

# mypy: ignore-errors
# a kernel is written in a language of its own: no types, and `a + b` to join tuples

import triton
import triton.language as tl

SCALE_MIN: tl.constexpr = tl.constexpr(1e-6)  # as in fairy2i.phase_quant


@triton.jit
def _places(r, r_end, c, c_end, BR: tl.constexpr, BC: tl.constexpr):
    """Return rows (BR,) and columns (BC,) of a chunk, wide enough to address with, and which of it is there."""
    rows = r + tl.arange(0, BR)
    cols = c + tl.arange(0, BC)
    return rows.to(tl.int64), cols.to(tl.int64), (rows < r_end)[:, None] & (cols < c_end)[None, :]


@triton.jit
def _load_blocks(matrix, rows, cols, row_stride, col_stride, down, right, inside):
    """Return the quarters A11, A12, A21, A22 at (rows, cols) as float32, 0 outside."""
    at = matrix + rows[:, None] * row_stride + cols[None, :] * col_stride
    a11 = tl.load(at, inside, 0.0).to(tl.float32)
    a12 = tl.load(at + right, inside, 0.0).to(tl.float32)
    a21 = tl.load(at + down, inside, 0.0).to(tl.float32)
    a22 = tl.load(at + down + right, inside, 0.0).to(tl.float32)
    return a11, a12, a21, a22


@triton.jit
def _load_parts(weight, rows, cols, row_stride, col_stride, down, right, inside):
    """Return (Re U, Im U, Re W, Im W) at (rows, cols) as float32, 0 outside."""
    a11, a12, a21, a22 = _load_blocks(weight, rows, cols, row_stride, col_stride, down, right, inside)
    return (a11 + a22) * 0.5, (a21 - a12) * 0.5, (a11 - a22) * 0.5, (a12 + a21) * 0.5


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
def _code(p_positive, q_positive):
    return (p_positive != q_positive).to(tl.int32) * 2 + p_positive.to(tl.int32)


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
    """Return the scales of a group as a flat tuple, four for each stage: U re, U im, W re, W im."""
    known = ()
    for k in tl.static_range(4 * STAGES):
        if ROWS:
            known = known + (_at_least_min(tl.load(scales + k * groups + group, inside, 1.0))[:, None],)  # noqa: RUF005
        else:
            known = known + (_at_least_min(tl.load(scales + k * groups + group)),)  # noqa: RUF005
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
def _own_sum(x, OWN: tl.constexpr):
    """Add up OWN neighbours of a row, those of one thread, to take fewer registers: (BR, BC) -> (BR, BC / OWN)."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // OWN, OWN]), 2)


@triton.jit
def _group_sum(x, ROWS: tl.constexpr):
    """Add up each row, (BR, 1), or all."""
    return tl.sum(x, 1)[:, None] if ROWS else tl.sum(x)


@triton.jit
def _stage_sums(
    weight, row_stride, col_stride, down, right, r_begin, r_end, c_begin, c_end, known,
    STAGE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Return the magnitudes of one stage over a rectangle, and how many entries of U and W are real: (BR, BC / OWN)."""
    sum_re_u = tl.zeros([BR, BC // OWN], tl.float64)
    sum_im_u = tl.zeros([BR, BC // OWN], tl.float64)
    sum_re_w = tl.zeros([BR, BC // OWN], tl.float64)
    sum_im_w = tl.zeros([BR, BC // OWN], tl.float64)
    real_u = tl.zeros([BR, BC // OWN], tl.int32)
    real_w = tl.zeros([BR, BC // OWN], tl.int32)
    for r in range(r_begin, r_end, BR):
        for c in range(c_begin, c_end, BC):
            rows, cols, inside = _places(r, r_end, c, c_end, BR, BC)
            re_u, im_u, re_w, im_w = _load_parts(weight, rows, cols, row_stride, col_stride, down, right, inside)
            re_u, im_u, re_w, im_w = _residual(re_u, im_u, re_w, im_w, known, STAGE)
            p_u, q_u = _encode(re_u, im_u)
            p_w, q_w = _encode(re_w, im_w)
            size_re_u, size_im_u = _magnitudes(re_u, im_u, p_u, p_u == q_u, inside)
            size_re_w, size_im_w = _magnitudes(re_w, im_w, p_w, p_w == q_w, inside)
            sum_re_u += _own_sum(size_re_u.to(tl.float64), OWN)
            sum_im_u += _own_sum(size_im_u.to(tl.float64), OWN)
            sum_re_w += _own_sum(size_re_w.to(tl.float64), OWN)
            sum_im_w += _own_sum(size_im_w.to(tl.float64), OWN)
            real_u += _own_sum((inside & (p_u == q_u)).to(tl.int32), OWN)
            real_w += _own_sum((inside & (p_w == q_w)).to(tl.int32), OWN)
    return sum_re_u, sum_im_u, sum_re_w, sum_im_w, real_u, real_w


@triton.jit
def _add_partials(partials, programs, entries, PROGRAMS: tl.constexpr):
    """Return the means of a stage from the sums of all programs: partials (6, programs) float64."""
    index = tl.arange(0, PROGRAMS)
    there = index < programs
    real_u = tl.sum(tl.load(partials + 4 * programs + index, there, 0.0))
    real_w = tl.sum(tl.load(partials + 5 * programs + index, there, 0.0))
    return (
        _mean(tl.sum(tl.load(partials + index, there, 0.0)), real_u),
        _mean(tl.sum(tl.load(partials + programs + index, there, 0.0)), entries - real_u),
        _mean(tl.sum(tl.load(partials + 2 * programs + index, there, 0.0)), real_w),
        _mean(tl.sum(tl.load(partials + 3 * programs + index, there, 0.0)), entries - real_w),
    )


@triton.jit
def _store_four(scales, k, groups, group, four, inside, ROWS: tl.constexpr):
    for i in tl.static_range(4):
        if ROWS:
            tl.store(scales + (k + i) * groups + group[:, None], four[i], inside[:, None])
        else:
            tl.store(scales + (k + i) * groups + group, four[i])


@triton.jit
def _write(
    weight, row_stride, col_stride, down, right, dense, codes, m, plane, dense_down, r_begin, r_end, c_begin, c_end,
    known, STAGES: tl.constexpr, MASTER: tl.constexpr, FROM_CODES: tl.constexpr, DENSE: tl.constexpr,
    CODES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Quantize a rectangle with known scales; write the dense weight, the block codes, or both.

    FROM_CODES reads the block codes instead of the weight.
    """
    for r in range(r_begin, r_end, BR):
        for c in range(c_begin, c_end, BC):
            rows, cols, inside = _places(r, r_end, c, c_end, BR, BC)
            block = rows[:, None] * m + cols[None, :]
            if not FROM_CODES:
                re_u, im_u, re_w, im_w = _load_parts(weight, rows, cols, row_stride, col_stride, down, right, inside)
            for t in tl.static_range(STAGES):
                if FROM_CODES:
                    if t % 2 == 0:
                        byte = tl.load(codes + (t // 2) * plane + block, inside, 0).to(tl.int32)
                    nibble = byte >> (4 * (t % 2))
                    p_u, real_u = (nibble & 1) != 0, (nibble & 2) == 0
                    p_w, real_w = (nibble & 4) != 0, (nibble & 8) == 0
                else:
                    p_u, q_u = _encode(re_u, im_u)
                    p_w, q_w = _encode(re_w, im_w)
                    real_u, real_w = p_u == q_u, p_w == q_w
                    if CODES:
                        nibble = _code(p_u, q_u) + _code(p_w, q_w) * 4
                        if t % 2 == 0:
                            byte = nibble
                        else:
                            byte += nibble * 16
                        if t % 2 == 1 or t == STAGES - 1:
                            tl.store(codes + (t // 2) * plane + block, byte.to(tl.uint8), inside)
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
                at = dense + rows[:, None] * (2 * m) + cols[None, :]
                tl.store(at, (out_re_u + out_re_w).to(MASTER).to(kind), inside)
                tl.store(at + m, (out_im_w - out_im_u).to(MASTER).to(kind), inside)
                tl.store(at + dense_down, (out_im_u + out_im_w).to(MASTER).to(kind), inside)
                tl.store(at + dense_down + m, (out_re_u - out_re_w).to(MASTER).to(kind), inside)


@triton.jit
def _rectangle(n, m, height, width):
    program = tl.program_id(0)
    across = tl.cdiv(m, width)
    r_begin = program // across * height
    c_begin = program % across * width
    return program, r_begin, tl.minimum(r_begin + height, n), c_begin, tl.minimum(c_begin + width, m)


@triton.jit(do_not_specialize=["height", "entries"])
def sum_stage_of_tensor(
    weight, scales, partials, n, m, row_stride, col_stride, down, right, height, entries,
    STAGE: tl.constexpr, PROGRAMS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Sum the magnitudes of stage STAGE: partials (T, 6, programs) float64; write the scales of the stage before."""
    program, r_begin, r_end, c_begin, c_end = _rectangle(n, m, height, m)
    programs = tl.num_programs(0)
    known = ()
    if STAGE > 0:
        known = _load_scales(scales, 1, 0, True, STAGE - 1, False)
        last = _add_partials(partials + (STAGE - 1) * 6 * programs, programs, entries, PROGRAMS)
        if program == 0:
            _store_four(scales, 4 * (STAGE - 1), 1, 0, last, True, False)
        known = known + last
    sums = _stage_sums(
        weight, row_stride, col_stride, down, right, r_begin, r_end, c_begin, c_end, known, STAGE, BR, BC, OWN
    )
    at = partials + STAGE * 6 * programs + program
    for i in tl.static_range(6):
        tl.store(at + i * programs, tl.sum(sums[i]).to(tl.float64))


@triton.jit(do_not_specialize=["height", "entries", "summed"])
def write_tensor(
    weight, scales, partials, dense, codes, n, m, row_stride, col_stride, down, right, plane, dense_down, height,
    entries, summed,
    STAGES: tl.constexpr, MEAN: tl.constexpr, MASTER: tl.constexpr, FROM_CODES: tl.constexpr, DENSE: tl.constexpr,
    CODES: tl.constexpr, PROGRAMS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the results where all entries share their scales; MEAN adds up the last stage's ``summed`` partials."""
    program, r_begin, r_end, c_begin, c_end = _rectangle(n, m, height, m)
    if MEAN:
        known = _load_scales(scales, 1, 0, True, STAGES - 1, False)
        last = _add_partials(partials + (STAGES - 1) * 6 * summed, summed, entries, PROGRAMS)
        if program == 0:
            _store_four(scales, 4 * (STAGES - 1), 1, 0, last, True, False)
        known = known + last
    else:
        known = _load_scales(scales, 1, 0, True, STAGES, False)
    _write(
        weight, row_stride, col_stride, down, right, dense, codes, m, plane, dense_down, r_begin, r_end, c_begin, c_end,
        known, STAGES, MASTER, FROM_CODES, DENSE, CODES, BR, BC,
    )  # fmt: skip


@triton.jit
def write_groups(
    weight, scales, dense, codes, n, m, row_stride, col_stride, down, right, plane, dense_down, height, width, groups,
    STAGES: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, MASTER: tl.constexpr, FROM_CODES: tl.constexpr,
    DENSE: tl.constexpr, CODES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Write the results where rows (ROWS: BR = height) or tiles have scales of their own; MEAN makes the scales too."""
    program, r_begin, r_end, c_begin, c_end = _rectangle(n, m, height, width)
    if ROWS:
        group = r_begin + tl.arange(0, BR)
        mine = group < r_end
    else:
        group = program
        mine = True
    if MEAN:
        known = ()
        for t in tl.static_range(STAGES):
            sum_re_u, sum_im_u, sum_re_w, sum_im_w, real_u, real_w = _stage_sums(
                weight, row_stride, col_stride, down, right, r_begin, r_end, c_begin, c_end, known, t, BR, BC, OWN
            )
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
        weight, row_stride, col_stride, down, right, dense, codes, m, plane, dense_down, r_begin, r_end, c_begin, c_end,
        known, STAGES, MASTER, FROM_CODES, DENSE, CODES, BR, BC,
    )  # fmt: skip


@triton.jit
def sum_scale_gradients(
    grad, weight, codes, scales, sums, n, m, grad_row_stride, grad_col_stride, grad_down, grad_right,
    row_stride, col_stride, down, right, plane, height, width, groups,
    STAGES: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr, FROM_CODES: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Sum gradient times unit: sums (4 T, groups), in the order of the scales. SHARED: a column for each program."""
    program, r_begin, r_end, c_begin, c_end = _rectangle(n, m, height, width)
    if ROWS:
        group = r_begin + tl.arange(0, BR)
        mine = group < r_end
        known = _load_scales(scales, groups, group, mine, STAGES, True)
    else:
        group = program
        mine = True
        known = _load_scales(scales, 1 if SHARED else groups, 0 if SHARED else group, True, STAGES, False)
    totals = ()  # of each thread; they meet once, in the end
    for _ in tl.static_range(4 * STAGES):
        totals = totals + (tl.zeros([BR, BC // OWN], tl.float64),)  # noqa: RUF005
    for r in range(r_begin, r_end, BR):
        for c in range(c_begin, c_end, BC):
            rows, cols, inside = _places(r, r_end, c, c_end, BR, BC)
            g11, g12, g21, g22 = _load_blocks(
                grad, rows, cols, grad_row_stride, grad_col_stride, grad_down, grad_right, inside
            )
            grad_re_u, grad_im_u, grad_re_w, grad_im_w = g11 + g22, g21 - g12, g11 - g22, g12 + g21
            if not FROM_CODES:
                re_u, im_u, re_w, im_w = _load_parts(weight, rows, cols, row_stride, col_stride, down, right, inside)
            more = ()
            for t in tl.static_range(STAGES):
                if FROM_CODES:
                    if t % 2 == 0:
                        block = rows[:, None] * m + cols[None, :]
                        byte = tl.load(codes + (t // 2) * plane + block, inside, 0).to(tl.int32)
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
                    more = more + (totals[4 * t + i] + _own_sum(products[i].to(tl.float64), OWN),)  # noqa: RUF005
            totals = more
    for k in tl.static_range(4 * STAGES):
        if ROWS:
            tl.store(sums + k * groups + group, tl.sum(totals[k], 1).to(sums.dtype.element_ty), mine)
        else:
            tl.store(sums + k * groups + group, tl.sum(totals[k]).to(sums.dtype.element_ty))
