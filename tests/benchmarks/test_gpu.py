"""The one command for a GPU: order, resuming, cutting, what hangs or breaks, and what a red proof marks."""

import contextlib
import dataclasses
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import gpu, odd_shapes, parts, proof
from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.suites import blocks
from gain_ops.backends.interface import OPS
from gain_ops.ops import raw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).resolve().parents[2]
ROW = Row("op", "site", "-", "eager", "time", "us", "float32", 1, 1, 1, 2.0, 1.0, 3.0, 5)
NAMES = ("environment", "proof", "ops", "layers")


def adding(row: Row, folder: Path) -> str:
    """Python without torch, which takes seconds to import, that adds a row to a results file."""
    results.append(folder / "one.csv", [row])
    header, line = (folder / "one.csv").read_text().splitlines(keepends=True)
    (folder / "one.csv").unlink()
    return (
        f"file = out / 'results.csv'; fresh = not file.exists(); file.open('a').write({header!r} * fresh + {line!r})\n"
    )


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Python that stands in for a part, by its name, after it has noted that it ran; by default it adds a row."""
    scripts: dict[str, str] = {}

    def command(part: gpu.Part, out: Path, seconds: float) -> list[str]:
        note = (
            f"from pathlib import Path; out = Path({str(out)!r}); print({part.name!r}, file=(out / 'ran').open('a'))\n"
        )
        row = dataclasses.replace(ROW, group=part.name, median=1.0)
        return [sys.executable, "-c", note + scripts.get(part.name, adding(row, tmp_path_factory.mktemp("row")))]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "prepared", contextlib.nullcontext)
    monkeypatch.setattr(gpu, "find_warm", lambda carried: f"looked in {carried}")
    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name, 0.5, lambda *_: iter(())) for name in NAMES))
    return scripts


def ran(out: Path) -> list[str]:
    """The parts that were started since the last question."""
    names = (out / "ran").read_text().split() if (out / "ran").exists() else []
    (out / "ran").unlink(missing_ok=True)
    return names


def ended(out: Path) -> dict[str, str]:
    return {row.site: row.metric for row in results.read([out / "results.csv"]) if row.group == "part"}


def test_every_part_in_order_each_with_its_end(said: dict[str, str], tmp_path: Path) -> None:
    assert gpu.run(tmp_path, 1.0, resume=False)
    assert ran(tmp_path) == [*NAMES]
    rows = results.read([tmp_path / "results.csv"])
    assert [row.group for row in rows] == [name for part in NAMES for name in (part, "part")]
    assert ended(tmp_path) == dict.fromkeys(NAMES, gpu.FINISHED)
    assert all(row.median > 0 and row.unit == "s" for row in rows if row.group == "part")


def test_what_breaks_or_hangs_takes_no_other_with_it(
    said: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 3.0)
    said["environment"] = "import sys; print('boom', file=sys.stderr); sys.exit(3)"
    said["ops"] = (
        adding(ROW, tmp_path) + "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name, 0.001, lambda *_: iter(())) for name in NAMES))
    assert not gpu.run(tmp_path, 1.0, resume=False)
    assert ran(tmp_path) == [*NAMES]
    assert ended(tmp_path) == {"environment": "failed", "proof": "finished", "ops": "failed", "layers": "finished"}
    assert ROW in results.read([tmp_path / "results.csv"]), "what it had measured stays"
    assert "boom" in (tmp_path / "log.txt").read_text()
    printed = capsys.readouterr().out
    assert "environment: failed" in printed
    assert "exit status 3" in printed
    assert "stopped after 3 s" in printed


def test_resume_goes_on_and_comes_back_to_what_failed(said: dict[str, str], tmp_path: Path) -> None:
    said["environment"] = "import sys; sys.exit(1)"
    gpu.run(tmp_path, 1.0, resume=False)
    ran(tmp_path)
    del said["environment"]
    cut = dataclasses.replace(ROW, group="part", site="layers", metric=gpu.CUT)
    results.append(tmp_path / "results.csv", [cut])
    assert gpu.run(tmp_path, 1.0, resume=True)
    assert ran(tmp_path) == ["layers", "environment"]
    assert gpu.run(tmp_path, 1.0, resume=True)
    assert ran(tmp_path) == []
    gpu.run(tmp_path, 1.0, resume=False)
    assert ran(tmp_path) == [*NAMES]


def test_another_run_can_be_gone_on_with_in_an_empty_folder(said: dict[str, str], tmp_path: Path) -> None:
    first, file, again = tmp_path / "first", tmp_path / "kept.csv", tmp_path / "again"
    gpu.run(first, 1.0, resume=False)
    (first / "tuned.json").write_text("{}")
    rows = [row for row in results.read([first / "results.csv"]) if row.site != "layers"]
    (first / "results.csv").unlink()
    results.append(first / "results.csv", rows)
    results.append(file, rows)
    for source in (first, file):
        assert gpu.run(again, 1.0, resume=False, resume_from=source)
        assert ran(again) == ["layers"]
        assert results.read([again / "results.csv"])[: len(rows)] == rows
    assert (again / "tuned.json").exists()
    with pytest.raises(FileNotFoundError):
        gpu.run(again, 1.0, resume=False, resume_from=tmp_path / "none.csv")


@pytest.mark.slow
def test_the_clock_cuts(said: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said["proof"] = "import time; time.sleep(60)"
    started = time.monotonic()
    assert gpu.run(tmp_path, 6 / 60, resume=False)
    assert time.monotonic() - started < 30
    assert ended(tmp_path) == {"environment": "finished", "proof": "cut"}
    assert "layers: no time left" in capsys.readouterr().out
    assert [part.name for part in gpu.order(results.read([tmp_path / "results.csv"]))] == ["proof", "ops", "layers"]


@pytest.mark.parametrize("step", ["memcheck", "initcheck"])
def test_a_red_proof_stops_nothing_and_marks_the_run(
    said: dict[str, str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    step: str,
) -> None:
    red = dataclasses.replace(ROW, group="proof", site=step, median=0.0, note="1 error | at 0x0")
    said["proof"] = adding(red, tmp_path_factory.mktemp("red"))
    assert not gpu.run(tmp_path, 1.0, resume=False)
    assert ran(tmp_path) == [*NAMES]
    words = f"{gpu.RED}{step}: 1 error | at 0x0"
    printed = capsys.readouterr()
    assert words in printed.out
    assert words in printed.err
    assert (tmp_path / "report.md").read_text().startswith(f"**{words}**")
    rows = results.read([tmp_path / "results.csv"])
    (mark,) = (row for row in rows if row.group == "mark")
    assert (mark.median, mark.note) == (0.0, f"{step}: 1 error | at 0x0")
    assert rows.index(mark) < next(i for i, row in enumerate(rows) if row.group == "ops"), (
        "before what was timed under it"
    )


def test_a_red_proof_is_made_again_and_the_mark_is_taken_back(
    said: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    red = dataclasses.replace(ROW, group="proof", site="memcheck", median=0.0, note="1 error")
    said["proof"] = adding(red, tmp_path_factory.mktemp("red"))
    assert not gpu.run(tmp_path, 1.0, resume=False)
    ran(tmp_path)
    said["proof"] = adding(dataclasses.replace(red, median=1.0), tmp_path_factory.mktemp("green"))
    assert gpu.run(tmp_path, 1.0, resume=True)
    assert ran(tmp_path) == ["proof"]
    marks = [row.median for row in results.read([tmp_path / "results.csv"]) if row.group == "mark"]
    assert marks == [0.0, 1.0]
    assert gpu.RED not in (tmp_path / "report.md").read_text()


def test_the_carried_kernels_are_looked_for_in_the_results_folder_or_where_it_is_said(
    said: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said["environment"] = adding(dataclasses.replace(ROW, group="triton", site="environment", note="3 warm"), tmp_path)
    gpu.run(tmp_path, 1.0, resume=False)
    printed = capsys.readouterr().out
    assert f"looked in {tmp_path}" in printed
    assert "Triton, environment: 3 warm" in printed
    gpu.run(tmp_path, 1.0, resume=True, carried=Path("elsewhere"))
    assert "looked in elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize("installs", [True, False])
def test_where_pip_cannot_install_a_link_makes_the_kernels_importable_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gain_ops").mkdir()
    (tmp_path / "kernels" / "gain").mkdir(parents=True)
    (tmp_path / "kernels" / "gain" / "__init__.py").touch()
    link = tmp_path / "gain_ops" / "kernels"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "gain_ops.kernels" else object())
    ended = subprocess.CompletedProcess([], int(not installs), "", "error\ninvalid pyproject.toml config")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *of, **options: ended)
    seen = []
    with contextlib.suppress(ZeroDivisionError), gpu.prepared(tmp_path):
        seen.append((link / "__init__.py").exists())
        seen.append(1 // 0)
    assert seen == [not installs]
    assert not link.is_symlink()
    assert ("invalid pyproject.toml config" in capsys.readouterr().out) is not installs
    assert (tmp_path / "kernels" / "gain" / "__init__.py").exists()


def test_without_a_gpu_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="python -m benchmarks run"):
        gpu.run(tmp_path, 1.0, resume=False)


def test_a_part_is_found_by_its_name_and_flushes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run(budget_s: float, before: list[Row], out: Path):
        given.append((budget_s, before, out))
        yield ROW
        assert results.read([tmp_path / "results.csv"])[-1] == ROW
        raise RuntimeError("after its first row")

    monkeypatch.setattr(parts, "PARTS", (parts.Part("one", 1.0, run),))
    for before in ([], [ROW]):
        with pytest.raises(RuntimeError, match="after its first row"):
            parts.main("one", tmp_path, 7.0)
        assert given[-1] == (7.0, before, tmp_path)


def test_what_the_targets_ask_for_comes_first_and_every_part_once() -> None:
    names = [part.name for part in parts.PARTS]
    assert len(set(names)) == len(names)
    places = [place.site for place in blocks.PLACES]
    asked = ["proof", "ceilings", "wall time of blocks", "variants 8192", "ops 8192", places[0], "products"]
    asked += [*places[1:], "layers 8192", "peaks of steps"]
    assert [name for name in names if name in asked] == asked
    assert max(names.index(name) for name in asked) < names.index("tuning")
    left = 1.0
    for part in parts.PARTS[: names.index("layers 8192")]:
        left -= part.share * left
    assert left > 0.1, "shares are of what is left: the later parts must have some"
    assert [site.name for site in parts.ORDERED[:4]] == [
        "Llama-3-8B o_proj",
        "Llama-3-8B down_proj",
        "GPT-2 Large o_proj",
        "GPT-2 Large down_proj",
    ]
    assert sorted(map(str, parts.ORDERED)) == sorted(map(str, parts.sites.SITES))


def test_a_part_that_was_cut_goes_on_with_the_next_site() -> None:
    key = ("layer", "frozen linear", "forward+backward", 8192)
    done = dataclasses.replace(
        ROW, group="layer", site=parts.ORDERED[0].name, contestant=key[1], metric=key[2], tokens=8192
    )
    assert parts._not_yet([done], *key) == parts.ORDERED[1:]
    for other in ({"median": None}, {"tokens": 2048}, {"metric": "peak"}, {"group": "variant"}):
        assert parts._not_yet([dataclasses.replace(done, **other)], *key) == parts.ORDERED


def test_only_what_is_not_green_is_proved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(proof, "steps", lambda limit, names: asked.append(names) or iter(()))
    rows = [
        dataclasses.replace(ROW, group="proof", site=s, median=m) for s, m in (("memcheck", 0.0), ("memcheck", 1.0))
    ]
    prove = parts._proof(proof.PARITY, *proof.TOOLS)
    list(prove(1.0, rows, Path()))
    assert asked.pop() == [proof.PARITY, "racecheck", "initcheck", "synccheck"]
    red = dataclasses.replace(rows[0], site=proof.DRAWN)
    list(prove(1.0, [red], Path()))
    assert proof.DRAWN in asked[0], "a step that was red, whichever part made it"
    list(prove(1.0, [dataclasses.replace(rows[1], site=s) for s in (proof.PARITY, *proof.TOOLS)], Path()))
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_what_the_sanitizers_watch_is_every_op(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in OPS:
        op = getattr(raw, name)
        monkeypatch.setattr(raw, name, lambda *of, name=name, op=op: called.append(name) or op(*of))
    for t, i, o in odd_shapes.SHAPES[:3]:
        called.clear()
        odd_shapes.call("triton", torch.float32, DEVICE, t, i, o, transposed)
        assert called == [*OPS]


def test_every_step_of_the_proof_is_made_by_some_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    monkeypatch.setattr(proof, "steps", lambda limit, names: asked.update(names) or iter(()))
    for part in parts.PARTS:
        if "proof" in part.name:
            list(part.run(1.0, [], Path()))
    assert asked == {*proof.STEPS} >= {*proof.REPEATED}
    text = (ROOT / "tests" / "backends" / "test_parity.py").read_text()
    assert f"def {proof._DRAWN}(" in text


def test_memcheck_alone_runs_beside_the_tests_of_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, spared = [], []
    monkeypatch.setattr(proof, "steps", lambda limit, names: asked.append(names) or iter(()))
    (first,) = (part for part in parts.PARTS if part.name == "proof")
    list(first.run(1.0, [], Path()))
    assert asked == [[proof.PARITY, "memcheck"]]
    monkeypatch.undo()
    monkeypatch.setattr(proof, "sanitizer", lambda tool, limit: proof.Outcome(tool, True, ""))
    monkeypatch.setattr(
        proof, "tests", lambda step, limit, cores: spared.append(cores) or proof.Outcome(step, True, "")
    )
    for names in asked[0], proof.STEPS:
        list(proof.steps(1.0, names))
    assert spared == [1, 4, 4]


def test_a_tool_that_is_missing_is_neither_red_nor_green(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof.shutil, "which", lambda name: None)
    assert proof.sanitizer("memcheck", 1.0) == proof.Outcome("memcheck", None, "compute-sanitizer is not installed")


def test_steps_run_side_by_side_and_what_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\ncase $2 in racecheck) sleep 60;; initcheck) echo bad; exit 99;; *) echo 0 errors;; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    started = time.monotonic()
    found = {outcome.step: outcome for outcome in proof.steps(2.0, proof.TOOLS)}
    assert time.monotonic() - started < 10
    assert {step: outcome.green for step, outcome in found.items()} == {
        "memcheck": True,
        "racecheck": None,
        "initcheck": False,
        "synccheck": True,
    }
    assert found["racecheck"].summary == "not finished in 2 s"
    assert found["initcheck"].details == ("bad",)


@pytest.mark.parametrize(("body", "green"), [("assert True", True), ("assert False, 'no'", False)])
def test_the_tests_of_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, green: bool) -> None:
    file = tmp_path / "test_one_of_the_proof.py"
    file.write_text(f"def test_it():\n    {body}\n")
    monkeypatch.setattr(proof, "TESTS", (str(file),))
    find = importlib.util.find_spec  # workers would take longer to start than the test
    monkeypatch.setattr(proof.importlib.util, "find_spec", lambda name: None if name == "xdist" else find(name))
    outcome = proof.tests(proof.PARITY, 120.0, 1)
    assert (outcome.step, outcome.green) == (proof.PARITY, green), outcome
    assert ("passed" in outcome.summary) is green
    assert len(outcome.details) == (not green)
    assert proof.tests(proof.DRAWN, 120.0, 0).green is False, "no test of drawn shapes is in this file: not a proof"


def test_without_hypothesis_the_other_tests_of_a_file_run(tmp_path: Path) -> None:
    file = tmp_path / "test_drawn.py"
    file.write_text(
        "from hypothesis import given, settings\n"
        "from hypothesis import strategies as st\n"
        "@settings(max_examples=2, deadline=None)\n"
        "@given(n=st.integers(1, 2), data=st.data())\ndef test_drawn(n, data): assert 0\n"
        "@given(st.lists(st.booleans()))\ndef test_more(found): assert 0\n"
        "def test_plain(): assert True\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.gpu.without_hypothesis",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-p", "no:hypothesispytest", "-p", "no:xdist", "--rootdir", str(tmp_path), str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 passed, 2 skipped" in run.stdout, run.stdout + run.stderr
