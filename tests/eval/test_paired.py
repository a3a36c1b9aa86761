"""Columns of the same prompts: statistics, intervals, verdicts; distances to real puppets see what they are for."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data.tiny.puppets import SKINS, draw_puppet, synthesise
from eval import stats, verdicts
from eval.clips import Clips, ground_truth, held_out, through_codec
from eval.diversity import (
    SPACES,
    DistributionMetrics,
    Reference,
    by_prompt,
    distances_between,
    distances_within,
    embed,
    real_draw,
)
from eval.metrics.puppet_clips import CLIP_METRICS
from eval.paired import (
    ROWS,
    Column,
    Comparison,
    OpenAttribute,
    column,
    deviation_of,
    energy_in,
    share_distance_of,
    weights,
)
from eval.puppet_speech import Recognised, pitch, recognise
from magihuman.codecs.bundle import load_bundle

ROW = {row.name: row for row in ROWS}
PROMPTS, DRAWS = 20, 3


def skin_tones(numbers: np.ndarray) -> OpenAttribute:
    """Three categories that are equally frequent in the world."""
    return OpenAttribute(numbers, dict.fromkeys(SKINS, 1 / 3))


def made(name: str, role: str, *, base: float = 0.0, skins: np.ndarray | None = None, seed: int = 0) -> Column:
    """A column of made-up values: every one `base` more than a prompt's own, which all columns share."""
    shared = np.random.default_rng(0).uniform(0.9, 1.1, (PROMPTS, 1)).repeat(DRAWS, 1)
    noise = np.random.default_rng(seed).normal(0, 0.01, (PROMPTS, DRAWS)) if seed else 0
    names = [name for name, metric in CLIP_METRICS.items() if metric.compared]
    values = dict.fromkeys((*names, "sync_retrieval", "nearest", "own", "semitones", "start_ms"), shared + base + noise)
    values["other"] = values["own"] * 0.3
    values["end_ms"] = values["start_ms"]
    tones = skin_tones(np.tile(np.arange(3), (PROMPTS, 1)) if skins is None else skins)
    terms = tuple(np.zeros((PROMPTS, PROMPTS)) for _ in range(3))
    dispersion = dict.fromkeys(SPACES, shared[:, 0] + base)
    distribution = DistributionMetrics(dispersion, shared + base, dict.fromkeys(SPACES, terms))  # type: ignore[arg-type]
    return Column(name, role, values, {"skin tones": tones}, distribution)


def compared(*others: Column) -> Comparison:
    return Comparison([made("bound", "bound"), made("teacher", "teacher", base=-0.02), *others])


def test_distance_of_shares_in_closed_form():
    """Independent clips, one per prompt: F is the chi-square statistic over its degrees of freedom times (n - 1) / n."""
    from scipy.stats import chisquare

    counts = np.array([25, 53, 22])
    tones = skin_tones(np.repeat(np.arange(3), counts)[:, None])
    found = share_distance_of([tones])
    assert found.value == pytest.approx(np.sqrt(chisquare(counts).statistic / 100))  # Cohen's w
    (variance, freedom), shares = found.parts[0], counts / 100
    assert variance == pytest.approx((shares * (1 - shares) / 99 / (1 / 3)).sum() / 2)
    assert freedom == 99
    assert found.p == pytest.approx(chisquare(counts).pvalue, rel=0.3)
    # Three equal clips of a prompt are no more evidence than one; against itself there is no distance.
    again = share_distance_of([skin_tones(tones.numbers.repeat(3, 1))])
    assert (again.value, again.p) == pytest.approx((found.value, found.p))
    assert share_distance_of([tones], tones).value == 0
    unequal = OpenAttribute(tones.numbers, {"a": 0.25, "b": 0.53, "c": 0.22})
    assert share_distance_of([unequal]).value == pytest.approx(0, abs=1e-12)
    # What was not recognised counts in neither: not in the distance, its variance or the degrees of freedom.
    holes = np.concatenate([tones.numbers, np.full((300, 1), -1)])
    with_holes = share_distance_of([skin_tones(holes)])
    assert with_holes.value == pytest.approx(found.value)
    assert with_holes.parts == ((pytest.approx(variance), 99),)
    # Of two columns, prompts count that both have.
    moved = np.roll(np.concatenate([np.full((300, 1), -1), tones.numbers]), -250, 0)  # rows 50 to 149
    assert share_distance_of([skin_tones(holes)], skin_tones(moved)).parts[0][1] == 49


def test_deviation_within_a_prompt_leaves_out_what_was_not_heard():
    values = np.array([[1.0, 3.0, np.nan], [5.0, 9.0, 7.0], [np.nan, 2.0, np.nan]])
    distribution = replace(made("b", "bound").distribution, nearest=values)
    own = Column("a", "student", {"x": values}, {}, distribution)
    found = deviation_of("x")(own, own, np.ones((1, 3)))
    assert found is not None
    assert found[0] == pytest.approx(np.sqrt((2 + 4) / 2))  # variances 2 and 4; the third prompt has one value
    nothing = Column("a", "student", {"x": values[2:]}, {}, replace(distribution, nearest=values[2:]))
    assert deviation_of("x")(nothing, nothing, np.ones((1, 1))) is None


def test_energy_distance_in_closed_form_and_without_bias():
    """Points 0 and points d have energy distance 2 d; two samples of one Gaussian have 0 but for noise."""
    rng = np.random.default_rng(1)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        distribution = DistributionMetrics(
            {},
            np.zeros(x.shape[:2]),
            {"look": (distances_between(x, y), distances_between(x, x), distances_between(y, y))},
        )
        own = replace(made("a", "student"), distribution=distribution)
        return np.asarray(energy_in("look")(own, own, weights(len(x))))

    zeros = np.zeros((PROMPTS, DRAWS, 5))
    assert distance(zeros, zeros + 0.7) == pytest.approx(1.4)
    equal = [distance(*rng.normal(size=(2, 40, 3, 5)))[0] for _ in range(40)]
    assert abs(np.mean(equal)) < 3 * np.std(equal) / np.sqrt(40)
    assert min(equal) < 0 < max(equal)
    # Both differ in the deviation only: 2 E|X-Y| - E|X-X'| - E|Y-Y'| = (2 sqrt(a^2+b^2) - sqrt 2 (a+b)) sqrt(2/pi).
    x, y = rng.normal(size=(2, 400, 3, 1))
    expected = (2 * np.sqrt(1 + 9) - np.sqrt(2) * (1 + 3)) * np.sqrt(2 / np.pi)
    assert distance(x, 3 * y)[0] == pytest.approx(expected, abs=0.08)


def test_distances_are_root_mean_squares():
    a, b = np.zeros((2, 1, 4)), np.full((2, 3, 4), 2.0)
    assert distances_within(a, b).tolist() == [[[2.0] * 3]] * 2
    assert distances_between(a, b).tolist() == [[2.0, 2.0]] * 2


@pytest.mark.parametrize(
    ("row", "student", "baseline", "word"),
    [
        ("attributes", 0.25, 0.0, "better"),
        ("attributes", -0.25, 0.0, "worse"),
        ("attributes", 0.0, 0.0, "undecided"),  # 20 prompts: half a prompt each way is a standard error of 1/22
        ("lip_shape", 0.05, 0.0, "worse"),
        ("lip_shape", -0.05, 0.0, "better"),
        ("lip_shape", -0.01, 0.0, "equal"),
        ("sync_skill", 0.05, 0.0, "better"),
    ],
)
def test_quality_knows_which_way_is_better(row, student, baseline, word):
    found = compared(made("few", "baseline", base=baseline), made("student", "student", base=student))
    _, _, few, own = found.columns
    verdict = found.quality([own], few)[row]
    assert verdict["verdict"] == word
    if row != "sync_skill":
        assert verdict["value"] == pytest.approx(student - baseline, abs=1e-9)


def test_rows_of_quality_and_rows_to_match():
    found = compared(made("student", "student"))
    quality, match = found.quality([found.columns[2]], found.columns[1]), found.match([found.columns[2]], found.bound)
    assert {"attributes", "vowels", "onsets", "lip_shape", "lips_open", "sync_skill", "energy_look"} <= quality.keys()
    targets = {"sharpness", "amplitude", "flicker", "nearest", "spread_look", "pitch", "timing", "skin tones"}
    assert targets <= match.keys()
    assert not quality.keys() & match.keys()
    assert all(row["margin"] for row in (*quality.values(), *match.values()))


@pytest.mark.parametrize(("base", "word"), [(0.0, "equal"), (0.3, "higher"), (-0.3, "lower"), (-0.1, "undecided")])
def test_stillness_over_sharpness_and_nearness_are_no_virtues(base, word):
    """Less flicker than true clips is lower, not better; so are blur, and clips nearer to real ones than real ones are."""
    found = compared(made("student", "student", base=base))
    rows = found.match([found.columns[2]], found.bound)
    for name in ("flicker", "sharpness", "nearest", "spread_look"):
        noisy = rows[name]
        if word == "undecided":  # a ratio at the margin
            assert noisy["value"] == pytest.approx(0.9, abs=0.01)
        else:
            assert noisy["verdict"] == word, name


def test_the_interval_of_a_ratio_decides():
    """Shares of a known ratio, with noise: the word follows from the interval and the margin."""
    for base, seed in ((0.0, 1), (0.02, 2), (0.09, 3), (0.2, 4)):
        own = made("student", "student", base=base)
        noise = np.random.default_rng(seed).normal(0, 0.25, (PROMPTS, 1))
        own.values["amplitude"] = own.values["amplitude"] * (1 + noise)
        found = compared(own)
        row = found.match([own], found.bound)["amplitude"]
        equal = row["low"] > 0.9 and row["high"] < 1 / 0.9
        assert (row["verdict"] == "equal") == equal
    # A lost spread is lower, not missing.
    lost = made("student", "student")
    lost.values["semitones"] = np.zeros((PROMPTS, DRAWS))
    bound, teacher = (made(name, name) for name in ("bound", "teacher"))
    for column_ in (bound, teacher):
        column_.values["semitones"] = np.random.default_rng(1).normal(size=(PROMPTS, DRAWS))
    row = Comparison([bound, teacher, lost]).match([lost], bound)["pitch"]
    assert (row["verdict"], row["value"]) == ("lower", 0)


def test_differences_are_paired():
    """Prompts differ by .1, columns by .03: unpaired intervals overlap, paired ones have no width."""
    found = compared(made("student", "student", base=0.01))
    own, teacher = found.columns[2], found.columns[1]
    value, other = found.value(own, ROW["lip_shape"]), found.value(teacher, ROW["lip_shape"])
    assert value.low < other.high
    change = found.quality([own], teacher)["lip_shape"]
    assert (change["low"], change["high"]) == pytest.approx((0.03, 0.03))


def test_a_recipe_of_three_seeds_is_less_certain_than_one_checkpoint():
    """Seeds differ by .02: the mean of three has a wider interval than one of them, of 2 degrees of freedom."""
    rng = np.random.default_rng(5)
    students = []
    for number, base in enumerate((0.01, 0.03, 0.05)):
        own = made(f"student {number}", "student", base=base)
        own.values["lip_shape"] = own.values["lip_shape"] + rng.normal(0, 0.01, (PROMPTS, DRAWS))
        students.append(own)
    found = compared(*students)
    one, three = (found.quality(own, found.columns[1])["lip_shape"] for own in (students[1:2], students))
    assert three["high"] - three["low"] > 3 * (one["high"] - one["low"])
    assert three["value"] == pytest.approx(0.05, abs=0.01)
    between = np.std([0.01, 0.03, 0.05], ddof=1) / np.sqrt(3) * 4.303  # t of 2 degrees of freedom
    assert (three["high"] - three["low"]) / 2 == pytest.approx(between, rel=0.2)
    assert one["verdict"] == "worse"
    assert three["verdict"] == "undecided"


def test_prompts_not_clips_are_resampled():
    """Three equal clips per prompt are no more evidence than one."""
    rng = np.random.default_rng(3)
    prompts = rng.normal(size=(PROMPTS, 1))
    widths = []
    for draws in (1, DRAWS):
        some = made("a", "student")
        values = {key: prompts.repeat(draws, 1) for key in some.values}
        distribution = replace(some.distribution, nearest=some.distribution.nearest[:, :draws])
        columns = [
            replace(some, name=role, role=role, values=values, open={}, distribution=distribution)
            for role in ("bound", "teacher")
        ]
        found = Comparison(columns)
        measure = found.value(columns[1], ROW["amplitude"])
        widths.append(measure.high - measure.low)
    assert widths[0] == pytest.approx(widths[1])


def test_all_right_keeps_a_doubt():
    found = compared()
    right = found.columns[1]
    right.values["vowels"] = np.ones((PROMPTS, DRAWS))
    measure = Comparison(found.columns).value(right, ROW["vowels"])
    assert measure.value == measure.high == 1
    assert measure.low == pytest.approx(0.839, abs=1e-3)  # Wilson, 20 of 20


def test_wrong_differences_of_shares_are_rare_where_few_prompts_leave_an_attribute_open():
    """40 prompts x 3 clips of the world's shares, one prompt of four open: variances over all 40 are wrong in 9 %."""
    shares, wrong = {"a": 0.5, "b": 0.3, "c": 0.2}, 0
    for study in range(400):
        numbers = np.full((40, 3), -1)
        numbers[::4] = np.random.default_rng([1, study]).choice(3, (10, 3), p=list(shares.values()))
        wrong += share_distance_of([OpenAttribute(numbers, shares)]).p < 0.05
    assert wrong <= 27  # 400 x 5 %: more than 27 has a chance of 5 %


@pytest.mark.parametrize("known", [0, 1, 4, 5])
def test_shares_of_few_prompts(known):
    """Nothing recognised, or in too few prompts, is neither equal nor different; `n` counts recognised clips."""
    numbers = np.full((PROMPTS, DRAWS), -1)
    numbers[:known, :2] = 1
    teacher = made("teacher", "teacher", skins=numbers)
    found = compared(made("student", "student", skins=numbers))
    own = found.columns[2]
    rows = [found.match([own], target)["skin tones"] for target in (found.bound, found.columns[1], teacher)]
    assert [row["n"] for row in rows] == [2 * known] * 3
    words = [row["verdict"] for row in rows]
    assert words == (["n/a"] * 3 if known < 5 else ["different", "different", "undecided"])


def test_only_prompts_with_a_value_count():
    """A row that 6 of 20 prompts have: Wilson's interval of 6, 5 degrees of freedom; with 4 of them no verdict."""
    columns = compared(made("student", "student", base=0.01)).columns
    for own in columns:
        own.values["novel_pair"] = np.ones((PROMPTS, DRAWS))
        own.values["novel_pair"][6:] = np.nan
        own.values["amplitude"] = own.values["amplitude"] * own.values["novel_pair"]
    found, student = Comparison(columns), columns[2]
    measure = found.value(student, ROW["novel_pair"])
    assert (measure.n, measure.low) == (6, pytest.approx(0.6097, abs=1e-4))  # 6 / (6 + 1.96^2)
    gain = found.quality([student], columns[1])["novel_pair"]
    assert gain["high"] == pytest.approx(2.5706 / 8, abs=1e-4)  # t of 5 degrees of freedom, a deviation of 1 / (6 + 2)
    student.values["amplitude"] = columns[0].values["amplitude"] * np.random.default_rng(1).uniform(
        0.5, 1.5, (PROMPTS, 1)
    )
    weight = weights(PROMPTS)
    mine, theirs = (ROW["amplitude"].statistic(c, c, weight) for c in (student, columns[0]))
    drawn = np.stack([mine, theirs])[:, 1:]
    gap = np.cov(drawn[:, np.isfinite(drawn).all(0)], ddof=0) * 6 / 5
    ratio = stats.RatioEstimate(mine[0], theirs[0], ((gap[0, 0], gap[0, 1], gap[1, 1], 5.0),)).interval(0.9)
    row = Comparison(columns).match([student], columns[0])["amplitude"]
    assert (row["low"], row["high"]) == pytest.approx(ratio)
    for name in ("amplitude", "novel_pair", "semitones", "vowels"):
        student.values[name] = student.values[name].copy()
        student.values[name][4:] = np.nan
    student.values["semitones"][4:, 0] = 1.0  # one clip of a prompt has no deviation
    few = Comparison(columns)
    rows = {**few.quality([student], columns[1]), **few.match([student], columns[0])}
    for name in ("amplitude", "novel_pair", "pitch", "vowels"):
        assert rows[name]["verdict"] == "n/a"
        assert rows[name]["reason"] == "4 prompts have a value in both, and a verdict needs 5"
    assert ROW["pitch"].prompts(student) == 4


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ((160, 160, 160), "equal"),
        ((120, 240, 120), "different"),
        ((0, 480, 0), "different"),
        ((30, 60, 30), "different"),
        ((36, 44, 40), "undecided"),
    ],
)
def test_shares_are_tested_as_shares(counts, word):
    tones = np.random.default_rng(2).permutation(np.repeat(np.arange(3), counts)).reshape(-1, 4)
    found = verdicts.decide({"skin tones": verdicts.of_shares(share_distance_of([skin_tones(tones)]))})["skin tones"]
    assert found["verdict"] == word
    assert found["low"] <= found["value"] <= found["high"]


def test_shares_of_columns_are_compared_with_each_other():
    """The world's shares and the teacher's are two comparators: a student may match one of them."""
    rng = np.random.default_rng(4)
    skewed, fair = (rng.choice(3, (PROMPTS, 9), p=p) for p in ((0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3)))
    own, teacher = skin_tones(skewed), skin_tones(rng.permutation(skewed.ravel()).reshape(skewed.shape))
    assert share_distance_of([own], teacher).p > 0.2
    assert share_distance_of([own]).p < 1e-6
    assert share_distance_of([own], skin_tones(fair)).p < 1e-6


def test_columns_of_other_prompts_are_refused():
    other = made("student", "student")
    with pytest.raises(ValueError, match="same prompts"):
        compared(replace(other, distribution=replace(other.distribution, nearest=other.distribution.nearest[:5])))


def test_real_draws_keep_the_caption_and_nothing_else():
    puppets = held_out(12)
    assert real_draw(puppets, 0) == puppets
    for draw in (1, 2):
        others = real_draw(puppets, draw)
        assert [o.caption for o in others] == [p.caption for p in puppets]
        assert {o.skin for o in others} == set(SKINS)
        for other, puppet in zip(others, puppets, strict=True):
            assert other.syllables[0].start != puppet.syllables[0].start
            assert other.syllables[0].pitch != puppet.syllables[0].pitch
    assert real_draw(puppets, 1) != real_draw(puppets, 2)


def test_pitch_is_heard():
    puppets = [draw_puppet(81, index) for index in range(40)]
    drawn = np.array([np.mean([s.pitch * (1 + s.glide / 2) for s in p.syllables]) for p in puppets])
    waves = [synthesise(p) for p in puppets]
    heard = np.array([pitch(wave, recognise(wave)) for wave in waves], float)
    off = 12 * np.abs(np.log2(heard / drawn))
    assert (off < 1.5).mean() >= 0.95
    assert np.corrcoef(heard, drawn)[0, 1] > 0.95
    assert pitch(np.zeros(16000), Recognised((), (), (), True)) is None


# ----------------------------------------------------------------------------------------------------
# Real puppets, and real puppets spoilt in known ways
# ----------------------------------------------------------------------------------------------------


SPOILT = {
    "blurred": {
        "energy_look": "worse", "eyes": "lower", "sharpness": "lower", "flicker": "lower", "nearest": "higher",
    },
    "saturated": {"energy_look": "worse", "sharpness": "higher", "nearest": "higher"},
    "no middle": {"skin tones": "different"},
    "one tone and one way to say it": {
        "energy_look": "worse", "spread_look": "lower", "spread_voice": "lower", "pitch": "lower", "timing": "lower",
        "skin tones": "different",
    },
}  # fmt: skip


def spoilt_puppets(prompts: int, draws: int) -> Comparison:
    """Real puppets as the bound, other draws of them as the teacher, and spoilt ones."""
    world, puppets = load_bundle("tiny"), held_out(prompts)
    first = [real_draw(puppets, k) for k in range(draws)]
    reference = Reference(puppets, world, 2 * draws)

    def coded(drawn):
        return [through_codec(ground_truth(p), world) for p in drawn]

    def changed(clips, function):
        def one(movie):
            return np.clip(function(movie.astype(float)).round(), 0, 255).astype(np.uint8)

        return [Clips([one(f) for f in c.frames], c.waves, c.captions) for c in clips]

    bound = coded(first)
    ends = [
        [replace(p, skin=("light", "dark")[(i + k) % 2]) for i, p in enumerate(drawn)] for k, drawn in enumerate(first)
    ]
    alike = [[replace(p, skin="tan", noise_seed=k) for p in first[0]] for k in range(draws)]
    sets = {
        "bound": bound,
        "teacher": coded([real_draw(puppets, k) for k in range(draws, 2 * draws)]),
        "blurred": changed(bound, lambda f: gaussian_filter(f, (0, 0.6, 0.6, 0))),
        "saturated": changed(bound, lambda f: 128 + 1.1 * (f - 128)),
        "no middle": coded(ends),
        "one tone and one way to say it": coded(alike),
    }
    scored = [clips.score() for clips in bound]
    columns = []
    for name, clips in sets.items():
        scores = scored if clips is bound else [c.score(b) for c, b in zip(clips, scored, strict=True)]
        distribution = reference.distances(by_prompt([embed(c, world) for c in clips]))
        role = name if name in ("bound", "teacher") else "student"
        columns.append(column(name, role, scores, [c.waves for c in clips], distribution))
    return Comparison(columns)


def test_real_and_spoilt_puppets_are_called_what_they_are():
    """One test, so that one process makes the clips."""
    found = spoilt_puppets(12, 3)
    columns = {own.name: own for own in found.columns}
    for name, own in columns.items():
        rows = {**found.quality([own], found.bound), **found.match([own], found.bound)}
        words = {row: rows[row]["verdict"] for row in SPOILT.get(name, {})}
        assert words == SPOILT.get(name, {}), name
        if name in ("bound", "teacher"):  # the floor: the same clips, and another real draw
            assert {row["verdict"] for row in rows.values()} <= {"equal", "undecided", "n/a"}, name
    for space in SPACES:
        measure = found.value(columns["teacher"], ROW[f"energy_{space}"])
        assert measure.low < 0.01
    # 12 prompts are too few for the retrieval among 20.
    retrieval = found.value(found.bound, ROW["sync_retrieval"])
    assert (retrieval.value, retrieval.reason) == (None, "needs 20 prompts with audio")
