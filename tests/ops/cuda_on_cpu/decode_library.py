"""ops/cuda/decode.cu and several.cu compiled for the processor, by g++ and decode_on_cpu.h, in place of GPU kernels."""

import ctypes
import dataclasses
import functools
import hashlib
import subprocess
from pathlib import Path

import torch

from fairy2i.ops.cuda import decode

HERE = Path(__file__).parent
RUN = """
extern "C" void run(int grid, int bytes, const Arguments *given) {
    Arguments a = *given;
    const long results = ((a.tokens - 1) * a.y_stride + 2 * a.n) * SIZE;
    a.x = guarded(a.x, ((a.tokens - 1) * a.x_stride + 2 * a.m) * SIZE);
    a.scales = guarded(a.scales, 8 * PAIRS * a.scale_width);
    a.bias = guarded(a.bias, 2 * a.n * (a.bias_kind == 1 ? 4 : 2));
    a.places = guarded(a.places, 8 * a.n);
    a.y = guarded(a.y, results);
    run_blocks(grid, RANGES, THREADS, bytes, [=] { multiply_few(a); });
    give_back(given->y, a.y, results);
}
"""


@functools.cache
def _library(source, folder):
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    (folder / f"{name}.cpp").write_text(source + RUN)
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{HERE}"]
    subprocess.run(["g++", *options, folder / f"{name}.cpp", "-o", folder / f"{name}.so"], check=True)
    return ctypes.CDLL(str(folder / f"{name}.so"))


def ready(folder, default):
    """Return what stands in for ``decode._ready``; libraries go into a folder. By default in clusters of two blocks."""

    def stand_in(shape, stages, tokens, dtype, aligned, device, config):
        several = tokens > 2 and dtype != torch.float32
        config = config or dataclasses.replace(default, halves=several, ranges=2 if several else 1)
        found = decode._planned(shape, stages, tokens, dtype, decode.chip(device), config)
        run = _library(decode.source(shape, stages, dtype, aligned, decode.chip(device).hopper, found), folder).run
        return lambda grid, _, given, memory: run(grid[0], memory, ctypes.byref(given[0])), found

    return stand_in
