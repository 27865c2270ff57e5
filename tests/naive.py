"""The published definitions, written once more and as plainly as possible: slow, float64, complex, with angles.

Written from the text of arXiv 2512.02901 alone and without a line of the library, so that the tests compare two
independent readings. Not valid on ties of the sectors: there an angle is at the mercy of its last bit.
"""

import math

import torch

UNITS = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)  # by sector, from angle 0 on
CODES = torch.tensor([1, 3, 0, 2], dtype=torch.uint8)  # 1, i, -1, -i in the library's numbering


def widely_linear(weight):
    """Find U and W by asking the matrix: R 1 = U + W on real unit vectors, R i = i (U - W) on imaginary ones."""
    weight = weight.double()
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    of_one = torch.complex(weight[:n, :m], weight[n:, :m])
    of_i = torch.complex(weight[:n, m:], weight[n:, m:])
    return (of_one - 1j * of_i) / 2, (of_one + 1j * of_i) / 2


def real_matrix(u, w):
    """Build R column by column as what y = U x + W conj(x) does to each basis vector."""
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    x = torch.cat((eye, 1j * eye), dim=1)
    y = u @ x + w @ x.conj()
    return torch.cat((y.real, y.imag))


def phase_stage(z):
    """Quantize complex z to (codes, (s_re, s_im), values, distance to the nearest tie)."""
    turned = (torch.angle(z) + math.pi / 4) % (2 * math.pi)
    sector = (turned / (math.pi / 2)).long().clamp(max=3)
    real_axis, imaginary_axis = sector % 2 == 0, sector % 2 == 1
    s_re = z.real[real_axis].abs().mean().item() if real_axis.any() else 0.0
    s_im = z.imag[imaginary_axis].abs().mean().item() if imaginary_axis.any() else 0.0
    s_re, s_im = max(s_re, 1e-6), max(s_im, 1e-6)
    values = UNITS[sector] * torch.where(real_axis, s_re, s_im)
    margin = torch.minimum((z.real + z.imag).abs(), (z.real - z.imag).abs())[z != 0]
    return CODES[sector], (s_re, s_im), values, margin.min().item() if margin.numel() else math.inf


def phase_quant(weight, stages):
    """Quantize a real matrix.

    Returns codes (T, 2, n, m), scales (T, 2, 2), the dense matrix in float64, and the least distance of any entry to
    a tie of the sectors.
    """
    parts, codes, scales, closest = [], [], [], math.inf
    for z in widely_linear(weight):
        total, of_codes, of_scales = torch.zeros_like(z), [], []
        for _ in range(stages):
            stage_codes, stage_scales, values, margin = phase_stage(z - total)
            total = total + values
            of_codes.append(stage_codes)
            of_scales.append(stage_scales)
            closest = min(closest, margin)
        parts.append(total)
        codes.append(torch.stack(of_codes))
        scales.append(torch.tensor(of_scales, dtype=torch.float64))
    return torch.stack(codes, dim=1), torch.stack(scales, dim=1), real_matrix(*parts), closest


def binary(weight):
    """Quantize to sign(w - mean w) * mean |w|."""
    weight = weight.double()
    return torch.sign(weight - weight.mean()) * weight.abs().mean()


def ternary(weight):
    """Quantize to round(w / mean |w|) in {-1, 0, 1}, times mean |w|."""
    weight = weight.double()
    scale = weight.abs().mean()
    return torch.round(weight / scale).clamp(-1, 1) * scale
