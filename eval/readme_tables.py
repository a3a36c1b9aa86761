"""Tables of every README.md and of the .md files in eval/results, rendered from committed result files.

    python -m eval.readme_tables              # render
    python -m eval.readme_tables check=true   # compare only

A block of a README between `<!-- KIND FILE ... -->` and `<!-- end -->` belongs to this command. Kinds: `scores`, `sr FILE
SET`, `distill`, `distill_values`, `verdict_power FILE`, `conditions`, `decoding`, `ablation`, `cost FILE ...`, `peaks`,
`overview all`, `metrics MODULE ...`, `sees`, `stream`, `resume`, `coverage FILE`, `clip_scores FILE`, and those of
`inference.benchmark.result_tables`. Behind the file, scores, sr, distill, distill_values, decoding, ablation and clip_scores
take the metrics to show.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eval import clip_tables, formatting, output, puppet_tables
from inference.benchmark.result_tables import TABLES as BENCHMARK_TABLES
from magihuman.errors import UserError
from magihuman.io import markdown

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "data", "eval", "inference", "magihuman", "recipes", "slurm", "tests")  # with READMEs


Values = dict[str, Any]


def _read(file: str) -> Values:
    return dict(json.loads((REPO / file).read_text(encoding="utf-8")))


def _with_origin(render_values: Callable[..., str], default: tuple[str, ...] = ()) -> Callable[..., str]:
    """Function of (file, *metrics): table of a result file with its origin below."""

    def table(file: str, *keys: str) -> str:
        values, chosen = _read(file), keys or default
        shown = render_values(values, chosen) if chosen else render_values(values)
        return f"{shown}\n\n{markdown.origin(file, values['provenance'])}"

    return table


def sr_table(file: str, name: str = "clip", *keys: str) -> str:
    """Markdown of one set of clips in a file of `eval.sr`.

    Args:
        name: of the set, such as clip or base; keys: metrics to show, all where none is given.
    """
    values = _read(file)
    steps = puppet_tables.steps_of_columns(values)
    if "steps_of" not in values and values["part"] != "steps":  # all columns have the same
        steps = puppet_tables.step_count(values["steps"])
    about = ", ".join([f"{values['clips']} clips", *([steps] if steps else []), "95 % intervals over clips."])
    shown = puppet_tables.super_resolution_set(values["sets"][name], keys)
    return f"{shown}\n\n{about} {markdown.origin(file, values['provenance'])}"


def cost_table(*files: str) -> str:
    """Markdown of files of `eval.cost`: a row per command."""
    rows = []
    for file in files:
        values = _read(file)
        minutes = [f"{values[key] / 60:.1f} min" for key in ("seconds", "cpu_seconds")]
        made = markdown.origin(file, values["provenance"]).partition(": ")[2].rstrip(".")
        memory = f"{values['peak_memory_bytes'] / 1e9:.2f} GB"
        rows.append([f"`{values['command']}`", *minutes, memory, f"[{made}]({file})"])
    return markdown.table(["command", "wall", "CPU", "memory of all processes", "measured"], rows)


def peaks_table(file: str) -> str:
    """Markdown of a file written by `magihuman.zoo.commands.peaks`: a row per resolution and storage of the weights."""
    values = _read(file)
    rows, settings = values["peaks"], values["settings"]
    if any(row["how"] != "computed" for row in rows):
        raise ValueError("a number that is not computed")
    modes = list(dict.fromkeys((row["decoder"], row["memory"]) for row in rows))
    sizes: dict[tuple[str, str], dict[tuple[str, str], int]] = {}
    for row in rows:
        sizes.setdefault((row["resolution"], row["weights"]), {})[row["decoder"], row["memory"]] = row["bytes"]
    header = ["computed, GB", *(f"{decoder}, {memory}" for decoder, memory in modes)]
    lines = [
        [f"{resolution}, {weights}", *(f"{cells[mode] / 1e9:.1f}" for mode in modes)]
        for (resolution, weights), cells in sizes.items()
    ]
    guidance = f"guidance with cfg_passes={settings['cfg_passes']}" if settings["guided"] else "no guidance"
    return (
        f"{markdown.table(header, lines)}\n\n"
        f"Computed, not measured: {values['model']}, {settings['seconds']:g} s, {guidance}, prompts of "
        f"{settings['text']} tokens, batch={settings['batch']}; "
        f"{values['assumed_for_cuda_bytes'] / 1e9:g} GB in each are assumed for CUDA itself. "
        f"{markdown.origin(file, values['provenance'])}"
    )


def _verdicts_of(values: Values) -> str:
    """The first claims of a compare.json on quality and on match, "; quality against teacher, ...: better"; "" without any."""
    claims = next(iter(values["claims"].values())) if "scope" in values else []
    first = [
        next(claim for claim in claims if claim["about"].startswith(kind)) for kind in ("quality", "match") if claims
    ]
    return "".join(f"; {claim['about']}: {claim['verdict']}" for claim in first)


def overview_table(_: str = "") -> str:
    """Markdown for the front page: one result of every recipe, from the same files as the tables of their pages."""
    files = {
        "pretrain": "eval/results/tiny_base/scores.json",
        "dmd2": "eval/results/dmd2/compare.json",
        "sr": "eval/results/scene_sr/table.json",
        "turbo_vae": "eval/results/scene_turbo/scores.json",
        "lora": "eval/results/tiny_lora/scores.json",
        "memory": "inference/results/memory_peaks.json",
    }
    found = {name: _read(file) for name, file in files.items()}

    value = formatting.format_interval
    base = found["pretrain"]["columns"]["base"]
    teacher, student = (
        next(c for name, c in found["dmd2"]["columns"].items() if name.startswith(start))
        for start in ("teacher, 32", "student")
    )
    speed = teacher["seconds_per_clip"] / student["seconds_per_clip"]
    # The same calls without distillation, which have the same speed.
    columns = found["dmd2"]["columns"].values()
    few = next(c for c in columns if c["role"] == "baseline" and c["calls"] == student["calls"])
    compared = "; ".join(
        f"{title} {value(student['rows'][key])}, teacher {value(teacher['rows'][key])}, in as many calls without distillation "
        f"{value(few['rows'][key])}"
        for title, key in (("consonants right", "onsets"), ("lip-sync skill", "sync_skill"))
    )
    gain = found["sr"]["sets"]["clip"]["differences"]["latents"]["psnr"]
    decoders = {name: found["turbo_vae"]["columns"][name] for name in ("teacher", "student")}
    cheaper = decoders["teacher"]["cost"]["flops"] / decoders["student"]["cost"]["flops"]
    adapted = found["lora"]["columns"]["tiny_lora"]["table"]["skin_distance"]
    peak = min(row["bytes"] for row in found["memory"]["peaks"] if row["resolution"] == "1080p")
    rows = [
        ["Flow-matching pretraining", "train +recipe=pretrain",
         f"lip-sync skill {value(base['table']['sync_skill'])}", "pretrain",
         "recipes/README.md#pretraining"],
        ["DMD-2 distillation", "train +recipe=dmd2",
         f"{student['calls']} network calls instead of {teacher['calls']}, {speed:.1f} times faster; {compared}"
         f"{_verdicts_of(found['dmd2'])}", "dmd2",
         "recipes/README.md#dmd-2"],
        ["Super-resolution", "train +recipe=sr", f"PSNR {value(gain)} dB above enlarged latents", "sr",
         "recipes/README.md#super-resolution"],
        ["Turbo VAE decoder", "train +recipe=turbo_vae",
         f"trained on true frames: PSNR {decoders['student']['table']['psnr']['value']:.1f} dB, its teacher "
         f"{decoders['teacher']['table']['psnr']['value']:.1f} dB, with {cheaper:.1f} times fewer FLOPs", "turbo_vae",
         "recipes/README.md#turbo-vae"],
        ["LoRA", "train +recipe=lora",
         f"learns one skin tone of three that no prompt names: distance from equal shares {value(adapted)}, "
         "0.667 if complete", "lora",
         "recipes/README.md#lora"],
        ["Memory planner, offloading", "zoo plan 15b resolution=1080p gpu_gb=28",
         f"1080p from {peak / 1e9:.1f} GB (computed)", "memory", "magihuman/zoo/README.md"],
    ]  # fmt: skip
    worlds = {"pretrain": "tiny", "lora": "tiny", "memory": "15B"}
    return markdown.table(
        ["what", "command", "world", "result, 95 % interval"],
        [
            [
                f"[{title}]({page})",
                f"`python -m magihuman.{command}`",
                worlds.get(name, "scene"),
                f"[{text}]({files[name]})",
            ]
            for title, command, text, name, page in rows
        ],
    )


def stream_table(file: str) -> str:
    """Markdown of the speed of streaming compared with local reading, a file of tests/support/stream_throughput.py."""
    values = _read(file)
    names = ("samples_per_s", "mb_per_s", "lost_connections", "lost_samples")
    rows = [[name, *(f"{row[key]:g}" for key in names)] for name, row in values["results"].items()]
    heads = ["", "samples/s", "MB/s", "lost connections", "lost samples"]
    about = f"One run, {values['what']}; {values['machine']}, load average {values['load_average']}."
    return f"{markdown.table(heads, rows)}\n\n{about} {markdown.origin(file, values['provenance'])}"


def resume_table(file: str) -> str:
    """Markdown of killed and resumed trainings, a file of tests/resume_matrix.py."""
    values = _read(file)
    strategies = list(next(iter(values["cells"].values())))
    equal = ("checkpoint_equal", "export_equal", "metrics_equal", "every_step_once")

    def shown(cell: Values) -> str:
        if "refused" in cell:
            return "not offered"
        wrong = [key for key in equal if not cell.get(key)]
        return "FAILED" if "error" in cell else "equal" if not wrong else f"differs ({', '.join(wrong)})"

    rows = [[recipe, *(shown(cells[name]) for name in strategies)] for recipe, cells in values["cells"].items()]
    tried = [cell for cells in values["cells"].values() for cell in cells.values() if "refused" not in cell]
    others = []
    for name, move in values["processes"].items():
        apart = move.get("largest_relative_difference_of_losses", float("nan"))
        losses = "equal in the six digits of metrics.csv" if apart == 0 else f"within {apart:.1e} (relative)"
        others.append(f"{name}, {'the same samples' if move.get('same_samples') else 'OTHER SAMPLES'}, losses {losses}")
    seeds = " and ".join(sorted({str(cell["seed"]) for cell in tried}))
    commits = ", ".join(sorted({cell["commit"] for cell in tried}))
    about = (
        f"{len(tried)} pairs; each was killed {values['kills']} times before a random batch (seeds {seeds}) and once while it "
        f"wrote a checkpoint. Continued with another number of processes (pretrain): {'; '.join(others)}. Commits of the "
        f"pairs: {commits}."
    )
    return f"{markdown.table(['recipe', *strategies], rows)}\n\n{about} {markdown.origin(file, values['provenance'])}"


# Kind of a block -> function of its words that returns Markdown.
def coverage_of_intervals(file: str) -> str:
    """Markdown of a file of `eval.human coverage`: coverage and width of both kinds of interval."""
    from eval.human.interval_coverage import coverage_table

    values = _read(file)
    return f"{coverage_table(values)}\n\n{markdown.origin(file, values['provenance'])}"


KINDS: markdown.Kinds = {
    **BENCHMARK_TABLES,
    "scores": _with_origin(puppet_tables.scores, puppet_tables.SCORES),
    "sr": sr_table,
    "clip_scores": _with_origin(clip_tables.clip_scores),
    "distill": _with_origin(partial(puppet_tables.comparison, brief=True), puppet_tables.COMPARISON),
    "distill_values": _with_origin(partial(puppet_tables.comparison_values, brief=True), puppet_tables.COMPARISON),
    "verdict_power": _with_origin(puppet_tables.verdict_power),
    "conditions": _with_origin(puppet_tables.conditioning),
    "decoding": _with_origin(puppet_tables.decoders),
    "ablation": _with_origin(puppet_tables.ablation),
    "cost": cost_table,
    "peaks": peaks_table,
    "overview": overview_table,
    "stream": stream_table,
    "resume": resume_table,
    "world": _with_origin(puppet_tables.world_checks),
    "sees": _with_origin(clip_tables.sensitivity_claims),
    "coverage": coverage_of_intervals,
    "metrics": formatting.glossary,
}


def render(text: str, page: str = "README.md") -> str:
    """Text of a README with every block rendered anew, see `magihuman.io.markdown.render`."""
    return markdown.render(text, KINDS, page)


def update(check: bool = False) -> None:
    """Render the tables of all README.md files and all result pages from their result files.

    Args:
        check: change nothing; fail if a page differs from its result files

    Raises:
        UserError: with check, a page that is out of date; or a block that cannot be rendered.
    """
    pages = [REPO / "README.md", *sorted(page for name in FOLDERS for page in (REPO / name).rglob("README.md"))]
    rendered = {page: render(page.read_text(encoding="utf-8"), page.relative_to(REPO).as_posix()) for page in pages}
    for page in sorted((REPO / "eval" / "results").rglob("*.md")):
        values = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        rendered[page] = output.BY_FORMAT[values["format"]](values) + "\n"
    for page, new in rendered.items():
        if page.read_text(encoding="utf-8") == new:
            continue
        name = page.relative_to(REPO)
        if check:
            raise UserError(f"{name} differs from its result files; run `python -m eval.readme_tables`")
        page.write_text(new, encoding="utf-8")
        print(f"rendered {name}")
    print(f"{len(rendered)} pages are up to date")


if __name__ == "__main__":
    from magihuman.cli import run

    run(update, "python -m eval.readme_tables")
