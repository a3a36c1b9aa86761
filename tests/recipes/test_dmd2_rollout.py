"""Rollouts of the student are those of inference, and nothing is computed twice."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from torch import Tensor
from toy_dmd2 import Alone, Watched, make_context

from inference.sampling import sample
from magihuman.distill.fake_score_settings import FakeScoreSettings
from magihuman.distill.rollout import MicroBatch, micro_batches, roll_out, sampler
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import Conditioning, Pair, draw_noise, seeded
from magihuman.flow.sigmas import sigma_grid
from magihuman.io.export import Sampling
from magihuman.training.rng import BatchRng

GUIDANCE = Guidance(video_high=3.0, video_low=1.5, threshold=500, audio=2.0)
RENOISE = Sampling("renoise", 8, 5.0)
SHAPE = (3, 3, 4, 4), (9, 4)


def part(first_frame: bool = False) -> MicroBatch:
    """Three samples with texts of different lengths."""
    batch = training_stub.batch(range(3))
    given = Conditioning.nothing(Pair(batch["video"], batch["audio"]))
    if first_frame:
        given.mask.video[:, :, 0] = 0
    return MicroBatch(batch["text"], given, seeded([5, 6, 7]), batch["index"])


def made(folder: Path, kind: type[Alone] = Alone, **settings: Any) -> Any:
    recipe = kind(make_context(folder, guidance=GUIDANCE), **{"steps": 8, **settings})
    recipe.configure_model()
    return recipe


def followed(network: Any, some: MicroBatch, settings: Sampling, **more: Any) -> tuple[list[Pair], Pair]:
    """States after every step, and the end, of inference."""
    states: list[Pair] = []
    end = sample(
        network.eval(), some.text, more.pop("negative_text", None), SHAPE, settings.steps, settings.solver,
        settings.guidance, settings.shift, seeded([5, 6, 7]), cfg_passes=2,
        progress=lambda i, n, video, audio: states.append(Pair(video, audio)), **more,
    )  # fmt: skip
    return states, Pair(*end)


def same(a: Pair, b: Pair) -> bool:
    return torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio)


@pytest.mark.parametrize("first_frame", [False, True])
def test_the_rollout_is_what_inference_samples(tmp_path: Path, first_frame: bool) -> None:
    recipe, some = made(tmp_path), part(first_frame)
    rollout = recipe.rollout(some)
    more = {"image_latent": some.conditioning.latents.video[:, :, :1]} if first_frame else {}
    states, end = followed(recipe.networks.student, some, recipe.sampling, **more)
    assert len(rollout.states) == len(states) == 8
    for mine, theirs in zip(rollout.states[1:], states, strict=False):
        assert same(mine, some.conditioning.insert(theirs))
    assert same(rollout.end, end)
    assert same(rollout.end, rollout.estimates[-1])  # the last step ends at its data estimate

    # What a turn takes from it: each sample its own step.
    steps = torch.tensor([0, 7, 3])
    state, estimate = rollout.state(steps), rollout.estimate(steps)
    for b, k in enumerate(steps.tolist()):
        assert torch.equal(state.video[b], rollout.states[k].video[b])
        assert torch.equal(estimate.audio[b], rollout.estimates[k].audio[b])
    assert torch.equal(rollout.sigma(steps), rollout.sigmas[steps])

    other = seeded([5, 6, 8])  # the control: another seed, another clip
    velocity = partial(recipe.velocity, "student", some.text)
    moved = roll_out(recipe.sampling, velocity, other, some.conditioning)
    assert torch.equal(moved.end.video[:2], end.video[:2])
    assert not torch.equal(moved.end.video[2], end.video[2])


def test_with_given_sound_the_video_follows_inference(tmp_path: Path) -> None:
    recipe, some = made(tmp_path), part()
    some.conditioning.mask.audio[:] = 0
    rollout = recipe.rollout(some)
    # Inference draws nothing for a given sound, so it gets the rollout's draws.
    noise = draw_noise(SHAPE, seeded([5, 6, 7]), 8)
    sound = some.conditioning.latents.audio
    states, end = followed(recipe.networks.student, some, recipe.sampling, noise=noise, audio_latent=sound)
    assert all(torch.equal(a.video, b.video) for a, b in zip(rollout.states[1:], states, strict=False))
    assert same(rollout.end, end)
    assert torch.equal(end.audio, sound)


def test_the_teacher_is_looked_at_as_inference_samples_it(tmp_path: Path) -> None:
    recipe, some = made(tmp_path), part()
    settings = recipe.teacher_sampling
    assert (settings.solver, settings.guidance) == ("unipc", GUIDANCE)
    guided = roll_out(
        settings, lambda x, sigma: recipe.teacher_velocity(x, some.text, sigma)[0], some.generators, some.conditioning
    )
    null = [recipe.context.null_text] * 3
    states, end = followed(recipe.networks.teacher, some, settings, negative_text=null)
    assert all(same(a, b) for a, b in zip(guided.states[1:], states, strict=False))
    assert same(guided.end, end)


def test_samples_do_not_depend_on_how_many_go_through_the_network_at_once(tmp_path: Path) -> None:
    recipe = made(tmp_path)
    texts = training_stub.batch(range(5))["text"]

    def run(size: int | None) -> Pair:
        sample = sampler(RENOISE, partial(recipe.velocity, "student"), torch.device("cpu"), size)
        return sample(texts, seeded(range(5)), SHAPE)

    for a, b in zip(run(2), run(None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_grid_is_the_released_one() -> None:
    released = torch.tensor([0.9998, 0.972, 0.937, 0.893, 0.833, 0.750, 0.625, 0.416, 0.0])
    assert (sigma_grid(8, 5.0) - released).abs().max() < 5e-4  # as far as it is written out
    u = 0.999 * (1 - torch.arange(9, dtype=torch.float64) / 8)
    assert (sigma_grid(8, 5.0) - 5 * u / (1 + 4 * u)).abs().max() < 1e-6


def test_noise_of_sound_and_video_has_nothing_in_common() -> None:
    noise = draw_noise(((2, 4, 5, 5), (25, 8)), seeded(range(16)), 3)  # 200 numbers each
    draws = [x.flatten() for pair in (noise.start, *noise.steps) for x in pair]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(8)
    assert correlation.abs().max() < 4 / 3200**0.5
    assert torch.corrcoef(torch.stack([draws[0], draws[0]]))[0, 1] > 0.99  # what shared noise would give


def test_micro_batches_hold_each_sample_with_its_own_position_and_generator() -> None:
    batch = {**training_stub.batch(range(5)), "index": torch.tensor([40, 41, 42, 43, 44])}
    rng = BatchRng(0, 7, batch["index"])
    found = list(micro_batches(batch, rng, first_frame=0.5, audio_conditioning=0.5, gan=False, size=2))
    assert [some.index.tolist() for some in found] == [[40, 41], [42, 43], [44]]
    assert [g for some in found for g in some.generators] == rng.generators
    assert [text for some in found for text in some.text] == batch["text"]

    again = BatchRng(0, 7, batch["index"])
    first, audio = again.chance(0.5), again.chance(0.5)
    assert not torch.equal(first, audio)
    whole = [torch.cat(parts) for parts in zip(*(some.conditioning.mask for some in found), strict=True)]
    assert torch.equal(whole[0][:, 0, 0, 0, 0] == 0, first)
    assert torch.equal(whole[1][:, 0, 0] == 0, audio)
    assert whole[0][:, :, 1:].all()
    latents = torch.cat([some.conditioning.latents.video for some in found])
    assert torch.equal(latents, batch["video"])


COSTS = {True: 4, False: 1}
"""In units of a pass without gradients: with checkpointing, one with them costs four."""


@pytest.mark.parametrize(
    ("updates", "samples_per_rollout", "steps", "units"), [(5, 6, 8, 35), (2, 6, 4, 19), (5, 3, 8, 43), (5, 2, 8, 51)]
)
def test_updates_and_passes_of_a_cycle_are_counted(
    tmp_path: Path, updates: int, samples_per_rollout: int, steps: int, units: int
) -> None:
    """A cycle of 8 steps and 5 updates is one rollout 8, fake score 5 x 4, student 4, fake score 1, guided teacher 2."""
    warmup, cycles = 2, 5
    fake_score = FakeScoreSettings(updates=updates, warmup=warmup, samples_per_rollout=samples_per_rollout)
    recipe = made(tmp_path, Watched, steps=steps, fake_score=fake_score)
    passes, moved = [], []
    for cycle in range(cycles):
        before = [w.clone() for w in recipe.networks.weights("student").values()]
        recipe.calls.clear()
        recipe.training_step({**training_stub.batch(range(2)), "index": torch.tensor([0, 1]) + 2 * cycle}, 0)
        passes.append(sum(COSTS[call.gradients] for call in recipe.calls))
        after = recipe.networks.weights("student").values()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert passes == [units - 7] * warmup + [units] * 3
    assert moved == [False] * warmup + [True] * 3
    assert recipe.student_updates == recipe.ema.updates == cycles - warmup == 3
    assert recipe.fake_score_updates == updates * cycles
    student, fake_score_optimizer = recipe.made[0]
    assert {int(s["step"]) for s in student.state.values()} == {3}
    assert {int(s["step"]) for s in fake_score_optimizer.state.values()} == {updates * cycles}
    assert recipe.step == recipe.batches == cycles


def test_every_step_is_learned_equally_often(tmp_path: Path) -> None:
    recipe = made(tmp_path, first_step=2)
    counts = torch.zeros(8, dtype=torch.long)
    for batch in range(200):
        recipe.batches = batch
        some = part()
        some.index = torch.arange(12) + 12 * batch
        chosen = recipe.choose_steps(some, 5, 2)
        assert chosen.unique().tolist() == [2, 3, 4, 5, 6, 7]  # stratified: a batch has them all
        counts += torch.bincount(chosen, minlength=8)
    assert counts.tolist() == [0, 0] + [400] * 6
    firsts: Tensor = torch.stack([recipe_step(recipe, batch) for batch in range(600)])
    assert torch.bincount(firsts, minlength=8)[2:].min() > 60  # a position is not tied to a step


def recipe_step(recipe: Alone, batch: int) -> Tensor:
    recipe.batches = batch
    some = part()
    some.index = torch.zeros(1, dtype=torch.long)
    return recipe.choose_steps(some, 0, 2)[0]
