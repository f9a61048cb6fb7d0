"""baseline.py: what is promoted, what a run is told, and that noise is told from change."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import baseline
import merge_report
from html_page import checked_page
from report_files import UnusableError, schema
from report_page import LANGUAGES
from stage_results import DEPLOYMENT, smoke_stage

#: Measured runs, their mean throughput and the median of its blocks; the slower ones have 9 % less.
MEASURED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "support" / "throughput_runs.json").read_text())
MEAN, MEDIAN = 0, 1
SAME = [run[MEDIAN] for run in MEASURED["unchanged"]]
SLOW = [run[MEDIAN] for run in MEASURED["slower"]]
THROUGHPUT = baseline.REQUIRED
UNITS = {"ocr_bench.latency_p50": "ms", "ocr_bench.requests_per_second": "requests/s", THROUGHPUT: "requests/s"}


def key_figure(identity: str, value: float | None, **changed: Any) -> dict[str, Any]:
    """A figure of a report."""
    return {
        "id": identity,
        "stage": identity.split(".")[0],
        "label": "Throughput, median of blocks",
        "value": value,
        "unit": UNITS.get(identity, "ratio"),
        "n": 400,
        "n_of": "blocks",
        "better": "higher" if identity.endswith(("median", "second", "top1", "right")) else "lower",
        "conditions": "concurrency=2",
        **changed,
    }


def made(number: int, *figures: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    """The report of a run with these figures; a stage of each is there."""
    report = merge_report.merge({"ocr_smoke": smoke_stage()}, DEPLOYMENT | deployment, [], f"run-{number:02}")
    return report | {
        "started_at": f"2026-01-02T03:04:{number:02}Z",
        "stages": {entry["stage"]: smoke_stage() for entry in figures},
        "key_figures": list(figures),
    }


def runs_of(identity: str, values: list[float], **changed: Any) -> list[dict[str, Any]]:
    return [made(number, key_figure(identity, value, **changed)) for number, value in enumerate(values)]


def promoted(identity: str = THROUGHPUT, values: list[float] | None = None, **changed: Any) -> dict[str, Any]:
    return baseline.promote(
        runs_of(identity, values or [99.0, 100.0, 101.0, 100.0, 100.0], **changed), "g", (identity,)
    )


def compared(found: dict[str, Any], with_it: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    """The check of the one figure."""
    stage = baseline.compare(made(50, found, **deployment), with_it)
    assert stage
    for name in ("stage", "comparison"):
        jsonschema.Draft202012Validator(schema(name)).validate(stage)
    (check,) = stage["checks"]
    assert stage["verdict"] == check["verdict"]
    return dict(check)


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [(0.95, 1, 6.314), (0.99, 2, 6.965), (0.99, 4, 3.747), (0.95, 4, 2.132), (0.99, 9, 2.821), (0.95, 30, 1.697)],
)
def test_quantiles_of_student_t_are_those_of_the_tables(probability: float, freedom: int, quantile: float) -> None:
    assert baseline.student_t(probability, freedom) == pytest.approx(quantile, abs=0.0006)


def noise_of(values: list[float]) -> baseline.Noise:
    """As that of a promoted throughput, also of values that would be refused."""
    rule = baseline.RULES[THROUGHPUT]
    stated = {"n": [10] * len(values), "tolerance": rule.tolerance, "relative": rule.relative}
    return baseline.Noise.of(key_figure(THROUGHPUT, None) | {"values": values} | stated)


def test_the_tolerance_is_the_one_that_the_baseline_states() -> None:
    with_it = promoted()
    assert compared(key_figure(THROUGHPUT, 92.0), with_it)["verdict"] == "FAIL"
    with_it["figures"][0]["tolerance"] = 0.1
    check = compared(key_figure(THROUGHPUT, 92.0), with_it)
    assert (check["verdict"], check["tolerance"]) == ("PASS", 0.1)


def test_a_figure_worked_out_by_hand() -> None:
    """Values with s = 0.01 in logarithms around 100: m = 3.747 x 0.01 x sqrt(1.2) = 0.04105."""
    step = 0.01 * math.sqrt(2)
    values = [100 * math.exp(shift) for shift in (-step, 0, 0, 0, step)]
    noise = noise_of(values)
    assert noise.mean == pytest.approx(100)
    assert noise.margin == pytest.approx(0.04105, abs=1e-5)
    assert noise.detectable == pytest.approx(1 - math.exp(-(0.04105 + 0.02335 - math.log(0.97))), abs=1e-5)
    last = 100 * 0.97 * math.exp(-noise.margin)
    with_it = promoted(values=values)
    assert compared(key_figure(THROUGHPUT, last * 1.001), with_it)["verdict"] == "PASS"
    check = compared(key_figure(THROUGHPUT, last * 0.999), with_it)
    assert (check["verdict"], check["n"], check["baseline_n"], check["unit"]) == ("FAIL", 400, 5, "requests/s")
    assert check["worse"] == pytest.approx(1 - last * 0.999 / 100)
    assert check["surely_worse"] == pytest.approx(0.031, abs=0.001)
    assert compared(key_figure(THROUGHPUT, 0.0), with_it)["verdict"] == "FAIL"
    assert compared(key_figure(THROUGHPUT, 500.0), with_it)["verdict"] == "PASS", "better is no regression"


def test_lower_is_better_for_a_time() -> None:
    with_it = promoted("ocr_bench.latency_p50")
    assert compared(key_figure("ocr_bench.latency_p50", 125.0), with_it)["verdict"] == "FAIL"
    assert compared(key_figure("ocr_bench.latency_p50", 50.0), with_it)["verdict"] == "PASS"


def test_shares_are_compared_by_their_difference() -> None:
    error = promoted("ocr_quality.text", [0.0, 0.01, 0.0, 0.01, 0.0])
    assert compared(key_figure("ocr_quality.text", 0.03), error)["verdict"] == "PASS"
    assert compared(key_figure("ocr_quality.text", 0.08), error)["verdict"] == "FAIL"
    agreement = promoted("served_accuracy.top1", [1.0] * 5)
    assert compared(key_figure("served_accuracy.top1", 0.99), agreement)["verdict"] == "PASS"
    assert compared(key_figure("served_accuracy.top1", 0.9), agreement)["verdict"] == "FAIL"
    # Of 8 lines one is 12 %: nothing that could be judged.
    with pytest.raises(UnusableError, match="vary too much"):
        promoted("ocr_smoke.right", [1.0] * 5, n=8)


def caught(with_it: dict[str, Any], value: float) -> bool:
    return bool(baseline.check(with_it["figures"][0], key_figure(THROUGHPUT, value))["verdict"] == "FAIL")


@pytest.mark.parametrize("runs", [5, 10])
def test_noise_is_told_from_change(runs: int) -> None:
    """Baselines, and 20 later runs of each, drawn from measured runs: unchanged ones, and ones a tenth slower.

    Of the series of 20 unchanged runs at most 1 in 50 has an alarm; of the slower runs at least 95 in 100 are caught.
    """
    rng = random.Random(4)
    series, alarmed, found = 0, 0, []
    for _ in range(300):
        try:
            with_it = promoted(values=rng.choices(SAME, k=runs))
        except UnusableError:
            continue
        series += 1
        alarmed += any(caught(with_it, value) for value in rng.choices(SAME, k=20))
        found += [caught(with_it, value) for value in rng.choices(SLOW, k=20)]
        found += [caught(with_it, 0.9 * value) for value in rng.choices(SAME, k=20)]
    assert series > 250, "hardly a baseline is refused"
    assert alarmed <= 0.02 * series
    assert sum(found) >= 0.95 * len(found)


def test_the_stated_power_and_confidence_hold_for_normal_noise() -> None:
    """Noise near the most that is accepted: what is called detectable is, and unchanged runs alarm under 1 in 100."""
    rng = random.Random(8)
    alarms, found, runs = 0, 0, 0
    for _ in range(1500):
        noise = noise_of([100 * math.exp(rng.gauss(0, 0.01)) for _ in range(5)])
        if noise.detectable > baseline.RULES[THROUGHPUT].catch:
            continue
        runs += 1
        for value, is_worse in ((100.0, False), (100 * (1 - noise.detectable), True)):
            worsening = noise.worsening(value * math.exp(rng.gauss(0, 0.01)))
            seen = worsening - noise.margin > noise.limit
            alarms, found = alarms + (seen and not is_worse), found + (seen and is_worse)
    assert runs > 500
    assert alarms < 0.01 * runs
    assert found > 0.9 * runs


def test_twenty_unchanged_runs_raise_no_alarm_and_a_tenth_is_caught() -> None:
    """The measured runs themselves, in their order: the first five are the baseline."""
    with_it = promoted(values=SAME[:5])
    assert [value for value in SAME[5:] if caught(with_it, value)] == []
    assert len(SAME[5:]) >= 20
    assert all(caught(with_it, value) for value in SLOW)


def test_the_median_of_blocks_bears_what_the_mean_does_not() -> None:
    """Why it is the figure: a disturbance that was measured, in an unchanged run, took a third of the mean."""
    mean = [run[MEAN] for run in MEASURED["unchanged"]]
    assert min(mean) < 0.7 * max(mean)
    assert min(SAME) > 0.95 * max(SAME)
    with pytest.raises(UnusableError, match="a mean, a tail or a step"):
        promoted("ocr_bench.requests_per_second")


def test_runs_that_vary_too_much_are_no_baseline() -> None:
    with pytest.raises(UnusableError, match=r"vary too much: .* % worse is the least .* and 10 % must be"):
        promoted(values=[90.0, 100.0, 110.0, 95.0, 105.0])


def test_a_doubled_latency_is_caught_on_a_host_whose_runs_vary() -> None:
    """First-token times measured in the lab while others used the machine."""
    identity = "ocr_bench.ttft_p50"
    noisy = promoted(identity, [28.3756, 25.3279, 27.1297, 27.1487, 27.4467, 28.2588])
    (figure,) = noisy["figures"]
    assert 0.25 < figure["detectable"] < 1
    assert compared(key_figure(identity, 28.4), noisy)["verdict"] == "PASS"
    assert compared(key_figure(identity, 54.8), noisy)["verdict"] == "FAIL"


def with_stage(report: dict[str, Any], name: str, verdict: str) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    changed["stages"][name] = smoke_stage() | {"verdict": verdict}
    return changed


REFUSED: dict[str, tuple[Any, str]] = {
    "too few": (lambda runs: runs[:4], "expected at least 5 runs"),
    "one twice": (lambda runs: [*runs[:4], runs[0]], "found one twice"),
    "one failed": (lambda runs: [*runs[:4], with_stage(runs[4], "ocr_smoke", "FAIL")], "did not pass"),
    "one with a problem": (lambda runs: [*runs[:4], runs[4] | {"problems": ["x"]}], "did not pass"),
    "one without a stage": (lambda runs: [*runs[:4], runs[4] | {"stages": {"ocr_bench": None}}], "did not pass"),
    "two images": (
        lambda runs: [*runs, made(9, key_figure(THROUGHPUT, 100.0), image={"name": "n", "id": "other"})],
        "expected one image",
    ),
    "two accelerators": (
        lambda runs: [*runs, made(9, key_figure(THROUGHPUT, 100.0), accelerator="other")],
        "expected one accelerator",
    ),
    "not measured": (lambda runs: [*runs, made(9, key_figure(THROUGHPUT, None))], "measured in 5 of 6 runs"),
    "absent in one": (lambda runs: [*runs, made(9, key_figure("ocr_quality.text", 0.0))], "measured in 5 of 6 runs"),
    "another load": (
        lambda runs: [*runs, made(9, key_figure(THROUGHPUT, 100.0, conditions="concurrency=3"))],
        "different conditions",
    ),
    "nothing done": (lambda runs: [*runs, made(9, key_figure(THROUGHPUT, 0.0))], "values above 0"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_promoted(changed: Any, message: str) -> None:
    runs = runs_of(THROUGHPUT, [99.0, 100.0, 101.0, 100.0, 100.0])
    baseline.promote(runs, "g")
    with pytest.raises(UnusableError, match=message):
        baseline.promote(changed(runs), "g")


def test_what_an_earlier_baseline_says_does_not_keep_a_run_from_being_promoted() -> None:
    runs = runs_of(THROUGHPUT, [80.0, 81.0, 80.0, 80.0, 80.0])
    promoted_again = baseline.promote([with_stage(run, baseline.STAGE, "FAIL") for run in runs], "g")
    assert promoted_again["figures"][0]["values"][0] == 80.0


@pytest.mark.parametrize(
    "found",
    [
        key_figure(THROUGHPUT, None),
        key_figure(THROUGHPUT, 100.0, conditions="concurrency=3"),
        key_figure("ocr_bench.other", 100.0),
    ],
    ids=["not measured", "another load", "absent"],
)
def test_what_cannot_be_compared_is_an_error(found: dict[str, Any]) -> None:
    assert compared(found, promoted())["verdict"] == "ERROR"


def test_another_accelerator_is_an_error() -> None:
    check = compared(key_figure(THROUGHPUT, 100.0), promoted(), accelerator="none (CPU lab engine)")
    assert (check["id"], check["verdict"]) == ("accelerator", "ERROR")


def test_stages_that_did_not_run_are_not_compared() -> None:
    assert baseline.compare(made(1, key_figure("ocr_smoke.right", 1.0)), promoted()) is None


def put(report: dict[str, Any], folder: Path) -> None:
    path = folder / report["host"] / report["run"] / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))


def test_the_last_runs_are_promoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for report in runs_of(THROUGHPUT, [50.0, 99.0, 100.0, 101.0, 100.0, 100.0]):
        put(report, tmp_path)
    put(made(20, key_figure("ocr_smoke.right", 1.0)), tmp_path)  # a deployment's smoke
    (tmp_path / "npu-01" / "latest").symlink_to("run-05")
    (tmp_path / "npu-01" / "old").mkdir()
    (tmp_path / "npu-01" / "old" / "report.json").write_text("{}")
    output = tmp_path / "baselines" / "ascend910.json"
    arguments = ["--reports", str(tmp_path), "--hosts", "npu-01", "--output", str(output)]
    assert baseline.main([*arguments, "--runs", "6"]) == 2, "the first is another service"
    assert "vary too much" in capsys.readouterr().err
    assert not output.exists()
    assert baseline.main(arguments) == 0
    written = json.loads(output.read_text())
    jsonschema.Draft202012Validator(schema("baseline")).validate(written)
    assert written["group"] == "ascend910"
    assert [run["run"] for run in written["runs"]] == [f"run-0{number}" for number in range(1, 6)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"] == 1
    assert baseline.main([*arguments, "--hosts", "npu-02"]) == 2
    assert "run validate.yml 5 times more" in capsys.readouterr().err


def merged(tmp_path: Path, *more: str) -> dict[str, Any]:
    """A run with a smoke of one line, merged from the command line."""
    (tmp_path / "stages").mkdir(exist_ok=True)
    (tmp_path / "stages" / "ocr_smoke.json").write_text(json.dumps(smoke_stage()))
    (tmp_path / "deployment.json").write_text(json.dumps(DEPLOYMENT))
    places = ["--stages", str(tmp_path / "stages"), "--deployment", str(tmp_path / "deployment.json")]
    status = merge_report.main([*places, "--output", str(tmp_path / "run"), *more])
    report = dict(json.loads((tmp_path / "run" / "report.json").read_text()))
    jsonschema.Draft202012Validator(schema("report")).validate(report)
    assert status == {"PASS": 0, "FAIL": 1, "ERROR": 2}[report["verdict"]]
    return report


def test_the_report_bears_the_comparison(tmp_path: Path) -> None:
    (own,) = merged(tmp_path)["key_figures"]
    made_of = baseline.promote(
        [made(number, own | {"n": 400, "value": 1.0}) for number in range(5)], "ascend910", ("ocr_smoke.right",)
    )
    made_of["left_out"] = [{"id": "ocr_bench.saturation", "reason": "a step"}]
    for values, verdict in (([1.0] * 5, "PASS"), ([1.0] * 5, "FAIL"), ([1.0] * 5, "ERROR")):
        changed = copy.deepcopy(made_of)
        if verdict == "FAIL":
            # A share above 1 is none; it stands for a run that reads worse than the baseline's.
            changed["figures"][0]["values"] = [value + 0.5 for value in values]
        if verdict == "ERROR":
            changed["figures"][0]["conditions"] = "scale=1"
        path = tmp_path / "baseline.json"
        path.write_text(json.dumps(changed))
        report = merged(tmp_path, "--baseline", str(path))
        assert (report["verdict"], report["stages"]["baseline"]["verdict"]) == (verdict, verdict)
        assert report["finished_at"] == smoke_stage()["finished_at"]
        for page in LANGUAGES.values():
            text = (tmp_path / "run" / page).read_text()
            checked_page(text)
            part = text.split('<section id="baseline">')[1].split("</section>")[0]
            assert "npu-01/run-04" in part
            assert "ocr_bench.saturation (a step)" in part
        assert f"| baseline | {verdict} |" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_an_unusable_baseline_is_an_error(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    report = merged(tmp_path, "--baseline", str(path))
    assert report["verdict"] == "ERROR"
    assert "baseline_promote.yml" in report["problems"][0]
