"""Accuracy of GLM-OCR on a device: its logits and hidden states against an fp32 reference on the CPU.

    python scripts/eval_accuracy.py --model /opt/atomgit/weights/GLM-OCR-bf16 --output accuracy_result.json

Three passes over the same prompts, one model in memory at a time: fp32 on the CPU (the reference), bf16 on the CPU
(the noise floor: what bf16 itself costs), bf16 on the device.  All three get the identical preprocessed tensors,
with eager attention.  Forward hooks take every layer's output as it appears: the reference's goes to a temporary
file beside ``--output``, the others' are compared with it and dropped.  An image prompt is followed by the text drawn
in its image, so that the logits of a reply are compared too (teacher forcing).

The formulas, all in ``tensor_metrics.py``: max_abs_error = max|m - r|; mean_abs_error = mean|m - r|; relative_error =
mean(|m - r| / max(|r|, 2^-10)); cosine_similarity = r.m / (|r| |m|); rmse = sqrt(mean (m - r)^2); noise_ratio =
rmse of the device / rmse of the noise floor; kl = KL(softmax r || softmax m) per position, in nats.

=====================  ===============================================================================================
check                  passes when
=====================  ===============================================================================================
device                 the device is there (otherwise nothing is measured: exit status 2)
finite                 the device made no NaN and no infinity
logits, hidden_states  the document's thresholds: max_abs_error < 1.0 and cosine_similarity > 0.999; hidden_states is
                       the output of the final norm.  1.0 depends on the scale of the weights: where the noise floor
                       itself is over it, the limit is 2 x the floor's error instead, and a warning says so
noise_*                noise_ratio at most 2, with a warning above 1.5: of the logits, of the hidden states, and the
                       worst of all layers, vision tower included.  Measured on GLM-OCR's architecture: another
                       healthy bf16 implementation 0.99 to 1.02; on the nano int4 MLPs 2.9 to 3.7, rope theta off by
                       10 % 5.3 to 6.5, one dead head 10 to 14, swapped rotary pairs 37 to 77.  int8 weights with a
                       scale per row are inside bf16's own noise (0.9 to 1.01) and not seen by any check here
kl                     kl_noise, mean of sqrt(2 kl), at most 2 times the noise floor's
top1                   the first token is the reference's on 99 % of the positions where the reference is sure, by at
                       least 1 nat; elsewhere rounding may decide, and agreement is reported only
memory                 anonymous memory peaked under 2 x the checkpoint + 1 GiB (pages of the mapped checkpoint are
                       cache, which the kernel can take back)
=====================  ===============================================================================================

``--device cpu`` runs bf16 on the CPU as the device too: its ratios are then 1 by construction, and say that the
comparison works, nothing about an NPU.  This compares transformers with itself: a fault of the served path (vLLM's
own rotary embedding, chat template, image processor) is invisible here and is what ``eval_served.py`` looks for.

Exit status: 0 every check passed, 1 a check failed, 2 could not measure.  The JSON is written in all three cases.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accuracy_cases
import local_model
from accuracy_cases import Case
from accuracy_report import check, closed, envelope, finish, progress, shown, unmeasured
from local_model import LocalModelError
from stage_result import finite, positive
from tensor_metrics import ErrorSums, Position, logit_positions, ratio, summary

STAGE = "ocr_accuracy"
LOGITS, HIDDEN_STATES = "logits", "hidden_states"
GIB = 2**30
SAMPLE_SECONDS = 0.01
NOTE_CPU = "The device is the CPU itself: its noise ratios are 1 by construction. Nothing here speaks of an NPU."

FIX_NOISE = (
    "Compare the first layer that stands out in `layers` with the ones before it: the fault is in what it computes. "
    "Look for another dtype, quantisation, or a fused kernel of torch-npu and CANN that the release notes mention."
)


@dataclass(frozen=True)
class Config:
    """The command line; ratios and cosines have no unit, ``decided_margin`` is in nats."""

    model: Path
    output: Path
    device: str
    images: int
    scale: int
    seed: int
    max_abs_error: float
    min_cosine: float
    warn_ratio: float
    fail_ratio: float
    min_top1: float
    decided_margin: float


@dataclass
class Comparison:
    """One side against the reference: error sums by layer in the order of computation, and the logits' positions."""

    errors: dict[str, ErrorSums] = field(default_factory=lambda: defaultdict(ErrorSums))
    positions: list[Position] = field(default_factory=list)

    def add(self, layer: str, reference: Any, measured: Any) -> None:
        self.errors[layer].add(reference, measured)
        if layer == LOGITS:
            self.positions += logit_positions(reference, measured)

    def non_finite(self) -> int:
        return sum(errors.non_finite for errors in self.errors.values())


@dataclass
class Resources:
    """Seconds by activity, and the peak of the process's anonymous memory in bytes, sampled every 10 ms."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak_anonymous: int | None = None

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start

    @contextmanager
    def watched(self) -> Iterator[None]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(SAMPLE_SECONDS):
                if (used := memory_bytes("RssAnon", "RssShmem")) is not None:
                    self.peak_anonymous = max(self.peak_anonymous or 0, used)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def memory_bytes(*fields: str) -> int | None:
    """The sum of these fields of /proc/self/status; None where there is no such file or field."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return sum(int(re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024 for name in fields)
    except (OSError, LookupError):
        return None


def layers_of(model: Any) -> dict[str, Any]:
    """The modules whose outputs are compared, by name.  Raises ``LocalModelError`` for another architecture."""
    try:
        visual, text = model.model.visual, model.model.language_model
        return {
            **{f"vision.{index}": block for index, block in enumerate(visual.blocks)},
            "vision.merger": visual.merger,
            **{f"text.{index}": layer for index, layer in enumerate(text.layers)},
            HIDDEN_STATES: text.norm,
            LOGITS: model.lm_head,
        }
    except AttributeError as error:
        raise LocalModelError(
            f"not the architecture of GLM-OCR ({error})", "pass GLM-OCR weights to --model"
        ) from error


def forward(model: Any, inputs: dict[str, Any], take: Callable[[str, Any], None]) -> None:
    """One forward pass; ``take`` gets each layer's output as it appears, as a tensor on the device."""

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _inputs, output: take(name, output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers_of(model).items()]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def run_pass(
    config: Config,
    device: str,
    dtype: str,
    inputs: dict[str, dict[str, Any]],
    resources: Resources,
    take: Callable[[str, str, Any], None],
) -> None:
    """One model over all prompts; ``take(case, layer, tensor)`` gets every output.  Raises ``LocalModelError``."""
    torch = local_model.required("torch")
    label = f"{dtype} on {device}"
    with resources.timed("load"):
        model = local_model.load_model(config.model, getattr(torch, dtype), device, attention="eager")
    taking = 0.0

    def timed_take(layer: str, tensor: Any) -> None:
        nonlocal taking
        host = tensor.detach().to("cpu")  # waits for the device: part of the forward pass
        start = time.perf_counter()
        take(name, layer, host)
        taking += time.perf_counter() - start

    for index, (name, tensors) in enumerate(inputs.items(), 1):
        progress(f"{label}: {name} ({index} of {len(inputs)})")
        start, taking = time.perf_counter(), 0.0
        try:
            with torch.inference_mode():
                forward(model, local_model.on(device, tensors), timed_take)
        except LocalModelError:
            raise
        except Exception as error:  # anything can fail on a device
            raise local_model.unusable(config.model, device, error) from error
        resources.seconds["forward"] += time.perf_counter() - start - taking
        resources.seconds["compare"] += taking
    with resources.timed("load"):
        del model
        gc.collect()


def measure(config: Config, prompts: Sequence[Case], resources: Resources) -> tuple[Comparison, Comparison]:
    """The noise floor and the device against the reference.  Raises ``LocalModelError``."""
    torch = local_model.required("torch")
    with resources.timed("load"):
        processor = local_model.load_processor(config.model)
        inputs = {}
        for case in prompts:
            reply = processor.tokenizer.encode(case.drawn or "", add_special_tokens=False)
            inputs[case.name] = local_model.with_reply(local_model.encode(processor, case.prompt, case.image), reply)
    floor, device = Comparison(), Comparison()
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        # Without a name, so that nothing is left of a killed run; unbuffered, so that a full disk shows in the write.
        spool = tempfile.TemporaryFile(dir=config.output.parent, buffering=0)
    except OSError as error:
        raise no_room(config, error) from error
    places: dict[tuple[str, str], int] = {}

    def keep(case: str, layer: str, tensor: Any) -> None:
        places[case, layer] = spool.tell()
        rest = tensor.contiguous().numpy().data.cast("B")
        try:
            while rest:
                rest = rest[spool.write(rest) :]
        except OSError as error:
            raise no_room(config, error) from error

    def compare(side: Comparison) -> Callable[[str, str, Any], None]:
        def take(case: str, layer: str, tensor: Any) -> None:
            buffer = bytearray(4 * tensor.numel())
            spool.seek(places[case, layer])
            spool.readinto(buffer)
            side.add(layer, torch.frombuffer(buffer, dtype=torch.float32).view(tensor.shape), tensor)

        return take

    with spool:
        run_pass(config, "cpu", "float32", inputs, resources, keep)
        run_pass(config, "cpu", "bfloat16", inputs, resources, compare(floor))
        run_pass(config, config.device, "bfloat16", inputs, resources, compare(device))
    return floor, device


def no_room(config: Config, error: OSError) -> LocalModelError:
    """The reference's layers cannot be written."""
    return LocalModelError(
        f"no room for the reference's layers in {config.output.parent} ({error})",
        "free space there, about 100 MB a prompt, or pass another --output",
    )


def table(config: Config, floor: Comparison, device: Comparison) -> dict[str, dict[str, Any]]:
    """The document's table, a member for each of its columns."""
    rows = {}
    for name in (LOGITS, HIDDEN_STATES):
        metrics = device.errors[name].metrics()
        largest, cosine = metrics["max_abs_error"], metrics["cosine_similarity"]
        threshold = config.max_abs_error
        if (noise := floor.errors[name].metrics()["max_abs_error"]) is not None and noise >= threshold:
            threshold = config.fail_ratio * noise
        passed = largest is not None and largest < threshold
        passed = passed and cosine is not None and cosine > config.min_cosine
        rows[name] = {
            "max_abs_error": largest,
            "mean_abs_error": metrics["mean_abs_error"],
            "relative_error": metrics["relative_error"],
            "cosine_similarity": cosine,
            "threshold": threshold,
            "result": "PASS" if passed else "FAIL",
        }
    return rows


def layer_rows(floor: Comparison, device: Comparison) -> list[dict[str, Any]]:
    """Per layer, in the order of computation: the errors of the device and of the floor, and their ratio."""
    rows = []
    for name, errors in device.errors.items():
        measured, noise = errors.metrics(), floor.errors[name].metrics()
        rows.append(
            {
                "layer": name,
                "device": measured,
                "noise_floor": noise,
                "noise_ratio": ratio(measured["rmse"], noise["rmse"]),
            }
        )
    return rows


def position_rows(config: Config, floor: Comparison, device: Comparison) -> dict[str, Any]:
    """Agreement and KL of the logits, of the device and of the floor."""
    return {
        "device": summary(device.positions, config.decided_margin),
        "noise_floor": summary(floor.positions, config.decided_margin),
    }


def judge(
    config: Config, floor: Comparison, device: Comparison, report: dict[str, Any], peak: int | None, limit: int
) -> Iterator[dict[str, Any]]:
    """The checks, from what ``report`` already holds."""
    bad = device.non_finite()
    named = [name for name, errors in device.errors.items() if errors.non_finite]
    yield check(
        "finite",
        not bad,
        "no NaN and no infinity in any layer",
        f"{bad} values, first in {named[0]}" if bad else "all values finite",
        FIX_NOISE,
    )
    for name, row in report["table"].items():
        noise = floor.errors[name].metrics()
        yield check(
            name,
            row["result"] == "PASS",
            f"max_abs_error < {row['threshold']:g} and cosine_similarity > {config.min_cosine:g}",
            f"max_abs_error {shown(row['max_abs_error'])}, cosine_similarity {shown(row['cosine_similarity'])} "
            f"(noise floor: {shown(noise['max_abs_error'])}, {shown(noise['cosine_similarity'])})",
            FIX_NOISE,
            warning=f"bf16 on the CPU itself is not under {config.max_abs_error:g} with these weights and prompts: "
            f"{config.fail_ratio:g} times its error is the limit instead."
            if row["threshold"] != config.max_abs_error
            else None,
        )
    rows = report["layers"]
    inner = [row for row in rows if row["layer"] not in (LOGITS, HIDDEN_STATES)]
    # No ratio (the device is not finite, or errs where the CPU does not at all) is worse than any.
    worst = max(inner, key=lambda row: float("inf") if row["noise_ratio"] is None else row["noise_ratio"])
    by_name = {row["layer"]: row for row in rows}
    for identity, row in (
        ("noise_logits", by_name[LOGITS]),
        ("noise_hidden_states", by_name[HIDDEN_STATES]),
        ("noise_layers", worst),
    ):
        value = row["noise_ratio"]
        yield check(
            identity,
            value is not None and value <= config.fail_ratio,
            f"noise_ratio at most {config.fail_ratio:g}, better under {config.warn_ratio:g}",
            f"{shown(value)} in {row['layer']} (rmse {shown(row['device']['rmse'])}, "
            f"noise floor {shown(row['noise_floor']['rmse'])})",
            FIX_NOISE,
            warning=f"over {config.warn_ratio:g}. {FIX_NOISE}" if value and value > config.warn_ratio else None,
        )
    measured, noise = report["positions"]["device"], report["positions"]["noise_floor"]
    kl_ratio = ratio(measured["kl_noise"], noise["kl_noise"])
    yield check(
        "kl",
        kl_ratio is not None and kl_ratio <= config.fail_ratio,
        f"kl_noise at most {config.fail_ratio:g} times the noise floor's",
        f"{shown(kl_ratio)} times: {shown(measured['kl_noise'])} nats, noise floor {shown(noise['kl_noise'])} "
        f"({measured['positions']} positions)",
        FIX_NOISE,
    )
    agreement = measured["decided_top1_agreement"]
    yield check(
        "top1",
        agreement is not None and agreement >= config.min_top1,
        f"the reference's first token on {config.min_top1:.0%} of the positions decided by "
        f"{config.decided_margin:g} nat",
        f"{shown(agreement)} of {measured['decided_positions']} decided positions, "
        f"{shown(measured['top1_agreement'])} of all {measured['positions']}",
        FIX_NOISE,
    )
    yield check(
        "memory",
        peak is None or peak < limit,
        f"anonymous memory under {limit / GIB:.2f} GiB (2 x the checkpoint + 1 GiB)",
        "not measurable on this system" if peak is None else f"{peak / GIB:.2f} GiB",
        "Pass fewer or smaller images: --images, --scale.",
    )


def run(config: Config) -> dict[str, Any]:
    """All passes and checks; follows ``files/schemas/stage.schema.json`` and ``accuracy.schema.json``."""
    report = envelope(STAGE, asdict(config), "note", "prompts", "table", "layers", "positions", "resources")
    if config.device == "cpu":
        report["note"] = NOTE_CPU
    resources = Resources()
    try:
        with resources.timed("import"):
            local_model.require_device(config.device, local_model.required("torch"))
        report["checks"].append(check("device", True, config.device, "present", ""))
        prompts = accuracy_cases.cases(config.images, config.scale, config.seed)
        with resources.timed("passes"), resources.watched():
            floor, device = measure(config, prompts, resources)
        size = sum(path.stat().st_size for path in config.model.glob("*.safetensors"))
        limit = 2 * size + GIB
        peak = resources.peak_anonymous
        report |= {
            "prompts": [
                {"name": case.name, "kind": case.kind, "prompt": case.prompt, "reply": case.drawn} for case in prompts
            ],
            "table": table(config, floor, device),
            "layers": layer_rows(floor, device),
            "positions": position_rows(config, floor, device),
            "resources": {
                "checkpoint_bytes": size,
                "anonymous_peak_bytes": peak,
                "anonymous_limit_bytes": limit,
                "resident_peak_bytes": memory_bytes("VmHWM"),
                "seconds": {name: round(value, 3) for name, value in resources.seconds.items()},
                # What the three passes take, without loading, in units of the bare forward passes.
                "time_ratio": round(
                    (resources.seconds["passes"] - resources.seconds["load"]) / resources.seconds["forward"], 3
                ),
            },
        }
        report["checks"] += judge(config, floor, device, report, peak, limit)
    except LocalModelError as error:
        report["checks"].append(unmeasured("device", f"a model on {config.device}", error.found, error.fix))
    return closed(report)


def device_name(text: str) -> str:
    """An argparse type: ``cpu``, ``npu`` or ``npu:<index>``."""
    if not re.fullmatch(r"cpu|npu(:\d+)?", text):
        raise ValueError(text)
    return text


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Accuracy of GLM-OCR on a device against fp32 on the CPU.")
    parser.add_argument("--model", type=Path, required=True, help="folder with the weights")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--device", type=device_name, default="npu", help="npu, npu:1 or cpu")
    parser.add_argument("--images", type=positive, default=4, help="image prompts, of one and of two lines in turn")
    parser.add_argument("--scale", type=positive, default=4, help="size of the drawing in multiples of 28 px a line")
    parser.add_argument("--seed", type=int, default=1024, help="of the drawn texts")
    parser.add_argument("--max-abs-error", type=finite, default=1.0, help="the document's threshold")
    parser.add_argument("--min-cosine", type=finite, default=0.999, help="the document's threshold")
    parser.add_argument("--warn-ratio", type=finite, default=1.5, help="noise ratio over which to warn")
    parser.add_argument("--fail-ratio", type=finite, default=2.0, help="noise ratio over which to fail")
    parser.add_argument("--min-top1", type=finite, default=0.99, help="agreement on decided positions, a ratio")
    parser.add_argument("--decided-margin", type=finite, default=1.0, help="margin of a decided position, in nats")
    return Config(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the document's table and one line per check, write the JSON; returns the exit status."""
    config = parse_args(argv)
    report = run(config)
    progress("")
    if report["table"]:
        print("\n".join(table_lines(report["table"])))
    if report["note"]:
        print(report["note"])
    return finish(report, config.output, "eval_accuracy.py")


def table_lines(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The document's table for a person."""
    logits, hidden = rows[LOGITS], rows[HIDDEN_STATES]
    yield f"{'':18} {'Logits':>14} {'Hidden States':>14}"
    for name in logits:
        cells = (value if isinstance(value, str) else shown(value) for value in (logits[name], hidden[name]))
        yield " ".join([f"{name:18}", *(f"{cell:>14}" for cell in cells)])


if __name__ == "__main__":
    sys.exit(main())
