"""Can this image serve this checkpoint with this command?  Asked inside the image, before a service is touched.

    python3 - REQUEST < probe.py

Comes on standard input, so that a host needs no file of it, and imports nothing but what the image has.  REQUEST is
JSON: ``weights`` (folder), ``serve_arguments`` (what follows `vllm serve`), ``client_max_tokens``, ``devices`` (device
nodes the container was given) and ``overlays`` (``target`` and ``original_sha256`` of each).

The last line of standard output is JSON: ``findings`` (id, severity error or warning, expected, found, fix, fix_zh) and
``versions``.  Exit status: 0 no error, 1 errors, 2 could not measure; the JSON is written in all three cases.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-ascend", "transformers", "torch", "torch-npu")
#: First release of transformers that knows a model type (its own release notes).
FIRST_TRANSFORMERS = {"glm_ocr": "5.1.0"}
#: Where the NPU driver's libraries are, on the host and in the container.
DRIVER_LIBRARIES = Path("/usr/local/Ascend/driver/lib64")
#: What the vision configuration of transformers means when config.json does not say (GlmOcrVisionConfig).
VISION_DEFAULTS = {"in_channels": 3, "temporal_patch_size": 2, "patch_size": 14, "out_hidden_size": 1536}
#: What may lie beside a checkpoint and the engine never reads.
UNREAD = {".git", ".cache", "lost+found"}
#: Tensors named in one finding.
EXAMPLES = 4


@dataclass(frozen=True)
class Finding:
    """As on the hosts (roles/glm_ocr/module_utils/findings.py, which has the catalogue of ids)."""

    id: str
    expected: str
    found: str
    fix: str
    fix_zh: str
    severity: str = "error"


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """What the folder says of itself: ``formats`` are the writers' names in the files' metadata (pt, mlx)."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Collection[str]]
    formats: Collection[str]
    index: Mapping[str, str] | None


class CheckpointError(Exception):
    """A file of the checkpoint that cannot be read; the message names it."""


# --- pure: what the observations mean ---------------------------------------------------------------------


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``; the last one wins, as in argparse."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == name:
            value = next(iter(arguments[index + 1 : index + 2]), None)
        elif argument.startswith(name + "="):
            value = argument[len(name) + 1 :]
    return value


def check_model_type(
    config: Mapping[str, Any], arguments: Sequence[str], known: Collection[str], version: str
) -> list[Finding]:
    """``known`` are the model types that the image's transformers and vLLM can make a configuration of."""
    model_type = str(config.get("model_type"))
    own_code = "AutoConfig" in (config.get("auto_map") or {})
    if model_type in known or (own_code and "--trust-remote-code" in arguments):
        return []
    first = FIRST_TRANSFORMERS.get(model_type)
    needed = f"transformers {first} or newer" if first else "a newer transformers"
    needed_zh = f"transformers {first} 或更新版本" if first else "更新版本的 transformers"
    fix = (
        f"derive an image with {needed}: set vllm_image_derived_wheels (a ready-made list is in "
        "inventory/group_vars/ascend910/vllm_image.yml), or name an image that has it in glm_ocr_image"
    )
    fix_zh = (
        f"派生一个带 {needed_zh} 的镜像：设置 vllm_image_derived_wheels（现成的列表见 "
        "inventory/group_vars/ascend910/vllm_image.yml），或将 glm_ocr_image 指向自带该版本的镜像"
    )
    if own_code:
        fix = "set glm_ocr_trust_remote_code: true if you trust the checkpoint's own code; or " + fix
        fix_zh = "若信任权重自带的代码，可设置 glm_ocr_trust_remote_code: true；或" + fix_zh
    return [
        Finding(
            "PROBE_MODEL_TYPE",
            f"an image whose transformers knows the checkpoint's model_type {model_type}: {needed}",
            f"transformers {version}, which does not know it"
            + (", and code of its own that is not trusted" if own_code else ""),
            fix,
            fix_zh,
        )
    ]


def check_architecture(config: Mapping[str, Any], supported: Collection[str], version: str) -> list[Finding]:
    architectures = config.get("architectures") or []
    if any(name in supported for name in architectures):
        return []
    named = ", ".join(map(str, architectures)) or "(none named)"
    return [
        Finding(
            "PROBE_ARCHITECTURE",
            f"a vLLM that registers the checkpoint's architecture {named}",
            f"vLLM {version}, which does not",
            "name an image with a newer vLLM in glm_ocr_image, or correct glm_ocr_weights_path",
            "将 glm_ocr_image 指向带有更新版本 vLLM 的镜像，或修正 glm_ocr_weights_path",
        )
    ]


def check_flags(complaint: str) -> list[Finding]:
    """``complaint`` is what the image's own parser says of the command, empty when nothing."""
    if not complaint:
        return []
    return [
        Finding(
            "PROBE_FLAGS",
            "a command that the image's own `vllm serve` accepts",
            complaint,
            "correct vllm_service_flags or vllm_service_extra_flags; `vllm serve --help=all` in the image lists them",
            "修正 vllm_service_flags 或 vllm_service_extra_flags；镜像内的 `vllm serve --help=all` 列出全部参数",
        )
    ]


def check_lengths(config: Mapping[str, Any], arguments: Sequence[str], client_max_tokens: int) -> list[Finding]:
    """Tokens: prompt and reply share --max-model-len, and the positions of the model end somewhere."""
    given = option(arguments, "--max-model-len")
    if given is None or not given.isdigit():  # what is no number is the parser's to judge
        return []
    length = int(given)
    findings = []
    if client_max_tokens >= length:
        findings.append(
            Finding(
                "PROBE_CLIENT_MAX_TOKENS",
                f"room for a prompt beside the max_tokens that clients send ({client_max_tokens})",
                f"--max-model-len {length}: every such request ends in HTTP 400",
                "raise glm_ocr_max_model_len, or have the clients send less (the official SDK sends 8192 unless told "
                "otherwise) and say so in glm_ocr_client_max_tokens",
                "调大 glm_ocr_max_model_len，或让客户端减小 max_tokens（官方 SDK 默认发送 8192），"
                "并同步修改 glm_ocr_client_max_tokens",
                "warning",
            )
        )
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    # Other kinds stretch the positions: vLLM knows by how much, this script does not.
    if (
        (rope.get("rope_type") or rope.get("type") or "default") in ("default", "mrope")
        and isinstance(limit, int)
        and length > limit
    ):
        findings.append(
            Finding(
                "PROBE_MAX_MODEL_LEN",
                f"--max-model-len of at most {limit}, the model's max_position_embeddings",
                str(length),
                f"set glm_ocr_max_model_len to {limit} or less",
                f"将 glm_ocr_max_model_len 设为不超过 {limit}",
            )
        )
    return findings


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key tensors of a GLM-OCR checkpoint and their shapes (transformers, modeling_glm_ocr.py).

    Raises ``KeyError`` for a number that config.json lacks.
    """
    text, vision = config["text_config"], {**VISION_DEFAULTS, **config["vision_config"]}
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    head_size = text.get("head_dim") or hidden // heads
    query, key = heads * head_size, text["num_key_value_heads"] * head_size
    out, patch = vision["out_hidden_size"], vision["patch_size"]
    merged = out * vision["in_channels"]
    shapes = {
        "model.visual.patch_embed.proj.weight": (
            vision["hidden_size"],
            vision["in_channels"],
            vision["temporal_patch_size"],
            patch,
            patch,
        ),
        "model.visual.merger.proj.weight": (out, out),
        "model.visual.merger.gate_proj.weight": (merged, out),
        "model.visual.merger.up_proj.weight": (merged, out),
        "model.visual.merger.down_proj.weight": (out, merged),
        "model.language_model.embed_tokens.weight": (text["vocab_size"], hidden),
    }
    if not config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    for layer in range(text["num_hidden_layers"]):
        attention = f"model.language_model.layers.{layer}.self_attn."
        shapes[attention + "q_proj.weight"] = (query, hidden)
        shapes[attention + "k_proj.weight"] = (key, hidden)
        shapes[attention + "v_proj.weight"] = (key, hidden)
        shapes[attention + "o_proj.weight"] = (hidden, query)
    return shapes


def is_mlx(checkpoint: Checkpoint) -> bool:
    """An MLX conversion: its writer says so, or the tensors are renamed, or the convolution has its channels last."""
    patch = next((t.shape for n, t in checkpoint.tensors.items() if n.endswith("patch_embed.proj.weight")), ())
    channels = {**VISION_DEFAULTS, **(checkpoint.config.get("vision_config") or {})}["in_channels"]
    return (
        "mlx" in checkpoint.formats
        or any(name.startswith(("vision_tower.", "language_model.")) for name in checkpoint.tensors)
        or (len(patch) == 5 and patch[1] != channels == patch[4])
    )


def check_checkpoint(checkpoint: Checkpoint) -> list[Finding]:
    """Names, shapes and types of the tensors, as the files' headers have them, against config.json."""
    copy = "copy the checkpoint again from its publisher, config.json included"
    copy_zh = "从发布方重新完整复制权重（包括 config.json）"
    if checkpoint.config.get("model_type") == "glm_ocr" and is_mlx(checkpoint):
        return [
            Finding(
                "PROBE_MLX",
                "a checkpoint as its publisher wrote it (safetensors, PyTorch's names and layout)",
                "an MLX conversion: tensors renamed or transposed, which neither vLLM nor transformers loads",
                "take zai-org/GLM-OCR itself, which is bf16 already, not a conversion for MLX of a similar name",
                "请使用 zai-org/GLM-OCR 原始权重（本身即为 bf16），不要使用名称相近的 MLX 转换版",
            )
        ]
    findings = []
    if checkpoint.index is not None:
        lost = [
            f"{name} in {file}"
            for name, file in sorted(checkpoint.index.items())
            if name not in checkpoint.files.get(file, ())
        ]
        if lost:
            expected = "every tensor in the file that model.safetensors.index.json names"
            findings.append(Finding("PROBE_INDEX", expected, "missing: " + listed(lost), copy, copy_zh))
    if checkpoint.config.get("model_type") == "glm_ocr":
        findings += check_shapes(checkpoint, copy, copy_zh)
    types = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    if set(types) - {"BF16"}:
        found = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(types.items()))
        fix = "take the publisher's bf16 weights; another type needs other memory and reads differently"
        fix_zh = "请使用发布方的 bf16 权重；其他数据类型的显存占用与识别结果都会不同"
        findings.append(Finding("PROBE_DTYPE", "all tensors in BF16", found, fix, fix_zh, "warning"))
    return findings


def check_shapes(checkpoint: Checkpoint, copy: str, copy_zh: str) -> list[Finding]:
    try:
        shapes = expected_shapes(checkpoint.config)
    except (KeyError, TypeError) as error:
        expected = "config.json with the sizes of text_config and vision_config"
        return [Finding("PROBE_TENSORS", expected, f"no usable {error}", copy, copy_zh)]
    wrong = []
    for name, shape in shapes.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            wrong.append(f"no {name}")
        elif tensor.shape != shape:
            wrong.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
    findings = []
    if wrong:
        expected = "tensors with the names and shapes that config.json implies"
        findings.append(Finding("PROBE_TENSORS", expected, listed(wrong), copy, copy_zh))
    width = checkpoint.config["text_config"].get("intermediate_size")
    merged, _ = shapes["model.visual.merger.up_proj.weight"]
    if width != merged:
        findings.append(
            Finding(
                "PROBE_MERGER",
                f"text_config.intermediate_size {merged}, the width of the vision merger (as in the real model)",
                f"{width}: newer vLLM (seen in 0.32.0) sizes the merger by it and cuts the tensor without any error",
                "take the publisher's checkpoint, and trust no reading of images before the OCR check passed",
                "请使用发布方的权重；在 OCR 检查通过之前，不要相信任何图像识别结果",
                "warning",
            )
        )
    return findings


def listed(names: Sequence[str]) -> str:
    rest = len(names) - EXAMPLES
    return "; ".join(names[:EXAMPLES]) + (f"; and {rest} more" if rest > 0 else "")


def check_overlays(overlays: Sequence[Mapping[str, str]], found: Mapping[str, str | None]) -> list[Finding]:
    """``found`` maps a target to the SHA-256 of the image's own file, None when there is none."""
    return [
        Finding(
            "PROBE_OVERLAY",
            f"{overlay['target']} with sha256 {overlay['original_sha256']}, which the overlay was made for",
            f"sha256 {actual}" if (actual := found[overlay["target"]]) else "no such file in the image",
            "make the overlay anew from the image's own file and set its original_sha256, or take it out of "
            "vllm_service_overlays",
            "请基于镜像内的原文件重新制作该补丁文件并更新 original_sha256，或将其从 vllm_service_overlays 中移除",
        )
        for overlay in overlays
        if found[overlay["target"]] != overlay["original_sha256"]
    ]


def check_driver(libraries: Collection[str], npu_smi: str) -> list[Finding]:
    """``libraries`` are the entries of the driver's library folder; ``npu_smi`` says what went wrong, if anything."""
    fix = f"look at the host (`npu-smi info`, `ls {DRIVER_LIBRARIES}`), then correct glm_ocr_driver_paths"
    fix_zh = f"在宿主机上检查（`npu-smi info`、`ls {DRIVER_LIBRARIES}`），然后修正 glm_ocr_driver_paths"
    findings = []
    if not libraries:
        expected = f"the driver's libraries in {DRIVER_LIBRARIES}, inside the container"
        findings.append(Finding("PROBE_DRIVER", expected, "an empty folder, or none", fix, fix_zh))
    if npu_smi:
        expected = "`npu-smi info` to run inside the container"
        findings.append(Finding("PROBE_NPU_SMI", expected, npu_smi, fix, fix_zh))
    return findings


def check_access(denied: Sequence[str], user: str) -> list[Finding]:
    """``denied`` are files and devices that ``user`` of the container cannot open, each with its mode and owner."""
    if not denied:
        return []
    return [
        Finding(
            "PROBE_ACCESS",
            f"weights that can be read, and devices that can be opened, by the engine ({user})",
            listed(denied),
            "on the host, `chmod -R a+rX` the weights, and put the number of the devices' group "
            "(`stat -c %g /dev/davinci0`) into vllm_service_sandbox_groups",
            "在主机上对权重目录执行 `chmod -R a+rX`，并将设备所属组的编号（`stat -c %g /dev/davinci0`）"
            "加入 vllm_service_sandbox_groups",
        )
    ]


def broken(package: str, error: BaseException) -> Finding:
    """What the image cannot even import, with the last line of the error."""
    return Finding(
        "PROBE_IMPORT",
        f"an image in which {package} can be imported",
        last_line(error),
        "name a whole image in glm_ocr_image; if vllm_image_derived_wheels is set, its packages may not fit together",
        "将 glm_ocr_image 指向完好的镜像；若设置了 vllm_image_derived_wheels，其中的包可能互不兼容",
    )


def last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1]


# --- edges: what is observed ------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Raises ``CheckpointError`` when there is no JSON object in the file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: no JSON object")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes little-endian length, then JSON.

    Raises ``OSError`` and ``ValueError``.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length) if length < path.stat().st_size else b"")
    if not isinstance(header, dict):
        raise ValueError("no JSON object")
    return header


def read_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Raises ``CheckpointError`` for a file that is not what its name says."""
    tensors: dict[str, Tensor] = {}
    files: dict[str, Collection[str]] = {}
    formats: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header = read_header(path)
            formats.add(str(header.pop("__metadata__", {}).get("format")))
            found = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path.name}: no safetensors header ({error!r})") from error
        files[path.name] = set(found)
        tensors.update(found)
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map", {}) if index.exists() else None
    return Checkpoint(config, tensors, files, formats, weight_map)


def sha256(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def denied(folder: Path, devices: Sequence[str]) -> list[str]:
    """What of ``folder`` cannot be read, and which devices cannot be read and written; what is absent is not told."""
    files = [path for path in sorted(folder.rglob("*")) if not UNREAD & {*path.relative_to(folder).parts}]
    wanted = {path: os.R_OK | (os.X_OK if os.path.isdir(path) else 0) for path in (folder, *files)}
    wanted |= {Path(device): os.R_OK | os.W_OK for device in devices}
    found = []
    for path, mode in wanted.items():
        if os.access(path, os.F_OK) and not os.access(path, mode):
            status = path.stat()
            found.append(f"{path} (mode {status.st_mode & 0o7777:04o}, owner {status.st_uid}:{status.st_gid})")
    return found


def libraries() -> list[str]:
    return [path.name for path in DRIVER_LIBRARIES.iterdir()] if DRIVER_LIBRARIES.is_dir() else []


def npu_smi_trouble() -> str:
    """What is wrong with npu-smi, empty when it runs."""
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return "no npu-smi on the path"
    except (OSError, subprocess.TimeoutExpired) as error:
        return last_line(error)
    said = (done.stderr or done.stdout).strip().splitlines()
    return f"exit status {done.returncode}: {said[-1] if said else 'no output'}" if done.returncode else ""


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def known_model_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = set(CONFIG_MAPPING.keys())
    # Some are vLLM's own, in a table of an internal name. That vLLM cannot be imported is another check's finding.
    with contextlib.suppress(Exception):
        from vllm.transformers_utils import config

        known |= set(getattr(config, "_CONFIG_REGISTRY", {}))
    return known


def supported_architectures() -> Collection[str]:
    from vllm.model_executor.models.registry import ModelRegistry

    names: Collection[str] = ModelRegistry.get_supported_archs()
    return names


def complaint_about(arguments: Sequence[str]) -> str:
    """What the image's own parser of `vllm serve` says of the arguments, empty when nothing.

    The same steps as vllm.entrypoints.cli.main in 0.18.0 and 0.32.0.
    """
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    (command,) = serve.cmd_init()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command.validate(parser.parse_args(["serve", *arguments]))
    except SystemExit as end:
        message = said.getvalue().partition(": error: ")[2].partition("For further information")[0]
        return " ".join(message.split()) or f"it only prints something and ends with status {end.code}"
    except Exception as error:  # validators of single flags raise what they like
        return f"{type(error).__name__}: {error}"
    return ""


def unreadable(folder: Path, error: CheckpointError) -> Finding:
    return Finding(
        "PROBE_CHECKPOINT",
        f"a readable checkpoint in {folder}",
        str(error),
        "copy it again from its publisher, or correct glm_ocr_weights_path",
        "从发布方重新复制权重，或修正 glm_ocr_weights_path",
    )


def attempt(package: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:  # an image can be broken in any way
        return [broken(package, error)]


def run(request: Mapping[str, Any]) -> list[Finding]:
    """Every check, whatever the others found."""
    arguments, folder = request["serve_arguments"], Path(request["weights"])
    findings = check_overlays(request["overlays"], {o["target"]: sha256(o["target"]) for o in request["overlays"]})
    user = f"user {os.getuid()}, groups {' '.join(map(str, sorted({os.getgid(), *os.getgroups()})))}"
    findings += check_access(denied(folder, request["devices"]), user)
    if request["devices"]:
        findings += check_driver(libraries(), npu_smi_trouble())
    config: Mapping[str, Any] = {}
    try:
        config = read_json(folder / "config.json")
        findings += check_lengths(config, arguments, request["client_max_tokens"])
        findings += check_checkpoint(read_checkpoint(folder, config))
    except CheckpointError as error:
        findings.append(unreadable(folder, error))

    def transformers() -> list[Finding]:
        return check_model_type(config, arguments, known_model_types(), str(installed_version("transformers")))

    def vllm() -> list[Finding]:
        found = []
        if config:
            found = check_architecture(config, supported_architectures(), str(installed_version("vllm")))
        return found + check_flags(complaint_about(arguments))

    findings += attempt("transformers", transformers) if config else []
    return findings + attempt("vLLM", vllm)


def main() -> int:
    status = 2
    findings = []
    try:
        # What libraries print goes elsewhere: standard output carries the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            findings = run(json.loads(sys.argv[1]))
        status = int(any(finding.severity == "error" for finding in findings))
    except Exception as error:
        fix = "report it with the lines above; to deploy meanwhile, go back to the inventory that last deployed"
        fix_zh = "请附上以上输出反馈此问题；如需先行部署，请恢复到上一次成功部署的配置"
        findings = [Finding("PROBE_ERROR", "a probe that completes", last_line(error), fix, fix_zh)]
    versions = {package: installed_version(package) for package in PACKAGES}
    print(json.dumps({"findings": [asdict(finding) for finding in findings], "versions": versions}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
