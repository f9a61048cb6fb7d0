"""eval_accuracy.py without torch: command line, refusals, and every verdict on measurements made by hand.

The passes themselves run in tests/engine, where torch is.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

import eval_accuracy
from eval_accuracy import HIDDEN_STATES, LOGITS, Comparison
from tensor_metrics import ErrorSums, Position

# Verbatim from the user's document, without the shell's line continuations.
SEED_LINE = "python scripts/eval_accuracy.py --model /opt/atomgit/weights/GLM-OCR-bf16 --output accuracy_result.json"
SCHEMAS = Path(__file__).resolve().parents[2] / "files" / "schemas"
LAYERS = ("vision.0", "text.0", HIDDEN_STATES, LOGITS)
GIB = 2**30


def measured(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a run from the command line."""
    output = folder / "reports" / "accuracy.json"
    status = eval_accuracy.main(["--model", str(folder), "--output", str(output), *more])
    report: dict[str, Any] = json.loads(output.read_text())
    for name in ("stage", "accuracy"):
        jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.schema.json").read_text())).validate(report)
    return status, report


def test_command_line_of_the_document() -> None:
    config = eval_accuracy.parse_args(shlex.split(SEED_LINE)[2:])
    assert (config.model, config.output) == (Path("/opt/atomgit/weights/GLM-OCR-bf16"), Path("accuracy_result.json"))
    assert (config.device, config.max_abs_error, config.min_cosine) == ("npu", 1.0, 0.999)
    assert (config.warn_ratio, config.fail_ratio) == (1.5, 2.0)


@pytest.mark.parametrize("bad", ["--device=gpu", "--device=npu:", "--device=npu:-1", "--images=0", "--fail-ratio=nan"])
def test_unusable_arguments_are_refused(bad: str) -> None:
    with pytest.raises(SystemExit) as refused:
        eval_accuracy.parse_args(["--model", "x", "--output", "y", bad])
    assert refused.value.code == 2


def test_npu_numbers_are_taken() -> None:
    assert eval_accuracy.parse_args(["--model", "x", "--output", "y", "--device", "npu:1"]).device == "npu:1"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand-ins for torch with two NPUs and for transformers, up to where a model would be loaded."""
    torch, npu = ModuleType("torch"), ModuleType("npu")
    vars(npu).update(is_available=lambda: True, device_count=lambda: 2)
    vars(torch).update(npu=npu)
    transformers = ModuleType("transformers")
    vars(transformers).update(__version__="4.57.6", CONFIG_MAPPING={})
    for name, module in (("torch", torch), ("torch_npu", ModuleType("torch_npu")), ("transformers", transformers)):
        monkeypatch.setitem(sys.modules, name, module)
    return torch


@pytest.mark.parametrize(
    ("device", "absent", "found"),
    [
        ("npu", "torch", "needs torch"),
        ("npu", "torch_npu", "needs torch_npu"),
        ("npu:2", None, "no npu:2 here: torch-npu sees 2 device(s)"),
        ("npu:1", None, "config.json names no model_type"),
        ("cpu", None, "config.json names no model_type"),
    ],
)
def test_without_what_it_needs_nothing_is_measured(
    tmp_path: Path,
    engine: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
    absent: str | None,
    found: str,
) -> None:
    del engine
    if absent:
        monkeypatch.setitem(sys.modules, absent, None)  # makes the import fail
    status, report = measured(tmp_path, "--device", device)
    assert (status, report["verdict"]) == (2, "ERROR")
    assert found in report["checks"][-1]["found"]
    assert report["checks"][-1]["fix"]
    assert (report["table"], report["layers"], report["positions"]) == (None, None, None)
    assert capsys.readouterr().out.splitlines()[-1].startswith("ocr_accuracy: ERROR")


def test_no_device_is_said(tmp_path: Path, engine: ModuleType) -> None:
    vars(engine.npu)["is_available"] = lambda: False
    status, report = measured(tmp_path)
    assert status == 2
    assert "no npu here: torch-npu sees 0 device(s)" in report["checks"][0]["found"]


def test_old_transformers_is_said(tmp_path: Path, engine: ModuleType) -> None:
    del engine
    (tmp_path / "config.json").write_text('{"model_type": "glm_ocr"}')
    status, report = measured(tmp_path)
    assert status == 2
    assert "transformers 4.57.6 does not know model_type 'glm_ocr'" in report["checks"][-1]["found"]


def test_unwritable_output_is_said(tmp_path: Path, engine: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    del engine
    (tmp_path / "file").write_text("")
    assert eval_accuracy.main(["--model", str(tmp_path), "--output", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def side(error: float = 0.01, *, kl: float = 1e-4) -> Comparison:
    """The same error on every value of 1000 in each layer, and 200 decided positions."""
    made = Comparison()
    for layer in LAYERS:
        made.errors[layer] = ErrorSums(
            count=1000,
            abs_error=1000 * error,
            squared_error=1000 * error**2,
            relative_error_sum=1000 * error,
            squared_reference=1000.0,
            squared_measured=1000.0,
            product=1000 * (1 - error**2 / 2),
            max_abs=error,
        )
    made.positions = [Position(kl, True, 2.0)] * 200
    return made


def checks(floor: Comparison, device: Comparison, peak: int | None = GIB) -> dict[str, dict[str, Any]]:
    config = eval_accuracy.parse_args(["--model", "x", "--output", "y"])
    report = {
        "table": eval_accuracy.table(config, floor, device),
        "layers": eval_accuracy.layer_rows(floor, device),
        "positions": eval_accuracy.position_rows(config, floor, device),
    }
    return {entry["id"]: entry for entry in eval_accuracy.judge(config, floor, device, report, peak, 2 * GIB)}


def failed(found: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, entry in found.items() if entry["verdict"] == "FAIL"}


def test_a_device_as_noisy_as_the_floor_passes() -> None:
    found = checks(side(), side())
    assert failed(found) == set()
    assert len(found) == 9
    assert not any("warning" in entry or "fix" in entry for entry in found.values())


def test_noise_warns_over_one_and_a_half_and_fails_over_two() -> None:
    noisy = checks(side(), side(0.016))
    assert failed(noisy) == set()
    assert {name for name, entry in noisy.items() if "warning" in entry} == {
        "noise_logits",
        "noise_hidden_states",
        "noise_layers",
    }
    assert failed(checks(side(), side(0.021))) == {"noise_logits", "noise_hidden_states", "noise_layers"}


def test_the_worst_layer_is_named() -> None:
    device = side()
    device.errors["text.0"].squared_error *= 9
    found = checks(side(), device)
    assert failed(found) == {"noise_layers"}
    assert found["noise_layers"]["found"].startswith("3 in text.0")


def test_an_error_where_the_floor_has_none_fails() -> None:
    floor = side()
    floor.errors["vision.0"].squared_error = 0.0
    assert failed(checks(floor, side())) == {"noise_layers"}


def test_thresholds_of_the_document() -> None:
    for name in (LOGITS, HIDDEN_STATES):
        device = side()
        device.errors[name].max_abs = 1.0
        assert failed(checks(side(), device)) == {name}
        device = side()
        device.errors[name].product = 999.0
        assert failed(checks(side(), device)) == {name}


def test_a_floor_over_the_threshold_sets_it_and_is_said() -> None:
    floor, device = side(), side()
    floor.errors[LOGITS].max_abs = 3.0
    device.errors[LOGITS].max_abs = 5.9
    found = checks(floor, device)
    assert failed(found) == set()
    assert "bf16 on the CPU itself is not under 1" in found[LOGITS]["warning"]
    device.errors[LOGITS].max_abs = 6.0
    assert failed(checks(floor, device)) == {LOGITS}


def test_nan_fails_and_is_located() -> None:
    device = side()
    device.errors["text.0"].non_finite = 3
    device.errors[LOGITS].non_finite = 3
    device.positions = [Position(math.nan, False, math.nan)] * 200
    found = checks(side(), device)
    assert failed(found) == {"finite", LOGITS, "noise_logits", "noise_layers", "kl", "top1"}
    assert found["finite"]["found"] == "6 values, first in text.0"


def test_kl_is_judged_by_the_noise_it_stands_for() -> None:
    assert failed(checks(side(), side(kl=3.9e-4))) == set()
    assert failed(checks(side(), side(kl=4.1e-4))) == {"kl"}  # twice the noise is four times the KL


def test_top1_counts_decided_positions_only() -> None:
    device = side()
    device.positions = [Position(1e-4, True, 2.0)] * 197 + [Position(1e-4, False, 2.0)] * 3
    assert failed(checks(side(), device)) == {"top1"}
    device.positions = [Position(1e-4, True, 2.0)] * 197 + [Position(1e-4, False, 0.5)] * 3
    assert failed(checks(side(), device)) == set()


def test_memory_is_bounded() -> None:
    assert failed(checks(side(), side(), peak=2 * GIB)) == {"memory"}
    assert checks(side(), side(), peak=None)["memory"]["found"] == "not measurable on this system"


def test_memory_of_this_process_is_read() -> None:
    assert (eval_accuracy.memory_bytes("VmHWM") or 0) > 2**20
    assert eval_accuracy.memory_bytes("NoSuchField") is None
