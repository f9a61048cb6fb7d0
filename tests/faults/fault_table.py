"""docs/fault-table.md, written from what the faults' runs measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rendering import PROJECT

DOCUMENT = PROJECT / "docs" / "fault-table.md"
RECORD = DOCUMENT.with_suffix(".json")
"""What the document is written from: ``faults`` (``Measured.from_json``), ids of those ``unmeasured``, verdicts of the
``healthy`` runs, the ``baseline``, the ``engine``'s versions."""
STAGES = {
    "ocr_smoke": "smoke",
    "ocr_bench": "bench",
    "ocr_quality": "quality",
    "served_accuracy": "served accuracy",
    "trusted": "served accuracy, trusted copy",
    "ocr_accuracy": "device accuracy",
    "baseline": "baseline",
    "report": "report",
}
"""The columns: the five stages, ``served_accuracy`` a second time against a trusted copy, and what the report adds."""
FOUND_CHARACTERS = 240
PASS, NOT_RUN = "PASS", "n/a"
HEAD = """\
# Faults, and the stages that see them

Written by `make fault-table` from [what it measured](fault-table.json); do not edit. Each fault is a real one
in the lab's engine, its checkpoint or its settings: it is served, and `validate.yml` runs all stages on it.

**This is the CPU lab engine (vLLM {vllm}, transformers {transformers}) with the nano GLM-OCR. No NPU was involved.**
Device accuracy compares transformers on that CPU with itself, beside the service: in the lab it fails only where
transformers cannot run the checkpoint at all, and says nothing about an NPU.

{caught} of {count} faults are caught by at least one stage. `validate.yml` alone, with neither a baseline nor a trusted
copy of the weights, sees {alone}. The checks that did not pass are named; what they found is below.
"""
NOTES = """
- **deploy gate**: what `deploy.yml --check` finds, with the manifest of the good weights. A deployment that passes it
  starts the engine and asks the smoke, the same script as stage smoke, before the release counts as good. For the
  stages the gates were passed over, as with a manifest of the damaged folder.
- **served accuracy**: the reference reads the folder that is served. A fault in the checkpoint is in both sides then,
  and the comparison sees it by chance at most: only known answers (smoke, quality) do. **trusted copy**: the same stage
  once more, its reference reading the good checkpoint (`validate.yml --tags served_accuracy`, `glm_ocr_weights_path`
  set to it); n/a where the served folder is the good one, and the column before is that comparison.
- **baseline**: the comparison of the run's figures with promoted healthy runs. Nothing else judges speed, and the lab's
  machine has other work: a baseline of a busy hour hides a slower engine in a quiet one.
- **report**: what the merged report itself finds about the deployment.
- n/a: the stage could not run, or does not apply.

## What was found
"""


@dataclass(frozen=True)
class Outcome:
    """What one column saw: a verdict, and id and finding of each check that did not pass."""

    verdict: str
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def caught(self) -> bool:
        return self.verdict not in (PASS, NOT_RUN)


@dataclass(frozen=True)
class Measured:
    """One fault as it was measured; ``gate`` names the findings of a deployment in check mode, warnings marked."""

    id: str
    what: str
    where: str
    gate: tuple[str, ...]
    columns: Mapping[str, Outcome]

    @property
    def caught_by(self) -> list[str]:
        """The columns that saw it, of the table's order."""
        return [name for name in STAGES if name in self.columns and self.columns[name].caught]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        columns = {
            name: Outcome(column["verdict"], tuple((check, found) for check, found in column["failed"]))
            for name, column in data["columns"].items()
        }
        return cls(data["id"], data["what"], data["where"], tuple(data["gate"]), columns)


def outcomes(report: Mapping[str, Any]) -> dict[str, Outcome]:
    """The columns of a merged report (``report.json``); a stage without a result is ERROR."""
    columns = {name: outcome(stage) for name, stage in report["stages"].items()}
    problems = tuple(("problems", problem) for problem in report["problems"])
    return columns | {"report": Outcome("ERROR" if problems else PASS, problems)}


def outcome(stage: Mapping[str, Any] | None) -> Outcome:
    """One stage's result as a cell."""
    if stage is None:
        return Outcome("ERROR", (("result", "none was left"),))
    failed = tuple(
        (check["id"], "not measured" if check["found"] is None else str(check["found"]))
        for check in stage["checks"]
        if check["verdict"] != PASS
    )
    return Outcome(stage["verdict"], failed)


def cell(found: Outcome) -> str:
    """A verdict, and the checks behind it unless it is a PASS."""
    if not found.caught:
        return "pass" if found.verdict == PASS else found.verdict
    return f"**{found.verdict}** " + ", ".join(f"`{name}`" for name, _ in found.failed)


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"


def shortened(text: str) -> str:
    """A finding on one line, cut where it becomes a listing."""
    line = " ".join(text.split())
    return line if len(line) <= FOUND_CHARACTERS else line[: FOUND_CHARACTERS - 1].rstrip() + "…"


def healthy_lines(runs: Sequence[str], baseline: Mapping[str, Any]) -> list[str]:
    """``runs`` are the verdicts in their order; ``baseline`` is what they were compared with."""
    passed = runs.count(PASS)
    judged = ", ".join(
        f"{figure['id']} ({100 * figure['detectable']:.0f} % worse is caught)"
        if figure["relative"]
        else f"{figure['id']} ({100 * figure['detectable']:.0f} points worse are caught)"
        for figure in baseline["figures"]
    )
    left_out = ", ".join(entry["id"] for entry in baseline["left_out"]) or "none"
    row_of_runs = [
        f"{len(runs)} validations in a row of the undamaged service, every stage and the comparison with the baseline:",
        f"**{passed} of {len(runs)} PASS**" + ("" if passed == len(runs) else f" ({', '.join(runs)})") + ".",
    ]
    return [
        *(
            row_of_runs
            if runs
            else ["None was compared with the baseline: it is not shown here that a healthy run passes."]
        ),
        "",
        f"The baseline was promoted from {len(baseline['runs'])} healthy runs before, every stage a PASS. "
        f"Judged: {judged}.",
        f"Left out, because too small a change would not stand out in that many runs of this host: {left_out}.",
    ]


def render(record: Mapping[str, Any]) -> str:
    """The document, of the record."""
    faults = [Measured.from_json(fault) for fault in record["faults"]]
    caught = sum(bool(fault.caught_by) for fault in faults)
    escaped = [fault.id for fault in faults if not set(fault.caught_by) - {"trusted", "baseline"}]
    alone = f"{len(faults) - len(escaped)}" + (f", all but {', '.join(escaped)}" if escaped else "")
    head = HEAD.format(caught=caught, count=len(faults), alone=alone, **record["engine"])
    lines = [
        head,
        row(["fault", "in the", "deploy gate", *STAGES.values()]),
        row(["---"] * (3 + len(STAGES))),
    ]
    for fault in faults:
        cells = [cell(fault.columns.get(name, Outcome(NOT_RUN))) for name in STAGES]
        gates = ", ".join(f"`{name}`" for name in fault.gate) or "passes"
        lines.append(row([fault.id, fault.where, gates, *cells]))
    if record["unmeasured"]:
        lines += ["", f"**Not measured**, and so not in the table: {', '.join(record['unmeasured'])}."]
    lines += [NOTES]
    for fault in faults:
        lines += [f"### {fault.id}", "", f"{fault.what[0].upper()}{fault.what[1:]}.", ""]
        lines += [
            f"- {STAGES[name]}, `{check}`: {shortened(found)}"
            for name in fault.caught_by
            for check, found in fault.columns[name].failed
        ] or ["- Nothing saw it."]
        lines.append("")
    return "\n".join([*lines, "## Healthy runs", "", *healthy_lines(record["healthy"], record["baseline"]), ""])
