"""What is on the disk is what gets installed, and every place that states a version states the same."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """constraints.txt: name -> version."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line]
    assert all(found), "constraints.txt has a line that is not name==version"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_every_folder_with_python_files_is_in_the_package_list() -> None:
    """setuptools leaves a folder that is not listed out of the wheel and says nothing."""
    on_disk = {"drivetrain"}
    for top in ("trainer", "strategies", "callbacks"):
        for path in (ROOT / top).rglob("*.py"):
            folder = path.parent.relative_to(ROOT)
            if folder != Path("trainer/drivetrain"):
                on_disk.add(".".join(["drivetrain", *folder.parts]))
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(on_disk)


def test_every_package_folder_has_an_init_file() -> None:
    folders = {path.parent for top in ("trainer", "strategies", "callbacks") for path in (ROOT / top).rglob("*.py")}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


def test_pyproject_and_face_have_one_version() -> None:
    tree = ast.parse((ROOT / "trainer/drivetrain/__init__.py").read_text())
    stated = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert stated == [PROJECT["project"]["version"]]


def test_the_newest_changelog_entry_is_of_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / ".github/CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == PROJECT["project"]["version"]


def test_the_console_script_exists() -> None:
    (script,) = entry_points(group="console_scripts", name="drivetrain")
    assert callable(script.load())


def requirements() -> list[str]:
    """What the library and its development extras name."""
    extras = PROJECT["project"]["optional-dependencies"]
    names = list(PROJECT["project"]["dependencies"])
    todo = ["dev"]
    while todo:
        for line in extras[todo.pop()]:
            requirement = Requirement(line)
            if requirement.name == "drivetrain":
                todo += requirement.extras
            else:
                names.append(line)
    return names


@pytest.mark.parametrize("line", requirements())
def test_what_pyproject_asks_for_is_pinned_and_the_pin_is_within_its_bounds(line: str) -> None:
    requirement = Requirement(line)
    pinned = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)


def test_the_environment_has_the_pinned_versions() -> None:
    """Otherwise a green run says nothing about constraints.txt. A local label (`+cpu`) is the same release."""
    differing = {}
    for name, pinned in pins().items():
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue  # pinned for another platform or Python
        if found != pinned:
            differing[name] = (found, pinned)
    assert not differing, "installed, pinned; run `make clean test`"


def test_the_parts_of_the_extra_all_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (all_of,) = extras["all"]
    assert Requirement(all_of).extras <= set(extras)
