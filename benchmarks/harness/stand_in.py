"""A CUDA driver that does nothing: Triton's own launcher runs where there is no GPU, and its host cost can be measured.

libcuda.so.1 is compiled from the lines below with ``cc`` and loaded: every call succeeds at once. Triton binds, compiles, fills
descriptors and packs arguments as on an H100. Tensors are on the CPU, and a launch leaves its results unwritten.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from gain_ops.ops import dispatch

# attributes of a device: 8, 97 shared memory; 16 multiprocessors. Of a function: 0 the most threads
SOURCE = """
#define OK(name) int name(void) { return 0; }
OK(cuInit) OK(cuCtxSetCurrent) OK(cuCtxGetLimit) OK(cuCtxSetLimit) OK(cuModuleUnload) OK(cuFuncSetAttribute)
OK(cuFuncSetCacheConfig) OK(cuLaunchKernelEx) OK(cuStreamIsCapturing) OK(cuTensorMapEncodeTiled) OK(cuPointerGetAttributes)
OK(cuTensorMapEncodeIm2col) OK(cuOccupancyMaxActiveClusters)
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *v) { *v = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuModuleLoadData(void **m, const void *x) { *m = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)1; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : 0; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 16 ? 132 : a == 8 || a == 97 ? 232448 : 1; return 0; }
int cuPointerGetAttribute(unsigned long long *v, int a, unsigned long long p) { *v = p; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "none"; return 0; }
"""


def obstacle() -> str | None:
    """Why it cannot stand in here, or None."""
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: interpreted kernels are not launched"
    if shutil.which("cc") is None:
        return "there is no cc to compile it with"
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return None if _loaded.cache_info().currsize else "this machine has a CUDA driver"
    return None


@contextlib.contextmanager
def driver(folder: Path) -> Iterator[None]:
    """Make it Triton's driver, and let backend="triton" take CPU tensors; libcuda.so.1 is compiled in the folder."""
    if reason := obstacle():
        raise RuntimeError(f"the driver that does nothing cannot stand in: {reason}")
    _loaded(folder)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    target = GPUTarget("cuda", 90, 32)
    with (
        mock.patch.object(triton.runtime.driver, "_active", None),
        mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": str(folder)}),
        mock.patch.dict(dispatch._OBSTACLES, {"triton": lambda *_: None}),
    ):
        active = CudaDriver()
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda device: 0
        active.get_current_target = lambda: target
        triton.runtime.driver.set_active(active)
        dispatch.forget()
        try:
            yield
        finally:
            dispatch.forget()


@functools.cache
def _loaded(folder: Path) -> ctypes.CDLL:
    library = folder / "libcuda.so.1"
    source = folder / "libcuda.c"
    source.write_text(SOURCE)
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(
        str(library), ctypes.RTLD_GLOBAL
    )  # its name is then taken: whoever asks for libcuda.so.1 gets it
