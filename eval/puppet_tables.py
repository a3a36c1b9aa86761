"""Markdown and terminal tables of the puppets' result files, one function per kind of file.

    print(scores(json.loads(Path("scores.json").read_text()), ["vowels", "sync_skill"]))

`values` is the content of a result file; `keys` are the metrics to show, all where there are none. Figures are in
`eval.figures`, intervals in `eval.stats`, verdicts in `eval.verdicts`.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean

from eval import verdicts
from eval.formatting import Values, chosen, format_deviation, format_half, format_interval, format_value, metric_rows
from eval.metrics.registry import SIGNS, metrics
from eval.stats import holm
from magihuman.io.markdown import aligned, table

LEGEND = (
    "↑ higher, ↓ lower, = nearer to the codec reconstruction is better; in brackets there: the deviation from it. "
    "95 % intervals over prompts."
)

# The decoder study's files have its own quantities under keys that mean another one in all other files.
DECODER_KEYS = {"flicker": "still_flicker", "sharpness": "sharpness_ratio"}

# Metrics of a scores.json in a README that names none.
SCORES = (
    "attributes", "vowels", "vowels_exact", "syllable_error", "sync_skill", "sync_r", "sharpness", "skin_distance",
)  # fmt: skip


def scores(values: Values, keys: Sequence[str] = ()) -> str:
    """Markdown of a scores.json of `eval.puppets`: a column per set of clips."""
    header, *rows = _scores_rows(values, keys)
    return table(header, rows)


def scores_text(values: Values) -> str:
    """All metrics of a scores.json for a terminal, with the reasons for what is missing."""
    missing = {
        measure["reason"]: f"{name}: {key}"
        for name, column in values["columns"].items()
        for key, measure in column["table"].items()
        if measure["value"] is None
    }
    reasons = [f"n/a for {place} and others like it: {why}" for why, place in missing.items()]
    return "\n".join([*aligned(_scores_rows(values)), *reasons])


def _scores_rows(values: Values, keys: Sequence[str] = ()) -> list[list[str]]:
    columns = values["columns"]
    tables = {f"{name} (n={column['n']})": column["table"] for name, column in columns.items()}
    rows = [["", *tables], *metric_rows(tables, chosen(tables, keys))]
    if not keys:
        counts = [f"{_counts(column['skins'])}, p={column['skin_uniform_p']:.2g}" for column in columns.values()]
        rows.append(["skin tones (not prompted), p of the world's shares", *counts])
    return rows


def _counts(skins: Mapping[str, int]) -> str:
    return " ".join(f"{name} {count}" for name, count in skins.items())


SR_COLUMNS = {
    "bicubic": "frames enlarged bicubically",
    "latents": "latents enlarged",
    "sr": "second stage",
    "sr, noise for sound": "second stage, noise for audio",
    "bound": "truth through the codec",
}


def super_resolution(values: Values) -> str:
    """Markdown of all sets of clips in a file of `eval.sr`."""
    titles = {
        "clip": "first stage: the clip itself, through the codec",
        "base": f"first stage: samples of {values['base']}",
    }
    parts = []
    for name, content in values["sets"].items():
        title = titles.get(name, f"first stage: the clip itself, details {name} times coarser")
        steps = steps_of_columns(values)
        about = f"{values['clips']} clips, 95 % intervals{steps and f'; {steps}'}"
        parts.append(f"### {title} ({about})\n\n{super_resolution_set(content)}")
    return "\n\n".join(parts)


def step_count(count: int) -> str:
    """1 step, 2 steps."""
    return f"{count} step{'s' if count > 1 else ''}"


def steps_of_columns(values: Values) -> str:
    """Solver steps of columns whose names do not say them, such as "second stage: 2 steps; one: 1 step"; "" without any."""
    return "; ".join(f"{_sr_title(name)}: {step_count(count)}" for name, count in values.get("steps_of", {}).items())


def _sr_title(column: str) -> str:
    # "sr, 2 steps" is the second stage, too.
    return SR_COLUMNS.get(column, column.replace("sr, ", f"{SR_COLUMNS['sr']}, ", 1))


def super_resolution_set(content: Values, keys: Sequence[str] = ()) -> str:
    """Markdown of one set of clips: every column, then the paired differences of the second stage and each of them."""
    names = {name: _sr_title(name) for name in content["columns"]}
    own, known = content["against"], content["columns"]
    shown = chosen(known, keys)
    rows = metric_rows(known, shown)
    header = ["", *names.values()]
    differences = content["differences"]
    if differences:
        header += [f"{names[own]} minus {names[name]}" for name in differences]
        signed = metric_rows(differences, shown, lambda measure: format_interval(measure, signed=True))
        rows = [row + more[1:] for row, more in zip(rows, signed, strict=True)]
    return table(header, rows)


def decoders(values: Values, keys: Sequence[str] = ()) -> str:
    """Markdown of a scores.json of `eval.turbo_vae`: a column per decoder and truth; `keys` are the file's."""
    columns = values["columns"]
    measures = next(iter(columns.values()))["table"]
    costs = dict.fromkeys(key for column in columns.values() for key in column["cost"])
    rows = []
    for key in keys or [*measures, *costs]:
        heading = metrics()[DECODER_KEYS.get(key, key)].heading
        if key in measures:
            cells = [format_interval(column["table"][key]) for column in columns.values()]
        else:
            known = [column["cost"].get(key) for column in columns.values()]
            cells = ["" if value is None else f"{value:.3g}" for value in known]
        rows.append([heading, *cells])
    return table(["", *(f"{name} (n={column['n']})" for name, column in columns.items())], rows)


def ablation(values: Values, keys: Sequence[str] = ()) -> str:
    """Markdown of an ablation.json: a row per variant, its mean over seeds and the difference from `full`, after rows of what
    was made without a network.

    Args:
        keys: metrics to show; none shows all. Holm's correction always counts all.
    """
    means, seeds = values["table"], len(values["seeds"])
    names, others = list(means["full"]), sorted(set(means) - {"full"})
    if unknown := [key for key in keys if key not in names]:
        raise KeyError(unknown[0])
    shown = keys or names
    half, freedom = ablation_intervals(values)
    p = {}
    if freedom:
        from scipy.stats import t  # takes a second

        scale = float(t.ppf(0.975, freedom))
        for variant in others:
            for name in names:
                size = abs(means[variant][name]["difference"]) / max(half[name] / scale, 1e-12)
                p[variant, name] = 2 * t.sf(size, freedom)
    different = {key for key, corrected in zip(p, holm(list(p.values())), strict=True) if corrected < 0.05}
    rows = [
        [SR_COLUMNS[column], *(format_value(found[name], _digits(means["full"][name]["mean"])) for name in shown)]
        for column, found in values.get("untrained", {}).items()
    ]
    for variant in ["full", *others]:
        cells = []
        for name in shown:
            cell = means[variant][name]
            digits = _digits(means["full"][name]["mean"])
            cells.append(format_value(cell["mean"], digits))
            if variant != "full":
                change = format_value(cell["difference"], digits, signed=True)
                if freedom:
                    change += f" ± {format_value(half[name], digits)}"
                cells[-1] += f" (**{change}**)" if (variant, name) in different else f" ({change})"
        rows.append([variant, *cells])
    note = f"Means over {seeds} seeds; in brackets the difference from full, seed by seed"
    if freedom:
        note += (
            f", ± half its 95 % interval over training seeds (standard deviation pooled over variants, {freedom} degrees of "
            f"freedom). Bold: p < .05 after Holm's correction over all {len(p)} differences"
        )
    return f"{table(['', *(ablation_title(name) for name in shown)], rows)}\n\n{note}."


def ablation_intervals(values: Values) -> tuple[dict[str, float], int]:
    """Half the 95 % interval of a difference from `full` by metric, 0 for one seed; and its degrees of freedom.

    The standard deviation of a difference between two trainings of one seed is pooled over the variants, since each has few
    seeds: n seeds of k variants give k (n - 1) degrees of freedom.
    """
    means, seeds = values["table"], len(values["seeds"])
    others = set(means) - {"full"}
    freedom, half = len(others) * (seeds - 1), dict.fromkeys(means["full"], 0.0)
    if freedom:
        from scipy.stats import t  # takes a second

        scale = float(t.ppf(0.975, freedom))
        half = {
            name: scale * sqrt(fmean(means[variant][name]["difference_sd"] ** 2 for variant in others) / seeds)
            for name in half
        }
    return half, freedom


def _digits(mean: float) -> int:
    """Decimals of a metric of an ablation, whose differences are small."""
    return 2 if abs(mean) >= 2 else 4


def ablation_title(name: str) -> str:
    """Heading of a metric of an ablation: "psnr", "psnr, 5 steps", or "COLUMN: psnr" of a decoder's column."""
    column, colon, key = name.rpartition(": ")
    if column:
        return f"{column}{colon}{metrics()[DECODER_KEYS.get(key, key)].heading}"
    key, comma, steps = name.partition(", ")
    return f"{metrics()[key].heading}{comma}{steps}"


def conditioning(values: Values) -> str:
    """Markdown of a conditions.json of `eval.conditioning`: a table per kind of conditioning."""
    parts = []
    for given, columns in values["sets"].items():
        known = {key for column in columns.values() for key in column if column[key]["value"] is not None}
        rows = metric_rows(columns, [key for key in next(iter(columns.values())) if key in known])
        name = given.replace("sound", "audio")  # as files of before spell it
        parts.append(f"Conditioned on: {name}\n\n" + table([f"n={values['clips']}", *columns], rows))
    return "\n\n".join(parts)


# Metrics of a compare.json in a README that names none.
COMPARISON = (
    "attributes", "vowels", "vowels_exact", "onsets", "sync_skill", "sync_retrieval", "sharpness", "amplitude", "lip_shape",
    "energy_look", "spread_look", "spread_voice", "timing",
)  # fmt: skip


def comparison(values: Values, keys: Sequence[str] = (), brief: bool = False) -> str:
    """Markdown of a compare.json of `eval.dmd2`: a column per sampler, then the verdicts.

    Args:
        brief: of several students that are judged each for itself, leave out the ground truth, other baselines than the
            teacher in the students' sampler, and the verdicts' rows.

    Raises:
        KeyError: a metric that the file does not have.
    """
    brief = brief and len(values["claims"]) > 1
    shown = verdict_lines(values, rows=not brief)
    return "\n".join([comparison_values(values, keys, brief), "", *shown, "", verdict_note(values)])


def comparison_values(values: Values, keys: Sequence[str] = (), brief: bool = False) -> str:
    """The same without verdicts; also of files whose verdicts followed another rule."""
    columns = values["columns"]
    students = [name for name, c in columns.items() if c["role"] == "student"]
    names = {name: f"{name} ({c['calls']} calls)" if "calls" in c else name for name, c in columns.items()}
    if brief and len(students) > 1:
        of_role = {
            role: [name for name, c in columns.items() if c["role"] == role]
            for role in ("bound", "teacher", "baseline")
        }
        shown = [*of_role["bound"], *of_role["teacher"], *of_role["baseline"][-1:], *students]
        names = {name: name.split(",")[0] if name in students else names[name] for name in shown}
    tables = {name: columns[name]["rows"] for name in names}
    rows = metric_rows(tables, chosen(tables, keys), format_deviation)
    for attribute in next(iter(columns.values())).get("shares", {}):
        cells = [columns[name]["shares"][attribute] for name in names]
        rows.append([f"{attribute}, p of the world's shares", *(_share_cell(cell) for cell in cells)])
    costs = {"seconds_per_clip": [_or_empty(columns[name].get("seconds_per_clip"), 3) for name in names]}
    if len(students) > 1:
        made = [columns[name].get("trained", {}) for name in names]
        costs["state_mb"] = [_or_empty(m.get("state_mb"), 0) for m in made]
        costs["process_gb"] = [_or_empty(m.get("process_gb"), 2) for m in made]
    rows += [[metrics()[key].heading, *cells] for key, cells in costs.items() if any(cells)]
    counts = f"{values['prompts']} prompts x {len(values['seeds'])} seeds."
    return "\n".join([table(["", *names.values()], rows), "", f"{counts} {LEGEND}"])


def _share_cell(found: Values) -> str:
    return f"{_counts(found['counts'])}, p={'n/a' if found['p'] is None else format(found['p'], '.2g')}"


def _or_empty(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def comparison_text(values: Values) -> str:
    """Values and verdicts of a compare.json for a terminal: the columns, whose names are long, are numbered."""
    columns = values["columns"]
    count = next(iter(columns.values()))["n"]
    made = {c["checkpoint"]["name"]: c["role"] for c in columns.values() if "checkpoint" in c}
    named = ", ".join(f"{'student' if r == 'student' else 'teacher'} {name}" for name, r in made.items())
    about = f"{named}; {values['prompts']} prompts x {len(values['seeds'])} seeds, {count} clips a column."
    rows = [["", *(f"({number})" for number in range(1, len(columns) + 1))]]
    for key in next(iter(columns.values()))["rows"]:
        cells = [format_half(column["rows"][key]) for column in columns.values()]
        rows.append([f"{SIGNS[metrics()[key].direction]} {key}", *cells])
    for attribute in next(iter(columns.values()))["shares"]:
        rows.append(
            [f"  {attribute}", *(_counts(column["shares"][attribute]["counts"]) for column in columns.values())]
        )
    rows.append(["↓ seconds", *(_or_empty(c.get("seconds_per_clip"), 3) for c in columns.values())])
    rows.append(["↓ calls", *(str(c.get("calls", "")) for c in columns.values())])
    numbered = [f"({number}) {name}" for number, name in enumerate(columns, 1)]
    judged = [line.replace("**", "") for line in verdict_lines(values)]
    return "\n".join([about, *numbered, "", *aligned(rows), LEGEND, "", *judged, verdict_note(values).replace("*", "")])


WORDS = ("better", "worse", "lower", "higher", "different", "undecided", "equal", "n/a")


def verdict_lines(values: Values, rows: bool = True) -> list[str]:
    """The claims of a compare.json as a Markdown list, under the name of what is judged where there are several.

    Args:
        rows: below each claim a line per word with the rows that got it.
    """
    lines = []
    for judged, claims in values["claims"].items():
        # The scope of several training seeds begins with "the recipe".
        lines += [
            f"{judged} ({values['scope'][judged]}):" if "recipe" not in judged else f"{values['scope'][judged]}:",
            "",
        ]
        for claim in claims:
            lines.append(f"- {claim['about']}: **{claim['verdict'].upper()}**")
            if rows:
                lines += [f"  - {text}" for text in ([claim["text"]] if "text" in claim else _words(claim["rows"]))]
        lines.append("")
    return lines[:-1]


def _words(rows: Mapping[str, Values]) -> list[str]:
    """A line per word with its rows and their intervals."""
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    for name, row in rows.items():
        shown = "" if row["value"] is None else f" {_verdict_measure(row)}"
        found[row["verdict"]].append(name + shown)
    return [f"{word}: {'; '.join(names)}" for word, names in found.items() if names]


def _verdict_measure(row: Values) -> str:
    if row["kind"] == "shares":
        return f"w {format_interval(row, digits=2)}"
    return format_interval(row, digits=2) if row["kind"] == "ratio" else format_interval(row, signed=True)


def verdict_note(values: Values) -> str:
    """The rule of the verdicts in words, with the number of rows that Holm's correction counts."""
    claims = [claim for found in values["claims"].values() for claim in found]
    counts = sorted({sum(row["value"] is not None for row in claim["rows"].values()) for claim in claims} - {0}) or [0]
    margins = [
        f"{name} {row['margin']:g}"
        for name, row in next((claim["rows"] for claim in claims if claim["about"].startswith("quality")), {}).items()
        if row["margin"] is not None
    ]
    margins = [
        f"{verdicts.TARGET_MARGIN:.0%} for ratios".replace("%", " %"),
        f"{verdicts.CATEGORY_MARGIN:g} for w",
        *margins,
    ]
    return (
        "Differences have 95 % intervals, ratios and distances of shares (w) 90 % intervals, over prompts. *equal*: the 90 % "
        f"interval lies within the margin: {', '.join(margins)}. Other words have p < {verdicts.ERROR:g} after Holm's "
        f"correction over the {' or '.join(map(str, counts))} rows of their claim. *undecided*: neither was shown."
    )


def verdict_power(values: Values) -> str:
    """Markdown of a verdict_power.json: words of rows for known losses, of claims without a loss, of training seeds."""
    studies, losses = values["studies"], [f"{loss:g}" for loss in values["losses"]]
    designs = {name: found for name, found in values["designs"].items() if losses[-1] in found}

    def shares(counts: Mapping[str, int], *words: str) -> str:
        known = ("equal",), ("undecided",), words, ("n/a",)
        *shown, missing = (f"{100 * sum(counts.get(word, 0) for word in of) / studies:.0f}" for of in known)
        return " / ".join(shown) + (f" (n/a {missing})" if counts.get("n/a") else "")

    rows = []
    for kind in values["kinds"]:
        for loss in losses:
            cells = []
            for found in designs.values():
                counts = found[loss]["rows"][kind["row"]]
                others = [word for word in counts if word not in ("equal", "undecided", "n/a")]
                right = others if loss == "0" else kind["right"]
                cells.append(shares(counts, *right))
            rows.append([kind["label"], f"{100 * float(loss):.0f} %", *cells])
    cases = {f"{name}: nothing lost": found["0"] for name, found in designs.items()}
    apart = f"training seeds differ by {100 * values['seed_deviation']:g} %"
    cases |= {f"{name}: {apart}": found["0"] for name, found in values["designs"].items() if name not in designs}
    false = ("better", "worse", "mixed", "different")
    claims = [
        [case, *(shares(found["claims"][claim], *false) for claim in ("quality", "match"))]
        for case, found in cases.items()
    ]
    head = "% of studies: equal / undecided / a difference, to the right side with a loss, false without"
    third = " x prompts that leave attributes open" if any(name.count("x") == 2 for name in designs) else ""
    return "\n\n".join(
        [
            f"{head}; prompts x clips of each{third}:",
            table(["row", "loss", *designs], rows, "l" + "r" * (1 + len(designs))),
            "Words of claims where nothing is lost, % of studies: equal / undecided / a false difference:",
            table(["", "quality", "match"], claims),
            f"{studies} simulated studies of each cell, judged by the functions of `eval.dmd2`, with all of its rows.",
        ]
    )


def world_checks(values: Values) -> str:
    """Markdown of a world_checks.json: rows by sampler, exchanged prompts, open attributes, verdicts."""
    columns = values["columns"]
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [
        [
            metrics()[key].heading,
            *(format_interval(column[key]) if key in column else "" for column in columns.values()),
        ]
        for key in keys
    ]
    calls = [f"{name} ({values['calls'][name]} calls)" if name in values["calls"] else name for name in columns]
    parts = [table(["", *calls], rows)]
    if swap := values.get("swap"):
        count = len(next(iter(next(iter(swap.values())).values())))
        rows = [
            [f"{name}, then {'another value' if kind == 'to_other' else 'any'}", *(f"{share:.2f}" for share in shares)]
            for name, kinds in swap.items()
            for kind, shares in kinds.items()
        ]
        parts.append(table(["steps with the first prompt", *map(str, range(count))], rows))
    rows = []
    for attribute in next(iter(values["shares"].values())):
        for name, found in values["shares"].items():
            if one := found.get(attribute):
                cells = "; ".join(f"{value} {count}" for value, count in one["counts"].items())
                rows.append([attribute, name, cells, f"{one['p']:.3f}"])
    parts.append(table(["where the prompt leaves it open", "", "clips", "p of the world's shares"], rows))
    verdicts = [f"- {c['about']}: **{c['verdict'].upper()}** ({'; '.join(c['details'])})" for c in values["checks"]]
    note = f"{values['prompts']} held-out prompts, world {values['world']}; 95 % intervals over prompts."
    return "\n\n".join([*parts, note, "\n".join(verdicts)])
