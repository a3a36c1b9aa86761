"""Tables of every README.md, rendered from committed result files: `python -m eval.readme_tables` (check=true: compare only).

A block of a README between `<!-- scores FILE -->`, `<!-- cost FILE ... -->`, `<!-- peaks FILE -->`,
`<!-- sr FILE SET ROW ... -->`, `<!-- distill FILE ROW ... -->`, `<!-- decoding FILE ROW ... -->`,
`<!-- ablation FILE -->` or those of `inference.benchmark.report` and
`<!-- end -->` belongs to this command; a figure outside such a block is not to be trusted.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval import ablation, conditioning, distill_report, sr_report, turbo_vae
from eval.stats import Measure
from inference.benchmark.report import TABLES as BENCHMARK_TABLES
from magihuman.errors import UserError

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "data", "eval", "inference", "magihuman", "recipes", "slurm", "tests")  # with READMEs


def pages() -> list[Path]:
    """README.md of the repository and of every package and folder in it."""
    return [
        REPO / "README.md",
        *sorted(page for name in FOLDERS for page in (REPO / name).rglob("README.md")),
    ]


# Rows of scores.json that the README shows, in words for a reader who has not met them.
SHOWN = {
    "attributes": "face, hair, shirt and wall as prompted",
    "vowels": "vowels right",
    "vowels_exact": "whole vowel sequence right",
    "syllable_error": "syllable error rate",
    "sync_skill": "lip-sync skill (chance 0, codec bound 1)",
    "sync_r": "mouth against own voice, correlation",
    "sharpness": "sharpness (Laplacian variance)",
    "skin_distance": "unprompted skin tone, distance from equal shares",
}


def _cell(values: dict[str, Any]) -> str:
    measure = Measure(**values)
    if measure.value is None:
        return "n/a"
    digits = 4 if abs(measure.value) < 0.1 and measure.value else 3
    if measure.low is None or measure.high is None:
        return f"{measure.value:.{digits}f}"
    return f"{measure.value:.{digits}f} [{measure.low:.{digits}f}, {measure.high:.{digits}f}]"


def _made(provenance: dict[str, Any]) -> str:
    code = provenance["code"]
    commit = code.get("commit", "unknown")[:12] + (" with changes" if code.get("changed") else "")
    torch = provenance["libraries"]["torch"]
    return f"{provenance['date'][:10]}, {provenance['machine']}, torch {torch}, commit {commit}"


def scores_table(file: str) -> str:
    """Markdown of one scores.json (`eval.puppets`): a column per set of clips, 95 % intervals over clips."""
    values = json.loads((REPO / file).read_text())
    columns = values["columns"]
    lines = [
        "| | " + " | ".join(f"{name} (n={c['n']})" for name, c in columns.items()) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for row, words in SHOWN.items():
        lines.append(f"| {words} | " + " | ".join(_cell(c["table"][row]) for c in columns.values()) + " |")
    lines += ["", f"From [{file}]({file}): {_made(values['provenance'])}."]
    return "\n".join(lines)


def cost_table(*files: str) -> str:
    """Markdown of files written by `eval.cost`: a row per command."""
    lines = ["| command | wall | CPU | memory of all processes | measured |", "|---|---|---|---|---|"]
    for file in files:
        values = json.loads((REPO / file).read_text())
        lines.append(
            f"| `{values['command']}` | {values['seconds'] / 60:.1f} min | {values['cpu_seconds'] / 60:.1f} min | "
            f"{values['peak_memory_bytes'] / 1e9:.2f} GB | [{_made(values['provenance'])}]({file}) |"
        )
    return "\n".join(lines)


def peaks_table(file: str) -> str:
    """Markdown of a file written by `magihuman.zoo.peaks`: a row per resolution and storage of the weights."""
    values = json.loads((REPO / file).read_text())
    rows, settings, made = values["peaks"], values["settings"], values["provenance"]
    if any(row["how"] != "computed" for row in rows):
        raise ValueError("a number that is not computed")
    modes = list(dict.fromkeys((row["decoder"], row["memory"]) for row in rows))
    sizes: dict[tuple[str, str], dict[tuple[str, str], int]] = {}
    for row in rows:
        sizes.setdefault((row["resolution"], row["weights"]), {})[row["decoder"], row["memory"]] = row[
            "bytes"
        ]
    lines = [
        "| computed, GB | " + " | ".join(f"{decoder}, {memory}" for decoder, memory in modes) + " |",
        "|---" + "|---:" * len(modes) + "|",
    ]
    for (resolution, weights), cells in sizes.items():
        figures = " | ".join(f"{cells[mode] / 1e9:.1f}" for mode in modes)
        lines.append(f"| {resolution}, {weights} | {figures} |")
    commit = made["code"].get("commit", "unknown")[:12] + (
        " with changes" if made["code"].get("changed") else ""
    )
    guidance = f"guidance with cfg_passes={settings['cfg_passes']}" if settings["guided"] else "no guidance"
    lines += [
        "",
        f"Computed, not measured: {values['model']}, {settings['seconds']:g} s, {guidance}, prompts of "
        f"{settings['text']} tokens, batch={settings['batch']}; "
        f"{values['assumed_for_cuda_bytes'] / 1e9:g} GB in each are assumed for CUDA itself. From [{file}]({file}): "
        f"{made['date'][:10]}, commit {commit}.",
    ]
    return "\n".join(lines)


def sr_table(file: str, name: str = "clip", *rows: str) -> str:
    """Markdown of one set of clips in a file written by `eval.sr`: a column per way of enlarging.

    Args:
        name: of the set, such as clip or base; rows: those to show, all where none is given.
    """
    values = json.loads((REPO / file).read_text())
    lines = sr_report.brief(values["sets"][name], rows)
    about = f"{values['clips']} clips, {values['steps']} steps, 95 % intervals over clips."
    return "\n".join([*lines, "", f"{about} From [{file}]({file}): {_made(values['provenance'])}."])


def distill_table(file: str, *rows: str) -> str:
    """Markdown of a compare.json (`eval.dmd2`): a column per sampler, rows by name, and the verdicts."""
    values = json.loads((REPO / file).read_text())
    return f"{distill_report.readme(values, rows)}\n\nFrom [{file}]({file}): {_made(values['provenance'])}."


def decoding_table(file: str, *rows: str) -> str:
    """Markdown of a scores.json of `eval.turbo_vae`: a column per decoder and truth.

    Args:
        rows: measures and costs to show, all where none is given.
    """
    values = json.loads((REPO / file).read_text())
    return f"{turbo_vae.markdown(values, rows)}\n\nFrom [{file}]({file}): {_made(values['provenance'])}."


def ablation_table(file: str) -> str:
    """Markdown of a file written by `eval.ablation`."""
    values = json.loads((REPO / file).read_text())
    table = ablation.markdown(values["table"], len(values["seeds"]))
    return f"{table}\n\nFrom [{file}]({file}): {_made(values['provenance'])}."


def conditions_table(file: str) -> str:
    """Markdown of a file written by `eval.conditioning`: a table per kind of condition."""
    values = json.loads((REPO / file).read_text())
    return f"{conditioning.markdown(values)}\n\nFrom [{file}]({file}): {_made(values['provenance'])}."


TABLES: dict[str, Callable[..., str]] = {
    **BENCHMARK_TABLES,
    "scores": scores_table,
    "cost": cost_table,
    "peaks": peaks_table,
    "sr": sr_table,
    "distill": distill_table,
    "conditions": conditions_table,
    "decoding": decoding_table,
    "ablation": ablation_table,
}

BLOCK = re.compile(rf"<!-- ({'|'.join(TABLES)}) ([^>]*?) -->\n.*?<!-- end -->", re.DOTALL)


def render(text: str) -> str:
    """The README with every block made anew.

    Raises:
        UserError: a block names a file that is missing or of another form.
    """

    def block(match: re.Match[str]) -> str:
        kind, files = match[1], match[2].split()
        try:
            table = TABLES[kind](*files)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"README block '{kind} {match[2]}' cannot be rendered: {error!r}") from error
        return f"<!-- {kind} {match[2]} -->\n{table}\n<!-- end -->"

    return BLOCK.sub(block, text)


def update(check: bool = False) -> None:
    """Render the tables of all README.md files from the result files they name.

    Args:
        check: change nothing; fail if a page differs from its result files

    Raises:
        UserError: with check, a page that is out of date; or a block that cannot be rendered.
    """
    for file in pages():
        name = file.relative_to(REPO)
        old = file.read_text(encoding="utf-8")
        new = render(old)
        if check and new != old:
            raise UserError(f"{name} differs from its result files; run `python -m eval.readme_tables`")
        if new != old:
            file.write_text(new, encoding="utf-8")
        print(f"{name} is up to date")


if __name__ == "__main__":
    from magihuman.cli import run

    run(update, "python -m eval.readme_tables")
