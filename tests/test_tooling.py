"""Who checks the code elsewhere: the same tools, versions and targets as here."""

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def _read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize(("repository", "package"), [("ruff-pre-commit", "ruff"), ("clang-format", "clang-format")])
def test_pre_commit_has_the_versions_that_ci_pins(repository: str, package: str) -> None:
    (found,) = [repo for repo in _read(".pre-commit-config.yaml")["repos"] if repo["repo"].endswith(repository)]
    assert found["rev"] == f"v{PINS[package]}"


def test_the_workflow_runs_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = _read(".github/workflows/ci.yml")["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert set(jobs) == {"lint", "fast", "full", "wheel"}
    assert {"lint", "docs", "test", "test-full"} <= set(re.findall(r"\bmake ([\w-]+)", " ".join(commands))) <= targets


def test_the_workflow_tests_the_oldest_and_the_newest_torch() -> None:
    matrix = _read(".github/workflows/ci.yml")["jobs"]["fast"]["strategy"]["matrix"]
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert matrix["torch"] == [PINS["torch"]]
    assert [one["torch"] for one in matrix["include"]] == [f"{oldest}.0"]
    assert set(matrix["python"]) == set(re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()))
