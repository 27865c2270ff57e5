"""CUDA C++ kernels, compiled when a layer is prepared by NVRTC, which every CUDA build of PyTorch brings along.

No compiler, no headers and no PyTorch extension: a source is a string, machine code comes back, the driver loads and
launches it. Both libraries are called by ctypes. Nothing here is imported before a kernel is asked for.

    kernel(source, name, device)(grid, threads, arguments, memory)

Kernels are compiled once in a process for each source and device, in a fraction of a second. `arguments` are ctypes
values, structures and arrays in the order of the kernel's parameters.
"""

import ctypes
import functools
import glob
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # what kernels are told of a dtype
SMALL = 48 << 10  # bytes of shared memory that need no leave
_DYNAMIC_MEMORY, _SHARED_PERCENT = 8, 9  # CU_FUNC_ATTRIBUTE_...
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_INVALID_CONTEXT = 201
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("_rest", ctypes.c_int * 15)]


class _Launch(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class CompilerError(RuntimeError):
    """A kernel could not be compiled; the message is the compiler's."""


def _candidates() -> list[str]:
    """Return paths and a name under which NVRTC may be found, the package that PyTorch brings along first."""
    name = f"libnvrtc.so.{(torch.version.cuda or '13').split('.')[0]}"
    places = [os.path.join(entry, "nvidia", "*", "lib", name) for entry in sys.path if entry]
    places += [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64", name)]
    return [*(path for place in places for path in sorted(glob.glob(place))), name]


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Return NVRTC.

    Raises:
        OSError: it is not there.
    """
    for path in _candidates():
        try:
            folder = os.path.dirname(path)
            for part in glob.glob(os.path.join(folder, "libnvrtc-builtins.so.*")) if folder else ():
                ctypes.CDLL(part, ctypes.RTLD_GLOBAL)  # which it looks for by name, in vain
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise OSError(f"NVRTC ({_candidates()[-1]}), which compiles them, is not found")


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the driver's library."""
    return ctypes.CDLL("libcuda.so.1")


def _check(error: int, what: str) -> None:
    if error:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(error, ctypes.byref(text))
        raise RuntimeError(f"{what}: {text.value.decode() if text.value else f'error {error}'}")


@functools.cache
def why_off(device: int, least: tuple[int, int] = (8, 0), below: tuple[int, int] | None = None) -> str | None:
    """Return None where kernels can be compiled and run, or why they cannot.

    Args:
        device: index of the GPU.
        least, below: the compute capability that they need, and the first that they do not run on.
    """
    if torch.version.cuda is None:
        return "there is no NVIDIA GPU that PyTorch can use"
    here = torch.cuda.get_device_capability(device)
    if here < least or (below is not None and here >= below):
        return f"they need a GPU of compute capability {least[0]}.{least[1]}{' or more' if below is None else ''}"
    try:
        driver()
        target = architecture(torch.device("cuda", device))
        compiled('extern "C" __global__ void nothing() {}', target)  # the compiler may be older than the GPU
    except (OSError, CompilerError) as error:
        return str(error)
    return None


def architecture(device: torch.device | None = None) -> str:
    """Return what the compiler calls a GPU, with what only that one has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def text(*names: str) -> str:
    """Return sources of this folder, one after the other."""
    return "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)


def defined(constants: Mapping[str, int]) -> str:
    """Return what a source is compiled for, to be put before it."""
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


def compiled(source: str, target: str, options: Sequence[str] = ()) -> bytes:
    """Return machine code of a source whose kernels are ``extern "C"``.

    Raises:
        CompilerError: with what the compiler said.
    """
    library = _nvrtc()
    given = [f"--gpu-architecture={target}", "--std=c++17", *options]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise CompilerError("NVRTC takes no program")
    try:
        failed = library.nvrtcCompileProgram(
            program, len(given), (ctypes.c_char_p * len(given))(*(o.encode() for o in given))
        )
        if failed:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise CompilerError(log.value.decode(errors="replace"))
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _own_context(device: int) -> None:
    """Make PyTorch's context of a GPU the thread's: a new thread has none."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    _check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


class Kernel:
    """A kernel that is loaded on a GPU.

    Attributes:
        early: whether blocks start before the kernel before them in the stream has ended: until they have passed
            ``griddepcontrol.wait`` they may only read what that kernel does not write.
    """

    def __init__(self, code: bytes, name: str, device: int, early: bool = False) -> None:
        self.device, self.early, self._memory, self._lock = device, early, SMALL, threading.Lock()
        self._attributes = ctypes.pointer(_Attribute(id=_EARLY, value=1))
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.init()
            _own_context(device)
            mode = ctypes.c_int(_RELAXED)  # a CUDA graph that is being captured should not mind
            _check(driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "loading while a graph is captured")
            try:
                _check(driver().cuModuleLoadData(ctypes.byref(self._module), code), f"loading {name}")
                found = driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
                _check(found, f"finding {name}")
            finally:
                driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def allow(self, memory: int) -> None:
        """Let blocks have so many bytes of dynamic shared memory; launches see to it themselves."""
        if memory <= self._memory:
            return
        with self._lock:  # another thread that asks for less must not have the last word
            if memory > self._memory:
                for which, value in ((_DYNAMIC_MEMORY, memory), (_SHARED_PERCENT, 100)):
                    _check(driver().cuFuncSetAttribute(self._function, which, value), f"{memory} bytes of memory")
                self._memory = memory

    def __call__(self, grid: Sequence[int], threads: int, arguments: Sequence[Any], memory: int = 0) -> None:
        """Launch on the current stream of the kernel's GPU."""
        self.allow(memory)
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        launch = _Launch(tuple(grid), (threads, 1, 1), memory, stream, self._attributes, int(self.early))
        for again in (True, False):
            error = driver().cuLaunchKernelEx(ctypes.byref(launch), self._function, addresses, None)
            if error != _INVALID_CONTEXT or not again:
                break
            _own_context(self.device)
        _check(error, "a launch")


@functools.cache
def kernel(source: str, name: str, device: int, options: tuple[str, ...] = (), early: bool = False) -> Kernel:
    """Compile and load a kernel, once in a process.

    Args:
        source: CUDA C++, the kernel in it ``extern "C"``.
        device: index of the GPU.
        early: as in :class:`Kernel`; for kernels with ``griddepcontrol.wait`` on GPUs of capability 9.0 and more.

    Raises:
        CompilerError, RuntimeError: it cannot be compiled, or not loaded.
    """
    return Kernel(compiled(source, architecture(torch.device("cuda", device)), options), name, device, early)
