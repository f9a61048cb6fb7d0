"""Every role says what it takes, and means it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rendering import PROJECT, ROLES

ROLE_FOLDERS = sorted(path for path in ROLES.iterdir() if path.is_dir())
#: Files of a role that may use a variable.
SOURCES = ("tasks/*.yml", "handlers/*.yml", "vars/*.yml", "templates/*", "defaults/*.yml")


def load(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def text_of(files: list[Path]) -> str:
    return "\n".join(path.read_text() for path in files if path.is_file())


@pytest.fixture(params=ROLE_FOLDERS, ids=lambda path: path.name)
def role(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    return folder


def test_argument_specs_equal_the_defaults(role: Path) -> None:
    defaults = load(role / "defaults" / "main.yml")
    options = load(role / "meta" / "argument_specs.yml")["argument_specs"]["main"].get("options", {})
    assert {name: option.get("default") for name, option in options.items() if "default" in option} == defaults
    assert set(defaults) <= set(options)


def test_every_entry_point_is_specified(role: Path) -> None:
    """Task files that another file includes are parts, all others are entry points and need a specification."""
    specified = set(load(role / "meta" / "argument_specs.yml")["argument_specs"])
    sources = text_of([*role.glob("tasks/*.yml")])
    files = {path.stem for path in role.glob("tasks/*.yml")}
    parts = {name for name in files if re.search(rf"_tasks: {name}\.yml", sources)}
    assert specified == files - parts


def test_every_default_is_used_and_explained(role: Path) -> None:
    used = text_of([path for pattern in SOURCES for path in role.glob(pattern)])
    everywhere = text_of(
        [
            *PROJECT.glob("templates/*"),
            *PROJECT.glob("playbooks/*.yml"),
            *[path for other in ROLE_FOLDERS for pattern in SOURCES for path in other.glob(pattern)],
        ]
    )
    lines = (role / "defaults" / "main.yml").read_text().splitlines()
    for name in load(role / "defaults" / "main.yml"):
        assert len(re.findall(rf"\b{name}\b", used + everywhere)) > 2, f"{name} is never used"
        index = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert lines[index - 1].startswith("#"), f"{name} has no comment"


def test_every_internal_variable_is_used(role: Path) -> None:
    own = text_of([*role.glob("tasks/*.yml"), *role.glob("vars/*.yml"), *PROJECT.glob("templates/*")])
    for name in set(re.findall(rf"^(__{role.name}\w+):", text_of([*role.glob("vars/*.yml")]), re.MULTILINE)):
        assert len(re.findall(rf"\b{name}\b", own)) > 1, f"{name} is never used"


def test_readme_says_what_the_role_does_not_do(role: Path) -> None:
    assert re.search(r"does \**not\** do", (role / "README.md").read_text())


def test_main_is_a_table_of_contents(role: Path) -> None:
    for task in yaml.safe_load((role / "tasks" / "main.yml").read_text()):
        assert set(task) & {"ansible.builtin.include_tasks", "ansible.builtin.import_tasks", "ansible.builtin.set_fact"}


def test_inventory_sets_only_variables_that_exist() -> None:
    known = {name for folder in ROLE_FOLDERS for name in load(folder / "defaults" / "main.yml")}
    for path in PROJECT.glob("inventory/**/group_vars/*/*.yml"):
        for name in load(path):
            assert name in known or name.startswith("ansible_"), f"{path.relative_to(PROJECT)}: {name}"


def test_a_boolean_is_one_also_when_it_comes_from_the_command_line() -> None:
    """`-e name=true` is text: Ansible refuses it as a condition, and "false" is true for a ternary.

    A module takes it as it is: its own argument is a boolean.
    """
    booleans = {
        name
        for folder in ROLE_FOLDERS
        for entry in load(folder / "meta" / "argument_specs.yml")["argument_specs"].values()
        for name, option in entry.get("options", {}).items()
        if option.get("type") == "bool"
    }
    assert booleans
    sources = [*PROJECT.glob("playbooks/*.yml"), *PROJECT.glob("templates/*"), *PROJECT.glob("inventory/**/*.yml")]
    sources += [path for folder in ROLE_FOLDERS for pattern in SOURCES for path in folder.glob(pattern)]
    for line in text_of(sources).splitlines():
        for name in set(re.findall(r"\b\w+_\w+\b", line)) & booleans:
            set_to = rf"^\s*{name}: |'{name}': |-e,? {name}="
            given = rf"^\s*#|{set_to}|: \"{{{{ {name} }}}}\"$|\b{name} is off|\b{name} \| bool\b"
            assert re.search(given, line), line
