"""Damage to the tensors of a checkpoint; every function takes its folder and changes ``model.safetensors`` in it.

Only what the lab's nano model needs: one file, every tensor in bf16.
"""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = "model.safetensors"
FP8_MAX = 448.0
"""The largest float8 e4m3fn: 1.75 x 2^8 (Micikevicius et al. 2022, FP8 Formats for Deep Learning, table 1)."""
FP8_MIN_EXPONENT, FP8_MANTISSA_BITS = -6, 3


@dataclass
class Tensor:
    """A tensor in row-major order; ``values`` are the 16 bits of each bf16."""

    shape: tuple[int, ...]
    values: array[int]

    @property
    def row(self) -> int:
        """Values in one row: all dimensions but the first."""
        return math.prod(self.shape[1:])


def load(path: Path) -> dict[str, Tensor]:
    """Every tensor by its name.  Raises ``ValueError`` for one that is not bf16."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path}: expected {name} in BF16, found {entry['dtype']}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = Tensor(tuple(entry["shape"]), array("H", data[begin:end]))
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write them in their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        size = 2 * len(tensor.values)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *(t.values.tobytes() for t in tensors.values())]))


def number(bits: int) -> float:
    """The value of a bf16."""
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def bits_of(value: float) -> int:
    """The bf16 nearest to a finite value, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def rotate_rows(folder: Path, name: str) -> None:
    """One tensor's rows stand one row too low, the last one first: what a reader that is off by a row makes of it."""
    tensors = load(folder / FILE)
    tensor = tensors[name]
    tensor.values = tensor.values[-tensor.row :] + tensor.values[: -tensor.row]
    save(folder / FILE, tensors)


def fp8(value: float) -> float:
    """The float8 e4m3fn nearest to a finite value, ties to even, the largest ones for what is beyond them."""
    if value == 0:
        return 0.0
    exponent = max(math.frexp(value)[1] - 1, FP8_MIN_EXPONENT)
    step = 2.0 ** (exponent - FP8_MANTISSA_BITS)
    return max(-FP8_MAX, min(FP8_MAX, round(value / step) * step))


def is_linear(name: str, tensor: Tensor) -> bool:
    """The weights that a quantisation takes: of the layers' projections, not embeddings, norms and head."""
    return len(tensor.shape) == 2 and (".layers." in name or ".blocks." in name)


def round_to_fp8(folder: Path) -> None:
    """Every linear layer of text and vision as fp8 with one scale a tensor, written as bf16 again."""
    tensors = load(folder / FILE)
    for name, tensor in tensors.items():
        if is_linear(name, tensor):
            distinct = {bits: number(bits) for bits in set(tensor.values)}
            scale = max(map(abs, distinct.values())) / FP8_MAX
            rounded = {bits: bits_of(fp8(value / scale) * scale) for bits, value in distinct.items()}
            tensor.values = array("H", (rounded[bits] for bits in tensor.values))
    save(folder / FILE, tensors)


def narrow_text_layers(folder: Path, width: int) -> None:
    """The text layers keep the ``width`` strongest neurons of each MLP, and ``config.json`` says so.

    It is a checkpoint in good order: no tensor contradicts ``config.json``.  A vLLM that sizes the vision merger by
    ``text_config.intermediate_size`` cuts the merger's tensors to it without an error.  A neuron's strength is the norm
    of what it writes times that of its up row.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    before = config["text_config"]["intermediate_size"]
    if not 0 < width < before:
        raise ValueError(f"expected a width of 1 to {before - 1}, found {width}")
    config["text_config"]["intermediate_size"] = width
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = load(folder / FILE)
    for name, down in tensors.items():
        if not name.startswith("model.language_model.layers.") or not name.endswith(".mlp.down_proj.weight"):
            continue
        gate_up = tensors[name.replace("down_proj", "gate_up_proj")]
        hidden = down.shape[0]

        def norm(values: array[int]) -> float:
            return math.sqrt(sum(number(bits) ** 2 for bits in values))

        def gate(neuron: int, of: array[int] = gate_up.values, size: int = gate_up.row) -> array[int]:
            return of[neuron * size : (neuron + 1) * size]

        strength = [norm(gate(before + neuron)) * norm(down.values[neuron::before]) for neuron in range(before)]
        kept = sorted(sorted(range(before), key=lambda neuron: -strength[neuron])[:width])
        rows = [gate(offset + neuron) for offset in (0, before) for neuron in kept]
        gate_up.shape, gate_up.values = (2 * width, hidden), array("H", (bits for row in rows for bits in row))
        columns = (down.values[out * before + neuron] for out in range(hidden) for neuron in kept)
        down.shape, down.values = (hidden, width), array("H", columns)
    save(folder / FILE, tensors)
