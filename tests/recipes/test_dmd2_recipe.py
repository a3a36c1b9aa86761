"""The recipe DMD-2: conditioning masks, order of tokens, roles of the networks, resume, several processes."""

import csv
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from processes import Launcher, assert_same, final_state
from safetensors.torch import load_file, save_file
from small_dit import patchify_target
from toy_dmd2 import Watched, make_context

from magihuman.distill.collapse_monitor import MonitorSettings
from magihuman.distill.discriminator import GanSettings
from magihuman.distill.fake_score_settings import FakeScoreSettings
from magihuman.distill.objective import fake_score_loss, matching_gradient, surrogate_loss
from magihuman.distill.rollout import MicroBatch, Rollout, micro_batches
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.path import add_noise
from magihuman.flow.sampling import Conditioning, Pair
from magihuman.io.text_features import write_text_features
from magihuman.models.tokens import patchify

GUIDANCE = Guidance(3.0, 1.5, 500, 2.0)


def made(folder: Path, *, precision: str = "fp32", **settings: Any) -> Watched:
    chosen = make_context(folder, guidance=GUIDANCE, precision=precision, lr=1e-2)
    fake_score = FakeScoreSettings(lr=1e-2, updates=2, warmup=0)
    recipe = Watched(chosen, **{"steps": 3, "fake_score": fake_score, **settings})
    recipe.configure_model()
    return recipe


# What is given is seen clean by all networks, and counts nowhere.


def conditioned() -> MicroBatch:
    """Four samples: nothing given, the first frame, the sound, both."""
    batch = training_stub.batch(range(4))
    given = Conditioning.nothing(Pair(batch["video"], batch["audio"]))
    given.mask.video[[1, 3], :, 0] = 0
    given.mask.audio[[2, 3]] = 0
    generators = [torch.Generator().manual_seed(b) for b in range(4)]
    return MicroBatch(batch["text"], given, generators, batch["index"])


def share_of_clean_inputs(recipe: Watched, part: MicroBatch) -> dict[str, float]:
    """By role: of the calls, how many had all that is given as it was given."""
    clean = part.conditioning.latents
    found: dict[str, list[bool]] = {}
    for call in recipe.calls:
        whole = torch.equal(call.x.video[[1, 3], :, 0], clean.video[[1, 3], :, 0])
        whole &= torch.equal(call.x.audio[[2, 3]], clean.audio[[2, 3]])
        found.setdefault(call.role, []).append(whole)
    return {role: sum(values) / len(values) for role, values in found.items()}


def test_conditions_are_clean_in_every_input_and_get_no_gradient(tmp_path: Path, monkeypatch) -> None:
    recipe, part = made(tmp_path), conditioned()
    for turn in range(3):
        recipe.fake_score_objective(part, turn).backward()
    recipe.student_objective(part).backward()
    assert share_of_clean_inputs(recipe, part) == {"student": 1, "fake_score": 1, "teacher": 1}
    counts = {role: sum(call.role == role for call in recipe.calls) for role in ("student", "fake_score", "teacher")}
    assert counts == {"student": 3 + 1, "fake_score": 3 + 1, "teacher": 2}  # the teacher with and without the text

    trained = [call for call in recipe.calls if call.gradients]
    assert [call.role for call in trained] == ["fake_score"] * 3 + ["student"]
    for call in trained:
        video, audio = call.v.video.grad, call.v.audio.grad
        assert torch.count_nonzero(video[[1, 3], :, 0]) == torch.count_nonzero(audio[[2, 3]]) == 0
        assert (video[[0, 2], :, 0] != 0).any()
        assert all((x != 0).any() for x in (video[:, :, 1:], audio[:2]))

    # The control: inputs that nobody puts the conditions into are found, in all three networks.
    broken, part = made(tmp_path), conditioned()
    monkeypatch.setattr(Conditioning, "insert", lambda self, generated: generated)
    broken.fake_score_objective(part, 0)
    broken.student_objective(part)
    assert share_of_clean_inputs(broken, part) == {"student": 0, "fake_score": 0, "teacher": 0}


def test_a_masked_objective_is_that_of_what_is_left(tmp_path: Path) -> None:
    x0, noise, real, fake = torch.randn(4, 2, 3, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    sigma, mask = torch.tensor([0.3, 0.8]), torch.ones(2, 1, 5, 1, 1)
    mask[:, :, 0] = 0
    real[:, :, 0] = 1e6  # nonsense where nothing counts
    noisy, rest = add_noise(x0, noise, sigma), torch.ones(2, 1, 4, 1, 1)
    gradient, _ = matching_gradient(x0, noisy, real, fake, sigma, mask)
    alone, _ = matching_gradient(*(x[:, :, 1:] for x in (x0, noisy, real, fake)), sigma, rest)
    torch.testing.assert_close(gradient[:, :, 1:], alone)
    assert not gradient[:, :, 0].any()
    torch.testing.assert_close(surrogate_loss(x0, gradient, mask), surrogate_loss(x0[:, :, 1:], alone, rest))
    torch.testing.assert_close(
        fake_score_loss(real, x0, noise, mask), fake_score_loss(*(x[:, :, 1:] for x in (real, x0, noise)), rest)
    )


def test_clips_without_sound_and_stills_are_distilled_too(tmp_path: Path) -> None:
    for kind in ({"sound": False}, {"sound": False, "frames": 1}):
        recipe = made(tmp_path, first_frame=1.0, audio_conditioning=1.0)
        recipe.training_step(training_stub.batch(range(2), **kind), 0)
        figures = recipe.meter.flush()
        assert figures["dm/video"] > 0
        assert figures["not_finite"] == figures["dm_not_finite"] == 0
        assert "dm/audio" not in figures
        assert all(w.isfinite().all() for w in recipe.networks.weights("student").values())
        assert recipe.student_updates == 1


# The networks write tokens in the order that inference reads, which is not the order in which they are read.


def test_a_learned_sample_is_in_the_order_that_inference_reads(tmp_path: Path) -> None:
    recipe = made(tmp_path)
    batch, draw = training_stub.batch([0]), torch.Generator().manual_seed(3)
    x0 = Pair(batch["video"], batch["audio"])
    noise = Pair(*(torch.randn(x.shape, generator=draw) for x in x0))
    sigma, everywhere = torch.tensor([0.6]), Conditioning.nothing(x0).mask
    noisy = Pair(*(add_noise(a, b, sigma) for a, b in zip(x0, noise, strict=True)))
    fake_score = recipe.networks.fake_score
    optimizer = torch.optim.Adam(fake_score.parameters(), lr=1e-2)
    for _ in range(150):
        velocity = recipe.velocity("fake_score", batch["text"], noisy, Pair(sigma, sigma))
        losses = [fake_score_loss(*of) for of in zip(velocity, x0, noise, everywhere, strict=True)]
        optimizer.zero_grad()
        sum(loss.sum() for loss in losses).backward()
        optimizer.step()
    assert losses[0].item() < 1e-3

    written: list[torch.Tensor] = []
    fake_score.model.register_forward_hook(lambda _model, _inputs, outputs: written.append(outputs[0]))
    with torch.no_grad():
        recipe.velocity("fake_score", batch["text"], noisy, Pair(sigma, sigma))
    target = noise.video - x0.video
    tokens = written[0].reshape(1, -1, 12)
    assert float((tokens - patchify_target(target, 2)).square().mean()) < 1e-3
    assert float((tokens - patchify(target, 2)).square().mean()) > 0.1  # the input's order


# Who is trained when, in which precision.


class Phases(Watched):
    """Notes at every update which networks have gradients before it, and after it."""

    def with_gradients(self) -> list[str]:
        roles = ("student", "fake_score", "teacher")
        return [n for n in roles if any(w.grad is not None for w in self.networks.role(n).parameters())]

    def update(self, role: str, optimizer: Any, heads: bool = False) -> None:
        before = self.with_gradients()
        super().update(role, optimizer, heads)
        self.held.append((role, before, self.with_gradients()))


def phases(folder: Path, **settings: Any) -> tuple[Phases, list[Any]]:
    recipe = Phases(
        make_context(folder, guidance=GUIDANCE, precision="bf16"),
        steps=3, fake_score=FakeScoreSettings(updates=2, warmup=1), micro_batch=1, **settings,
    )  # fmt: skip
    recipe.held = []
    recipe.configure_model()
    for cycle in range(2):
        recipe.training_step({**training_stub.batch(range(2)), "index": torch.tensor([0, 1]) + 2 * cycle}, 0)
    return recipe, recipe.held


def test_one_network_at_a_time_has_gradients_and_the_teacher_never_moves(tmp_path, monkeypatch) -> None:
    expected = [("fake_score", ["fake_score"], [])] * 4 + [("student", ["student"], [])]
    recipe, held = phases(tmp_path)
    assert held == expected

    teacher = recipe.networks.teacher.model
    stored = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in teacher.state_dict().items())
    assert not any(w.requires_grad for w in teacher.parameters())
    assert teacher.tread is recipe.networks.fake_score.model.tread is None  # dropped tokens would change the level
    # Frozen matrices as the network computes with them; what is trained, averaged and at the ends, in full.
    assert teacher.block.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert teacher.final_linear_video.weight.dtype == torch.float32
    assert all(w.dtype == torch.float32 for w in recipe.networks.student.parameters())
    assert all(w.dtype == torch.float32 for w in recipe.networks.fake_score.parameters())
    assert all(w.dtype == torch.float32 for w in recipe.networks.average.parameters())
    assert {v.dtype for call in recipe.calls for v in call.v} == {torch.float32}

    # With a discriminator on the fake score's features, the student's gradient goes through the fake score.
    gan = {"gan": GanSettings(weight=0.1, network="fake_score")}
    assert phases(tmp_path, **gan)[1] == expected
    monkeypatch.setattr("recipes.dmd2.frozen", nullcontext)  # the control
    assert phases(tmp_path, **gan)[1][-1] == ("student", ["student", "fake_score"], ["fake_score"])


class Noted(Watched):
    """Keeps the gradients of every update."""

    def update(self, role: str, optimizer: Any, heads: bool = False) -> None:
        weights = self.networks.weights(role)
        self.gradients.append((role, {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}))
        super().update(role, optimizer, heads)


def test_micro_batches_of_unequal_size_add_up_to_the_whole_batch(tmp_path) -> None:
    found = []
    for size in (None, 2):
        torch.manual_seed(0)
        settings = {"fake_score": FakeScoreSettings(lr=1e-4, updates=2, warmup=0), "micro_batch": size}
        recipe = Noted(make_context(tmp_path, guidance=GUIDANCE), steps=3, **settings)
        recipe.gradients = []
        recipe.configure_model()
        recipe.training_step(training_stub.batch(range(3)), 0)
        found.append(recipe.gradients)
    for (role, whole), (other, parts) in zip(*found, strict=True):
        assert role == other
        assert whole.keys() == parts.keys()
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=2e-3, atol=1e-5)


def test_the_fake_scores_loss_has_the_motion_weights_of_its_samples(tmp_path, monkeypatch) -> None:
    asked: list[tuple[torch.Tensor, float]] = []

    def weights(x0: torch.Tensor, floor: float) -> torch.Tensor:
        asked.append((x0, floor))
        return torch.full((len(x0), 1, 1, 1, 1), 4.0)

    def loss(floor: float) -> dict[str, float]:
        settings = FakeScoreSettings(lr=1e-2, updates=2, warmup=0, motion_floor=floor)
        recipe = made(tmp_path, fake_score=settings)
        recipe.fake_score_objective(conditioned(), 0)
        return recipe.meter.flush()

    before = loss(1.0)
    monkeypatch.setattr("recipes.dmd2.motion_weight", weights)
    after = loss(0.3)
    assert after["fake_score/video"] == pytest.approx(4 * before["fake_score/video"])
    assert after["fake_score/audio"] == before["fake_score/audio"]
    ((x0, floor),) = asked
    assert floor == 0.3
    assert torch.equal(x0[[1, 3], :, 0], conditioned().conditioning.latents.video[[1, 3], :, 0])


def test_the_unconditional_branch_reads_the_negative_features(tmp_path) -> None:
    draw, file = torch.Generator().manual_seed(4), tmp_path / "n" / "negative.safetensors"
    write_text_features(file, torch.randn(3, 5, generator=draw), {})
    context = replace(make_context(tmp_path / "teacher", guidance=GUIDANCE), codecs="released")
    with pytest.raises(UserError) as error:
        Watched(context)
    assert "python -m inference.encode_text output=negative.safetensors" in str(error.value)
    assert "recipe.negative=negative.safetensors" in str(error.value)
    unguided, watched = Guidance(1, 1, 0, 1), MonitorSettings(every=5)
    with pytest.raises(
        UserError, match="needs the features of its negative prompt"
    ):  # the monitor samples the teacher guided
        Watched(context, guidance=unguided, monitor=watched)
    assert torch.equal(Watched(context, guidance=unguided).negative, context.null_text)
    with pytest.raises(UserError, match="has no effect, as the teacher is not guided"):
        Watched(context, guidance=unguided, negative=str(file))
    assert torch.equal(Watched(replace(context, codecs="tiny")).negative, context.null_text)

    recipe = Watched(context, negative=str(file))
    recipe.configure_model()
    recipe.student_objective(conditioned())
    texts = [call.text for call in recipe.calls if call.role == "teacher"]
    assert all(torch.equal(text, load_file(file)["text"].float()) for text in texts[1])
    assert all(torch.equal(a, b) for a, b in zip(texts[0], conditioned().text, strict=True))

    wrong_width, other_file = {"text": torch.zeros(3, 4)}, {"x": torch.zeros(1)}
    for content, said in ((wrong_width, r"shape \[3, 4\].*takes 5 channels"), (other_file, "holds no text")):
        save_file(content, file)
        with pytest.raises(UserError, match=rf"recipe.negative=.*{said}.*python -m inference.encode_text"):
            Watched(context, negative=str(file))
    with pytest.raises(UserError, match=r"recipe.negative=none.safetensors is not a file"):
        Watched(context, negative="none.safetensors")


def test_settings_reach_what_they_set(tmp_path, monkeypatch) -> None:
    recipe = Watched(
        make_context(tmp_path, guidance=GUIDANCE, steps=10, lr=5e-4, schedule="linear", final=0.1),
        steps=3, fake_score=FakeScoreSettings(lr=3e-4, warmup=4),
        gan=GanSettings(weight=0.1, lr=7e-4), video_weight=2.0, audio_weight=0.5, first_step=2,
        guidance=Guidance(1, 1, 0, 1), monitor=MonitorSettings(every=1, prompts=1, samples=2),
    )  # fmt: skip
    recipe.configure_model()
    (student, fake_score), ((_, scheduler), _) = recipe.made[0], recipe.made[1][0].items()
    assert {group["initial_lr"] for group in student.param_groups} == {5e-4}
    assert [group["lr"] for group in fake_score.param_groups][-1] == 7e-4
    assert {group["lr"] for group in fake_score.param_groups[:-1]} == {3e-4}
    # The student's rate has fallen to its end when the training is over, which began for it after the warm-up.
    assert [scheduler.lr_lambdas[0](step) for step in (5, 6)] == pytest.approx([0.1 + 0.9 / 5, 0.1])
    assert recipe.weighted(Pair(torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0]))) == 2 * 2 + 15 / 2
    assert not recipe.sampling.guidance.needed  # a student has none, whatever the settings say

    steps: list[torch.Tensor] = []
    state = Rollout.state
    monkeypatch.setattr(Rollout, "state", lambda self, step: steps.append(step) or state(self, step))
    recipe.student_objective(conditioned())
    assert steps[0].tolist() == [2] * 4

    # The monitor looks at what is exported, and at the teacher with the guidance that it is sampled with.
    recipe.calls.clear()
    recipe.check_collapse(training_stub.batch(range(2)))
    roles = [call.role for call in recipe.calls]
    assert {role: roles.count(role) for role in set(roles)} == {"teacher": 2 * 6, "average": 3}
    offsets = {tuple(recipe.choose_steps(conditioned(), update, 0).tolist()) for update in range(20)}
    assert len(offsets) == 3  # every update has a draw of its own


def batch(cycle: int) -> dict[str, Any]:
    return {**training_stub.batch(range(2)), "index": torch.tensor([0, 1]) + 2 * cycle}


def test_a_student_that_never_has_a_finite_gradient_ends_the_run(tmp_path, monkeypatch) -> None:
    """The finite gradients of its fake score do not hide it."""
    recipe = made(tmp_path)
    turn = recipe.student_objective
    monkeypatch.setattr(recipe, "student_objective", lambda part: turn(part) * torch.nan)
    for cycle in range(19):
        recipe.training_step(batch(cycle), 0)
    with pytest.raises(UserError, match=r"gradient \(grad_norm\) was not finite for 20 steps.*lower optim.lr"):
        recipe.training_step(batch(19), 0)


def test_a_sample_that_is_not_finite_spoils_no_weight(tmp_path, monkeypatch) -> None:
    recipe = made(tmp_path, gan=GanSettings(weight=0.1))
    estimate, heads = Rollout.estimate, recipe.discriminator.parameters

    def broken(self: Rollout, step: torch.Tensor) -> Pair:
        x0 = estimate(self, step)
        return Pair(x0.video * torch.nan, x0.audio)

    monkeypatch.setattr(Rollout, "estimate", broken)
    before = [w.clone() for w in heads()]
    recipe.training_step(batch(0), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, heads(), strict=True))
    monkeypatch.setattr(Rollout, "estimate", estimate)
    recipe.training_step(batch(1), 0)
    assert not any(torch.equal(a, b) for a, b in zip(before, heads(), strict=True))
    weights = [*heads(), *recipe.networks.fake_score.parameters(), *recipe.networks.student.parameters()]
    assert all(w.isfinite().all() for w in weights)
    assert recipe.meter.flush()["grad_norm/gan"] > 0


def test_the_discriminator_is_trained_with_the_first_updates_only(tmp_path) -> None:
    recipe = made(tmp_path, fake_score=FakeScoreSettings(updates=3, warmup=0), gan=GanSettings(weight=0.1, updates=2))
    weights = list(recipe.discriminator.parameters())
    losses = []
    (part,) = micro_batches(
        batch(0), recipe.begin_batch(batch(0)), first_frame=0, audio_conditioning=0, gan=True, size=None
    )
    for update in range(3):
        losses.append(recipe.fake_score_objective(part, update))
    moved = [any(g is not None for g in torch.autograd.grad(loss, weights, allow_unused=True)) for loss in losses]
    assert moved == [True, True, False]
    with pytest.raises(UserError, match=r"recipe.gan.updates=0 never trains the discriminator; give 1 or more"):
        GanSettings(weight=0.1, updates=0)
    assert any("recipe.gan.updates=9" in note for note in made(tmp_path, gan=GanSettings(weight=1, updates=9)).notes())


def test_a_student_is_not_checked_before_its_first_update(tmp_path, monkeypatch) -> None:
    recipe = Watched(
        make_context(tmp_path), steps=3, fake_score=FakeScoreSettings(updates=1, warmup=4), micro_batch=3,
        monitor=MonitorSettings(every=1, prompts=2, samples=4, patience=2),
    )  # fmt: skip
    recipe.configure_model()
    recipe.training_step(batch(0), 0)
    assert {len(call.text) for call in recipe.calls} == {2, 3}  # 8 samples of a look, 3 at once; the batch
    monkeypatch.setattr(recipe.monitor, "measure", lambda *_: {"monitor/std_video": 0.1})
    for cycle in range(1, 6):  # the first update is in the fifth cycle, the first look at it in the sixth
        recipe.training_step(batch(cycle), 0)
    assert recipe.monitor.strikes["monitor/std_video"] == 1
    with pytest.raises(UserError, match=r"monitor/std_video is .* at step 6"):
        recipe.training_step(batch(6), 0)


# Interrupted anywhere between cycles, a run ends as if it had not been.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "export"
    make_context(folder, guidance=GUIDANCE)
    return folder


def common(teacher: Path) -> list[str]:
    return [
        "+recipe=dmd2", f"init={teacher}", "trainer.max_steps=6", "checkpoint.every_steps=100",
        "recipe.fake_score.warmup=2", "recipe.fake_score.updates=2", "recipe.steps=3", "recipe.first_step=0",
        "recipe.fake_score.first_step=0", "recipe.monitor={every: 2, prompts: 2, samples: 2, patience: 99}",
        "recipe.first_frame=0.5", "callbacks.validation=null",
    ]  # fmt: skip


def everything(run: Path) -> dict[str, Any]:
    """Weights, both optimisers, schedule, averages, counters, monitor, position in the data."""
    state = final_state(run)
    assert len(state["optimizer_states"]) == 2
    assert any(key.startswith("fake_score.") for key in state["state_dict"])
    assert any(key.startswith("ema.") for key in state["state_dict"])
    names = ("state_dict", "optimizer_states", "lr_schedulers", "recipe", "LatentDataModule", "global_step")
    return {name: state[name] for name in names}


def test_an_interrupted_run_ends_like_an_unbroken_one(shards, teacher, tmp_path) -> None:
    """Bit for bit. Rollouts live within a cycle, and draws are functions of the cycle: neither has to be kept."""
    through, halves, damaged = (tmp_path / name for name in ("through", "halves", "damaged"))
    training_stub.train_here(through, shards, common(teacher))
    whole = everything(through)
    counts = {"step": 6, "batches": 6, "student_updates": 4, "fake_score_updates": 12, "ema_updates": 4}
    assert {name: whole["recipe"][name] for name in counts} == counts

    training_stub.train_here(halves, shards, [*common(teacher), "trainer.max_steps=3"])
    shutil.copytree(halves, damaged, symlinks=True)
    training_stub.train_here(halves, shards, common(teacher))
    assert_same(everything(halves), whole)
    exported = "export/model-00001-of-00001.safetensors"
    assert (halves / exported).read_bytes() == (through / exported).read_bytes()

    # The control: a fake score whose optimiser is not restored exactly ends elsewhere.
    saved = damaged / "checkpoints" / "step-00000003.ckpt"
    state = torch.load(saved, weights_only=True)
    for values in state["optimizer_states"][1]["state"].values():
        values["exp_avg_sq"].mul_(1.01)
    torch.save(state, saved)
    training_stub.train_here(damaged, shards, common(teacher))
    assert (damaged / exported).read_bytes() != (through / exported).read_bytes()


# Two processes train what one does.


@pytest.fixture(scope="module")
def world(shards, teacher) -> Launcher:
    exact = ["trainer.precision=fp32", "optim.lr=1e-4", "recipe.fake_score.lr=1e-4", "+optim.eps=1e-4"]
    size = ["data.module.batch_size=4", "trainer.log_every=1", "trainer.devices=%d", "strategy=%s"]
    # Each process takes the penalty's random steps by itself, so it is left out.
    gan = ["recipe.gan={weight: 0.1, slope: 0.0, start: 3}", "recipe.micro_batch=2"]
    return Launcher(shards, [*common(teacher), *exact, *size, *gan])


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert world.run(folder, "single", 1) == [0]
    return folder


def moves(run: Path, teacher: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The exported student, and its move away from the teacher, as one vector each."""
    file = "model-00001-of-00001.safetensors"
    mine, start = load_file(run / "export" / file), load_file(teacher / file)
    names = [name for name, tensor in start.items() if tensor.dtype == torch.float32]  # the rest was rounded
    weights, before = (torch.cat([state[name].flatten() for name in names]) for state in (mine, start))
    return weights, weights - before


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(world, alone, teacher, tmp_path, strategy) -> None:
    folder = tmp_path / "two"
    # Stopped while neither the student nor the discriminator has had a gradient, which is no success, and continued.
    assert world.run(folder, strategy, 2, "trainer.max_time=00:00:00")[0] == 1
    assert "the student is still the teacher" in json.loads((folder / "run.json").read_text())["error"]
    assert not (folder / "export").exists()
    assert world.run(folder, strategy, 2) == [0, 0]
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (alone, folder)]
    compared = 0
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        # Each process looks at samples of its own prompts.
        own = (
            "straggler",
            "monitor/std",
            "monitor/diversity",
            "samples_per_s",
            "tflops",
            "memory_gb",
            "seconds",
            "time/",
        )
        for name in (n for n in one if not n.startswith(own)):
            assert bool(one[name]) == bool(two[name])
            if one[name]:
                assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5, abs=1e-7), name
                compared += 1
    assert compared > 60
    assert {"gan/discriminator", "monitor/lag_video", "monitor/balance"} <= set(rows[0][-1])

    (mine, by), (theirs, _) = moves(folder, teacher), moves(alone, teacher)
    assert by.norm() > 1e-4 * mine.norm()
    assert (mine - theirs).norm() <= 1e-5 * mine.norm()
    assert (mine - theirs).norm() <= 1e-3 * by.norm()
