"""The injected faults: what each damages, and with which variables it is served and validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import damage_engine
import damage_files
import damage_weights
from damage_engine import Edit


@dataclass(frozen=True)
class Fault:
    """One fault: ``checkpoint`` damages a copy of the checkpoint, ``edit`` a file of the engine, ``middleware`` names a
    class of ``lab_faults``; ``flags`` are flags of `vllm serve`, ``variables`` the inventory's, in the deployment
    alone: the validation goes by the right ones."""

    id: str
    what: str
    checkpoint: Callable[[Path], None] | None = None
    edit: Edit | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    middleware: str = ""
    stale_image: bool = False

    @property
    def where(self) -> str:
        """What is wrong: ``checkpoint``, ``engine``, ``settings`` or ``image``."""
        if self.checkpoint:
            return "checkpoint"
        if self.edit or self.middleware:
            return "engine"
        return "image" if self.stale_image else "settings"


FAULTS = (
    Fault(
        "tensor-vision",
        "one damaged tensor in the vision tower: the merger's projection, its rows off by one",
        checkpoint=partial(damage_weights.rotate_rows, name="model.visual.merger.proj.weight"),
    ),
    Fault(
        "tensor-text",
        "one damaged tensor in the text layers: an MLP's down projection, its rows off by one",
        checkpoint=partial(damage_weights.rotate_rows, name="model.language_model.layers.1.mlp.down_proj.weight"),
    ),
    Fault(
        "tensor-lm-head",
        "one damaged tensor at the end: lm_head, its rows off by one",
        checkpoint=partial(damage_weights.rotate_rows, name="lm_head.weight"),
    ),
    Fault("rotary-style", "rotary embedding by halves instead of by pairs", edit=damage_engine.ROTARY_STYLE),
    Fault("chat-template", "chat template without the image token", checkpoint=damage_files.drop_image_token),
    Fault(
        "image-mean-std",
        "image mean and std of another model, 0.5 and 0.5",
        checkpoint=partial(damage_files.normalise_images, mean=[0.5] * 3, std=[0.5] * 3),
    ),
    Fault("patch-order", "patches under a visual token by columns, not by rows", edit=damage_engine.PATCH_ORDER),
    Fault(
        "vocabulary-pair",
        "two words of the vocabulary swapped: 0 and 8",
        checkpoint=partial(damage_files.swap_words, first="0", second="8"),
    ),
    Fault(
        "merger-width",
        "vision merger cut by the engine to the text layers' width, 256 instead of 384",
        checkpoint=partial(damage_weights.narrow_text_layers, width=256),
    ),
    Fault("fp8-weights", "weights of the linear layers rounded to fp8", checkpoint=damage_weights.round_to_fp8),
    Fault("max-model-len", "max-model-len too small: 256", variables={"glm_ocr_max_model_len": 256}),
    Fault(
        "truncated-replies",
        "replies cut off after 8 tokens",
        flags={"override-generation-config": {"max_new_tokens": 8}},
    ),
    Fault(
        "repetition",
        "a server that repeats itself: repetition_penalty 0.2",
        flags={"override-generation-config": {"repetition_penalty": 0.2}},
    ),
    Fault("failing-requests", "5 % of the requests fail with 500", middleware="EveryTwentiethFails"),
    Fault("doubled-latency", "every step of the engine takes twice its time", edit=damage_engine.TWICE_AS_SLOW),
    Fault("served-name", "wrong served name", variables={"glm_ocr_served_model_name": "glm-ocr-2"}),
    Fault("stale-image", "the image's name has moved on, the old image still runs", stale_image=True),
)
