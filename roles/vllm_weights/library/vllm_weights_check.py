#!/usr/bin/python
"""Check a model folder: architecture, formats, truncated files, and every file against a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.findings import Finding, as_data
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
    room_bytes,
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
  partial: {type: str, default: "", description: Where a fetch lets the model grow; what is there counts as room.}
  memory: {type: str, default: "", description: File that remembers hashes; empty remembers nothing.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
findings: {type: list, elements: dict, returned: always, description: "id, expected, found, fix, fix_zh, severity"}
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


def unmounted(fstab: str, mounts: str, path: str) -> List[str]:
    """The mount points of /etc/fstab above ``path`` that /proc/mounts does not have (fstab(5): \\040 is a space)."""
    mounted = {_mount_point(line) for line in mounts.splitlines()}
    wanted = {_mount_point(line) for line in fstab.splitlines() if not line.lstrip().startswith("#")}
    above = (point for point in wanted if point and (path + "/").startswith(point + "/"))
    return sorted(point for point in above if point not in mounted)


def _mount_point(line: str) -> str:
    fields = line.split()
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]).rstrip("/") if fields[1:] else ""


def text_of(path: str) -> str:
    """The text of a file, empty when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def check_folder(folder: Path, empty: bool, not_mounted: Sequence[str]) -> List[Finding]:
    """``not_mounted`` as ``unmounted`` gives it: what lies below an absent mount is not the model."""
    found = [] if folder.is_dir() and not empty else ["an empty folder" if folder.is_dir() else "no such folder"]
    found += [f"{point} of /etc/fstab is not mounted" for point in not_mounted]
    if not found:
        return []
    mount = "".join(f"`mount {point}`, " for point in not_mounted)
    fetch = "`ansible-playbook playbooks/weights_fetch.yml -l HOST`"
    return [
        Finding(
            "HOST_WEIGHTS",
            f"the model in {folder}, its file system mounted",
            "; ".join(found),
            f"{mount}put the weights there (`ls {folder}`) or fetch them ({fetch}), or correct glm_ocr_weights_path",
            f"{mount}将权重放到该目录（`ls {folder}`）或获取（{fetch}），或修正 glm_ocr_weights_path",
        )
    ]


def check_room(folder: Path, manifest: Mapping[str, Entry], room: int) -> List[Finding]:
    """Whether ``room`` bytes are enough for a model that is not there; a size that no manifest tells counts as 0."""
    needed = sum(entry.size or 0 for entry in manifest.values())
    if needed <= room:
        return []
    return [
        Finding(
            "WEIGHTS_DISK",
            f"{needed / 1e9:.1f} GB free for the model, as its manifest says, at {folder}",
            f"{room / 1e9:.1f} GB",
            f"free space (`df -h {folder.parent}`), or set glm_ocr_weights_path to a larger disk",
            f"清理磁盘空间（`df -h {folder.parent}`），或将 glm_ocr_weights_path 指向更大的磁盘",
        )
    ]


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
    """Files that run code when they are loaded: pickles never, Python only where it is trusted and a manifest lists it.

    ``has_manifest`` also when one is being made.
    """
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
        listing = f"`{MAKE} -e glm_ocr_weights_path={folder}`"
        findings.append(
            Finding(
                "WEIGHTS_CODE",
                "*.py files that a manifest lists",
                f"no manifest, and {', '.join(code)}, which the engine may run",
                f"review them and make a manifest, then set vllm_weights_manifest: {listing}",
                f"审阅这些文件并生成清单，然后设置 vllm_weights_manifest：{listing}",
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
    files, problems = list_files(folder)
    there = bool(files or problems)
    not_mounted = unmounted(text_of("/etc/fstab"), text_of("/proc/self/mounts"), os.path.realpath(folder))
    findings += check_folder(folder, not there, not_mounted)
    if not there and not not_mounted:
        findings += check_room(folder, manifest, room_bytes(Path(options["partial"] or folder)))
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
    if there:
        findings += damaged(folder, problems)
        findings += check_config(folder, options["architecture"])
        findings += check_tensors(folder, files)
        findings += check_formats(
            folder, files, options["trust_remote_code"], bool(manifest) or options["hash"] == "all"
        )
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
            "partial": {"type": "str", "default": ""},
            "memory": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    findings, result = examine(module.params, may_remember=not module.check_mode)
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(changed=False, **result, findings=as_data(findings))


if __name__ == "__main__":
    main()
