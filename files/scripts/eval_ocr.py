"""OCR quality of a served GLM-OCR: pages with a known content, read through the API and compared.

    python eval_ocr.py run --base-url http://127.0.0.1:8000 --output ocr_quality.json

``run`` does both halves at once and needs ``requirements.txt``.  A service that only its own host reaches is asked
there, in the serving image, which has all that ``read`` needs; the metrics' packages stay on the controller:

    python eval_ocr.py read --base-url http://127.0.0.1:8000 --output readings.json
    python eval_ocr.py score --readings readings.json --output ocr_quality.json

Exit status: 0 every judged kind is within its limit (``read``: the service was asked), 1 one is not, 2 could not
measure.  The JSON is written in all three cases, the pictures beside it; what was not measured is null.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
import secrets
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stage_result import EXIT_STATUS, finite, installed_version, now, positive, write_json

KINDS = ("line", "document", "table", "formula", "code", "seal")
OMNIDOCBENCH_KINDS = ("document", "table", "formula", "code")
REPETITION, CONFUSION = "repetition", "confusion"
OVERALL = (REPETITION, CONFUSION)  # limits over all judged kinds together
# Chosen to tell a model that reads from one that does not; measured on no NPU.  A site's first good run is the better
# guide.  null: measured and shown, not judged.
DEFAULT_LIMITS = {
    "line": 0.1,
    "document": 0.1,
    "table": 0.2,
    "formula": 0.25,
    "code": 0.15,
    "seal": None,
    REPETITION: 0.05,
    CONFUSION: 0,
}
PACKAGES = ("pillow", "requests", "rapidfuzz", "table-recognition-metric")
BREAKDOWNS = ("language", "degradation", "px")
SESSION_MEMBERS = {"arguments", "engine", "started_at", "problem", "readings"}
READING_MEMBERS = {"id", "kind", "expected", "found", "finish_reason", "problem", "traits", "picture"}

FIX_MISREAD = (
    "Compare the kind's breakdown and samples: one size or degradation points at the picture, all of them at the "
    "engine. On an NPU suspect the rotary embedding of vllm-ascend 0.18.0rc1 (issues 6925 and 12765) or graph mode "
    "(serve once with --enforce-eager); otherwise the weights, or a limit that no good run stands behind."
)
FIX_REQUESTS = "Look at the service's log. For a 400 about the context length pass a smaller --max-tokens."
FIX_LOOP = (
    "Serve once with --enforce-eager: if the loops go, graph mode made them. Clients may pass repetition_penalty 1.1."
)
FIX_CONFUSION = (
    "Look first at tokenizer.json and lm_head of what is served: entries may have changed places. Compare the folder "
    "with its manifest, or with a trusted copy."
)
FIX_NO_CHARACTERS = "Give one of these kinds a limit, or leave confusion out of --thresholds. " + FIX_REQUESTS
FIX_NO_PAGE = "Leave the kind out of --thresholds, or give it null, or supply pages of it."
FIX_READINGS = "Pass the file that this version's `eval_ocr.py read` wrote."


class NotMeasured(Exception):
    """What was found instead of something to score, and what to do about it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.fix = fix


@dataclass(frozen=True)
class Config:
    """The command line.  ``thresholds`` maps the kinds to ask for, and ``OVERALL``, to limits (None: no limit)."""

    step: str
    output: Path
    readings: Path | None = None
    base_url: str = ""
    model: str = ""
    thresholds: Mapping[str, float | None] | None = None
    samples: int = 0
    seed: int = 0
    line_scale: int = 1
    omnidocbench: Path | None = None
    max_tokens: int = 0
    concurrency: int = 1
    timeout: float = 0.0

    @property
    def kinds(self) -> list[str]:
        """The kinds to ask for."""
        return [kind for kind in self.thresholds or {} if kind not in OVERALL]

    @property
    def pictures(self) -> str:
        """The folder of the pictures, beside the output."""
        return f"{self.output.stem}_pictures"

    def as_json(self) -> dict[str, Any]:
        """The arguments as they go into a report."""
        members = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in members.items()}


class Outcome(NamedTuple):
    """What a step writes: the JSON, and the pictures (PNG in base64) that it names."""

    result: dict[str, Any]
    pictures: dict[str, str]


def run(config: Config) -> Outcome:
    """The step's result: readings, or the stage that follows ``files/schemas/ocr_quality.schema.json``."""
    nothing: dict[str, Any] = {
        "schema_version": "1.0",
        "arguments": config.as_json(),
        "engine": {},
        "started_at": now(),
        "finished_at": None,
        "readings": [],
    }
    try:
        if config.readings:
            readings = load(config.readings)
            return score(readings, config.pictures)
        if config.step == "run":
            import_metrics()  # Before the service is asked in vain.
        readings = import_readings().ask(config)
        return Outcome(readings, {}) if config.step == "read" else score(readings, config.pictures)
    except NotMeasured as error:
        nothing |= {"finished_at": now(), "problem": {"found": str(error), "fix": error.fix}}
        return Outcome(nothing if config.step == "read" else unmeasured(nothing), {})


def import_readings() -> Any:
    """The module that asks.  Raises ``NotMeasured`` when a package is missing."""
    try:
        import ocr_readings
    except ModuleNotFoundError as error:
        raise missing(error) from error
    return ocr_readings


def import_metrics() -> Any:
    """The module that compares.  Raises ``NotMeasured`` when a package is missing."""
    try:
        import ocr_metrics
    except ModuleNotFoundError as error:
        raise missing(error) from error
    return ocr_metrics


def missing(error: ModuleNotFoundError) -> NotMeasured:
    return NotMeasured(
        f"the Python package {error.name} is missing from {sys.executable}",
        f"{sys.executable} -m pip install {' '.join(PACKAGES)} (requirements.txt pins them).",
    )


def load(path: Path) -> dict[str, Any]:
    """What ``read`` wrote.  Raises ``NotMeasured``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if lacking := SESSION_MEMBERS - data.keys():
            raise ValueError(f"without {', '.join(sorted(lacking))}")
        if unknown := data["arguments"]["thresholds"].keys() - {*KINDS, *OVERALL}:
            raise ValueError(f"unknown kinds {', '.join(sorted(unknown))}")
        for reading in data["readings"]:
            if lacking := READING_MEMBERS - reading.keys():
                raise ValueError(f"a reading without {', '.join(sorted(lacking))}")
            if not re.fullmatch(r"[a-z]+-\d+", reading["id"]):  # it becomes a file's name
                raise ValueError(f"a reading with the id {reading['id']!r}")
            base64.b64decode(reading["picture"], validate=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotMeasured(f"{path}: expected readings, found otherwise ({error})", FIX_READINGS) from error
    return dict(data)


def score(readings: dict[str, Any], pictures: str) -> Outcome:
    """The stage's result, its pictures in the folder ``pictures``.  Raises ``NotMeasured`` without a package."""
    metrics = import_metrics()
    if readings["problem"]:
        return Outcome(unmeasured(readings), {})
    for reading in readings["readings"]:
        reading["file"] = f"{pictures}/{reading['id']}.png"
    limits = readings["arguments"]["thresholds"]
    kinds = [
        measured(kind, limits[kind], [reading for reading in readings["readings"] if reading["kind"] == kind], metrics)
        for kind in limits
        if kind not in OVERALL
    ]
    judged = [kind for kind in kinds if kind["threshold"] is not None]
    checks = [requests_check(kinds), *map(kind_check, judged)]
    if (limit := limits.get(REPETITION)) is not None:
        checks.append(repetition_check(judged, limit))
    if (limit := limits.get(CONFUSION)) is not None:
        checks.append(confusion_check(judged, limit, metrics))
    versions = {package: installed_version(package) for package in metrics.PACKAGES}
    return Outcome(
        stage(readings, kinds, checks, versions),
        {reading["file"]: reading["picture"] for reading in readings["readings"]},
    )


def unmeasured(readings: dict[str, Any]) -> dict[str, Any]:
    """The stage's result when there is nothing to score."""
    expected = "a service that reads pages, and the packages to score them"
    return stage(readings, [], [check("service", "ERROR", expected, **readings["problem"])], {})


def stage(
    readings: dict[str, Any], kinds: list[dict[str, Any]], checks: list[dict[str, Any]], versions: dict[str, str | None]
) -> dict[str, Any]:
    """The envelope of ``files/schemas/stage.schema.json`` around what was found."""
    return {
        "schema_version": "1.0",
        "stage": "ocr_quality",
        "verdict": max((check["verdict"] for check in checks), key=list(EXIT_STATUS).index),
        "started_at": readings["started_at"],
        "finished_at": now(),
        "arguments": readings["arguments"],
        "engine": readings["engine"],
        "metrics": versions,
        "checks": checks,
        "kinds": kinds,
    }


def measured(kind: str, limit: float | None, readings: list[dict[str, Any]], metrics: Any) -> dict[str, Any]:
    """One entry of ``kinds``: the error over the answered pages, where it comes from, and every sample."""
    answered = [reading for reading in readings if reading["found"] is not None]
    samples = [sample(reading, metrics) for reading in readings]
    names = sorted({name for entry in samples for name in entry["details"]})
    return {
        "kind": kind,
        "metric": metrics.NAMES[kind],
        "error": error_of(kind, answered, metrics),
        "threshold": limit,
        "pages": len(readings),
        "replies": len(answered),
        "problems": dict(Counter(reading["problem"] for reading in readings if reading["found"] is None)),
        "cut_off": sum(reading["finish_reason"] == "length" for reading in answered),
        "loops": sum(entry["loop"] is not None for entry in samples),
        "details": {
            name: statistics.fmean(values) if (values := detail_values(samples, name)) else None for name in names
        },
        "breakdown": {
            trait: by_value for trait in BREAKDOWNS if (by_value := errors_by(trait, kind, answered, metrics))
        },
        "samples": samples,
    }


def detail_values(samples: list[dict[str, Any]], name: str) -> list[float]:
    return [value for entry in samples if (value := entry["details"].get(name)) is not None]


def errors_by(trait: str, kind: str, answered: list[dict[str, Any]], metrics: Any) -> dict[str, dict[str, Any]]:
    """The error and number of the answered pages for each value of a trait."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for reading in answered:
        if trait in reading["traits"]:
            groups.setdefault(str(reading["traits"][trait]), []).append(reading)
    return {
        value: {"error": error_of(kind, group, metrics), "replies": len(group)}
        for value, group in sorted(groups.items())
    }


def error_of(kind: str, answered: list[dict[str, Any]], metrics: Any) -> float | None:
    truths, found = [reading["expected"] for reading in answered], [reading["found"] for reading in answered]
    error: float | None = metrics.error(kind, truths, found)
    return error


def sample(reading: dict[str, Any], metrics: Any) -> dict[str, Any]:
    """A page as the report shows it; the picture is named, not held."""
    entry = {name: value for name, value in reading.items() if name not in ("kind", "picture", "file")}
    entry |= {"picture": reading["file"], "error": None, "details": {}, "loop": None}
    if reading["found"] is not None:
        loop = metrics.loop(reading["found"], reading["expected"])
        entry["error"] = error_of(reading["kind"], [reading], metrics)
        entry["details"] = metrics.details(reading["kind"], reading["expected"], reading["found"])
        entry["loop"] = loop._asdict() if loop else None
    return entry


def requests_check(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    """Every page got a reading, whether its kind is judged or not."""
    pages, replies = (sum(kind[name] for kind in kinds) for name in ("pages", "replies"))
    problems = Counter(entry["problem"] for kind in kinds for entry in kind["samples"] if entry["problem"])
    found = f"{replies} of {pages}" + "".join(f"; {count} x {problem}" for problem, count in problems.most_common(3))
    return check("requests", "PASS" if replies == pages else "FAIL", "a reading of every page", found, FIX_REQUESTS)


def kind_check(kind: dict[str, Any]) -> dict[str, Any]:
    """A judged kind is within its limit."""
    expected = f"{kind['metric']} at most {kind['threshold']:g}"
    if kind["error"] is None:
        fix = FIX_REQUESTS if kind["pages"] else FIX_NO_PAGE
        return check(kind["kind"], "ERROR", expected, f"none of {kind['pages']} pages was read", fix)
    verdict = "PASS" if kind["error"] <= kind["threshold"] else "FAIL"
    found = f"{kind['error']:.4f} on {kind['replies']} of {kind['pages']} pages"
    return check(kind["kind"], verdict, expected, found, FIX_MISREAD)


def repetition_check(judged: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """The share of the judged kinds' replies that end in a loop is within its limit."""
    loops, replies = (sum(kind[name] for kind in judged) for name in ("loops", "replies"))
    expected = f"at most {limit:g} of the judged kinds' replies end in a loop"
    if not replies:
        return check(REPETITION, "ERROR", expected, "no reply", FIX_REQUESTS)
    verdict = "PASS" if loops / replies <= limit else "FAIL"
    return check(REPETITION, verdict, expected, f"{loops} of {replies}", FIX_LOOP)


def confusion_check(judged: list[dict[str, Any]], limit: float, metrics: Any) -> dict[str, Any]:
    """No letter or digit is read as one other letter nearly always: too few characters for an error rate to see."""
    pairs = [
        (kind["kind"], entry["expected"], entry["found"])
        for kind in judged
        if kind["kind"] in metrics.CHARACTERS
        for entry in kind["samples"]
        if entry["found"] is not None
    ]
    expected = (
        f"at most {limit:g} letters or digits that are read as one other in {metrics.CONFUSED_SHARE:.0%} of "
        f"{metrics.CONFUSED_TIMES} or more places"
    )
    if not pairs:
        named = ", ".join(metrics.CHARACTERS)
        return check(CONFUSION, "ERROR", expected, f"no reply of a judged kind among {named}", FIX_NO_CHARACTERS)
    found = metrics.confusions(pairs)
    told = "; ".join(f"{entry.expected} read as {entry.found} in {entry.times} of {entry.places}" for entry in found)
    verdict = "PASS" if len(found) <= limit else "FAIL"
    return check(CONFUSION, verdict, expected, told or f"none on {len(pairs)} pages", FIX_CONFUSION)


def check(identity: str, verdict: str, expected: str, found: str, fix: str) -> dict[str, Any]:
    entry = {"id": identity, "verdict": verdict, "expected": expected, "found": found}
    return entry if verdict == "PASS" else entry | {"fix": fix}


def save(output: Path, outcome: Outcome) -> None:
    """Write the pictures, then the JSON that names them.  Raises ``OSError``."""
    for name, picture in outcome.pictures.items():
        path = output.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture))
    write_json(output, outcome.result)


def limits(text: str) -> dict[str, float | None]:
    """An argparse type: a JSON object of kinds, repetition and confusion, with their highest accepted error or null."""
    given = json.loads(text)
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    faults = [f"{kind!r} is none of {', '.join((*KINDS, *OVERALL))}" for kind in given.keys() - {*KINDS, *OVERALL}]
    for kind, limit in given.items():
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 <= limit < math.inf):
            faults.append(f"{kind}: {limit!r} is neither null nor a number from 0 up")
    if all(limit is None for kind, limit in given.items() if kind not in OVERALL):
        faults.append("no kind has a limit, so that nothing could fail")
    if faults:
        raise argparse.ArgumentTypeError("; ".join(faults))
    return given


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="OCR quality of a served GLM-OCR.")
    steps = parser.add_subparsers(dest="step", required=True)
    for step, text in (("run", "have pages read, and score the readings"), ("read", "only have pages read")):
        asking = steps.add_parser(step, help=text, description=text)
        asking.add_argument("--output", type=Path, required=True, help="JSON to write")
        asking.add_argument("--base-url", default="http://127.0.0.1:8000", help="root of the service, without /v1")
        asking.add_argument("--model", default="glm-ocr", help="served model name")
        asking.add_argument(
            "--thresholds",
            type=limits,
            help="JSON: the kinds to read and their highest accepted error, null to show it unjudged; "
            f"default {json.dumps(DEFAULT_LIMITS)}",
        )
        asking.add_argument("--samples", type=positive, default=14, help="pages of each kind; 14 show all there is")
        asking.add_argument("--seed", type=int, help="of the pages; new in each run by default")
        asking.add_argument("--line-scale", type=positive, default=4, help="size of a line in multiples of 28 px")
        asking.add_argument(
            "--omnidocbench", type=Path, help="read regions of this folder in OmniDocBench's form instead"
        )
        asking.add_argument("--max-tokens", type=positive, default=2048, help="of a reply")
        asking.add_argument("--concurrency", type=positive, default=4, help="requests at a time")
        asking.add_argument("--timeout", type=finite, default=300.0, help="seconds to wait for one reply")
    scoring = steps.add_parser("score", help="only score the readings", description="Score what `read` wrote.")
    scoring.add_argument("--output", type=Path, required=True, help="JSON to write")
    scoring.add_argument("--readings", type=Path, required=True, help="JSON that `read` wrote")
    arguments = vars(parser.parse_args(argv))
    if arguments["step"] != "score":
        kinds = OMNIDOCBENCH_KINDS if arguments["omnidocbench"] else KINDS
        if arguments["thresholds"] is None:
            arguments["thresholds"] = {k: limit for k, limit in DEFAULT_LIMITS.items() if k in (*kinds, *OVERALL)}
        if absent := arguments["thresholds"].keys() - {*kinds, *OVERALL}:
            parser.error(f"--thresholds: OmniDocBench has no {', '.join(sorted(absent))}; leave them out")
        if arguments["seed"] is None:
            arguments["seed"] = secrets.randbelow(2**32)
    return Config(**arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step, print what it found, write its files; returns the exit status."""
    config = parse_args(argv)
    outcome = run(config)
    status, lines = report(outcome.result)
    print("\n".join(lines))
    try:
        save(config.output, outcome)
    except OSError as error:
        print(f"eval_ocr.py: cannot write {config.output} ({error}); pass a writable --output", file=sys.stderr)
        return EXIT_STATUS["ERROR"]
    return status


def report(result: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit status for readings or a stage, and what to print."""
    if "checks" not in result:
        if problem := result["problem"]:
            return EXIT_STATUS["ERROR"], [f"ERROR {problem['found']}; fix: {problem['fix']}"]
        read = sum(reading["found"] is not None for reading in result["readings"])
        return EXIT_STATUS["PASS"], [
            f"ocr_quality: {read} of {len(result['readings'])} pages were read, not yet scored"
        ]
    lines = [
        f"{entry['verdict']:5} {entry['id']:10} {entry['found']}; expected: {entry['expected']}"
        + (f"; fix: {entry['fix']}" if "fix" in entry else "")
        for entry in result["checks"]
    ]
    for kind in result["kinds"]:
        if kind["threshold"] is None:
            error = "unknown" if kind["error"] is None else f"{kind['error']:.4f}"
            lines.append(f"  -   {kind['kind']:10} {error} on {kind['replies']} of {kind['pages']} pages; not judged")
    passed = sum(entry["verdict"] == "PASS" for entry in result["checks"])
    lines.append(f"ocr_quality: {result['verdict']} ({passed}/{len(result['checks'])} checks)")
    return EXIT_STATUS[result["verdict"]], lines


if __name__ == "__main__":
    sys.exit(main())
