"""Words of verdicts: from intervals and margins for rows, from rows for claims; and how often they are wrong."""

import math
from collections import Counter
from statistics import NormalDist

import pytest

from eval.stats import Estimate, RatioEstimate, ShareDistance
from eval.verdicts import (
    Finding,
    decide,
    match_claim,
    not_measured,
    of_gain,
    of_ratio,
    of_shares,
    quality_claim,
    scope,
    speed_claim,
)


def gain(value: float, error: float, margin: float | None = 0.05, sign: int = 1) -> Finding:
    return of_gain(Estimate(value, ((error**2, 1e6),)), margin, 9, sign)


@pytest.mark.parametrize(
    ("value", "error", "margin", "word"),
    [
        (0.10, 0.02, 0.05, "better"),
        (-0.10, 0.02, 0.05, "worse"),
        (0.00, 0.02, 0.05, "equal"),  # 1.645 x .02 = .033
        (0.00, 0.04, 0.05, "undecided"),  # .066
        (0.03, 0.01, 0.05, "equal"),  # excludes 0, too; smaller than what matters
        (0.04, 0.01, 0.05, "better"),  # .056
        (0.00, 0.00, None, "undecided"),  # without a margin nothing is equal
    ],
)
def test_rows_with_a_better_side(value, error, margin, word):
    assert decide({"a": gain(value, error, margin)})["a"]["verdict"] == word


def test_a_lower_value_can_be_better_and_is_shown_as_it_is():
    row = decide({"a": gain(0.10, 0.02, sign=-1)})["a"]
    assert (row["verdict"], row["value"]) == ("better", -0.10)
    assert (row["low"], row["high"]) == pytest.approx((-0.10 - 1.96 * 0.02, -0.10 + 1.96 * 0.02), abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "error", "word"),
    [
        (1.0, 0.05, "equal"),  # 1.645 x .05 = .082
        (1.0, 0.07, "undecided"),
        (0.9, 0.01, "undecided"),  # at the margin
        (0.8, 0.02, "lower"),
        (0.8, 0.08, "undecided"),  # it may be .93
        (0.0, 0.0, "lower"),  # all of a spread is lost
        (1.3, 0.02, "higher"),
        (1.1, 0.005, "equal"),  # the margin above is 1 / .9
    ],
)
def test_rows_with_a_target(ratio, error, word):
    found = of_ratio(RatioEstimate(3 * ratio, 3.0, ((9 * error**2, 0.0, 0.0, 1e6),)), 0.1)
    row = decide({"a": found})["a"]
    assert row["verdict"] == word
    half = 1.6449 * error
    assert (row["low"], row["high"]) == pytest.approx((ratio - half, ratio + half), rel=1e-4)
    assert (row["verdict"] == "equal") == (row["low"] > 0.9 and row["high"] < 1 / 0.9)


def test_wrong_differences_of_ratios_are_rare_where_intervals_are_wide():
    """True ratio 1, estimates at 200 quantiles of a normal error of 10: both sides together are wrong in 5 % at most."""
    quantiles = [NormalDist(1, 10).inv_cdf((k + 0.5) / 200) for k in range(200)]
    found = [of_ratio(RatioEstimate(own, 1.0, ((100.0, 0.0, 0.0, 1e6),)), 0.1).differs for own in quantiles]
    assert 0.04 <= sum(p < 0.05 for p in found) / 200 <= 0.05
    assert max(found) <= 1
    # 1.881 errors under the margin: a one-sided p-value of .03
    assert of_ratio(RatioEstimate(0.8, 1.0, (((0.1 / 1.8808) ** 2, 0.0, 0.0, 1e6),)), 0.1).differs == pytest.approx(
        0.06, rel=1e-3
    )


@pytest.mark.parametrize(
    ("w", "clips", "word"),
    [(0.0, 480, "equal"), (0.0, 60, "undecided"), (0.25, 480, "different"), (0.25, 60, "undecided")],
)
def test_rows_of_shares(w, clips, word):
    """Independent clips: w^2 n is chi-square, and the radius of the 90 % region is sqrt(4.605 / n) for two free shares."""
    found = of_shares(ShareDistance(w, 2, ((1 / clips, 1e6),)))
    assert decide({"a": found})["a"]["verdict"] == word
    assert found.measure.high == pytest.approx(w + math.sqrt(4.605 / clips), rel=1e-3)
    if w:
        assert found.differs == pytest.approx(math.exp(-clips * w * w / 2), rel=1e-3)  # of two degrees of freedom


def test_shares_of_too_few_prompts_have_no_word():
    row = decide({"a": of_shares(None, clips=4)})["a"]
    assert (row["verdict"], row["p"], row["n"]) == ("n/a", None, 4)
    assert row["reason"] == "needs 5 prompts with recognised clips"


def test_differences_are_corrected_for_the_rows_of_their_claim():
    """p = .01 alone is better; beside nine other rows it is not. Equality is not corrected."""
    alone = decide({"a": gain(0.0515, 0.02)})
    assert alone["a"]["verdict"] == "better"
    many = decide({"a": gain(0.0515, 0.02), **{f"equal {k}": gain(0, 0.02) for k in range(9)}})
    assert many["a"]["verdict"] == "undecided"
    assert many["a"]["p"] == pytest.approx(10 * alone["a"]["p"])
    assert many["equal 3"]["verdict"] == "equal"
    missing = decide({"a": gain(0.0515, 0.02), "b": not_measured("difference", "needs clips")})
    assert (missing["a"]["verdict"], missing["b"]["verdict"], missing["b"]["p"]) == ("better", "n/a", None)


@pytest.mark.parametrize(
    ("words", "quality"),
    [
        (["equal", "equal"], "equal"),
        (["better", "equal"], "better"),
        (["better", "undecided"], "undecided"),  # who claims to be better shows that nothing got worse
        (["undecided", "equal"], "undecided"),
        (["worse", "undecided", "equal"], "worse"),
        (["better", "worse"], "mixed"),
        (["equal", "n/a"], "equal"),
        (["n/a"], "n/a"),
    ],
)
def test_words_of_a_claim_on_quality(words, quality):
    rows = {str(k): {"verdict": word, "value": 1.0} for k, word in enumerate(words)}
    claim = quality_claim("teacher", rows)
    assert (claim["about"], claim["verdict"]) == ("quality against teacher", quality)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["equal", "equal"], "equal"),
        (["equal", "lower"], "different"),
        (["higher", "undecided"], "different"),
        (["different"], "different"),
        (["equal", "undecided"], "undecided"),
        ([], "n/a"),
    ],
)
def test_words_of_a_claim_on_what_is_matched(words, match):
    rows = {str(k): {"verdict": word, "value": 1.0} for k, word in enumerate(words)}
    assert match_claim("real puppets", rows)["verdict"] == match


def test_speed_and_scope():
    def columns(own: float) -> tuple:
        return {"calls": 8, "seconds_per_clip": own}, "t", {"calls": 64, "seconds_per_clip": 0.8}

    assert [speed_claim(*columns(s))["verdict"] for s in (0.1, 0.79, 1.0)] == ["faster", "equal", "slower"]
    text = speed_claim(*columns(0.1))["text"]
    assert text == "8.0 times: 0.100 s against 0.800 s of denoising per clip; 8 against 64 network calls"
    assert "nothing about other training seeds" in scope(1)
    assert "3 training seeds (2 degrees" in scope(3)


def test_rates_of_a_small_simulation():
    """40 prompts x 3: wrong words for equal columns are rare, a loss of 30 % is found, and no loss is called equal."""
    from eval.verdict_power import KINDS, study

    wrong: Counter[str] = Counter()
    for index in range(25):
        found = study((1, index), 40, 3, 0.0, 1, 0.0, 200)
        for claim, judged in found.items():
            wrong[claim] += any(row["verdict"] not in ("equal", "undecided") for row in judged["rows"].values())
    assert max(wrong.values(), default=0) <= 5  # 25 x 5 %: more than 5 has a chance of 2 in 1000
    lost = [study((2, index), 40, 3, 0.3, 1, 0.0, 200) for index in range(10)]
    for kind in KINDS:
        words = Counter(one[kind.claim]["rows"][kind.row]["verdict"] for one in lost)
        assert words["equal"] == 0, kind
        if kind.row in ("vowels", "sync_skill", "amplitude", "spread_voice"):
            assert words[kind.right[0]] >= 8, (kind, words)
    # Checkpoints of one recipe differ by 5 %: judged one by one they seem to differ, as a recipe they do not.
    words = [
        [
            study((3, index), 40, 3, 0.0, count, 0.05, 200)["quality"]["rows"]["sync_skill"]["verdict"]
            for index in range(10)
        ]
        for count in (1, 3)
    ]
    assert words[0].count("better") + words[0].count("worse") >= 6
    assert words[1].count("better") + words[1].count("worse") <= 1


def test_shares_are_of_the_prompts_that_leave_an_attribute_open():
    """With 60 of 120 prompts shares have the words and intervals of 60 prompts; with 4 no word. Other rows are unchanged."""
    from eval.verdict_power import study

    def rows(leave_open: int | None) -> dict[str, dict]:
        return study((4, 0), 120, 4, 0.0, 1, 0.0, 100, leave_open)["match"]["rows"]

    every, half, few = rows(None), rows(60), rows(4)
    widths = [row["unequal shares"]["high"] - row["unequal shares"]["value"] for row in (every, half)]
    assert widths[1] / widths[0] == pytest.approx(2**0.5, rel=0.2)
    assert [row["equal shares"]["n"] for row in (every, half, few)] == [480, 240, 16]
    assert (few["equal shares"]["verdict"], few["unequal shares"]["verdict"]) == ("n/a", "n/a")
    assert half["amplitude"]["value"] == every["amplitude"]["value"]


def test_the_table_of_rates_counts_every_study(tmp_path):
    from eval import verdict_power
    from eval.puppet_tables import verdict_power as table
    from magihuman.errors import UserError

    values = verdict_power.run("12x2,12x3x6,12x2x12", studies=2, resamples=100, output=str(tmp_path), progress=False)
    cells = [cell for line in table(values).splitlines() for cell in line.split("|") if cell.count(" / ") == 2]
    rates = [[int(number) for number in cell.split("/")] for cell in cells if cell.split("/")[0].strip().isdigit()]
    assert len(rates) == 8 * 4 * 2 + 2 * 4
    assert all(sum(rate[:2]) <= 100 for rate in rates)
    assert values["designs"]["12x3x6, three training seeds"].keys() == {"0"}
    assert (tmp_path / "verdict_power.md").read_text().startswith("% of studies")
    assert "prompts x clips of each x prompts that leave attributes open:" in table(values)
    assert [name for name in values["designs"] if "," not in name] == ["12x2", "12x3x6"]
    counts = values["designs"]["12x2"]["0.3"]["rows"]
    counts["equal shares"] = {"equal": 1, "n/a": 1}
    assert "| shares, in the world equal | 30 % | 50 / 0 / 0 (n/a 50) |" in table(values)
    for wrong in ("40", "40x3x", "40x3x41", "40x3x4", "40x3x0", "4x3", "40x1"):
        with pytest.raises(UserError, match=f"designs={wrong} should be PROMPTSxCLIPS"):
            verdict_power.run(wrong)
