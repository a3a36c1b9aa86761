"""Verdicts of the world checks from given values, and the exchange of prompts from a real checkpoint."""

import numpy as np
import pytest

from eval.stats import Measure
from eval.world_checks import SWAP_STEPS, _exchanges, checks, run


def measure(value: float, half: float = 0.01) -> dict:
    return Measure(value, value - half, value + half, 60).to_dict()


def values(unguided: dict, swap: dict, few: dict) -> dict:
    column = {key: measure(value) for key, value in few.items()}
    return {
        "full": "32 steps, CFG",
        "columns": {"32 steps, CFG": column, "8 steps, no CFG": column},
        "against_full": {"32 steps, no CFG": {key: measure(*change) for key, change in unguided.items()}},
        "swap": swap,
    }


def verdicts(given: dict) -> dict[str, str]:
    return {check["about"]: check["verdict"] for check in checks(given)}


def test_guidance_matters_where_several_rows_get_worse() -> None:
    few = {"attributes": 0.9}
    for unguided, word in (
        ({"onsets": (-0.05,), "layout_error": (0.2,)}, "yes"),  # one is higher, the other lower is better
        ({"onsets": (-0.05,), "layout_error": (-0.2,)}, "undecided"),
        ({"onsets": (-0.05, 0.06), "layout_error": (0.5, 0.6)}, "no"),
        ({"amplitude": (-0.5,)}, "no"),  # no side of it is better
    ):
        assert verdicts(values(unguided, {}, few))["guidance matters"] == word


def test_early_steps_decide_where_half_of_them_go_a_quarter_of_the_way() -> None:
    late = [0.0] * 7 + [0.9, 1.0]
    even = [float(k) / SWAP_STEPS for k in range(SWAP_STEPS + 1)]
    found = verdicts(values({}, {"wall": {"to_other": late}, "side": {"to_any": even}}, {"attributes": 0.9}))
    assert found["the first half of the steps decides wall (to other)"] == "no"
    assert found["the first half of the steps decides side (to any)"] == "yes"


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
    assert not any(job.kind == "to_any" for job in jobs if job.attribute in ("wall", "camera"))


@pytest.mark.slow
def test_an_exchange_after_no_step_and_after_all_shows_the_other_and_the_first_prompt(tmp_path) -> None:
    found = run("tiny/base", prompts=4, swaps=4, output=str(tmp_path), progress=False)
    assert (tmp_path / "sheet.png").exists()
    import json

    shares = json.loads((tmp_path / "world_checks.json").read_text())["swap"]["wall"]["to_other"]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert np.all(np.diff(shares) >= -0.26)
    assert found["checks"]
