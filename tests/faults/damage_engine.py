"""Damage to the engine's own code: one passage of one file of the image, mounted over the original."""

from __future__ import annotations

from dataclasses import dataclass

PACKAGES = "/usr/local/lib/python3.11/dist-packages"


@dataclass(frozen=True)
class Edit:
    """``old`` becomes ``new`` in the file ``target`` of the engine's image."""

    target: str
    old: str
    new: str

    def of(self, text: str) -> str:
        """The damaged file.  Raises ``ValueError`` unless ``old`` is there exactly once: not another engine."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.target}: expected {self.old!r} once, found {count} times; make the edit anew")
        return text.replace(self.old, self.new)


#: Halves instead of pairs, as vllm-ascend 0.18.0rc1 has it on A2 and A3.
ROTARY_STYLE = Edit(f"{PACKAGES}/vllm/model_executor/models/glm4.py", "is_neox_style=False,", "is_neox_style=True,")
#: The four patches under a visual token are laid out by columns instead of by rows.
PATCH_ORDER = Edit(
    f"{PACKAGES}/vllm/model_executor/models/glm_ocr.py", "x = x.permute(0, 3, 1, 2)", "x = x.permute(0, 3, 2, 1)"
)
#: Every step of the engine takes twice its time.
TWICE_AS_SLOW = Edit(
    f"{PACKAGES}/vllm/v1/engine/core.py",
    "        # Step the engine core.\n        outputs, model_executed = self.step_fn()\n",
    "        # Step the engine core.\n        began = time.monotonic()\n"
    "        outputs, model_executed = self.step_fn()\n        time.sleep(time.monotonic() - began)\n",
)
