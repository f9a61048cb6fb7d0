"""The validation's plays on this machine: the real scripts, a stand-in for the container engine and for the service."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import bench_perf
import eval_accuracy
import eval_ocr
import eval_served
from playing import HERE, Played, installed_scripts, play, stub
from rendering import PROJECT, ROLES, HostVariables
from running_engine import IMAGE_ID
from scheduled_mock import ScheduledMock, served

STAGES = ["ocr_smoke", "ocr_bench", "ocr_quality", "served_accuracy", "ocr_accuracy"]
DRIVER = "/usr/local/Ascend/driver/lib64"
WEIGHTS = "/opt/atomgit/weights/GLM-OCR-bf16"
#: Small samples: what is tested is the play.
SMALL = {
    "ocr_bench_latency_requests": 2,
    "ocr_bench_throughput_requests": 4,
    "ocr_bench_sweep": [1, 2],
    "ocr_quality_samples": 1,
}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The variables of a host that serves."""
    engine = PROJECT / "tests" / "support" / "running_engine.py"
    stub(tmp_path / "bin", "docker", f'exec {sys.executable} {engine} {tmp_path} "$@"')
    (tmp_path / "serving").touch()
    with served(ScheduledMock(plain=True)) as mock:
        base_url = mock.url.removesuffix("/v1/chat/completions")
        yield HERE | SMALL | {"glm_ocr_library_dir": installed_scripts(tmp_path), "glm_ocr_base_url": base_url}


def helper_runs(folder: Path) -> dict[str, list[str]]:
    """The arguments of every helper container, by script."""
    calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    runs = [call for call in calls if call[0] == "run"]
    return {Path(word).stem: call for call in runs for word in call if word.startswith("/scripts/")}


def report(folder: Path, name: str = "npu-01") -> dict[str, Any]:
    return dict(json.loads((folder / "reports" / name / "latest" / "report.json").read_text()))


def summary(played: Played) -> dict[str, Any]:
    return dict(json.loads(played.output.splitlines()[-1]))


def test_all_stages_with_a_summary_for_ci(host: dict[str, Any], tmp_path: Path) -> None:
    """The stand-in for the service only keeps time: what reads or computes fails, and every stage says so."""
    with socket.socket() as bound:  # bound, so that nobody else takes it, and not listened on
        bound.bind(("127.0.0.1", 0))
        lost = {"ansible_host": "127.0.0.1", "ansible_port": bound.getsockname()[1]}
        played = play(tmp_path, "playbooks/ci_validate.yml", {"npu-01": host, "npu-02": lost})
    assert played.rc != 0

    verdicts = {name: stage["verdict"] for name, stage in report(tmp_path)["stages"].items()}
    assert list(verdicts) == STAGES
    # No torch on this machine: the device could not be measured, and that is no pass.
    assert verdicts == dict.fromkeys(STAGES, "FAIL") | {"ocr_bench": "PASS", "ocr_accuracy": "ERROR"}
    stages = tmp_path / "reports" / "npu-01" / "latest" / "stages"
    assert {path.stem for path in stages.glob("*.json")} == set(STAGES)
    samples = [sample for kind in report(tmp_path)["stages"]["ocr_quality"]["kinds"] for sample in kind["samples"]]
    assert {sample["id"] for sample in samples} == {f"{kind}-000" for kind in eval_ocr.KINDS}
    assert all((stages / sample["picture"]).read_bytes().startswith(b"\x89PNG") for sample in samples)

    assert len(json.loads((stages.parent / "ocr_quality_readings.json").read_text())["readings"]) == len(samples)
    assert not list(tmp_path.glob("state/reports/*/ocr_quality*")), "no second copy on the host"

    (index,) = tmp_path.glob("reports/fleet/*/index.json")
    fleet = json.loads(index.read_text())
    assert (fleet["verdict"], fleet["hosts"]["npu-01"]["stages"]) == ("ERROR", verdicts)
    assert fleet["hosts"]["npu-02"] is None, "a lost host is on the page of all"
    page = (stages.parent / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(samples)

    last = summary(played)
    assert last["verdict"] == "ERROR"
    assert last["hosts"]["npu-01"]["stages"] == verdicts
    assert last["hosts"]["npu-02"]["verdict"] == "ERROR"
    suites = ElementTree.parse(last["junit"]).getroot()
    assert [suite.get("name") for suite in suites] == ["npu-01", "npu-02"]
    checks = sum(len(stage["checks"]) for stage in report(tmp_path)["stages"].values())
    assert len(suites[0]) == checks + 1, "one testcase a check, and one for the verdict"
    assert "unreachable" in str(suites[1][0][0].text)

    runs = helper_runs(tmp_path)
    for name, run in runs.items():
        assert run[: run.index(IMAGE_ID)].count("--entrypoint=python3") == (name != "eval_accuracy")
        assert "--network=host" in run
    device, path = runs["eval_accuracy"], runs["eval_served"]
    assert f"--volume={WEIGHTS}:{WEIGHTS}:ro" in device
    assert {"--device=/dev/davinci1", f"--volume={DRIVER}:{DRIVER}:ro", "--env=OMP_NUM_THREADS=8"} <= set(device)
    assert device[device.index(IMAGE_ID) + 1] == "python3", "through the image's entrypoint"
    assert f"--volume={WEIGHTS}:{WEIGHTS}:ro" in path
    assert not any(word.startswith("--device") for word in path[: path.index(IMAGE_ID)])


def test_a_tag_runs_its_stage_alone_and_the_verdict_is_on_it(host: dict[str, Any], tmp_path: Path) -> None:
    played = play(tmp_path, "playbooks/ci_validate.yml", {"npu-01": host}, "--tags", "ocr_bench")
    assert played.rc == 0
    assert (report(tmp_path)["verdict"], list(report(tmp_path)["stages"])) == ("PASS", ["ocr_bench"])
    assert list(helper_runs(tmp_path)) == ["bench_perf"]
    assert summary(played)["verdict"] == "PASS"
    assert report(tmp_path)["history"] == {"runs": [], "older": 0, "skipped": []}
    (index,) = tmp_path.glob("reports/fleet/*/index.json")
    assert json.loads(index.read_text())["verdict"] == "PASS"
    root = ElementTree.parse(tmp_path / "reports" / "junit.xml").getroot()
    assert (root.get("failures"), root.get("errors")) == ("0", "0")


def test_a_missed_limit_is_red_and_named(host: dict[str, Any], tmp_path: Path) -> None:
    limited = host | {"ocr_bench_min_requests_per_second": 1e9}
    played = play(tmp_path, "playbooks/ci_validate.yml", {"npu-01": limited}, "--tags", "ocr_bench")
    assert played.rc != 0
    last = summary(played)
    assert (last["verdict"], last["hosts"]["npu-01"]["failed"]) == (
        "FAIL",
        ["ocr_bench.min_throughput", "report.verdict"],
    )
    (suite,) = ElementTree.parse(last["junit"]).getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("2", "0")


def test_runs_are_promoted_and_a_slower_one_is_caught(host: dict[str, Any], tmp_path: Path) -> None:
    """One real run, given five ids: how noise is told from change is tested with measured ones."""
    enough = host | {"ocr_bench_throughput_requests": 60}
    baseline = tmp_path / "baselines" / "ascend910.json"
    too_early = play(tmp_path, "playbooks/baseline_promote.yml", {"npu-01": enough})
    assert too_early.rc != 0
    assert "expected at least 5 runs" in too_early.output
    assert play(tmp_path, "validate.yml", {"npu-01": enough}, "--tags", "ocr_bench").rc == 0
    measured = report(tmp_path)
    for number in range(4):
        again = tmp_path / "reports" / "npu-01" / f"run-{number}" / "report.json"
        again.parent.mkdir()
        again.write_text(json.dumps(measured | {"run": again.parent.name}))
    played = play(tmp_path, "playbooks/baseline_promote.yml", {"npu-01": enough})
    assert played.rc == 0
    assert "ocr_bench.throughput_median" in played.output
    made = json.loads(baseline.read_text())
    assert made["group"] == "ascend910"

    for figure in made["figures"]:
        if figure["better"] == "higher":
            figure["values"] = [100 * value for value in figure["values"]]
    baseline.write_text(json.dumps(made))
    gated = enough | {"validation_report_baseline": str(baseline)}
    played = play(tmp_path, "playbooks/ci_validate.yml", {"npu-01": gated}, "--tags", "ocr_bench")
    assert played.rc != 0
    last = summary(played)
    assert last["hosts"]["npu-01"]["stages"] == {"ocr_bench": "PASS", "baseline": "FAIL"}
    assert "baseline.ocr_bench.throughput_median" in last["hosts"]["npu-01"]["failed"]


def test_a_stage_that_left_nothing_is_an_error(host: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "serving").unlink()
    played = play(tmp_path, "validate.yml", {"npu-01": host}, "--tags", "ocr_bench,ocr_quality")
    assert played.rc != 0
    assert report(tmp_path)["verdict"] == "ERROR"
    assert report(tmp_path)["stages"] == {"ocr_bench": None, "ocr_quality": None}
    assert not played.output.splitlines()[-1].startswith("{"), "the summary is CI's"


def test_a_command_line_that_the_script_refuses_is_told(host: dict[str, Any], tmp_path: Path) -> None:
    wrong = host | {"ocr_bench_min_goodput": 0.9}
    played = play(tmp_path, "validate.yml", {"npu-01": wrong}, "--tags", "ocr_bench")
    assert played.rc != 0
    assert "--min-goodput needs the limits" in played.output


@pytest.mark.parametrize("more", [["--check"], ["--tags", "ocr_bnech"]])
def test_a_ci_that_would_measure_nothing_is_red(more: list[str], host: dict[str, Any], tmp_path: Path) -> None:
    played = play(tmp_path, "playbooks/ci_validate.yml", {"npu-01": host}, *more)
    assert played.rc != 0
    assert "Expected a validation of at least one stage" in played.output
    assert not (tmp_path / "calls.jsonl").exists()


def test_a_ci_without_a_host_is_red(tmp_path: Path) -> None:
    played = play(tmp_path, "playbooks/ci_validate.yml", {})
    assert played.rc == 2
    assert summary(played) == {"verdict": "ERROR", "junit": None, "hosts": {}}


@pytest.mark.parametrize(
    ("tags", "skipped", "stages"),
    [
        (["all"], [], STAGES),
        (["validate"], [], STAGES),
        (["ocr_bench"], [], ["ocr_bench"]),
        (["served_accuracy", "ocr_smoke"], [], ["ocr_smoke", "served_accuracy"]),
        (["all"], ["ocr_accuracy"], STAGES[:-1]),
        (["deploy"], [], []),
    ],
)
def test_the_tags_choose_the_stages(tags: list[str], skipped: list[str], stages: list[str], tmp_path: Path) -> None:
    variables = HostVariables(tmp_path, ansible_run_tags=tags, ansible_skip_tags=skipped)
    assert variables.template("{{ glm_ocr_run_stages }}") == stages


def test_a_deployment_ends_with_its_own_stages(host: dict[str, Any], tmp_path: Path) -> None:
    *_, validation = yaml.safe_load((PROJECT / "deploy.yml").read_text())
    (tmp_path / "validation.yml").write_text(
        yaml.safe_dump([validation | {"ansible.builtin.import_playbook": str(PROJECT / "playbooks" / "validate.yml")}])
    )
    play(tmp_path, str(tmp_path / "validation.yml"), {"npu-01": host})
    assert list(report(tmp_path)["stages"]) == ["ocr_smoke"]


def test_a_stage_that_a_tag_names_runs_even_if_it_is_not_wanted(tmp_path: Path) -> None:
    given: dict[str, Any] = {"ansible_run_tags": ["ocr_bench"], "ansible_skip_tags": []}
    variables = HostVariables(tmp_path, glm_ocr_stages=["ocr_smoke"], **given)
    assert variables.template("{{ glm_ocr_run_stages }}") == ["ocr_bench"]


@pytest.mark.parametrize("stages", [[], ["ocr_smoke", "ocr_bnech"]])
def test_stages_that_do_not_exist_are_refused(stages: list[str], tmp_path: Path) -> None:
    variables = HostVariables(tmp_path, glm_ocr_stages=stages)
    (problem,) = variables.template("{{ __glm_ocr_problems }}")
    assert ("ocr_bnech" in problem) == bool(stages)


def defaults(role: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROLES / role / "defaults" / "main.yml").read_text())
    return {name.removeprefix(f"{role}_"): value for name, value in found.items()}


def test_thresholds_are_the_scripts_own() -> None:
    """Role and script are used without each other; what they take for good must not drift apart."""
    assert defaults("ocr_quality")["thresholds"] == eval_ocr.DEFAULT_LIMITS
    role = defaults("ocr_accuracy")
    for script in (eval_accuracy, eval_served):
        config = vars(script.parse_args(["--model=m", "--output=o"]))
        shared = (role.keys() & config.keys()) - {"model", "base_url", "device"}
        assert {"warn_ratio", "fail_ratio", "min_top1"} <= shared
        assert {name: role[name] for name in shared} == {name: config[name] for name in shared}


def with_role(tmp_path: Path, role: str, **overrides: Any) -> HostVariables:
    """The variables of a production host as this role sees them."""
    variables = HostVariables(tmp_path, **overrides)
    variables.values = variables.load(ROLES / role / "defaults" / "main.yml") | variables.values
    variables.values |= variables.load(ROLES / role / "vars" / "main.yml")
    return variables


def test_the_device_may_be_the_cpu(tmp_path: Path) -> None:
    variables = with_role(tmp_path, "ocr_accuracy")
    assert "--device=/dev/davinci1" in variables.template("{{ __ocr_accuracy_device_options }}")
    variables.values["ocr_accuracy_device"] = "cpu"
    assert variables.template("{{ __ocr_accuracy_device_options }}") == []
    assert "--device=cpu" in variables.template("{{ __ocr_accuracy_device_command }}")


def bench_command(tmp_path: Path, **overrides: Any) -> bench_perf.Config:
    """What the script makes of the role's command line."""
    variables = with_role(tmp_path, "ocr_bench", **overrides)
    return bench_perf.parse_args(variables.template("{{ __ocr_bench_command }}")[1:])


def test_the_inventory_decides_what_the_benchmark_does(tmp_path: Path) -> None:
    config = bench_command(
        tmp_path,
        ocr_bench_goodput_ms={"ttft": 200, "e2e": 2000},
        ocr_bench_min_goodput=0.9,
        ocr_bench_min_requests_per_second=5,
        ocr_bench_rate_per_second=2.5,
        ocr_bench_image_pixels="1024x512",
        ocr_bench_metadata={"npu": "910B2", "driver": "25.2"},
        ocr_bench_ignore_eos=False,
    )
    assert (config.url, config.model) == ("http://127.0.0.1:8000/v1/chat/completions", "glm-ocr")
    assert (config.goodput, config.min_goodput) == ({"ttft": 200.0, "e2e": 2000.0}, 0.9)
    assert (config.rate, config.min_throughput, config.image) == (2.5, 5.0, (1024, 512))
    assert (config.metadata, config.ignore_eos) == ({"npu": "910B2", "driver": "25.2"}, False)
    assert config.sweep == (1, 4, 16, 32)


def test_a_limit_that_is_not_set_is_no_limit(tmp_path: Path) -> None:
    config = bench_command(tmp_path)
    assert (config.min_throughput, config.min_goodput, config.rate, config.image) == (None, None, None, None)
    assert config.ignore_eos
