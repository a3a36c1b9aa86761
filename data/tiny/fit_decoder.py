"""Train a puppet world's teacher decoder: `python -m data.tiny.fit_decoder output=FOLDER world=scene`.

The decoders of the puppet worlds' video codecs are almost linear, too simple to distil. The teacher is a decoder in Wan
2.2's layout for the same latents: convolutions over time and space, attention in the middle, sixty times the arithmetic and
sharper frames. As the latents are the same, its students decode the samples of the world's models.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.tiny.dataset import check_appearance
from data.tiny.fit_codec import FIT_SEED, psnr, puppet_frames
from magihuman.errors import UserError
from magihuman.io.provenance import code_version

if TYPE_CHECKING:  # torch takes a second to import and --help does not need it
    import torch
    from torch import Tensor

VALIDATION = range(100_000, 100_016)  # puppets outside the training set
EVERY = 100  # steps between two validations


def _cropped(latents: Tensor, frames: Tensor, side: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square of latents [B,C,T,h,w] and of the frames [B,3,F,H,W] that they encode."""
    import torch

    unit = frames.shape[-1] // latents.shape[-1]
    top, left = torch.randint(latents.shape[-1] - side + 1, (2,), generator=rng).tolist()
    rows, columns = slice(top, top + side), slice(left, left + side)
    high, wide = (slice(unit * position, unit * (position + side)) for position in (top, left))
    # Convolutions are faster with channels last.
    few = latents[..., rows, columns].contiguous(memory_format=torch.channels_last_3d)
    return few, frames[..., high, wide]


def train(
    output: str,
    world: str = "scene",
    steps: int = 1000,
    clips: int = 300,
    batch: int = 2,
    crop: int = 8,
    width: int = 16,
    lr: float = 0.02,
    threads: int = 1,
) -> dict[str, float]:
    """Train the teacher decoder and write it, with its PSNR on validation puppets.

    A stopped training resumes at its last multiple of a hundred steps when the same command is given again.

    Args:
        output: folder for config.json and model.safetensors; also written on the way, with OUTPUT.state.pt next to it
        world: tiny or scene, whose codec's latents it decodes
        steps: training steps
        clips: puppets to train on
        batch: clips per step
        crop: side of the square of latents that is trained on, at a random position of each clip
        width: channels of the last block; the first block has four times as many
        lr: peak learning rate of Muon; the first and last layer have AdamW with a sixth of it
        threads: CPU threads

    Raises:
        UserError: an unknown world, or a stopped training of other settings.
    """
    check_appearance({}, world)
    import torch

    from magihuman.codecs.bundle import load_bundle
    from magihuman.codecs.wan_decoder import WanDecoder, WanDecoderConfig
    from magihuman.config import OptimSettings
    from magihuman.training.decoder_training import charbonnier, flicker, laplacian
    from magihuman.training.optim import EMA, build_optimizer, build_schedule
    from magihuman.zoo import decoders

    torch.set_num_threads(threads)
    torch.manual_seed(FIT_SEED)
    began, rng = time.monotonic(), torch.Generator().manual_seed(FIT_SEED)
    codecs = load_bundle(world)
    size = codecs.height
    frames = puppet_frames(range(clips), size, world)
    truth = puppet_frames(VALIDATION, size, world).float() / 127.5 - 1
    validation = codecs.video_codec.encode(truth)
    figures = {"codec": psnr(codecs.video_codec.decode(validation), truth)}
    config = WanDecoderConfig(codecs.contract.video_channels, width, multipliers=(1, 2, 4), double_time=(True, True))
    teacher = WanDecoder.build(config)
    average = EMA(teacher, 0.98)
    settings = OptimSettings("muon", lr, adamw_lr=lr / 6, betas=(0.9, 0.98), warmup=10)
    optimiser = build_optimizer(teacher, None, settings)
    schedule = build_schedule(optimiser, settings, steps)
    asked = f"world={world} steps={steps} clips={clips} batch={batch} crop={crop} width={width} lr={lr:g}"
    state, done, spent = Path(f"{output}.state.pt"), 0, 0.0
    parts: dict[str, Any] = {"teacher": teacher, "average": average, "optimiser": optimiser, "schedule": schedule}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if (before := saved.get("asked", "settings that it does not name")) != asked:
            raise UserError(f"{state} is of a training with {before}, not {asked}; remove it or give another output=")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        rng.set_state(saved["draw"])
        done, average.updates, spent = saved["step"], saved["step"], saved["seconds"]
    for step in range(done + 1, steps + 1):
        target = frames[torch.randint(clips, (batch,), generator=rng)].float() / 127.5 - 1
        latents, target = _cropped(codecs.video_codec.encode(target), target, crop, rng)
        decoded = teacher(latents)  # fp32: processors without instructions for bf16 take many times as long in bf16
        loss = charbonnier(decoded, target) + laplacian(decoded, target) + 0.25 * flicker(decoded, target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update(teacher)
        if step % 20 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s", flush=True)
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                figures["teacher"] = psnr(torch.cat([average.module(z) for z in validation.split(4)]), truth)
            print("  ".join(f"{name} {value:.2f} dB" for name, value in figures.items()), flush=True)
            record = {
                "command": f"python -m data.tiny.fit_decoder output={Path(output).name} {asked}",
                "steps": step,
                "held_out_psnr_db": {name: round(value, 2) for name, value in figures.items()},
                "cpu_seconds": round(spent + time.process_time()),
                "torch": torch.__version__,
                **code_version(),
            }
            latents_of = decoders.Latents.of(codecs.contract)
            decoders.save(
                output,
                {key: value.half() for key, value in average.module.state_dict().items()},
                decoders.DecoderConfig("wan", config.to_dict(), latents_of, record),
            )
            torch.save(
                {
                    **{name: part.state_dict() for name, part in parts.items()},
                    "asked": asked,
                    "draw": rng.get_state(),
                    "step": step,
                    "seconds": spent + time.process_time(),
                },
                state,
            )
    state.unlink(missing_ok=True)
    return figures


if __name__ == "__main__":
    from magihuman.cli import run

    run(train, "python -m data.tiny.fit_decoder")
