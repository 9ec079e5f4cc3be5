"""Why a backend cannot run on a device in a dtype, or None: each answer is for the one who asked for it."""

import importlib.util

import torch

from gain_ops.backends import extension

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def of_triton(device_type: str, index: int | None, dtype: torch.dtype, by_name: bool) -> str | None:
    """Why Triton's kernels cannot run, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "gain-ops[triton]")'
    if importlib.util.find_spec("gain_ops.kernels") is None:
        return "gain_ops.kernels is missing: this is an uninstalled checkout (pip install -e .)"
    if obstacle := of_dtype(dtype):
        return obstacle
    import triton

    if by_name and device_type == "cpu" and triton.knobs.runtime.interpret:
        return None if dtype != torch.bfloat16 else "Triton's interpreter computes wrong bfloat16 dots"
    return of_device(device_type, index)


def of_cuda(device_type: str, index: int | None, dtype: torch.dtype, by_name: bool) -> str | None:
    """Why the compiled kernels cannot run, or None when they can."""
    if obstacle := of_dtype(dtype):
        return obstacle
    if device_type == "cuda" and torch.version.hip is not None:
        return "the kernels are CUDA's and this is ROCm (the triton backend serves it)"
    return of_device(device_type, index) or extension.obstacle()


def of_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute in this dtype, or None."""
    return None if dtype in _DTYPES else f"the kernels compute in bfloat16, float16 and float32, not {dtype}"


def of_device(device_type: str, index: int | None) -> str | None:
    """Why the kernels cannot run on this device, no GPU or one too old, or None."""
    if device_type != "cuda":
        return f"the kernels need a GPU and the tensors are on {device_type}"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        served = name.startswith(("gfx90a", "gfx94", "gfx95"))
        return (
            None if served else f"the kernels need an MI200 or later (gfx90a, gfx94x, gfx95x) and this device is {name}"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 and this device has {capability[0]}.{capability[1]}"
    return None
