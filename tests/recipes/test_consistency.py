"""Consistency distillation: the derivative against differences, tangent and loss against closed forms, points with a known
distribution, and settings that are refused."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_dit
import torch
import training_stub
from processes import Launcher
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_dmd2 import PRIOR, join, make_context, part
from toy_mixture import Figures, compare, ring

from magihuman.config import StrategySettings
from magihuman.distill.rollout import roll_out
from magihuman.distill.tangent import consistency_tangent, normalised, velocity_and_derivative
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import Conditioning, Pair, each, seeded
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import Sampling
from magihuman.training.optim import EMA, Ramp
from recipes.consistency import UNGUIDED, Consistency

# The derivative of the network


@pytest.mark.parametrize("config", [small_dit.CONFIG, small_dit.LOCAL], ids=["full attention", "windows"])
@pytest.mark.parametrize("lengths", [[4], [4, 4], [3, 5, 4]], ids=str)
def test_the_derivative_is_that_of_differences_and_of_the_gradient(config: Any, lengths: list[int]) -> None:
    """Measured: 0.5 to 1.2e-3 from central differences in fp32 (of step .004), 2e-7 from the hand-written gradients."""
    network = small_dit.make(config)
    network.model.frame_receptive_field = 1
    video, audio, text = small_dit.inputs(lengths)
    direction = Pair(*small_dit.inputs(lengths, seed=2)[:2])
    velocity, derivative = velocity_and_derivative(network, Pair(video, audio), text, direction)
    assert not any(x.requires_grad for x in (*velocity, *derivative))

    step = 4e-3
    with torch.no_grad():
        here = network(video, audio, text)
        ahead, behind = (network(video + h * direction.video, audio + h * direction.audio, text) for h in (step, -step))
    for m in (0, 1):
        torch.testing.assert_close(velocity[m], here[m], rtol=1e-5, atol=1e-5)
        difference = (ahead[m] - behind[m]) / (2 * step)
        assert (derivative[m] - difference).norm() <= 3e-3 * difference.norm()

    # u . (J d) = (J' u) . d, with J' u by the backward pass.
    u = small_dit.inputs(lengths, seed=3)[:2]
    inputs = [video.requires_grad_(), audio.requires_grad_()]
    back = torch.autograd.grad(network(*inputs, text), inputs, u)
    forward_product = sum((a * b).sum() for a, b in zip(u, derivative, strict=True))
    size = sum(a.norm() * b.norm() for a, b in zip(u, derivative, strict=True))
    backward_product = sum((a * b).sum() for a, b in zip(back, direction, strict=True))
    assert abs(float(forward_product - backward_product)) <= 1e-5 * float(size)


def test_the_derivative_is_computed_in_fp32_and_leaves_no_setting_changed() -> None:
    exact, rounded = small_dit.make(), small_dit.make(dtype=torch.bfloat16)
    rounded.model.attention_backend = "sdpa"  # has no forward-mode derivative on the CPU
    video, audio, text = small_dit.inputs([4, 4], audio=0)
    direction = Pair(*small_dit.inputs([4, 4], audio=0, seed=2)[:2])
    one, two = (velocity_and_derivative(net, Pair(video, audio), text, direction) for net in (exact, rounded))
    assert torch.equal(one[1].video, two[1].video)
    assert one[1].audio.shape == audio.shape
    assert (rounded.model.compute_dtype, rounded.model.attention_backend) == (torch.bfloat16, "sdpa")


# Tangent and loss in closed form


class Points(nn.Module):
    """A field of points in the place of the network; the last `sound` numbers of a point are its audio."""

    def __init__(self, field: Callable[[Tensor], Tensor], sound: int = 0) -> None:
        super().__init__()
        self.field, self.sound = field, sound
        self.model = SimpleNamespace(compute_dtype=torch.float32, attention_backend="auto", window=None)

    def forward(self, video: Tensor, audio: Tensor, text: Any) -> tuple[Tensor, Tensor]:
        return part(self.field(join(Pair(video, audio))), len(video), self.sound)


def made(folder: Path, student: nn.Module, teacher: nn.Module, steps: int = 100, **settings: Any) -> Consistency:
    """The recipe with other networks."""
    context = make_context(folder, steps=steps)
    defaults = {"first_frame": 0.0, "audio_conditioning": 0.0, "guidance": UNGUIDED}
    recipe = Consistency(context, **{**defaults, **settings})
    recipe.denoiser, recipe.teacher = student, [teacher]
    return recipe


WIDTH = 0.3


def _level(x: Tensor) -> tuple[Tensor, Tensor]:
    """The level of points of a Gaussian of that width, read from their size rho, and rho: [B,1] each.

    rho^2 = |x|^2 / D = (1 - s)^2 width^2 + s^2, of whose two solutions the larger one is right for s > .083.
    """
    square = x.square().mean(1, keepdim=True)
    a, b = 1 + WIDTH**2, WIDTH**2
    return (b + (b**2 - a * (b - square)).sqrt()) / a, square.sqrt()


def teacher_field(x: Tensor) -> Tensor:
    """E[eps - x0 | x], linear in x at a level."""
    s, rho = _level(x)
    return (s - (1 - s) * WIDTH**2) / rho**2 * x


def consistent_field(x: Tensor) -> Tensor:
    """The F whose data estimate is the end of the path: x_0 = width x / rho."""
    s, rho = _level(x)
    return (1 - WIDTH / rho) / s * x


def at_levels(s: Tensor, dimensions: int, seed: int) -> Tensor:
    """Points of exactly the size that belongs to a level."""
    x = torch.randn(len(s), dimensions, generator=torch.Generator().manual_seed(seed))
    size = ((1 - s) ** 2 * WIDTH**2 + s**2).sqrt()[:, None]
    return x / x.square().mean(1, keepdim=True).sqrt() * size


def test_the_exact_consistency_function_of_a_gaussian_has_no_tangent(tmp_path: Path) -> None:
    """Neither at a shared level nor at one for each modality nor with clean audio; measured: 4e-7. The teacher's has one."""
    levels = (
        torch.tensor([0.2, 0.5, 0.9, 0.9998, 0.4, 0.9998, 0.7]),
        torch.tensor([0.2, 0.5, 0.9, 0.9998, 0.8, 0.3, 0.7]),
    )

    def apart(field: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([field(x[:, :24]), field(x[:, 24:])], 1)

    x = part(torch.cat([at_levels(levels[0], 24, 1), at_levels(levels[1], 8, 2)], 1), 7, 8)
    sigma = Pair(levels[0].view(-1, 1, 1, 1, 1), levels[1].view(-1, 1, 1).clone())
    sigma.audio[-1] = 0  # conditioning
    teacher = Points(apart(teacher_field), 8)
    for field, largest in ((consistent_field, 1e-5), (teacher_field, None)):
        student = Points(apart(field), 8)
        recipe = made(tmp_path, student, teacher)
        tangent = each(consistency_tangent, *recipe.fields(student, [], x, sigma))
        sizes = torch.cat([tangent.video.flatten(1).abs().amax(1), tangent.audio[:-1].flatten(1).abs().amax(1)])
        if largest is None:
            assert sizes.min() > 0.05
        else:
            assert sizes.max() < largest


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_gradient_of_a_linear_student_is_the_closed_form(tmp_path: Path, weight: float) -> None:
    """F = A x and v = B x: g = (B - A - weight s A B) x; with g normalised, the gradient by A is minus the mean of g x' / D."""
    draw = torch.Generator().manual_seed(3)
    size, samples = 6, 5
    student = nn.Linear(size, size, bias=False)
    b = torch.randn(size, size, generator=draw)
    recipe = made(tmp_path, Points(student), Points(lambda x: x @ b.T), derivative=weight, floor=0.3)
    points = torch.randn(samples, size, generator=draw)
    clean = part(points, samples)
    batch = {
        "video": clean.video,
        "audio": clean.audio,
        "text": [torch.zeros(2, 5)] * samples,
        "index": torch.arange(5),
    }
    _, x, sigma = recipe.noised(batch, recipe.begin_batch(batch))
    loss = recipe.loss(batch, recipe.begin_batch(batch))
    loss.backward()

    x, s, a = join(x), sigma.video.view(-1, 1), student.weight.detach()
    assert len(set(s.flatten().tolist())) == samples
    g = x @ (b - a).T - weight * s * (x @ (a @ b).T)
    g = g / (g.square().mean(1, keepdim=True).sqrt() + 0.3)
    torch.testing.assert_close(student.weight.grad, -(g.T @ x) / (size * samples), rtol=1e-4, atol=1e-5)
    assert float(loss.detach()) == pytest.approx(float(0.5 * g.square().mean()), rel=1e-4)


def test_conditioning_is_clean_has_level_0_and_no_loss(tmp_path: Path) -> None:
    seen: list[Pair] = []

    class Seen(nn.Module):
        model = SimpleNamespace(compute_dtype=torch.float32, attention_backend="auto", window=None)

        def forward(self, video: Tensor, audio: Tensor, text: Any) -> tuple[Tensor, Tensor]:
            seen.append(Pair(video, audio))
            return 0.5 * video, 0.5 * audio

    recipe = made(tmp_path, Seen(), Seen(), first_frame=1.0, audio_conditioning=1.0)
    batch = training_stub.batch(range(3))
    _, x, sigma = recipe.noised(batch, recipe.begin_batch(batch))
    assert torch.equal(x.video[:, :, 0], batch["video"][:, :, 0])
    assert torch.equal(x.audio, batch["audio"])
    assert float(sigma.video[:, :, 0].abs().max()) == float(sigma.audio.abs().max()) == 0
    assert sigma.video[:, :, 1:].amin() > 0
    recipe.loss(batch, recipe.begin_batch(batch))
    assert all(torch.equal(at.video[:, :, 0], batch["video"][:, :, 0]) for at in seen)
    metrics = recipe.meter.flush()
    assert "tangent/audio" not in metrics  # nothing was generated
    assert metrics["tangent/video"] > 0
    # Both are linear: g = - .5 s x / 2 where generated.
    expected = (0.25 * sigma.video * x.video)[:, :, 1:].square().flatten(1).mean(1).mean()
    assert metrics["tangent/video"] == pytest.approx(float(expected), rel=1e-4)


def test_the_teacher_is_guided_by_the_level_of_its_modality(tmp_path: Path) -> None:
    class Texts(nn.Module):
        """1 for a prompt, 0 for the empty prompt."""

        def forward(self, video: Tensor, audio: Tensor, text: Any) -> tuple[Tensor, Tensor]:
            value = float(text[0].sum() != 0)
            return torch.full_like(video, value), torch.full_like(audio, value)

    recipe = made(tmp_path, nn.Identity(), Texts(), guidance=Guidance(5.0, 2.0, 500, 3.0))
    batch = training_stub.batch(range(2))
    sigma = Pair(torch.tensor([0.4, 0.6]).view(-1, 1, 1, 1, 1), torch.tensor([0.9, 0.1]).view(-1, 1, 1))
    guided = recipe.teacher_velocity(Pair(batch["video"], batch["audio"]), batch["text"], sigma)
    assert guided.video.flatten(1).unique(dim=1).flatten().tolist() == [2.0, 5.0]
    assert guided.audio.unique().tolist() == [3.0]


def test_tangents_are_normalised_over_generated_positions() -> None:
    tangent = torch.tensor([[3.0, 4.0, 100.0], [0.03, 0.04, 100.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    large, small = normalised(tangent, mask, 0.1)
    size = math.sqrt(12.5)
    assert large.tolist() == pytest.approx([3 / (size + 0.1), 4 / (size + 0.1), 0.0])
    assert small.tolist() == pytest.approx([0.03 / (size / 100 + 0.1), 0.04 / (size / 100 + 0.1), 0.0])


# Points with a known distribution

RING = ring(16)
"""Fourteen thin directions, from which a network that is told no level can read it."""


def flow_matching(updates: int) -> nn.Module:
    """A network that is told no level, fitted to the ring by flow matching."""
    torch.manual_seed(1)
    draw = torch.Generator().manual_seed(1)
    net = nn.Sequential(
        nn.Linear(16, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 16)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(updates):
        x0, _ = RING.draw(256, draw)
        noise = torch.randn(x0.shape, generator=draw)
        sigma = PRIOR.sample(256, draw)[0][:, None]
        loss = (net((1 - sigma) * x0 + sigma * noise) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def sampled(network: nn.Module, steps: int, count: int = 2000) -> Figures:
    def velocity(x: Pair, sigma: Pair) -> Pair:
        return Pair(*network(x.video, x.audio, []))

    nothing = Conditioning.nothing(part(torch.zeros(count, 16), 1))
    return compare(join(roll_out(Sampling("renoise", steps, 5.0), velocity, seeded([0]), nothing).end), RING)


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are slower with more
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_one_and_two_steps_get_near_a_ring(tmp_path: Path) -> None:
    """Measured distances: in one step 1.13 before and .32 after, in two .98 and .32; the teacher in 32 Euler steps .35."""
    net = flow_matching(1000)
    student, teacher = Points(copy.deepcopy(net)), Points(net)
    recipe = made(tmp_path, student, teacher, steps=200)
    recipe.ema = EMA(student, 0.97)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.9, 0.99))
    draw = torch.Generator().manual_seed(2)
    for cycle in range(200):
        clean = part(RING.draw(256, draw)[0], 32)
        index = torch.arange(32 * cycle, 32 * cycle + 32)
        batch = {"video": clean.video, "audio": clean.audio, "text": [torch.zeros(2, 5)] * 32, "index": index}
        rng = recipe.begin_batch(batch)
        optimizer.zero_grad()
        recipe.loss(batch, rng).backward()
        optimizer.step()
        recipe.after_step()
    for steps in (1, 2):
        before, after = sampled(teacher, steps), sampled(recipe.network, steps)
        assert before.modes == 0
        assert after.distance <= 0.4 * before.distance, after
        assert after.modes >= 5, after


# Settings


def test_export_and_weight_of_the_derivative_follow_the_settings(tmp_path: Path) -> None:
    recipe = made(
        tmp_path, nn.Identity(), nn.Identity(), steps=10, **{"derivative": Ramp(0, 1, 0, 0.5), "guidance": None}
    )
    assert recipe.sampling == Sampling("renoise", 2, 5.0, UNGUIDED)
    assert recipe.guidance == UNGUIDED  # of the teacher's checkpoint
    one = Consistency(make_context(tmp_path), steps=1, shift=3.0, sigma=SigmaPrior("shifted", shift=3.0))
    assert (one.export_config().sampling.steps, one.export_config().sampling.shift) == (1, 3.0)
    assert one.export_config().sigma_prior.shift == 3.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init=null"], "consistency distils a trained checkpoint; give init="),
        (["recipe.steps=0"], "recipe.steps=0 must be at least 1"),
        (["trainer.compile=true"], "trainer.compile=true excludes the forward-mode derivative"),
        (["strategy=zero2"], "this recipe runs with strategy=single or ddp or fsdp2, not zero2"),
        (["recipe.derivative=2"], "recipe.derivative=2 should be in [0, 1]"),
    ],
)
def test_what_it_cannot_train_with_is_one_line(overrides: list[str], message: str, shards, parent, tmp_path) -> None:
    with pytest.raises(UserError) as error:
        training_stub.train_here(tmp_path / "run", shards, ["+recipe=consistency", f"init={parent}", *overrides])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_shared_tokens_a_negative_prompt_and_another_teacher_are_refused(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    together = replace(context, strategy=StrategySettings("ddp", context_parallel=2))
    with pytest.raises(UserError, match=r"strategy.context_parallel=2 excludes the forward-mode derivative"):
        Consistency(together)
    released = replace(context, codecs="released")
    with pytest.raises(
        UserError, match="guided away from its own negative prompt, which recipe=consistency does not take"
    ):
        Consistency(released, guidance=Guidance())
    assert Consistency(released).guidance == UNGUIDED
    state: dict[str, Any] = {}
    Consistency(context).on_save_checkpoint(state)
    other = make_context(tmp_path / "other")
    with pytest.raises(UserError, match=r"distilled from init=\S+, not from init=\S+other"):
        Consistency(other).on_load_checkpoint(state)


# Two processes train what one does


@pytest.mark.slow
def test_two_processes_train_what_one_trains(shards: Path, tmp_path: Path) -> None:
    """With whole and with sharded weights, whose gathering goes on around the forward-mode derivative."""
    make_context(tmp_path / "teacher")
    world = Launcher(
        shards,
        [
            "+recipe=consistency", f"init={tmp_path / 'teacher'}", "recipe.first_frame=0.5", "recipe.derivative=1.0",
            "trainer.precision=fp32", "optim.lr=1e-3", "+optim.eps=1e-4", "trainer.log_every=1", "callbacks.validation=null",
            "data.module.batch_size=4", "trainer.devices=%d", "strategy=%s",
        ],
    )  # fmt: skip
    found = []
    for strategy, processes in (("single", 1), ("ddp", 2), ("fsdp2", 2)):
        assert world.run(tmp_path / strategy, strategy, processes) == [0] * processes
        state = load_file(tmp_path / strategy / "export" / "model-00001-of-00001.safetensors")
        found.append(torch.cat([state[name].flatten() for name in sorted(state) if state[name].dtype == torch.float32]))
    start = load_file(tmp_path / "teacher" / "model-00001-of-00001.safetensors")
    before = torch.cat([start[name].flatten() for name in sorted(start) if start[name].dtype == torch.float32])
    moved = (found[0] - before).norm()
    assert moved > 1e-4 * before.norm()
    for weights in found[1:]:
        assert (weights - found[0]).norm() <= 1e-3 * moved
