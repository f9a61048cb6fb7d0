"""The runbooks: one page a verb, in both languages, with commands that can be typed as they stand."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.findings import CATALOGUE

import preflight_report
from rendering import PROJECT, ROLES
from runbooks import BLOCK, PLACEHOLDERS, RUNBOOKS, Command, commands

#: What an operator runs; the lab is no part of production.
VERBS = sorted(path.stem for path in PROJECT.glob("playbooks/*.yml") if not path.stem.startswith("lab"))
ENVIRONMENT = set(
    yaml.safe_load((PROJECT / "inventory" / "group_vars" / "ascend910" / "vllm_service.yml").read_text())[
        "vllm_service_environment"
    ]
)
PAGES = sorted(RUNBOOKS.glob("*.md"))


def lines(page: Path) -> list[str]:
    return "".join(BLOCK.findall(page.read_text())).splitlines()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_in_both_languages_with_the_same_commands(verb: str) -> None:
    english, chinese = RUNBOOKS / f"{verb}.md", RUNBOOKS / "zh" / f"{verb}.md"
    assert BLOCK.findall(english.read_text()) == BLOCK.findall(chinese.read_text())
    assert lines(english)
    headings = [len(re.findall(r"^## ", page.read_text(), re.MULTILINE)) for page in (english, chinese)]
    assert headings == [4, 4], "when to use it, the command, when it worked, when it did not"


def test_every_page_is_of_a_verb() -> None:
    pages = {path.relative_to(RUNBOOKS).with_suffix("").as_posix() for path in RUNBOOKS.rglob("*.md")}
    assert pages == {folder + name for name in (*VERBS, "findings", "alerts") for folder in ("", "zh/")}


@pytest.mark.parametrize("verb", VERBS)
def test_commands_can_be_typed_as_they_stand(verb: str) -> None:
    typed = lines(RUNBOOKS / f"{verb}.md")
    for line in typed:
        command, playbook, *arguments = shlex.split(line)
        assert shlex.join([command, playbook, *arguments]) == line, (
            "one plain command a line, without a shell's own signs"
        )
        assert command == "ansible-playbook"
        assert (PROJECT / playbook).is_file()
        # Ansible leaves out what -l does not name: who changes a gateway names it, and monitoring has its own host.
        assert arguments[0] == "-l"
        assert arguments[1] in ("npu-01", "gateway", "npu-01,gateway", "npu-01,monitor-01")
    assert any(line.split()[1] in (f"{verb}.yml", f"playbooks/{verb}.yml") for line in typed)
    found = commands(RUNBOOKS / f"{verb}.md")
    assert [command.text for command in found if command.in_block] == typed, "tests/lab types what it finds"


@pytest.mark.parametrize("page", sorted(RUNBOOKS.rglob("*.md")), ids=lambda page: page.relative_to(RUNBOOKS).as_posix())
def test_what_a_page_refers_to_exists(page: Path) -> None:
    text = page.read_text()
    known = {name for path in ROLES.glob("*/defaults/main.yml") for name in yaml.safe_load(path.read_text()) or {}}
    assert set(re.findall(r"-e (\w+)=", text)) | set(re.findall(r"`(\w+_seconds)`", text)) <= known
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / link).is_file(), link


def test_every_finding_is_explained_in_both_languages_with_the_same_commands() -> None:
    # Those that a task tells by itself, before there is a list of findings.
    tasks = "".join(path.read_text() for path in ROLES.glob("*/tasks/*.yml"))
    told = {*CATALOGUE, *re.findall(r"\[([A-Z]+_[A-Z_]+)\] ", tasks)}
    sections = []
    for page in (RUNBOOKS / "findings.md", RUNBOOKS / "zh" / "findings.md"):
        _, *parts = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
        sections.append({part.partition("\n")[0]: part for part in parts})
        assert len(parts) == len(sections[-1]), "an id twice"
        assert set(sections[-1]) == told
    english, chinese = sections
    for name, section in english.items():
        words = [
            re.findall(rf"^- ({pattern})[:：]", text, re.MULTILINE)
            for text, pattern in ((section, "Check|Mend|Mended"), (chinese[name], "检查|处理|已修复"))
        ]
        assert words == [["Check", "Mend", "Mended"], ["检查", "处理", "已修复"]], name
        typed = [sorted(re.findall(r"`([^`]+)`", text)) for text in (section, chinese[name])]
        assert typed[0] == typed[1], name
        for playbook in re.findall(r"ansible-playbook (\S+)", section):
            assert (PROJECT / playbook).is_file(), name


def test_every_alert_is_explained_in_both_languages_with_the_same_commands() -> None:
    rules = [
        rule
        for path in (ROLES / "monitoring" / "files" / "rules").glob("*.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    english_sections, chinese_sections = (
        dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL))
        for page in (RUNBOOKS / "alerts.md", RUNBOOKS / "zh" / "alerts.md")
    )
    for rule in rules:
        name = rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert set(rule["annotations"]) == {"summary", "summary_zh", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/alerts.md#{name.lower()}"
        english, chinese = english_sections.pop(name), chinese_sections.pop(name)
        assert re.findall(r"^- (\w+):", english, re.MULTILINE) == ["Check", "Mend"], name
        assert re.findall(r"^- (\w+)：", chinese, re.MULTILINE) == ["检查", "处理"], name
        typed = [sorted(re.findall(r"`([^`]+)`", text)) for text in (english, chinese)]
        assert typed[0] == typed[1], name
        for playbook in re.findall(r"ansible-playbook (\S+)", english):
            assert (PROJECT / playbook).is_file(), name
    assert (english_sections, chinese_sections) == ({}, {}), "sections without an alert"


def test_the_preflight_says_where_its_findings_are_explained() -> None:
    assert (PROJECT / preflight_report.RUNBOOK).is_file()
    assert (PROJECT / preflight_report.RUNBOOK_ZH).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_languages_have_the_same_commands(page: Path) -> None:
    def typed(language: Path) -> list[tuple[str, bool]]:
        return sorted({(command.text, command.in_block) for command in commands(language)})

    assert typed(page) == typed(RUNBOOKS / "zh" / page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_names_what_there_is(page: Path) -> None:
    wrong = {command.text: problem for command in commands(page) if (problem := problem_of(command))}
    assert wrong == {}


def problem_of(command: Command) -> str:
    """Why it could not be typed; empty for a good one."""
    parsed = subprocess.run(["bash", "-n", "-c", command.text], capture_output=True, text=True, check=False)
    if parsed.returncode:
        return parsed.stderr
    # A word in capitals that is neither a placeholder nor a variable of the engine's is one that nobody explains.
    if (
        unknown := set(re.findall(r"(?<![\w/.-])[A-Z][A-Z_]+(?![\w/.:]|-[a-z])", command.text))
        - PLACEHOLDERS
        - ENVIRONMENT
    ):
        return f"{sorted(unknown)} stand for something that no page explains"
    if not command.playbook:
        return ""
    path = PROJECT / command.words[1]
    if not path.is_file():
        return f"{command.words[1]} is no playbook"
    given = {name: value for name, value in itertools.pairwise(command.words) if name.startswith("-")}
    known = {name for file in ROLES.glob("*/defaults/main.yml") for name in yaml.safe_load(file.read_text()) or {}}
    if (variable := given.get("-e", "=").partition("=")[0]) and variable not in known:
        return f"no role has {variable}"
    tags = given.get("--tags") or given.get("--skip-tags")
    if tags and not re.search(rf"tags: .*\b{tags}\b", (PROJECT / "playbooks" / "validate.yml").read_text()):
        return f"validate.yml has no tag {tags}"
    return ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ansible-playbook playbooks/absent.yml -l npu-01", "is no playbook"),
        ("ansible-playbook deploy.yml -l npu-01 -e no_such_variable=1", "no role has"),
        ("ansible-playbook validate.yml -l npu-01 --tags ocr_all", "no tag"),
        ("docker rm SOMETHING", "no page explains"),
        ("docker 'run", "unexpected EOF"),
        ("ansible-playbook validate.yml -l npu-01 --tags ocr_bench", ""),
    ],
)
def test_a_command_that_rotted_is_seen(text: str, problem: str) -> None:
    found = problem_of(Command("deploy", text, in_block=True))
    assert problem in found if problem else not found
