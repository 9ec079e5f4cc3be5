"""Maps the package folders and builds csrc/ where it is asked for; everything else is in pyproject.toml.

``kernels/`` at the root has no ``__init__.py`` (it would shadow Hugging Face's ``kernels``, which transformers imports);
the package inside it, ``kernels/gain``, is installed as ``gain_ops.kernels``. csrc/ is installed as ``gain_ops.csrc``, for
``python -m gain_ops.build``. GAIN_OPS_BUILD_CUDA=0|1|auto: gain_ops/build.py.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load_build() -> ModuleType:
    # by its path: importing the package would need torch
    spec = importlib.util.spec_from_file_location("gain_ops_build", ROOT / "gain_ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


def _parameters():
    """What is built, or None; GAIN_OPS_BUILD_CUDA=1 fails where anything is missing."""
    mode = build.mode()
    if mode == "0":
        return None
    try:
        parameters = build.parameters()
    except build.CannotBuild as reason:
        if mode == "1":
            sys.exit(f"GAIN_OPS_BUILD_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        print(f"gain_ops: left out the CUDA kernels: {reason}", file=sys.stderr)
        return None
    if mode == "1" and parameters.left_out:
        sys.exit(f"GAIN_OPS_BUILD_CUDA=1, but parts would be left out: {'; '.join(parameters.left_out)}")
    return parameters


class BuildCuda(build_ext):
    """Hands gain_ops._C to gain_ops/build.py."""

    def build_extension(self, ext: Extension) -> None:
        """Compile, or find compiled, and link to where setuptools wants it."""
        build.build(PARAMETERS, Path(self.get_ext_fullpath(ext.name)), build.object_folder())


class AbiWheel(bdist_wheel):
    """Tags the wheel for every Python from the limited API's on: the stable ABI of torch does the rest."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI, platform."""
        _, _, platform = super().get_tag()
        return ("cp311", "abi3", platform) if PARAMETERS else super().get_tag()


PARAMETERS = _parameters()

setup(
    packages=[
        *find_namespace_packages(include=["gain_ops", "gain_ops.*"]),
        "gain_ops.csrc",
        "gain_ops.csrc.sm90",
        "gain_ops.kernels",
    ],
    package_dir={"gain_ops": "gain_ops", "gain_ops.csrc": "csrc", "gain_ops.kernels": "kernels/gain"},
    package_data={
        "gain_ops.csrc": ["*.h", "*.cpp", "*.cu", "*.md"],
        "gain_ops.csrc.sm90": ["*.h", "*.cpp", "*.cu"],
        "gain_ops.kernels": ["tuned/*.json"],
    },
    exclude_package_data={"gain_ops.csrc": ["tests/*"]},
    ext_modules=[Extension("gain_ops._C", sources=[], py_limited_api=True)] if PARAMETERS else [],
    cmdclass={"build_ext": BuildCuda, "bdist_wheel": AbiWheel},
)
