"""Columns of the same prompts: statistics, intervals, verdicts; distances to real puppets see what they are for."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data.tiny.puppets import SKINS, draw_puppet, synthesise
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
from eval.paired import ROWS, Column, Comparison, column, deviation_of, energy_in, skin_tones, weights
from eval.puppet_speech import Recognised, pitch, recognise
from magihuman.codecs.bundle import load_bundle

ROW = {row.name: row for row in ROWS}
PROMPTS, DRAWS = 20, 3


def made(name: str, role: str, *, base: float = 0.0, skins: np.ndarray | None = None, seed: int = 0) -> Column:
    """A column of made-up values: every one `base` more than a prompt's own, which all columns share."""
    shared = np.random.default_rng(0).uniform(0.9, 1.1, (PROMPTS, 1)).repeat(DRAWS, 1)
    noise = np.random.default_rng(seed).normal(0, 0.01, (PROMPTS, DRAWS)) if seed else 0
    names = [name for name, metric in CLIP_METRICS.items() if metric.compared]
    values = dict.fromkeys((*names, "sync_retrieval", "nearest", "own", "semitones", "start_ms"), shared + base + noise)
    values["other"] = values["own"] * 0.3
    values["end_ms"] = values["start_ms"]
    tones = np.tile(np.arange(3), (PROMPTS, 1)) if skins is None else skins
    terms = tuple(np.zeros((PROMPTS, PROMPTS)) for _ in range(3))
    dispersion = dict.fromkeys(SPACES, shared[:, 0] + base)
    distribution = DistributionMetrics(dispersion, shared + base, dict.fromkeys(SPACES, terms))  # type: ignore[arg-type]
    return Column(name, role, values, tones, distribution)


def compared(*others: Column) -> Comparison:
    return Comparison([made("bound", "bound"), made("teacher", "teacher", base=-0.02), *others])


def test_effective_number_of_skin_tones_in_closed_form():
    alone = np.ones((1, 100))

    def number(*counts: int) -> float:
        tones = np.repeat(np.arange(3), counts)[:, None]
        return float(skin_tones(replace(made("a", "student"), skins=tones), made("b", "bound"), alone)[0])

    assert number(0, 100, 0) == pytest.approx(1)
    assert number(50, 0, 50) == pytest.approx(2)
    assert number(25, 53, 22) == pytest.approx(2.763, abs=1e-3)  # 8 re-noise steps of tiny/base


def test_deviation_within_a_prompt_leaves_out_what_was_not_heard():
    values = np.array([[1.0, 3.0, np.nan], [5.0, 9.0, 7.0], [np.nan, 2.0, np.nan]])
    own = Column("a", "student", {"x": values}, np.zeros((3, 3), int), made("b", "bound").distribution)
    found = deviation_of("x")(own, own, np.ones((1, 3)))
    assert found is not None
    assert found[0] == pytest.approx(np.sqrt((2 + 4) / 2))  # variances 2 and 4; the third prompt has one value
    nothing = Column("a", "student", {"x": values[2:]}, np.zeros((1, 3), int), own.distribution)
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
        ("sharpness", 0.01, -0.10, "better"),
        ("sharpness", 0.12, -0.02, "worse"),  # over-shoot is an error as large as blur
        ("sharpness", 0.12, -0.20, "better"),
        ("attributes", 0.05, 0.0, "better"),
        ("attributes", -0.05, 0.0, "worse"),
        ("flicker", 0.05, 0.0, "worse"),
        ("nearest", -0.05, 0.0, "better"),
        ("attributes", 0.0, 0.0, "within noise"),
    ],
)
def test_verdicts_know_which_way_is_better(row, student, baseline, word):
    found = compared(made("few", "baseline", base=baseline), made("student", "student", base=student))
    _, _, few, own = found.columns
    verdict = found.against(own, few, ROW[row])
    assert verdict["verdict"] == word
    assert verdict["change"]["value"] == pytest.approx(student - baseline, abs=1e-9)


def test_differences_are_paired():
    """Prompts differ by .1, columns by .03: unpaired intervals overlap, paired ones have no width."""
    found = compared(made("student", "student", base=0.01))
    own, teacher = found.columns[2], found.teacher
    value, other = found.value(own, ROW["sharpness"]), found.value(teacher, ROW["sharpness"])
    assert value.low < other.high
    change = found.against(own, teacher, ROW["sharpness"])["change"]
    assert change["low"] == pytest.approx(0.03)
    assert change["high"] == pytest.approx(0.03)


def test_noise_is_called_noise():
    found = compared(made("few", "baseline", seed=5), made("student", "student", seed=6))
    words = [found.against(found.columns[3], found.columns[2], ROW[n])["verdict"] for n in ("attributes", "sharpness")]
    assert words == ["within noise", "within noise"]


def test_prompts_not_clips_are_resampled():
    """Three equal clips per prompt are no more evidence than one."""
    rng = np.random.default_rng(3)
    prompts = rng.normal(size=(PROMPTS, 1))
    widths = []
    for draws in (1, DRAWS):
        some = made("a", "student")
        values = {key: prompts.repeat(draws, 1) for key in some.values}
        columns = [
            replace(some, name=role, role=role, values=values, skins=some.skins[:, :draws])
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


@pytest.mark.parametrize(
    ("counts", "word"), [((20, 20, 20), "kept"), ((0, 60, 0), "lost"), ((29, 2, 29), "lost"), ((22, 27, 11), "kept")]
)
def test_diversity_has_to_stay_within_a_tenth(counts, word):
    tones = np.random.default_rng(2).permutation(np.repeat(np.arange(3), counts)).reshape(PROMPTS, DRAWS)
    found = compared(made("student", "student", skins=tones))
    kept = found.kept(found.columns[2], ROW["skin_tones"])
    assert kept["verdict"] == word
    assert kept["ratio"]["low"] <= kept["ratio"]["value"] <= kept["ratio"]["high"]
    over = compared(made("student", "student", base=0.3))
    assert over.kept(over.columns[2], ROW["spread_look"])["verdict"] == "over"


def test_columns_of_other_prompts_are_refused():
    other = made("student", "student")
    with pytest.raises(ValueError, match="same prompts"):
        compared(replace(other, skins=other.skins[:5]))


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
    "blurred": {"nearest", "energy_look", "sharpness"},
    "saturated": {"nearest", "energy_look", "sharpness", "amplitude"},
    "no middle": {"energy_look", "skin_tones"},
    "one tone and one way to say it": {
        "energy_look", "energy_motion", "skin_tones", "spread_look", "spread_voice", "pitch", "timing",
    },
}  # fmt: skip
LOST = {
    "no middle": {"skin_tones"},
    "one tone and one way to say it": {"skin_tones", "spread_look", "spread_voice", "pitch", "timing"},
}


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
    for name, rows in SPOILT.items():
        words = {row: found.against(columns[name], found.bound, ROW[row])["verdict"] for row in rows}
        assert words == dict.fromkeys(rows, "worse"), name
    for name, rows in LOST.items():
        for row in rows:
            kept = found.kept(columns[name], ROW[row])
            assert (kept["verdict"], kept["ratio"]["status"]) == ("lost", "ok"), (name, row)
    # The floor, another real draw: of all rows, chance may call one or two of 19 worse.
    words = [found.against(found.teacher, found.bound, row)["verdict"] for row in ROWS if row.direction != "target"]
    assert words.count("worse") <= 1
    for space in SPACES:
        measure = found.value(found.teacher, ROW[f"energy_{space}"])
        assert measure.low < 0.01
    # 12 prompts are too few for the retrieval among 20.
    retrieval = found.value(found.bound, ROW["sync_retrieval"])
    assert (retrieval.value, retrieval.reason) == (None, "needs 20 prompts with audio")
