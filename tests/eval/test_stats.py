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


def test_distance_to_known_shares():
    equal, unequal = np.full(3, 1 / 3), np.array([0.5, 0.3, 0.2])
    assert stats.distance_to_shares(np.array([10, 10, 10]), equal).value == pytest.approx(0)
    assert stats.distance_to_shares(np.array([30, 0, 0]), equal).value == pytest.approx(2 / 3)
    assert stats.distance_to_shares(np.array([10, 10, 10]), unequal).value == pytest.approx(1 / 6)
    collapsed = stats.distance_to_shares(np.array([0, 1, 31]), equal)  # the prototype's collapsed student
    even = stats.distance_to_shares(np.array([66, 67, 67]), equal)
    assert collapsed.low > 0.55 > 0.12 > even.high
    assert stats.fit_of_shares(np.array([0, 1, 31]), equal) < 1e-10
    assert stats.fit_of_shares(np.array([11, 11, 10]), equal) > 0.9
    assert stats.fit_of_shares(np.array([50, 30, 20]), unequal) == pytest.approx(1)
    assert stats.fit_of_shares(np.array([50, 30, 20]), equal) < 0.01


def test_nothing_is_unavailable_with_a_reason_never_zero():
    for measure in (
        stats.mean(np.array([])),
        stats.proportion(0, 0),
        stats.distance_to_shares(np.zeros(3, int), np.full(3, 1 / 3)),
    ):
        assert measure.value is None
        assert measure.status == "unavailable"
        assert measure.reason


def test_interval_of_a_share_is_wilsons():
    from scipy.stats import binomtest

    for n in (1, 3, 50, 1000):
        for hits in range(0, n + 1, max(1, n // 7)):
            ends, found = binomtest(hits, n).proportion_ci(0.95, "wilson"), stats.proportion(hits, n)
            assert (found.value, found.low, found.high) == pytest.approx((hits / n, ends.low, ends.high), abs=1e-12)


def test_an_estimate_is_students_t():
    """Against scipy's one-sample t-test and its interval."""
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(6).normal(0.4, 1.0, 15)
    own = stats.Estimate(values.mean(), ((values.var(ddof=1) / 15, 14.0),))
    assert own.above(0) == pytest.approx(ttest_1samp(values, 0, alternative="greater").pvalue, rel=1e-6)
    assert own.below(1) == pytest.approx(ttest_1samp(values, 1, alternative="less").pvalue, rel=1e-6)
    ends = ttest_1samp(values, 0).confidence_interval(0.9)
    assert own.interval(0.9) == pytest.approx((ends.low, ends.high))
    assert own.above(own.value + 1) == own.below(own.value - 1) == 1
    sure = stats.Estimate(0.1, ((0.0, 14.0),))
    assert (sure.interval(0.9), sure.above(0), sure.below(0)) == ((0.1, 0.1), 0, 1)


def test_two_one_sided_tests_agree_with_the_interval():
    """Equal at 5 % exactly where the 90 % interval lies within the margin, with one component of variance or two."""
    rng = np.random.default_rng(7)
    seen = set()
    for parts in (((0.0009, 39.0),), ((0.0004, 39.0), (0.0001, 2.0))):
        for value in rng.uniform(-0.12, 0.12, 60):
            own = stats.Estimate(value, parts)
            low, high = own.interval(0.9)
            inside = low > -0.1 and high < 0.1
            assert (own.outside(0.1) < 0.05) == inside
            seen.add(inside)
    assert seen == {True, False}


def test_the_interval_of_a_ratio_holds_what_its_tests_do_not_reject():
    """Fieller's: own - ratio x other at the ends of the 90 % interval has p-values of 5 %; without noise below it is plain."""
    for parts in (((0.01, 0.004, 0.02, 39.0),), ((0.01, 0.004, 0.02, 39.0), (0.002, 0.0, 0.0, 2.0))):
        found = stats.RatioEstimate(0.8, 1.1, parts)
        low, high = found.interval(0.9)
        assert low < 0.8 / 1.1 < high
        assert found.minus(low).above(0) == pytest.approx(0.05)
        assert found.minus(high).below(0) == pytest.approx(0.05)
    plain = stats.RatioEstimate(0.8, 1.0, ((0.01, 0.0, 0.0, 1e7),))
    assert plain.interval(0.9) == pytest.approx((0.8 - 0.16449, 0.8 + 0.16449), rel=1e-4)
    assert stats.RatioEstimate(0.8, 0.1, ((0.0, 0.0, 0.1, 39.0),)).interval(0.9) == (-np.inf, np.inf)


def test_a_component_of_few_degrees_of_freedom_counts_with_its_own_quantile():
    own = stats.Estimate(0.0, ((0.01, 2.0), (0.04, 1e6)))
    assert own.half(0.025) == pytest.approx(np.sqrt(0.01 * 4.3027**2 + 0.04 * 1.96**2), rel=1e-4)


def test_few_training_seeds_do_not_make_false_differences():
    """Recipes of equal mean, three seeds, 40 prompts: at .05 and at Holm's .05/14, whether or not seeds differ.

    Satterthwaite's degrees of freedom in place of the components' own would reject 4.7 times too often in the last case.
    """
    from scipy.special import stdtrit

    rng = np.random.default_rng(8)
    for between in (0.0, 0.16, 0.5):  # against 1 / sqrt(40) between prompts
        clips = rng.normal(size=(8000, 3, 40)) + between * rng.normal(size=(8000, 3, 1))
        seeds, prompts = clips.mean(2).var(1, ddof=1) / 3, clips.mean(1).var(1, ddof=1) / 40
        for tail, most in ((0.025, 0.055), (0.025 / 14, 0.0055)):
            half = np.sqrt(seeds * stdtrit(2, 1 - tail) ** 2 + prompts * stdtrit(39, 1 - tail) ** 2)
            assert (np.abs(clips.mean((1, 2))) > half).mean() < most


def test_holm_in_closed_form():
    """The example of Holm's procedure: 4, 3, 2, 1 times the sorted p-values, never falling."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_share_distance_is_the_chi_square_of_clustered_clips():
    """Like chi-square with independent clips; false positives stay at 5 % with clustered ones, too.

    Clustered: two of three prompts have one category in all of their four clips. Chi-square of the clips would then reject in
    every third case.
    """
    from scipy.stats import chisquare

    rng = np.random.default_rng(9)
    shares = np.array([0.6, 0.3, 0.1])
    for clustered in (0.0, 0.67):
        found, plain = [], []
        for _ in range(600):
            numbers = rng.choice(3, (60, 4), p=shares)
            same = rng.random(60) < clustered
            numbers[same] = numbers[same][:, :1]
            counts = np.stack([(numbers == k).sum(1) for k in range(3)], 1)
            off = counts / 4 - shares
            found.append(stats.share_distance(off[None], shares).p)
            plain.append(chisquare(counts.sum(0), 240 * shares).pvalue)
        assert 0.025 <= np.mean(np.array(found) < 0.05) <= 0.08
        if clustered:
            assert np.mean(np.array(plain) < 0.05) > 0.2
        else:
            assert np.corrcoef(found, plain)[0, 1] > 0.95


def test_prompts_of_equal_shares_do_not_show_that_there_is_no_variance():
    """With no measured variance, that of one more prompt from the expected shares: 1 / (P + 1)^2 per free share."""
    expected = np.array([0.5, 0.3, 0.2])
    found = stats.share_distance(np.tile(np.array([1.0, 0, 0]) - expected, (1, 9, 1)), expected)
    assert found.parts == ((pytest.approx(0.01), 8.0),)
    assert found.value == pytest.approx(1.0)  # sqrt(.25 / .5 + .09 / .3 + .04 / .2)
    one_category = stats.share_distance(np.zeros((1, 9, 1)), np.ones(1))
    assert (one_category.value, one_category.p, one_category.parts[0][0]) == (0, 1, pytest.approx(0.01))
    with pytest.raises(ValueError, match="needs two of them, not 1"):
        stats.share_distance(np.zeros((1, 1, 3)), expected)
