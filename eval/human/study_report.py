"""Report of a human study: votes with names again, statistics with and without excluded raters, tables, plots, one HTML page.

    values = study_values(plan, votes)
    print(report_markdown(values))

A study may be reported while it runs.
"""

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.formatting import format_interval
from eval.human.study_plan import StudyPlan, exclusion_rule, read_plan
from eval.human.study_statistics import OUTCOMES, VoteTable, agreement, independent, shares, side_bias, strengths
from eval.human.vote_store import Vote
from eval.stats import proportion
from magihuman.io.markdown import table
from magihuman.io.text import load_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "magihuman-study-report/1"
TEMPLATE = Path(__file__).with_suffix(".html")
PUBLISHED = {"Ovi 1.1": (800, 82, 118), "LTX 2.3": (609, 172, 219)}
"""Wins, ties and losses of daVinci-MagiHuman in 1000 votes each, from the shares in the paper (arXiv 2603.21986)."""
COLOURS = {"win": "#2f7ebc", "tie": "#c9c9c9", "loss": "#d9734e"}
UNEVEN_SIDES = 0.05


def named_votes(plan: StudyPlan, votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """A row per vote with the systems' names; of a check, win means that the undamaged clip was chosen."""
    rows = []
    for vote in votes:
        trial = plan.trials[vote.rater][vote.trial]
        pair = plan.pairs[trial.pair]
        outcome = "tie" if vote.choice == "tie" else "win" if (vote.choice == "left") == trial.focus_left else "loss"
        rows.append(
            {
                "rater": vote.rater + 1,
                "number": vote.trial + 1,
                "kind": trial.kind,
                "focus": plan.settings.focus if trial.kind != "check" else "undamaged",
                "opponent": pair.opponent,
                "clip": pair.name,
                "prompt": pair.prompt,
                "pair": trial.pair,
                "focus_side": "left" if trial.focus_left else "right",
                "choice": vote.choice,
                "outcome": outcome,
                "seconds": round(vote.seconds, 2),
                "time": round(vote.at, 2),
            }
        )
    return rows


def vote_table(plan: StudyPlan, rows: Sequence[dict[str, Any]], without: Sequence[int] = ()) -> VoteTable:
    """Arrays of the votes that count: pairs, without checks and repeats, and without some raters (by number, from 1)."""
    groups = {group: number for number, group in enumerate(dict.fromkeys(pair.group for pair in plan.pairs))}
    counted = [row for row in rows if row["kind"] == "pair" and row["rater"] not in without]
    return VoteTable(
        rater=np.array([row["rater"] for row in counted], int),
        group=np.array([groups[plan.pairs[row["pair"]].group] for row in counted], int),
        opponent=np.array([plan.opponents.index(row["opponent"]) for row in counted], int),
        outcome=np.array([OUTCOMES.index(row["outcome"]) for row in counted], int),
        focus_left=np.array([row["focus_side"] == "left" for row in counted], bool),
        pair=np.array([row["pair"] for row in counted], int),
    )


def rater_rows(plan: StudyPlan, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of every rater: answers, checks, repeats, sides, time, and whether the plan's rule excludes them."""
    found = []
    for number, trials in enumerate(plan.trials, 1):
        mine = [row for row in rows if row["rater"] == number]
        checks = [row for row in mine if row["kind"] == "check"]
        pairs = [row for row in mine if row["kind"] == "pair"]
        first = {row["pair"]: row["outcome"] for row in pairs}
        repeats = [row["outcome"] == first[row["pair"]] for row in mine if row["kind"] == "repeat"]
        decided = [row["choice"] == "left" for row in pairs if row["choice"] != "tie"]
        failed = sum(row["outcome"] != "win" for row in checks)
        scores = [1 - OUTCOMES.index(row["outcome"]) / 2 for row in pairs]
        found.append(
            {
                "rater": number,
                "answered": len(mine),
                "planned": len(trials),
                "votes": len(pairs),
                "score": float(np.mean(scores)) if scores else None,
                "ties": float(np.mean([row["choice"] == "tie" for row in pairs])) if pairs else None,
                "left": float(np.mean(decided)) if decided else None,
                "checks": len(checks),
                "failed": failed,
                "repeats": len(repeats),
                "same": int(sum(repeats)),
                "seconds": float(np.median([row["seconds"] for row in pairs])) if pairs else None,
                "excluded": failed > plan.settings.failures,
            }
        )
    return found


def _results(plan: StudyPlan, votes: VoteTable) -> dict[str, Any]:
    """Statistics of one set of votes, as plain values."""
    found: dict[str, Any] = {"opponents": {}}
    strength = strengths(votes, len(plan.opponents))
    for number, name in enumerate(plan.opponents):
        part = votes.where(votes.opponent == number)
        raters, groups = part.clusters
        found["opponents"][name] = {
            "votes": len(part),
            "raters": raters,
            "prompts": groups,
            "shares": {key: measure.to_dict() for key, measure in shares(part).items()},
            "independent": {key: measure.to_dict() for key, measure in independent(part).items()},
            "elo": strength["elo"][number].to_dict(),  # type: ignore[index]
            "agreement": agreement(part).to_dict(),
        }
    left, chance = side_bias(votes)
    found["tie"] = strength["tie"].to_dict()  # type: ignore[union-attr]
    found["agreement"] = agreement(votes).to_dict()
    found["left"] = {**left.to_dict(), "p": chance}
    return found


def study_values(plan: StudyPlan, votes: Sequence[Vote]) -> dict[str, Any]:
    """Content of report.json: results without the excluded raters (`kept`) and of all (`all`), raters, remarks."""
    rows = named_votes(plan, votes)
    raters = rater_rows(plan, rows)
    excluded = [rater["rater"] for rater in raters if rater["excluded"]]
    kept, every = vote_table(plan, rows, excluded), vote_table(plan, rows)
    seconds = [row["seconds"] for row in rows if row["kind"] == "pair"]
    values: dict[str, Any] = {
        "format": FORMAT,
        "focus": plan.settings.focus,
        "opponents": plan.opponents,
        "question": plan.settings.question,
        "shared": plan.settings.share,
        "answered": len(rows),
        "planned": sum(map(len, plan.trials)),
        "rule": exclusion_rule(plan.settings),
        "excluded": excluded,
        "kept": _results(plan, kept),
        "raters": raters,
        "seconds": None if not seconds else dict(
            zip(("quarter", "median", "three_quarters"), np.quantile(seconds, (0.25, 0.5, 0.75)).round(2).tolist(), strict=True)
        ),
        "published": [
            {
                "opponent": name,
                "votes": sum(counts),
                **{key: proportion(count, sum(counts)).to_dict() for key, count in zip(OUTCOMES, counts, strict=True)},
            }
            for name, counts in PUBLISHED.items()
        ],
        "notes": plan.notes,
    }  # fmt: skip
    if excluded:
        values["all"] = _results(plan, every)
    values["remarks"] = _remarks(values, kept, every)
    return values


def _remarks(values: dict[str, Any], kept: VoteTable, every: VoteTable) -> list[str]:
    """What a reader must know, one line each."""
    said = []
    if not len(every):
        return ["no votes on pairs yet"]
    if values["answered"] < values["planned"]:
        said.append(f"the study is not finished: {values['answered']} of {values['planned']} questions are answered")
    if values["excluded"]:
        who = ", ".join(map(str, values["excluded"]))
        said.append(f"excluded by the rule fixed in the plan: rater {who}; results with all raters are given, too")
    if not len(kept):
        return [*said, "no votes are left without the excluded raters"]
    raters, groups = kept.clusters
    if raters == groups == 1:
        said.append("one rater and one prompt: no interval can be given")
    elif raters == 1:
        said.append("one rater: intervals are over prompts and say nothing about other raters")
    elif groups == 1:
        said.append("one prompt: intervals are over raters and say nothing about other prompts")
    elif raters < 5:
        said.append(f"{raters} raters: intervals over so few are too narrow")
    left = values["kept"]["left"]
    if left["low"] is not None and not left["low"] <= 0.5 <= left["high"]:
        said.append(
            f"side bias: {_percent(left)} of the choices are the left clip; sides are balanced, so it adds noise only"
        )
    return said


# ---- Tables ----


def _percent(measure: dict[str, Any]) -> str:
    return format_interval(measure, 100, unit=" %", digits=1)


def share_table(values: dict[str, Any], part: str = "kept") -> str:
    """Markdown: win, tie and loss per opponent, with both kinds of interval, and the published rows."""
    rows = [
        [f"{values['focus']} against {name}", str(of["votes"]), *(_percent(of["shares"][key]) for key in OUTCOMES),
         _percent(of["shares"]["score"]), _ends(of["independent"]["win"])]
        for name, of in values[part]["opponents"].items()
    ]  # fmt: skip
    for row in values["published"] if part == "kept" else ():
        plain = [f"{100 * row[key]['value']:.1f} %" for key in OUTCOMES]
        score = row["win"]["value"] + row["tie"]["value"] / 2
        rows.append(
            [f"*published*: daVinci-MagiHuman against {row['opponent']}", str(row["votes"]), *plain, f"{100 * score:.1f} %",
             _ends(row["win"])]
        )  # fmt: skip
    return table(["", "votes", "win", "tie", "loss", "win + tie/2", "win, if votes were independent"], rows)


def _ends(measure: dict[str, Any]) -> str:
    return "n/a" if measure["low"] is None else f"[{100 * measure['low']:.1f}, {100 * measure['high']:.1f}]"


def strength_table(values: dict[str, Any], part: str = "kept") -> str:
    """Markdown: Elo points and agreement of every system."""
    rows = [[values["focus"], "0", ""]]
    for name, of in values[part]["opponents"].items():
        elo, alpha = of["elo"], of["agreement"]
        rows.append(
            [
                name,
                format_interval(elo, signed=True, digits=0) + (f" ({elo['reason']})" if elo["reason"] else ""),
                f"n/a ({alpha['reason']})" if alpha["value"] is None else format_interval(alpha, digits=2),
            ]
        )
    return table(["system", "Bradley-Terry-Davidson, Elo points", "agreement (Krippendorff's alpha)"], rows)


def rater_table(values: dict[str, Any]) -> str:
    """Markdown: a row per rater."""

    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.0f} %"

    rows = [
        [f"{rater['rater']}{' (excluded)' if rater['excluded'] else ''}", f"{rater['answered']} of {rater['planned']}",
         percent(rater["score"]), percent(rater["ties"]), percent(rater["left"]),
         f"{rater['checks'] - rater['failed']} of {rater['checks']}", f"{rater['same']} of {rater['repeats']}",
         "n/a" if rater["seconds"] is None else f"{rater['seconds']:.1f}"]
        for rater in values["raters"]
    ]  # fmt: skip
    return table(
        ["rater", "answered", "win + tie/2", "ties", "left", "checks passed", "repeats alike", "median s per vote"],
        rows,
    )


def report_markdown(values: dict[str, Any]) -> str:
    """report.md, also printed."""
    parts = [
        f"# Human study: {values['focus']} against {', '.join(values['opponents'])}",
        f"Asked: {values['question']}",
    ]
    parts.append("\n".join(f"- {remark}" for remark in [*values["remarks"], *values["notes"]]))
    parts += ["## Votes", share_table(values), legend(values)]
    if "all" in values:
        parts += ["With all raters, also those excluded:", share_table(values, "all")]
    parts += [
        "## Systems",
        strength_table(values),
        facts(values),
        "## Raters",
        rater_table(values),
        f"Rule: {values['rule']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def legend(values: dict[str, Any]) -> str:
    """How to read the table of votes."""
    return (
        "In brackets: 95 % intervals that resample raters and prompts. The last column is Wilson's interval, which takes all "
        "votes as independent; it is too narrow, and all that can be given for the published rows, whose single votes are not "
        "known."
    )


def facts(values: dict[str, Any]) -> str:
    """Ties, sides, time in a sentence each."""
    kept = values["kept"]
    lines = []
    if kept["left"]["value"] is not None:
        lines.append(
            f"Left chosen in {_percent(kept['left'])} of the votes without ties (p = {kept['left']['p']:.2g} for one half, if "
            "votes were independent)."
        )
    if kept["tie"]["value"] is not None:
        lines.append(f"Odds of a tie between equals against a win: {format_interval(kept['tie'], digits=2)}.")
    if kept["agreement"]["value"] is not None:
        lines.append(f"Agreement over all pairs: alpha {format_interval(kept['agreement'], digits=2)}.")
    if values["seconds"]:
        time = values["seconds"]
        lines.append(
            f"Seconds from the start of the first clip to the vote: median {time['median']:.1f}, middle half "
            f"{time['quarter']:.1f} to {time['three_quarters']:.1f}."
        )
    return " ".join(lines)


# ---- Plots ----


def figure_shares(values: dict[str, Any]) -> "Figure":
    """Bars of win, tie and loss per opponent, ours and published, with the intervals of win."""
    from matplotlib.figure import Figure

    bars = [
        (f"{name}\n{of['votes']} votes", {key: of["shares"][key]["value"] for key in OUTCOMES},
         of["shares"]["win"], of["independent"]["win"], False)
        for name, of in values["kept"]["opponents"].items() if of["votes"]
    ] + [
        (f"{row['opponent']}, published\n{row['votes']} votes", {key: row[key]["value"] for key in OUTCOMES},
         None, row["win"], True)
        for row in values["published"]
    ]  # fmt: skip
    figure = Figure((8, 0.9 + 0.75 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, shown, clustered, wilson, published) in enumerate(bars):
        start = 0.0
        for key in OUTCOMES:
            axes.barh(
                place, 100 * shown[key], left=start, color=COLOURS[key], height=0.62, alpha=0.55 if published else 1
            )
            if shown[key] >= 0.05:
                axes.text(
                    start + 50 * shown[key],
                    place + 0.2,
                    f"{100 * shown[key]:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                )
            start += 100 * shown[key]
        for measure, offset, width in ((clustered, -0.03, 2.2), (wilson, -0.2, 1.0)):
            if measure is not None and measure["low"] is not None:
                axes.plot([100 * measure["low"], 100 * measure["high"]], [place + offset] * 2, color="black", lw=width)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(
        "% of votes; thick line: 95 % interval of win over raters and prompts, thin: if votes were independent",
        fontsize=8,
    )
    for key in OUTCOMES:
        axes.barh([0], [0], color=COLOURS[key], label=key)
    axes.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def figure_raters(values: dict[str, Any]) -> "Figure":
    """Per rater: win plus half of ties, seconds per vote; excluded raters hollow."""
    from matplotlib.figure import Figure

    figure = Figure((8, 2.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = (("score", 100, f"{values['focus']}: win + tie/2, %"), ("seconds", 1, "median seconds per vote"))
    for axes, (key, scale, title) in zip(panels, titles, strict=True):
        for rater in values["raters"]:
            if rater[key] is not None:
                face = "none" if rater["excluded"] else COLOURS["win"]
                axes.plot(rater["rater"], scale * rater[key], "o", mfc=face, mec=COLOURS["win"])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("rater", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 100 if key == "score" else None)
    panels[0].axhline(50, color="grey", lw=0.8)
    return figure


def _png(figure: "Figure") -> str:
    """A figure as the address of an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- Files ----


def page(values: dict[str, Any], figures: dict[str, "Figure"]) -> str:
    """report.html: one file that loads nothing."""
    from jinja2 import Environment

    def cells(markdown: str) -> list[list[str]]:
        lines = [line for line in markdown.split("\n") if not set(line) <= set("|-: ")]
        return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]

    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        values=values,
        votes=cells(share_table(values)),
        everybody=cells(share_table(values, "all")) if "all" in values else [],
        systems=cells(strength_table(values)),
        raters=cells(rater_table(values)),
        legend=legend(values),
        facts=facts(values),
        figures={name: _png(figure) for name, figure in figures.items()},
    )


def votes_csv(rows: Sequence[dict[str, Any]]) -> str:
    """votes.csv: a row per vote; a cell that a spreadsheet would take for a formula gets an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["rater"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                key: f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@", "\t", "\r") else v
                for key, v in row.items()
            }
        )
    return text.getvalue()


def report_study(study: str, output: str | None = None) -> dict[str, Any]:
    """Read plan and votes, write all files and print the tables; the command `report`."""
    from eval.human.study_server import open_votes
    from eval.output import provenance
    from magihuman.io.files import write_atomically, write_result

    plan = read_plan(Path(study))
    store = open_votes(Path(study))
    votes = store.votes()
    store.close()
    values = study_values(plan, votes)
    rows = named_votes(plan, votes)
    figures = {"votes": figure_shares(values), "raters": figure_raters(values)}
    made = load_json(Path(study) / "plan.json")["provenance"]
    folder = Path(output) if output else Path(study) / "report"
    write_result(folder / "report.json", {**values, "planned_by": made, "provenance": provenance()})
    write_atomically(folder / "report.md", report_markdown(values))
    write_atomically(folder / "report.html", page(values, figures))
    write_atomically(folder / "votes.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomically(folder / "votes.csv", votes_csv(rows))
    print(report_markdown(values))
    print(f"written to {folder}; open {folder / 'report.html'} in a browser")
    return {"report": str(folder / "report.json")}
