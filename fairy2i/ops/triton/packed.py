"""Kernels that multiply with packed layers on a GPU: bit planes into tensor cores.

The codes are *words* here, int16 (chunks, passes, n, G, BK): bit k of word (c, s, i, g, b) is the sign g of row i and
column (16 c + k) BK + b, 1 for plus. A phase stage has the signs p and q of U and of W (G = 4 a stage; a code is
(p, q), re = (p + q) / 2, im = (p - q) / 2); a binary weight is its sign, a ternary one half the sum of two.

    planes   a sign is a bf16 number with one instruction for two of them, and sums of +-activations, which tensor cores
             make, meet their scales at the end. Scales of the tensor or of a row. Multiplications: 4 T a block of 2x2
             weights, each with both halves of x, which is 2 T times those of a dense product: for few tokens.
    blocks   weights are made of the codes in registers, then multiplied. Any scales.
    dense    weights are made of the codes and written.

How bits become numbers without a shift for each: ``(word & 1 << b) | 1.0`` is 1 or 1 + 2^(b - 7) in bf16; the
activation is multiplied by 2^(7 - b), exactly, and the sum that the middle of both would give, the same for all rows,
is made by one more small product and taken off. Bits 1 to 6 have such a middle: three shifts for 16 planes. MAGIC off:
the bit is shifted to the place of the sign, an instruction more, and nothing is taken off; for float32, where the
difference of two larger sums is not exact enough.

Instructions a weight at T = 2, counted in the machine code of the loop for sm_90, up to 4 tokens (Triton 3.7): planes
1.9 with 128 signs a warp, 2.1 with 64, 2.8 with 32 (the share of the activations), 2.6 with 64 and MAGIC off; T = 1
takes half. blocks 16, which is why it waits for more tokens. Other ways, by arithmetic: adding +-activations 8; dot
products of 8 bits 2.5, for activations of 16 bits, at half the rate; a table of 256 blocks in shared memory 1.4, but
three look-ups meet in a bank, so it ends at two fifths of the memory's rate.

Activations are split into PIECES bf16 numbers, 1 for bf16, 2 for fp16, 3 for fp32, that add up to them. Sums are
float32, in one order, without atomics: a result has the same bits in each run.
"""

# mypy: ignore-errors
# a kernel is written in a language of its own

import triton
import triton.language as tl


@triton.jit
def _piece(rest):
    """Return a bf16 number near ``rest``, and what it leaves over: exactly, of float32."""
    near = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return near, rest - near


@triton.jit
def _dot(a, b, total, EXACT: tl.constexpr):
    """Multiply bf16 matrices; EXACT for Triton's interpreter, whose NumPy has no bf16."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


# two words of 16 bits in a register: bits that a shift brings over from the other are masked away
MAGIC_SHIFTS = tl.constexpr(tuple(f"{what}.b32 $0, $1, {by};" for what, by in (("shl", 1), ("shr", 5), ("shr", 11))))
MAGIC_BITS = tl.constexpr(tuple(f"lop3.b32 $0, $1, {0x20002 << k:#x}, 0x3F803F80, 0xEA;" for k in range(6)))  # and, or
SIGN_SHIFTS = tl.constexpr(tuple(f"shl.b32 $0, $1, {15 - k};" for k in range(16)))
SIGN_BITS = tl.constexpr("lop3.b32 $0, $1, 0x80008000, 0xBF80BF80, 0x6A;")  # and, xor


@triton.jit
def _sign(word, k: tl.constexpr, MAGIC: tl.constexpr, EXACT: tl.constexpr):
    """Return bit k of int16 words as bf16: -1 or 1; MAGIC: 1 or 1 + 2^(b - 7), with b = 1 + k % 6."""
    if EXACT:
        word = word.to(tl.uint16, bitcast=True)
        if MAGIC:
            shifted = word << 1 if k < 6 else word >> (6 * (k // 6) - 1)
            bits = (shifted & (2 << (k % 6))) | 0x3F80
        else:
            bits = ((word << (15 - k)) & 0x8000) ^ 0xBF80
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if MAGIC:
        word = tl.inline_asm_elementwise(MAGIC_SHIFTS[k // 6], "=r,r", [word], tl.int16, True, 2)
        return tl.inline_asm_elementwise(MAGIC_BITS[k % 6], "=r,r", [word], tl.bfloat16, True, 2)
    word = tl.inline_asm_elementwise(SIGN_SHIFTS[k], "=r,r", [word], tl.int16, True, 2)
    return tl.inline_asm_elementwise(SIGN_BITS, "=r,r", [word], tl.bfloat16, True, 2)


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
def multiply_planes(
    x, words, scales, bias, places, y,
    tokens, x_stride, y_stride, n, m, chunks, chunk_stride, pass_stride,
    KIND: tl.constexpr, STAGES: tl.constexpr, PASSES: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, PLACES: tl.constexpr, PIECES: tl.constexpr, MAGIC: tl.constexpr, SPLIT: tl.constexpr,
    BR: tl.constexpr, NC: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write y, or with SPLIT > 1 the partial sums (SPLIT, tokens, out_features) of ranges of chunks.

    A program has BR rows of the codes with all their signs, and NC columns: (token, half) of phase codes, or tokens.
    """
    HALVES: tl.constexpr = 2 if KIND == 0 else 1
    split = tl.program_id(1)
    first_token = tl.program_id(2) * (NC // HALVES)
    row0 = tl.program_id(0) * BR
    signs = tl.arange(0, BR * G)
    row = row0 + signs // G
    kk = tl.arange(0, BK)
    column = tl.arange(0, NC)
    token = first_token + column // HALVES
    half = column % HALVES
    x_at = x + token.to(tl.int64)[None, :] * x_stride + half[None, :] * m + kk[:, None]
    word_at = words + (row0 * G + signs).to(tl.int64)[:, None] * BK + kk[None, :]
    first = (chunks * split) // SPLIT
    last = (chunks * (split + 1)) // SPLIT
    total = tl.zeros([BR, NC // HALVES], tl.float32)
    total2 = tl.zeros([BR, NC // HALVES], tl.float32)
    for s in tl.static_range(PASSES):
        acc = tl.zeros([BR * G, NC], tl.float32)
        middle = tl.zeros([16, NC], tl.float32)
        for c in tl.range(first, last, num_stages=DEPTH):
            at = word_at + c * chunk_stride + s * pass_stride
            if EVEN:
                word = tl.load(at)
            else:
                word = tl.load(at, (row < n)[:, None], 0)
            for k in tl.static_range(16):
                j = (c * 16 + k) * BK
                value = tl.load(x_at + j, (j + kk < m)[:, None] & (token < tokens)[None, :], 0.0).to(tl.float32)
                sign = _sign(word, k, MAGIC, EXACT)
                if MAGIC:
                    value = value * (1 << (6 - k % 6))
                for piece in tl.static_range(PIECES):
                    if piece + 1 < PIECES:
                        near, value = _piece(value)
                        near = near.to(tl.bfloat16)
                    else:
                        near = value.to(tl.bfloat16)
                    acc = _dot(sign, near, acc, EXACT)
                    if MAGIC:
                        center = (tl.zeros([16, BK], tl.float32) + (1.0 + 1.0 / (1 << (7 - k % 6)))).to(tl.bfloat16)
                        middle = _dot(center, near, middle, EXACT)
        acc = tl.reshape(acc, [BR, G, NC])
        if MAGIC:
            acc = acc - tl.reshape(tl.sum(middle, 0) * 0.0625, [1, 1, NC])
        else:
            acc = acc * 0.5
        rows3 = tl.reshape(row0 + tl.arange(0, BR), [BR, 1, 1])
        g = tl.reshape(tl.arange(0, G), [1, G, 1])
        if KIND == 0:
            half3 = tl.reshape(half, [1, 1, NC])
            uw = (g // 2) % 2
            q = g % 2
            base = ((s * (G // 4) + g // 4) * 2 + uw) * 2
            width = n if ROWS else 1
            where = rows3 if ROWS else rows3 * 0
            inside = (rows3 < n) & (g < G) & (half3 < 2)
            one = tl.load(scales + (base + half3) * width + where, inside, 0.0)
            two = tl.load(scales + (base + 1 - half3) * width + where, inside, 0.0)
            one = tl.where((half3 == 1) & (uw == q), -one, one)
            two = tl.where(tl.where(half3 == 0, q, uw) == 1, -two, two)
            total += tl.sum(tl.reshape(tl.sum(one * acc, 1), [BR, NC // 2, 2]), 2)
            total2 += tl.sum(tl.reshape(tl.sum(two * acc, 1), [BR, NC // 2, 2]), 2)
        else:
            total += tl.sum(acc, 1)
    rows = row0 + tl.arange(0, BR)
    tokens_here = first_token + tl.arange(0, NC // HALVES)
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
                total = tl.dot(a11.to(kind), x1, total, input_precision="ieee")
                if KIND == 0:
                    x2 = tl.load(x_at + m + j, inside, 0.0).to(kind)
                    total = tl.dot(a12.to(kind), x2, total, input_precision="ieee")
                    total2 = tl.dot(a21.to(kind), x1, total2, input_precision="ieee")
                    total2 = tl.dot(a22.to(kind), x2, total2, input_precision="ieee")
    inside = (row < n)[:, None] & (token < tokens)[None, :]
    _store(y, bias, places, total, total2, row, token, inside, n, tokens, y_stride, KIND, PLACES, SPLIT)


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
