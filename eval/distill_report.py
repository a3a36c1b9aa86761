"""The comparison of `eval.dmd2` in words: its table, and a verdict per claim."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.stats import Measure
from eval.trained import PROCESS, STATE

ARROWS = {"up": "+", "down": "-", "bound": "="}
LEGEND = (
    "+ higher is better, - lower, = as near to the bound as can be, with the share by which a cell lies over or "
    "under it. 95 % intervals over prompts: of 20 rows, one differs by chance."
)
FASTER = 1.05  # from which times are called different


def number(value: float, digits: int) -> str:
    """A value, without the sign of a zero."""
    shown = f"{value:.{digits}f}"
    return shown.lstrip("-") if float(shown) == 0 else shown


def interval(measure: Mapping[str, Any], scale: float = 1, signed: bool = False, unit: str = "") -> str:
    """ "0.953 [0.921, 0.978]", or n/a."""
    found = Measure(**{key: measure[key] for key in ("value", "low", "high", "n", "status", "reason")})
    if found.value is None or found.low is None or found.high is None:
        return "n/a"
    ends = [found.value * scale, found.low * scale, found.high * scale]
    size = max(map(abs, ends))
    digits = 1 if size >= 10 else 2 if size >= 1.5 else 3 if size >= 0.1 else 4
    value, low, high = (number(end, digits) for end in ends)
    sign = "+" if signed and ends[0] > 0 and float(value) else ""
    return f"{sign}{value}{unit} [{low}, {high}]"


def cell(measure: Mapping[str, Any]) -> str:
    """A cell of the table; one that is to be near the bound says how far it is off instead of its own interval."""
    if measure.get("off") is None or measure["value"] is None:
        return interval(measure)
    size = measure["value"]
    digits = 1 if size >= 10 else 2 if size >= 1.5 else 3 if size >= 0.1 else 4
    return f"{size:.{digits}f} ({interval(measure['off'], 100, signed=True, unit=' %')})"


def short_cell(found: Mapping[str, Any], half: bool = False) -> str:
    """A cell without its interval, or with half its width."""
    if found["value"] is None:
        return "n/a"
    width = max(found["high"] - found["value"], found["value"] - found["low"])
    size = abs(found["value"])
    digits = 1 if size >= 10 else 2 if size >= 1.5 else 3 if size >= 0.1 else 4
    shown, off = number(found["value"], digits), found.get("off")
    if off is None:
        return f"{shown} ±{width:.{digits}f}" if half else shown
    width = 100 * max(off["high"] - off["value"], off["value"] - off["low"])
    return f"{shown} ({100 * off['value']:+.1f}{f' ±{width:.1f}' if half else ''} %)"


def seconds(values: Mapping[str, Any], column: str) -> float | None:
    """Of denoising, per clip."""
    found = values["columns"][column].get("seconds_per_clip")
    return None if found is None else float(found)


def table_lines(values: Mapping[str, Any]) -> list[list[str]]:
    """Header and body as cells; the last two say which way is better and what a row is."""
    columns = values["columns"]
    lines = [["", *columns, "", ""]]
    for name, row in values["rows"].items():
        cells = [cell(c["rows"][name]) for c in columns.values()]
        lines.append([name, *cells, ARROWS[row["better"]], row["about"]])
    lines.append(
        [
            "skins",
            *(" ".join(f"{k} {v}" for k, v in c["skins"].items()) for c in columns.values()),
            " ",
            "seen",
        ]
    )
    times = [seconds(values, name) for name in columns]
    lines.append(["seconds", *("" if t is None else f"{t:.3f}" for t in times), "-", "denoising, per clip"])
    calls = [str(c.get("calls", "")) for c in columns.values()]
    return [*lines, ["calls", *calls, "-", "of the network, per clip"]]


def about(values: Mapping[str, Any]) -> str:
    """What was compared."""
    columns = values["columns"].values()
    counts = f"{values['prompts']} prompts x {len(values['seeds'])} seeds, {next(iter(columns))['n']} clips a column"
    made = {c["checkpoint"]["name"]: c["role"] for c in columns if "checkpoint" in c}
    named = ", ".join(
        f"{'student' if role == 'student' else 'teacher'} {name}" for name, role in made.items()
    )
    return f"{named}; {counts}."


def text(values: Mapping[str, Any]) -> str:
    """Table in short and verdicts for a terminal: the columns, whose names are long, are numbered."""
    columns = values["columns"]
    lines = [["", *(f"({k})" for k in range(1, len(columns) + 1))]]
    for name, row in values["rows"].items():
        cells = [short_cell(c["rows"][name], half=True) for c in columns.values()]
        lines.append([f"{ARROWS[row['better']]} {name}", *cells])
    lines += [[f"{line[-2]} {line[0]}", *line[1:-2]] for line in table_lines(values)[-3:]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rows = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    keys = [f"({k}) {name}" for k, name in enumerate(columns, 1)]
    said = [line.replace("**", "") for line in claim_lines(values)]
    return "\n".join([about(values), *keys, "", *rows, LEGEND, "", *said])


def markdown(values: Mapping[str, Any]) -> str:
    """Table and verdicts."""
    lines = ["| " + " | ".join(line) + " |" for line in table_lines(values)]
    rule = "|---" * len(table_lines(values)[0]) + "|"
    return "\n".join([about(values), "", lines[0], rule, *lines[1:], "", LEGEND, "", *claim_lines(values)])


# Rows of the README's table where it names none.
README_ROWS = (
    "attributes", "vowels", "vowels_exact", "sync_skill", "sync_retrieval", "sharpness", "mouth_sharpness", "amplitude",
    "nearest", "energy_look", "skin_tones", "spread_look", "spread_voice",
)  # fmt: skip


def readme(values: Mapping[str, Any], rows: Sequence[str] = ()) -> str:
    """Table and verdicts for the README: `rows` by name, with names and calls in the header.

    Of several students no more is shown than the bound, the teacher, the teacher in their sampler, themselves, and the
    verdicts without their details.

    Raises:
        KeyError: a row that is none.
    """
    columns = values["columns"]
    several = len(values["claims"]) > 1
    header = {name: f"{name} ({c['calls']} calls)" if "calls" in c else name for name, c in columns.items()}
    if several:
        others = [name for name in columns if name not in values["claims"]]
        shown = [*others[1:3], others[-1], *values["claims"]]
        header = {name: name.split(",")[0] if name in values["claims"] else header[name] for name in shown}
    lines = [["", *header.values()]]
    for name in rows or README_ROWS:
        lines.append([values["rows"][name]["about"], *(cell(columns[c]["rows"][name]) for c in header)])
    times = [seconds(values, name) for name in header]
    lines.append(["denoising, seconds per clip", *("" if t is None else f"{t:.3f}" for t in times)])
    if several:
        lines += _training(values, list(header))
    body = ["| " + " | ".join(line) + " |" for line in lines]
    counts = f"{values['prompts']} prompts x {len(values['seeds'])} seeds"
    note = (
        f"{counts}, 95 % intervals over prompts. Where a share of the bound (through codec) stands in brackets, nearer "
        "to it is better, from either side."
    )
    said = [
        f"- {header[name]}: "
        + "; ".join(f"{claim['about']}: **{claim['verdict'].upper()}**" for claim in found)
        for name, found in values["claims"].items()
    ]
    verdicts = said if several else claim_lines(values)
    return "\n".join([body[0], "|---" * len(lines[0]) + "|", *body[1:], "", note, "", *verdicts])


def _training(values: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Rows of what the students' trainings held."""
    made = [values["columns"][name].get("trained", {}) for name in names]
    rows = {
        STATE: [f"{m['state_mb']:.0f}" if "state_mb" in m else "" for m in made],
        PROCESS: [f"{m['process_gb']:.2f}" if "process_gb" in m else "" for m in made],
    }
    return [[about, *cells] for about, cells in rows.items() if any(cells)]


# ----------------------------------------------------------------------------------------------------
# Verdicts
# ----------------------------------------------------------------------------------------------------


def claims(values: Mapping[str, Any], student: str) -> list[dict[str, Any]]:
    """What is claimed of a student: `about`, `verdict` (a word), and `details` that say how much.

    The word for a baseline: better where some row is and none is worse, worse in the opposite case, mixed where there
    are both, within noise where there are neither. For diversity: kept, or which rows are lost.
    """
    columns = values["columns"]
    teacher = next(name for name, c in columns.items() if c["role"] == "teacher")
    found = []
    for baseline, rows in values["against"][student].items():
        better, worse, level = (
            [name for name, v in rows.items() if v["verdict"] == word]
            for word in ("better", "worse", "within noise")
        )
        word = "mixed" if better and worse else "better" if better else "worse" if worse else "within noise"
        details = [
            f"{title}: {'; '.join(_change(values, name, rows[name]) for name in names)}"
            for title, names in (("better", better), ("worse", worse))
            if names
        ]
        details += [f"within noise: {', '.join(level)}"] if level else []
        found.append({"about": f"against {baseline}", "verdict": word, "details": details})
    found.append(_diversity(values["diversity"][student]))
    mine, theirs = seconds(values, student), seconds(values, teacher)
    if mine and theirs:
        ratio = theirs / mine
        word = "faster" if ratio > FASTER else "slower" if ratio < 1 / FASTER else "as fast"
        calls = f"{columns[student]['calls']} against {columns[teacher]['calls']} network calls"
        how = f"{ratio:.1f} times: {mine:.3f} s against {theirs:.3f} s of denoising per clip; {calls}"
        found.append({"about": f"speed against {teacher}", "verdict": word, "details": [how]})
    return found


def _diversity(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The claim that what a prompt leaves open varies as with the teacher, within 10 %."""
    known = {name: v for name, v in kept.items() if v["verdict"] != "n/a"}
    lost = [name for name, v in known.items() if v["verdict"] in ("lost", "over")]
    near = [name for name, v in known.items() if "noise" in v["verdict"]]
    word = "not kept" if lost else "kept within noise" if near else "kept" if known else "n/a"
    details = [f"{name} {interval(v['ratio'])}: {v['verdict']}" for name, v in known.items()]
    about = "diversity: within 10 % of the teacher's (ratios)"
    return {
        "about": about,
        "verdict": word,
        "details": ["; ".join(details)] if known else ["needs several seeds"],
    }


def _change(values: Mapping[str, Any], name: str, verdict: Mapping[str, Any]) -> str:
    if values["rows"][name]["better"] == "bound":
        gain = verdict["gain"]
        turned = gain if gain["value"] > 0 else {**gain, **{k: -gain[o] for k, o in _TURNED.items()}}
        side = "nearer the bound" if gain["value"] > 0 else "farther from the bound"
        return f"{name} {interval(turned, 100, unit=' %')} {side}"
    return f"{name} {interval(verdict['change'], signed=True)}"


_TURNED = {"value": "value", "low": "high", "high": "low"}


def claim_lines(values: Mapping[str, Any]) -> list[str]:
    """The claims as a Markdown list, under the student's name where there are several."""
    lines = []
    for student, found in values["claims"].items():
        lines += [f"{student}:", ""] if len(values["claims"]) > 1 else []
        for claim in found:
            lines.append(f"- {claim['about']}: **{claim['verdict'].upper()}**")
            lines += [f"  - {detail}" for detail in claim["details"]]
        lines.append("")
    return lines[:-1]
