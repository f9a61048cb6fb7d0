"""Formulas of the accuracy stages, on tensors and on token distributions.

``r`` is the reference (fp32 on the CPU), ``m`` what is measured, over the n values of all prompts together:

====================  =====================================================================================
max_abs_error         max |m - r|
mean_abs_error        sum |m - r| / n
rmse                  sqrt(sum (m - r)^2 / n)
relative_error        mean of |m - r| / max(|r|, 2^-10); 2^-10 is bf16's small value in Ascend's msprobe.
                      Values near zero dominate it, hence reported and never judged
relative_l2           sqrt(sum (m - r)^2 / sum r^2), free of scale
cosine_similarity     sum r m / sqrt(sum r^2 * sum m^2), over all values as one vector
min_row_cosine        the lowest cosine of one token's vector
noise_ratio           rmse of the device / rmse of bf16 on the CPU, both against r.  1 is a healthy bf16
                      implementation (0.99 to 1.02 on other bf16 kernels), above 2 something else is wrong
kl                    KL(r || m) = sum_i p_i (ln p_i - ln q_i) of the softmax of the logits, in nats (Kullback
                      and Leibler 1951), a value per position
coarse_kl             the same over the ids both sides name, with all others as one outcome: a lower bound of kl
                      (data processing inequality)
kl_noise              mean of sqrt(2 kl) over the positions.  For small errors of the logits kl is half the variance
                      of the error under p (its second-order term), so sqrt(2 kl) is the error's standard deviation in
                      nats.  The mean of kl itself hangs on its one or two largest values
margin                ln p of the reference's first token minus that of its second, in nats
====================  =====================================================================================

Tensors are used through their methods only: nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SMALL_VALUE = 2.0**-10
CHUNK_VALUES = 2**21  # compared at a time: 16 MiB in float64
P99_POSITIONS = 100  # a p99 of fewer is their maximum
REST_PROBABILITY = 1e-9  # what the named ids leave over is at least this; the API's rounding can exceed 1


@dataclass
class ErrorSums:
    """Sums over pairs of tensors, of which only these numbers are kept."""

    count: int = 0
    non_finite: int = 0
    abs_error: float = 0.0
    squared_error: float = 0.0
    relative_error_sum: float = 0.0
    squared_reference: float = 0.0
    squared_measured: float = 0.0
    product: float = 0.0
    max_abs: float = 0.0
    min_row_cosine: float = 1.0

    def add(self, reference: Any, measured: Any) -> None:
        """Take in two tensors of one shape [..., features].  Raises ``ValueError`` when the shapes differ."""
        for r, m in chunks(reference, measured):
            finite = m.isfinite()
            self.non_finite += int((~finite).sum())
            error = (m - r).abs()
            self.count += m.numel()
            self.abs_error += float(error.sum())
            self.squared_error += float(error.square().sum())
            self.relative_error_sum += float((error / r.abs().clamp(min=SMALL_VALUE)).sum())
            self.max_abs = max(self.max_abs, float(error.max()))
            rr, mm, rm = r.square().sum(-1), m.square().sum(-1), (r * m).sum(-1)
            self.squared_reference += float(rr.sum())
            self.squared_measured += float(mm.sum())
            self.product += float(rm.sum())
            norms = (rr * mm).sqrt()
            rows = norms > 0
            if bool(rows.any()):
                self.min_row_cosine = min(self.min_row_cosine, float((rm[rows] / norms[rows]).min()))

    @property
    def rmse(self) -> float:
        return math.sqrt(self.squared_error / self.count)

    def metrics(self) -> dict[str, float | int | None]:
        """Every formula by its name; null when nothing was measured or a value is not finite."""
        names = (
            "max_abs_error",
            "mean_abs_error",
            "rmse",
            "relative_error",
            "relative_l2",
            "cosine_similarity",
            "min_row_cosine",
        )
        values: dict[str, float | None] = dict.fromkeys(names)
        if self.count and not self.non_finite and math.isfinite(self.squared_error):
            values = dict(
                zip(
                    names,
                    (
                        self.max_abs,
                        self.abs_error / self.count,
                        self.rmse,
                        self.relative_error_sum / self.count,
                        ratio(math.sqrt(self.squared_error), math.sqrt(self.squared_reference)),
                        ratio(self.product, math.sqrt(self.squared_reference * self.squared_measured)),
                        self.min_row_cosine,
                    ),
                    strict=True,
                )
            )
        return {"values": self.count, "non_finite": self.non_finite, **values}


@dataclass(frozen=True)
class Position:
    """One position of a sequence: KL in nats, whether both sides rank the same token first, the reference's margin."""

    kl: float
    agrees: bool
    margin: float


def chunks(reference: Any, measured: Any) -> Any:
    """Pairs of float64 tensors [rows, features], few rows at a time, both on the CPU."""
    if reference.shape != measured.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(measured.shape)}")
    features = reference.shape[-1]
    rows = max(1, CHUNK_VALUES // features)
    pairs = zip(reference.reshape(-1, features).split(rows), measured.reshape(-1, features).split(rows), strict=True)
    return ((r.double(), m.double()) for r, m in pairs)


def logit_positions(reference: Any, measured: Any) -> list[Position]:
    """Compare logits [..., vocabulary] position by position.  Raises ``ValueError`` when the shapes differ."""
    positions = []
    for r, m in chunks(reference, measured):
        log_p, log_q = r.log_softmax(-1), m.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        first = log_p.topk(2, dim=-1)
        agrees = first.indices[:, 0] == log_q.argmax(-1)
        margin = first.values[:, 0] - first.values[:, 1]
        # Rounding can bring an exact 0 to -1e-17.
        rows = zip(kl.clamp(min=0).tolist(), agrees.tolist(), margin.tolist(), strict=True)
        positions += [Position(*row) for row in rows]
    return positions


def coarse_kl(reference: Mapping[int, float], measured: Mapping[int, float]) -> float:
    """KL in nats between two maps of token id to ln p, each a part of its distribution."""
    shared = reference.keys() & measured.keys()
    p, q = ({token: math.exp(side[token]) for token in shared} for side in (reference, measured))
    rest_p, rest_q = (max(1 - sum(side.values()), REST_PROBABILITY) for side in (p, q))
    divergence = sum(p[token] * (reference[token] - measured[token]) for token in shared)
    return max(0.0, divergence + rest_p * math.log(rest_p / rest_q))


def summary(positions: Sequence[Position], decided_margin: float) -> dict[str, Any]:
    """Agreement and KL over positions; ``decided`` are those whose margin is at least ``decided_margin`` nats.

    Null is what was not measured: without positions, or with a KL that is not finite.
    """
    decided = [position for position in positions if position.margin >= decided_margin]
    kls = sorted(position.kl for position in positions)
    if not all(map(math.isfinite, kls)):
        kls = []  # NaN in the logits: nothing was measured
    return {
        "positions": len(positions),
        "top1_agreement": _share(positions),
        "decided_positions": len(decided),
        "decided_top1_agreement": _share(decided),
        "kl_noise": math.fsum(math.sqrt(2 * kl) for kl in kls) / len(kls) if kls else None,
        "kl_mean": math.fsum(kls) / len(kls) if kls else None,
        "kl_p99": kls[math.ceil(0.99 * len(kls)) - 1] if len(kls) >= P99_POSITIONS else None,
        "kl_max": kls[-1] if kls else None,
    }


def _share(positions: Sequence[Position]) -> float | None:
    return sum(position.agrees for position in positions) / len(positions) if positions else None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None unless both were measured and the quotient exists; 0 / 0, no error beside no noise, is 1."""
    if numerator is None or denominator is None:
        return None
    if denominator == 0:
        return 1.0 if numerator == 0 else None
    return numerator / denominator
