"""The sampling loop of both stages against stored runs of the release: every step and the results."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from magihuman.flow.guidance import FrameScales, Guidance, combine, frame_scales
from magihuman.flow.sampling import Conditioning, Noise, Pair, denoise
from magihuman.flow.sigmas import zero_snr_table
from magihuman.flow.solvers import make_solver
from magihuman.flow.super_resolution import NOISE_INDEX, start
from magihuman.models.config import PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.zoo.checks import Result, VectorCase, compare, compare_relative
from magihuman.zoo.checks.network import dit_config

FP32 = 2e-4
BF16 = 0.08  # relative L2


Loop = Callable[..., Pair]
"""A sampling loop for one clip with the parameters of `guided_loop`, or another implementation to be checked."""


@torch.no_grad()
def guided_loop(
    denoiser: Denoiser,
    text: list[Tensor],
    negative_text: list[Tensor] | None,
    noise: Noise,
    *,
    steps: int,
    solver: str,
    shift: float,
    guidance: Guidance | FrameScales | None,
    image_latent: Tensor | None,
    keep_audio: bool,
    on_step: Callable[[Pair], None],
) -> Pair:
    """`magihuman.flow.sampling.denoise` with a conditional and, with guidance, an unconditional pass per step.

    Returns the latents after the last step; `keep_audio` leaves the audio of `noise` unchanged.
    """
    video_solver, audio_solver = make_solver(solver, steps, shift), make_solver(solver, steps, shift)
    timesteps = video_solver.timesteps.tolist()

    def velocity(x: Pair, i: int) -> Pair:
        conditional = Pair(*denoiser(*x, text))
        if guidance is None or negative_text is None:
            return conditional
        unconditional = denoiser(*x, negative_text)
        return Pair(
            combine(conditional.video, unconditional[0], guidance("video", timesteps[i])),
            combine(conditional.audio, unconditional[1], guidance("audio", timesteps[i])),
        )

    conditioning = None if image_latent is None else Conditioning.first_frame(image_latent, noise.start)
    solvers = video_solver, None if keep_audio else audio_solver
    return denoise(velocity, solvers, noise, conditioning, lambda i, x, v, stepped: on_step(stepped))


def check_loop(case: VectorCase, loop: Loop = guided_loop) -> list[Result]:
    """Base stage and, if stored, super-resolution: every step and the results, in fp32 and in bf16 compute.

    Starts, fresh noise and encoded conditions are the stored ones.
    """
    results = []
    for dtype, trace, out in ((torch.float32, "trace/", "out/"), (torch.bfloat16, "trace_bf16/", "out_bf16/")):
        run = _LoopRun(case, dtype, loop)
        states, last = run.base()
        results += _compare_steps(case, states, f"{trace}base", dtype)
        if case.meta["sr"][0] is not None:
            states, video = run.super_resolution(*last)
            results += _compare_steps(case, states, f"{trace}sr", dtype)
            last = Pair(video, last.audio)
        results.append(_compare(f"{out}video", last.video, case.tensors[f"{out}video"], dtype))
        results.append(_compare(f"{out}audio", last.audio, case.tensors[f"{out}audio"], dtype))
    return results


def _compare(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Result:
    if dtype == torch.float32:
        return compare(what, ours, theirs, FP32)
    return compare_relative(what, ours, theirs, BF16)


def _compare_steps(case: VectorCase, states: Sequence[Pair], trace: str, dtype: torch.dtype) -> list[Result]:
    videos, audios = (torch.stack(parts) for parts in zip(*states, strict=True))
    return [
        _compare(f"{trace}/video_out", videos, case.tensors[f"{trace}/video_out"], dtype),
        _compare(f"{trace}/audio_out", audios, case.tensors[f"{trace}/audio_out"], dtype),
    ]


class _LoopRun:
    """One stored run with its settings."""

    def __init__(self, case: VectorCase, dtype: torch.dtype, loop: Loop) -> None:
        self.case, self.dtype, self.loop = case, dtype, loop
        self.meta, self.settings = case.meta, case.meta["evaluation_config"]
        self.noise = [tensor for _, tensor in sorted(case.group("noise/").items())]

    def denoiser(self, stage: str, config: str, coords: str) -> Denoiser:
        model = SingleStreamDiT(dit_config(self.meta[config]), compute_dtype=self.dtype, linear_dtype=torch.bfloat16)
        model.load_state_dict(self.case.group(f"w/{stage}/"))
        model.attention_backend = "reference"
        proxy = self.settings["data_proxy_config"]
        pack = PackConfig(proxy["patch_size"], coords, proxy["frame_receptive_field"])
        return Denoiser(model, pack).eval()

    def text(self, name: str) -> list[Tensor]:
        return [self.case.tensors[f"in/{name}"][0, : self.meta[f"{name}_len"]]]

    def image(self, video: Tensor) -> Tensor | None:
        height, width = (side * self.settings["vae_stride"][1] for side in video.shape[-2:])
        return self.case.tensors[f"in/image_latent_h{height}_w{width}"] if self.meta["image"] else None

    def base(self) -> tuple[list[Pair], Pair]:
        """Latents after every step of the base stage, and its result."""
        guided, steps, noise = self.settings["cfg_number"] == 2, self.meta["steps"], list(self.noise)
        if self.meta["a2v"]:
            first = Pair(noise.pop(0), self.case.tensors["in/audio_latent"].transpose(1, 2))
        else:
            audio, video = noise.pop(0), noise.pop(0)
            first = Pair(video, audio)
        fresh = [] if guided else list(map(Pair, noise[: 2 * steps : 2], noise[1 : 2 * steps : 2]))
        guidance = Guidance(
            video_high=self.settings["video_txt_guidance_scale"], audio=self.settings["audio_txt_guidance_scale"]
        )
        denoiser, solver = self.denoiser("base", "model_config", "v2"), "unipc" if guided else "renoise"
        noise_of_run = Noise(first, fresh)
        return self.sample(denoiser, noise_of_run, steps, solver, guidance if guided else None, self.meta["a2v"])

    def super_resolution(self, video: Tensor, audio: Tensor) -> tuple[list[Pair], Tensor]:
        """Latents after every step of the second stage, and its video; the clip keeps the base stage's audio."""
        noise, guidance = (self.noise[-2], self.noise[-1]), None
        if self.settings["sr_cfg_number"] == 2:
            guidance = frame_scales(
                self.settings["sr_video_txt_guidance_scale"],
                video.shape[2],
                self.settings["cfg_trick_start_frame"] if self.settings["use_cfg_trick"] else 0,
                self.settings["cfg_trick_value"],
            )
        first = Pair(*start(video, audio, noise, zero_snr_table()[NOISE_INDEX].item()))
        denoiser = self.denoiser("sr", "sr_model_config", "v1")
        states, last = self.sample(denoiser, Noise(first), self.meta["sr_steps"], "unipc", guidance, True)
        return states, last.video

    def sample(
        self,
        denoiser: Denoiser,
        noise: Noise,
        steps: int,
        solver: str,
        guidance: Guidance | FrameScales | None,
        keep_audio: bool,
    ) -> tuple[list[Pair], Pair]:
        states: list[Pair] = []
        last = self.loop(
            denoiser,
            self.text("context"),
            None if guidance is None else self.text("context_null"),
            noise,
            steps=steps,
            solver=solver,
            shift=self.settings["shift"],
            guidance=guidance,
            image_latent=self.image(noise.start.video),
            keep_audio=keep_audio,
            on_step=states.append,
        )
        return states, last
