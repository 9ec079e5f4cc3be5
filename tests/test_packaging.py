"""What is shipped, and that nothing of it shadows Hugging Face's ``kernels``."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_no_kernels_package_at_the_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_what_an_install_asks_for() -> None:
    """torch in a range, so that none is replaced; numpy, which safetensors needs to write and does not ask for."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert asked == ["torch>=2.10", "safetensors>=0.4", "numpy>=1.26"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist, built from a copy: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("build") / "source"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('out'); build_wheel('out')"
    environment = os.environ | {"GAIN_OPS_BUILD_CUDA": "0"}
    subprocess.run([sys.executable, "-c", build], cwd=source, env=environment, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    (sdist,) = (source / "out").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked: what a plain, not editable, install puts on the path."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(archives[0]).extractall(folder)
    return folder


def test_the_wheel_holds_the_kernels_under_our_name_alone(archives: tuple[Path, Path]) -> None:
    wheel = set(zipfile.ZipFile(archives[0]).namelist())
    assert {
        "gain_ops/__init__.py",
        "gain_ops/py.typed",
        "gain_ops/kernels/__init__.py",
        "gain_ops/kernels/rows.py",
        "gain_ops/csrc/rows.cu",
        "gain_ops/csrc/sm90/linear_bfloat16.cu",
    } <= wheel
    assert not [name for name in wheel if name.endswith(".so") or "csrc/tests" in name]
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"gain_ops"}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "gain_ops").rglob("*.py")}
    assert ours <= wheel


def test_the_sdist_holds_what_a_build_and_a_reader_need(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[1]) as tar:
        sdist = {name.partition("/")[2] for name in tar.getnames()}
    expected = {
        "kernels/gain/__init__.py",
        "kernels/README.md",
        "csrc/linear_sm90.h",
        "csrc/tests/test_plan.cpp",
        "LICENSE",
        "CHANGELOG.md",
        "tests/conftest.py",
        "setup.py",
    }
    assert expected <= sdist


def test_the_wheel_of_the_study_holds_its_tables_of_items(tmp_path: Path) -> None:
    source = tmp_path / "studies"
    shutil.copytree(ROOT / "studies", source, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "build"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    assert "gain_study/engine/items.toml" in zipfile.ZipFile(wheel).namelist()


_UNHARMED = """
import sys
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
from transformers import LlamaForCausalLM, Trainer
import gain_ops
print(gain_ops.__file__, getattr(sys.modules.get("kernels"), "__file__", None))
"""


def _from_the_root(*arguments: str, path: Path | None = None) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", [["-c"], ["-P", "-c"]])
def test_transformers_is_unharmed_from_the_root_with_an_editable_install(interpreter: list[str]) -> None:
    """From the repository's root a kernels folder is on the path, and transformers asks for a package of that name."""
    assert _from_the_root(*interpreter, _UNHARMED) == ["False", str(ROOT / "gain_ops" / "__init__.py"), "None"]
    assert _from_the_root(*interpreter, "import gain_ops.kernels as k; print(k.__name__)") == ["gain_ops.kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", [["-c"], ["-P", "-c"]])
def test_transformers_is_unharmed_from_the_root_with_a_plain_install(interpreter: list[str], installed: Path) -> None:
    where = installed if "-P" in interpreter else ROOT  # without -P the root itself comes first
    assert _from_the_root(*interpreter, _UNHARMED, path=installed) == [
        "False",
        str(where / "gain_ops" / "__init__.py"),
        "None",
    ]
    code = "import gain_ops.kernels as k; print(k.__file__)"
    assert _from_the_root("-P", "-c", code, path=installed) == [str(installed / "gain_ops" / "kernels" / "__init__.py")]


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "import importlib.util as u; print(u.find_spec('kernels').origin)"
    assert _from_the_root("-c", code, path=tmp_path) == [str(tmp_path / "kernels" / "__init__.py")]
