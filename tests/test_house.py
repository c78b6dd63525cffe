"""What the papers say is true: README snippets run, examples run, doctests pass, every folder is introduced to the reader."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("trainer", "strategies", "callbacks")
EXAMPLES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py"))
QUICK = {"examples/01_quickstart.py"}
"""Runs in the fast suite too; the others are slow, for each starts its own interpreter and torch."""


def snippets(paper: str) -> list[tuple[int, str]]:
    """(line, code) of each ```python block; a block that is only a part of a program is fenced as ```py and not run."""
    path = ROOT / paper
    text = path.read_text() if path.exists() else ""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


def run(command: list[str], folder: Path) -> str:
    """Run a program as a user would, in an empty folder; fail with its output."""
    env = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize(("line", "code"), [pytest.param(line, code, id=f"line{line}") for line, code in snippets("README.md")])
def test_readme_snippets_run(line: int, code: str, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text("\n" * (line - 1) + code)  # so that a traceback has README's line
    run([sys.executable, str(script)], tmp_path)


@pytest.mark.parametrize("example", [pytest.param(e, marks=[] if e in QUICK else pytest.mark.slow) for e in EXAMPLES])
def test_examples_run(example: str, tmp_path: Path) -> None:
    run([sys.executable, str(ROOT / example), "--max-steps", "2"], tmp_path)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_opens_with_what_it_shows(example: str) -> None:
    first = (ROOT / example).read_text().split("\n", 1)[0]
    assert first.startswith('"""')
    assert len(first) > 20


def modules_with_doctests() -> list[str]:
    found = []
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT).with_suffix("").parts
                parts = parts[1:] if parts[:2] == ("trainer", "drivetrain") else ("drivetrain", *parts)
                found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_doctests())
def test_doctests_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("top", TOPS)
def test_each_folder_and_file_is_named_in_the_folders_readme(top: str) -> None:
    """A newcomer finds where a thing lives by reading one page."""
    text = (ROOT / top / "README.md").read_text()
    paths = sorted(path for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py")
    missing = {path.parent.name + "/" for path in paths if path.parent != ROOT / top and path.parent.name + "/" not in text}
    missing |= {path.name for path in paths if path.parent == ROOT / top and path.name not in text}
    assert not missing


@pytest.mark.parametrize("top", TOPS)
def test_a_folders_readme_names_no_file_that_is_not_there(top: str) -> None:
    text = (ROOT / top / "README.md").read_text()
    there = {path.name for folder in (*TOPS, "tests", "examples") for path in (ROOT / folder).rglob("*.py")}
    assert sorted(set(re.findall(r"[\w/]*?(\w+\.py)\b", text)) - there) == []


def test_the_root_readme_opens_with_the_two_commands_and_names_the_folders() -> None:
    text = (ROOT / "README.md").read_text()
    head = "\n".join(text.splitlines()[:30])
    assert "make demo" in head
    assert "make test" in head
    assert [top for top in (*TOPS, "tests", "examples") if f"{top}/" not in text] == []


def test_the_top_level_holds_what_the_design_lists_and_nothing_else() -> None:
    git = ["git", "-C", str(ROOT), "ls-files", "--cached"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout: this tree is not one")
    allowed = {"pyproject.toml", "README.md", "trainer", "strategies", "callbacks", "tests", "examples", ".ci", ".github"}
    allowed |= {"Makefile", "constraints.txt", "LICENSE", ".pre-commit-config.yaml", ".gitignore"}
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= allowed


def test_tests_lie_where_what_they_test_lies() -> None:
    """tests/strategies/test_x.py is about strategies/...; the house rules themselves lie at the top."""
    folders = {path.parent.relative_to(ROOT / "tests").parts[:1] for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= {(), *((top,) for top in TOPS)}
