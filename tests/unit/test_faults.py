"""The faults that `make fault-table` injects do the damage they say, and the table says what was measured."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import damage_engine
import damage_files
import damage_weights
import fault_table
import lab_faults
from fault_lab import as_json, findings
from fault_list import FAULTS, Fault
from fault_table import Measured, Outcome
from model_files import NANO

CHANGED = {
    "chat-template": {"chat_template.jinja"},
    "image-mean-std": {"preprocessor_config.json"},
    "vocabulary-pair": {"tokenizer.json"},
    "merger-width": {"config.json", "model.safetensors"},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the nano model."""
    return Path(shutil.copytree(NANO, tmp_path / "checkpoint"))


def tensors(folder: Path) -> dict[str, damage_weights.Tensor]:
    return damage_weights.load(folder / damage_weights.FILE)


def changed(folder: Path) -> set[str]:
    """Names of the tensors that are not the nano model's."""
    before, after = tensors(NANO), tensors(folder)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_faults_are_told_apart() -> None:
    assert len({fault.id for fault in FAULTS}) == len(FAULTS) >= 15
    for fault in FAULTS:
        means = (fault.checkpoint, fault.edit, fault.flags, fault.variables, fault.middleware, fault.stale_image)
        assert sum(map(bool, means)) == 1, fault.id


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.checkpoint], ids=lambda fault: fault.id)
def test_a_checkpoint_is_damaged_where_it_says(fault: Fault, checkpoint: Path) -> None:
    assert fault.checkpoint
    fault.checkpoint(checkpoint)
    names = {path.name for path in NANO.iterdir()}
    assert {path.name for path in checkpoint.iterdir()} == names
    differing = {name for name in names if (checkpoint / name).read_bytes() != (NANO / name).read_bytes()}
    assert differing == CHANGED.get(fault.id, {"model.safetensors"})


def test_tensors_are_read_and_written_as_they_are(checkpoint: Path) -> None:
    file = checkpoint / damage_weights.FILE
    damage_weights.save(file, tensors(NANO))
    assert changed(checkpoint) == set()
    assert file.stat().st_size < 1.01 * (NANO / damage_weights.FILE).stat().st_size
    header = json.dumps({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="expected t in BF16, found F32"):
        damage_weights.load(file)


def test_rows_move_by_one(checkpoint: Path) -> None:
    damage_weights.rotate_rows(checkpoint, "lm_head.weight")
    assert changed(checkpoint) == {"lm_head.weight"}
    before, after = tensors(NANO)["lm_head.weight"], tensors(checkpoint)["lm_head.weight"]
    assert after.shape == before.shape
    assert after.values[: after.row] == before.values[-before.row :]
    assert after.values[after.row :] == before.values[: -before.row]


def test_fp8_has_three_bits_of_mantissa() -> None:
    pairs = {0.0: 0, 1.0: 1, 1.0625: 1, 1.07: 1.125, 1.1875: 1.25, -1.3: -1.25}
    assert {value: damage_weights.fp8(value) for value in pairs} == pairs
    assert [damage_weights.fp8(value) for value in (448.0, 1000.0, -1000.0)] == [448, 448, -448]
    assert [damage_weights.fp8(value) for value in (2**-9, 2**-11)] == [2**-9, 0], "steps of 2^-9 below 2^-6"
    numbers = {damage_weights.fp8(value / 512) for value in range(1, 512 * 500)}
    assert len(numbers) == 126, "128 codes of a sign without zero and NaN"


def test_fp8_is_of_the_linear_layers_within_its_precision(checkpoint: Path) -> None:
    damage_weights.round_to_fp8(checkpoint)
    before, after = tensors(NANO), tensors(checkpoint)
    names = changed(checkpoint)
    assert names == {name for name, tensor in before.items() if damage_weights.is_linear(name, tensor)}
    assert "lm_head.weight" not in names
    for name in names:
        values = [damage_weights.number(bits) for bits in before[name].values]
        rounded = [damage_weights.number(bits) for bits in after[name].values]
        largest = max(map(abs, values))
        assert len(set(map(abs, rounded))) <= 127
        # Half a step of three bits, or of the smallest step, and the rounding to bf16 after it.
        assert all(
            abs(a - b) <= max(abs(a) / 16, largest / 448 / 1024) + abs(a) / 256
            for a, b in zip(values, rounded, strict=True)
        )


@pytest.mark.parametrize("value", [0.0, 1.0, -0.15625, 3.0e-5, 447.0])
def test_bf16_there_and_back(value: float) -> None:
    assert math.isclose(damage_weights.number(damage_weights.bits_of(value)), value, rel_tol=2**-8)


def test_a_narrow_checkpoint_agrees_with_its_configuration(checkpoint: Path) -> None:
    damage_weights.narrow_text_layers(checkpoint, 256)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 256
    before, after = tensors(NANO), tensors(checkpoint)
    for layer in range(3):
        mlp = f"model.language_model.layers.{layer}.mlp."
        down, gate_up = after[mlp + "down_proj.weight"], after[mlp + "gate_up_proj.weight"]
        assert (down.shape, gate_up.shape) == ((128, 256), (512, 128))
        whole = before[mlp + "gate_up_proj.weight"]
        rows = [whole.values[at : at + 128] for at in range(0, len(whole.values), 128)]
        gates, ups = rows[:384], rows[384:]
        # Neuron for neuron, in order: its gate row, its up row and its column are of the same one.
        kept = [gates.index(gate_up.values[at : at + 128]) for at in range(0, 256 * 128, 128)]
        assert kept == sorted(set(kept))
        assert [gate_up.values[at : at + 128] for at in range(256 * 128, 512 * 128, 128)] == [ups[n] for n in kept]
        wide = before[mlp + "down_proj.weight"].values
        assert down.values.tolist() == [wide[out * 384 + neuron] for out in range(128) for neuron in kept]
    assert "model.visual.merger.up_proj.weight" not in {name for name in before if before[name] != after[name]}
    with pytest.raises(ValueError, match="1 to 255, found 256"):
        damage_weights.narrow_text_layers(checkpoint, 256)


def test_files_are_damaged(checkpoint: Path) -> None:
    damage_files.drop_image_token(checkpoint)
    template = (checkpoint / "chat_template.jinja").read_text()
    assert "<|begin_of_image|><|end_of_image|>" in template
    with pytest.raises(ValueError, match=r"expected <\|image\|>"):
        damage_files.drop_image_token(checkpoint)
    damage_files.swap_words(checkpoint, "0", "8")
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (NANO, checkpoint))
    was, now = before["model"]["vocab"], after["model"]["vocab"]
    assert {word: number for word, number in now.items() if was[word] != number} == {"0": was["8"], "8": was["0"]}
    with pytest.raises(KeyError):
        damage_files.swap_words(checkpoint, "0", "eight")
    damage_files.normalise_images(checkpoint, [0.5] * 3, [0.5] * 3)
    assert json.loads((checkpoint / "preprocessor_config.json").read_text())["image_mean"] == [0.5] * 3


def test_an_edit_fits_once_or_is_refused() -> None:
    edit = damage_engine.Edit("a.py", "style=False", "style=True")
    assert edit.of("x(style=False)") == "x(style=True)"
    for text in ("x(style=True)", "x(style=False, y(style=False))"):
        with pytest.raises(ValueError, match=r"a\.py: expected"):
            edit.of(text)
    compile(damage_engine.TWICE_AS_SLOW.new.replace("        ", ""), "core.py", "exec")


def test_every_twentieth_chat_request_fails() -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    async def statuses() -> list[int | None]:
        fault = lab_faults.EveryTwentiethFails(app)
        answers: list[int | None] = []
        for path in ("/v1/chat/completions", "/health") * 45:
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            await fault({"type": "http", "path": path}, None, send)  # type: ignore[arg-type]
            answers.append(sent[0]["status"] if sent else None)
        return answers

    answers = asyncio.run(statuses())
    assert [index // 2 + 1 for index, status in enumerate(answers) if status == 500] == [20, 40]
    assert len(passed) == 88


REPORT: dict[str, Any] = {
    "problems": [],
    "stages": {
        "ocr_smoke": {
            "verdict": "FAIL",
            "checks": [
                {"id": "health", "verdict": "PASS", "found": "HTTP 200"},
                {"id": "image", "verdict": "FAIL", "found": "character error rate 0.9\non 3 | lines"},
            ],
        },
        "ocr_bench": {"verdict": "PASS", "checks": []},
        "ocr_quality": None,
    },
}
BASELINE = {
    "runs": [{}] * 6,
    "figures": [
        {"id": "ocr_bench.latency_p50", "relative": True, "detectable": 0.21},
        {"id": "ocr_quality.line", "relative": False, "detectable": 0.05},
    ],
    "left_out": [{"id": "ocr_bench.ttft_p50"}],
}


def measured(identity: str, report: dict[str, Any] = REPORT, **more: Outcome) -> Measured:
    columns = fault_table.outcomes(report) | more
    return Measured(identity, "what it is", "checkpoint", ("WEIGHTS_ALTERED",), columns)


def document(*faults: Measured, runs: tuple[str, ...] = ("PASS",), unmeasured: tuple[str, ...] = ()) -> str:
    engine = {"vllm": "0.32.0+cpu", "transformers": "5.19.0"}
    record = {"engine": engine, "baseline": BASELINE, "healthy": runs, "unmeasured": unmeasured}
    return fault_table.render(record | {"faults": [as_json(fault) for fault in faults]})


def test_columns_are_the_reports() -> None:
    columns = fault_table.outcomes(REPORT)
    assert columns["ocr_smoke"] == Outcome("FAIL", (("image", "character error rate 0.9\non 3 | lines"),))
    assert not columns["ocr_bench"].caught
    assert columns["ocr_quality"].caught, "a stage without a result is seen"
    assert not columns["report"].caught
    unmeasured = fault_table.outcome(
        {"verdict": "ERROR", "checks": [{"id": "top1", "verdict": "ERROR", "found": None}]}
    )
    assert unmeasured.failed == (("top1", "not measured"),)
    assert fault_table.outcomes(REPORT | {"problems": ["another image"]})["report"].caught


def test_the_table_says_who_saw_it_and_who_could_not() -> None:
    text = document(measured("one", trusted=Outcome("FAIL", (("kl_image", "7 times"),))))
    (line,) = [line for line in text.splitlines() if line.startswith("| one |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "one", "checkpoint", "`WEIGHTS_ALTERED`", "**FAIL** `image`", "pass", "**ERROR** `result`", "n/a",
        "**FAIL** `kl_image`", "n/a", "n/a", "pass",
    ]  # fmt: skip
    assert "- smoke, `image`: character error rate 0.9 on 3 | lines" in text
    assert "1 of 1 faults are caught" in text
    assert "No NPU was involved" in text


def test_what_escaped_is_said() -> None:
    healthy = {"problems": [], "stages": {"ocr_smoke": {"verdict": "PASS", "checks": []}}}
    text = document(measured("one"), measured("two", healthy), runs=("PASS", "FAIL"))
    assert "1 of 2 faults are caught" in text
    assert "- Nothing saw it." in text
    assert "sees 1, all but two." in text
    extra = measured("three", healthy, trusted=Outcome("FAIL", (("kl_image", "7 times"),)))
    assert "1 of 1 faults are caught" in document(extra)
    assert "sees 0, all but three." in document(extra)
    assert "**Not measured**, and so not in the table: four." in document(extra, unmeasured=("four",))
    assert "Not measured" not in document(extra)
    assert "**1 of 2 PASS** (PASS, FAIL)." in text
    assert "it is not shown here that a healthy run passes" in document(measured("one"), runs=())


def test_the_document_is_of_its_record() -> None:
    record = json.loads(fault_table.RECORD.read_text(encoding="utf-8"))
    assert fault_table.DOCUMENT.read_text(encoding="utf-8") == fault_table.render(record)
    assert {fault["id"] for fault in record["faults"]} | set(record["unmeasured"]) == {fault.id for fault in FAULTS}


def test_a_long_finding_is_cut() -> None:
    assert len(fault_table.shortened("word " * 100)) <= fault_table.FOUND_CHARACTERS
    assert fault_table.shortened("a\n b") == "a b"


@pytest.mark.parametrize("write", [json.dumps, lambda data: json.dumps(data, indent=2)])
def test_what_was_measured_outlives_the_session(write: Callable[[Any], str]) -> None:
    one = measured("one", trusted=Outcome("n/a"))
    assert Measured.from_json(json.loads(write(as_json(one)))) == one


def test_findings_of_a_deployment() -> None:
    output = "x [WEIGHTS_ALTERED] expected\n[PROBE_MERGER] warning\n[WEIGHTS_ALTERED] again\n[ERROR]: failed [node1]"
    assert findings(output) == ("WEIGHTS_ALTERED", "PROBE_MERGER warning")
