"""bench_perf.py against a server with a known schedule: what it reports is what was sent, failures included."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import jsonschema
import pytest

import bench_perf
from bench_client import Client, connect, encode
from scheduled_mock import ScheduledMock, served
from stage_result import EXIT_STATUS

FILES = Path(__file__).resolve().parents[2] / "files"
SCHEMAS, SCRIPTS = FILES / "schemas", FILES / "scripts"
VALIDATORS = [
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.schema.json").read_text()))
    for name in ("stage", "bench")
]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def measured(url: str, folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a run from the command line."""
    output = folder / "bench.json"
    status = bench_perf.main(["--url", url, "--output", str(output), "--input-len", "16", *more])
    report: dict[str, Any] = json.loads(output.read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    for validator in VALIDATORS:
        validator.validate(report)
    assert status == EXIT_STATUS[report["verdict"]]
    return status, report


def test_document_command_gives_its_four_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(ScheduledMock()) as mock:
        command = (
            "--model glm-ocr --max-tokens 128 --latency-iters 5 --throughput-requests 10 --throughput-concurrency 2"
        )
        assert bench_perf.main(["--url", mock.url, *command.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["Latency mean", "Latency p99", "Throughput", "Token throughput"]
    assert [line.split("  ")[0] for line in lines[:4]] == names
    assert "the maximum of 5 samples; a p99 needs 100" in lines[1]
    assert lines[-1] == "ocr_bench: PASS (3/3 checks)"
    assert [request["max_tokens"] for request in mock.requests] == [128] * 17
    assert mock.connections == 2, "none thrown away"


def test_times_are_those_of_the_server(tmp_path: Path) -> None:
    with served(ScheduledMock(ttft=0.02, itl=0.005, tokens=13)) as mock:
        _, report = measured(mock.url, tmp_path, "--latency-iters", "6", "--throughput-requests", "0", "--warmup", "0")
    latency = report["phases"][0]["latency_ms"]
    # A busy machine delays both sides, so the bounds are wide; test_bench_parts has the definitions to the digit.
    for name, write in (("ttft", 0), ("e2e", -1)):
        truth = 1000 * fmean(one.writes[write] - one.read_at for one in mock.log)
        assert truth <= latency[name]["mean"] < truth + 250, "never before it was sent"
    for name in ("tpot", "itl"):
        assert latency[name]["mean"] == pytest.approx((latency["e2e"]["mean"] - latency["ttft"]["mean"]) / 12, abs=1e-3)
    assert latency["itl"]["n"] == 6 * 12, "the role chunk is no token"
    assert report["phases"][0]["tokens"]["completion"]["mean"] == 13


@pytest.mark.parametrize("chunk_usage", [True, False])
def test_several_tokens_in_a_chunk(tmp_path: Path, chunk_usage: bool) -> None:
    mock = ScheduledMock(ttft=0.01, itl=0.008, tokens=16, tokens_per_chunk=4, chunk_usage=chunk_usage)
    with served(mock):
        _, report = measured(mock.url, tmp_path, "--throughput-requests", "0", "--warmup", "0")
    latency = report["phases"][0]["latency_ms"]
    later = latency["e2e"]["mean"] - latency["ttft"]["mean"]
    assert latency["icl"]["mean"] == pytest.approx(later / 3, abs=1e-3)
    if chunk_usage:  # 12 tokens after the first chunk, not 15
        assert latency["tpot"]["mean"] == pytest.approx(later / 12, abs=1e-3)
        assert latency["itl"]["mean"] == pytest.approx(later / 12, abs=1e-3)
        assert latency["itl"]["n"] == 5 * 12


def test_stall_shows_in_the_schedule(tmp_path: Path) -> None:
    """A closed view of a stalled server sees a few slow requests; the schedule sees all that had to wait."""
    mock = ScheduledMock(ttft=0.005, tokens=2, stall=(0.1, 0.5))
    with served(mock):
        more = ["--rate", "50", "--rate-requests", "50", "--rate-concurrency", "2", "--distribution", "constant"]
        _, report = measured(mock.url, tmp_path, "--latency-iters=0", "--throughput-requests=0", "--warmup=0", *more)
    phase = report["phases"][0]
    latency = phase["latency_ms"]
    assert phase["workload"] == {
        "mode": "open", "requests": 50, "concurrency": 2, "rate": 50.0, "distribution": "constant"
    }  # fmt: skip
    assert phase["inflight"]["peak"] == 2
    # 20 requests were due in the 400 ms; they waited 200 ms on average, so all 50 about 80 ms.
    assert latency["e2e_sched"]["mean"] > latency["e2e"]["mean"] + 40
    assert latency["e2e_sched"]["p90"] > latency["e2e"]["p90"] + 100


FAULTS: dict[str, tuple[str | int, str]] = {
    "refused": ("refuse", "disconnected"),
    "cut": ("cut", "disconnected"),
    "hanging": ("hang", "timeout"),
    "aborted": ("abort", "aborted"),
    "empty": ("empty", "empty"),
    "error event": ("error", "server_error"),
    "no stream": ("json", "not_a_stream"),
    "unknown model": (404, "http_404"),
    "guarded": (401, "http_401"),
    "dead": (503, "http_503"),
}


@pytest.mark.parametrize(("fault", "kind"), FAULTS.values(), ids=FAULTS)
def test_no_success_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str | int, kind: str
) -> None:
    timeout = 0.2 if kind == "timeout" else 30
    with served(ScheduledMock(fault=fault)) as mock:
        status, report = measured(
            mock.url, tmp_path, "--warmup=0", f"--timeout={timeout}", "--latency-iters=1", "--throughput-requests=4"
        )
    assert status == 2
    assert [phase["counts"]["by_error"] for phase in report["phases"]] == [{kind: 1}, {kind: 4}]
    assert set(report["headline"].values()) == {None, 0}, "0 is the number of samples"
    assert report["headline"]["latency_mean_ms"] is None
    for phase in report["phases"]:
        rates = phase["throughput"]
        assert set(rates.values()) == {None}
        assert {figures["mean"] for figures in phase["latency_ms"].values()} == {None}
    out = capsys.readouterr().out
    assert out.startswith("Latency mean      not measured (0 samples)")
    assert "nan" not in out.lower()
    assert "fix: " in out


@pytest.mark.parametrize("fault", ["refuse", "cut", "abort", 500])
def test_half_failing(tmp_path: Path, fault: str | int) -> None:
    mock = ScheduledMock(ttft=0.005, faults=dict.fromkeys(range(1, 40, 2), fault))
    with served(mock):
        arguments = ["--warmup=0", "--latency-iters=0", "--throughput-requests=20"]
        status, report = measured(mock.url, tmp_path, *arguments)
        assert status == 1
        assert measured(mock.url, tmp_path, *arguments, "--max-failed", "0.5")[0] == 0
    phase = report["phases"][0]
    assert (phase["counts"]["ok"], phase["counts"]["failed"]) == (10, 10)
    figures = phase["latency_ms"]["e2e"]
    assert (figures["n"], figures["failed"]) == (10, 10)
    assert 5 <= figures["mean"] < 500, "failures are not averaged in"
    assert figures["p90"] is None, "they are slower than any success"
    rate = phase["throughput"]["requests_per_second"]
    # The report has the duration in milliseconds, of which these are few.
    assert rate == pytest.approx(10 / phase["duration_seconds"], rel=1e-3 + 0.0005 / phase["duration_seconds"])


def test_failing_warm_up_stops_the_run(tmp_path: Path) -> None:
    with served(ScheduledMock(fault="refuse")) as mock:
        status, report = measured(mock.url, tmp_path)
    assert (status, report["phases"], report["warmup"]["counts"]["failed"]) == (2, [], 2)


def test_closed_port_is_not_measured(closed_url: str, tmp_path: Path) -> None:
    status, report = measured(closed_url, tmp_path)
    assert (status, report["checks"][0]["id"], report["phases"]) == (2, "service", [])
    assert "no connection to" in report["checks"][0]["found"]


@pytest.mark.parametrize(
    "url", ["https://localhost/v1", "ftp://x/", "no-scheme", "http://[::1", "http://x:99999/", "http:///v1"]
)
def test_unusable_url_is_not_measured(tmp_path: Path, url: str) -> None:
    assert measured(url, tmp_path)[0] == 2


def test_silent_service_times_out(silent_url: str, tmp_path: Path) -> None:
    status, report = measured(silent_url + "/v1/chat/completions", tmp_path, "--timeout", "0.1")
    assert status == 2
    assert report["warmup"]["counts"]["timeout"] == 2


def test_any_fragmentation_gives_the_same_tokens(tmp_path: Path) -> None:
    with served(ScheduledMock(fragment=7, tokens=9)) as mock:
        _, report = measured(mock.url, tmp_path, "--throughput-requests", "40", "--throughput-concurrency", "8")
    assert [phase["counts"]["ok"] for phase in report["phases"]] == [5, 40]
    assert report["phases"][1]["tokens"]["completion"] == {"total": 360, "mean": 9.0, "min": 9, "max": 9}


def test_without_usage_chunks_are_counted_and_said(tmp_path: Path) -> None:
    with served(ScheduledMock(usage=False, chunk_usage=False, tokens=7)) as mock:
        tokens = measured(mock.url, tmp_path)[1]["phases"][0]["tokens"]
    assert (tokens["counted_by"], tokens["completion"]["mean"], tokens["prompt"]["mean"]) == ("chunks", 7, None)


def test_fixed_length_is_asked_for_and_checked(tmp_path: Path) -> None:
    with served(ScheduledMock(tokens=12)) as mock:
        assert measured(mock.url, tmp_path, "--ignore-eos", "--max-tokens", "12")[0] == 0
        status, report = measured(mock.url, tmp_path, "--ignore-eos", "--max-tokens", "13")
    assert (mock.requests[0]["ignore_eos"], mock.requests[0]["min_tokens"]) == (True, 12)
    assert status == 1
    assert [entry["id"] for entry in report["checks"] if entry["verdict"] == "FAIL"] == [
        "latency_length",
        "throughput_length",
    ]


def test_prompt_has_the_length_the_service_counts(tmp_path: Path) -> None:
    with served(ScheduledMock()) as mock:
        _, report = measured(mock.url, tmp_path, "--input-len", "40")
        assert report["workload"]["input_tokens_exact"] is True
        prompts = [request["messages"][0]["content"] for request in mock.requests]
        assert {len(prompt.split()) for prompt in prompts} == {30}, "10 tokens are the template's"
        assert len(set(prompts)) == len(prompts), "no cache can answer"
        mock.words = False
        assert measured(mock.url, tmp_path, "--input-len", "40")[1]["workload"]["input_tokens_exact"] is False


def test_pages_have_the_same_pixels_and_bytes(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    with served(ScheduledMock()) as mock:
        _, report = measured(mock.url, tmp_path, "--image", "320x200")
    assert report["workload"]["image"]["pixels"] == [320, 200]
    files = []
    for request in mock.requests:
        image, text = request["messages"][0]["content"]
        assert text["text"] == "Text Recognition:"
        files.append(base64.b64decode(image["image_url"]["url"].partition(",")[2]))
    assert {len(file) for file in files} == {report["workload"]["image"]["bytes"]}
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert {picture.size for picture in pictures} == {(320, 200)}
    assert len({picture.tobytes() for picture in pictures}) == len(files) == 17


def test_server_metrics_are_beside_the_clients(tmp_path: Path) -> None:
    with served(ScheduledMock(ttft=0.01, tokens=3)) as mock:
        _, report = measured(mock.url, tmp_path)
    server = report["phases"][1]["server"]
    assert server["added"] == {
        "generation_tokens_total": 30,
        "prompt_tokens_total": None,
        "num_preemptions_total": None,
    }
    assert server["finished"] == {"length": 10}
    truth = 1000 * fmean(one.writes[0] - one.read_at for one in mock.log[-10:])
    assert server["mean_ms"]["time_to_first_token"] == pytest.approx(truth, abs=0.01)
    assert report["env"]["server_version"] == "0.18.0"


def test_sweep_and_goodput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(ScheduledMock(ttft=0.01, tokens=2)) as mock:
        arguments = [
            "--latency-iters=0",
            "--throughput-requests=8",
            "--sweep",
            "1,2,4",
            "--goodput",
            "ttft:9",
            "e2e:5000",
        ]
        status, report = measured(mock.url, tmp_path, *arguments, "--min-goodput", "0.5", "--min-throughput", "1")
    assert [level["concurrency"] for level in report["sweep"]["levels"]] == [1, 2, 4]
    assert report["phases"][-1]["counts"]["sent"] == 16
    assert (status, report["phases"][0]["goodput"]["met"]) == (1, 0)
    assert {entry["id"]: entry["verdict"] for entry in report["checks"]}["goodput"] == "FAIL"
    assert {entry["id"]: entry["verdict"] for entry in report["checks"]}["min_throughput"] == "PASS"
    assert "Saturation" in capsys.readouterr().out


def test_exports(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("csv", "vllm-json", "requests-jsonl")}
    with served(ScheduledMock(tokens=5, faults={4: 500})) as mock:
        arguments = [f"--{name}={path}" for name, path in files.items()]
        _, report = measured(mock.url, tmp_path, *arguments, "--warmup=0", "--latency-iters=0")
    phase = report["phases"][0]
    row = next(csv.DictReader(files["csv"].read_text().splitlines()))
    assert (row["phase"], row["ok"], row["failed"], row["e2e_p99_ms"]) == ("throughput", "9", "1", "")
    assert float(row["ttft_mean_ms"]) == phase["latency_ms"]["ttft"]["mean"]
    vllm = json.loads(files["vllm-json"].read_text())
    assert (vllm["completed"], vllm["failed"], vllm["total_output_tokens"]) == (9, 1, 45)
    assert vllm["mean_ttft_ms"] == phase["latency_ms"]["ttft"]["mean"]
    assert sum(vllm["output_lens"]) == 45
    requests = [json.loads(line) for line in files["requests-jsonl"].read_text().splitlines()]
    assert [line["error"] for line in requests].count("http_500") == 1
    assert all(line["t_sched"] <= line["t_send"] <= line["t_done"] for line in requests)


def test_key_is_sent_and_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with served(ScheduledMock()) as mock:
        _, report = measured(mock.url, tmp_path)
    assert set(mock.keys) == {"Bearer s3cret"}
    assert "s3cret" not in json.dumps(report)


def test_server_that_closes_each_connection(tmp_path: Path) -> None:
    with served(ScheduledMock(close_after_reply=True)) as mock:
        _, report = measured(mock.url, tmp_path)
    assert report["phases"][1]["counts"]["ok"] == 10
    assert report["phases"][1]["client"]["connections_opened"] >= 8


def test_little_s_law_holds(tmp_path: Path) -> None:
    with served(ScheduledMock(ttft=0.005, tokens=3)) as mock:
        _, report = measured(mock.url, tmp_path, "--throughput-requests=60", "--throughput-concurrency=6")
    phase = report["phases"][1]
    assert abs(phase["littles_law_residual"]) < 0.02
    assert phase["inflight"]["peak"] == 6
    assert phase["throughput"]["steady"]["n"] >= 12


@pytest.mark.parametrize(
    "bad",
    ["--rate=0", "--rate=inf", "--sweep=4,2", "--sweep=0", "--image=big", "--image=1x1", "--goodput=x:1", "--timeout=0",
     "--max-tokens=0", "--min-goodput=0.5", "--max-failed=2", "--metadata=x", "--latency-iters=-1"],
)  # fmt: skip
def test_unusable_arguments_are_refused(bad: str) -> None:
    with pytest.raises(SystemExit) as refused:
        bench_perf.parse_args([bad])
    assert refused.value.code == 2


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(SystemExit):
        bench_perf.parse_args(["--latency-iters=0", "--throughput-requests=0"])


def test_unwritable_output_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with served(ScheduledMock()) as mock:
        assert bench_perf.main(["--url", mock.url, "--output", str(tmp_path / "file" / "bench.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_large_bodies_are_sent_whole() -> None:
    """Bigger than any socket buffer, so that the send is cut and continued."""
    with served(ScheduledMock()) as mock:
        target, opened = connect(mock.url)
        client = Client(target, opened, timeout=30)
        body = encode(target, json.dumps({"max_tokens": 2, "stream_options": {}, "pad": "x" * 16_000_000}).encode())
        run = client.run([body], 2, 1)
        client.close()
    assert [exchange.error for exchange in run.exchanges] == [None, None]
    assert len(mock.requests[1]["pad"]) == 16_000_000


def test_start_loads_nothing_heavy(tmp_path: Path) -> None:
    """Not even when /tokenize and /metrics are refused, as a front does."""
    heavy = {"requests", "urllib3", "PIL", "asyncio", "numpy"}
    code = f"import sys, bench_perf; s = bench_perf.main(sys.argv[1:]); sys.exit(s or str({heavy} & set(sys.modules)))"
    with served(ScheduledMock(words=False)) as mock:
        command = [sys.executable, "-c", code, "--url", mock.url, "--output", str(tmp_path / "bench.json")]
        done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()", done.stderr


@pytest.mark.parametrize("warmup", ["0", "2"])
def test_interrupted_run_keeps_what_it_has(warmup: str) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with served(ScheduledMock(faults={2: "hang"}, fault="hang" if warmup == "2" else None)) as mock:
        config = bench_perf.parse_args(["--url", mock.url, "--warmup", warmup, "--input-len", "16"])
        report = bench_perf.run(config, stop).report
    assert report["verdict"] == "ERROR"
    phase = report["warmup"] or report["phases"][0]
    assert phase["counts"]["by_error"]["interrupted"] >= 1
    assert phase["counts"]["ok"] == (0 if warmup == "2" else 2)
    assert len(report["phases"]) <= 1


def test_service_that_went_away() -> None:
    with served(ScheduledMock()) as mock:
        target, opened = connect(mock.url)
        client = Client(target, opened, timeout=5)
        request = encode(target, b'{"max_tokens": 1, "stream_options": {}}')
        assert client.run([request], 1, 1).exchanges[0].error is None
    run = client.run([request], 4, 2)
    client.close()
    kinds = [exchange.error for exchange in run.exchanges]
    assert kinds.count("disconnected") <= 1, "the connection that was open"
    assert set(kinds) <= {"disconnected", "unreachable"}
