"""The probe: every check is broken once and must say so; the image's packages are small fakes."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils.findings import CATALOGUE

import probe
from rendering import ROLES

NANO = ROLES / "lab_nano_model" / "files" / "GLM-OCR-nano"
CONFIG = json.loads((NANO / "config.json").read_text())


def nano(**config: Any) -> probe.Checkpoint:
    return probe.read_checkpoint(NANO, copy.deepcopy(CONFIG) | config)


def ids(findings: list[probe.Finding]) -> list[str]:
    return [finding.id for finding in findings]


# --- model type and architecture --------------------------------------------------------------------------


def test_an_old_transformers_is_refused_with_the_version_needed_and_the_variable_to_set() -> None:
    (finding,) = probe.check_model_type(CONFIG, ["/w", "--trust-remote-code"], {"qwen2_vl"}, "4.57.6")
    assert (finding.id, finding.severity) == ("PROBE_MODEL_TYPE", "error")
    assert "model_type glm_ocr" in finding.expected
    assert "transformers 5.1.0" in finding.expected
    assert "transformers 4.57.6" in finding.found
    assert "vllm_image_derived_wheels" in finding.fix
    assert "vllm_image_derived_wheels" in finding.fix_zh


def test_a_known_model_type_and_a_trusted_one_of_the_checkpoints_own_pass() -> None:
    own = CONFIG | {"model_type": "other", "auto_map": {"AutoConfig": "configuration_other.OtherConfig"}}
    assert probe.check_model_type(CONFIG, ["/w"], {"glm_ocr"}, "5.3.0") == []
    assert probe.check_model_type(own, ["/w", "--trust-remote-code"], {"glm_ocr"}, "5.3.0") == []
    (finding,) = probe.check_model_type(own, ["/w"], {"glm_ocr"}, "5.3.0")
    assert "a newer transformers" in finding.expected
    assert "glm_ocr_trust_remote_code: true" in finding.fix


def test_an_unregistered_architecture_is_refused() -> None:
    assert probe.check_architecture(CONFIG, {"GlmOcrForConditionalGeneration"}, "0.18.0") == []
    (finding,) = probe.check_architecture(CONFIG, {"LlamaForCausalLM"}, "0.11.0")
    assert finding.id == "PROBE_ARCHITECTURE"
    assert "GlmOcrForConditionalGeneration" in finding.expected
    assert ids(probe.check_architecture({}, {"LlamaForCausalLM"}, "0.11.0")) == ["PROBE_ARCHITECTURE"]


# --- lengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "client", "expected"),
    [
        ("8192", 4096, []),
        ("8192", 8191, []),
        ("8192", 8192, ["PROBE_CLIENT_MAX_TOKENS"]),
        ("131072", 4096, []),
        ("131073", 4096, ["PROBE_MAX_MODEL_LEN"]),
        ("200000", 200000, ["PROBE_CLIENT_MAX_TOKENS", "PROBE_MAX_MODEL_LEN"]),
        ("auto", 4096, []),
    ],
)
def test_lengths(length: str, client: int, expected: list[str]) -> None:
    assert ids(probe.check_lengths(CONFIG, ["/w", "--max-model-len", length], client)) == expected


def test_no_room_for_the_client_is_a_warning_and_too_long_an_error() -> None:
    findings = probe.check_lengths(CONFIG, ["/w", "--max-model-len=200000"], 200000)
    assert [finding.severity for finding in findings] == ["warning", "error"]


def test_stretched_positions_are_not_judged() -> None:
    config = copy.deepcopy(CONFIG)
    config["text_config"]["rope_parameters"]["rope_type"] = "yarn"
    assert probe.check_lengths(config, ["/w", "--max-model-len", "200000"], 1) == []


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["/w"], None),
        (["/w", "--port", "1"], "1"),
        (["/w", "--port=1"], "1"),
        (["/w", "--port", "1", "--port=2"], "2"),
        (["/w", "--port"], None),
        (["/w", "--port-range", "1"], None),
    ],
)
def test_an_option_is_read_as_argparse_reads_it(arguments: list[str], value: str | None) -> None:
    assert probe.option(arguments, "--port") == value


# --- tensors ----------------------------------------------------------------------------------------------


def test_the_nano_model_has_no_findings() -> None:
    assert probe.check_checkpoint(nano()) == []


def test_the_real_models_shapes() -> None:
    """engine-facts: patch_embed [1024, 3, 2, 14, 14], lm_head [59392, 1536]; q is 16 heads of 128."""
    text = {"hidden_size": 1536, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    text |= {"vocab_size": 59392, "num_hidden_layers": 16, "intermediate_size": 4608}
    config = {"model_type": "glm_ocr", "text_config": text, "vision_config": {"hidden_size": 1024}}
    shapes = probe.expected_shapes(config)
    assert shapes["model.visual.patch_embed.proj.weight"] == (1024, 3, 2, 14, 14)
    assert shapes["lm_head.weight"] == (59392, 1536)
    assert shapes["model.language_model.layers.15.self_attn.q_proj.weight"] == (2048, 1536)
    assert shapes["model.visual.merger.up_proj.weight"] == (4608, 1536)


def test_every_misfit_is_in_one_finding() -> None:
    config = copy.deepcopy(CONFIG)
    config["text_config"] |= {"vocab_size": 321, "num_hidden_layers": 4}
    (finding,) = probe.check_checkpoint(nano(**config))
    assert (finding.id, finding.severity) == ("PROBE_TENSORS", "error")
    assert "lm_head.weight [320, 128] instead of [321, 128]" in finding.found
    assert "no model.language_model.layers.3.self_attn.q_proj.weight" in finding.found
    assert finding.found.endswith("and 2 more")


def test_sizes_that_the_configuration_lacks_are_told() -> None:
    config = copy.deepcopy(CONFIG)
    del config["text_config"]["vocab_size"]
    (finding,) = probe.check_checkpoint(nano(**config))
    assert finding.id == "PROBE_TENSORS"
    assert "vocab_size" in finding.found


def test_a_text_width_that_newer_vllm_cuts_the_merger_to_is_a_warning() -> None:
    config = copy.deepcopy(CONFIG)
    config["text_config"]["intermediate_size"] = 256
    (finding,) = probe.check_checkpoint(nano(**config))
    assert (finding.id, finding.severity) == ("PROBE_MERGER", "warning")


@pytest.mark.parametrize("sign", ["metadata", "names", "channels last"])
def test_a_conversion_for_mlx_is_named_as_such(sign: str) -> None:
    checkpoint = nano()
    tensors, formats = dict(checkpoint.tensors), checkpoint.formats
    if sign == "metadata":
        formats = {"mlx"}
    elif sign == "names":
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    else:
        tensors["model.visual.patch_embed.proj.weight"] = probe.Tensor("BF16", (128, 2, 14, 14, 3))
    changed = probe.Checkpoint(checkpoint.config, tensors, checkpoint.files, formats, None)
    assert ids(probe.check_checkpoint(changed)) == ["PROBE_MLX"]


def test_another_type_than_bf16_is_a_warning() -> None:
    checkpoint = nano()
    tensors = {**checkpoint.tensors, "lm_head.weight": probe.Tensor("F32", (320, 128))}
    changed = probe.Checkpoint(checkpoint.config, tensors, checkpoint.files, checkpoint.formats, None)
    (finding,) = probe.check_checkpoint(changed)
    assert (finding.id, finding.severity) == ("PROBE_DTYPE", "warning")
    assert "1 in F32" in finding.found


@pytest.mark.parametrize(
    ("weight_map", "lost"),
    [
        ({"lm_head.weight": "model.safetensors"}, None),
        ({"lm_head.weight": "model-00002-of-00002.safetensors"}, "lm_head.weight in model-00002"),
        ({"absent.weight": "model.safetensors"}, "absent.weight in model.safetensors"),
    ],
)
def test_the_index_names_files_and_tensors_that_are_there(
    weight_map: dict[str, str], lost: str | None, tmp_path: Path
) -> None:
    shutil.copytree(NANO, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    findings = probe.check_checkpoint(probe.read_checkpoint(tmp_path, CONFIG))
    assert ids(findings) == (["PROBE_INDEX"] if lost else [])
    assert all(lost in finding.found for finding in findings if lost)


def test_another_kind_of_model_has_no_shapes_to_compare() -> None:
    assert probe.check_checkpoint(nano(model_type="qwen2_vl", text_config={})) == []


# --- overlays and driver ----------------------------------------------------------------------------------


def test_an_overlay_over_another_original_is_refused_with_both_hashes() -> None:
    overlays = [{"target": "/a", "original_sha256": "1" * 64}, {"target": "/b", "original_sha256": "2" * 64}]
    assert probe.check_overlays(overlays, {"/a": "1" * 64, "/b": "2" * 64}) == []
    altered, absent = probe.check_overlays(overlays, {"/a": "3" * 64, "/b": None})
    assert "1" * 64 in altered.expected
    assert "3" * 64 in altered.found
    assert absent.found == "no such file in the image"


def test_what_the_engine_may_not_open_is_told_with_mode_and_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As somebody else's files, whoever runs this; tests/lab/test_exposure.py has the sandbox itself say it."""

    def access(path: Path, mode: int) -> bool:
        return path.exists() and path.stat().st_mode & mode == mode

    monkeypatch.setattr(os, "access", access)
    weights = tmp_path / "weights"
    weights.mkdir()
    for file, mode in (
        ("weights", 0o755),
        ("weights/open", 0o644),
        ("weights/closed", 0o640),
        ("weights/lost+found", 0o700),
        ("device", 0o444),
    ):
        (tmp_path / file).touch()
        (tmp_path / file).chmod(mode)
    told = probe.denied(weights, [str(tmp_path / "device"), str(tmp_path / "absent")])
    owner = f"owner {os.getuid()}:{os.getgid()}"
    assert told == [f"{weights}/closed (mode 0640, {owner})", f"{tmp_path}/device (mode 0444, {owner})"]
    weights.chmod(0o750)
    assert probe.denied(weights, [])[0] == f"{weights} (mode 0750, {owner})"
    (finding,) = probe.check_access(told, "user 65534, groups 65534")
    assert finding.id == "PROBE_ACCESS"
    assert "closed (mode 0640" in finding.found
    assert probe.check_access([], "user 0, groups 0") == []


def test_the_driver_is_asked_for_inside() -> None:
    assert probe.check_driver(["libascend_hal.so"], "") == []
    assert ids(probe.check_driver([], "")) == ["PROBE_DRIVER"]
    (finding,) = probe.check_driver(["libascend_hal.so"], "exit status 127: libdrvdsmi_host.so: cannot open")
    assert finding.id == "PROBE_NPU_SMI"
    assert "libdrvdsmi_host.so" in finding.found


@pytest.mark.parametrize(
    ("script", "trouble"),
    [("echo table", ""), ("echo broken >&2; exit 3", "exit status 3: broken"), (None, "no npu-smi")],
)
def test_npu_smi_is_run(script: str | None, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script:
        (tmp_path / "npu-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = probe.npu_smi_trouble()
    assert found == trouble or (trouble and found.startswith(trouble))


def every_finding() -> list[probe.Finding]:
    """One of each id that the checks make."""
    config = copy.deepcopy(CONFIG)
    config["text_config"] |= {"vocab_size": 321, "intermediate_size": 1}
    nano_model = nano(**config)
    tensors = {**nano_model.tensors, "lm_head.weight": probe.Tensor("F32", (320, 128))}
    wrong = probe.Checkpoint(config, tensors, nano_model.files, ["pt"], {"lm_head.weight": "absent.safetensors"})
    own = CONFIG | {"model_type": "other", "auto_map": {"AutoConfig": "x.Y"}}
    return [
        *probe.check_model_type(CONFIG, [], [], "4.57.6"),
        *probe.check_model_type(own, [], [], "4.57.6"),
        *probe.check_architecture(CONFIG, [], "0.1"),
        *probe.check_flags("unrecognized arguments"),
        *probe.check_lengths(CONFIG, ["--max-model-len", "200000"], 200000),
        *probe.check_checkpoint(wrong),
        *probe.check_checkpoint(probe.Checkpoint(CONFIG, {}, {}, ["mlx"], None)),
        *probe.check_overlays([{"target": "/a", "original_sha256": "1"}], {"/a": None}),
        *probe.check_access(["/w/config.json (mode 0600, owner 1:1)"], "user 0, groups 0"),
        *probe.check_driver([], "exit status 1"),
        probe.broken("vLLM", ImportError("no")),
        probe.unreadable(Path("/w"), probe.CheckpointError("config.json")),
    ]


def test_every_id_is_tried_here_and_in_the_catalogue() -> None:
    tried = {finding.id for finding in every_finding()}
    source = Path(probe.__file__).read_text()
    assert tried | {"PROBE_ERROR"} == set(re.findall(r"\"(PROBE_[A-Z_]+)\"", source))
    assert tried <= set(CATALOGUE)
    readme = (ROLES / "vllm_probe" / "README.md").read_text()
    assert set(re.findall(r"`(PROBE_[A-Z_]+)`", readme)) == tried | {"PROBE_ERROR", "PROBE_RUN"}


@pytest.mark.parametrize("finding", every_finding(), ids=lambda finding: finding.id)
def test_both_languages_give_the_same_commands(finding: probe.Finding) -> None:
    assert re.search(r"[\u4e00-\u9fff]", finding.fix_zh), "not Chinese"
    assert not re.search(r"[\u4e00-\u9fff]", finding.fix)
    for told in (r"`[^`]+`", r"\b(?:glm_ocr|vllm)_\w+"):
        in_chinese = set(re.findall(told, finding.fix_zh, re.ASCII))
        assert in_chinese == set(re.findall(told, finding.fix, re.ASCII))


# --- the whole probe, with an image of fakes --------------------------------------------------------------


class ServeCommand:
    """As vLLM's: a subcommand with a validation of its own, and a type that raises what it likes."""

    def subparser_init(self, subparsers: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser("serve")
        parser.add_argument("model_tag")
        parser.add_argument("--max-model-len", type=int)
        parser.add_argument("--max-num-seqs", type=int)
        parser.add_argument("--compilation-config", type=lambda text: {"NONE": 0}[json.loads(text)["cudagraph_mode"]])
        parser.add_argument("--enable-auto-tool-choice", action="store_true")
        return parser

    def validate(self, arguments: argparse.Namespace) -> None:
        if arguments.enable_auto_tool_choice:
            raise TypeError("Error: --enable-auto-tool-choice requires --tool-call-parser")


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(attributes)
    return made


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An image that can serve the nano model; a test takes parts of it away."""
    registry = module("registry", get_supported_archs=lambda: {"GlmOcrForConditionalGeneration"})
    serve = module("serve", cmd_init=lambda: [ServeCommand()])
    for name, made in {
        "transformers.models.auto.configuration_auto": module("auto", CONFIG_MAPPING={"glm_ocr": None}),
        "vllm": module("vllm"),
        "vllm.transformers_utils": module("utils", config=module("config", _CONFIG_REGISTRY={})),
        "vllm.model_executor.models.registry": module("models", ModelRegistry=registry),
        "vllm.entrypoints.cli": module("cli", serve=serve),
        "vllm.utils.argparse_utils": module("argparse_utils", FlexibleArgumentParser=argparse.ArgumentParser),
    }.items():
        monkeypatch.setitem(sys.modules, name, made)
    return monkeypatch


def request(*flags: str, **changes: Any) -> dict[str, Any]:
    arguments = [str(NANO), "--max-model-len", "8192", *flags]
    wanted = {"weights": str(NANO), "serve_arguments": arguments, "client_max_tokens": 4096}
    return wanted | {"devices": [], "overlays": []} | changes


def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str) -> tuple[int, Any]:
    """Exit status and the JSON on the last line."""
    monkeypatch.setattr(sys, "argv", ["-", argument])
    status = probe.main()
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_image_that_can_serve(image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = asked(image, capsys, json.dumps(request("--max-num-seqs", "32")))
    assert (status, answer["findings"]) == (0, [])
    assert set(answer["versions"]) == set(probe.PACKAGES)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--max-num-seqz", "32"], "unrecognized arguments: --max-num-seqz 32"),
        (["--max-num-seqs", "many"], "argument --max-num-seqs: invalid int value: 'many'"),
        (["--compilation-config", '{"cudagraph_mode":'], "argument --compilation-config: invalid"),
        (["--compilation-config", '{"cudagraph_mode":"NOPE"}'], "KeyError: 'NOPE'"),
        (["--enable-auto-tool-choice"], "requires --tool-call-parser"),
        (["--help"], "it only prints something and ends with status 0"),
    ],
)
def test_what_the_images_own_parser_refuses_is_told_in_its_words(
    flags: list[str], complaint: str, image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, answer = asked(image, capsys, json.dumps(request(*flags)))
    (finding,) = answer["findings"]
    assert (status, finding["id"], finding["severity"]) == (1, "PROBE_FLAGS", "error")
    assert complaint in finding["found"]


def test_all_findings_come_at_once(
    image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image.setitem(sys.modules, "transformers.models.auto.configuration_auto", module("auto", CONFIG_MAPPING={}))
    image.setattr(probe, "DRIVER_LIBRARIES", tmp_path / "lib64")
    image.setenv("PATH", "")
    original = tmp_path / "original"
    original.write_text("other")
    overlay = {"target": str(original), "original_sha256": "0" * 64}
    wanted = request("--max-num-seqz", "1", client_max_tokens=8192, devices=["/dev/davinci0"], overlays=[overlay])
    status, answer = asked(image, capsys, json.dumps(wanted))
    assert status == 1
    found = {finding["id"]: finding["found"] for finding in answer["findings"]}
    assert set(found) == {
        "PROBE_OVERLAY",
        "PROBE_DRIVER",
        "PROBE_NPU_SMI",
        "PROBE_CLIENT_MAX_TOKENS",
        "PROBE_MODEL_TYPE",
        "PROBE_FLAGS",
    }
    assert hashlib.sha256(b"other").hexdigest() in found["PROBE_OVERLAY"]


def test_warnings_alone_do_not_refuse(image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = asked(image, capsys, json.dumps(request(client_max_tokens=8192)))
    assert (status, [finding["severity"] for finding in answer["findings"]]) == (0, ["warning"])


def test_a_vllm_that_cannot_be_imported_hides_no_other_finding(
    image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As vLLM 0.32.0 beside transformers 4.57.6: no part of it can be imported."""
    image.setitem(sys.modules, "transformers.models.auto.configuration_auto", module("auto", CONFIG_MAPPING={}))
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        image.setitem(sys.modules, name, None)
    status, answer = asked(image, capsys, json.dumps(request()))
    assert status == 1
    assert [finding["id"] for finding in answer["findings"]] == ["PROBE_MODEL_TYPE", "PROBE_IMPORT"]
    assert "vLLM" in answer["findings"][1]["expected"]
    assert "ModuleNotFoundError" in answer["findings"][1]["found"]


def test_a_transformers_that_cannot_be_imported_is_told(
    image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    status, answer = asked(image, capsys, json.dumps(request()))
    (finding,) = answer["findings"]
    assert (status, finding["id"]) == (1, "PROBE_IMPORT")
    assert "transformers" in finding["expected"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"[]"),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("model.safetensors", b""),
        ("model.safetensors.index.json", b"{"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_told_with_its_file(
    file: str, content: bytes | None, image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(NANO, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    status, answer = asked(image, capsys, json.dumps(request(weights=str(tmp_path))))
    (finding,) = answer["findings"]
    assert (status, finding["id"]) == (1, "PROBE_CHECKPOINT")
    assert file in finding["found"]


@pytest.mark.parametrize("argument", ["{", "{}", "[]"])
def test_a_request_it_cannot_understand_is_no_traceback(
    argument: str, image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, answer = asked(image, capsys, argument)
    assert status == 2
    assert [finding["id"] for finding in answer["findings"]] == ["PROBE_ERROR"]


def test_what_the_image_prints_is_not_in_the_answer(
    image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Noisy(ServeCommand):
        def validate(self, arguments: argparse.Namespace) -> None:
            print("INFO starting")

    image.setitem(sys.modules, "vllm.entrypoints.cli", module("cli", serve=module("s", cmd_init=lambda: [Noisy()])))
    image.setattr(sys, "argv", ["-", json.dumps(request())])
    assert probe.main() == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert said.err == "INFO starting\n"
