"""What is shipped, and that nothing of it shadows Hugging Face's ``kernels``."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_no_kernels_package_at_the_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in a wheel and in an sdist, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('out'); build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    (sdist,) = (source / "out").glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    return set(zipfile.ZipFile(wheel).namelist()), names


def test_the_wheel_holds_the_kernels_under_our_name_alone(archives: tuple[set[str], set[str]]) -> None:
    wheel, _ = archives
    assert {
        "gain_ops/__init__.py",
        "gain_ops/py.typed",
        "gain_ops/kernels/__init__.py",
        "gain_ops/kernels/rows.py",
    } <= wheel
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"gain_ops"}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "gain_ops").rglob("*.py")}
    assert ours <= wheel


def test_the_sdist_holds_what_a_build_and_a_reader_need(archives: tuple[set[str], set[str]]) -> None:
    _, sdist = archives
    expected = {
        "kernels/gain/__init__.py",
        "kernels/README.md",
        "LICENSE",
        "CHANGELOG.md",
        "tests/conftest.py",
        "setup.py",
    }
    assert expected <= sdist


@pytest.mark.parametrize("interpreter", [["-c"], ["-P", "-c"]])
def test_transformers_finds_its_own_kernels_package_from_the_root(interpreter: list[str]) -> None:
    """From the repository's root a kernels folder is on the path; transformers asks for a package of that name."""
    code = (
        "import sys\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available())\n"
        "from transformers import LlamaForCausalLM, Trainer\n"
        "import gain_ops, gain_ops.kernels\n"
        "print(gain_ops.kernels.__name__, getattr(sys.modules.get('kernels'), '__file__', None))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, *interpreter, code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False", "gain_ops.kernels", "None"]
