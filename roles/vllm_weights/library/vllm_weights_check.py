#!/usr/bin/python
"""Check a model folder: architecture, formats, truncated files, and every file against a manifest."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.findings import Finding, as_result
from ansible.module_utils.safetensors_header import promised_size
from ansible.module_utils.weights_manifest import (
    PICKLE,
    Entry,
    Identity,
    fingerprint,
    hash_files,
    is_hidden,
    is_loadable,
    list_files,
    parse,
    recall,
    remember,
    render,
)

DOCUMENTATION = r"""
module: vllm_weights_check
short_description: Checks of a model folder
description:
  - Changes nothing of the model and never fails on a finding, so that all of them can be shown together.
options:
  path: {type: path, required: true, description: Folder of the model.}
  architecture: {type: str, required: true, description: The architecture that config.json must name.}
  trust_remote_code: {type: bool, required: true, description: Whether the engine may run the model's own Python.}
  manifest_name: {type: str, default: "", description: The manifest's name in findings; empty means there is none.}
  manifest: {type: str, default: "", description: The manifest's text as C(sha256sum) prints it.}
  hash:
    type: str
    choices: [remembered, listed, all]
    default: remembered
    description:
      - C(remembered) reads no file; C(listed) reads what the manifest lists, C(all) reads every file, except what is
        remembered.
  memory: {type: str, default: "", description: File that remembers hashes; empty remembers nothing.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
findings: {type: list, elements: dict, returned: always, description: "id, expected, found, fix, fix_zh, severity"}
message: {type: str, returned: always, description: The findings as text.}
fingerprint: {type: str, returned: always, description: "What identifies the weights: changes when they do"}
files: {type: str, returned: always, description: "SHA-256 over names, sizes and times of what the engine could load"}
manifest_sha256: {type: str, returned: always, description: "SHA-256 of the manifest's text, empty without one"}
manifest: {type: str, returned: always, description: "A manifest of the files whose hash is known"}
hashed_bytes: {type: int, returned: always, description: Bytes that were read and hashed.}
seconds: {type: float, returned: always, description: Seconds that took.}
remembered: {type: int, returned: always, description: Number of files that needed no second read.}
"""

EXAMPLES = r"""
- vllm_weights_check:
    path: /opt/atomgit/weights/GLM-OCR-bf16
    architecture: GlmOcrForConditionalGeneration
    trust_remote_code: true
    manifest_name: inventory/manifests/GLM-OCR-bf16.sha256
    manifest: "{{ lookup('ansible.builtin.file', 'inventory/manifests/GLM-OCR-bf16.sha256', rstrip=false) }}"
    hash: listed
    memory: /var/lib/glm-ocr/weights-hashes.json
"""

MAKE = "ansible-playbook playbooks/weights_manifest.yml -l HOST"
REPLACE = f"{MAKE} -e vllm_weights_manifest_replace=true"


def check_config(folder: Path, architecture: str) -> List[Finding]:
    fix = f"take config.json from the publisher of the model, or correct glm_ocr_weights_path ({folder})"
    fix_zh = f"从模型发布方取得 config.json，或改正 glm_ocr_weights_path（{folder}）"
    expected = f"config.json with architectures [{architecture}]"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [Finding("WEIGHTS_CONFIG", expected, str(error), fix, fix_zh)]
    named = config.get("architectures") if isinstance(config, dict) else None
    if isinstance(named, list) and architecture in named:
        return []
    return [Finding("WEIGHTS_CONFIG", expected, f"architectures {named}", fix, fix_zh)]


def copy_again(folder: Path, name: str) -> Dict[str, str]:
    return {
        "fix": f"copy {name} again from a trusted source into {folder}",
        "fix_zh": f"从可信来源重新复制 {name} 到 {folder}",
    }


def damaged(folder: Path, problems: Mapping[str, str]) -> List[Finding]:
    """``problems`` is name to complaint."""
    return [
        Finding("WEIGHTS_DAMAGED", f"{name} to be a file that can be read", problem, **copy_again(folder, name))
        for name, problem in sorted(problems.items())
    ]


def check_tensors(folder: Path, files: Mapping[str, Identity]) -> List[Finding]:
    names = sorted(name for name in files if name.endswith(".safetensors") and not is_hidden(name))
    findings = []
    if not names:
        findings.append(Finding("WEIGHTS_FORMAT", "*.safetensors files", "none", **copy_again(folder, "*.safetensors")))
    for name in names:
        fix = copy_again(folder, name)
        try:
            promised = promised_size(folder / name)
        except (OSError, ValueError) as error:
            findings.append(Finding("WEIGHTS_DAMAGED", f"{name} in safetensors format", str(error), **fix))
            continue
        if promised != files[name].size:
            expected = f"{name} of {promised} bytes, as its header says"
            findings.append(Finding("WEIGHTS_DAMAGED", expected, f"{files[name].size} bytes", **fix))
    return findings


def check_formats(
    folder: Path, files: Mapping[str, Identity], trust_remote_code: bool, has_manifest: bool
) -> List[Finding]:
    """Files that run code when they are loaded: pickles never, Python only where it was asked for."""
    findings = [
        Finding(
            "WEIGHTS_PICKLE",
            "safetensors only: a pickle runs code when it is loaded",
            name,
            f"remove {folder / name}; take the safetensors files from the publisher",
            f"删除 {folder / name}；从发布方取得 safetensors 文件",
        )
        for name in sorted(files)
        if name.endswith(PICKLE) and not is_hidden(name)
    ]
    code = sorted(name for name in files if name.endswith(".py") and not is_hidden(name))
    if code and not trust_remote_code:
        findings.append(
            Finding(
                "WEIGHTS_CODE",
                "no *.py files, because glm_ocr_trust_remote_code is off",
                ", ".join(code),
                f"remove them from {folder}; or, if they are reviewed, set glm_ocr_trust_remote_code: true",
                f"从 {folder} 删除这些文件；若已审阅，可设置 glm_ocr_trust_remote_code: true",
            )
        )
    elif code and not has_manifest:
        findings.append(
            Finding(
                "WEIGHTS_CODE",
                "*.py files that a manifest lists",
                f"no manifest, and {', '.join(code)}, which the engine may run",
                f"review them and make a manifest: {MAKE}",
                f"审阅这些文件并生成清单：{MAKE}",
                "warning",
            )
        )
    return findings


def check_manifest(
    folder: Path,
    files: Mapping[str, Identity],
    hashes: Mapping[str, str],
    manifest: Mapping[str, Entry],
    manifest_name: str,
) -> List[Finding]:
    """What is missing, differs, or is not listed although the engine could load it.  ``hashes`` are those known."""
    meant = f"; if the new files are meant: {REPLACE}"
    meant_zh = f"；若新文件是有意更换的：{REPLACE}"
    findings = []
    for name, entry in sorted(manifest.items()):
        fix = {key: text + (meant_zh if key == "fix_zh" else meant) for key, text in copy_again(folder, name).items()}
        file, sha256 = files.get(name), hashes.get(name)
        expected = f"{name} with SHA-256 {entry.sha256}, as {manifest_name} lists it"
        if file is None:
            findings.append(Finding("WEIGHTS_MISSING", expected, "no such file", **fix))
        elif entry.size is not None and file.size != entry.size:
            expected = f"{name} of {entry.size} bytes, as {manifest_name} lists it"
            findings.append(Finding("WEIGHTS_ALTERED", expected, f"{file.size} bytes", **fix))
        elif sha256 is not None and sha256 != entry.sha256:
            findings.append(Finding("WEIGHTS_ALTERED", expected, f"SHA-256 {sha256}", **fix))
    for name in sorted(files):
        if is_loadable(name) and name not in manifest:
            expected = f"only files that {manifest_name} lists, among those that the engine could load"
            found = f"{name}, SHA-256 {hashes[name]}" if name in hashes else name
            fix = {"fix": f"remove {folder / name}{meant}", "fix_zh": f"删除 {folder / name}{meant_zh}"}
            findings.append(Finding("WEIGHTS_EXTRA", expected, found, **fix))
    return findings


def unverified() -> Finding:
    return Finding(
        "WEIGHTS_UNVERIFIED",
        "a manifest, so that an altered file is noticed",
        "vllm_weights_manifest is not set",
        f"make one on a trusted copy: {MAKE}",
        f"在可信的副本上生成清单：{MAKE}",
        "warning",
    )


def unreadable(manifest_name: str, error: ValueError) -> Finding:
    return Finding(
        "WEIGHTS_MANIFEST",
        f"lines as sha256sum prints them in {manifest_name}: 64 hexadecimal digits, two spaces, a name in the folder",
        str(error),
        f"take the manifest from the publisher of the model, or move it away and make one on a trusted copy: {MAKE}",
        f"从模型发布方取得清单，或移走该文件并在可信的副本上重新生成：{MAKE}",
    )


def examine(options: Mapping[str, Any], may_remember: bool) -> Tuple[List[Finding], Dict[str, Any]]:
    """The findings, and the rest of the module's result."""
    folder, memory = Path(options["path"]), options["memory"] and Path(options["memory"])
    findings: List[Finding] = []
    manifest: Dict[str, Entry] = {}
    result: Dict[str, Any] = {"warnings": [], "manifest_sha256": ""}
    if options["manifest_name"]:
        result["manifest_sha256"] = hashlib.sha256(options["manifest"].encode()).hexdigest()
        try:
            manifest = parse(options["manifest"])
        except ValueError as error:
            findings.append(unreadable(options["manifest_name"], error))
    else:
        findings.append(unverified())
    if not folder.is_dir():
        fix = "correct glm_ocr_weights_path, or fetch the model: playbooks/weights_fetch.yml"
        fix_zh = "改正 glm_ocr_weights_path，或获取模型：playbooks/weights_fetch.yml"
        findings.append(Finding("WEIGHTS_CONFIG", f"the model in {folder}", "no such folder", fix, fix_zh))

    files, problems = list_files(folder)
    hashes = recall(memory, files) if memory else {}
    result["remembered"] = len(hashes)
    wanted = {"remembered": [], "listed": manifest, "all": [name for name in files if not is_hidden(name)]}
    unread = {name: files[name] for name in wanted[options["hash"]] if name in files and name not in hashes}
    started = time.monotonic()
    read, unreadable_files = hash_files(folder, unread)
    result["seconds"] = time.monotonic() - started
    result["hashed_bytes"] = sum(unread[name].size for name in read)
    hashes.update(read)
    if memory and read and may_remember:
        try:
            remember(memory, files, hashes)
        except OSError as error:
            result["warnings"].append(f"{memory}: {error}; the weights will be read again at the next run")

    problems.update(unreadable_files)
    problems = {name: problem for name, problem in problems.items() if is_loadable(name) or name in manifest}
    if folder.is_dir():
        findings += damaged(folder, problems)
        findings += check_config(folder, options["architecture"])
        findings += check_tensors(folder, files)
        findings += check_formats(folder, files, options["trust_remote_code"], bool(manifest))
        readable = {name: entry for name, entry in manifest.items() if name not in problems}
        if manifest:
            findings += check_manifest(folder, files, hashes, readable, options["manifest_name"])
    loadable = {name: file for name, file in files.items() if is_loadable(name)}
    result["files"] = fingerprint(loadable)
    result["fingerprint"] = result["manifest_sha256"] or result["files"]
    result["manifest"] = render({name: Entry(sha256, files[name].size) for name, sha256 in hashes.items()})
    return findings, result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "architecture": {"type": "str", "required": True},
            "trust_remote_code": {"type": "bool", "required": True},
            "manifest_name": {"type": "str", "default": ""},
            "manifest": {"type": "str", "default": ""},
            "hash": {"type": "str", "choices": ["remembered", "listed", "all"], "default": "remembered"},
            "memory": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    findings, result = examine(module.params, may_remember=not module.check_mode)
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(changed=False, **result, **as_result(findings, "the weights"))


if __name__ == "__main__":
    main()
