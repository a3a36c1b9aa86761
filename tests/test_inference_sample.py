"""The denoising loop: against the released implementation's traces, and what a batch must not change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inference.sample import LatentShape, Noise, draw_noise, sample, seeded
from magihuman.denoiser import Denoiser, PackConfig
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.models.dit import DiTConfig, SingleStreamDiT
from magihuman.super_resolution import noise_audio, noise_video, upsample_latents

SHAPE = LatentShape(channels=4, frames=3, height=4, width=4, audio=9, audio_channels=6)
FP32_TOLERANCE = 2e-4  # of the vectors' manifest
BF16_TOLERANCE = 0.08  # relative L2


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Case:
    """A stored run of the released sampling loop."""

    def __init__(self, folder: Path, name: str, dtype: torch.dtype) -> None:
        self.meta = json.loads((folder / "manifest.json").read_text())["files"][name]["meta"]
        self.tensors = load_file(folder / f"{name}.safetensors")
        self.dtype = dtype
        self.settings = self.meta["evaluation_config"]

    def denoiser(self, stage: str, coords: str) -> Denoiser:
        values = self.meta["model_config" if stage == "base" else "sr_model_config"]
        fields = DiTConfig.__dataclass_fields__
        model = SingleStreamDiT(
            DiTConfig.from_dict({key: value for key, value in values.items() if key in fields}),
            compute_dtype=self.dtype,
            linear_dtype=torch.bfloat16,
        )
        prefix = f"w/{stage}/"
        model.load_state_dict(
            {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        )
        field = self.settings["data_proxy_config"]["frame_receptive_field"]
        return Denoiser(model, PackConfig(coords_style=coords, frame_receptive_field=field)).eval()

    def text(self, key: str) -> list[torch.Tensor]:
        return [self.tensors[f"in/{key}"][0, : self.meta[f"{key}_len"]]]

    def trace(self, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = "trace" if self.dtype == torch.float32 else "trace_bf16"
        return self.tensors[f"{prefix}/{stage}/video_out"], self.tensors[f"{prefix}/{stage}/audio_out"]

    def image(self, height: int, width: int) -> torch.Tensor | None:
        return self.tensors.get(f"in/image_latent_h{height}_w{width}")

    def base(self) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run our loop on the stored noise: video, audio, and the state after every step."""
        guided = self.settings["cfg_number"] == 2
        draws = [self.tensors[key] for key in sorted(self.tensors) if key.startswith("noise/")]
        given = self.tensors["in/audio_latent"].transpose(1, 2) if self.meta["a2v"] else None
        audio, video = (None, draws[0]) if self.meta["a2v"] else (draws[0], draws[1])
        fresh = [] if guided else draws[2 : 2 + 2 * self.meta["steps"]]
        steps = list(zip(fresh[0::2], fresh[1::2], strict=True))
        sound = (given if given is not None else audio).shape
        shape = LatentShape(*video.shape[1:], sound[1], sound[2])
        height, width = self.meta["br"]
        states: list[tuple[torch.Tensor, torch.Tensor]] = []
        video, sounds = sample(
            self.denoiser("base", "v2"),
            self.text("context"),
            self.text("context_null") if guided else None,
            shape,
            self.meta["steps"],
            "unipc" if guided else "renoise",
            Guidance() if guided else None,
            image_latent=self.image(height, width) if self.meta["image"] else None,
            audio_latent=given,
            noise=Noise(video, audio, steps),
            progress=lambda i, n, video, audio: states.append((video, audio)),
        )
        return video, sounds, states


CASES = ["loop_base_t2v", "loop_distill_t2v", "loop_a2v_base"]
STAGED = ["loop_base_ti2v_sr", "loop_distill_sr_cfg1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*CASES, *STAGED])
def test_base_stage_follows_the_released_loop(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    video, audio, states = case.base()
    traced_video, traced_audio = case.trace("base")
    assert len(states) == case.meta["steps"]
    pairs = [
        pair
        for i, (v, a) in enumerate(states)
        for pair in ((v, traced_video[i]), (a, traced_audio[i]))
        if dtype == torch.float32 or i == len(states) - 1
    ]
    if name in CASES:
        prefix = "out" if dtype == torch.float32 else "out_bf16"
        pairs += [(video, case.tensors[f"{prefix}/video"]), (audio, case.tensors[f"{prefix}/audio"])]
    for ours, theirs in pairs:
        if dtype == torch.float32:
            assert (ours - theirs).abs().max() <= FP32_TOLERANCE
        else:
            assert relative(ours, theirs) <= BF16_TOLERANCE
    if case.meta["image"]:
        image = case.image(*case.meta["br"])
        assert torch.equal(video[:, :, :1], image)
        assert not torch.equal(states[-1][0][:, :, :1], image)  # the loop's last step moved it


class StageGuidance(Guidance):
    """The second stage's scales: one value per latent frame, lower at the start (SPEC 4.4)."""

    def __call__(self, modality: str, timestep: int) -> Any:
        return torch.tensor([2.0, 3.5, 3.5]).view(1, 1, 3, 1, 1)


@pytest.mark.parametrize("name", STAGED)
def test_the_loop_serves_the_second_stage_too(golden: Path, name: str) -> None:
    """Another start, frozen audio, scales per frame: all given as arguments."""
    case = Case(golden, name, torch.float32)
    video, audio, _ = case.base()
    draws = sorted(key for key in case.tensors if key.startswith("noise/"))[-2:]
    target = case.tensors["trace/sr/video_in"].shape[-2:]
    start = noise_video(upsample_latents(video, *target), case.tensors[draws[0]], 0.8389104008674622)
    sound = noise_audio(audio, case.tensors[draws[1]])
    guided = case.settings["sr_cfg_number"] == 2
    result, untouched = sample(
        case.denoiser("sr", "v1"),
        case.text("context"),
        case.text("context_null") if guided else None,
        LatentShape(*start.shape[1:], *sound.shape[1:]),
        case.meta["sr_steps"],
        guidance=StageGuidance() if guided else None,
        image_latent=case.image(target[0] * 16, target[1] * 16) if case.meta["image"] else None,
        audio_latent=sound,
        noise=Noise(start, None),
    )
    assert (result - case.tensors["out/video"]).abs().max() <= FP32_TOLERANCE
    assert torch.equal(untouched, sound)
    assert (audio - case.tensors["out/audio"]).abs().max() <= FP32_TOLERANCE


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
    for head in (
        model.final_linear_video,
        model.final_linear_audio,
    ):  # they start as zeros: no velocity at all
        torch.nn.init.normal_(head.weight, std=0.1, generator=generator)
    return Denoiser(model, PackConfig()).eval()


def features(lengths: list[int], seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 8, generator=generator) for n in lengths]


def test_noise_is_drawn_in_the_released_order() -> None:
    noise = draw_noise(SHAPE, seeded([3, 4]), stochastic_steps=2)
    for b, seed in enumerate([3, 4]):
        g = torch.Generator().manual_seed(seed)
        assert noise.audio is not None
        assert torch.equal(noise.audio[b], torch.randn(9, 6, generator=g))
        assert torch.equal(noise.video[b], torch.randn(4, 3, 4, 4, generator=g))
        for video, audio in noise.steps:
            assert audio is not None
            assert torch.equal(video[b], torch.randn(4, 3, 4, 4, generator=g))
            assert torch.equal(audio[b], torch.randn(9, 6, generator=g))


def test_given_audio_draws_nothing() -> None:
    noise = draw_noise(SHAPE, seeded([3]), stochastic_steps=1, given_audio=True)
    g = torch.Generator().manual_seed(3)
    assert noise.audio is None
    assert torch.equal(noise.video[0], torch.randn(4, 3, 4, 4, generator=g))
    assert noise.steps[0][1] is None
    assert torch.equal(noise.steps[0][0][0], torch.randn(4, 3, 4, 4, generator=g))


@pytest.mark.parametrize("solver", ["unipc", "renoise", "euler", "sde"])
@pytest.mark.parametrize("guidance", [None, Guidance()], ids=["plain", "guided"])
def test_a_batch_gives_what_each_prompt_gives_alone(
    denoiser: Denoiser, solver: str, guidance: Guidance | None
) -> None:
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


def test_the_draws_of_training_are_left_alone(denoiser: Denoiser) -> None:
    before = torch.get_rng_state()
    sample(denoiser, features([3]), None, SHAPE, 2, "renoise", generator=seeded([0]))
    assert torch.equal(before, torch.get_rng_state())


def test_a_world_without_sound(denoiser: Denoiser) -> None:
    silent = LatentShape(4, 3, 4, 4, audio=0, audio_channels=6)
    video, audio = sample(denoiser, features([3]), None, silent, 2, generator=seeded([0]))
    assert audio.shape == (1, 0, 6)
    assert torch.isfinite(video).all()


def test_contradicting_arguments(denoiser: Denoiser) -> None:
    with pytest.raises(ValueError, match="negative texts"):
        sample(denoiser, features([3]), None, SHAPE, 2, guidance=Guidance(), generator=seeded([0]))
    with pytest.raises(ValueError, match="2 prompts need 2 generators"):
        sample(denoiser, features([3, 4]), None, SHAPE, 2, generator=seeded([0]))
    with pytest.raises(ValueError, match="holds no audio"):
        sample(denoiser, features([3]), None, SHAPE, 2, noise=Noise(torch.zeros(1, 4, 3, 4, 4), None))
    with pytest.raises(UserError, match="choose from unipc"):
        sample(denoiser, features([3]), None, SHAPE, 2, "heun", generator=seeded([0]))
