"""promtool reads the rules and runs their tests; the tests are complete, and see a rule that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from monitored import promtool
from rendering import ROLES

RULES = sorted((ROLES / "monitoring" / "files" / "rules").glob("*.yml"))
TESTS = sorted((Path(__file__).parent / "rules").glob("*.test.yml"))
ALERTS = [
    rule["alert"]
    for path in RULES
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
]


def test_promtool_accepts_the_rules() -> None:
    status, said = promtool("check", "rules", *RULES)
    assert status == 0, said


def test_the_rules_do_what_their_tests_say() -> None:
    status, said = promtool("test", "rules", *TESTS)
    assert status == 0, said


def test_every_alert_is_seen_quiet_and_then_firing() -> None:
    tests: list[dict[str, Any]] = [test for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    assert sorted(test["name"] for test in tests) == sorted(ALERTS)
    for test in tests:
        first, second, *_ = test["promql_expr_test"]
        assert "exp_samples" not in first, test["name"]
        assert [f'alertname="{test["name"]}"' in sample["labels"] for sample in second["exp_samples"]] == [True]


def test_rules_that_never_fire_are_seen(tmp_path: Path) -> None:
    status, said = promtool("test", "rules", *with_all_alerts("vector(0) > 1", tmp_path))
    assert status != 0
    wanted = re.findall(r"exp: {alertname=\"(\w+)\"", said)
    assert sorted(wanted) == sorted(set(ALERTS) - {"GlmOcrFrontErrors"} | {"GlmOcrClock"})
    assert 'exp: {__name__="ALERTS", alertname="GlmOcrFrontErrors"' in said


def test_rules_that_always_fire_are_seen(tmp_path: Path) -> None:
    status, said = promtool("test", "rules", *with_all_alerts("vector(1)", tmp_path))
    assert status != 0
    assert len(re.findall(r"exp: ?nil", said)) == len(ALERTS)


def with_all_alerts(expression: str, folder: Path) -> list[Path]:
    """Copies of the tests, of rules in which each alert has this expression."""
    rules, tests = folder / "roles" / "monitoring" / "files" / "rules", folder / "tests" / "monitoring" / "rules"
    for copies, originals in ((rules, RULES), (tests, TESTS[0].parent.iterdir())):
        copies.mkdir(parents=True)
        for path in originals:
            text = re.sub(
                r"(- alert: \w+\n        expr:) (>-\n(          .*\n)+|.*\n)", rf"\1 {expression}\n", path.read_text()
            )
            (copies / path.name).write_text(text)
    return sorted(tests.glob("*.test.yml"))
