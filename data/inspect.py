"""Statistics and a contact sheet of shards: `python -m data.inspect SHARDS [output=sheet.png]`."""

from pathlib import Path
from typing import Any

import numpy as np

from data.shards import Sample, SampleError, Shards
from magihuman.errors import UserError

STATISTICS_FROM = 256  # samples read for the statistics


def inspect(shards: str, output: str | None = None, samples: int = 12, codecs: str | None = None, seed: int = 0) -> str:
    """Print statistics of shards and write a contact sheet of some decoded samples.

    Args:
        shards: folder made by data.prepare
        output: PNG to write; none for contact_sheet.png in the folder of the shards
        samples: how many to decode, 0 for statistics alone
        codecs: bundle to decode with; none takes the ones that the shards name
        seed: of the choice of samples

    Raises:
        UserError: shards that cannot be read, or codecs that did not make them.
    """
    reader = Shards(shards)
    text = statistics(reader, seed)
    if samples < 1:
        return text
    path = Path(output) if output else Path(shards) / "contact_sheet.png"
    draw_sheet(reader, path, samples, codecs, seed)
    return f"{text}\ncontact sheet: {path}"


def _some(reader: Shards, count: int, seed: int) -> tuple[list[Sample], list[str]]:
    """Up to `count` random samples, and the errors of those that could not be read."""
    from data.order import permutation

    found, corrupt = [], []
    for number in permutation(len(reader), seed)[:count]:
        try:
            found.append(reader.read(int(number)))
        except SampleError as error:
            corrupt.append(str(error))
    if not found:
        raise UserError(f"no sample in {reader.folder} can be read ({corrupt[0]}); copy the shards again")
    return found, corrupt


def statistics(reader: Shards, seed: int = 0) -> str:
    """Sizes of the buckets, and latent moments and text lengths of up to STATISTICS_FROM random samples."""
    import torch

    found, corrupt = _some(reader, STATISTICS_FROM, seed)
    buckets = dict(zip(reader.index.buckets, np.bincount(reader.index.rows["bucket"]), strict=True))
    video = [s.tensors["video"].float().flatten(1).double() for s in found]
    audio = [s.tensors["audio"].double().T for s in found if "audio" in s.tensors]
    lines = [f"{len(reader)} samples, {len(found) + len(corrupt)} checked, {len(corrupt)} corrupt"]
    lines += [f"  bucket {name}: {number}" for name, number in sorted(buckets.items())]
    for name, parts in (("video", video), ("audio", audio)):  # [channels, n] each
        if parts:
            deviations, means = torch.std_mean(torch.cat(parts, 1), 1)
            lines.append(
                f"  {name} latents: {len(means)} channels, mean {means.min():.2f} to {means.max():.2f}, "
                f"deviation {deviations.min():.2f} to {deviations.max():.2f}"
            )
    for name, lengths in (
        ("words per caption", [len(str(s.meta.get("caption", "")).split()) for s in found]),
        ("text tokens", [len(s.tensors["text"]) for s in found]),
    ):
        lines.append(f"  {name}: {min(lengths)} to {max(lengths)} (median {int(np.median(lengths))})")
    return "\n".join(lines + [f"  corrupt: {reason}" for reason in corrupt])


def draw_sheet(reader: Shards, path: Path, samples: int, codecs: str | None, seed: int) -> None:
    """Decode some samples and write their frames with captions."""
    from magihuman.codecs.bundle import allow_codecs, load_bundle
    from magihuman.media.contact_sheet import draw_contact_sheet

    name = codecs or reader.index.codecs
    allow_codecs(codecs)
    bundle = load_bundle(name, "cpu")
    reader.contract.require(bundle.contract, f"shards {reader.folder}", f"codecs {name}")
    found, _ = _some(reader, samples, seed)
    clips = []
    for sample in found:
        frames = bundle.video_codec.decode(sample.tensors["video"].float()[None])[0]  # [3,F,H,W]
        clips.append(((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy())
    captions: list[Any] = [sample.meta.get("caption", "") for sample in found]
    title = f"{reader.folder.name}: {name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_contact_sheet(clips, captions, columns=2 if len(clips) > 3 else 1, title=title).save(path, "PNG")


if __name__ == "__main__":
    import sys

    from magihuman.cli import run

    words = sys.argv[1:]
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words[0] = f"shards={words[0]}"  # the folder may come without its key
    print(run(inspect, "python -m data.inspect", words))
