"""Verdicts of the world checks from given values, and the exchange of prompts from a real checkpoint."""

import numpy as np
import pytest

from eval.stats import Measure
from eval.world_checks import ROWS, SWAP_STEPS, _compared, _exchanges, checks, run

FULL, UNGUIDED, FEW = "32 steps, CFG", "32 steps, no CFG", "8 steps, no CFG"
SAMPLERS = {
    FULL: {"steps": 32, "solver": "unipc", "guided": True},
    UNGUIDED: {"steps": 32, "solver": "unipc", "guided": False},
    FEW: {"steps": 8, "solver": "unipc", "guided": False},
}


def values(changes: dict, swap: dict, few: dict) -> dict:
    """`changes`: row -> (mean, deviation) of the difference from the own settings, over 60 prompts."""
    noise = np.random.default_rng(0).standard_normal(60)
    noise = (noise - noise.mean()) / noise.std()
    nothing = {key: np.full(60, np.nan) for key in ROWS}
    own = {**nothing, **{key: mean + deviation * noise for key, (mean, deviation) in changes.items()}}
    other = {**nothing, **{key: np.zeros(60) for key in changes}}
    column = {key: Measure(value, value, value, 60).to_dict() for key, value in few.items()}
    return {
        "full": FULL, "samplers": SAMPLERS, "columns": {FULL: column, FEW: column}, "swap": swap, "swaps": 40,
        "against_full": {UNGUIDED: _compared(own, other)},
    }  # fmt: skip


def verdicts(given: dict) -> dict[str, str]:
    return {check["about"]: check["verdict"] for check in checks(given)}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"onsets": (-0.2, 0.3), "layout_error": (0.0, 0.01)}, "yes"),
        ({"onsets": (0.0, 0.02), "layout_error": (0.2, 0.3)}, "yes"),  # lower is better
        ({"onsets": (0.0, 0.02), "layout_error": (-0.2, 0.3)}, "no"),  # better, and the other equal
        ({"onsets": (-0.05, 0.3), "layout_error": (0.0, 0.01)}, "undecided"),
        ({"amplitude": (-0.5, 0.1)}, "n/a"),  # no side of it is better
    ],
)
def test_guidance_matters_where_a_row_gets_worse(changes: dict, word: str) -> None:
    assert verdicts(values(changes, {}, {"attributes": 0.9}))["guidance matters"] == word


def test_what_was_not_sampled_is_not_judged() -> None:
    given = values({"onsets": (-0.2, 0.3)}, {}, {"attributes": 1.0})
    student = {"8 re-noise steps, no CFG": {"steps": 8, "solver": "renoise", "guided": False}}
    columns = dict.fromkeys(student, given["columns"][FEW])
    found = verdicts(
        {**given, "full": next(iter(student)), "samplers": student, "columns": columns, "against_full": {}}
    )
    assert {found[f"{steps} steps without training hurt"] for steps in (8, 4, 2, 1)} == {"n/a"}
    assert found["guidance matters"] == "n/a"


def test_early_steps_decide_where_half_of_them_go_a_quarter_of_the_way() -> None:
    late = [0.0] * 7 + [0.9, 1.0]
    even = [float(k) / SWAP_STEPS for k in range(SWAP_STEPS + 1)]
    found = verdicts(values({}, {"wall": {"to_other": late}, "side": {"to_any": even}}, {"attributes": 0.9}))
    assert found["the first half of the steps decides wall (to other)"] == "no"
    assert found["the first half of the steps decides side (to any)"] == "yes"


def test_an_attribute_that_no_step_decides_is_undecided() -> None:
    flat = [0.33] * 4 + [0.34] + [0.33] * 4
    found = verdicts(values({}, {"voice": {"to_any": flat}}, {"attributes": 0.9}))
    assert found["the first half of the steps decides voice (to any)"] == "undecided"


@pytest.mark.parametrize(
    ("few", "word"),
    [
        ({"attributes": 0.9, "vowels": 0.98}, "yes"),
        ({"attributes": 1.0, "vowels": 0.9, "onsets": 0.8}, "partly"),
        ({"attributes": 1.0, "vowels": 1.0, "onsets": 0.8}, "no"),
        ({"attributes": 0.9, "sync_r": 1.0}, "yes"),  # a correlation is no share
    ],
)
def test_rows_at_their_ceiling_are_told(few: dict, word: str) -> None:
    assert verdicts(values({}, {}, few))["no row is at its ceiling in 8 steps without guidance"] == word


def test_prompts_are_exchanged_in_one_attribute_alone() -> None:
    jobs = _exchanges("scene", 3, 0)
    assert {job.steps for job in jobs} == set(range(SWAP_STEPS + 1))
    for job in jobs:
        assert job.attribute in job.first.stated
        if job.kind == "to_any":
            assert job.then.stated == job.first.stated - {job.attribute}
        else:
            assert getattr(job.then, job.attribute) != getattr(job.first, job.attribute)
            first, then = job.first.caption.split(", "), job.then.caption.split(", ")
            assert sum(a != b for a, b in zip(first, then, strict=True)) == 1
    assert not any(job.kind == "to_any" for job in jobs if job.attribute == "wall")


@pytest.mark.slow
def test_an_exchange_after_no_step_and_after_all_shows_the_other_and_the_first_prompt(tmp_path) -> None:
    found = run("tiny/base", prompts=5, swaps=4, output=str(tmp_path), progress=False)
    assert (tmp_path / "sheet.png").exists()
    import json

    shares = json.loads((tmp_path / "world_checks.json").read_text())["swap"]["wall"]["to_other"]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert np.all(np.diff(shares) >= -0.26)
    assert found["checks"]
