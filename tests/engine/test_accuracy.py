"""eval_accuracy.py with torch and the nano GLM-OCR: the formulas on tensors, a healthy run, damaged devices caught."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import resource
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "files" / "scripts"))
NANO = PROJECT / "roles" / "lab_nano_model" / "files" / "GLM-OCR-nano"

import accuracy_cases  # noqa: E402  (found through the path set above)
import eval_accuracy  # noqa: E402
import eval_served  # noqa: E402
import local_model  # noqa: E402
from tensor_metrics import ErrorSums, logit_positions  # noqa: E402

HAS_TORCH = importlib.util.find_spec("torch") is not None
Damage = Callable[[Any, Any], None]


@unittest.skipUnless(HAS_TORCH, "needs torch: run it in the engine's image, see tests/engine/README.md")
class Formulas(unittest.TestCase):
    def test_error_sums_are_those_computed_by_hand(self) -> None:
        import torch

        sums = ErrorSums()
        sums.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]))
        sums.add(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]]))
        found = sums.metrics()
        assert found["values"] == 4
        assert found["max_abs_error"] == 1.0
        assert found["mean_abs_error"] == 1.5 / 4
        assert math.isclose(found["rmse"] or 0, math.sqrt(1.25 / 4))
        assert math.isclose(found["relative_error"] or 0, (1 / 4 + 0.5 / 2**-10) / 4)
        assert math.isclose(found["relative_l2"] or 0, math.sqrt(1.25 / 26))
        assert math.isclose(found["cosine_similarity"] or 0, 22 / math.sqrt(26 * 19.25))
        assert math.isclose(found["min_row_cosine"] or 0, 1 / math.sqrt(1.25))

    def test_chunks_change_nothing(self) -> None:
        import torch

        torch.manual_seed(0)
        reference, measured = torch.randn(2, 50, 7), torch.randn(2, 50, 7)
        whole, parts = ErrorSums(), ErrorSums()
        whole.add(reference, measured)
        with mock.patch("tensor_metrics.CHUNK_VALUES", 10):
            parts.add(reference, measured)
            positions = logit_positions(reference, measured)
        for name, value in whole.metrics().items():
            assert math.isclose(parts.metrics()[name] or 0, value or 0, rel_tol=1e-9)
        assert len(positions) == 100

    def test_kl_top1_and_margin_of_logits(self) -> None:
        import torch

        p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.6, 0.1])
        (position,) = logit_positions(p.log()[None], q.log()[None] + 5)  # a shift of all logits is no difference
        assert math.isclose(position.kl, float((p * (p / q).log()).sum()), rel_tol=1e-5)
        assert not position.agrees
        assert math.isclose(position.margin, math.log(0.7 / 0.2), rel_tol=1e-5)

    def test_nan_is_counted_and_never_a_number(self) -> None:
        import torch

        sums = ErrorSums()
        sums.add(torch.ones(1, 3), torch.tensor([[1.0, math.nan, math.inf]]))
        assert sums.metrics()["non_finite"] == 2
        assert sums.metrics()["rmse"] is None
        (position,) = logit_positions(torch.ones(1, 2), torch.tensor([[1.0, math.nan]]))
        assert math.isnan(position.kl)

    def test_other_shapes_are_refused(self) -> None:
        import torch

        refusal = ""
        try:
            ErrorSums().add(torch.ones(2, 3), torch.ones(3, 2))
        except ValueError as error:
            refusal = str(error)
        assert refusal.startswith("shapes differ")


def randomised(name: str) -> Damage:
    """Replace one weight by noise of its own size."""

    def damage(model: Any, torch: Any) -> None:
        weight = model.get_parameter(name)
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.float().std())

    return damage


def rounded_to_int4(model: Any, torch: Any) -> None:
    """Round the text MLPs to 4 bits, one scale per row; 8 bits would disappear in bf16's own noise."""
    for name, weight in model.model.language_model.named_parameters():
        if ".mlp." in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 7
            weight.copy_((weight.float() / scale).round() * scale)


def rope_theta(model: Any, torch: Any) -> None:
    """Frequencies for a theta that is 10 % too high."""
    frequencies = model.model.language_model.rotary_emb.inv_freq
    pairs = len(frequencies)
    frequencies.mul_(1.1 ** (-torch.arange(pairs) / pairs))


def dead_head(model: Any, torch: Any) -> None:
    model.model.language_model.layers[1].self_attn.o_proj.weight[:, :32] = 0


def rotary_halves(model: Any, torch: Any) -> None:
    """The frequencies laid out in halves, where GLM's rotation takes neighbouring pairs."""
    rotary = model.model.language_model.rotary_emb
    straight = rotary.recomposition_frequencies
    rotary.recomposition_frequencies = lambda frequencies: torch.cat([straight(frequencies)[..., ::2]] * 2, dim=-1)


def not_a_number(model: Any, torch: Any) -> None:
    model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = math.nan


def swapped_rows(model: Any, torch: Any) -> None:
    model.lm_head.weight[:64] = model.lm_head.weight[:64].roll(1, 0)


# What is broken on the device, and a check that must see it.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "text layer": (randomised("model.language_model.layers.1.mlp.down_proj.weight"), "noise_layers"),
    "vision layer": (randomised("model.visual.blocks.1.mlp.down_proj.weight"), "noise_layers"),
    "lm_head": (swapped_rows, "noise_logits"),
    "rotary embedding": (rotary_halves, "noise_hidden_states"),
    "dead head": (dead_head, "noise_hidden_states"),
    "rope theta": (rope_theta, "kl"),
    "int4 MLPs": (rounded_to_int4, "kl"),
    "NaN": (not_a_number, "finite"),
}


@unittest.skipUnless(HAS_TORCH, "needs torch: run it in the engine's image, see tests/engine/README.md")
class Runs(unittest.TestCase):
    def run_with(self, damage: Damage | None = None, loads: int = 3) -> tuple[int, dict[str, Any]]:
        """Exit status and JSON; the third model to be loaded, the device's, is damaged."""
        load, loaded = local_model.load_model, []

        def loading(*arguments: Any, **more: Any) -> Any:
            model = load(*arguments, **more)
            loaded.append(model.dtype)
            if damage and len(loaded) == 3:
                import torch

                with torch.no_grad():
                    damage(model, torch)
            return model

        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(local_model, "load_model", loading),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            output = Path(folder) / "accuracy.json"
            arguments = ["--model", str(NANO), "--output", str(output), "--device", "cpu", "--scale", "1"]
            status = eval_accuracy.main(arguments)
            assert [path.name for path in Path(folder).iterdir()] == ["accuracy.json"]
            report: dict[str, Any] = json.loads(output.read_text())
        expected = ["torch.float32", "torch.bfloat16", "torch.bfloat16"]
        assert [str(dtype) for dtype in loaded] == expected[:loads]
        return status, report

    def test_healthy(self) -> None:
        status, report = self.run_with()
        assert (status, report["verdict"]) == (0, "PASS"), report["checks"]
        layers = [row["layer"] for row in report["layers"]]
        assert layers == [
            "vision.0",
            "vision.1",
            "vision.merger",
            "text.0",
            "text.1",
            "text.2",
            "hidden_states",
            "logits",
        ]
        for row in report["layers"]:
            assert row["noise_ratio"] == 1.0
            assert row["noise_floor"]["rmse"] > 0
        assert "Nothing here speaks of an NPU" in report["note"]
        resources = report["resources"]
        assert resources["anonymous_peak_bytes"] < resources["anonymous_limit_bytes"]

    def test_damaged_devices_are_caught(self) -> None:
        for name, (damage, caught_by) in DAMAGES.items():
            with self.subTest(name):
                status, report = self.run_with(damage)
                failed = {entry["id"] for entry in report["checks"] if entry["verdict"] == "FAIL"}
                assert status == 1
                assert caught_by in failed

    def test_a_full_disk_is_explained(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))  # as a full disk, a write ends in an OSError
        try:
            status, report = self.run_with(loads=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert status == 2
        assert "no room for the reference's layers" in report["checks"][-1]["found"]

    def test_a_folder_without_weights_is_explained(self) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            (Path(folder) / "config.json").write_text((NANO / "config.json").read_text())
            output = Path(folder) / "accuracy.json"
            assert eval_accuracy.main(["--model", folder, "--output", str(output), "--device", "cpu"]) == 2
            report = json.loads(output.read_text())
        assert "check that the folder holds the complete official weights" in report["checks"][-1]["fix"]


@unittest.skipUnless(HAS_TORCH, "needs torch: run it in the engine's image, see tests/engine/README.md")
class ServedReference(unittest.TestCase):
    def test_own_distributions_compare_as_equal(self) -> None:
        """The CPU's bf16 as a service: its noise is the floor's, and every position has its peer."""
        arguments = ["--model", str(NANO), "--output", "unused", "--scale", "1", "--images", "2"]
        config = eval_served.parse_args(arguments)
        cases = accuracy_cases.cases(config.images, config.scale, config.seed)
        inputs = eval_served.local_prompts(config, cases)
        ids = [tensors["input_ids"][0].tolist() for tensors in inputs]
        reply = [38, 43, 44]
        silent = [
            eval_served.Served(prompt, reply, [{0: 0.0}] * (len(prompt) - 1), [{0: 0.0}] * 3, "", None)
            for prompt in ids
        ]
        exact = eval_served.local_distributions(config, "float32", inputs, silent)
        floor = eval_served.local_distributions(config, "bfloat16", inputs, silent)
        for case, prompt, reference, rounded_rows in zip(cases, ids, exact, floor, strict=True):
            start = len(prompt) - 1
            served = eval_served.Served(prompt, reply, rounded_rows[:start], rounded_rows[start:], "", None)
            result = eval_served.compare_case(case, prompt, served, reference, rounded_rows, config.top_k)
            assert (len(result["prompt"]), len(result["reply"])) == (start, 3)
            for entry in (*result["prompt"], *result["reply"]):
                assert entry.served == entry.floor
                assert entry.served.kl < 1


if __name__ == "__main__":
    unittest.main()
