"""Collapse monitor: its statistics, and when it ends a run."""

import math

import pytest
import torch

from magihuman.distill.collapse_monitor import CollapseMonitor, MonitorSettings, diversity, standard_deviation
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


def monitor(begin: float = 1.0, **limits) -> CollapseMonitor:
    checked = CollapseMonitor(MonitorSettings(prompts=3, samples=8, **limits), seed=5)
    like = Pair(torch.zeros(3, 2, 3, 4, 4), torch.zeros(3, 9, 4))
    checked.sample_teacher([torch.zeros(2, 5)] * 3, like, sampler(1.0, 3))
    checked.measure(sampler(begin, 3))
    return checked


def test_spread_is_the_mean_distance_within_prompts_only() -> None:
    latents = torch.zeros(4, 1, 2, 1, 1)
    latents[1] = 3.0  # prompt 0: 0 and 3; prompt 1: 7 and 8, far from the first
    latents[2], latents[3] = 7.0, 8.0
    assert diversity(latents, 2) == pytest.approx((3 + 1) / 2)
    motion = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1) * torch.tensor([1.0, -1, 5, 0]).view(4, 1, 1, 1, 1)
    assert diversity(latents + motion, 2) == pytest.approx(2.0)  # what only moves in time does not count
    assert standard_deviation(torch.tensor([1.0, -1.0])) == pytest.approx(math.sqrt(2))


def test_the_teacher_passes_and_saturation_is_measured() -> None:
    checked = monitor()
    same = checked.measure(sampler(1.0, 3))
    assert all(value == pytest.approx(1.0) for value in same.values())
    louder = checked.measure(sampler(1.5, 3))
    assert louder["monitor/std_video"] == pytest.approx(1.5)
    assert louder["monitor/std_audio"] == pytest.approx(1.5)


def test_processes_share_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    like = Pair(torch.zeros(4, 2, 3, 4, 4), torch.zeros(4, 9, 4))
    for processes, together, own in ((1, 1, 4), (2, 1, 2), (3, 1, 2), (64, 1, 1), (2, 2, 4), (8, 4, 2), (6, 2, 2)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda n=processes: n)
        shared = CollapseMonitor(MonitorSettings(prompts=4, samples=2), seed=5)
        shared.sample_teacher([torch.zeros(2, 5)] * 4, like, sampler(1.0, 3), together)
        assert len(shared.reference["texts"]) == own


def test_the_teacher_is_sampled_once_and_the_first_student_is_remembered() -> None:
    checked = monitor(begin=0.5)
    before = dict(checked.reference)
    like = Pair(torch.zeros(3, 2, 3, 4, 4), torch.zeros(3, 9, 4))
    checked.sample_teacher([torch.ones(2, 5)] * 3, like, sampler(4.0, 3))
    checked.measure(sampler(0.9, 3))
    assert checked.reference == before
    assert before["start"]["monitor/std_video"] == pytest.approx(0.5)


def test_a_forgotten_mode_ends_the_run_after_as_many_looks_as_allowed_in_a_row() -> None:
    checked = monitor(patience=3, std=(0.0, 9.0))
    collapsed = checked.measure(sampler(1.0, 1))
    assert collapsed["monitor/diversity_video"] < 0.1
    checked.check(collapsed, 20)
    checked.check(collapsed, 40)
    checked.check(checked.measure(sampler(1.0, 3)), 60)  # recovered: counted anew
    checked.check(collapsed, 80)
    again = monitor(patience=3, std=(0.0, 9.0))
    again.load_state_dict(checked.state_dict())  # as a resumed run does
    again.check(collapsed, 100)
    with pytest.raises(UserError, match=r"diversity_video is .* at step 120.*mode collapse: raise recipe.fake_score"):
        again.check(collapsed, 120)


def test_a_student_that_begins_outside_of_the_limits_has_to_get_no_worse() -> None:
    checked = monitor(begin=0.5, patience=1)
    for scale in (0.5, 0.48, 0.7, 1.0):
        checked.check(checked.measure(sampler(scale, 3)), 20)
    with pytest.raises(UserError, match=r"monitor/diversity_video .*in a row; raise recipe.fake_score"):
        monitor(std=(0.0, 9.0), patience=1).check({"monitor/diversity_video": 1.6}, 20)  # too many is not too few
    for scale in (0.45, 1.4):  # below and above the allowed range
        with pytest.raises(UserError, match=r"monitor/std_video is .*, outside of 0.475 to 1.25"):
            checked.check(checked.measure(sampler(scale, 3)), 40)


def test_ratios_come_from_all_turns_since_the_last_look() -> None:
    checked = monitor()
    one, zero = torch.ones(2), torch.zeros(2)
    for fake_score, teacher in ((2.0, 1.0), (4.0, 3.0)):
        checked.add(
            {
                "fake_score_error/video": (fake_score * one, one),
                "teacher_error/video": (teacher * one, one),
                "fake_score_error/audio": (one, zero),  # the whole sound was given
                "teacher_error/audio": (one, zero),
                "dm/video": (4 * one, one),
                "dm/audio": (one, one),
            }
        )
    assert checked.ratios() == {"monitor/lag_video": 1.5, "monitor/balance": 0.25}
    assert checked.ratios() == {}
