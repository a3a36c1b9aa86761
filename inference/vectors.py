"""Check of the sampling loop against stored runs of the released one, for `python -m magihuman.zoo verify`.

The zoo reaches this module by name (`magihuman.zoo.checks.KINDS`), since it may not import the inference package.
"""

import torch
from torch import Tensor

from inference.sampling import LatentShape, sample
from inference.super_resolution import frame_scales, refine
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import Noise, Pair
from magihuman.models.denoiser import Denoiser, PackConfig
from magihuman.models.dit import SingleStreamDiT
from magihuman.zoo.checks import Case, Result, compare, compare_relative
from magihuman.zoo.checks.dit import dit_config

FP32 = 2e-4
BF16 = 0.08  # relative L2

State = tuple[Tensor, Tensor]


def check_loop(case: Case) -> list[Result]:
    """Base stage and, where there is one, super-resolution: every step in fp32 compute, the results in bf16 too.

    Starts, fresh noise and encoded conditions are the stored ones.
    """
    results = []
    for dtype, trace, out in (
        (torch.float32, "trace/", "out/"),
        (torch.bfloat16, "trace_bf16/", "out_bf16/"),
    ):
        run = _Run(case, dtype)
        states, video, audio = run.base()
        results += _compare_steps(case, states, f"{trace}base", dtype)
        if case.meta["sr"][0] is not None:
            states, video = run.second(video, audio)
            results += _compare_steps(case, states, f"{trace}sr", dtype)
        results.append(_compare(f"{out}video", video, case.tensors[f"{out}video"], dtype))
        results.append(_compare(f"{out}audio", audio, case.tensors[f"{out}audio"], dtype))
    return results


def _compare(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Result:
    if dtype == torch.float32:
        return compare(what, ours, theirs, FP32)
    return compare_relative(what, ours, theirs, BF16)


def _compare_steps(case: Case, states: list[State], trace: str, dtype: torch.dtype) -> list[Result]:
    videos, audios = (torch.stack(parts) for parts in zip(*states, strict=True))
    return [
        _compare(f"{trace}/video_out", videos, case.tensors[f"{trace}/video_out"], dtype),
        _compare(f"{trace}/audio_out", audios, case.tensors[f"{trace}/audio_out"], dtype),
    ]


class _Run:
    """One stored run with its settings."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.meta, self.settings = case.meta, case.meta["evaluation_config"]
        self.noise = [tensor for _, tensor in sorted(case.group("noise/").items())]

    def denoiser(self, stage: str, config: str, coords: str) -> Denoiser:
        model = SingleStreamDiT(
            dit_config(self.meta[config]), compute_dtype=self.dtype, linear_dtype=torch.bfloat16
        )
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

    def base(self) -> tuple[list[State], Tensor, Tensor]:
        """State after every step, then the resulting video and audio."""
        guided, steps = self.settings["cfg_number"] == 2, self.meta["steps"]
        draws, given = list(self.noise), None
        if self.meta["a2v"]:
            given = self.case.tensors["in/audio_latent"].transpose(1, 2)
            start = Noise(Pair(draws.pop(0), given))
        else:
            audio, video = draws.pop(0), draws.pop(0)
            start = Noise(Pair(video, audio))
        if not guided:
            fresh = draws[: 2 * steps]
            start.steps = list(map(Pair, fresh[0::2], fresh[1::2]))
        guidance = Guidance(
            video_high=self.settings["video_txt_guidance_scale"],
            audio=self.settings["audio_txt_guidance_scale"],
        )
        solver = "unipc" if guided else "renoise"
        denoiser = self.denoiser("base", "model_config", "v2")
        return self.sample(denoiser, steps, solver, guidance if guided else None, start, given)

    def second(self, video: Tensor, audio: Tensor) -> tuple[list[State], Tensor]:
        """State after every step, then the resulting video; the audio of the base stage stays the clip's."""
        noise = (self.noise[-2], self.noise[-1])
        guidance = None
        if self.settings["sr_cfg_number"] == 2:
            guidance = frame_scales(
                self.settings["sr_video_txt_guidance_scale"],
                video.shape[2],
                self.settings["cfg_trick_start_frame"] if self.settings["use_cfg_trick"] else 0,
                self.settings["cfg_trick_value"],
            )
        states: list[State] = []
        video = refine(
            self.denoiser("sr", "sr_model_config", "v1"),
            video,
            audio,
            self.text("context"),
            self.text("context_null") if guidance else None,
            LatentShape(*noise[0].shape[1:], *audio.shape[1:]),
            noise,
            steps=self.meta["sr_steps"],
            shift=self.settings["shift"],
            guidance=guidance,
            image_latent=self.image(noise[0]),
            progress=lambda i, n, video, audio: states.append((video, audio)),
        )
        return states, video

    def sample(
        self,
        denoiser: Denoiser,
        steps: int,
        solver: str,
        guidance: Guidance | None,
        noise: Noise,
        given_audio: Tensor | None,
    ) -> tuple[list[State], Tensor, Tensor]:
        states: list[State] = []
        video, audio = sample(
            denoiser,
            self.text("context"),
            self.text("context_null") if guidance else None,
            LatentShape(*noise.start.video.shape[1:], *noise.start.audio.shape[1:]),
            steps,
            solver,
            guidance,
            self.settings["shift"],
            image_latent=self.image(noise.start.video),
            audio_latent=given_audio,
            noise=noise,
            progress=lambda i, n, video, audio: states.append((video, audio)),
        )
        return states, video, audio
