"""Health signals: what they measure, and when they end a run."""

import math

import pytest
import torch

from magihuman.distill.collapse_monitor import Health, HealthLimits, spread, standard_deviation
from magihuman.errors import UserError
from magihuman.flow.sampling import Pair


def sampler(scale: float, modes: int):
    """Clips that are one of `modes` levels, times `scale`."""

    def run(texts, generators, shape):
        levels = torch.tensor([float(torch.randint(modes, (1,), generator=g)) for g in generators])
        noise = torch.stack([torch.randn(shape[0], generator=g) for g in generators])
        video = scale * (levels.view(-1, 1, 1, 1, 1) + 0.01 * noise)
        return Pair(video, scale * torch.stack([torch.randn(shape[1], generator=g) for g in generators]))

    return run


def health(begin: float = 1.0, **limits) -> Health:
    checked = Health(HealthLimits(prompts=3, samples=8, **limits), seed=5)
    like = Pair(torch.zeros(3, 2, 3, 4, 4), torch.zeros(3, 9, 4))
    checked.refer([torch.zeros(2, 5)] * 3, like, sampler(1.0, 3))
    checked.look(sampler(begin, 3))
    return checked


def test_spread_is_the_mean_distance_within_prompts_only() -> None:
    latents = torch.zeros(4, 1, 2, 1, 1)
    latents[1] = 3.0  # prompt 0: 0 and 3; prompt 1: 7 and 8, far from the first
    latents[2], latents[3] = 7.0, 8.0
    assert spread(latents, 2) == pytest.approx((3 + 1) / 2)
    shaken = latents + torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1)  # what only moves in time does not count
    assert spread(shaken, 2) == pytest.approx(2.0)
    assert standard_deviation(torch.tensor([1.0, -1.0])) == pytest.approx(math.sqrt(2))


def test_the_teacher_itself_is_healthy_and_saturation_shows() -> None:
    checked = health()
    same = checked.look(sampler(1.0, 3))
    assert all(value == pytest.approx(1.0) for value in same.values())
    louder = checked.look(sampler(1.5, 3))
    assert louder["health/std_video"] == pytest.approx(1.5)
    assert louder["health/std_audio"] == pytest.approx(1.5)


def test_a_forgotten_mode_ends_the_run_after_as_many_looks_as_allowed_in_a_row() -> None:
    checked = health(patience=3, std=(0.0, 9.0))
    collapsed = checked.look(sampler(1.0, 1))
    assert collapsed["health/spread_video"] < 0.1
    checked.judge(collapsed, 20)
    checked.judge(collapsed, 40)
    checked.judge(checked.look(sampler(1.0, 3)), 60)  # recovered: counted anew
    checked.judge(collapsed, 80)
    again = health(patience=3, std=(0.0, 9.0))
    again.load_state_dict(checked.state_dict())  # as a resumed run does
    again.judge(collapsed, 100)
    with pytest.raises(
        UserError, match=r"spread_video is .* at step 120.*it forgets modes: raise recipe.critic"
    ):
        again.judge(collapsed, 120)


def test_a_student_that_begins_outside_of_the_limits_has_to_get_no_worse() -> None:
    checked = health(begin=0.5, patience=1)
    for scale in (0.5, 0.48, 0.7, 1.0):
        checked.judge(checked.look(sampler(scale, 3)), 20)
    with pytest.raises(UserError, match=r"health/spread_video .*in a row; raise recipe.critic"):
        health(std=(0.0, 9.0), patience=1).judge({"health/spread_video": 1.6}, 20)  # too many is not too few
    for scale in (0.45, 1.4):  # worse, and too far on the other side
        with pytest.raises(UserError, match=r"health/std_video is .*, outside of 0.475 to 1.25"):
            checked.judge(checked.look(sampler(scale, 3)), 40)


def test_ratios_come_from_all_turns_since_the_last_look() -> None:
    checked = health()
    one, zero = torch.ones(2), torch.zeros(2)
    for critic, teacher in ((2.0, 1.0), (4.0, 3.0)):
        checked.remember(
            {
                "critic_error/video": (critic * one, one),
                "teacher_error/video": (teacher * one, one),
                "critic_error/audio": (one, zero),  # the whole sound was given
                "teacher_error/audio": (one, zero),
                "dm/video": (4 * one, one),
                "dm/audio": (one, one),
            }
        )
    assert checked.ratios() == {"health/lag_video": 1.5, "health/balance": 0.25}
    assert checked.ratios() == {}
