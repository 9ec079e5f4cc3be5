"""Kernels that are compiled before a run on a GPU: a second process compiles none, and what does not fit is said.

This file, run as a script, calls two kernels on meta tensors as on an sm_90: in tests the kernels may be interpreted.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.gpu import warm

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> str:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    assert run("pack", folder).startswith(f"{folder / warm.ARCHIVE}: 2 kernels for sm_90, 0.")
    return folder


@pytest.fixture
def carried(packed: Path, tmp_path: Path) -> Path:
    """The archive alone, in another folder: an entry of Triton's cache names its files by absolute paths."""
    shutil.copyfile(packed / warm.ARCHIVE, tmp_path / warm.ARCHIVE)
    return tmp_path


@pytest.mark.slow
def test_a_second_process_compiles_nothing_even_by_another_build_of_the_same_triton(carried: Path) -> None:
    found = json.loads(run("use", carried))
    assert found == {"said": f"2 kernels found warm in {carried / warm.ARCHIVE}", "warm": 2, "compiled": 0}
    shutil.rmtree(carried / warm.FOLDER)
    assert json.loads(run("use", carried, "another libtriton"))["compiled"] == 0
    metadata = [json.loads(file.read_text()) for file in carried.glob(f"{warm.FOLDER}/*/[!_]*.json")]
    assert len({one["hash"] for one in metadata}) == 2
    (carried / warm.ARCHIVE).unlink()
    shutil.rmtree(carried / warm.FOLDER)
    found = json.loads(run("use", carried))
    assert (found["warm"], found["compiled"]) == (0, 2), "the count can tell"
    assert found["said"].startswith("no ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Triton", "ptxas", "Triton's Python sources", "architecture"])
def test_what_another_compiler_made_is_said_and_not_used(
    carried: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = warm.about("sm_90")
    assert set(here) >= {name}
    monkeypatch.setattr(warm, "about", lambda architecture: here | {name: "another"})
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    said = warm.install(carried, "sm_90")
    assert f"{name} {here[name]}, here another: not used, every kernel is compiled here" in said
    assert "TRITON_CACHE_DIR" not in os.environ
    assert not (carried / warm.FOLDER).exists()


@pytest.mark.slow
def test_what_is_carried_is_machine_code_and_what_describes_it(packed: Path) -> None:
    with ZipFile(packed / warm.ARCHIVE) as archive:
        assert {Path(name).suffix for name in archive.namelist()} == {".cubin", ".json"}
        assert len(archive.namelist()) == 1 + 2 * 2


def _launch() -> None:
    import torch

    from gain_ops.kernels import backend
    from gain_ops.kernels.recording import recording

    x, delta = torch.empty(64, 512, dtype=torch.bfloat16, device="meta"), torch.empty(512, device="meta")
    with recording("sm_90"):
        backend.backward(x, x, delta)


def _main(action: str, folder: Path, libtriton: str = "") -> None:
    if action == "pack":
        with warm.compiling_into(folder / warm.FOLDER) as keys:
            _launch()
        print(warm.pack(folder / warm.FOLDER, keys, "sm_90", folder / warm.ARCHIVE))
        return
    if libtriton:
        from triton.runtime import cache

        cache.triton_key = lambda: libtriton
    os.environ["TRITON_CACHE_DIR"] = str(folder / warm.FOLDER)
    said, count = warm.install(folder, "sm_90"), warm.Counter()
    _launch()
    print(json.dumps({"said": said, "warm": count.warm, "compiled": count.compiled}))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
