"""Writes down what failed last in a play, for the comparison that runs it as one of many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: ocr_compare
type: notification
short_description: The last failure of a play, in the file that OCR_COMPARE_FAILURE names
description: Without that variable it does nothing.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]  # ansible ships no types
    """The last one tells most: a rescue that failed says what it came from."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "ocr_compare"
    CALLBACK_NEEDS_ENABLED = False

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self.keep(f"{result.task_name}: {result.result.get('msg', '')}")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self.keep(f"unreachable: {result.result.get('msg', '')}")

    def keep(self, text: str) -> None:
        if path := os.environ.get("OCR_COMPARE_FAILURE"):
            Path(path).write_text(text, encoding="utf-8")
