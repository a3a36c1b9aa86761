"""Averages of scored clips with intervals over prompts, and paired differences."""

import numpy as np
import pytest
from toy_metrics import metric_file, row

from eval.score_rows import ClipRow, Value
from eval.score_summary import by_part, compare, summarise

# ---- Averages ----


def test_pooled_average_weighs_clips_by_their_words(toy):
    """A reference of one word with five insertions, and a perfect one of 20 words: 5/21 pooled."""
    rows = [row("a", toy_words=5.0, toy_units=1.0), row("b", toy_words=0.0, toy_units=20.0)]
    assert summarise(rows)["toy_words"]["value"] == pytest.approx(5 / 21)
    assert summarise(rows)["toy_units"]["value"] == pytest.approx(10.5)


def test_clips_of_one_prompt_are_one_observation(toy):
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    single = [row(str(n), toy_loud=v) for n, v in enumerate(values)]
    double = [row(f"{n}-{k}", str(n), toy_loud=v) for n, v in enumerate(values) for k in range(4)]
    one, four = summarise(single)["toy_loud"], summarise(double)["toy_loud"]
    assert four["value"] == pytest.approx(one["value"])
    assert (four["low"], four["high"]) == pytest.approx((one["low"], one["high"]))
    half = (one["high"] - one["low"]) / 2
    assert half == pytest.approx(1.96 * values.std() / np.sqrt(40), rel=0.1)


def test_intervals_cover_the_truth_with_clips_that_are_alike_within_prompts(toy):
    """30 prompts of 4 clips, half of the variance between prompts: intervals over prompts cover, over clips do not."""
    rng = np.random.default_rng(1)
    hits, naive, runs = 0, 0, 150
    for _ in range(runs):
        values = rng.normal(size=(30, 1)) + rng.normal(size=(30, 4))
        found = summarise([row(f"{p}-{c}", str(p), toy_loud=values[p, c]) for p in range(30) for c in range(4)])[
            "toy_loud"
        ]
        hits += found["low"] <= 0 <= found["high"]
        naive += abs(values.mean()) < 1.96 * values.std() / np.sqrt(120)
    assert hits / runs > 0.89
    assert naive / runs < 0.85


def test_shares_of_only_zeros_get_wilsons_interval(tmp_path):
    text = "MEASUREMENTS = (Measurement('t', (Metric('toy_share', 's', share=True),), None),)"
    with metric_file(tmp_path / "m", text, "toy_share"):
        rows = [row(str(n), toy_share=0.0) for n in range(20)]
        found = summarise([*rows, row("broken", toy_share=None)])["toy_share"]
    assert (found["value"], found["low"]) == (0.0, 0.0)
    assert found["high"] == pytest.approx(3.84146 / (20 + 3.84146), rel=1e-3)


def test_wilsons_interval_counts_only_prompts_with_a_value(tmp_path):
    """Of 100 clips 2 have a share: the interval is as wide as of two."""
    text = "MEASUREMENTS = (Measurement('t', (Metric('toy_share', 's', share=True),), None),)"
    rows = [row(str(n), toy_share=0.0 if n < 2 else None) for n in range(100)]
    with metric_file(tmp_path / "m", text, "toy_share"):
        found = summarise(rows)["toy_share"]
    assert found["high"] == pytest.approx(3.84146 / (2 + 3.84146), rel=1e-3)


def test_an_error_rate_without_any_error_is_not_certain(toy):
    found = summarise([row(str(n), toy_words=0.0, toy_units=9.0) for n in range(20)])["toy_words"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.0, 0.0, 0.16113), abs=1e-4)


def test_one_prompt_has_no_interval(toy):
    found = summarise([row("a", "p", toy_loud=1.0), row("b", "p", toy_loud=3.0)])["toy_loud"]
    assert (found["value"], found["low"], found["high"], found["n"]) == (2.0, None, None, 2)


def test_parts_have_averages_of_their_own_and_of_the_part_above(toy):
    rows = [row(str(n), toy_loud=float(n)) for n in range(4)]
    for one, part in zip(rows, ("age/0-19", "age/0-19", "age/60+", "gender"), strict=True):
        one.part = part
    found = by_part([*rows, row("alone", toy_loud=9.0)])
    values = {part: (summary["toy_loud"]["value"], summary["toy_loud"]["n"]) for part, summary in found.items()}
    assert values == {"age": (1.0, 3), "age/0-19": (0.5, 2), "age/60+": (2.0, 1), "gender": (3.0, 1)}
    assert by_part([row("alone", toy_loud=9.0)]) == {}


# ---- Paired differences ----


def test_a_constant_difference_is_certain(toy):
    rng = np.random.default_rng(0)
    base = rng.normal(size=20)
    found = compare(
        [row(str(n), toy_loud=v + 0.1) for n, v in enumerate(base)],
        [row(str(n), toy_loud=v) for n, v in enumerate(base)],
    )["toy_loud"]
    assert (found["change"], found["low"], found["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert found["verdict"] == "better"
    assert found["needed"] in (None, 5)  # no fewer than a verdict needs


def test_few_prompts_do_not_make_differences_of_noise(toy):
    """Two samples of one distribution, 8 prompts: plain percentiles call 12 % of the differences certain, these 6 %."""
    rng = np.random.default_rng(0)
    wrong, plain, runs = 0, 0, 300
    for _ in range(runs):
        values = rng.normal(size=(2, 8))
        own, other = ([row(str(n), toy_loud=v) for n, v in enumerate(part)] for part in values)
        wrong += compare(own, other)["toy_loud"]["verdict"] != "undecided"
        change = values[0] - values[1]
        draws = change[rng.integers(8, size=(2000, 8))].mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        plain += low > 0 or high < 0
    assert wrong / runs < 0.09 < plain / runs


def test_clips_needed_for_a_difference_of_this_size(toy):
    """Differences of deviation 1 and mean .25: (1.96 + .8416)^2 x 16 = 125.6 clips."""
    rng = np.random.default_rng(0)
    change = rng.normal(size=400)
    change = 0.25 + (change - change.mean()) / change.std(ddof=1)
    base = rng.normal(size=400)
    own = [row(str(n), toy_loud=v) for n, v in enumerate(base + change)]
    found = compare(own, [row(str(n), toy_loud=v) for n, v in enumerate(base)])["toy_loud"]
    assert found["needed"] == 126
    assert found["verdict"] == "better"


@pytest.mark.parametrize(
    ("key", "shift", "target", "word"),
    [
        ("toy_loud", 1.0, None, "better"), ("toy_loud", -1.0, None, "worse"), ("toy_loud", 0.0, None, "undecided"),
        ("toy_words", 1.0, None, "worse"), ("toy_brightness", 1.0, 5.0, "better"), ("toy_brightness", 1.0, -5.0, "worse"),
        ("toy_brightness", 1.0, None, "different"),
    ],
)  # fmt: skip
def test_verdict_follows_the_direction(toy, key, shift, target, word):
    rng = np.random.default_rng(3)
    base = rng.normal(size=(2, 60))
    own = [row(str(n), **{key: v, "toy_units": 1.0}) for n, v in enumerate(base[0] + 0.3 * base[1] + shift)]
    other = [row(str(n), **{key: v, "toy_units": 1.0}) for n, v in enumerate(base[0])]
    references = [] if target is None else [row(str(n), **{key: target}) for n in range(60)]
    assert compare(own, other, references)[key]["verdict"] == word


def test_references_are_resampled_with_the_clips(toy):
    """Clips that equal their references are nearer to them than others, however much the references differ."""
    rng = np.random.default_rng(0)
    real = 100 * rng.normal(size=400)
    change = rng.normal(size=400)
    change = 0.25 + (change - change.mean()) / change.std(ddof=1)
    references, other = ([row(str(n), toy_brightness=v) for n, v in enumerate(part)] for part in (real, real + change))
    found = compare(references, other, references)["toy_brightness"]
    assert found["verdict"] == "better"
    assert (found["target"], found["gain"]) == pytest.approx((real.mean(), 0.25))
    assert found["gain_low"] == pytest.approx(-found["high"])
    assert found["needed"] == 126  # as of a plain difference of this mean and deviation
    assert compare(other, references, references)["toy_brightness"]["verdict"] == "worse"
    # Against the average of the references as if it were known, nothing could be said.
    fixed = [row(str(n), toy_brightness=real.mean()) for n in range(400)]
    assert compare(references, other, fixed)["toy_brightness"]["verdict"] == "undecided"


def test_too_few_references_are_no_target(toy):
    own, other = ([row(str(n), toy_brightness=n + shift) for n in range(10)] for shift in (0.0, 1.0))
    found = compare(own, other, own[:8])["toy_brightness"]
    assert found["verdict"] == "different"
    assert found["reason"] == "no better side: 8 of 10 clips have a reference with a value"
    assert "gain" not in found
    assert compare(own, other, own[:4], min_coverage=0.0)["toy_brightness"]["reason"]
    assert compare(own, other)["toy_brightness"]["reason"] == ""


def test_prompts_that_one_side_knows_hold_for_both(toy):
    """Four prompts of three clips; the other set does not know the prompts."""
    grouped = [row(str(n), str(n // 3), toy_loud=n + 1.0) for n in range(12)]
    alone = [row(str(n), toy_loud=float(n)) for n in range(12)]
    for own, other in ((grouped, alone), (alone, grouped)):
        found = compare(own, other)["toy_loud"]
        assert (found["groups"], found["verdict"]) == (4, "not compared")
    # In one set 0 and 1 are alike, in the other 1 and 2: these three are one group.
    chain = [row(str(n), name, toy_loud=float(n)) for n, name in enumerate("aabcdef")]
    other = [row(str(n), name, toy_loud=float(n)) for n, name in enumerate("xyyzuvw")]
    assert compare(chain, other)["toy_loud"]["groups"] == 5


def test_only_common_clips_count_and_too_few_are_refused(toy):
    own = [row(str(n), toy_loud=float(n)) for n in range(10)]
    other = [row(str(n), toy_loud=float(n) + 1) for n in range(2, 10)]
    found = compare(own, other, min_coverage=0.8)["toy_loud"]
    assert (found["n"], found["total"], found["value"]) == (8, 10, 5.5)
    refused = compare(own, other, min_coverage=0.9)["toy_loud"]
    assert refused["verdict"] == "not compared"
    assert refused["reason"] == "80% of the clips have a value in both, and min_coverage is 90%"
    broken = [row(str(n), toy_loud=None) for n in range(10)]
    assert compare(broken, own)["toy_loud"]["reason"] == "clips: broken"


def test_clips_that_a_metric_does_not_apply_to_are_no_lack_of_coverage(toy):
    def rows(shift: float, skipped: int) -> list[ClipRow]:
        found = [row(str(n), toy_loud=n + shift) for n in range(10)]
        for one in found[:skipped]:
            one.values["toy_loud"] = Value(None, "skipped", "nobody speaks")
        return found

    both = compare(rows(0.0, 4), rows(1.0, 4))["toy_loud"]
    assert (both["n"], both["total"], both["coverage"], both["verdict"]) == (6, 6, 1.0, "worse")
    assert compare(rows(0.0, 4), rows(1.0, 2))["toy_loud"]["verdict"] == "not compared"


def test_clips_of_two_frame_rates_are_not_compared_by_what_depends_on_it(tmp_path):
    text = "MEASUREMENTS = (Measurement('toy_rated', (Metric('toy_step', 's', direction='down', per_frame=True), "
    text += "Metric('toy_still', 's', direction='down')), None),)"

    def rows(shift: float, *rates: float | None) -> list[ClipRow]:
        found = [row(str(n), toy_step=n + shift, toy_still=n + shift) for n in range(10)]
        for one, rate in zip(found, rates * 10, strict=False):
            one.fps = rate
        return found

    with metric_file(tmp_path / "m", text, "toy_rated"):
        same, near = compare(rows(0, 25), rows(1, 25)), compare(rows(0, 24), rows(1, 23.976))
        apart, old = compare(rows(0, 12.5, 25), rows(1, 25)), compare(rows(0, None), rows(1, 25))
    assert same["toy_step"]["verdict"] == near["toy_step"]["verdict"] == "better"
    assert apart["toy_still"]["verdict"] == old["toy_still"]["verdict"] == "better"
    assert apart["toy_step"]["verdict"] == "not compared"
    assert apart["toy_step"]["reason"].endswith("5 of 10 clips have two: 12.5 and 25")
    assert old["toy_step"]["reason"].endswith("run eval.score again")


def test_few_prompts_have_no_verdict(toy):
    """Two of two that are higher are so by chance in half of all comparisons."""
    own, other = ([row(str(n), toy_loud=n + shift) for n in range(5)] for shift in (1.0, 0.0))
    few = compare(own[:4], other[:4])["toy_loud"]
    assert (few["verdict"], few["reason"]) == ("not compared", "4 prompts have a value in both, and a verdict needs 5")
    assert compare(own, other)["toy_loud"]["verdict"] == "better"


def test_difference_of_pooled_rates_uses_the_common_clips_only(toy):
    own = [
        row("a", toy_words=1.0, toy_units=3.0),
        row("b", toy_words=0.0, toy_units=1.0),
        row("c", toy_words=9.0, toy_units=9.0),
    ]
    other = [row("a", toy_words=0.0, toy_units=3.0), row("b", toy_words=1.0, toy_units=1.0)]
    right = [row(name, toy_words=0.0, toy_units=1.0) for name in "def"]
    found = compare(own + right, other + right, min_coverage=0.5)["toy_words"]
    assert (found["value"], found["baseline"]) == pytest.approx((3 / 7, 1 / 7))
