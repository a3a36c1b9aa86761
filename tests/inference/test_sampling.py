"""The denoising loop: against the released implementation's traces, and what a batch must not change."""

from pathlib import Path

import pytest
import torch
from released_loop import check_released_loop

from inference.sampling import sample
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import Conditioning, Pair, denoise, draw_noise, seeded
from magihuman.flow.solvers import make_solver
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT

SHAPE = (4, 3, 4, 4), (9, 6)


@pytest.mark.parametrize(
    ("name", "comparisons"),
    [
        ("loop_base_t2v", 12),
        ("loop_distill_t2v", 12),
        ("loop_a2v_base", 12),
        ("loop_base_ti2v_sr", 17),
        ("loop_distill_sr_cfg1", 17),
    ],
)
def test_the_loop_follows_the_released_one(golden: Path, name: str, comparisons: int) -> None:
    results = check_released_loop(golden, name)
    assert [result for result in results if not result.passed] == []
    assert len(results) == comparisons


def test_a_wrong_loop_would_be_noticed(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One guidance scale moved by a hundredth, or the last overwrite of the first frame left out."""
    wrong = "magihuman.zoo.checks.loop.Guidance"
    monkeypatch.setattr(wrong, lambda **scales: Guidance(**{**scales, "audio": 5.05}))
    assert "out/audio" in {result.what for result in check_released_loop(golden, "loop_base_t2v") if not result.passed}
    monkeypatch.undo()
    monkeypatch.setattr(Conditioning, "insert", lambda self, generated: generated)
    assert "out/video" in {
        result.what for result in check_released_loop(golden, "loop_base_ti2v_sr") if not result.passed
    }


# ------------------------------------------------------------------------------- without the stored vectors


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    config = DiTConfig(
        num_layers=2,
        hidden_size=32,
        head_dim=16,
        num_query_groups=1,
        video_in_channels=16,
        audio_in_channels=6,
        text_in_channels=8,
        mm_layers=(0,),
        gelu7_layers=(0,),
    )
    model = SingleStreamDiT(config, compute_dtype=torch.float32)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for head in (model.final_linear_video, model.final_linear_audio):  # they start as zeros: no velocity at all
        torch.nn.init.normal_(head.weight, std=0.1, generator=generator)
    return Denoiser(model, PackConfig()).eval()


def features(lengths: list[int], seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 8, generator=generator) for n in lengths]


def test_noise_is_drawn_in_the_released_order() -> None:
    noise = draw_noise(SHAPE, seeded([3, 4]), steps=2)
    for b, seed in enumerate([3, 4]):
        g = torch.Generator().manual_seed(seed)
        assert torch.equal(noise.start.audio[b], torch.randn(9, 6, generator=g))
        assert torch.equal(noise.start.video[b], torch.randn(4, 3, 4, 4, generator=g))
        for video, audio in noise.steps:
            assert torch.equal(video[b], torch.randn(4, 3, 4, 4, generator=g))
            assert torch.equal(audio[b], torch.randn(9, 6, generator=g))


def test_given_audio_draws_nothing() -> None:
    audio = torch.zeros(1, 9, 6)
    noise = draw_noise(SHAPE, seeded([3]), steps=1, audio=audio, audio_steps=False)
    g = torch.Generator().manual_seed(3)
    assert noise.start.audio is audio
    assert torch.equal(noise.start.video[0], torch.randn(4, 3, 4, 4, generator=g))
    assert not noise.steps[0][1].numel()
    assert torch.equal(noise.steps[0][0][0], torch.randn(4, 3, 4, 4, generator=g))


def test_the_second_stage_draws_its_video_first_and_overwritten_audio_draws_in_the_steps() -> None:
    g = torch.Generator().manual_seed(3)
    start = draw_noise(SHAPE, seeded([3]), video_first=True).start
    assert torch.equal(start.video[0], torch.randn(4, 3, 4, 4, generator=g))
    assert torch.equal(start.audio[0], torch.randn(9, 6, generator=g))
    g.manual_seed(3)
    noise = draw_noise(SHAPE, seeded([3]), steps=1, audio=torch.zeros(1, 9, 6))
    assert torch.equal(noise.start.video[0], torch.randn(4, 3, 4, 4, generator=g))
    assert torch.equal(noise.steps[0].video[0], torch.randn(4, 3, 4, 4, generator=g))
    assert torch.equal(noise.steps[0].audio[0], torch.randn(9, 6, generator=g))


@pytest.mark.parametrize("solver", ["unipc", "renoise", "euler", "sde"])
@pytest.mark.parametrize("guidance", [None, Guidance()], ids=["plain", "guided"])
def test_a_batch_gives_what_each_prompt_gives_alone(denoiser: Denoiser, solver: str, guidance: Guidance | None) -> None:
    text, negative = features([3, 1, 5]), features([2, 2, 2], seed=6)
    image = torch.randn(3, 4, 1, 4, 4, generator=torch.Generator().manual_seed(9))

    def run(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return sample(
            denoiser,
            [text[i] for i in rows],
            [negative[i] for i in rows],
            SHAPE,
            4,
            solver,
            guidance,
            generator=seeded([10 + i for i in rows]),
            image_latent=image[rows],
        )

    together = run([0, 1, 2])
    for i in range(3):
        alone, again = run([i]), run([i])
        for part in range(2):
            assert torch.equal(alone[part], again[part])
            assert (together[part][i] - alone[part][0]).abs().max() < 1e-4
    assert not torch.allclose(together[1][0], together[1][1], atol=0.1)
    assert torch.equal(together[0][:, :, :1], image)


@pytest.mark.parametrize("solver", ["unipc", "renoise"])
def test_given_audio_is_never_changed_and_steers_the_video(denoiser: Denoiser, solver: str) -> None:
    """Also without guidance, where the released code overwrites it (SPEC O2)."""
    videos = []
    for seed in (1, 2):
        given = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(seed))
        video, audio = sample(
            denoiser, features([3]), None, SHAPE, 3, solver, generator=seeded([0]), audio_latent=given
        )
        assert torch.equal(audio, given)
        noise = draw_noise(SHAPE, seeded([0]), 3 if solver == "renoise" else 0, audio=given, audio_steps=False)
        drawn = sample(denoiser, features([3]), None, SHAPE, 3, solver, noise=noise, audio_latent=given)
        assert torch.equal(drawn[0], video)
        videos.append(video)
    assert not torch.allclose(videos[0], videos[1], atol=1e-3)


def test_guidance_of_one_is_no_guidance(denoiser: Denoiser) -> None:
    text, off = features([3]), Guidance(1, 1, audio=1)
    plain = sample(denoiser, text, None, SHAPE, 3, generator=seeded([0]))
    unit = sample(denoiser, text, None, SHAPE, 3, guidance=off, generator=seeded([0]))
    assert torch.equal(plain[0], unit[0])
    strong = sample(denoiser, text, features([2]), SHAPE, 3, guidance=Guidance(), generator=seeded([0]))
    assert not torch.allclose(plain[0], strong[0], atol=1e-3)


def test_progress_reports_every_step(denoiser: Denoiser) -> None:
    seen: list[tuple[int, int]] = []
    video, _ = sample(
        denoiser,
        features([3]),
        None,
        SHAPE,
        3,
        "euler",
        generator=seeded([0]),
        progress=lambda i, n, video, audio: seen.append((i, n)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert video.dtype == torch.float32
    assert not video.requires_grad


def test_solvers_with_a_state_can_integrate_again() -> None:
    solvers, noise = (make_solver("unipc", 3), make_solver("unipc", 3)), draw_noise(SHAPE, seeded([0]))
    first, again = (denoise(lambda x, i: Pair(x.video.sin(), x.audio.cos()), solvers, noise) for _ in range(2))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)


def test_the_draws_of_training_are_left_alone(denoiser: Denoiser) -> None:
    before = torch.get_rng_state()
    sample(denoiser, features([3]), None, SHAPE, 2, "renoise", generator=seeded([0]))
    assert torch.equal(before, torch.get_rng_state())


def test_a_world_without_sound(denoiser: Denoiser) -> None:
    silent = (4, 3, 4, 4), (0, 6)
    video, audio = sample(denoiser, features([3]), None, silent, 2, generator=seeded([0]))
    assert audio.shape == (1, 0, 6)
    assert torch.isfinite(video).all()


def test_contradicting_arguments(denoiser: Denoiser) -> None:
    with pytest.raises(ValueError, match="negative texts"):
        sample(denoiser, features([3]), None, SHAPE, 2, guidance=Guidance(), generator=seeded([0]))
    with pytest.raises(ValueError, match="2 prompts need 2 generators"):
        sample(denoiser, features([3, 4]), None, SHAPE, 2, generator=seeded([0]))
    with pytest.raises(UserError, match="choose from unipc"):
        sample(denoiser, features([3]), None, SHAPE, 2, "heun", generator=seeded([0]))
