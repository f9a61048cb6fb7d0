"""All stages against the real engine; the engine stays up, and nothing is restarted."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from testinfra.host import Host

from lab import INVENTORY, NODE, Play, latest_report
from playing import ansible_playbook
from rendering import PROJECT

SCHEMAS = {
    "ocr_smoke": "stage",
    "ocr_bench": "bench",
    "ocr_quality": "ocr_quality",
    "served_accuracy": "accuracy",
    "ocr_accuracy": "accuracy",
}


def stages() -> dict[str, Any]:
    """The stages of the newest run, each following its own schema."""
    report = json.loads((latest_report() / "report.json").read_text())
    for name, stage in report["stages"].items():
        schema = json.loads((PROJECT / "files" / "schemas" / f"{SCHEMAS[name]}.schema.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(stage)
    return dict(report["stages"])


def ci(*more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and last line of what a pipeline would type."""
    done = ansible_playbook("playbooks/ci_validate.yml", "-i", str(INVENTORY), "-l", "ascend910", *more)
    return done.rc, json.loads(done.output.splitlines()[-1])


def test_a_healthy_service_passes_every_stage(service: Host, play: Play) -> None:
    validated = play("validate.yml")
    assert (validated.rc, validated.changed) == (0, 0), validated.failures
    found = stages()
    assert set(found) == set(SCHEMAS)
    assert {stage["verdict"] for stage in found.values()} == {"PASS"}
    assert all(found[name]["engine"]["vllm"] for name in SCHEMAS), "in the serving image"

    assert found["ocr_bench"]["headline"]["throughput_samples"] == 10
    assert found["ocr_bench"]["phases"][0]["counts"]["failed"] == 0
    # In fp32 and bf16 on this CPU, with the words of the script that no NPU was involved.
    assert "Nothing here speaks of an NPU" in found["ocr_accuracy"]["note"]
    assert found["served_accuracy"]["positions"]["image"]["served"]["positions"] > 0
    # Trained on lines; the other kinds are sent and shown.
    kinds = {kind["kind"]: kind for kind in found["ocr_quality"]["kinds"]}
    assert [name for name, kind in kinds.items() if kind["threshold"] is not None] == ["line"]
    assert {(kind["pages"], kind["replies"]) for kind in kinds.values()} == {(4, 4)}
    pictures = [latest_report() / "stages" / sample["picture"] for sample in kinds["seal"]["samples"]]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_one_tag_runs_one_stage_and_a_limit_it_misses_is_red(service: Host, play: Play) -> None:
    alone = play("validate.yml", tags="ocr_bench")
    assert alone.rc == 0, alone.failures
    assert set(stages()) == {"ocr_bench"}

    missed = play("validate.yml", tags="ocr_bench", ocr_bench_min_requests_per_second=1e6)
    assert missed.rc != 0
    assert "ocr_bench: FAIL" in missed.failures


@pytest.mark.parametrize(("more", "verdict"), [([], "PASS"), (["-e", "ocr_smoke_max_model_len=4096"], "FAIL")])
def test_ci_reads_the_verdict_from_the_last_line_and_junit(more: list[str], verdict: str, service: Host) -> None:
    status, summary = ci("--tags", "ocr_smoke", *more)
    assert (status == 0) == (verdict == "PASS")
    assert summary["verdict"] == summary["hosts"][NODE]["verdict"] == verdict
    assert summary["hosts"][NODE]["stages"] == {"ocr_smoke": verdict}
    (suite,) = ElementTree.parse(summary["junit"]).getroot()
    assert [case.get("name") for case in suite] == ["health", "models", "text", "image", "verdict"]
    assert [case.get("name") for case in suite if len(case)] == ([] if verdict == "PASS" else ["models", "verdict"])
