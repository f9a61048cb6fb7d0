"""The comparison of variants: recorded results beside each other, and what is said of one that failed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import compare_variants
import stage_results
from report_files import load, schema
from variant_reports import NOTE, RUN, bench, phase, report


class Comparison:
    """A folder of variants, as the play leaves it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.variants: list[dict[str, Any]] = []

    def add(self, name: str, told: dict[str, Any] | str | None, failure: str | None = None) -> None:
        self.variants.append({"name": name, "variables": {"ocr_bench_sweep": [4]}, "failure": failure})
        if told:
            latest = self.folder / name / "npu-01" / "latest"
            latest.mkdir(parents=True)
            (latest / "report.json").write_text(told if isinstance(told, str) else json.dumps(told))

    def run(self, not_back: str | None = None) -> int:
        told = json.dumps({"variants": self.variants, "restore_failure": not_back})
        self.monkeypatch.setattr("sys.stdin", io.StringIO(told))
        return compare_variants.main([f"--folder={self.folder}", "--host=npu-01", f"--run={RUN}"])

    @property
    def written(self) -> dict[str, Any]:
        return load(self.folder / "comparison.json", schema("variants"))

    @property
    def page(self) -> str:
        return (self.folder / "comparison.md").read_text()


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    return Comparison(tmp_path, monkeypatch)


def test_every_load_of_every_variant_is_told_with_its_samples(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison.add("four", report(bench(phase("latency", 1, p99=912.0, n=100), phase("throughput", 2))))
    comparison.add("sixteen", report(bench(phase("rate", 64, 2.5, failed=3), phase("sweep_4", 4, requests=None))))
    assert comparison.run() == 0
    first, second = comparison.written["variants"]
    assert comparison.written["verdict"] == "PASS"
    assert first["loads"][0] == {
        "name": "latency",
        "concurrency": 1,
        "rate": None,
        "requests_per_second": 1.25,
        "output_tokens_per_second": 160.0,
        "latency_p50_ms": 700.0,
        "latency_p99_ms": 912.0,
        "samples": 100,
        "failed": 0,
    }
    assert (first["loads"][1]["latency_p99_ms"], second["loads"][1]["requests_per_second"]) == (None, None)
    assert "| four | latency, 1 at a time | 1.25 | 160.00 | 700.00 | 912.00 | 100 | 0 |" in comparison.page
    assert "| sixteen | 2.5 a second | 1.25 | 160.00 | 700.00 | - | 20 | 3 |" in comparison.page
    assert comparison.page.count(NOTE) == 1
    assert capsys.readouterr().out == comparison.page


def test_a_variant_that_failed_is_in_the_table_with_its_cause(comparison: Comparison) -> None:
    comparison.add("broken", None, "Run | it:\nno such flag | --seqs")
    comparison.add("slow", report(bench(phase("latency", 1)), "FAIL"), "Verdict | below the limit")
    comparison.add("good", report(bench(phase("latency", 1))))
    assert comparison.run() == 1
    broken, slow, good = comparison.written["variants"]
    assert (broken["loads"], broken["release"]) == ([], None)
    assert (slow["failure"], len(slow["loads"]), good["failure"]) == ("Verdict | below the limit", 1, None)
    assert "| broken (failed) | none | - | - | - | - | - | - |" in comparison.page
    assert "  Failed: Run \\| it: no such flag \\| --seqs\n" in comparison.page


@pytest.mark.parametrize("told", [None, "{", report(None, "ERROR"), {"stages": {}}])
def test_a_variant_without_a_result_is_never_a_measured_one(
    told: dict[str, Any] | str | None, comparison: Comparison
) -> None:
    comparison.add("silent", told)
    assert comparison.run() == 1
    assert comparison.written["variants"][0]["failure"]


def test_a_secret_of_a_variant_is_in_neither_file(comparison: Comparison) -> None:
    comparison.add("good", report(bench(phase("latency", 1))))
    flags = {"api-key": "s3cret", "middleware": ["a", {"HF_TOKEN": "s3cret"}], "seed": 1}
    comparison.variants[0]["variables"] = {"vllm_service_extra_flags": flags}
    assert comparison.run() == 0
    assert "s3cret" not in comparison.page + json.dumps(comparison.written)
    assert comparison.written["variants"][0]["variables"]["vllm_service_extra_flags"]["seed"] == 1


def test_a_choice_that_is_not_back_is_worse_than_a_variant_that_failed(comparison: Comparison) -> None:
    comparison.add("good", report(bench(phase("latency", 1))))
    assert comparison.run("the engine does not start") == 2
    assert comparison.written["verdict"] == "ERROR"
    assert "NOT back: the engine does not start" in comparison.page


def test_what_cannot_be_written_is_told(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    comparison.add("good", report(bench(phase("latency", 1))))
    (comparison.folder / "comparison.json").mkdir()
    assert comparison.run() == 2
    told = capsys.readouterr()
    assert "no complete comparison" in told.err
    assert told.out == ""


def test_the_benchmarks_own_result_has_what_is_read(comparison: Comparison, tmp_path: Path) -> None:
    """A real run of the client against a stand-in."""
    comparison.add("real", report(stage_results.ocr_bench(tmp_path)))
    assert comparison.run() == 0
    assert {one["name"] for one in comparison.written["variants"][0]["loads"]} >= {"latency", "throughput"}
