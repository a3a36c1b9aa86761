"""The sampling loop of both stages against stored runs of the release: every step and the results."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from magihuman.flow.guidance import FrameScales, Guidance, combine, frame_scales
from magihuman.flow.sampling import Conditioning, Noise, Pair, denoise
from magihuman.flow.solvers import make_solver
from magihuman.flow.super_resolution import signal_amplitude, start
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.zoo.checks import Parameters, Result, Unsupported, VectorCase, agree, compare, compare_relative
from magihuman.zoo.checks.network import dit_config, pack_config

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
    """Base stage and, if stored, super-resolution: sizes, every step and the results, in fp32 and in bf16 compute.

    Starts, fresh noise and encoded conditions are the stored ones.

    Raises:
        Unsupported: for parameters that the loop does not have, or that contradict each other.
    """
    results = []
    for dtype, trace, out in ((torch.float32, "trace/", "out/"), (torch.bfloat16, "trace_bf16/", "out_bf16/")):
        run = _LoopRun(case, dtype, loop)
        results += run.sizes() if dtype == torch.float32 else []
        states, last = run.base()
        results += _compare_steps(case, states, f"{trace}base", dtype)
        if run.enlarged is not None:
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
    """One stored run with its parameters."""

    def __init__(self, case: VectorCase, dtype: torch.dtype, loop: Loop) -> None:
        self.case, self.dtype, self.loop = case, dtype, loop
        meta, settings = case.meta, case.meta["evaluation_config"]
        self.meta: Parameters = meta
        self.settings: Parameters = settings
        self.noise = [tensor for _, tensor in sorted(case.group("noise/").items())]
        self.steps, self.sr_steps = meta["steps"], meta["sr_steps"]
        self.guided, self.sr_guided = (_guided(settings, name) for name in ("cfg_number", "sr_cfg_number"))
        self.enlarged = None if meta["sr"][0] is None else self.latent_size(meta["sr"])
        names = "noise_value sr_audio_noise_scale sr_video_txt_guidance_scale use_cfg_trick cfg_trick_start_frame"
        self.second = {name: settings[name] for name in (*names.split(), "cfg_trick_value")}
        self.configs = {name: dit_config(meta[name]) for name in ("model_config", "sr_model_config") if meta[name]}
        settings.require(num_inference_steps=self.steps, sr_num_inference_steps=self.sr_steps)
        if settings.get("using_sde_flag", False) and self.guided and self.steps > 1:
            raise Unsupported("using_sde_flag=True with guidance, with which the released code fails (SPEC O3)")

    def latent_size(self, pixels: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of latents for a stated (width, height) in pixels (SPEC 4.1)."""
        (_, *strides), (_, *patch) = self.settings["vae_stride"], self.settings["patch_size"]
        rows, columns = (side // stride // p * p for side, stride, p in zip(pixels[::-1], strides, patch, strict=True))
        return rows, columns

    def sizes(self) -> list[Result]:
        """Stated sizes against those of the stored latents."""
        settings, meta, out = self.settings, self.meta, self.case.tensors["out/audio"]
        stride = settings["vae_stride"][0]
        audio, fps, seconds = out.shape[1], settings["fps"], meta["seconds"]
        if not meta["a2v"] and seconds is not None:
            audio = int(fps * seconds) + 1  # a given audio decides for itself
        latents = [1, settings["z_dim"], (audio - 1) // stride + 1]
        results = [
            agree("base latents", list(self.first.video.shape), [*latents, *self.latent_size(meta["br"])]),
            agree("audio latents", out.shape[1], audio),
            agree("text features", self.case.tensors["in/context"].shape[1], settings["t5_gemma_target_length"]),
        ]
        if self.enlarged is not None:
            stored = list(self.case.tensors["out/video"].shape)
            results.append(agree("latents of the second stage", stored, [*latents, *self.enlarged]))
        if "noise_order" in meta:
            results.append(agree("noise", [list(tensor.shape) for tensor in self.noise], meta["noise_order"]))
        return results

    def denoiser(self, stage: str, config: str, coords: str | None = None) -> Denoiser:
        model = SingleStreamDiT(self.configs[config], compute_dtype=self.dtype, linear_dtype=torch.bfloat16)
        model.load_state_dict(self.case.group(f"w/{stage}/"))
        model.attention_backend = "reference"
        return Denoiser(model, pack_config(self.settings["data_proxy_config"], coords)).eval()

    def text(self, name: str) -> list[Tensor]:
        return [self.case.tensors[f"in/{name}"][0, : self.meta[f"{name}_len"]]]

    def image(self, video: Tensor) -> Tensor | None:
        strides = self.settings["vae_stride"][1:]
        height, width = (side * stride for side, stride in zip(video.shape[-2:], strides, strict=True))
        return self.case.tensors[f"in/image_latent_h{height}_w{width}"] if self.meta["image"] else None

    @property
    def first(self) -> Pair:
        """Start of the base stage."""
        if self.meta["a2v"]:
            return Pair(self.noise[0], self.case.tensors["in/audio_latent"].transpose(1, 2))
        return Pair(self.noise[1], self.noise[0])

    def base(self) -> tuple[list[Pair], Pair]:
        """Latents after every step of the base stage, and its result."""
        guided, given = self.guided, self.meta["a2v"]
        drawn = self.noise[1 if given else 2 :][: 2 * self.steps]
        fresh = [] if guided else list(map(Pair, drawn[::2], drawn[1::2]))
        high, audio = (self.settings[f"{part}_txt_guidance_scale"] for part in ("video", "audio"))
        solver = "unipc" if guided else "renoise"
        guidance = Guidance(video_high=high, audio=audio) if guided else None
        # Without guidance the release changes a given audio (SPEC O2).
        denoiser, keep_audio = self.denoiser("base", "model_config"), given and guided
        return self.sample(denoiser, Noise(self.first, fresh), self.steps, solver, guidance, keep_audio)

    def super_resolution(self, video: Tensor, audio: Tensor) -> tuple[list[Pair], Tensor]:
        """Latents after every step of the second stage, and its video; the clip keeps the base stage's audio."""
        index, scale, guidance_scale, trick, early, early_scale = self.second.values()
        guidance = frame_scales(guidance_scale, video.shape[2], early if trick else 0, early_scale)
        assert self.enlarged is not None
        noise = self.noise[-2] if index else video.new_zeros(*video.shape[:3], *self.enlarged)
        first = Pair(*start(video, audio, (noise, self.noise[-1]), signal_amplitude(index), scale))
        denoiser = self.denoiser("sr", "sr_model_config", "v1")
        states, last = self.sample(
            denoiser, Noise(first), self.sr_steps, "unipc", guidance if self.sr_guided else None, True
        )
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
        text, negative = self.text("context"), self.text("context_null")
        last = self.loop(
            denoiser,
            text,
            None if guidance is None else negative,
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


def _guided(settings: Parameters, name: str) -> bool:
    if settings[name] not in (1, 2):
        raise Unsupported(f"{name}={settings[name]} is stated, and only 1 and 2 are possible")
    return bool(settings[name] == 2)
