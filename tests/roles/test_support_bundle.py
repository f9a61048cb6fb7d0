"""The support bundle: everything that can be had, a note for what cannot, and no secret in any of it."""

from __future__ import annotations

import ast
import json
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest

import redaction
import support_bundle
from playing import HERE, play, stub
from serve_command import systemd_quote

#: In the environment file, on the command line, in a kept release that has been replaced since, in a drop-in.
SECRETS = ("env-s3cret&<", "argv-s3cret %$d'\"\\é", "second-s3cret", "old-s3cret", "dropin s3cret", "registry-s3cret")
ENV, ARGV, SECOND, OLD, DROPIN, UNKNOWN = SECRETS
UNIT = f"""[Service]
ExecStart=/usr/bin/docker run \\
  --env-file {{environment}} \\
  image \\
  vllm serve /weights \\
  --port 8000 \\
  --api-key {systemd_quote(ARGV)} {SECOND}
ExecStartPost=/usr/bin/true
"""
INSPECTED = [
    {
        "Config": {"Cmd": ["vllm", "serve", "--api-key", ARGV, SECOND], "Env": [f"VLLM_API_KEY={ENV}", "OMP=1"]},
        "Image": "sha256:0123",
    }
]
JOURNAL = f"""started with {{'api_key': {[ARGV, SECOND]!r}, 'port': 8000}}
someone sent {ENV} and {DROPIN} in the open; before it was {OLD}
pulling through http://puller:{UNKNOWN}@proxy:3128/
文字识别 ready
"""


class Host:
    """Stand-ins for the host's commands and files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        (folder / "glm-ocr.env").write_text(f"# comment\nOMP_NUM_THREADS=1\nVLLM_API_KEY={ENV}\n")
        self.unit = UNIT.format(environment=folder / "glm-ocr.env")
        (folder / "glm-ocr.service").write_text(self.unit)
        for release, key in (("0123", ENV), ("4567", OLD)):
            (folder / "state" / "releases" / release).mkdir(parents=True)
            kept = folder / "state" / "releases" / release
            (kept / "release.json").write_text("{}")
            (kept / "unit").write_text(self.unit)
            (kept / "environment").write_text(f"HF_TOKEN={key}\n")
        (folder / "state" / "releases" / "history.jsonl").write_text(f'{{"action": "deploy", "note": "{OLD}"}}\n')
        for number in range(5):
            (folder / "state" / "reports" / f"2026010{number}T000000Z").mkdir(parents=True)
            (folder / "state" / "reports" / f"2026010{number}T000000Z" / "ocr_smoke.json").write_text("{}")
        self.says("journalctl", JOURNAL)
        self.says("systemctl", self.unit + f"Environment='X_SECRET={DROPIN}'\n")
        self.says("docker", json.dumps(INSPECTED, indent=4, ensure_ascii=False))
        for command in ("npu-smi", "df", "free", "ss", "uname"):
            self.says(command, f"{command} says {ENV}\n")

    def says(self, command: str, text: str, more: str = "") -> None:
        answer = self.folder / f"{command}.answer"
        answer.write_text(text)
        self.runs(command, f"cat {answer}\n{more}")

    def runs(self, command: str, script: str) -> None:
        stub(self.folder / "bin", command, script)

    def bundle(self, *more: str) -> dict[str, str]:
        """The files of the bundle by name."""
        output = self.folder / "npu-01-support-r1.tar.gz"
        arguments = {"service": "glm-ocr", "engine": "docker", "state-dir": self.folder / "state", "output": output}
        arguments |= {"unit": self.folder / "glm-ocr.service", "timeout": 20}
        assert support_bundle.main([*(f"--{name}={value}" for name, value in arguments.items()), *more]) == 0
        assert output.stat().st_mode & 0o077 == 0
        with tarfile.open(output) as archive:
            names = archive.getnames()
            assert {name.split("/")[0] for name in names} == {"npu-01-support-r1"}
            found = {}
            for name in names:
                file = archive.extractfile(name)
                assert file is not None
                found[name.split("/", 1)[1]] = file.read().decode()
        assert next(iter(found)) == "MANIFEST.txt"
        return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_everything_is_in_it_and_in_the_manifest(host: Host) -> None:
    found = host.bundle()
    manifest = found.pop("MANIFEST.txt")
    for name, text in found.items():
        assert f"{len(text.encode()):>9} bytes  {name}  [" in manifest
    assert set(
        support_bundle.commands(support_bundle.parse_args(["--service=s", "--engine=e", "--state-dir=/", "--output=o"]))
    ) < set(found)
    assert {"glm-ocr.service", "glm-ocr.env", "os-release.txt", "releases/history.jsonl"} < set(found)
    assert {"releases/4567/unit.service", "releases/4567/environment.env", "releases/4567/release.json"} < set(found)
    assert [name for name in found if name.startswith("reports/")] == [
        f"reports/2026010{number}T000000Z/ocr_smoke.json" for number in (2, 3, 4)
    ]
    assert "文字识别 ready" in found["journal.txt"]


def test_no_secret_is_in_it_in_any_spelling(host: Host) -> None:
    found = host.bundle()
    for name, text in found.items():
        assert "s3cret" not in text, name
        assert all(spelling not in text for secret in SECRETS for spelling in redaction.spelled(secret)), name
    assert found["glm-ocr.env"] == "# comment\nOMP_NUM_THREADS=1\nVLLM_API_KEY=(hidden)\n"
    assert "someone sent (hidden) and (hidden) in the open; before it was (hidden)" in found["journal.txt"]
    assert "  --port 8000 \\\n" in found["glm-ocr.service"]
    (container,) = json.loads(found["container-inspect.json"])
    assert container["Config"]["Cmd"] == ["vllm", "serve", "--api-key", "(hidden)", "(hidden)"]
    assert container["Image"] == "sha256:0123"


@pytest.mark.parametrize("source", ["glm-ocr.env", "glm-ocr.service", "container-inspect.json"])
def test_each_place_of_a_secret_is_enough_to_hide_it_everywhere(source: str, host: Host) -> None:
    """Each source is the only one: what finds the secret in it is not covered for by another."""
    unit = f"ExecStart=x --env-file {host.folder / 'glm-ocr.env'}"
    secret = "planted"
    (host.folder / "glm-ocr.env").write_text("")
    (host.folder / "glm-ocr.service").write_text(unit)
    host.says("systemctl", "")
    host.says("docker", "[]")
    if source == "glm-ocr.env":
        secret = "a planted \"one, it's 5%% raw"  # the container engine takes the line as it is
        (host.folder / source).write_text(f"A_KEY={secret}\n")
    elif source == "glm-ocr.service":
        (host.folder / source).write_text(f"{unit} --api-key planted")
    else:
        host.says("docker", '[{"Config": {"Cmd": ["--api-key", "planted"]}}]')
    host.says("journalctl", f"they said {secret}.")
    found = host.bundle()
    assert found["journal.txt"] == "they said (hidden)."
    assert not any("planted" in text for text in found.values())


def test_what_is_missing_or_fails_is_a_note(host: Host) -> None:
    host.runs("npu-smi", "echo driver lost; exit 7")
    found = host.bundle("--engine=no-such-engine", f"--unit={host.folder / 'absent.service'}")
    manifest = found["MANIFEST.txt"]
    assert "container-inspect.json: not run: No such file or directory  [no-such-engine container inspect" in manifest
    assert "glm-ocr.service: not read: No such file or directory" in manifest
    assert "npu-smi-info.txt: exit status 7" in manifest
    assert found["npu-smi-info.txt"] == "driver lost\n"
    assert "journal.txt:" not in manifest
    assert not {"container-inspect.json", "glm-ocr.service"} & set(found)


def test_a_command_that_hangs_costs_its_timeout_alone_and_what_it_said_is_kept(host: Host) -> None:
    hanging = "exec sleep 600"
    host.says("npu-smi", "half an answer\n", hanging)
    host.says("docker", "", hanging)
    started = time.monotonic()
    found = host.bundle("--timeout=2")
    assert time.monotonic() - started < 60
    assert "npu-smi-info.txt: stopped after 2 s" in found["MANIFEST.txt"]
    assert "container-engine-info.txt: stopped after 2 s" in found["MANIFEST.txt"]
    assert found["npu-smi-info.txt"] == "half an answer\n"


def test_of_a_long_journal_the_newest_whole_lines_are_taken(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_bundle, "LARGEST_BYTES", 2**20)
    host.says("journalctl", "".join(f"line {number:06}\n" for number in range(100_000)))
    found = host.bundle()
    lines = found["journal.txt"].splitlines()
    assert lines[-1] == "line 099999"
    assert len(found["journal.txt"]) <= 2**20
    assert len(lines[0]) == len("line 000000")
    assert "journal.txt: only its last 1 MiB" in found["MANIFEST.txt"]


def test_the_journal_is_asked_for_its_last_lines(host: Host) -> None:
    host.runs("journalctl", 'echo "$@"')
    assert "--unit=glm-ocr --lines=123" in host.bundle("--journal-lines=123")["journal.txt"]


def test_a_bundle_that_cannot_be_written_is_an_error(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--service=s", "--engine=docker", f"--state-dir={host.folder}", "--timeout=20"]
    assert support_bundle.main([*arguments, f"--output={host.folder}/absent/bundle.tar.gz"]) == 2
    assert "expected to write" in capsys.readouterr().err


@pytest.mark.parametrize("module", [support_bundle, redaction])
def test_it_runs_on_a_hosts_own_python(module: object) -> None:
    """3.8's grammar, postponed annotations for 3.9's types in them, and nothing but the standard library."""
    tree = ast.parse(Path(str(vars(module)["__file__"])).read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "__future__" in imported
    assert {name.split(".")[0] for name in imported} <= {*sys.stdlib_module_names, "redaction"}


def test_the_playbook_brings_the_bundle_and_leaves_nothing(host: Host) -> None:
    played = play(host.folder, "playbooks/logs.yml", {"npu-01": HERE})
    assert played.rc == 0
    assert played.recap("npu-01")["changed"] == 0
    (bundle,) = host.folder.glob("reports/npu-01/support-*.tar.gz")
    with tarfile.open(bundle) as archive:
        assert archive.getnames()[0] == f"npu-01-{bundle.name.removesuffix('.tar.gz')}/MANIFEST.txt"
    assert list((host.folder / "tmp").iterdir()) == []


def test_the_playbook_collects_nothing_in_check_mode(host: Host) -> None:
    assert play(host.folder, "playbooks/logs.yml", {"npu-01": HERE}, "--check").rc == 0
    assert list(host.folder.glob("reports/**/*")) == []
