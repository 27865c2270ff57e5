"""Kernels that multiply with packed layers on a GPU: bit planes into tensor cores.

The codes are *words* here, int16 (chunks, passes, n, G, BK): bit k of word (c, s, i, g, b) is the sign g of row i and
column (16 c + k) BK + b, 1 for plus. A phase stage has the signs p and q of U and of W (G = 4 a stage; a code is
(p, q), re = (p + q) / 2, im = (p - q) / 2); a binary weight is its sign, a ternary one half the sum of two.

    planes   a sign is a number of the activations' dtype with two instructions for two of them, and sums of
             +-activations, which tensor cores make, meet their scales at the end. Scales of the tensor or of a row.
             Multiplications: 4 T a block of 2x2 weights, each with both halves of x, which is 2 T times those of a
             dense product: for few tokens.
    blocks   weights are made of the codes in registers in float32, rounded once, then multiplied. Any scales.
    dense    weights are made of the codes and written, as in blocks; or two at a time in fp16, where they are bf16, of
             phase codes, with scales of the tensor or of a row: each scale is rounded to 11 bits, and so is each sum of
             two, so that the weight is more exact than bf16 before it is rounded to it.

Activations are bf16 or fp16 (of planes and blocks): tensor cores take no other that would be as exact as PyTorch, whose
float32 has dense alone. Sums are float32, in one order, without atomics: a result has the same bits in each run.
"""

# mypy: ignore-errors
# a kernel is written in a language of its own

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, total, EXACT: tl.constexpr):
    """Multiply matrices of 16 bits; EXACT for Triton's interpreter, whose NumPy has no bf16."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


# two words of 16 bits in a register: bits that a shift brings over from the other are masked away
SHIFTS = tl.constexpr(tuple(f"shl.b32 $0, $1, {15 - k};" for k in range(16)))
_MINUS_ONE = (0xBF80, 0xBC00)  # bf16, fp16
MINUS_ONE = tl.constexpr(_MINUS_ONE)
SIGNS = tl.constexpr(  # and, xor
    tuple(f"lop3.b32 $0, $1, 0x80008000, {one * 0x10001:#x}, 0x6A;" for one in _MINUS_ONE)
)


@triton.jit
def _sign(word, k: tl.constexpr, kind: tl.constexpr, EXACT: tl.constexpr):
    """Return bit k of int16 words as bf16 or fp16: -1 or 1."""
    which: tl.constexpr = 0 if kind == tl.bfloat16 else 1
    if EXACT:
        bits = ((word.to(tl.uint16, bitcast=True) << (15 - k)) & 0x8000) ^ MINUS_ONE[which]
        bits = bits.to(tl.uint16)
    else:
        bits = tl.inline_asm_elementwise(SHIFTS[k], "=r,r", [word], tl.int16, True, 2)
        bits = tl.inline_asm_elementwise(SIGNS[which], "=r,r", [bits], tl.int16, True, 2)
    return bits.to(kind, bitcast=True)


@triton.jit
def _store(
    y, bias, places, total, total2, row, token, inside, n, tokens, y_stride,
    KIND: tl.constexpr, PLACES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the outputs of rows of the codes, with their bias, or a partial sum of them."""
    out1 = tl.load(places + row, row < n, 0) if PLACES else row
    out2 = tl.load(places + n + row, row < n, 0) if PLACES else row + n
    at = y + (tl.program_id(1) * tokens + token).to(tl.int64)[None, :] * y_stride
    if SPLIT == 1:
        if bias is not None:
            total += tl.load(bias + out1, row < n, 0.0).to(tl.float32)[:, None]
            if KIND == 0:
                total2 += tl.load(bias + out2, row < n, 0.0).to(tl.float32)[:, None]
    tl.store(at + out1[:, None], total.to(y.dtype.element_ty), inside)
    if KIND == 0:
        tl.store(at + out2[:, None], total2.to(y.dtype.element_ty), inside)


@triton.jit
def _scaled(acc, scales, s, row, n, ROWS: tl.constexpr):
    """Return the sums of a pass times their scales, for the upper outputs and the lower ones, (BR, tokens) each.

    Args:
        acc: (BR, G, columns), sums of +-activations of each sign; a column is (token, half).
        s: which pass.
        row: (BR,), of the codes.
    """
    G: tl.constexpr = acc.shape[1]
    columns: tl.constexpr = acc.shape[2]
    row = row[:, None, None]
    g = tl.arange(0, G)[None, :, None]
    half = (tl.arange(0, columns) % 2)[None, None, :]
    uw = (g // 2) % 2
    q = g % 2
    base = ((s * (G // 4) + g // 4) * 2 + uw) * 2
    width = n if ROWS else 1
    where = row if ROWS else row * 0
    inside = (row < n) & (g < G) & (half < 2)
    upper = tl.load(scales + (base + half) * width + where, inside, 0.0)
    lower = tl.load(scales + (base + 1 - half) * width + where, inside, 0.0)
    upper = tl.where((half == 1) & (uw == q), -upper, upper)
    lower = tl.where(tl.where(half == 0, q, uw) == 1, -lower, lower)
    upper = tl.sum(upper * acc, 1)
    lower = tl.sum(lower * acc, 1)
    by_half: tl.constexpr = [acc.shape[0], columns // 2, 2]
    return tl.sum(tl.reshape(upper, by_half), 2), tl.sum(tl.reshape(lower, by_half), 2)


@triton.jit
def multiply_planes(
    x, words, scales, bias, places, y,
    tokens, x_stride, y_stride, n, m, chunks, chunk_stride, pass_stride,
    KIND: tl.constexpr, STAGES: tl.constexpr, PASSES: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, PLACES: tl.constexpr, SPLIT: tl.constexpr,
    INNER: tl.constexpr, BR: tl.constexpr, NC: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write y, or with SPLIT > 1 the partial sums (SPLIT, tokens, out_features) of ranges of chunks.

    A program has BR rows of the codes with all their signs, and NC columns: (token, half) of phase codes, or tokens.
    It takes INNER chunks at once, whose signs are further rows and whose activations are further columns, so that the
    columns that tensor cores have anyway are not in vain, and many warps share a row: only where both are of the same
    chunk, a sum means something.
    """
    HALVES: tl.constexpr = 2 if KIND == 0 else 1
    NT: tl.constexpr = NC // INNER  # columns of a chunk
    kind: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    first_token = tl.program_id(2) * (NT // HALVES)
    row0 = tl.program_id(0) * BR
    signs = tl.arange(0, INNER * BR * G)
    row = row0 + signs % (BR * G) // G
    its_chunk = signs // (BR * G)
    kk = tl.arange(0, BK)
    column = tl.arange(0, NC)
    token = tl.minimum(first_token + column % NT // HALVES, tokens - 1)
    half = column % HALVES
    chunk_of = column // NT
    x_at = x + token.to(tl.int64)[None, :] * x_stride + (half * m + chunk_of * (16 * BK))[None, :] + kk[:, None]
    word_at = (
        words + (row0 * G + signs % (BR * G) + its_chunk.to(tl.int64) * chunk_stride // BK)[:, None] * BK + kk[None, :]
    )
    first = (chunks * split) // SPLIT
    last = (chunks * (split + 1)) // SPLIT
    rows = row0 + tl.arange(0, BR)
    total = tl.zeros([BR, NT // HALVES], tl.float32)
    total2 = tl.zeros([BR, NT // HALVES], tl.float32)
    for s in range(PASSES):
        acc = tl.zeros([INNER * BR * G, NC], tl.float32)
        for c in tl.range(first, last, INNER, num_stages=DEPTH):
            at = word_at + c * chunk_stride + s * pass_stride
            if EVEN:
                word = tl.load(at)
            else:
                word = tl.load(at, ((row < n) & (c + its_chunk < last))[:, None], 0)
            columns_left = tl.where(c + chunk_of < last, m - (c + chunk_of) * (16 * BK), 0)
            for k in tl.static_range(16):
                if FULL:
                    value = tl.load(x_at + (c * 16 + k) * BK)
                else:
                    value = tl.load(x_at + (c * 16 + k) * BK, (k * BK + kk)[:, None] < columns_left[None, :], 0.0)
                acc = _dot(_sign(word, k, kind, EXACT), value, acc, EXACT)
        acc = acc * 0.5
        acc = tl.where(its_chunk[:, None] == chunk_of[None, :], acc, 0.0) if INNER > 1 else acc
        acc = tl.sum(tl.reshape(acc, [INNER * BR * G, INNER, NT]), 1) if INNER > 1 else acc
        acc = tl.sum(tl.reshape(acc, [INNER, BR * G, NT]), 0) if INNER > 1 else acc
        if KIND == 0:
            upper, lower = _scaled(tl.reshape(acc, [BR, G, NT]), scales, s, rows, n, ROWS)
            total += upper
            total2 += lower
        else:
            total += tl.sum(tl.reshape(acc, [BR, G, NT]), 1)
    tokens_here = first_token + tl.arange(0, NT // HALVES)
    inside = (rows < n)[:, None] & (tokens_here < tokens)[None, :]
    if KIND == 1:  # a binary weight is twice half its sign
        scale = tl.load(scales + rows, rows < n, 0.0)[:, None] if ROWS else tl.load(scales)
        total = total * (scale * (2 // G))
    _store(y, bias, places, total, total2, rows, tokens_here, inside, n, tokens, y_stride, KIND, PLACES, SPLIT)


@triton.jit
def add_splits(parts, bias, y, tokens, out_features, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Add partial sums (SPLIT, tokens, out_features) in order, and the bias."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tokens * out_features
    inside = place < size
    total = tl.load(parts + place, inside, 0.0)
    for s in tl.static_range(1, SPLIT):
        total += tl.load(parts + s * size + place, inside, 0.0)
    if bias is not None:
        total += tl.load(bias + place % out_features, inside, 0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), inside)


@triton.jit
def _load_words(at, row, n, kk, pass_stride, PASSES: tl.constexpr, G: tl.constexpr, BK: tl.constexpr):
    """Return the words of rows, (BR, BK) for each sign, as a tuple."""
    found = ()
    for s in tl.static_range(PASSES):
        for g in tl.static_range(G):
            here = at + s * pass_stride + (row.to(tl.int64)[:, None] * G + g) * BK + kk[None, :]
            found = found + (tl.load(here, (row < n)[:, None], 0),)  # noqa: RUF005
    return found


@triton.jit
def _load_scale(scales, i, row, column, n, m, tile, GROUPS: tl.constexpr):
    """Return scale i of the entries of a matrix: () of the tensor, (BR, 1) of rows, (BR, BK) of tiles."""
    if GROUPS == 0:
        return tl.load(scales + i)
    elif GROUPS == 1:
        return tl.load(scales + i * n + row, row < n, 0.0)[:, None]
    else:
        across = tl.cdiv(m, tile)
        here = (row // tile)[:, None] * across + (column // tile)[None, :]
        return tl.load(scales + i * tl.cdiv(n, tile) * across + here, (row < n)[:, None] & (column < m)[None, :], 0.0)


@triton.jit
def _unit(first, second, k, scale_re, scale_im):
    p = ((first >> k) & 1) != 0
    q = ((second >> k) & 1) != 0
    re = tl.where(p == q, tl.where(p, scale_re, -scale_re), 0.0)
    im = tl.where(p == q, 0.0, tl.where(p, scale_im, -scale_im))
    return re, im


@triton.jit
def _phase_weights(found, scales, k, row, column, n, m, tile, STAGES: tl.constexpr, GROUPS: tl.constexpr):
    for t in tl.static_range(STAGES):
        re_u, im_u = _unit(
            found[4 * t], found[4 * t + 1], k,
            _load_scale(scales, 4 * t, row, column, n, m, tile, GROUPS),
            _load_scale(scales, 4 * t + 1, row, column, n, m, tile, GROUPS),
        )  # fmt: skip
        re_w, im_w = _unit(
            found[4 * t + 2], found[4 * t + 3], k,
            _load_scale(scales, 4 * t + 2, row, column, n, m, tile, GROUPS),
            _load_scale(scales, 4 * t + 3, row, column, n, m, tile, GROUPS),
        )  # fmt: skip
        if t == 0:
            sum_re_u, sum_im_u, sum_re_w, sum_im_w = re_u, im_u, re_w, im_w
        else:  # the sums of the stages first, as phase_dequantize adds
            sum_re_u += re_u
            sum_im_u += im_u
            sum_re_w += re_w
            sum_im_w += im_w
    return sum_re_u + sum_re_w, sum_im_w - sum_im_u, sum_im_u + sum_im_w, sum_re_u - sum_re_w


@triton.jit
def _weights(
    found, scales, k, row, column, n, m, tile, KIND: tl.constexpr, STAGES: tl.constexpr, G: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Return the quarters A11, A12, A21, A22 of the weights of bit k, float32 (BR, BK); a real weight four times."""
    if KIND == 1:
        scale = _load_scale(scales, 0, row, column, n, m, tile, GROUPS)
        plus = ((found[0] >> k) & 1) != 0
        a = tl.where(plus, scale, -scale)
        if G == 2:
            a = tl.where(plus == (((found[1] >> k) & 1) != 0), a, 0.0)
        return a, a, a, a
    else:
        return _phase_weights(found, scales, k, row, column, n, m, tile, STAGES, GROUPS)


@triton.jit
def multiply_blocks(
    x, words, scales, bias, places, y,
    tokens, x_stride, y_stride, n, m, tile, chunks, chunk_stride, pass_stride,
    KIND: tl.constexpr, STAGES: tl.constexpr, PASSES: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
    GROUPS: tl.constexpr, PLACES: tl.constexpr, SPLIT: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Write y, or the partial sums (SPLIT, tokens, out_features): weights made in registers, BR rows by BM tokens."""
    split = tl.program_id(1)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    kk = tl.arange(0, BK)
    kind: tl.constexpr = tl.float32 if EXACT else x.dtype.element_ty
    x_at = x + token.to(tl.int64)[None, :] * x_stride + kk[:, None]
    total = tl.zeros([BR, BM], tl.float32)
    total2 = tl.zeros([BR, BM], tl.float32)
    for c in range((chunks * split) // SPLIT, (chunks * (split + 1)) // SPLIT):
        found = _load_words(words + c * chunk_stride, row, n, kk, pass_stride, PASSES, G, BK)
        for k in range(16):
            j = (c * 16 + k) * BK
            if j < m:
                a11, a12, a21, a22 = _weights(found, scales, k, row, j + kk, n, m, tile, KIND, STAGES, G, GROUPS)
                inside = (j + kk < m)[:, None] & (token < tokens)[None, :]
                x1 = tl.load(x_at + j, inside, 0.0).to(kind)
                total = tl.dot(a11.to(kind), x1, total)
                if KIND == 0:
                    x2 = tl.load(x_at + m + j, inside, 0.0).to(kind)
                    total = tl.dot(a12.to(kind), x2, total)
                    total2 = tl.dot(a21.to(kind), x1, total2)
                    total2 = tl.dot(a22.to(kind), x2, total2)
    inside = (row < n)[:, None] & (token < tokens)[None, :]
    _store(y, bias, places, total, total2, row, token, inside, n, tokens, y_stride, KIND, PLACES, SPLIT)


def _decoder(stages):
    """Return PTX that makes two columns of the four quarters of bits 15 of words, in fp16, and its constraints.

    Operands: the quarters; 4 words a stage, p and q of U and of W; 4 scales a stage, re and im of U and of W.
    """
    lines = [".reg .b32 p, q, re, im, u_re, u_im, w_re, w_im;"]
    for i in range(0, 4 * stages, 2):
        part = "uw"[i // 2 % 2]
        lines += [
            f"lop3.b32 p, ${4 + i}, 0x80008000, 0xB800B800, 0x6A;",  # half the sign
            f"lop3.b32 q, ${5 + i}, 0x80008000, 0xB800B800, 0x6A;",
            "add.rn.f16x2 re, p, q;",
            "sub.rn.f16x2 im, p, q;",
        ]
        for what, scale in (("re", 4 + 4 * stages + i), ("im", 5 + 4 * stages + i)):
            into = f"{part}_{what}"
            lines += [
                f"mul.rn.f16x2 {into}, {what}, ${scale};"
                if i < 4
                else f"fma.rn.f16x2 {into}, {what}, ${scale}, {into};"
            ]
    lines += ["add.rn.f16x2 $0, u_re, w_re;", "sub.rn.f16x2 $1, w_im, u_im;"]
    lines += ["add.rn.f16x2 $2, u_im, w_im;", "sub.rn.f16x2 $3, u_re, w_re;"]
    return "{" + " ".join(lines) + "}", ",".join(["=&r"] * 4 + ["r"] * (8 * stages))


DECODERS = tl.constexpr(tuple(_decoder(stages)[0] for stages in range(1, 9)))
OPERANDS = tl.constexpr(tuple(_decoder(stages)[1] for stages in range(1, 9)))
QUARTERS = tl.constexpr((tl.float16,) * 4)


@triton.jit
def _half_sign(word):
    return tl.where(word < 0, 0.5, -0.5).to(tl.float16)


@triton.jit
def _decode(words, scales, STAGES: tl.constexpr, EXACT: tl.constexpr):
    """Return the quarters A11, A12, A21, A22 of bits 15 of words, fp16 (BR, WB), from scales of that shape."""
    if EXACT:
        for t in tl.static_range(STAGES):
            p, q = _half_sign(words[4 * t]), _half_sign(words[4 * t + 1])
            p2, q2 = _half_sign(words[4 * t + 2]), _half_sign(words[4 * t + 3])
            u_re, u_im = (p + q) * scales[4 * t], (p - q) * scales[4 * t + 1]
            w_re, w_im = (p2 + q2) * scales[4 * t + 2], (p2 - q2) * scales[4 * t + 3]
            if t == 0:
                sum_u_re, sum_u_im, sum_w_re, sum_w_im = u_re, u_im, w_re, w_im
            else:
                sum_u_re += u_re
                sum_u_im += u_im
                sum_w_re += w_re
                sum_w_im += w_im
        return sum_u_re + sum_w_re, sum_w_im - sum_u_im, sum_u_im + sum_w_im, sum_u_re - sum_w_re
    else:
        return tl.inline_asm_elementwise(DECODERS[STAGES - 1], OPERANDS[STAGES - 1], words + scales, QUARTERS, True, 2)


@triton.jit
def _shifted(words, N: tl.constexpr, EXACT: tl.constexpr):
    """Return words with bit 14 where 15 was."""
    found = ()
    for i in tl.static_range(N):
        if EXACT:
            word = words[i] << 1
        else:  # the bit that comes over from the neighbour gets as far as bit 14
            word = tl.inline_asm_elementwise("shl.b32 $0, $1, 1;", "=r,r", [words[i]], tl.int16, True, 2)
        found = found + (word,)  # noqa: RUF005
    return found


@triton.jit
def _row_power(scales, row, n, N: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr):
    """Return a power of two above the sum of N scales of rows."""
    total = tl.zeros([BR], tl.float32)
    for i in tl.static_range(N):
        total += tl.abs(tl.load(scales + i * n + row) if ROWS else tl.load(scales + i))
    power = tl.minimum(tl.maximum(total.to(tl.int32, bitcast=True) >> 23, 2), 252)
    return ((power + 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row_scales(scales, power, row, n, N: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, WB: tl.constexpr):
    """Return N scales of rows over their power of two, as fp16 (BR, WB)."""
    found = ()
    for i in tl.static_range(N):
        scale = (tl.load(scales + i * n + row) if ROWS else tl.load(scales + i)) / power
        found = found + (scale.to(tl.float16)[:, None] + tl.zeros([BR, WB], tl.float16),)  # noqa: RUF005
    return found


@triton.jit
def write_dense(
    words, scales, places, dense, n, m, tile, chunk_stride, pass_stride, in_features,
    KIND: tl.constexpr, STAGES: tl.constexpr, PASSES: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
    GROUPS: tl.constexpr, PLACES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write the dense weight, (out_features, in_features)."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1)
    kk = tl.arange(0, BK)
    kind: tl.constexpr = dense.dtype.element_ty
    found = _load_words(words + c * chunk_stride, row, n, kk, pass_stride, PASSES, G, BK)
    out1 = tl.load(places + row, row < n, 0) if PLACES else row
    out2 = tl.load(places + n + row, row < n, 0) if PLACES else row + n
    at1 = dense + out1.to(tl.int64)[:, None] * in_features + kk[None, :]
    at2 = dense + out2.to(tl.int64)[:, None] * in_features + kk[None, :]
    for k in range(16):
        j = (c * 16 + k) * BK
        if j < m:
            a11, a12, a21, a22 = _weights(found, scales, k, row, j + kk, n, m, tile, KIND, STAGES, G, GROUPS)
            inside = (row < n)[:, None] & (j + kk < m)[None, :]
            tl.store(at1 + j, a11.to(kind), inside)
            if KIND == 0:
                tl.store(at1 + m + j, a12.to(kind), inside)
                tl.store(at2 + j, a21.to(kind), inside)
                tl.store(at2 + m + j, a22.to(kind), inside)


@triton.jit
def write_dense_bf16(
    words, scales, places, dense, n, m, chunk_stride, pass_stride, in_features,
    STAGES: tl.constexpr, PASSES: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
    PLACES: tl.constexpr, BR: tl.constexpr, WB: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the dense weight of phase codes with scales of the tensor or of rows, in bf16."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    last = tl.minimum(row, n - 1)
    c = tl.program_id(1) // (BK // WB)
    first = tl.program_id(1) % (BK // WB) * WB
    kk = first + tl.arange(0, WB)
    powers = _row_power(scales, last, n, 4 * STAGES, ROWS, BR)
    halves = _row_scales(scales, powers, last, n, 4 * STAGES, ROWS, BR, WB)
    found = ()
    for s in tl.static_range(PASSES):
        for g in tl.static_range(G):
            at = words + c * chunk_stride + s * pass_stride + kk[None, :]
            found = found + (tl.load(at + (last.to(tl.int64)[:, None] * G + g) * BK),)  # noqa: RUF005
    out1 = tl.load(places + last) if PLACES else last
    out2 = tl.load(places + n + last) if PLACES else last + n
    at1 = dense + out1.to(tl.int64)[:, None] * in_features
    at2 = dense + out2.to(tl.int64)[:, None] * in_features
    for k in range(16):
        a11, a12, a21, a22 = _decode(found, halves, STAGES, EXACT)
        found = _shifted(found, 4 * STAGES, EXACT)
        j = (c * 16 + 15 - k) * BK + kk[None, :]
        inside = (row < n)[:, None] & (j < m)
        kind: tl.constexpr = dense.dtype.element_ty
        tl.store(at1 + j, (a11.to(tl.float32) * powers[:, None]).to(kind), inside)
        tl.store(at1 + m + j, (a12.to(tl.float32) * powers[:, None]).to(kind), inside)
        tl.store(at2 + j, (a21.to(tl.float32) * powers[:, None]).to(kind), inside)
        tl.store(at2 + m + j, (a22.to(tl.float32) * powers[:, None]).to(kind), inside)
