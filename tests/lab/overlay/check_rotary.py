"""Compare the rotary overlay with vLLM's own rotary embedding, on a CPU.

    check_rotary.py --original rotary_embedding.py --patched rotary_embedding.py.patched

Needs torch and vLLM, so it runs in a serving image: the lab's, or any other.  There is no NPU behind it: the operator
``torch_npu.npu_mrope`` is replaced by what its documentation says it computes, and the rest of what vllm-ascend imports
by empty names that this code path does not use.

Exit status: 0 the patched file is right and the original is wrong, 1 not so, 2 could not measure.  The last line of
standard output is JSON: per case the largest absolute difference from vLLM's own implementation (no unit; queries and
keys are drawn from a standard normal distribution) and whether the operator was called.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding

#: GLM-OCR's text model: config.json, text_config.
HEADS, KEY_HEADS, HEAD_SIZE, SECTION, THETA = 16, 8, 128, [16, 24, 24], 10000.0
TOKENS, POSITIONS = 64, 512
#: float32 rounding of one rotation: two products and a sum of numbers around 1.
TOLERANCE = 1e-5

CALLS: list[str] = []


def npu_mrope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] = (0, 0, 0),
    rotary_mode: str = "half",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator by its documentation (op-plugin, torch_npu.npu_mrope, "Formulas", cache_mode "default").

    ``positions`` is [tokens] or [3, tokens]; ``query`` and ``key`` are [tokens, heads * head_size].
    """
    CALLS.append(rotary_mode)
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    if positions.ndim == 2:
        cos, sin = (
            torch.cat([part[axis] for axis, part in enumerate(table.split(list(mrope_section), dim=-1))], dim=-1)
            for table in (cos, sin)
        )
    cos, sin = cos[:, None, :], sin[:, None, :]

    def rotate(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.view(tensor.shape[0], -1, head_size)
        if rotary_mode == "half":
            x1, x2 = heads.chunk(2, dim=-1)
        else:
            x1, x2 = heads[..., ::2], heads[..., 1::2]
        o1, o2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        joined = torch.cat((o1, o2), dim=-1) if rotary_mode == "half" else torch.stack((o1, o2), dim=-1)
        return joined.reshape(tensor.shape)

    return rotate(query), rotate(key)


def stub_what_is_not_here() -> None:
    """Names that vllm-ascend imports and a CPU does not have.  Used by none of the code that is compared."""
    names: dict[str, dict[str, Any]] = {
        "torch_npu": {"npu_mrope": npu_mrope},
        "vllm_ascend": {},
        "vllm_ascend.ascend_forward_context": {"_EXTRA_CTX": None},
        "vllm_ascend.platform": {"NPUPlatform": None},
        "vllm_ascend.utils": {"has_rope": None, "is_vl_model": None},
        "vllm_ascend.ops": {},
        "vllm_ascend.ops.triton": {},
        "vllm_ascend.ops.triton.rope": {"rope_forward_triton": None},
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


def load(path: Path, name: str) -> type[MRotaryEmbedding]:
    """``AscendMRotaryEmbedding`` of a file with any suffix."""
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cls: type[MRotaryEmbedding] = module.AscendMRotaryEmbedding
    return cls


def compare(cls: type[MRotaryEmbedding], *, neox: bool, axes: int) -> dict[str, Any]:
    """Largest difference of ``forward_oot`` from vLLM's ``forward_native`` on the same random input."""
    rope = cls(HEAD_SIZE, HEAD_SIZE, POSITIONS, THETA, neox, torch.float32, mrope_section=SECTION)
    random = torch.Generator().manual_seed(axes)
    positions = torch.randint(0, POSITIONS, (axes, TOKENS), generator=random)
    # What text alone has: one position for all three axes.
    positions = positions[0] if axes == 1 else positions
    query = torch.randn(TOKENS, HEADS * HEAD_SIZE, generator=random)
    key = torch.randn(TOKENS, KEY_HEADS * HEAD_SIZE, generator=random)
    expected = MRotaryEmbedding.forward_native(rope, positions, query.clone(), key.clone())
    CALLS.clear()
    found = rope.forward_oot(positions, query.clone(), key.clone())
    difference = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
    return {"max_abs_difference": difference, "npu_mrope": list(CALLS)}


def operator_agrees(neox: bool) -> float:
    """The documented operator against vLLM in its own mode: what the comparison above rests on."""
    rope = MRotaryEmbedding(HEAD_SIZE, HEAD_SIZE, POSITIONS, THETA, neox, torch.float32, mrope_section=SECTION)
    positions = torch.arange(3 * TOKENS).view(3, TOKENS)
    query, key = torch.randn(TOKENS, HEADS * HEAD_SIZE), torch.randn(TOKENS, KEY_HEADS * HEAD_SIZE)
    mode = "half" if neox else "interleave"
    found = npu_mrope(positions, query, key, rope.cos_sin_cache, HEAD_SIZE, mrope_section=SECTION, rotary_mode=mode)
    expected = rope.forward_native(positions, query, key)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))


def run(original: Path, patched: Path) -> dict[str, Any]:
    stub_what_is_not_here()
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        files = {"original": load(original, "rotary_original"), "patched": load(patched, "rotary_patched")}
        cases = {
            f"{file} {'neox' if neox else 'interleaved'} {axes}d": compare(cls, neox=neox, axes=axes)
            for file, cls in files.items()
            for neox in (False, True)
            for axes in (1, 3)
        }
        operator = {mode: operator_agrees(neox) for mode, neox in (("half", True), ("interleave", False))}
    right = [case["max_abs_difference"] <= TOLERANCE for case in cases.values()]
    wanted = [not name.startswith("original interleaved") for name in cases]
    # A NeoX-style model keeps the fused operator.
    neox_kept = all(cases[f"patched neox {axes}d"]["npu_mrope"] == ["half"] for axes in (1, 3))
    passed = right == wanted and neox_kept and max(operator.values()) <= TOLERANCE
    return {"passed": passed, "tolerance": TOLERANCE, "cases": cases, "operator": operator}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="vllm-ascend's file")
    parser.add_argument("--patched", type=Path, required=True, help="the overlay")
    arguments = parser.parse_args()
    try:
        report = run(arguments.original, arguments.patched)
    except Exception as error:  # JSON in every case
        print(json.dumps({"passed": None, "error": f"{type(error).__name__}: {error}"}))
        return 2
    print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
