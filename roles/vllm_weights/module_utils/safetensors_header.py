"""What a safetensors file says about itself, without reading its tensors."""

from __future__ import annotations

import json
from pathlib import Path

#: A longer header is refused by the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000


def promised_size(file: Path) -> int:
    """The size in bytes that the file's own header promises.

    Format: 8 bytes little-endian header length, JSON header, data; offsets count from the data's start
    (github.com/huggingface/safetensors, "Format").  Raises ``ValueError`` when there is no such header and
    ``OSError`` when the file cannot be read.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError("no safetensors header")
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError("no safetensors header") from error
    return 8 + length + max(ends, default=0)
