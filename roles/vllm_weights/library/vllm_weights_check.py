#!/usr/bin/python
"""Check a model folder without reading the tensors: architecture, format, truncated files."""

from __future__ import annotations

import hashlib
import json
import os
from typing import List, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.findings import Finding, as_result

DOCUMENTATION = r"""
module: vllm_weights_check
short_description: Read-only checks of a model folder
description:
  - Changes nothing and never fails on a finding, so that all of them can be shown together.
options:
  path: {type: str, required: true, description: Folder of the model.}
  architecture: {type: str, required: true, description: The architecture that config.json must name.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
findings: {type: list, elements: dict, returned: always, description: "id, severity, expected, found, fix, fix_zh"}
message: {type: str, returned: always, description: The findings as text.}
fingerprint: {type: str, returned: always, description: "SHA-256 over name, size and mtime of every file"}
"""

EXAMPLES = r"""
- vllm_weights_check:
    path: /opt/atomgit/weights/GLM-OCR-bf16
    architecture: GlmOcrForConditionalGeneration
"""

#: A longer header is refused by the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000


def check_config(path: str, architecture: str) -> List[Finding]:
    fix = f"take config.json from the publisher of the model, or correct glm_ocr_weights_path ({path})"
    fix_zh = f"使用模型发布方提供的 config.json，或修正 glm_ocr_weights_path（{path}）"
    expected = f"config.json with architectures [{architecture}]"
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        return [Finding("WEIGHTS_CONFIG", expected, str(error), fix, fix_zh)]
    named = found.get("architectures") if isinstance(found, dict) else None
    if isinstance(named, list) and architecture in named:
        return []
    return [Finding("WEIGHTS_CONFIG", expected, f"architectures {named}", fix, fix_zh)]


def safetensors_size(path: str) -> int:
    """The size in bytes that the file's own header promises.

    Format: 8 bytes little-endian header length, JSON header, data; offsets count from the data's start
    (github.com/huggingface/safetensors, "Format").  Raises ``ValueError`` when there is no such header.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no safetensors header")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def check_tensors(path: str) -> List[Finding]:
    fix = f"copy the file again from a trusted source into {path}"
    fix_zh = f"从可信来源重新复制该文件到 {path}"
    findings = []
    names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    if not names:
        findings.append(Finding("WEIGHTS_FORMAT", "*.safetensors files", "none", fix, fix_zh))
    for name in names:
        file = os.path.join(path, name)
        try:
            promised, size = safetensors_size(file), os.path.getsize(file)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            findings.append(Finding("WEIGHTS_DAMAGED", f"{name} in safetensors format", str(error), fix, fix_zh))
            continue
        if promised != size:
            expected = f"{name} of {promised} bytes, as its header says"
            findings.append(Finding("WEIGHTS_DAMAGED", expected, f"{size} bytes", fix, fix_zh))
    return findings


def fingerprint(path: str) -> str:
    """SHA-256 over relative name, size and modification time of every file below ``path``."""
    rows: List[Tuple[str, int, int]] = []
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            status = os.stat(file)
            rows.append((os.path.relpath(file, path), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "str", "required": True},
            "architecture": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path = module.params["path"]
    if os.path.isdir(path):
        findings = check_config(path, module.params["architecture"]) + check_tensors(path)
    else:
        fix, fix_zh = "correct glm_ocr_weights_path", "修正 glm_ocr_weights_path"
        findings = [Finding("WEIGHTS_CONFIG", f"the model in {path}", "no such folder", fix, fix_zh)]
    module.exit_json(
        changed=False,
        fingerprint=fingerprint(path) if os.path.isdir(path) else "",
        **as_result(findings, "the weights"),
    )


if __name__ == "__main__":
    main()
