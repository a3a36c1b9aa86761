"""Markdown and terminal tables of clips of any origin: `eval.score`, `eval.run`, `eval.compare_scores`, `eval.sensitivity`.

    print(clip_scores(json.loads(Path("summary.json").read_text()), ["wer", "sharpness"]))

`values` is the content of a result file; `keys` are the metrics to show, all where there are none.
"""

from collections.abc import Mapping, Sequence

from eval.formatting import Values, format_interval, format_value
from eval.metrics.registry import SIGNS, measurements, metrics, rate_bound
from magihuman.io.markdown import aligned, table

CLIP_COLUMNS = {"clips": "clips", "bound": "reference through the codec", "reference": "reference"}


def clip_scores(values: Values, keys: Sequence[str] = ()) -> str:
    """Table of a summary.json of `eval.score` or `eval.run`: one column per set of clips and one per published source.

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
