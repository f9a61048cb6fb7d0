"""Variants of the lab's deployment, measured in turn; and what runs afterwards."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from lab import NODE, Play, container_start, extra_flags, latest_report, release
from rendering import PROJECT
from report_files import load, schema

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

#: Enough to show that each is measured; nothing here says which is faster.
LOAD: dict[str, Any] = {
    "ocr_bench_latency_requests": 4,
    "ocr_bench_throughput_requests": 32,
    "ocr_bench_throughput_concurrency": 16,
    "ocr_bench_max_tokens": 16,
    "ocr_bench_sweep": [],
}


def comparison() -> dict[str, Any]:
    """The newest one."""
    folders = (PROJECT / "reports" / "compare" / NODE).iterdir()
    return load(max(folders) / "comparison.json", schema("variants"))


def test_two_variants_are_measured_and_the_inventorys_choice_comes_back(play: Play, node: Host) -> None:
    before = release(node)
    variants = {
        name: {"vllm_service_extra_flags": extra_flags(max_num_seqs=seqs)} | LOAD
        for name, seqs in (("four", 4), ("sixteen", 16))
    }
    played = play("playbooks/compare.yml", ocr_compare_variants=variants)
    assert played.rc == 0, played.failures
    written = comparison()
    assert (written["verdict"], written["restore_failure"]) == ("PASS", None)
    assert [one["name"] for one in written["variants"]] == ["four", "sixteen"]
    assert len({before, *(one["release"] for one in written["variants"])}) == 3
    for one in written["variants"]:
        loads = {phase["name"]: phase for phase in one["loads"]}
        assert (loads["latency"]["samples"], loads["throughput"]["samples"]) == (4, 32)
        assert loads["throughput"]["requests_per_second"] > 0
        assert loads["throughput"]["output_tokens_per_second"] > 0
        assert loads["latency"]["latency_p99_ms"] is None
        assert "CPU lab engine" in one["engine_note"]
    assert release(node) == before
    # The host's own reports, which baselines are made of, have the deployment that brought it back and no variant.
    assert list(load(latest_report() / "report.json", schema("report"))["stages"]) == ["ocr_smoke"]


def test_a_variant_that_is_refused_is_told_and_what_runs_is_not_touched(play: Play, node: Host) -> None:
    before = container_start(node)
    flags = extra_flags() | {"no-such-flag": True}
    played = play("playbooks/compare.yml", ocr_compare_variants={"broken": {"vllm_service_extra_flags": flags}})
    assert played.rc != 0
    written = comparison()
    assert (written["verdict"], written["restore_failure"]) == ("FAIL", None)
    assert "PROBE_FLAGS" in json.dumps(written["variants"][0]["failure"])
    assert "PROBE_FLAGS" in played.failures
    assert container_start(node) == before
