"""Latents sampled from a checkpoint, with a teacher's frames of them, for training and judging light decoders.

    python -m inference.sample_latents checkpoint=scene/base prompts=FILE output=sampled.safetensors

In use, a decoder gets sampled latents, whose statistics differ from those of encoded videos; the teacher's frames are
their ground truth.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magihuman.codecs.bundle import allow_codecs
from magihuman.codecs.tiny_captions import FORMS
from magihuman.errors import UserError
from magihuman.io.files import atomic_path, locked


def make(
    prompts: str,
    output: str,
    checkpoint: str = "scene/base",
    teacher: str | None = None,
    clips: int = 200,
    seed: int = 0,
    batch: int = 20,
    steps: int | None = None,
    cfg: float | None = None,
    codecs: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> str:
    """Sample latents, decode them with a teacher, and write both into one file; one that is there already is kept.

    The processes of a training that want the same file wait for the one that makes it.

    Args:
        prompts: a prompt file as for infer, or a folder of .txt captions
        output: the safetensors file: video [N,C,T,h,w] fp16 and frames [N,3,F,H,W] uint8
        checkpoint: what samples, as for infer
        teacher: decoder of layout wan, or the Wan 2.2 VAE's file; none takes the one of the checkpoint's puppet world
        clips: how many; prompts are taken in turn
        seed: clip i gets seed + i
        batch: clips at once
        steps: solver steps; none takes the checkpoint's setting
        cfg: guidance scale, 1 is off; none takes the checkpoint's setting
        codecs: that the checkpoint should be of; your own, package.module:function, have to be given
        device: auto, cpu or cuda
        progress: show a bar

    Returns:
        the file's path.

    Raises:
        UserError: prompts, a checkpoint or a teacher that cannot be used, or a file that was made otherwise.
    """
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    from inference.pipeline import Pipeline
    from magihuman import zoo
    from magihuman.codecs.bundle import load_bundle
    from magihuman.zoo import decoders

    allow_codecs(codecs)
    target = Path(output)
    if clips < 1 or batch < 1:
        raise UserError(f"clips={clips} and batch={batch} must be at least 1")
    if codecs is not None and (found := zoo.config_of(checkpoint).codecs) != codecs:
        raise UserError(
            f"codecs={codecs}: checkpoint={checkpoint} is of the codecs {found}; give a checkpoint and a teacher of {codecs}"
        )
    teacher = teacher or decoders.teacher_of(zoo.config_of(checkpoint).codecs)
    facts = {"checkpoint": checkpoint, "teacher": teacher, "seed": str(seed)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        if target.exists():
            asked = {"clips": clips, "steps": steps, "cfg": cfg}
            _require_made_with(target, facts | {key: str(value) for key, value in asked.items() if value is not None})
            return str(target)
        texts = read_prompts(prompts)
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        loaded = zoo.load(checkpoint, device=chosen)
        bundle = load_bundle(loaded.config.codecs, chosen)
        decoder = open_teacher(teacher, bundle, chosen)
        pipeline = Pipeline(loaded, bundle)
        settings = pipeline.settings(steps=steps, cfg=cfg)
        videos, frames = [], []
        with tqdm(total=clips, desc="sampling", unit="clip", disable=not progress) as bar:
            for start in range(0, clips, batch):
                numbers = range(start, min(clips, start + batch))
                drafts = pipeline.draft([texts[i % len(texts)] for i in numbers], [seed + i for i in numbers], settings)
                for draft in drafts:
                    latents = draft.video.half()  # decoded as it is stored
                    decoded = decoder.decode(latents[None].float().to(chosen))[0].clamp(-1, 1)
                    videos.append(latents)
                    frames.append(((decoded + 1) * 127.5).round().byte().cpu())
                bar.update(len(numbers))
        facts |= {"steps": str(settings.steps), "codec": bundle.contract.video_codec}
        facts |= {} if cfg is None else {"cfg": str(cfg)}
        with atomic_path(target) as partial:
            save_file({"video": torch.stack(videos), "frames": torch.stack(frames)}, partial, metadata=facts)
    return str(target)


def _require_made_with(path: Path, wanted: Mapping[str, str]) -> None:
    """Raises UserError where a file says of itself that it was made with another setting."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            made = {**(file.metadata() or {}), "clips": str(file.get_slice("video").get_shape()[0])}
    except (SafetensorError, OSError) as error:
        raise UserError(f"output={path} is there and cannot be read ({error}); remove it") from error
    other = [f"{key}={made[key]}, not {value}" for key, value in wanted.items() if made.get(key, value) != value]
    if other:
        raise UserError(f"output={path} was made with {'; '.join(other)}; remove it, or choose another output=")


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, or of all captions in a folder in the order of their names.

    Raises:
        UserError: there are none.
    """
    from inference.requests import read_requests
    from magihuman.io.text import prompt_text, read_text

    path = Path(source)
    if not path.is_dir():
        return [request.prompt for request in read_requests(path, 0)]
    texts = [prompt_text(read_text(file, str(file))) for file in sorted(path.glob("*.txt"))]
    if not texts:
        raise UserError(f"prompts={source} is a folder without .txt captions; give one, or a prompt file")
    return texts


def open_teacher(source: str, codecs: Any, device: Any) -> Any:
    """A teacher decoder of the codecs' latents: one of ours, or the bundle's own video codec where `source` is its file.

    Raises:
        UserError: it takes other latents, or is not found.
    """
    import torch

    from magihuman.codecs.wan import WanCodec
    from magihuman.zoo import decoders

    config = decoders.config_of(source)
    if config is None and codecs.name in FORMS:
        decoders.require(source, "teacher")
    if config is None:
        return WanCodec.load(source, device=device)
    config.latents.require(decoders.Latents.of(codecs.contract), f"teacher={source}", f"codecs {codecs.name!r}")
    return decoders.load(source, device, torch.float32)


if __name__ == "__main__":
    from magihuman.cli import run

    run(make, "python -m inference.sample_latents")
