"""What a check found: what was expected, what is there, what mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Sequence

ERROR = "error"
WARNING = "warning"

#: Every id a finding may have, and what it is about.  A finding with another id cannot be made.
CATALOGUE: Dict[str, str] = {
    "HOST_UNREACHABLE": "the host did not answer, or could not be checked to the end",
    "HOST_PYTHON": "Python that Ansible's modules need",
    "HOST_SYSTEMD": "the init system and its version",
    "HOST_ENGINE": "the container engine and its version",
    "HOST_CONTAINER": "a container of someone else with our name",
    "HOST_PORT": "the port of the service",
    "HOST_DISK": "space for the image, and for releases, caches and builds",
    "HOST_MEMORY": "memory for the engine",
    "HOST_SHM": "the size of /dev/shm in the container",
    "HOST_CLOCK": "the clock, against the controller's",
    "HOST_WEIGHTS": "the model's folder and the file system it is on",
    "HOST_DEVICES": "the device nodes",
    "HOST_DRIVER": "the driver's files",
    "HOST_DRIVER_VERSION": "the driver's version, against what CANN in the image supports",
    "HOST_PCI": "the NPUs on the PCI bus, against those of npu-smi",
    "IMAGE_VARIANT": "the variant of the image, against the chip",
    "IMAGE_ARCHITECTURE": "the CPU architecture of the image, against the host's",
    "IMAGE_SIGNATURE": "the image's signature, where a key is given",
    "NPU_SMI": "npu-smi and what it prints",
    "NPU_ABSENT": "a mapped device that npu-smi does not show",
    "NPU_UNSUPPORTED": "a chip vLLM-Ascend does not run on",
    "NPU_HEALTH": "the health of the NPUs",
    "NPU_OCCUPIED": "processes of others on the NPUs",
    "NPU_MEMORY": "free device memory, against what the engine reserves",
    "NPU_VISIBLE": "ASCEND_RT_VISIBLE_DEVICES, against the mapped devices",
    "NPU_IDLE": "a mapped NPU the engine does not use",
    "WEIGHTS_DISK": "space for weights that are not there yet",
    "WEIGHTS_CONFIG": "the model's config.json",
    "WEIGHTS_FORMAT": "the format of the weights",
    "WEIGHTS_DAMAGED": "damaged or truncated weights",
    "WEIGHTS_PICKLE": "weights in a format that runs code when it is loaded",
    "WEIGHTS_CODE": "Python files beside the weights",
    "WEIGHTS_MANIFEST": "the manifest itself",
    "WEIGHTS_MISSING": "a file that the manifest lists and the folder lacks",
    "WEIGHTS_EXTRA": "a file that the engine could load and the manifest does not list",
    "WEIGHTS_ALTERED": "a file that is not the one the manifest lists",
    "WEIGHTS_UNVERIFIED": "weights without a manifest",
    "PROBE_MODEL_TYPE": "the checkpoint's model type, against the image's transformers",
    "PROBE_ARCHITECTURE": "the checkpoint's architecture, against the image's vLLM",
    "PROBE_FLAGS": "the serve flags, against the image's own parser",
    "PROBE_MAX_MODEL_LEN": "the context length, against the model's",
    "PROBE_CLIENT_MAX_TOKENS": "the context length, against what clients ask for",
    "PROBE_TENSORS": "names and shapes of the tensors, against config.json",
    "PROBE_INDEX": "the index of the tensors, against the files",
    "PROBE_MLX": "a checkpoint that was converted for MLX",
    "PROBE_DTYPE": "the tensors' type",
    "PROBE_MERGER": "the width of the vision merger",
    "PROBE_ACCESS": "weights and devices, against who the engine is in its sandbox",
    "PROBE_DRIVER": "the driver's libraries inside the container",
    "PROBE_NPU_SMI": "npu-smi inside the container",
    "PROBE_OVERLAY": "the file below an overlay",
    "PROBE_CHECKPOINT": "the checkpoint's files, as the container sees them",
    "PROBE_IMPORT": "the image's Python packages",
    "PROBE_ERROR": "the probe itself",
    "PROBE_RUN": "whether the image answers the probe at all",
    "WATCHDOG_GAVE_UP": "a service that hangs however often it is restarted",
    "WATCHDOG_BLIND": "a service that the watchdog cannot tell busy from hung",
    "WATCHDOG_SILENT": "the watchdog itself",
}


@dataclass(frozen=True)
class Finding:
    """``fix`` and ``fix_zh`` say the same, with the command to type.  Errors stop a deployment, warnings do not."""

    id: str
    expected: str
    found: str
    fix: str
    fix_zh: str
    severity: str = ERROR

    def __post_init__(self) -> None:
        if self.id not in CATALOGUE or self.severity not in (ERROR, WARNING):
            raise ValueError(f"not a finding: {self.id} ({self.severity})")


def as_data(findings: Sequence[Finding]) -> List[Dict[str, Any]]:
    """The findings as a module returns them; the filter finding_text makes them text."""
    return [asdict(finding) for finding in findings]
