#!/usr/bin/python
"""Wait a while for a job that fills a folder, and say how far it is."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.weights_manifest import bytes_on_disk

DOCUMENTATION = r"""
module: vllm_weights_progress
short_description: Wait for an asynchronous job to end, at most so long, and measure the folder it fills
options:
  results_file: {type: path, required: true, description: The job's C(results_file).}
  partial: {type: path, required: true, description: Folder that it fills.}
  seconds: {type: int, required: true, description: How long to wait at most.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
ended: {type: bool, returned: always, description: Whether the job has ended.}
bytes: {type: int, returned: always, description: Bytes on disk in the folder.}
"""

EXAMPLES = r"""
- vllm_weights_progress:
    results_file: "{{ job.results_file }}"
    partial: /opt/atomgit/weights/GLM-OCR-bf16.partial
    seconds: 10
"""

LOOK_EVERY_SECONDS = 0.2


def has_ended(results_file: Path) -> bool:
    """As ansible.builtin.async_status judges: until it has ended, a job's result says that it has started."""
    try:
        return "started" not in json.loads(results_file.read_text(encoding="utf-8"))
    except ValueError:  # half-written
        return False
    except OSError:  # gone: async_status will say so
        return True


def wait(results_file: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not has_ended(results_file):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_EVERY_SECONDS)
    return True


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "results_file": {"type": "path", "required": True},
            "partial": {"type": "path", "required": True},
            "seconds": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    ended = wait(Path(module.params["results_file"]), module.params["seconds"])
    module.exit_json(changed=False, ended=ended, bytes=bytes_on_disk(Path(module.params["partial"])))


if __name__ == "__main__":
    main()
