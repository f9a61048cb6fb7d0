"""tensor_metrics.py: the formulas on sums made by hand; what reads tensors is tested in tests/engine."""

from __future__ import annotations

import math

import pytest

from tensor_metrics import ErrorSums, Position, coarse_kl, ratio, summary


def sums() -> ErrorSums:
    """Reference (3, 4) and measured (3, 3): one error of 1."""
    return ErrorSums(
        count=2,
        abs_error=1.0,
        squared_error=1.0,
        relative_error_sum=0.25,
        squared_reference=25.0,
        squared_measured=18.0,
        product=21.0,
        max_abs=1.0,
        min_row_cosine=0.98,
    )


def test_metrics_of_one_error() -> None:
    assert sums().metrics() == {
        "values": 2,
        "non_finite": 0,
        "max_abs_error": 1.0,
        "mean_abs_error": 0.5,
        "rmse": pytest.approx(math.sqrt(0.5)),
        "relative_error": 0.125,
        "relative_l2": pytest.approx(0.2),
        "cosine_similarity": pytest.approx(21 / math.sqrt(25 * 18)),
        "min_row_cosine": 0.98,
    }


@pytest.mark.parametrize("broken", [{"non_finite": 1}, {"count": 0}, {"squared_error": math.nan}])
def test_metrics_of_nothing_are_unmeasured(broken: dict[str, float]) -> None:
    errors = sums()
    vars(errors).update(broken)
    metrics = errors.metrics()
    assert {metrics[name] for name in metrics if name not in ("values", "non_finite")} == {None}


def test_coarse_kl_of_two_outcomes() -> None:
    p, q = {1: math.log(0.75)}, {1: math.log(0.5)}
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # the rest is the second outcome
    assert coarse_kl(p, q) == pytest.approx(expected)
    assert coarse_kl(p, p) == 0


def test_coarse_kl_is_below_the_full_one_and_uses_shared_ids_only() -> None:
    p = {1: math.log(0.5), 2: math.log(0.3), 3: math.log(0.2)}
    q = {1: math.log(0.4), 2: math.log(0.2), 3: math.log(0.4)}
    full = sum(math.exp(p[token]) * (p[token] - q[token]) for token in p)
    assert coarse_kl(p, q) == pytest.approx(full)
    assert 0 < coarse_kl(p, {1: q[1]}) < full
    assert coarse_kl({9: 0.0}, {8: 0.0}) == 0  # nothing shared: one outcome on both sides


def test_coarse_kl_survives_rounding_of_the_interface() -> None:
    sure = {1: 0.0}  # the API rounds ln 0.9999999 to 0
    assert coarse_kl(sure, {1: -1e-7}) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(coarse_kl(sure, {1: -9999.0}))  # vLLM's stand-in for minus infinity


def test_summary_counts_decided_positions_apart() -> None:
    positions = [Position(0.0, True, 5.0), Position(0.02, False, 0.1), Position(0.08, False, 3.0)]
    found = summary(positions, 1.0)
    assert found["positions"] == 3
    assert found["top1_agreement"] == pytest.approx(1 / 3)
    assert (found["decided_positions"], found["decided_top1_agreement"]) == (2, 0.5)
    assert found["kl_mean"] == pytest.approx(0.1 / 3)
    assert found["kl_noise"] == pytest.approx((0 + 0.2 + 0.4) / 3)
    assert found["kl_max"] == 0.08
    assert found["kl_p99"] is None  # of three it would be the maximum


def test_p99_needs_a_hundred_positions() -> None:
    positions = [Position(float(kl), True, 1.0) for kl in range(200)]
    assert summary(positions, 1.0)["kl_p99"] == 197  # the 198th of 200
    assert summary(positions[:99], 1.0)["kl_p99"] is None


def test_summary_of_nothing_is_unmeasured() -> None:
    assert set(summary([], 1.0).values()) == {0, None}
    assert summary([Position(math.nan, True, 2.0)], 1.0)["kl_mean"] is None
    assert summary([Position(0.1, True, 0.5)], 1.0)["decided_top1_agreement"] is None


def test_ratio() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(0.0, 0.0) == 1.0
    assert ratio(1.0, 0.0) is None  # an error where there is no noise
    assert ratio(None, 1.0) is None
    assert ratio(1.0, None) is None
