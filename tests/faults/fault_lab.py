"""Serves a fault in the lab and has it validated: the edges of the fault table."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testinfra.host import Host

from fault_list import Fault
from fault_table import NOT_RUN, STAGES, Measured, Outcome, outcome, outcomes
from lab import ENGINE, INVENTORY, LAB_STATE, NODE, WEIGHTS, extra_flags
from model_files import NANO
from playing import ansible_playbook
from rendering import PROJECT

HERE = Path(__file__).resolve().parent
FOLDER = PROJECT / "reports" / "fault-table"
BASELINE = FOLDER / "baselines" / "lab.json"
#: What each fault's run and each healthy run saw, one file each, so that an interrupted session can be resumed.
FAULT_RESULTS, HEALTHY_RESULTS = FOLDER / "measured" / "faults", FOLDER / "measured" / "healthy"
DAMAGED = "/opt/atomgit/weights/damaged"
MIDDLEWARE = "lab_faults"
PACKAGES = "/usr/local/lib/python3.11/dist-packages"
#: Enough requests to tell noise from change, without the sweep; of the pages the lines, which the nano model reads, and
#: more of them, so that every digit is on several.
MEASURE = {
    "ocr_bench_throughput_requests": 100,
    "ocr_bench_latency_requests": 40,
    "ocr_bench_sweep": [],
    "ocr_quality_thresholds": {"line": 0.1, "repetition": 0.05, "confusion": 0},
    "ocr_quality_samples": 20,
    "glm_ocr_reports_dir": str(FOLDER),
}


class FaultLab:
    """The lab's node, and where the damaged folders are made."""

    def __init__(self, node: Host, scratch: Path) -> None:
        self.node, self.scratch = node, scratch
        self.image = str(node.check_output(f"docker image inspect --format '{{{{.Id}}}}' {ENGINE['glm_ocr_image']}"))

    def play(self, playbook: str, *options: str, **variables: Any) -> tuple[int, str]:
        """Exit status and output of what an operator would type."""
        extra = json.dumps(variables)
        done = ansible_playbook(playbook, "-i", str(INVENTORY), "-l", NODE, *options, "-e", extra)
        return done.rc, done.output

    def validated(self, *options: str, **variables: Any) -> dict[str, Any]:
        """The merged report of a validation."""
        _, output = self.play("validate.yml", *options, **MEASURE | variables)
        if not (found := re.search(r"Report: +(\S+)/report\.html", output)):
            raise AssertionError("the validation left no report; its output stands above")
        return dict(json.loads((Path(found[1]) / "report.json").read_text()))

    def measure(self, fault: Fault) -> Measured:
        """Serve it, validate it, and tell what each column saw."""
        variables: dict[str, Any] = dict(fault.variables)
        flags: dict[str, Any] = dict(fault.flags)
        folder = WEIGHTS
        if fault.checkpoint:
            folder = self.damaged_checkpoint(fault)
            variables |= {"glm_ocr_weights_path": folder}
        if fault.edit:
            variables |= {"vllm_service_overlays": [self.damaged_engine(fault)]}
        if fault.middleware:
            overlay = {"source": str(HERE / f"{MIDDLEWARE}.py"), "target": f"{PACKAGES}/{MIDDLEWARE}.py"}
            variables |= {"vllm_service_overlays": [overlay | {"original_sha256": "0" * 64}]}
            flags |= {"middleware": f"{MIDDLEWARE}.{fault.middleware}"}
        if flags:
            variables |= {"vllm_service_extra_flags": extra_flags(**{k.replace("-", "_"): v for k, v in flags.items()})}
        _, output = self.play("deploy.yml", "--check", "--tags", "deploy", **variables)
        gate = findings(output)
        # A folder has one manifest, or none: the damaged one is given none.
        unverified = {"vllm_weights_manifest": ""} if fault.checkpoint else {}
        status, _ = self.play("tests/faults/serve.yml", **variables | unverified)
        if status:
            start = Outcome("ERROR", (("start", "the engine did not start"),))
            return Measured(fault.id, fault.what, fault.where, gate, {"report": start})
        if fault.stale_image:
            self.move_image_name()
        try:
            baseline = {"validation_report_baseline": str(BASELINE)} if BASELINE.exists() else {}
            columns = outcomes(self.validated(**baseline, glm_ocr_weights_path=folder))
        finally:
            if fault.stale_image:
                self.node.check_output(f"docker tag {self.image} {ENGINE['glm_ocr_image']}")
        if fault.checkpoint:
            again = self.validated("--tags", "served_accuracy", glm_ocr_weights_path=WEIGHTS)
            columns["trusted"] = outcome(again["stages"]["served_accuracy"])
        columns.setdefault("baseline", Outcome(NOT_RUN))
        return Measured(fault.id, fault.what, fault.where, gate, columns)

    def damaged_checkpoint(self, fault: Fault) -> str:
        """The folder on the node of a copy of the checkpoint with the damage done."""
        assert fault.checkpoint
        folder = self.scratch / fault.id
        shutil.copytree(NANO, folder)
        fault.checkpoint(folder)
        target = f"{DAMAGED}/{fault.id}"
        self.node.check_output(f"rm -rf {target} && mkdir -p {target}")
        keys = LAB_STATE / "ssh"
        options = [f"-oUserKnownHostsFile={keys / 'known_hosts'}", "-oIdentitiesOnly=yes", f"-i{keys / 'id_ed25519'}"]
        files = sorted(str(path) for path in folder.iterdir())
        host = f"root@{self.node.backend.hostname}:{target}/"
        subprocess.run(["scp", "-q", *options, *files, host], check=True)
        return target

    def damaged_engine(self, fault: Fault) -> dict[str, str]:
        """The overlay of a damaged file of the engine, made from the image's own."""
        assert fault.edit
        target = fault.edit.target
        command = f"docker run --rm --network=none --entrypoint=cat {self.image} {target}"
        original = self.node.run(command).stdout_bytes
        source = self.scratch / fault.id / Path(target).name
        source.parent.mkdir()
        source.write_text(fault.edit.of(original.decode()))
        return {"source": str(source), "target": target, "original_sha256": hashlib.sha256(original).hexdigest()}

    def move_image_name(self) -> None:
        """The image's name comes to mean another image, as a pull of a moved tag does; what runs is the old one."""
        recipe = f"printf 'FROM {self.image}\\nLABEL lab.moved=1\\n'"
        self.node.check_output(f"{recipe} | docker build --quiet --tag {ENGINE['glm_ocr_image']} -")

    def heal(self) -> None:
        """The inventory's deployment again; what the faults left on the node goes."""
        status, output = self.play("deploy.yml")
        assert status == 0, output
        self.node.check_output(f"rm -rf {DAMAGED} /usr/local/lib/glm-ocr/overlays")


def findings(output: str) -> tuple[str, ...]:
    """The identities of a deployment's findings, warnings marked, in their order."""
    found = re.findall(r"\[([A-Z]+_[A-Z_]+)\]( warning)?", output)
    return tuple(dict.fromkeys(name + warning for name, warning in found))


def as_json(measured: Measured) -> dict[str, Any]:
    """What ``Measured.from_json`` reads."""
    columns: Mapping[str, Outcome] = measured.columns
    return {
        "id": measured.id,
        "what": measured.what,
        "where": measured.where,
        "gate": list(measured.gate),
        "columns": {
            name: {"verdict": columns[name].verdict, "failed": [list(pair) for pair in columns[name].failed]}
            for name in STAGES
            if name in columns
        },
    }
