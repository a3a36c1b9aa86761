"""Distillation of super-resolution to fewer steps: ends of the paths are what inference makes of the teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from small_sr import RELEASED, SMALL, Fixed, clips, recipe

from inference.super_resolution import refine
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.sigmas import SigmaPrior, shift_sigma, sigma_grid
from magihuman.flow.super_resolution import NOISE_INDEX, signal_amplitude, start
from magihuman.io.export import ExportConfig, Sampling, Size, released_dtypes, save_export
from magihuman.models.config import PackConfig
from recipes.sr import SuperResolution

CONFIG = ExportConfig(
    model=SMALL, pack=PackConfig(patch_size=2, coords_style="v1"), codecs="tiny", contract=training_stub.CONTRACT,
    sampling=Sampling("unipc", 3, 4.0, Guidance(1, 1, 0, 1)), size=Size(9, 32, 32), provenance={"stage": "second"},
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second stage of 3 steps whose velocities are not zero."""
    network = zoo.build(SMALL, CONFIG.pack, compute_dtype=torch.float32, seed=1)
    draw = torch.Generator().manual_seed(2)
    for head in (network.model.final_linear_video, network.model.final_linear_audio):
        torch.nn.init.normal_(head.weight, std=0.3, generator=draw)
    state = released_dtypes(network.model.state_dict(), SMALL)
    return str(save_export(tmp_path_factory.mktemp("teacher") / "export", state, CONFIG))


def other(folder: Path, **changes: Any) -> str:
    """A checkpoint with another config."""
    config = replace(CONFIG, **changes)
    network = zoo.build(config.model, config.pack, compute_dtype=torch.float32, seed=1)
    return str(save_export(folder / "export", released_dtypes(network.model.state_dict(), config.model), config))


def stored_noise() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 3, 8, 8, generator=draw), torch.randn(4, 9, 4, generator=draw)


def noised(made: SuperResolution) -> Any:
    batch = clips()
    rng = Fixed([*stored_noise(), torch.zeros_like(batch["video"])])
    return made.noised(made.paired(batch), rng, conditioned=True)


@pytest.mark.parametrize("first_frame", [0.0, 1.0])
def test_the_ends_are_the_bits_that_inference_makes_of_the_teacher(teacher: str, first_frame: float) -> None:
    made, batch, noise = recipe(**RELEASED, teacher=teacher, first_frame=first_frame), clips(), stored_noise()
    clean = batch["video_sr"].float()
    given = {"image_latent": clean[:, :, :1]} if first_frame else {}
    (network,) = made.teacher
    ends = {
        steps: refine(
            network, batch["video"], batch["audio"], batch["text"], None, ((3, 3, 8, 8), (9, 4)), noise,
            steps=steps, shift=4.0, **given,
        )
        for steps in (3, 2)
    }  # fmt: skip
    source, audio = start(batch["video"], batch["audio"], noise, signal_amplitude(NOISE_INDEX))
    found = noised(made)
    assert torch.equal(found.audio, audio)
    assert torch.equal(found.video_target, source - ends[3])
    level = found.sigma.view(-1, 1, 1, 1, 1) * found.mask
    assert torch.equal(found.video, (1 - level) * ends[3] + level * source)
    assert float((ends[3] - ends[2]).abs().max()) > 1e-3  # its own steps
    assert float((ends[3] - clean)[:, :, 1:].abs().mean()) > 0.1
    assert torch.equal(ends[3][:, :, 0], clean[:, :, 0]) == bool(first_frame)
    # Everything random is as without a teacher.
    plain = noised(recipe(**RELEASED, first_frame=first_frame))
    assert torch.equal(plain.video_target, source - clean)
    assert torch.equal(plain.audio, found.audio)
    assert torch.equal(plain.sigma, found.sigma)


def test_clips_with_and_without_a_first_frame_share_a_batch(teacher: str) -> None:
    made, batch, noise = recipe(**RELEASED, teacher=teacher), clips(), stored_noise()
    made.eval()
    clean = batch["video_sr"].float()
    source, audio = start(batch["video"], batch["audio"], noise, signal_amplitude(NOISE_INDEX))
    mask = torch.ones(4, 1, 3, 1, 1)
    mask[1, :, 0] = 0
    mixed = made.refined(source, audio, batch["text"], clean, mask)
    free = made.refined(source, audio, batch["text"], clean, torch.ones_like(mask))
    assert torch.equal(mixed[1, :, 0], clean[1, :, 0])
    assert not torch.equal(mixed[1, :, 1:], free[1, :, 1:])
    rest = [0, 2, 3]
    torch.testing.assert_close(mixed[rest], free[rest])


def test_gradients_reach_the_student_alone(teacher: str) -> None:
    made = recipe(teacher=teacher)
    made.loss(clips(), Fixed([*stored_noise(), torch.zeros_like(clips()["video"])])).backward()
    (network,) = made.teacher
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in made.trained.parameters())
    assert not any("teacher" in name for name in made.state_dict())


# Positions on the path


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_positions_end_where_the_last_step_begins(steps: int) -> None:
    made = recipe(steps=steps, sigma=None)
    found, low = made.sigma.sample(20_000, torch.Generator().manual_seed(0))[0], 1 / steps
    if steps == 1:
        assert found.eq(1).all()
        return
    assert float(found.min()) >= float(shift_sigma(torch.tensor(low), 5.0))
    for u in (low, low + (1 - low) / 4, 1 - 1 / steps, 0.9):
        below = (found < shift_sigma(torch.tensor(u), 5.0)).double().mean()
        assert float(below) == pytest.approx((u - low) / (1 - low), abs=0.01), u
    # All positions of inference in this number of steps or fewer, and the lowest of more steps not.
    for count in range(1, steps + 2):
        grid = sigma_grid(count, 5.0)
        inside = float(grid[-2] / grid[0]) >= float(found.min()) - 5e-4
        assert inside == (count <= steps)


def test_positions_on_the_whole_path_are_the_numbers_of_before() -> None:
    u = torch.rand(100, generator=torch.Generator().manual_seed(0))
    drawn = SigmaPrior("shifted", shift=5.0).sample(100, torch.Generator().manual_seed(0))[0]
    assert torch.equal(drawn, shift_sigma(u, 5.0))


# Settings


def test_the_export_has_the_steps_and_the_positions(teacher: str) -> None:
    config = recipe(steps=2, shift=4.0, sigma=None, teacher=teacher).export_config()
    assert config.sampling == Sampling("unipc", 2, 4.0, Guidance(1, 1, 0, 1))
    assert config.sigma_prior == SigmaPrior("shifted", shift=4.0, low=0.5)
    assert ExportConfig.from_dict(config.to_dict()) == config
    whole = recipe().export_config()
    assert (whole.sampling.steps, whole.sigma_prior) == (5, SigmaPrior("shifted", shift=5.0))


def test_the_teacher_s_steps_are_counted(teacher: str) -> None:
    # Three forward passes cost what the student's update does; it is of the same size.
    assert recipe(teacher=teacher).batch_flops(clips()) == 2 * recipe().batch_flops(clips())


def test_a_teacher_that_does_not_fit_is_one_line(teacher: str, tmp_path: Path) -> None:
    for name, changes, message in (
        ("first", {"pack": PackConfig(2, "v2")}, "has coordinates v2, and this training v1; give a second stage"),
        ("codecs", {"codecs": "scene"}, "is for the codecs scene, and the shards have tiny"),
        ("latents", {"contract": replace(training_stub.CONTRACT, fps=24.0)}, "made for different latents"),
    ):
        with pytest.raises(UserError, match=message):
            recipe(teacher=other(tmp_path / name, **changes))
    with pytest.raises(UserError, match=r"refines from the start of recipe\.path=bridge, not of flow; leave one of"):
        recipe(teacher=teacher, path="flow")
    with pytest.raises(UserError, match=r"recipe\.teacher=nowhere: .*nowhere' is neither a folder nor"):
        recipe(teacher="nowhere")
    with pytest.raises(UserError, match=r"recipe\.teacher is empty; give a second stage, such as scene/sr, or null"):
        recipe(teacher="")


def test_results_without_a_teacher_s_own_guidance_are_noted(teacher: str, tmp_path: Path) -> None:
    guided = replace(CONFIG.sampling, guidance=Guidance(3, 3, 0, 1))
    notes = recipe(teacher=other(tmp_path, sampling=guided)).notes()
    assert any("is sampled with guidance by default; here its results are without" in note for note in notes)
    assert not any("guidance" in note for note in recipe(teacher=teacher).notes())


def test_a_teacher_of_other_clips_or_as_few_steps_is_noted(teacher: str, tmp_path: Path) -> None:
    assert recipe(teacher=teacher, steps=2).notes() == []
    (few,) = recipe(teacher=teacher, steps=3).notes()
    assert few.endswith("is sampled in 3 steps, no more than recipe.steps=3: nothing is saved")
    changes = {"size": Size(9, 64, 32), "model": replace(SMALL, local_attn_layers=(1,))}
    size, layers = recipe(teacher=other(tmp_path, **changes), steps=2).notes()
    assert size.endswith("is for clips of 9 frames of 64 x 32, and this training is of 9 frames of 32 x 32")
    assert layers.endswith("has local attention in layers [1], and this training in []")


def test_a_training_takes_a_run_as_its_teacher_and_its_export_names_the_steps(tmp_path: Path) -> None:
    shards = training_stub.write_shards(tmp_path / "shards")
    first = training_stub.train_here(tmp_path / "five", shards, ["+recipe=sr", "trainer.max_steps=1"])
    settings = ["+recipe=sr", f"init={first}", f"recipe.teacher={first}", "recipe.steps=2", "recipe.sigma=null"]
    run = training_stub.train_here(tmp_path / "two", shards, [*settings, "trainer.max_steps=1"])
    config = zoo.config_of(run)
    assert (config.sampling.steps, config.sigma_prior) == (2, SigmaPrior("shifted", shift=5.0, low=0.5))
    with pytest.raises(UserError, match=r"was saved with another recipe\.teacher"):
        training_stub.train_here(tmp_path / "two", shards, [*settings, "recipe.teacher=null", "trainer.max_steps=2"])


def test_the_prior_s_shift_is_the_solver_s() -> None:
    composed = training_stub.compose(["+recipe=sr", "recipe.shift=3.0", "folder=x"]).recipe
    assert composed.sigma.shift == composed.shift == 3.0


def test_the_experiment_differs_from_scene_sr_in_what_its_file_says() -> None:
    two, five = (training_stub.compose([f"+experiment={name}", "folder=x"]) for name in ("scene_sr2", "scene_sr"))
    assert (two.init, two.name, two.recipe.teacher) == ("scene/sr", "scene_sr2", "scene/sr")
    assert (two.recipe.steps, two.recipe.sigma) == (2, None)
    assert {key for key in two.recipe if two.recipe[key] != five.recipe[key]} == {"steps", "sigma", "teacher"}
    assert (two.trainer.max_steps, five.trainer.max_steps) == (250, 1000)
    assert (two.optim, two.trainer) == (five.optim, {**five.trainer, "max_steps": 250})
