"""Super-resolution's training: its inputs are those of inference, its path is the one the solver walks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from safetensors.torch import load_file
from small_sr import RELEASED, SMALL, Fixed, clips, recipe

from inference.super_resolution import draw, refine
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.sampling import seeded
from magihuman.flow.sigmas import SigmaPrior, sigma_grid
from magihuman.flow.solvers import make_solver
from magihuman.flow.super_resolution import coarsen, start, upsample_latents
from magihuman.models.config import PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.training.first_stage import FirstStage, FirstStageSettings
from magihuman.training.rng import BatchRng
from recipes.sr import SuperResolution


def test_the_source_equals_the_release(golden: Path) -> None:
    vector = load_file(golden / "sr_prepare.safetensors")
    noise = vector["video_noise"], vector["audio_noise"]
    video, audio = recipe(**RELEASED).source(
        vector["br_video"], vector["br_audio"], noise, BatchRng(0, 0, range(len(noise[0])))
    )
    torch.testing.assert_close(video, vector["sr_video_init"], atol=1e-6, rtol=0)
    torch.testing.assert_close(audio, vector["sr_audio"], atol=1e-6, rtol=0)


def test_a_training_s_inputs_at_the_path_s_start_equal_the_release(golden: Path) -> None:
    vector = load_file(golden / "sr_prepare.safetensors")
    # Such a shift puts every draw at the start of the path.
    made = recipe(**RELEASED, sigma=SigmaPrior("shifted", shift=1e12), first_frame=0.0)
    batch = {"video": vector["br_video"], "audio": vector["br_audio"], "text": [torch.zeros(2, 5)]}
    batch["video_sr"] = torch.full_like(vector["video_noise"], 7.0)
    unused = torch.zeros_like(vector["br_video"])  # of a first stage that resamples
    rng = Fixed([vector["video_noise"], vector["audio_noise"], unused])
    noised = made.noised(made.paired(batch), rng, conditioned=True)
    assert noised.sigma.tolist() == [1.0]
    torch.testing.assert_close(noised.video, vector["sr_video_init"], atol=1e-6, rtol=0)
    torch.testing.assert_close(noised.audio, vector["sr_audio"], atol=1e-6, rtol=0)
    torch.testing.assert_close(noised.video_target, vector["sr_video_init"] - 7, atol=1e-6, rtol=0)


def test_training_and_inference_begin_with_the_same_bits() -> None:
    made, batch = recipe(**RELEASED), clips(2)
    shape = (3, 3, 8, 8), (9, 4)
    noise = draw(shape, seeded([5, 6]), "cpu")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.append((inputs[0].clone(), inputs[1].clone()))

    denoiser = made.network.eval()
    assert isinstance(denoiser, Denoiser)
    handle = denoiser.register_forward_pre_hook(spy)
    refine(denoiser, batch["video"], batch["audio"], batch["text"], None, shape, noise, steps=2)
    handle.remove()
    video, audio = made.source(batch["video"], batch["audio"], noise, BatchRng(0, 0, range(2)))
    assert torch.equal(video, seen[0][0])
    assert torch.equal(audio, seen[0][1])
    assert torch.equal(audio, seen[1][1])  # never updated
    assert denoiser.pack.coords_style == "v1"


def test_indices_and_levels_fill_their_ranges_and_are_logged() -> None:
    made = recipe(noise_index=(200, 203), audio_noise=(0.6, 0.8))
    quiet = torch.zeros(200, 1, 1, 1, 1), torch.ones(200, 1, 1)
    ones = torch.ones(200, 1, 1, 1, 1)
    video, audio = made.source(ones, torch.zeros(200, 1, 1), quiet, BatchRng(0, 0, range(200)))
    from magihuman.flow.sigmas import zero_snr_table

    signals = set(video.flatten().tolist())
    assert signals == set(zero_snr_table()[200:204].tolist())
    assert 0.6 <= float(audio.min()) < 0.61
    assert 0.79 < float(audio.max()) <= 0.8
    logged = made.meter.flush()
    assert abs(logged["noise_index"] - 201.5) < 0.3
    assert abs(logged["audio_noise"] - 0.7) < 0.01


def test_inputs_and_targets_lie_on_the_line_from_the_source_to_the_clip() -> None:
    made, batch = recipe(first_frame=0.0), clips()
    noised = made.noised(made.paired(batch), BatchRng(0, 0, range(4)), conditioned=True)
    clean = batch["video_sr"].float()
    place = noised.sigma.view(-1, 1, 1, 1, 1)
    source = noised.video_target + clean
    torch.testing.assert_close(noised.video, (1 - place) * clean + place * source)
    # The source is the enlarged clip with noise of weight .54, not noise alone.
    enlarged = upsample_latents(batch["video"], 8, 8)
    assert 0.4 < float((source - 0.84 * enlarged).std()) < 0.7
    flow = recipe(first_frame=0.0, path="flow").noised(made.paired(batch), BatchRng(0, 0, range(4)), True)
    assert abs(float((flow.video_target + clean).std()) - 1) < 0.1
    assert torch.equal(flow.audio, noised.audio)


def test_a_given_first_frame_is_clean_at_this_size_and_counts_for_nothing() -> None:
    made, batch = recipe(first_frame=1.0), clips()
    noised = made.noised(made.paired(batch), BatchRng(0, 0, range(4)), conditioned=True)
    assert torch.equal(noised.video[:, :, 0], batch["video_sr"][:, :, 0].float())
    assert noised.mask[:, :, 0].eq(0).all()
    assert noised.mask[:, :, 1:].eq(1).all()
    free = made.noised(made.paired(batch), BatchRng(0, 0, range(4)), conditioned=False)
    assert free.mask.eq(1).all()


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_the_solver_walks_the_path_that_is_trained_on(solver: str, steps: int) -> None:
    clean, enlarged, noise = torch.randn(3, 1, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (source, _) = start(enlarged, torch.zeros(1, 0, 4), (noise, torch.zeros(1, 0, 4)), 0.8389104)
    made = make_solver(solver, steps, 5.0)
    x, sigmas = source, sigma_grid(steps, 5.0).tolist()
    for i in range(steps):
        place = sigmas[i] / sigmas[0]
        torch.testing.assert_close(x, place * source + (1 - place) * clean, atol=2e-4, rtol=0)
        # The field of the line, where the solver's sigma is the place on it: x = z + sigma v.
        x = made.step((x - clean) / sigmas[i], i, x)
    torch.testing.assert_close(x, clean, atol=2e-4, rtol=0)


def test_the_usual_target_would_give_a_wrong_estimate() -> None:
    clean, noise = torch.randn(2, 1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    source, _ = start(clean, torch.zeros(1, 0, 4), (noise, torch.zeros(1, 0, 4)), 0.8389104)
    sigma = float(sigma_grid(5, 5.0)[0])
    torch.testing.assert_close(source - sigma * (source - clean), clean, atol=1e-3, rtol=0)
    estimate = source - sigma * (noise - clean)
    torch.testing.assert_close(estimate, 1.8389 * clean - 0.4557 * noise, atol=2e-3, rtol=0)


def test_step_weights_are_the_grid_s_step_lengths() -> None:
    made, steps = recipe(), 2000
    sigmas = sigma_grid(steps, 5.0).double()
    lengths = (sigmas[:-1] - sigmas[1:]) * steps
    weights = made.step_weight((sigmas[:-1] + sigmas[1:]) / 2)
    torch.testing.assert_close(weights, lengths, rtol=5e-3, atol=0)
    assert abs(float(weights.mean()) - 1) < 1e-3
    # Most of the weight lies behind the place where the last of five steps begins, a fifth of the draws.
    behind = sigmas[:-1] < sigma_grid(5, 5.0)[4]
    assert float(weights[behind].sum() / weights.sum()) == pytest.approx(0.556, abs=2e-3)
    assert float(behind.double().mean()) == pytest.approx(0.2, abs=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_step_weights_have_mean_one_where_positions_end_early(steps: int) -> None:
    made = recipe(steps=steps, sigma=None, weight="step")
    weights = made.step_weight(made.sigma.sample(50_000, torch.Generator().manual_seed(0))[0])
    assert float(weights.mean()) == pytest.approx(1, abs=0.01)


def test_weight_and_audio_weight_enter_the_loss() -> None:
    batch = clips()
    losses = {
        key: recipe(weight=key[0], audio_weight=key[1]).loss(batch, BatchRng(0, 0, range(4))).item()
        for key in (("one", 0.0), ("one", 1.0), ("step", 0.0))
    }
    made = recipe(weight="one", audio_weight=0.0)
    made.loss(batch, BatchRng(0, 0, range(4)))
    counted = made.meter.flush()
    # Zero heads predict nothing: the losses are the targets' squares.
    assert losses["one", 0.0] == pytest.approx(counted["loss/video"], rel=1e-5)
    assert losses["one", 1.0] - losses["one", 0.0] == pytest.approx(counted["loss/audio"], rel=1e-4)
    assert losses["step", 0.0] != pytest.approx(losses["one", 0.0], rel=1e-3)


def test_clips_without_sound_train_on_the_picture_alone() -> None:
    batch = training_stub.batch(range(8, 10), sound=False)
    batch["video_sr"] = batch["video"].repeat_interleave(2, -2).repeat_interleave(2, -1)
    loss = recipe().loss(batch, BatchRng(0, 0, range(2)))
    assert torch.isfinite(loss)


def test_local_layers_train_and_give_the_masked_network_s_gradients() -> None:
    made, batch = recipe(), clips()
    exact: list[torch.Tensor] = []
    local = replace(SMALL, local_attn_layers=(0, 1))
    for backend in ("auto", "reference"):  # as trainings choose it: range pairs with log-sum-exp on a CPU
        denoiser = zoo.build(local, PackConfig(2, "v1", frame_receptive_field=1), compute_dtype=torch.float32, seed=1)
        for head in (denoiser.model.final_linear_video, denoiser.model.final_linear_audio):
            torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))
        denoiser.model.attention_backend = backend
        made.denoiser = denoiser
        assert denoiser.model.window == 1
        assert all(block.local for block in denoiser.model.block.layers)
        made.loss(batch, BatchRng(0, 0, range(4))).backward()
        grads = torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])
        exact.append(grads)
    assert float(exact[0].norm()) > 0
    assert float((exact[0] - exact[1]).norm() / exact[1].norm()) < 1e-5


# What is refined


def test_coarse_latents_lose_detail_and_keep_their_mean() -> None:
    latents = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coarsen(latents, 1), latents)
    small = coarsen(latents, 4)
    assert small.shape == latents.shape
    assert float(small.std()) < 0.4 * float(latents.std())
    flat = torch.full((1, 1, 1, 8, 8), 3.0)
    torch.testing.assert_close(coarsen(flat, 8), flat)
    one = FirstStage(FirstStageSettings(coarse=1.0, coarse_factors=(8,)))
    torch.testing.assert_close(one(latents, torch.zeros(2, 0, 4), [], BatchRng(0, 0, range(2))), coarsen(latents, 8))
    none = FirstStage(FirstStageSettings())
    assert none(latents, torch.zeros(2, 0, 4), [], BatchRng(0, 0, range(2))) is latents


def test_a_share_of_clips_is_resampled_by_the_base() -> None:
    latents = torch.randn(40, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sound, text = torch.randn(40, 9, 4), [torch.randn(2, 5) for _ in range(40)]
    asked: list[int] = []

    class Perfect(torch.nn.Module):
        """Knows that every clip is 7."""

        def forward(self, x: torch.Tensor, heard: torch.Tensor, words: list[torch.Tensor]) -> Any:
            asked.append(len(x))
            assert len(words) == len(heard) == len(x)
            # On the path to 7 the noise level shows as the distance; exact for a clip that is 7.
            return (x - 7) / self.level, None

        level = 1.0

    base = Perfect()
    settings = FirstStageSettings(base="x", base_share=0.5, base_sigma=(0.5, 0.5), base_steps=1)
    stage = FirstStage(settings, base)  # type: ignore[arg-type]
    base.level = 0.5
    made = stage(latents, sound, text, BatchRng(0, 0, range(40)))
    changed = (made != latents).flatten(1).any(1)
    assert 10 <= int(changed.sum()) <= 30
    assert asked == [int(changed.sum())]
    torch.testing.assert_close(made[changed], torch.full_like(made[changed], 7.0), atol=1e-5, rtol=0)
    assert torch.equal(made[~changed], latents[~changed])


def test_first_stage_latents_can_be_made_from_the_large_ones() -> None:
    from data.tiny.puppets import draw_puppet, render
    from magihuman.codecs.bundle import load_bundle

    codec = load_bundle("tiny").video_codec

    def encoded(size: int) -> torch.Tensor:
        frames = torch.from_numpy(render(draw_puppet(0, 1), size)).permute(3, 0, 1, 2)[None]
        return codec.encode(frames.float() / 127.5 - 1)

    stage = FirstStage(FirstStageSettings(size=(64, 64)), codec=codec)
    made, wanted = stage.downsized(encoded(128)), encoded(64)
    assert made.shape == wanted.shape
    assert float((made - wanted).square().mean() / wanted.square().mean()) < 0.02


def test_settings_that_cannot_be_are_one_line() -> None:
    one_size = replace(recipe().context, sr_size=None)
    stage = FirstStageSettings()
    with pytest.raises(UserError, match="hold clips at one size; prepare them with sr_sizes="):
        SuperResolution(one_size, first_stage=stage)
    with pytest.raises(UserError, match="noise_index"):
        recipe(noise_index=(300, 200))
    with pytest.raises(UserError, match="base_share needs"):
        FirstStageSettings(base_share=0.2)
    with pytest.raises(UserError, match="inside"):
        FirstStageSettings(base_sigma=(0.2, 1.0))


# The program around it


def test_it_starts_from_a_first_stage_and_exports_its_own_size(tmp_path: Path) -> None:
    shards = training_stub.write_shards(tmp_path / "shards")
    base = training_stub.train_here(tmp_path / "base", shards, ["+recipe=pretrain", "trainer.max_steps=1"])
    run = training_stub.train_here(
        tmp_path / "sr", shards, ["+recipe=sr", f"init={base}", "model.dit.local_attn_layers=[1]", "optim.lr=1e-12"]
    )
    config = zoo.config_of(run)
    assert (config.size.height, config.size.width, config.pack.coords_style) == (32, 32, "v1")
    assert config.model.local_attn_layers == (1,)
    assert zoo.config_of(base).size.height == 16
    weights = "export/model-00001-of-00001.safetensors"
    old, new = load_file(base / weights), load_file(run / weights)
    assert all(torch.allclose(old[k].float(), new[k].float(), atol=1e-6) for k in old)
    with pytest.raises(UserError, match="coords_style: 'v2' against 'v1'"):
        training_stub.train_here(
            tmp_path / "other", shards, ["+recipe=pretrain", f"init={base}", "model.pack.coords_style=v1"]
        )


@pytest.mark.parametrize(("name", "local"), [("sr_540p", 0), ("sr_1080p", 32)])
def test_the_released_settings_compose_and_build(name: str, local: int) -> None:
    from magihuman.composition import plain
    from magihuman.config import validate
    from magihuman.zoo.released import local_layers

    node = plain(training_stub.compose([f"+experiment={name}", "init=x", "data.module.shards=y", "folder=z"]))
    settings = validate(node)
    assert settings.model is not None
    assert settings.model.pack.coords_style == "v1"
    assert len(settings.model.dit.local_attn_layers) == local
    if local:
        assert settings.model.dit.local_attn_layers == tuple(local_layers(40))
        assert settings.model.pack.frame_receptive_field == 11
    denoiser = zoo.build(settings.model.dit, settings.model.pack, compute_dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in denoiser.parameters()) == 15_299_419_136
    assert denoiser.pack.coords_style == "v1"
    assert denoiser.model.window == (11 if local else None)
    windowed = [number for number, block in enumerate(denoiser.model.block.layers) if block.local]
    assert windowed == list(settings.model.dit.local_attn_layers)


def test_infer_takes_the_run_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.loading import find
    from inference.requests import InferOptions

    shards = training_stub.write_shards(tmp_path / "shards")
    base = training_stub.train_here(tmp_path / "base", shards, ["+recipe=pretrain", "trainer.max_steps=1"])
    run = training_stub.train_here(tmp_path / "sr", shards, ["+recipe=sr", "trainer.max_steps=1"])
    source = find(InferOptions(checkpoint=str(base), sr=str(run)))
    assert source.second is not None
    from inference.settings import resolve

    settings = resolve(source.config, source.second)
    assert settings.sr is not None
    assert (settings.height, settings.sr.height, settings.sr.width) == (16, 32, 32)
    assert (settings.sr.steps, settings.sr.shift, settings.sr.guidance) == (5, 5.0, 1.0)
    with pytest.raises(UserError, match="for the second stage; give it as sr="):
        find(InferOptions(checkpoint=str(run)))


def test_a_caption_of_one_token_is_one_line() -> None:
    batch = clips()
    batch["text"][2] = batch["text"][2][:1]
    made = recipe()
    with pytest.raises(UserError, match="a single token, which has no position in coordinates v1"):
        made.loss(batch, BatchRng(0, 0, range(4)))


def test_figures_on_held_out_clips() -> None:
    made = recipe()
    with torch.no_grad():
        figures = made.validation_metrics(made.network, clips(), BatchRng(0, 0, range(4)))
    assert set(figures) == {"val/video", "val/audio", "val/start", "val/audio_gap"}
    # Zero heads leave the start as it is, whatever is heard.
    assert figures["val/audio_gap"] == 0
    assert figures["val/start"] > 0
