"""Evaluation of a light decoder of a puppet world on held-out clips, against the codec and the decoder it learned from.

    python -m eval.turbo_vae student=scene/turbo

Every decoder gets the same latents: those of held-out puppets, and on request some that a diffusion model made
(`python -m inference.sample_latents`), for which the teacher's frames are the truth.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import WORLDS
from eval.clip_values import reported, write_clip_values
from eval.image_metrics import ClipErrors, clip_errors
from eval.output import publish, require_at_least
from eval.puppet_tables import DECODER_KEYS
from eval.stats import mean, unavailable
from magihuman.errors import NotApplicable, UserError
from magihuman.io.files import write_result

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "magihuman-decoders/1"
CHUNK = 2  # latents per chunk, for the seams
ROWS = ("psnr", "ssim", "change", "flicker", "seam", "drift", "sharpness")  # see puppet_tables.DECODER_KEYS


@dataclass
class DecoderScore:
    """One decoder against one truth: errors per clip, and the cost of decoding."""

    clips: list[ClipErrors] = field(default_factory=list)
    cost: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Column of a result file: means over clips with their intervals, and the cost."""
        table = {}
        for row in ROWS:
            known = [value for clip in self.clips if (value := getattr(clip, row)) is not None]
            table[row] = (mean(np.array(known)) if known else unavailable("no clip has it", len(self.clips))).to_dict()
        return {"n": len(self.clips), "table": table, "cost": self.cost}


def to_uint8(frames: "Tensor") -> np.ndarray:
    """[B,3,F,H,W] in about [-1,1] -> uint8 [B,F,H,W,3], rounded."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


def score_decoder(
    name: str,
    decode: "Callable[[Tensor], Tensor]",
    latents: "Tensor",
    truth: np.ndarray,
    cut: "Callable[[Tensor, int], Tensor] | None" = None,
) -> tuple[DecoderScore, np.ndarray]:
    """Decode latents [N,C,T,h,w], clip by clip, against truth uint8 [N,F,H,W,3]; also returns the decoded clips.

    Args:
        cut: decodes in chunks of `CHUNK` latents after a first one of the given length, for the seams.
    """
    count = truth.shape[1]
    starts = range(1, count, (count - 1) // (latents.shape[2] - 1))  # of every latent but the first
    result, made, seconds, apart = DecoderScore(), [], [], []
    for i in range(len(latents)):
        z = latents[i : i + 1]
        began = time.process_time()
        frames = decode(z)
        seconds.append(time.process_time() - began)
        made.append(to_uint8(frames)[0])
        if len(made[-1]) != count:
            raise UserError(f"{name} makes {len(made[-1])} frames of latents that stand for {count}")
        cuts = []
        for first in range(1, CHUNK + 1) if cut else ():
            assert cut is not None
            streamed = cut(z, first)
            apart.append(float((streamed - frames).abs().max()))
            cuts.append((to_uint8(streamed)[0], starts[first - 1 :: CHUNK]))
        result.clips.append(clip_errors(made[-1], truth[i], starts, cuts))
    result.cost["seconds"] = float(np.median(seconds))
    if apart:
        result.cost["streaming"] = max(apart)
    return result, np.stack(made)


def decoding_cost(codec: Any, latents: "Tensor") -> dict[str, float | None]:
    """Parameters in millions and GFLOP (2 per multiply-add) of decoding latents [1,C,T,h,w]."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        codec.decode(latents)
    used = [p for name, p in codec.named_parameters() if not name.startswith("encode")]
    return {"parameters": sum(p.numel() for p in used) / 1e6, "flops": counter.get_total_flops() / 1e9}


def in_chunks(codec: Any, latents: "Tensor", first: int) -> "Tensor":
    """Frames of a causal student that decodes `first` latents, then `CHUNK` at a time."""
    import torch

    state, parts = None, []
    for start, stop in pairwise([0, *range(first, latents.shape[2], CHUNK), latents.shape[2]]):
        frames, state = codec.network.step(latents[:, :, start:stop], state)
        parts.append(frames.float())
    return torch.cat(parts, 2)


def run(
    student: str = "scene/turbo",
    teacher: str | None = "auto",
    clips: int = 24,
    sampled: str | None = None,
    output: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Evaluate a student decoder of a puppet world.

    Args:
        student: a decoder that ships, an export or a run folder
        teacher: the decoder that it learned from; auto takes the one that ships for the student's world, none leaves it out
        clips: number of held-out puppets
        sampled: file of latents that a diffusion model made, or none
        output: folder for scores.json, scores.md, scores.png, clips.png and values per clip; none prints the table only
        threads: CPU threads; none takes torch's default

    Returns:
        The result file's content without `output`; else where it is, and per metric of the student value, low and high.

    Raises:
        UserError: a decoder that cannot be found, or of other latents.
    """
    require_at_least(clips=(clips, 1))
    from magihuman.zoo import decoders

    def latents_of(role: str, name: str) -> decoders.Latents:
        decoders.require(name, role)
        config = decoders.config_of(name)
        assert config is not None
        return config.latents

    own = latents_of("student", student)  # before torch is loaded
    world = own.world
    if world is None:
        raise NotApplicable(
            f"eval.turbo_vae measures decoders of the puppet worlds ({', '.join(WORLDS)}), and student={student} is of "
            f"{own.codec!r}"
        )
    if teacher == "auto":
        teacher = decoders.teacher_of(world)
    sources = {role: name for role, name in (("teacher", teacher), ("student", student)) if name is not None}
    if teacher is not None:
        latents_of("teacher", teacher).require(own, f"teacher={teacher}", f"student={student}")
    import torch

    from eval.clips import frames_tensor, ground_truth, held_out
    from magihuman.codecs.bundle import load_bundle
    from magihuman.codecs.causal_decoder import CausalDecoderCodec

    if threads is not None:
        torch.set_num_threads(threads)
    codecs = load_bundle(world)
    own.require(decoders.Latents.of(codecs.contract), f"student={student}", f"the world {world}")
    loaded: dict[str, Any] = {"codec": codecs.video_codec}
    for role, source in sources.items():
        loaded[role] = decoders.load(source, dtype=torch.float32)
    puppets = held_out(clips, world)
    truth = np.stack(ground_truth(puppets).frames)  # [N,F,H,W,3]
    latents = codecs.video_codec.encode(frames_tensor(list(truth)))
    columns: dict[str, DecoderScore] = {}
    shown = {"truth": truth}
    with torch.no_grad():
        for role, codec in loaded.items():
            cut = partial(in_chunks, codec) if isinstance(codec, CausalDecoderCodec) else None
            columns[role], shown[role] = score_decoder(role, codec.decode, latents, truth, cut)
            columns[role].cost |= decoding_cost(codec, latents[:1])
        if teacher is not None:
            name = "student, teacher as truth"
            columns[name], _ = score_decoder(name, loaded["student"].decode, latents, shown["teacher"])
        if sampled is not None:
            columns |= _on_sampled(sampled, loaded, own.codec)
    report: dict[str, Any] = {
        "format": FORMAT,
        "settings": {
            "world": world,
            "student": student,
            "teacher": teacher,
            "clips": clips,
            "sampled": sampled,
            "chunk": CHUNK,
        },
        "threads": torch.get_num_threads(),
        "columns": {name: column.to_dict() for name, column in columns.items()},
    }
    if output is None:
        return publish(None, "scores", report)
    from eval import figures

    folder = Path(output)
    drawn = {"scores": partial(figures.decoder_bars, report), "clips": partial(figures.decoder_frames, shown)}
    publish(folder, "scores", report, drawn)
    write_result(folder / "clips.json", {name: [asdict(clip) for clip in c.clips] for name, c in columns.items()})
    found = _keep_values(folder, columns["student"], [puppet.caption for puppet in puppets])
    return {"scores": str(folder / "scores.json"), **reported(found)}


def _keep_values(folder: Path, student: DecoderScore, captions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Write the student's values per clip; its measures and costs under the metrics' keys."""
    measures = student.to_dict()["table"]
    costs = {key: {"value": value} for key, value in student.cost.items()}
    per_clip = {row: np.array([getattr(clip, row) for clip in student.clips], float) for row in ROWS}
    found = {DECODER_KEYS.get(row, row): measure for row, measure in measures.items()} | costs
    write_clip_values(folder, captions, found, {DECODER_KEYS.get(row, row): v for row, v in per_clip.items()})
    return found


def _on_sampled(path: str, loaded: Mapping[str, Any], codec: str) -> dict[str, DecoderScore]:
    """Codec and student on latents that a model made, against the frames that the file gives them."""
    import torch

    from magihuman.training.decoder_training import SampledLatents

    file = SampledLatents(path, loaded["student"].channels, codec)
    latents, truth = (torch.stack(part) for part in zip(*(file[i] for i in range(len(file))), strict=True))
    frames = truth.permute(0, 2, 3, 4, 1).numpy()
    names = {role: f"{role}, sampled latents, teacher as truth" for role in ("codec", "student")}
    return {name: score_decoder(name, loaded[role].decode, latents, frames)[0] for role, name in names.items()}


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.turbo_vae")
