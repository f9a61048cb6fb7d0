"""merge_fleet.py: all hosts of a run, and no missing one passed over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import merge_fleet
import merge_report
import report_files
import stage_results
from html_page import checked_page
from stage_results import smoke_stage

RUN = "20260102T030405Z"
SCHEMA = json.loads((report_files.SCHEMAS / "fleet.schema.json").read_text())


class Fleet:
    """Reports of a run, and their merge."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder / "reports", capsys
        self.output = self.folder / "fleet" / RUN

    def host(self, name: str, verdict: str = "PASS", **deployment: Any) -> None:
        output = self.folder / name / RUN
        stages = output / "stages"
        stages.mkdir(parents=True)
        (stages / "ocr_smoke.json").write_text(json.dumps(smoke_stage(verdict)))
        record = stage_results.DEPLOYMENT | {"host": name} | deployment
        (output / "deployment.json").write_text(json.dumps(record))
        places = ["--stages", str(stages), "--deployment", str(output / "deployment.json"), "--output", str(output)]
        merge_report.main(places)
        self.capsys.readouterr()

    def merge(self, *more: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Exit status, last line and index.json."""
        status = merge_fleet.main(["--reports", str(self.folder), "--run", RUN, *more])
        last_line = json.loads(self.capsys.readouterr().out.splitlines()[-1])
        index = json.loads((self.output / "index.json").read_text())
        jsonschema.Draft202012Validator(SCHEMA).validate(index)
        assert last_line["verdict"] == index["verdict"]
        assert sorted(path.name for path in self.output.iterdir()) == ["index.html", "index.json", "index.zh.html"]
        for name in ("index.html", "index.zh.html"):
            checked_page((self.output / name).read_text())
        return status, last_line, index

    @property
    def page(self) -> str:
        return (self.output / "index.html").read_text()


@pytest.fixture
def fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fleet:
    return Fleet(tmp_path, capsys)


def test_all_pass(fleet: Fleet) -> None:
    fleet.host("npu-01")
    fleet.host("npu-02")
    (fleet.folder / "npu-01" / "latest").symlink_to(RUN)
    status, last_line, index = fleet.merge()
    assert status == 0
    assert last_line["hosts"] == {"npu-01": "PASS", "npu-02": "PASS"}
    assert last_line["report"] == str(fleet.output / "index.html")
    assert index["differences"] == []
    for link in re.findall(r'<a href="([^"]+/report.html)"', fleet.page):
        assert (fleet.output / link).is_file()
    assert fleet.page.count("/report.html") == 2
    assert "npu-02: 100 %, n = 1" in fleet.page


@pytest.mark.parametrize(("verdict", "status"), [("FAIL", 1), ("ERROR", 2)])
def test_the_worst_host_decides(fleet: Fleet, verdict: str, status: int) -> None:
    fleet.host("npu-01")
    fleet.host("npu-02", verdict)
    found, _, index = fleet.merge("--hosts", "npu-01, npu-02")
    assert (found, index["verdict"]) == (status, verdict)
    assert index["hosts"]["npu-02"]["failures"] == ["ocr_smoke: image"]


def test_a_missing_host_is_an_error(fleet: Fleet) -> None:
    fleet.host("npu-01")
    status, last_line, index = fleet.merge("--hosts", "npu-01,npu-02")
    assert (status, last_line["hosts"]["npu-02"], index["hosts"]["npu-02"]) == (2, "ERROR", None)
    assert index["problems"][0].startswith("npu-02: report.json: expected in ")


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_an_unusable_report_is_an_error(fleet: Fleet, content: str) -> None:
    fleet.host("npu-01")
    (fleet.folder / "npu-01" / RUN / "report.json").write_text(content)
    status, _, index = fleet.merge()
    assert (status, list(index["hosts"])) == (2, ["npu-01"])


def test_a_report_of_another_host_is_an_error(fleet: Fleet) -> None:
    fleet.host("npu-01", host="npu-09")
    _, _, index = fleet.merge()
    assert "expected host 'npu-01', found 'npu-09'" in index["problems"][0]


def test_no_host_is_no_pass(fleet: Fleet) -> None:
    status, _, index = fleet.merge()
    assert (status, index["hosts"]) == (2, {})


def test_differences_are_said(fleet: Fleet) -> None:
    fleet.host("npu-01")
    fleet.host("npu-02", image={"name": "x", "id": "sha256:other"}, accelerator="none (CPU lab engine)")
    _, _, index = fleet.merge()
    assert [difference.split(":")[0] for difference in index["differences"]] == ["image id", "accelerator"]
    assert "npu-02: sha256:other" in index["differences"][0]
    assert "The hosts differ" in fleet.page
    assert 'class="banner"' in fleet.page


def test_hostile_host_names_stay_texts(fleet: Fleet) -> None:
    fleet.host("<b>&javascript:")
    fleet.merge()
    assert "<b>&javascript" not in fleet.page


def test_figures_of_other_conditions_are_not_compared(fleet: Fleet) -> None:
    fleet.host("npu-01")
    fleet.host("npu-02")
    path = fleet.folder / "npu-02" / RUN / "report.json"
    report = json.loads(path.read_text())
    report["key_figures"][0]["conditions"] = "lines=99"
    path.write_text(json.dumps(report))
    fleet.merge()
    assert "Measured under different conditions: do not compare." in fleet.page


def test_broken_template_still_gives_a_verdict(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "broken.j2").write_text("{{ nothing.here }}")
    template = str(tmp_path / "broken.j2")
    assert merge_fleet.main(["--reports", str(fleet.folder), "--run", RUN, "--template", template]) == 2
    captured = fleet.capsys.readouterr()
    assert "no complete report" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["verdict"] == "ERROR"
