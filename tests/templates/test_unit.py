"""The rendered unit and environment file: against goldens, and against the start command they must carry."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ansible.errors import AnsibleError

import guard_inputs
import vllm_release
from rendering import PROJECT, HostVariables, deploy_task
from request_guard.limits import Limits
from unit_file import exec_start, serve_command

GOLDEN = Path(__file__).parent / "golden"
SEED = (Path(__file__).parent / "seed_command.sh").read_text()


def options(arguments: list[str]) -> dict[str, str | None]:
    """--flag value pairs; a bare flag has the value None.  A flag given twice is an error."""
    found: dict[str, str | None] = {}
    for index, word in enumerate(arguments):
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            following = arguments[index + 1 : index + 2]
            found[word] = following[0] if following and not following[0].startswith("--") else None
    return found


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_golden(engine: str, tmp_path: Path) -> None:
    host = HostVariables(tmp_path, glm_ocr_container_engine=engine)
    for name, golden in (("glm-ocr.service.j2", f"{engine}.service"), ("glm-ocr.env.j2", "glm-ocr.env")):
        rendered = host.template_file(name)
        if os.environ.get("UPDATE_GOLDEN"):
            (GOLDEN / golden).write_text(rendered)
        assert rendered == (GOLDEN / golden).read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_golden_with_the_guard(tmp_path: Path) -> None:
    """The mount's folder is named by the guard's modules, which change more often than the unit does."""
    host = HostVariables(tmp_path, vllm_service_guard=True)
    for name, golden in (("glm-ocr.service.j2", "guard.service"), ("glm-ocr.env.j2", "guard.env")):
        rendered = re.sub(r"(/guard/|release=)[0-9a-f]+", r"\1HASH", host.template_file(name))
        if os.environ.get("UPDATE_GOLDEN"):
            (GOLDEN / golden).write_text(rendered)
        assert rendered == (GOLDEN / golden).read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_the_guards_folder_has_what_the_engine_loads(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, vllm_service_guard="true", vllm_service_guard_extra_limits={"n": "2"})
    release = host.template("{{ __vllm_service_guard_release }}")
    assert f"{release['path']}:/opt/request-guard:ro" in exec_start(host.template_file("glm-ocr.service.j2"))
    module, loaded = str(options(serve_command(host.template_file("glm-ocr.service.j2")))["--middleware"]).rsplit(
        ".", 1
    )
    for path in (PROJECT / "files/guard/request_guard").glob("*.py"):
        assert release["files"][f"{release['path']}/request_guard/{path.name}"] == path.read_text()
    assert f"class {loaded}" in release["files"][f"{release['path']}/{module.replace('.', '/')}.py"]
    assert Limits.of(json.loads(release["files"][f"{release['path']}/limits.json"])).n == 2


def test_the_guards_limits_are_those_that_the_tests_check(tmp_path: Path) -> None:
    release = HostVariables(tmp_path).template("{{ __vllm_service_guard_release }}")
    assert Limits.of(json.loads(release["files"][f"{release['path']}/limits.json"])) == guard_inputs.limits()


@pytest.mark.parametrize("change", [{"vllm_service_guard_extra_limits": {"n": 2}}, {"vllm_service_guard": False}])
def test_the_release_changes_with_the_guard(change: dict[str, object], tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    before = HostVariables(tmp_path / "a", vllm_service_guard=True).template("{{ __vllm_service_release }}")
    after = HostVariables(tmp_path / "b", **{"vllm_service_guard": True} | change)
    assert after.template("{{ __vllm_service_release }}") != before


def test_a_path_of_the_sites_own_stays_beside_the_guards(tmp_path: Path) -> None:
    own = {"PYTHONPATH": "/opt/site"}
    host = HostVariables(tmp_path, vllm_service_guard=True, vllm_service_extra_environment=own)
    assert "PYTHONPATH=/opt/request-guard:/opt/site\n" in host.template_file("glm-ocr.env.j2")


def test_every_flag_of_the_seed_is_there_verbatim(tmp_path: Path) -> None:
    seed_serve = shlex.split(SEED.replace("\\\n", " ").splitlines()[-1])
    serve = serve_command(HostVariables(tmp_path).template_file("glm-ocr.service.j2"))
    assert serve[:3] == seed_serve[:3]
    assert options(seed_serve).items() <= options(serve).items()


def test_every_variable_of_the_seed_is_there_verbatim(tmp_path: Path) -> None:
    seed = dict(shlex.split(line)[1].split("=", 1) for line in SEED.splitlines() if line.startswith("export "))
    assert len(seed) == 7
    lines = HostVariables(tmp_path).template_file("glm-ocr.env.j2").splitlines()
    # An env file is read raw by the container engine: no quotes, no spaces around "=".
    environment = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert seed.items() <= environment.items()


@pytest.mark.parametrize("argument", ["a b", "50%", "$HOME", "it's", '{"a":"b c"}', "back\\slash", "%h $x 'y'"])
def test_awkward_arguments_survive_systemd_quoting(argument: str, tmp_path: Path) -> None:
    host = HostVariables(tmp_path, vllm_service_extra_flags={"chat-template": argument})
    (line,) = [line for line in host.template_file("glm-ocr.service.j2").splitlines() if "--chat-template" in line]
    assert systemd_reads(line.strip().removeprefix("--chat-template ")) == argument


def systemd_reads(quoted: str) -> str:
    """How systemd.syntax(7) reads one quoted word: C escapes work in both kinds of quotes."""
    body = quoted[1:-1] if quoted.startswith("'") else quoted
    return body.replace("\\\\", "\0").replace("\\'", "'").replace("\0", "\\").replace("%%", "%").replace("$$", "$")


def test_the_extra_flags_win(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, vllm_service_extra_flags={"max-num-seqs": 8, "trust-remote-code": False})
    serve = options(serve_command(host.template_file("glm-ocr.service.j2")))
    assert serve["--max-num-seqs"] == "8"
    assert "--trust-remote-code" not in serve


def test_timeouts_leave_requests_time_to_complete(tmp_path: Path) -> None:
    unit = HostVariables(tmp_path).template_file("glm-ocr.service.j2")
    engine = int(options(serve_command(unit))["--shutdown-timeout"] or 0)
    container = int(unit.split("stop -t ")[1].split()[0])
    systemd = int(unit.split("TimeoutStopSec=")[1].split()[0])
    assert 0 < engine < container < systemd


@pytest.mark.parametrize(
    "seconds", [{}, {"vllm_service_start_timeout_seconds": 60}, {"vllm_service_shutdown_timeout_seconds": 600}]
)
def test_a_loop_of_starts_that_hang_meets_the_start_limit(seconds: dict[str, int], tmp_path: Path) -> None:
    """systemd forgets the starts before once the interval is over: the start after the burst must be in it."""
    unit = HostVariables(tmp_path, **seconds).template_file("glm-ocr.service.j2")
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith(" "))
    longest = sum(int(settings[name]) for name in ("TimeoutStartSec", "TimeoutStopSec", "RestartSec"))
    assert int(settings["StartLimitIntervalSec"]) > int(settings["StartLimitBurst"]) * longest


def test_numbers_of_the_command_line_are_text_and_render_the_same(tmp_path: Path) -> None:
    """As `-e vllm_service_start_timeout_seconds=900` gives them."""
    (tmp_path / "text").mkdir()
    host = HostVariables(tmp_path)
    names = [
        "vllm_service_start_timeout_seconds",
        "vllm_service_shutdown_timeout_seconds",
        "vllm_service_restart_delay_seconds",
        "glm_ocr_max_model_len",
        "glm_ocr_port",
    ]
    text = HostVariables(tmp_path / "text", **{name: str(host.template(f"{{{{ {name} }}}}")) for name in names})
    for template in ("{{ __vllm_service_release }}", "{{ __vllm_service_record }}", "{{ __vllm_service_problems }}"):
        assert text.template(template) == host.template(template)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("10.0.0.1", "http://10.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fd00::1", "http://[fd00::1]:8000"),
        ("npu-01.example", "http://npu-01.example:8000"),
    ],
)
def test_the_host_reaches_itself_at_what_it_listens_on(address: str, url: str, tmp_path: Path) -> None:
    host = HostVariables(tmp_path, glm_ocr_bind_address=address)
    assert host.template("{{ glm_ocr_base_url }}") == url
    assert host.template("{{ __glm_ocr_problems }}") == []


def test_what_goes_into_the_unit_besides_flags_is_quoted_too(tmp_path: Path) -> None:
    source = tmp_path / "a b%c.py"
    source.write_text("")
    overlay = {"source": str(source), "target": "/opt/$d e.py", "original_sha256": "0" * 64}
    host = HostVariables(tmp_path, vllm_service_overlays=[overlay], vllm_service_shm_size="1 g")
    unit = host.template_file("glm-ocr.service.j2")
    (file,) = host.template("{{ __vllm_service_overlay_files }}")
    assert {f"{file['path']}:/opt/$d e.py:ro", "1 g"} <= set(exec_start(unit))
    assert "%%c" in unit
    assert "/$$d" in unit


@pytest.mark.parametrize(
    "change",
    [
        {"vllm_image_id": "sha256:" + "1" * 64},
        {"vllm_weights_fingerprint": "e" * 64},
        {"vllm_service_extra_environment": {"HCCL_BUFFSIZE": "256"}},
        {"vllm_service_extra_flags": {"max-num-seqs": 8}},
        {"glm_ocr_port": 8001},
    ],
)
def test_the_release_changes_with_what_the_engine_runs(change: dict[str, object], tmp_path: Path) -> None:
    release = "{{ __vllm_service_release }}"
    for folder in "abc":
        (tmp_path / folder).mkdir()
    before = HostVariables(tmp_path / "a").template(release)
    assert HostVariables(tmp_path / "b").template(release) == before
    assert HostVariables(tmp_path / "c", **change).template(release) != before


def test_an_overlay_is_mounted_read_only_and_moves_the_release_with_its_content(tmp_path: Path) -> None:
    source = tmp_path / "rotary.py.patched"
    overlay = {"source": str(source), "target": "/vllm-workspace/rotary.py", "original_sha256": "0" * 64}
    releases = []
    for content in ("one", "two"):
        source.write_text(content)
        (tmp_path / content).mkdir()
        host = HostVariables(tmp_path / content, vllm_service_overlays=[overlay])
        path = f"/usr/local/lib/glm-ocr/overlays/{hashlib.sha256(content.encode()).hexdigest()}/rotary.py.patched"
        words = exec_start(host.template_file("glm-ocr.service.j2"))
        assert words[words.index(f"{path}:/vllm-workspace/rotary.py:ro") - 1] == "--volume"
        releases.append(host.template("{{ __vllm_service_release }}"))
    assert releases[0] != releases[1]


def test_an_overlay_that_is_not_there_is_named(tmp_path: Path) -> None:
    overlay = {"source": "/absent/rotary.py", "target": "/rotary.py", "original_sha256": "0" * 64}
    host = HostVariables(tmp_path, vllm_service_overlays=[overlay])
    with pytest.raises(AnsibleError, match=r"expected a file of the controller at /absent/rotary.py"):
        host.template("{{ __vllm_service_overlay_files }}")


def test_the_probe_is_asked_about_the_command_of_the_unit(tmp_path: Path) -> None:
    host = HostVariables(tmp_path)
    asked = host.template(deploy_task("vllm_probe")["vars"]["vllm_probe_serve_arguments"])
    assert ["vllm", "serve", *asked] == serve_command(host.template_file("glm-ocr.service.j2"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"vllm_service_environment": {"BAD NAME": "1"}}, "not a variable name: BAD NAME"),
        ({"vllm_service_environment": {"A": "1\n2"}}, "A in vllm_service_environment must be one line"),
        ({"vllm_service_environment": {"OMP_PROC_BIND": False}}, "must be a string"),
        ({"vllm_service_flags": {"--port": 1}}, "without leading dashes, found --port"),
        (
            {"vllm_service_extra_flags": {"shutdown-timeout": 300}},
            "expected shutdown-timeout: 60, as vllm_service_shutdown_timeout_seconds says; found 300",
        ),
        (
            {"vllm_service_guard": True, "vllm_service_extra_flags": {"middleware": "site.Middleware"}},
            "as vllm_service_guard says; found site.Middleware",
        ),
        (
            {"vllm_service_guard_extra_limits": {"images": -1}},
            "vllm_service_guard_limits: expected a whole number from 0 up as images",
        ),
        ({"vllm_service_extra_flags": {"port": 8001}}, "expected port: 8000, as glm_ocr_port says; found 8001"),
        ({"vllm_service_extra_flags": {"host": "::"}}, "as glm_ocr_bind_address says; found ::"),
        ({"vllm_service_extra_flags": {"served-model-name": "a"}}, "as glm_ocr_served_model_name says; found a"),
        ({"vllm_service_extra_flags": {"max-model-len": None}}, "as glm_ocr_max_model_len says; found nothing"),
        (
            {"glm_ocr_trust_remote_code": False, "vllm_service_extra_flags": {"trust-remote-code": True}},
            "trust-remote-code is on and glm_ocr_trust_remote_code is off",
        ),
    ],
)
def test_what_cannot_be_rendered_is_named(overrides: dict[str, object], complaint: str, tmp_path: Path) -> None:
    problems = HostVariables(tmp_path, **overrides).template("{{ __vllm_service_problems }}")
    assert any(complaint in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"glm_ocr_port": 70000}, "glm_ocr_port must be 1 to 65535, found 70000"),
        ({"glm_ocr_max_model_len": 0}, "must be positive"),
        ({"glm_ocr_max_model_len": 200000}, "at most 131072"),
        ({"glm_ocr_client_max_tokens": 0}, "glm_ocr_client_max_tokens must be positive"),
        ({"glm_ocr_weights_path": "weights"}, "glm_ocr_weights_path must be an absolute path"),
        ({"glm_ocr_bind_address": "[::1]"}, "an IPv6 one without brackets, found [::1]"),
        ({"glm_ocr_bind_address": "0.0.0.0:8000"}, "glm_ocr_bind_address must be a host name or an address"),
        ({"glm_ocr_container_engine_path": "docker"}, "glm_ocr_container_engine_path must be an absolute path"),
        ({"glm_ocr_devices": ["davinci0"]}, "glm_ocr_devices must be /dev/NAME, found davinci0"),
        ({"glm_ocr_driver_paths": ["usr/local"]}, "found usr/local"),
        (
            {"glm_ocr_service_name": "a b", "glm_ocr_state_dir": "/srv/a", "glm_ocr_library_dir": "/srv/b"},
            "glm_ocr_service_name must be",
        ),
        ({"glm_ocr_instance": -1}, "glm_ocr_instance must be a whole number from 0 up, found -1"),
        ({"glm_ocr_instance": "second"}, "glm_ocr_instance must be a whole number from 0 up, found second"),
    ],
)
def test_an_inventory_that_does_not_hold_together(overrides: dict[str, object], complaint: str, tmp_path: Path) -> None:
    problems = HostVariables(tmp_path, **overrides).template("{{ __glm_ocr_problems }}")
    assert len(problems) == 1
    assert complaint in problems[0]


def test_the_seeds_inventory_has_no_problem(tmp_path: Path) -> None:
    host = HostVariables(tmp_path)
    assert host.template("{{ __glm_ocr_problems + __vllm_service_problems }}") == []


@pytest.mark.parametrize(("text", "accepted"), [("ExecStart=/bin/true", True), ("ExecStrat=/bin/true", False)])
def test_a_unit_systemd_complains_about_is_refused(text: str, accepted: bool) -> None:
    assert (vllm_release.verify(f"[Service]\n{text}\n", "glm-ocr.service") == []) is accepted


def test_what_the_unit_calls_runs_with_what_is_put_beside_it(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, glm_ocr_library_dir=str(tmp_path / "lib"), ansible_python_interpreter=sys.executable)
    (tmp_path / "lib").mkdir()
    for path, text in host.template("{{ __vllm_service_tools }}").items():
        Path(path).write_text(text)
    command = [*host.template("{{ __vllm_service_wait_ready }}"), "--help"]
    # Not as somebody who has the project's own modules in reach.
    subprocess.run(command, check=True, cwd="/", env={}, stdout=subprocess.DEVNULL)
    assert {path.name for path in (tmp_path / "lib").iterdir()} == {"wait_ready.py", "engine_socket.py", "unix_http.py"}
