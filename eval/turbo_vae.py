"""Measures a light decoder of the tiny world on held-out clips, beside the codec and the teacher it learned from.

    python -m eval.turbo_vae student=tiny/turbo

Every decoder gets the same latents: those of puppets that no training sees, and on request some that a diffusion
model made (`python -m inference.sample_latents`), for which the teacher's frames are the truth.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval.report import provenance
from eval.stats import Measure, mean, unavailable
from eval.temporal import Nearness, compare, latent_starts
from magihuman.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "magihuman-decoders/1"
CHUNK = 2  # latents per chunk, for the seams
ROWS = {
    "psnr": ("PSNR, dB", "up"),
    "ssim": ("SSIM", "up"),
    "change": ("error of the change from frame to frame, 8-bit levels", "down"),
    "flicker": ("change where nothing moves, 8-bit levels", "down"),
    "seam": ("change error where chunks end over that elsewhere (1: no seam)", ""),
    "drift": ("how much further off the last frame's luma is than the first's, 8-bit levels", ""),
    "sharpness": ("variance of the Laplacian over the truth's", ""),
}
COST = {
    "parameters": "parameters, M",
    "flops": "GFLOP per clip",
    "seconds": "processor seconds per clip",
    "streaming": "largest difference between decoding in chunks and at once",
}


@dataclass
class Judged:
    """One decoder against one truth: a `Nearness` per clip, and what decoding cost."""

    name: str
    clips: list[Nearness] = field(default_factory=list)
    cost: dict[str, float | None] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, Measure]:
        """Means over clips with their intervals."""
        return {row: self._row([getattr(clip, row) for clip in self.clips]) for row in ROWS}

    @staticmethod
    def _row(values: list[float | None]) -> Measure:
        known = [value for value in values if value is not None]
        return mean(np.array(known)) if known else unavailable("no clip has it", len(values))


def to_pictures(frames: Tensor) -> np.ndarray:
    """[B,3,F,H,W] in about [-1,1] -> uint8 [B,F,H,W,3], rounded."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


def judge(
    name: str,
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    truth: np.ndarray,
    cut: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Judged, np.ndarray]:
    """Decode latents [N,C,T,h,w], clip by clip, against truth uint8 [N,F,H,W,3]; also returns the decoded clips.

    Args:
        cut: decodes in chunks of `CHUNK` latents, the first of as many as are given, for the seams.
    """
    count = truth.shape[1]
    starts = latent_starts(count, (count - 1) // (latents.shape[2] - 1))
    result, made, seconds, apart = Judged(name), [], [], []
    for i in range(len(latents)):
        z = latents[i : i + 1]
        began = time.process_time()
        frames = decode(z)
        seconds.append(time.process_time() - began)
        made.append(to_pictures(frames)[0])
        if len(made[-1]) != count:
            raise UserError(f"{name} makes {len(made[-1])} frames of latents that stand for {count}")
        cuts = []
        for first in range(1, CHUNK + 1) if cut is not None else ():
            assert cut is not None
            streamed = cut(z, first)
            apart.append(float((streamed - frames).abs().max()))
            cuts.append((to_pictures(streamed)[0], starts[first - 1 :: CHUNK]))
        result.clips.append(compare(made[-1], truth[i], starts, cuts))
    result.cost["seconds"] = float(np.median(seconds))
    if apart:
        result.cost["streaming"] = max(apart)
    return result, np.stack(made)


def cost(codec: Any, latents: Tensor) -> dict[str, float | None]:
    """Parameters in millions and GFLOP (2 per multiply-add) of decoding latents [1,C,T,h,w]."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        codec.decode(latents)
    used = [p for name, p in codec.named_parameters() if not name.startswith("encode")]
    return {"parameters": sum(p.numel() for p in used) / 1e6, "flops": counter.get_total_flops() / 1e9}


def in_chunks(codec: Any, latents: Tensor, first: int) -> Tensor:
    """Frames of a causal student that decodes `first` latents, then `CHUNK` at a time."""
    state, parts = None, []
    for start, stop in pairwise([0, *range(first, latents.shape[2], CHUNK), latents.shape[2]]):
        frames, state = codec.network.step(latents[:, :, start:stop], state)
        parts.append(frames.float())
    return torch.cat(parts, 2)


def run(
    student: str = "tiny/turbo",
    teacher: str | None = "tiny/teacher",
    clips: int = 24,
    sampled: str | None = None,
    output: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure a student decoder of the tiny world.

    Args:
        student: a decoder that ships, an export or a run folder
        teacher: the decoder that it learned from; none leaves it out
        clips: held-out puppets
        sampled: file of latents that a diffusion model made, or none
        output: folder for scores.json, scores.md, scores.png and clips.png; none prints the table only
        threads: CPU threads; none takes what torch takes

    Raises:
        UserError: a decoder that cannot be found, or of other latents.
    """
    from eval.puppets import ground_truth, held_out
    from magihuman.codecs.bundle import load_bundle
    from magihuman.codecs.causal_decoder import CausalDecoderCodec
    from magihuman.zoo import decoders

    if clips < 1:
        raise UserError(f"clips={clips} measures nothing; give at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    codecs = load_bundle("tiny")
    mine = decoders.Latents.of(codecs.contract)
    opened: dict[str, Any] = {"codec": codecs.video_codec}
    for role, source in (("teacher", teacher), ("student", student)):
        if source is not None:
            config = decoders.config_of(source)
            if config is None:
                known = ", ".join(decoders.names())
                raise UserError(
                    f"{role}={source} is no decoder; choose a run folder, an export, or from {known}"
                )
            config.latents.require(mine, f"{role}={source}", "the tiny world")
            opened[role] = decoders.load(source, dtype=torch.float32)
    truth = np.stack(ground_truth(held_out(clips)).frames)  # [N,F,H,W,3]
    latents = codecs.video_codec.encode(torch.from_numpy(truth).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    columns, shown = [], {"truth": truth}
    with torch.no_grad():
        for role, codec in opened.items():
            cut = partial(in_chunks, codec) if isinstance(codec, CausalDecoderCodec) else None
            judged, shown[role] = judge(role, codec.decode, latents, truth, cut)
            judged.cost |= cost(codec, latents[:1])
            columns.append(judged)
        if teacher is not None:
            columns.append(
                judge("student, teacher as truth", opened["student"].decode, latents, shown["teacher"])[0]
            )
        if sampled is not None:
            columns += _on_sampled(sampled, opened, mine.codec)
    report = {
        "format": FORMAT,
        "settings": {
            "student": student,
            "teacher": teacher,
            "clips": clips,
            "sampled": sampled,
            "chunk": CHUNK,
        },
        "threads": torch.get_num_threads(),
        "columns": {
            c.name: {
                "n": len(c.clips),
                "table": {row: measure.to_dict() for row, measure in c.table.items()},
                "cost": c.cost,
            }
            for c in columns
        },
        "rows": {row: {"about": about, "better": better} for row, (about, better) in ROWS.items()},
        "provenance": provenance(),
    }
    print(markdown(report))
    if output is None:
        return report
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    details = {c.name: [asdict(clip) for clip in c.clips] for c in columns}
    (folder / "clips.json").write_text(json.dumps(details) + "\n", encoding="utf-8")
    (folder / "scores.md").write_text(markdown(report) + "\n", encoding="utf-8")
    bars(columns).savefig(folder / "scores.png", dpi=110)
    strips(shown).savefig(folder / "clips.png", dpi=110)
    values = {c.name: {row: measure.value for row, measure in c.table.items()} for c in columns}
    return {"scores": str(folder / "scores.json"), **values}


def _on_sampled(path: str, opened: Mapping[str, Any], codec: str) -> list[Judged]:
    """Codec and student on latents that a model made, against the frames that the file gives them."""
    from magihuman.training.latent_file import SampledLatents

    file = SampledLatents(path, opened["student"].channels, codec)
    pairs = [file[i] for i in range(len(file))]
    latents = torch.stack([pair[0] for pair in pairs])
    truth = torch.stack([pair[1] for pair in pairs]).permute(0, 2, 3, 4, 1).numpy()
    return [
        judge(f"{role}, sampled latents, teacher as truth", opened[role].decode, latents, truth)[0]
        for role in ("codec", "student")
    ]


def markdown(report: Mapping[str, Any], rows: Sequence[str] = ()) -> str:
    """The table of a report: a column per decoder and truth.

    Args:
        rows: of `ROWS` and `COST`; all where none is given.
    """
    columns = report["columns"]
    lines = [
        "| | " + " | ".join(f"{name} (n={c['n']})" for name, c in columns.items()) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for row in rows or [*ROWS, *COST]:
        if row in ROWS:
            about, cells = ROWS[row][0], [_cell(c["table"][row]) for c in columns.values()]
        else:
            values = [c["cost"].get(row) for c in columns.values()]
            about, cells = COST[row], ["" if v is None else f"{v:.3g}" for v in values]
        lines.append(f"| {about} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(measure: Mapping[str, Any]) -> str:
    if measure["value"] is None:
        return "n/a"
    digits = 2 if abs(measure["value"]) >= 2 else 3
    value, low, high = (measure[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def bars(columns: list[Judged]) -> "Figure":
    """The rows with a direction as bars with their intervals, a colour per column."""
    from matplotlib.figure import Figure

    rows = [row for row, (_, better) in ROWS.items() if better]
    figure = Figure(figsize=(3.4 * len(rows), 3.8), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows)), rows, strict=True):
        for place, column in enumerate(columns):
            measure = column.table[row]
            if measure.value is not None and measure.low is not None and measure.high is not None:
                ends = [[measure.value - measure.low], [measure.high - measure.value]]
                axes.bar(place, measure.value, yerr=ends, capsize=3, color=f"C{place}", label=column.name)
        about, better = ROWS[row]
        axes.set_title(f"{about}\n({'higher' if better == 'up' else 'lower'} is better)", fontsize=8)
        axes.set_xticks([])
        axes.grid(axis="y", alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(columns))
    return figure


def strips(shown: Mapping[str, np.ndarray], clips: int = 2, pictures: int = 8) -> "Figure":
    """Some clips as rows of frames: the truth, what each decoder made of it, and the error, eight times enlarged."""
    from matplotlib.figure import Figure

    truth = shown["truth"]
    frames = np.linspace(0, truth.shape[1] - 1, pictures).round().astype(int)
    rows: list[tuple[str, np.ndarray]] = []
    for clip in range(min(clips, len(truth))):
        for name, movies in shown.items():
            rows.append((name, movies[clip][frames]))
        for name, movies in shown.items():
            if name != "truth":
                error = np.abs(movies[clip][frames].astype(int) - truth[clip][frames])
                rows.append((f"{name}, error x 8", np.clip(8 * error, 0, 255).astype(np.uint8)))
    figure = Figure(figsize=(1.3 * pictures + 1.5, 1.3 * len(rows)), layout="constrained")
    for axes, (name, strip) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(np.concatenate(list(strip), axis=1))
        axes.set_ylabel(name, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.turbo_vae")
