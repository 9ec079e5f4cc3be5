"""Plants the faults of faults.toml, one at a time in a copy of the checkout, and says which of them the fast tests see.

    python tests/plant_faults.py             all of them, some 20 minutes
    python tests/plant_faults.py WORDS ...   those with one of these words in their name

First the named tests must pass without a fault. Then each fault is run against its own test files, and if it survives
those, against every fast test of their folders.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("faults.toml")

_SECONDS = 600  # for one run of tests: a fault may make a loop without an end
_PASSED, _FAILED, _NOT_COLLECTED = 0, 1, 2  # of pytest's exit codes


@dataclass(frozen=True)
class Fault:
    """A fault: ``text`` occurs once in ``file``, ``fault`` takes its place, and ``tests`` are to fail.

    Where nothing can see it, ``unseen`` says why.
    """

    name: str
    file: str
    text: str
    fault: str
    tests: tuple[str, ...]
    unseen: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of its tests; of a test at the top itself, whose folder is all tests."""
        return tuple(dict.fromkeys(test if test.count("/") == 1 else test.rpartition("/")[0] for test in self.tests))


def read_faults() -> list[Fault]:
    """The faults of the list."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["fault"]
    return [Fault(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


class Copy:
    """A copy of the checkout, uncommitted changes too, of which the tests import everything."""

    def __init__(self, root: Path) -> None:
        self._root = root
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        built = [str(path.relative_to(ROOT)) for path in (ROOT / "gain_ops").glob("*.so")]
        for name in (*names, *built):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        # an editable install finds the kernels in the checkout, unless they are where a plain install has them
        (root / "gain_ops" / "kernels").symlink_to(root / "kernels" / "gain")
        outside = {
            name: value for name, value in os.environ.items() if name != "CI"
        }  # there a slow machine fails tests
        self._environment = outside | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'studies'}"}
        for module in ("gain_ops", "gain_ops.kernels", "gain_study"):
            self._check_import(module)

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The copy with a fault in it."""
        path = self._root / fault.file
        content = path.read_text(encoding="utf-8")
        if content.count(fault.text) != 1:
            raise SystemExit(f"{fault.name}: its text occurs {content.count(fault.text)} times in {fault.file}")
        try:
            self._write(path, content.replace(fault.text, fault.fault))
            yield
        finally:
            self._write(path, content)

    def test(self, tests: Iterable[str]) -> tuple[str, str]:
        """Run their fast tests up to the first failure: "passed", "failed" or "hung", and the test that did not pass."""
        command = [sys.executable, "-m", "pytest", "-m", "not slow", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        try:
            run = subprocess.run(
                [*command, *tests],
                cwd=self._root,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "hung", ""
        if run.returncode not in (_PASSED, _FAILED, _NOT_COLLECTED):
            raise SystemExit(f"pytest ended with {run.returncode}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
        lines = (line for line in run.stdout.splitlines() if line.startswith(("FAILED ", "ERROR ")))
        failed = next((line.partition(" ")[2].partition(" - ")[0] for line in lines), "")
        return "passed" if run.returncode == _PASSED else "failed", failed

    def _write(self, path: Path, content: str) -> None:
        path.write_text(content, encoding="utf-8")
        # Python takes compiled code for current by the second and the size of the source
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def _check_import(self, module: str) -> None:
        code = f"import importlib.util; print(importlib.util.find_spec({module!r}).origin)"
        run = [sys.executable, "-c", code]
        found = subprocess.run(run, cwd=self._root, env=self._environment, capture_output=True, text=True, check=True)
        if not Path(found.stdout.strip()).is_relative_to(self._root):
            raise SystemExit(f"{module} is imported from {found.stdout.strip()}, not from the copy {self._root}")


def main(words: Sequence[str]) -> None:
    """Run the faults, or those with one of the words in their name; exit status 1 if one survives that should not."""
    faults = [fault for fault in read_faults() if not words or any(word in fault.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder).resolve())
        for test in sorted({test for fault in faults for test in fault.tests}):
            outcome, where = copy.test([test])
            if outcome != "passed":
                raise SystemExit(f"without a fault {test} {outcome}: {where}")
        survived = []
        for number, fault in enumerate(faults, 1):
            started = time.monotonic()
            with copy.planted(fault):
                outcome, where = copy.test(fault.tests)
                if outcome == "passed":
                    outcome, where = copy.test(fault.folders)
            if outcome == "passed":
                survived.append(fault)
            verdict = f"caught by {where or 'the clock'}" if outcome != "passed" else "SURVIVED"
            seconds = time.monotonic() - started
            print(f"{number:3}/{len(faults)} {seconds:4.0f} s  {fault.name}: {verdict}", flush=True)
    print(f"caught {len(faults) - len(survived)} of {len(faults)}")
    for fault in survived:
        print(f"survived: {fault.name}" + (f" ({fault.unseen})" if fault.unseen else ""))
    sys.exit(any(fault.unseen is None for fault in survived))


if __name__ == "__main__":
    main(sys.argv[1:])
