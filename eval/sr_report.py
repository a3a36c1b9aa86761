"""Tables and pictures of `eval.sr`: values per clip to columns with intervals, Markdown and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import stats
from eval.stats import Measure

# Rows of the tables: what they say and which way is better ("" where neither is).
ROWS = {
    "psnr": ("PSNR against the truth, dB", "up"),
    "mouth_psnr": ("PSNR around the mouth, dB", "up"),
    "ssim": ("SSIM against the truth", "up"),
    "sharpness": ("sharpness: variance of the Laplacian; the bound is right, more is too much", "up"),
    "mouth_sharpness": ("sharpness around the mouth", "up"),
    "sync_r": ("mouth against own sound, correlation", "up"),
    "sync_skill": ("lip-sync skill: another's sound 0, codec bound 1", "up"),
    "flicker": ("change between frames away from the mouth", "down"),
}
COLUMNS = {
    "bicubic": "frames enlarged bicubically",
    "latents": "latents enlarged",
    "sr": "second stage",
    "sr, noise for sound": "second stage, noise for sound",
    "bound": "truth through the codec",
}
ARROWS = {"up": "+", "down": "-", "": " "}


def columns(
    values: Mapping[str, Mapping[str, np.ndarray]], order: Sequence[str], against: str
) -> dict[str, Any]:
    """Tables of measures: per column its rows, and what column `against` has more than each other column.

    Args:
        values: column -> name -> values per clip [n]; "bound" is the reference of the skill.
    """
    bound = values["bound"]
    level = bound["other"]
    tables, skill = {}, {}
    for name in order:
        column = values[name]
        rows = {row: stats.mean(column[row]) for row in ROWS if row in column}
        rows["sync_r"] = stats.mean(column["own"])
        rows["sync_skill"] = stats.ratio(column["own"] - level, bound["own"] - level)
        tables[name] = {row: rows[row].to_dict() for row in ROWS if row in rows}
        # A clip's share of the skill: differences of skills are means of these.
        skill[name] = (column["own"] - level) / float((bound["own"] - level).mean())
    differences = {}
    for name in order:
        if name in (against, "bound"):
            continue
        mine, theirs = values[against], values[name]
        rows = {
            row: stats.difference(mine[row], theirs[row]) for row in ROWS if row in mine and row in theirs
        }
        rows["sync_r"] = stats.difference(mine["own"], theirs["own"])
        rows["sync_skill"] = stats.difference(skill[against], skill[name])
        differences[name] = {row: rows[row].to_dict() for row in ROWS if row in rows}
    return {"columns": tables, "against": against, "differences": differences}


def cell(values: Mapping[str, Any], signed: bool = False) -> str:
    """ "0.953 [0.921, 0.978]"."""
    measure = Measure(**values)
    if measure.value is None:
        return "n/a"
    size = max(abs(measure.value), abs(measure.low or 0), abs(measure.high or 0))
    digits = 2 if size >= 10 else 3 if size >= 0.1 else 4 if size >= 0.01 else 5
    sign = "+" if signed else ""
    low, high = (measure.value if end is None else end for end in (measure.low, measure.high))
    return f"{measure.value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def markdown(facts: Mapping[str, Any]) -> str:
    """All tables of one part."""
    titles = {
        "clip": "first stage: the clip itself, through the codec",
        "base": f"first stage: samples of {facts['base']}",
    }
    lines: list[str] = []
    for name, content in facts["sets"].items():
        title = titles.get(name, f"first stage: the clip itself, details {name} times coarser")
        lines += [""] if lines else []
        lines += [f"### {title} ({facts['clips']} clips, 95 % intervals)", ""]
        lines += _table(content["columns"], signed=False)
        lines += ["", f"`{content['against']}` minus each, clip by clip:", ""]
        lines += _table(content["differences"], signed=True)
    return "\n".join(lines)


def _table(tables: Mapping[str, Mapping[str, Any]], signed: bool) -> list[str]:
    rows = [row for row in ROWS if any(row in table for table in tables.values())]
    lines = ["| | " + " | ".join(tables) + " | | |", "|---" * (len(tables) + 3) + "|"]
    for row in rows:
        about, better = ROWS[row]
        cells = [cell(table[row], signed) if row in table else "n/a" for table in tables.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {ARROWS[better]} | {about} |")
    return lines


def brief(content: Mapping[str, Any], rows: Sequence[str]) -> list[str]:
    """Lines of a table of one set: every column, then what the second stage has more than each, clip by clip.

    Args:
        rows: those to show, all where none is given.
    """
    tables, differences = content["columns"], content["differences"]
    against = COLUMNS[content["against"]]
    heads = [COLUMNS.get(name, name) for name in tables]
    heads += [f"{against} minus {COLUMNS.get(name, name)}" for name in differences]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for row in rows or [row for row in ROWS if any(row in table for table in tables.values())]:
        cells = [cell(table[row]) if row in table else "n/a" for table in tables.values()]
        cells += [cell(table[row], signed=True) if row in table else "n/a" for table in differences.values()]
        lines.append(f"| {ROWS[row][0]} | {' | '.join(cells)} |")
    return lines


def _points(content: Mapping[str, Any], names: Sequence[str], row: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] and distances to the interval's ends [2,n]."""
    found = [content["columns"][name][row] for name in names]
    value = np.array([f["value"] for f in found])
    ends = np.array([[f["value"] - f["low"], f["high"] - f["value"]] for f in found]).T
    return value, np.maximum(ends, 0)


def steps_figure(values: Mapping[str, Any], path: Path) -> None:
    """PSNR, sharpness and sync skill over the number of solver steps, with the bound as a line."""
    from matplotlib.figure import Figure

    content = values["sets"]["clip"]
    names = [name for name in content["columns"] if name != "bound"]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = (("psnr", "PSNR [dB]"), ("sharpness", "sharpness"), ("sync_skill", "lip-sync skill"))
    for axes, (row, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        value, ends = _points(content, names, row)
        axes.errorbar([int(n) for n in names], value, yerr=ends, marker="o", capsize=3)
        if row != "psnr":
            axes.axhline(content["columns"]["bound"][row]["value"], color="0.5", ls="--", label="codec bound")
            axes.legend(fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(n) for n in names], names)
        axes.set_xlabel("solver steps")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def audio_figure(values: Mapping[str, Any], path: Path) -> None:
    """Sync skill and mouth PSNR over the coarseness of the first stage, with the sound and without."""
    from matplotlib.figure import Figure

    factors = list(values["sets"])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = (("sync_skill", "lip-sync skill"), ("mouth_psnr", "mouth PSNR [dB]"))
    for axes, (row, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in ("bicubic", "latents", "sr", "sr, noise for sound"):
            points = [_points(values["sets"][f], [name], row) for f in factors]
            value = np.concatenate([p[0] for p in points])
            ends = np.concatenate([p[1] for p in points], axis=1)
            axes.errorbar(range(len(factors)), value, yerr=ends, marker="o", capsize=3, label=name)
        axes.set_xticks(range(len(factors)), [f"x{f}" for f in factors])
        axes.set_xlabel("coarseness of the first stage")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def comparison(pictures: Mapping[str, Sequence[np.ndarray]], path: Path, clips: int = 4) -> None:
    """One row per way of making the clips, two frames of each clip side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * 2 * clips, 2.15 * len(pictures)), layout="constrained")
    for axes, (name, movies) in zip(figure.subplots(len(pictures), 1), pictures.items(), strict=True):
        frames = [movie[k] for movie in movies[:clips] for k in (len(movie) // 3, 2 * len(movie) // 3)]
        axes.imshow(np.concatenate(frames, axis=1), interpolation="nearest")
        axes.set_ylabel(name, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=80)
