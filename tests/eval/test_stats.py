"""Intervals: equal to published values where there are any, and covering what they promise."""

import numpy as np
import pytest

from eval import stats


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (score without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_intervals(hits, n, low, high):
    measure = stats.proportion(hits, n)
    assert measure.value == pytest.approx(hits / n)
    assert measure.low == pytest.approx(low, abs=1e-4)
    assert measure.high == pytest.approx(high, abs=1e-4)


def test_wilson_at_one_keeps_its_doubt():
    measure = stats.proportion(200, 200)
    assert measure.high == 1
    assert measure.low == pytest.approx(0.9812, abs=1e-4)


def test_the_mean_interval_covers_as_promised():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        measure = stats.mean(rng.gamma(2.0, 1.0, 60))
        covered += measure.low <= 2.0 <= measure.high
    assert 0.90 <= covered / 300 <= 0.98


def test_clips_are_the_unit_not_their_syllables():
    """Three syllables of a clip are right or wrong together; counting them as 180 would be too sure."""
    rng = np.random.default_rng(1)
    per_clip = (rng.random(60) < 0.7).astype(float)
    clustered = stats.share(per_clip)
    naive = stats.proportion(int(3 * per_clip.sum()), 180)
    assert clustered.high - clustered.low > 1.5 * (naive.high - naive.low)


def test_share_falls_back_to_wilson_only_where_every_clip_is_all_right_or_all_wrong():
    assert stats.share(np.ones(50)) == stats.proportion(50, 50)
    mixed = stats.share(np.array([1.0] * 49 + [2 / 3]))
    assert mixed.low < mixed.value < mixed.high == 1.0


def test_pairing_makes_a_difference_visible():
    rng = np.random.default_rng(2)
    prompt = rng.normal(0, 1, 100)
    a, b = prompt + 0.1 + rng.normal(0, 0.1, 100), prompt + rng.normal(0, 0.1, 100)
    paired = stats.mean(a - b)
    assert paired.low > 0
    assert paired.value == pytest.approx((a - b).mean())
    apart = [stats.mean(values) for values in (a, b)]
    assert apart[0].low < apart[1].high  # the two intervals alone overlap


def test_ratio_of_sums():
    measure = stats.ratio(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert (measure.value, measure.low, measure.high) == (0.5, 0.5, 0.5)
    nothing = stats.ratio(np.ones(3), np.zeros(3))
    assert nothing.value is None
    assert nothing.status == "unavailable"


def test_the_same_call_gives_the_same_interval():
    values = np.random.default_rng(4).random(40)
    assert stats.mean(values) == stats.mean(values)


def test_distance_to_uniform():
    assert stats.distance_to_uniform(np.array([10, 10, 10])).value == 0
    assert stats.distance_to_uniform(np.array([30, 0, 0])).value == pytest.approx(2 / 3)
    collapsed = stats.distance_to_uniform(np.array([0, 1, 31]))  # the prototype's collapsed student
    even = stats.distance_to_uniform(np.array([66, 67, 67]))
    assert collapsed.low > 0.55 > 0.12 > even.high
    assert stats.uniformity(np.array([0, 1, 31])) < 1e-10
    assert stats.uniformity(np.array([11, 11, 10])) > 0.9


def test_nothing_is_unavailable_with_a_reason_never_zero():
    for measure in (stats.mean(np.array([])), stats.proportion(0, 0), stats.distance_to_uniform(np.zeros(3, int))):
        assert measure.value is None
        assert measure.status == "unavailable"
        assert measure.reason


def test_interval_of_a_share_is_wilsons():
    from scipy.stats import binomtest

    for n in (1, 3, 50, 1000):
        for hits in range(0, n + 1, max(1, n // 7)):
            ends, found = binomtest(hits, n).proportion_ci(0.95, "wilson"), stats.proportion(hits, n)
            assert (found.value, found.low, found.high) == pytest.approx((hits / n, ends.low, ends.high), abs=1e-12)
