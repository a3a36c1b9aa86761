"""Tables of the evaluation: one format for values and intervals, Markdown and terminal tables of result files.

    print(scores(json.loads(Path("scores.json").read_text()), ["vowels", "sync_skill"]))

Every table in a README and in a result's .md is made here, from the plain values of a result file. Names, units and
directions of metrics, and the order of rows, are in `eval.metrics`, figures in `eval.figures`, intervals in `eval.stats`,
verdicts in `eval.verdicts`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eval import verdicts
from eval.metrics.registry import SIGNS, measurements, metrics, metrics_of, rate_bound
from magihuman.io.markdown import aligned, table

Values = Mapping[str, Any]
"""Content of a result file or of a part of it. A measure in it is the dictionary of an `eval.stats.Measure`."""

LEGEND = (
    "↑ higher, ↓ lower, = nearer to the codec reconstruction is better; in brackets there: the deviation from it. "
    "95 % intervals over prompts."
)

# The decoder study's files have its own quantities under keys that mean another one in all other files.
DECODER_KEYS = {"flicker": "still_flicker", "sharpness": "sharpness_ratio"}


# ---- Format ----


def digits_for(*values: float | None) -> int:
    """Decimals that give about three significant digits of the largest of `values`."""
    size = max((abs(value) for value in values if value is not None), default=0.0)
    return 2 if size >= 2 else 3 if size >= 0.1 or size == 0 else 4 if size >= 0.01 else 5


def format_value(value: float | None, digits: int | None = None, signed: bool = False) -> str:
    """ "0.953"; n/a for None; a zero has no sign."""
    if value is None:
        return "n/a"
    shown = f"{value:{'+' if signed else ''}.{digits_for(value) if digits is None else digits}f}"
    return shown.lstrip("+-") if float(shown) == 0 else shown


def format_interval(
    measure: Values, scale: float = 1, signed: bool = False, unit: str = "", digits: int | None = None
) -> str:
    """ "0.953 [0.921, 0.978]"; the value alone without an interval, n/a without a value.

    Args:
        scale: factor, 100 for percent; signed: + before positive numbers; unit: behind the value; digits: decimals, about
            three significant digits where it is None.
    """
    if measure["value"] is None:
        return "n/a"
    ends = [None if measure[key] is None else scale * measure[key] for key in ("value", "low", "high")]
    digits = digits_for(*ends) if digits is None else digits
    value, low, high = (format_value(end, digits, signed) for end in ends)
    return f"{value}{unit}" if "n/a" in (low, high) else f"{value}{unit} [{low}, {high}]"


def format_deviation(measure: Values) -> str:
    """Interval; where the measure has a target and knows its deviation: "0.0119 (+9.40 % [-4.80, +24.40])"."""
    if measure.get("off") is None or measure["value"] is None:
        return format_interval(measure)
    return f"{format_value(measure['value'])} ({format_interval(measure['off'], 100, signed=True, unit=' %')})"


def format_half(measure: Values) -> str:
    """Value with half the width of its interval: "0.953 ±0.029", with a target "0.0119 (+9.4 ±14.6 %)"."""
    if measure["value"] is None:
        return "n/a"

    def width(of: Values) -> float:
        return float(max(of["high"] - of["value"], of["value"] - of["low"]))

    digits, off = digits_for(measure["value"]), measure.get("off")
    shown = format_value(measure["value"], digits)
    if off is None:
        return f"{shown} ±{width(measure):.{digits}f}"
    return f"{shown} ({100 * off['value']:+.1f} ±{100 * width(off):.1f} %)"


def metric_rows(
    columns: Mapping[str, Values], keys: Iterable[str], show: Callable[[Values], str] = format_interval
) -> list[list[str]]:
    """A row per metric, a cell per column of measures; n/a where a column lacks the metric.

    Raises:
        KeyError: a key that no metric has.
    """
    return [
        [metrics()[key].heading, *(show(column[key]) if key in column else "n/a" for column in columns.values())]
        for key in keys
    ]


def chosen(columns: Mapping[str, Values], keys: Sequence[str]) -> Sequence[str]:
    """`keys`, or all metrics of the columns where there are none.

    Raises:
        KeyError: a key that is in no column.
    """
    known = dict.fromkeys(key for column in columns.values() for key in column)
    if unknown := [key for key in keys if key not in known]:
        raise KeyError(f"no column has {', '.join(unknown)}")
    return keys or sorted(known, key=list(metrics()).index)


def glossary(*modules: str) -> str:
    """Markdown of the metrics that modules of `eval.metrics` declare: key in result files, name, unit, direction.

    Raises:
        KeyError: no such module.
    """
    rows = [[f"`{metric.key}`", metric.label, metric.unit, metric.better] for metric in metrics_of(*modules)]
    return table(["key", "metric", "unit", "direction"], rows, "llll")


# ---- One function per kind of result file; `keys` are the metrics to show, all where there are none ----

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
        parts.append(f"### {title} ({values['clips']} clips, 95 % intervals)\n\n{super_resolution_set(content)}")
    return "\n\n".join(parts)


def super_resolution_set(content: Values, keys: Sequence[str] = ()) -> str:
    """Markdown of one set of clips: every column, then the paired differences of the second stage and each of them."""
    names = {name: SR_COLUMNS.get(name, name) for name in content["columns"]}
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


def ablation(values: Values) -> str:
    """Markdown of an ablation.json: a row per variant, the mean and the difference from `full` ± sd over seeds."""
    means = values["table"]
    names = list(means["full"])
    header = ["", *(ablation_title(name) for name in names)]
    rows = []
    for variant in ["full", *sorted(set(means) - {"full"})]:
        cells = []
        for name in names:
            cell = means[variant][name]
            digits = 2 if abs(means["full"][name]["mean"]) >= 2 else 4  # differences are small
            cells.append(format_value(cell["mean"], digits))
            if variant != "full":
                change = format_value(cell["difference"], digits, signed=True)
                cells[-1] += f" ({change} ± {format_value(cell['difference_sd'], digits)})"
        rows.append([variant, *cells])
    seeds = f"Means over {len(values['seeds'])} seeds"
    note = f"{seeds}; in brackets the difference from full, seed by seed, ± its standard deviation."
    return f"{table(header, rows)}\n\n{note}"


def ablation_title(name: str) -> str:
    """Heading of a metric of an ablation, "psnr" or "COLUMN: psnr" of a decoder's column."""
    column, colon, key = name.rpartition(": ")
    return f"{column}{colon}{metrics()[DECODER_KEYS.get(key, key) if column else key].heading}"


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
        brief: of several students, leave out the ground truth, other baselines than the teacher in the students'
            sampler, and the verdicts' rows.

    Raises:
        KeyError: a metric that the file does not have.
    """
    brief = brief and sum(c["role"] == "student" for c in values["columns"].values()) > 1
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
        lines += [f"{judged} ({values['scope'][judged]}):", ""]
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

    def percent(counts: Mapping[str, int], *words: str) -> str:
        return f"{100 * sum(counts.get(word, 0) for word in words) / studies:.0f}"

    rows = []
    for kind in values["kinds"]:
        for loss in losses:
            cells = []
            for found in designs.values():
                counts = found[loss]["rows"][kind["row"]]
                others = [word for word in counts if word not in ("equal", "undecided", "n/a")]
                right = others if loss == "0" else kind["right"]
                cells.append(
                    f"{percent(counts, 'equal')} / {percent(counts, 'undecided', 'n/a')} / {percent(counts, *right)}"
                )
            rows.append([kind["label"], f"{100 * float(loss):.0f} %", *cells])
    cases = {f"{name}: nothing lost": found["0"] for name, found in designs.items()}
    apart = f"training seeds differ by {100 * values['seed_deviation']:g} %"
    cases |= {f"{name}: {apart}": found["0"] for name, found in values["designs"].items() if name not in designs}
    false = ("better", "worse", "mixed", "different")
    claims = [
        [
            case,
            *(
                f"{percent(counts, 'equal')} / {percent(counts, 'undecided')} / {percent(counts, *false)}"
                for counts in (found["claims"][claim] for claim in ("quality", "match"))
            ),
        ]
        for case, found in cases.items()
    ]
    head = "% of studies: equal / undecided / a difference, to the right side with a loss, false without"
    return "\n\n".join(
        [
            f"{head}; prompts x clips of each:",
            table(["row", "loss", *designs], rows, "l" + "r" * (1 + len(designs))),
            "Words of claims where nothing is lost, % of studies: equal / undecided / a false difference:",
            table(["", "quality", "match"], claims),
            f"{studies} simulated studies of each cell, judged by the functions of `eval.dmd2`, with all of its rows.",
        ]
    )


SENSITIVITY_SIGNS = {
    "ordered": "**{effect}**",
    "seen": "{effect}",
    "reversed": "({effect})",
    "blind": "·",
    "no value": "",
}


def sensitivity(values: Values) -> str:
    """Markdown of the matrix of `eval.sensitivity`: a row per metric, a column per fault."""
    rows = []
    for row in values["metrics"].values():
        cells = [row["faults"][fault] for fault in values["faults"]]
        shown = [
            SENSITIVITY_SIGNS[c["verdict"]].format(effect="" if c["effect"] is None else format_value(c["effect"], 1))
            for c in cells
        ]
        claimed = [fault in row["claims"] for fault in values["faults"]]
        rows.append([row["title"], *(f"{text} ✓" if yes else text for text, yes in zip(shown, claimed, strict=True))])
    legend = (
        f"Change to the worse at the strongest fault, in standard deviations of {values['clips']} clean clips. Bold: worse "
        "with every strength; plain: only at the strongest; in brackets: called better; ·: not seen; empty: no value. "
        "✓: the metric claims to see it."
    )
    return "\n".join([table(["metric", *(fault["label"] for fault in values["faults"].values())], rows), "", legend])


def sensitivity_claims(values: Values) -> str:
    """Markdown of what metrics claim to see in a matrix of `eval.sensitivity`: their means, clean and for each strength.

    A fault called codec is shown as a column: values of clips without another fault, through the codec.
    """
    rows = []
    for fault, about in values["faults"].items():
        strengths = " ".join(f"{strength:g}" for strength in about["strengths"])
        named = f"{about['label']}: {strengths} {about['unit']}".rstrip() if about["unit"] else about["label"]
        for row in (row for row in values["metrics"].values() if fault in row["claims"]):
            clean, *faulty = (format_value(mean) for mean in row["faults"][fault]["means"])
            codec = row["faults"].get("codec")
            coded = format_value(codec["means"][1]) if codec and codec["means"] else ""
            sign = SIGNS[row["direction"]]
            rows.append([named, f"{row['title']} {sign}".rstrip(), clean, coded, ", ".join(faulty)])
    heads = ["fault, from weak to strong", "row that orders it", "clean", "through the codec", "with the fault"]
    if "codec" not in values["faults"]:
        heads, rows = heads[:3] + heads[4:], [row[:3] + row[4:] for row in rows]
    return f"{table(heads, rows, 'll' + 'r' * (len(heads) - 2))}\n\nMeans of {values['clips']} clips."


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


# ---- Clips of any origin: eval.score, eval.run, eval.compare_scores ----

CLIP_COLUMNS = {"clips": "clips", "bound": "reference through the codec", "reference": "reference"}


def clip_scores(values: Values, keys: Sequence[str] = ()) -> str:
    """Markdown of a summary.json of `eval.score` or `eval.run`: a column per set of clips, published values beside them.

    Metrics that no column has a value of are listed below with the reason; n stands where not all clips have a value.
    """
    columns, published = values["columns"], values.get("published") or {}
    known = dict.fromkeys(key for column in columns.values() for key in column)
    if unknown := [key for key in keys if key not in known]:
        raise KeyError(f"no column has {', '.join(unknown)}")
    valued = [key for key in known if any(c.get(key, {}).get("value") is not None for c in columns.values())]
    # A published value is shown where ours is missing, too.
    shown = list(keys) or [key for key in known if key in valued or any(key in row for row in published.values())]
    listed = {name: row for name, row in published.items() if set(row) & set(shown)}
    heads = [CLIP_COLUMNS.get(name, name) for name in columns]
    rows = [
        [
            metrics()[key].heading,
            *(_clip_cell(column.get(key)) for column in columns.values()),
            *(format_value(row.get(key)) if key in row else "" for row in listed.values()),
        ]
        for key in shown
    ]
    parts = [table(["", *heads, *(f"{name} (published)" for name in listed)], rows)]
    if listed and values.get("published_source"):
        parts.append(f"Published: {values['published_source']}.")
    if languages := _language_table(values.get("by_language") or {}, shown):
        parts.append(languages)
    if values.get("show_parts"):
        parts += _part_tables(values.get("parts") or {}, shown)
    if note := _rate_note(values, shown):
        parts.append(note)
    if not keys and (lost := _lost(columns, valued)):
        parts.append("Without a value:\n\n" + "\n".join(f"- {line}" for line in lost))
    return "\n\n".join(parts)


def _part_tables(parts: Mapping[str, Mapping[str, Values]], shown: Sequence[str]) -> list[str]:
    """A table of the parts of a suite, and one for those below each: set1, set2; age/0-19, age/19-30."""
    found = []
    for above in sorted({part.rpartition("/")[0] for part in parts}):
        of = {part: column for part, column in parts.items() if part.rpartition("/")[0] == above}
        keys = [key for key in shown if any(column.get(key, {}).get("value") is not None for column in of.values())]
        rows = [[metrics()[key].heading, *(_clip_cell(column.get(key)) for column in of.values())] for key in keys]
        counts = [next((measure["total"] for measure in column.values()), 0) for column in of.values()]
        heads = [f"{part} ({count} clips)" for part, count in zip(of, counts, strict=True)]
        found.append(table(["", *heads], rows))
    return found


def _rate_note(values: Values, shown: Sequence[str]) -> str:
    """Which rows cannot be compared between columns, since their clips have several frame rates; "" where they have one."""
    rates = values.get("fps") or {}
    bound = rate_bound(values["measurements"])
    rows = [metrics()[key].label for key in shown if key in bound]
    if not rows or len({rate for column in rates.values() for rate in column}) < 2:
        return ""
    told = "; ".join(
        f"{CLIP_COLUMNS.get(name, name)} {', '.join(f'{rate:g}' for rate in of)}" for name, of in rates.items() if of
    )
    return f"Frames per second: {told}. Not to be compared between rates: {', '.join(rows)}."


def _clip_cell(measure: Values | None) -> str:
    if measure is None:
        return ""
    cell = format_interval(measure)
    if measure["value"] is None or measure["n"] == measure.get("total", measure["n"]):
        return cell
    failed = f", {measure['failed']} failed" if measure.get("failed") else ""
    return f"{cell} (n={measure['n']} of {measure['total']}{failed})"


def _language_table(languages: Mapping[str, Mapping[str, Values]], shown: Sequence[str]) -> str:
    """Metrics of speech by language; "" where there are none."""
    spoken = [m.key for one in measurements().values() if "dialogue" in one.inputs for m in one.metrics]
    keys = [
        key
        for key in shown
        if key in spoken and any(column.get(key, {}).get("value") is not None for column in languages.values())
    ]
    if not keys:
        return ""
    rows = [[language, *(_clip_cell(column.get(key)) for key in keys)] for language, column in languages.items()]
    return table(["language", *(metrics()[key].heading for key in keys)], rows)


def _lost(columns: Mapping[str, Mapping[str, Values]], valued: Sequence[str]) -> list[str]:
    """ "unavailable: `wer`, `mer`: the reason" for metrics of the first column without a value."""
    first = next(iter(columns.values()))
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, measure in first.items():
        if key not in valued:
            reasons.setdefault((measure["status"], measure["reason"]), []).append(f"`{key}`")
    return [f"{status}: {', '.join(names)}: {reason}" for (status, reason), names in reasons.items()]


def clip_scores_text(values: Values) -> str:
    """The same for a terminal."""
    columns = values["columns"]
    shown = [
        key
        for key in dict.fromkeys(key for column in columns.values() for key in column)
        if any(c.get(key, {}).get("value") is not None for c in columns.values())
    ]
    rows = [["", *(CLIP_COLUMNS.get(name, name) for name in columns)]]
    rows += [[metrics()[key].heading, *(_clip_cell(c.get(key)) for c in columns.values())] for key in shown]
    notes = [note] if (note := _rate_note(values, shown)) else []
    return "\n".join([*aligned(rows), *notes, *(line.replace("`", "") for line in _lost(columns, shown))])


def clip_comparison(values: Values, keys: Sequence[str] = ()) -> str:
    """Markdown of a comparison.json of `eval.compare_scores`: averages, paired difference, verdict, clips needed."""
    return "\n\n".join([table(*_comparison_rows(values, keys)), *_comparison_notes(values)])


def clip_comparison_text(values: Values) -> str:
    """The same for a terminal."""
    header, rows = _comparison_rows(values)
    return "\n".join([*aligned([header, *rows]), *_comparison_notes(values)])


def _comparison_rows(values: Values, keys: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    found = values["metrics"]
    header = ["", values["name"], values["baseline_name"], "difference", "verdict", "clips", "clips needed"]
    rows = []
    for key in keys or found:
        entry = found[key]
        refused = entry["verdict"] == "not compared"
        if refused and entry.get("value") is None and entry.get("baseline") is None:
            continue
        change = {"value": entry["change"], "low": entry["low"], "high": entry["high"]}
        rows.append(
            [
                metrics()[key].heading, _side(entry, "value", "interval"), _side(entry, "baseline", "baseline_interval"),
                "" if refused else format_interval(change, signed=True), entry["verdict"], f"{entry['n']} of {entry['total']}",
                "" if entry["needed"] is None else f"{entry['needed']:,}",
            ]
        )  # fmt: skip
    return header, rows


def _side(entry: Values, value: str, interval: str) -> str:
    """A value of one side; with its interval where there is one, as of distances of sets."""
    low, high = entry.get(interval, (None, None))
    return format_interval({"value": entry[value], "low": low, "high": high})


def _comparison_notes(values: Values) -> list[str]:
    found: Values = values["metrics"]
    compared = [entry for entry in found.values() if entry["verdict"] != "not compared"]
    notes = []
    if compared:
        notes.append(
            "Difference with its 95 % interval over prompts, on the clips that both have. Clips needed: so many show a "
            f"difference of this size in four of five repetitions. Of {len(compared)} metrics at 95 %, about "
            f"{len(compared) / 20:.1f} differ by chance."
        )
    if any("gain" in entry for entry in compared):
        notes.append("Of metrics with a target (=) verdict and clips needed are of the distance to the target.")
    notes += [note[0].upper() + note[1:] + "." for note in values.get("notes", [])]
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, entry in found.items():
        if entry["reason"]:
            refused = "Not compared: " if entry["verdict"] == "not compared" else ""
            reasons.setdefault((refused, entry["reason"]), []).append(key)
    return notes + [f"{refused}{', '.join(keys)}: {reason}" for (refused, reason), keys in reasons.items()]


BY_FORMAT: dict[str, Callable[[Values], str]] = {
    "magihuman-scores/1": scores,
    "magihuman-sr/1": super_resolution,
    "magihuman-decoders/1": decoders,
    "magihuman-ablation/1": ablation,
    "magihuman-conditions/1": conditioning,
    "magihuman-compare/2": comparison,
    "magihuman-verdict-power/1": verdict_power,
    "magihuman-sensitivity/1": sensitivity,
    "magihuman-world-checks/1": world_checks,
    "magihuman-clip-scores/1": clip_scores,
    "magihuman-clip-comparison/1": clip_comparison,
}
"""Format of a result file -> its .md."""
