"""Report of a human study: statistics against closed forms and simulation, the exclusion rule, tables, page, small studies."""

import csv
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from human_study import made_study

from eval.human.__main__ import coverage
from eval.human.interval_coverage import coverage_of, coverage_table, simulated_study, true_share
from eval.human.study_plan import DAMAGED, StudyPair, StudyPlan, StudySettings, Trial, assign_trials
from eval.human.study_report import named_votes, report_markdown, report_study, study_values, votes_csv
from eval.human.study_server import open_votes
from eval.human.study_statistics import (
    ELO,
    VoteTable,
    agreement,
    clustered_mean,
    davidson,
    independent,
    resampled,
    shares,
    side_bias,
    strengths,
)
from eval.human.vote_store import Vote
from eval.stats import Measure
from magihuman.errors import UserError

REPO = Path(__file__).resolve().parents[2]


def planned(raters: int = 4, pairs: int = 40, opponents: int = 2, **settings: Any) -> StudyPlan:
    """A plan without media."""
    names = [f"system {k}" for k in range(opponents)]
    per = pairs // opponents
    listed = [StudyPair(name, f"prompt {k}", f"clip{k}", f"f{k}", f"{name}{k}") for name in names for k in range(per)]
    pools = [list(range(n * per, (n + 1) * per)) for n in range(opponents)]
    made = StudySettings("", "ours", raters, pairs, **{"repeats": 2, "checks": 4, **settings})
    listed += [StudyPair(DAMAGED, f"prompt {k}", f"clip{k}", f"f{k}", f"d{k}") for k in range(made.checks)]
    checks = list(range(pairs, pairs + made.checks))
    trials = assign_trials(pools, checks, made, np.random.default_rng(0))
    return StudyPlan(made, names, listed, trials, [str(k) for k in range(raters)], {}, ["a note"], "")


def voted(plan: StudyPlan, seed: int = 0, win: float = 0.7, careless: tuple[int, ...] = ()) -> list[Vote]:
    """Votes of raters who prefer the focus with a chance that depends on the prompt; careless ones choose at random."""
    rng = np.random.default_rng(seed)
    found = []
    for rater, trials in enumerate(plan.trials):
        for number, trial in enumerate(trials):
            draw = rng.random()
            best = "left" if trial.focus_left else "right"
            other = "right" if trial.focus_left else "left"
            if rater in careless:
                choice = ("left", "tie", "right")[int(3 * draw)]
            elif trial.kind == "check":
                choice = best
            else:
                choice = best if draw < win else "tie" if draw < win + 0.1 else other
            found.append(Vote(rater, number, choice, 10 + rater, 1000.0 + number))
    return found


def table_of(outcomes: np.ndarray, rater: np.ndarray, group: np.ndarray) -> VoteTable:
    zeros = np.zeros(len(outcomes), int)
    return VoteTable(rater, group, zeros, outcomes, np.arange(len(outcomes)) % 2 == 0, group)


# ---- Statistics ----


def test_resampling_counts_a_vote_as_often_as_its_rater_times_its_prompt() -> None:
    rater, group = np.repeat(np.arange(4), 6), np.tile(np.arange(6), 4)
    table = table_of(np.zeros(24, int), rater, group)
    weights = resampled(table, np.eye(24), 500).reshape(500, 4, 6)
    assert weights.sum((1, 2)) == pytest.approx(np.full(500, 24.0))  # all raters judge all prompts
    by_rater, by_group = weights.sum(2) / 6, weights.sum(1) / 4
    assert np.array_equal(by_rater, by_rater.round())
    np.testing.assert_allclose(weights, by_rater[:, :, None] * by_group[:, None, :])
    assert len({tuple(row) for row in by_rater.tolist()}) > 30
    assert len({tuple(row) for row in by_group.tolist()}) > 100


def test_raters_who_always_agree_with_themselves_give_the_interval_of_raters() -> None:
    """10 raters, 7 of whom always say win: votes are as good as 10, however many there are."""
    rater, group = np.repeat(np.arange(10), 100), np.tile(np.arange(100), 10)
    table = table_of(np.where(rater < 7, 0, 2), rater, group)
    win, wilson = shares(table)["win"], independent(table)["win"]
    assert win.value == wilson.value == 0.7
    assert win.low is not None
    assert win.high is not None
    assert (win.low, win.high) == pytest.approx((0.4, 1.0), abs=0.11)  # quantiles of Binomial(10, 0.7) / 10
    assert wilson.high is not None
    assert wilson.low is not None
    assert wilson.high - wilson.low < 0.06


def test_the_interval_does_not_collapse_where_all_votes_are_equal() -> None:
    rater, group = np.repeat(np.arange(5), 20), np.tile(np.arange(20), 5)
    found = shares(table_of(np.zeros(100, int), rater, group))
    assert found["win"].value == found["score"].value == 1
    assert found["win"].low == pytest.approx(5 / (5 + 1.96**2), abs=1e-3)  # Wilson's of 5 of 5
    assert found["loss"].high == pytest.approx(1.96**2 / (5 + 1.96**2), abs=1e-3)


def test_published_rows_have_the_intervals_of_the_closed_form() -> None:
    rows = {row["opponent"]: row for row in study_values(planned(), [])["published"]}
    for name, share, low, high in (("Ovi 1.1", 0.8, 0.774, 0.824), ("LTX 2.3", 0.609, 0.578, 0.639)):
        centre, z2 = share + 1.96**2 / 2000, 1.96**2 / 1000
        half = 1.96 * math.sqrt(share * (1 - share) / 1000 + z2 / 4000)
        win = rows[name]["win"]
        assert (win["low"], win["high"]) == pytest.approx(
            ((centre - half) / (1 + z2), (centre + half) / (1 + z2)), abs=1e-4
        )
        assert (win["low"], win["high"]) == pytest.approx((low, high), abs=1e-3)
        assert sum(rows[name][key]["value"] for key in ("win", "tie", "loss")) == pytest.approx(1)


def test_davidson_is_the_closed_form_with_one_opponent() -> None:
    """The model is saturated: p = loss / win, nu = tie / sqrt(win loss)."""
    logs, ties = davidson(np.array([[[60.0, 20.0, 30.0]], [[10.0, 1.0, 40.0]]]))
    np.testing.assert_allclose(logs[:, 0], np.log([30 / 60, 40 / 10]), rtol=1e-4)
    np.testing.assert_allclose(ties, np.log([20 / math.sqrt(60 * 30), 1 / math.sqrt(400)]), rtol=1e-4)


def test_davidson_finds_the_strengths_that_made_the_votes() -> None:
    true, nu = np.array([-1.2, 0.4, 0.0]), 0.5
    odds = np.stack([np.ones(3), nu * np.exp(true / 2), np.exp(true)], 1)
    counts = 1e6 * odds / odds.sum(1, keepdims=True)  # expected counts: the maximum is at the truth
    logs, ties = davidson(counts[None])
    np.testing.assert_allclose(logs[0], true, atol=1e-5)
    assert ties[0] == pytest.approx(math.log(nu), abs=1e-5)


def test_elo_has_the_two_way_interval_and_refuses_what_has_no_maximum() -> None:
    rater, group = np.repeat(np.arange(8), 50), np.tile(np.arange(50), 8)
    rng = np.random.default_rng(0)
    table = table_of(rng.choice(3, 400, p=(0.6, 0.1, 0.3)), rater, group)
    elo = strengths(table, 1)["elo"]
    assert isinstance(elo, list)
    wins, losses = (table.outcome == 0).sum(), (table.outcome == 2).sum()
    assert elo[0].value == pytest.approx(ELO * math.log(losses / wins), abs=0.1)
    assert elo[0].low is not None
    assert elo[0].high is not None
    assert elo[0].low < elo[0].value < elo[0].high < 0  # type: ignore[operator]
    nothing = strengths(table_of(np.zeros(400, int), rater, group), 1)["elo"]
    assert isinstance(nothing, list)
    assert (nothing[0].value, nothing[0].reason) == (None, "all votes are equal")


@pytest.mark.parametrize(("wins", "ties", "losses", "known"), [(8, 2, 0, False), (0, 5, 3, False), (30, 5, 30, True)])
def test_elo_of_wins_and_ties_alone_is_not_made_up(wins: int, ties: int, losses: int, known: bool) -> None:
    """Without a loss (or a win) the likelihood of one opponent grows for ever: any number would be that of the ridge."""
    outcomes = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (wins, ties, losses)))
    number = np.arange(len(outcomes))
    found = strengths(table_of(outcomes, number % 4, number // 4), 1)
    assert isinstance(found["elo"], list)
    assert isinstance(found["tie"], Measure)
    for measure in (found["elo"][0], found["tie"]):
        assert (measure.value is not None) == (measure.low is not None) == known
        assert measure.reason == ("" if known else "no opponent has both won and lost")


def test_elo_with_one_loss_has_no_interval() -> None:
    """Many of the resamples have no loss, and so no maximum."""
    outcomes = np.array([0] * 16 + [1] * 3 + [2])
    elo = strengths(table_of(outcomes, np.arange(20) % 4, np.arange(20) // 4), 1)["elo"]
    assert isinstance(elo, list)
    assert elo[0].value == pytest.approx(ELO * math.log(1 / 16), abs=1)
    assert (elo[0].low, elo[0].high, elo[0].reason) == (None, None, "too few votes for an interval")


def test_agreement_is_of_pairs_not_of_prompts() -> None:
    """Two pairs of one prompt that raters judge differently, and each of them alike, are full agreement."""
    pair, rater = np.tile(np.arange(20), 3), np.repeat(np.arange(3), 20)
    zeros = np.zeros(60, int)
    table = VoteTable(rater, pair // 2, zeros, np.where(pair % 2, 2, 0), zeros.astype(bool), pair)
    assert agreement(table).value == pytest.approx(1)


def test_agreement_is_one_for_equal_and_zero_for_random_votes() -> None:
    rater, group = np.repeat(np.arange(6), 200), np.tile(np.arange(200), 6)
    rng = np.random.default_rng(0)
    per_prompt = rng.choice(3, 200)
    assert agreement(table_of(per_prompt[group], rater, group)).value == pytest.approx(1)
    random = agreement(table_of(rng.choice(3, 1200), rater, group))
    assert random.low is not None
    assert random.high is not None
    assert random.low < 0 < random.high
    assert abs(random.value or 0) < 0.05
    single = agreement(table_of(per_prompt, np.arange(200) % 6, np.arange(200)))
    assert (single.value, single.reason) == (None, "no pair was judged by two raters")


def test_side_bias_is_seen_and_does_not_move_the_shares() -> None:
    plan = planned(raters=6, pairs=120)
    rng = np.random.default_rng(0)
    votes = [
        Vote(rater, number, "left" if rng.random() < 0.75 else "right", 5, 0)
        for rater, trials in enumerate(plan.trials)
        for number, _ in enumerate(trials)
    ]
    values = study_values(replace(plan, settings=replace(plan.settings, failures=4)), votes)
    left = values["kept"]["left"]
    assert 0.5 < left["low"] < left["value"] < left["high"] < 0.85
    assert left["p"] < 1e-6
    assert any(remark.startswith("side bias") for remark in values["remarks"])
    for of in values["kept"]["opponents"].values():
        assert of["shares"]["win"]["low"] < 0.5 < of["shares"]["win"]["high"]
    none, p = side_bias(table_of(np.ones(4, int), np.arange(4), np.arange(4)))
    assert (none.value, p) == (None, None)


# ---- Coverage ----


def test_the_true_share_is_the_mean_of_simulated_votes() -> None:
    table = simulated_study(1000, 1000, False, 1.2, 0.5, 1.0, np.random.default_rng(0))
    assert (table.outcome == 0).mean() == pytest.approx(true_share(1.2, math.hypot(0.5, 1.0)), abs=0.01)
    assert true_share(1.2, 0.0) == pytest.approx(1 / (1 + math.exp(-1.2)))


@pytest.mark.parametrize("share", [True, False])
def test_intervals_over_raters_and_prompts_hold_where_independent_ones_fail(share: bool) -> None:
    found = coverage_of(60, 10, 100, share, math.log(4), 0.5, 1.0, seed=1, draws=300)
    assert found["raters and prompts"]["coverage"] >= 0.88  # 93 % are at least 53 of 60 with a chance of 94 %
    assert found["independent votes"]["coverage"] <= 0.8


def test_a_simulation_writes_only_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"studies": 2, "raters": 2, "pairs": 2}
    before = (REPO / "eval/results/human_coverage.json").read_bytes()
    values = coverage(**small)
    assert (REPO / "eval/results/human_coverage.json").read_bytes() == before
    assert capsys.readouterr().out == coverage_table(values) + "\n"
    coverage(output=str(tmp_path / "a.json"), **small)
    assert json.loads((tmp_path / "a.json").read_text())["designs"] == values["designs"]


def test_the_committed_simulation_shows_both_coverages() -> None:
    """eval/results/human_coverage.json, made by `python -m eval.human coverage output=...`."""
    values = json.loads((REPO / "eval/results/human_coverage.json").read_text())
    assert values["settings"]["rater_sd"] == 0.5
    assert values["settings"]["prompt_sd"] == 1.0
    assert values["settings"]["studies"] >= 500
    for of in values["designs"].values():
        assert of["raters and prompts"]["coverage"] >= 0.93
        assert 0.5 <= of["independent votes"]["coverage"] <= 0.75


# ---- The report ----


def test_sides_and_outcomes_are_told_apart() -> None:
    plan = replace(planned(raters=1, repeats=0, checks=0), trials=[[Trial("pair", 0, True), Trial("pair", 1, False)]])
    votes = [Vote(0, 0, "left", 1, 0), Vote(0, 1, "left", 1, 0)]
    assert [row["outcome"] for row in named_votes(plan, votes)] == ["win", "loss"]
    votes = [Vote(0, 0, "tie", 1, 0), Vote(0, 1, "right", 1, 0)]
    assert [row["outcome"] for row in named_votes(plan, votes)] == ["tie", "win"]


def test_careless_raters_are_excluded_by_the_rule_and_results_given_both_ways() -> None:
    plan = planned(raters=6, pairs=60)
    values = study_values(plan, voted(plan, careless=(2,)))
    assert values["excluded"] == [3]
    kept, every = values["kept"]["opponents"]["system 0"], values["all"]["opponents"]["system 0"]
    assert (kept["votes"], every["votes"]) == (150, 180)
    assert kept["shares"]["win"]["value"] > every["shares"]["win"]["value"]
    assert values["rule"].startswith(
        "a rater who fails more than 1 of 4 attention checks is excluded; a check is failed unless"
    )
    shown = report_markdown(values)
    assert "excluded by the rule fixed in the plan: rater 3" in shown
    assert "| 3 (excluded) |" in shown
    assert "all" not in study_values(plan, voted(plan))


def test_checks_and_repeats_are_no_votes() -> None:
    plan = planned(raters=3, pairs=40)
    values = study_values(plan, voted(plan, win=1.0))
    assert values["answered"] == values["planned"] == 3 * 46
    for of in values["kept"]["opponents"].values():
        assert of["votes"] == 60
        assert of["shares"]["win"]["value"] == 1
    assert [(rater["checks"], rater["failed"], rater["repeats"], rater["same"]) for rater in values["raters"]] == [
        (4, 0, 2, 2)
    ] * 3
    assert values["seconds"]["median"] == 11


def test_the_table_has_ours_and_the_published_rows() -> None:
    plan = planned()
    lines = report_markdown(study_values(plan, voted(plan))).split("\n")
    assert any(line.startswith("| ours against system 0 | 80 |") for line in lines)
    published = next(line for line in lines if "daVinci-MagiHuman against Ovi 1.1" in line)
    assert (
        published
        == "| *published*: daVinci-MagiHuman against Ovi 1.1 | 1000 | 80.0 % | 8.2 % | 11.8 % | 84.1 % | [77.4, 82.4] |"
    )


@pytest.mark.parametrize(
    ("raters", "pairs", "answers", "remark"),
    [
        (2, 8, 0, "no votes on pairs yet"),
        (1, 8, 8, "one rater: intervals are over prompts and say nothing about other raters"),
        (3, 1, 1, "one prompt: intervals are over raters and say nothing about other prompts"),
        (1, 1, 1, "one rater and one prompt: no interval can be given"),
        (3, 8, 3, "the study is not finished: 9 of 24 questions are answered"),
    ],
)
def test_small_studies_are_reported_with_a_remark(raters: int, pairs: int, answers: int, remark: str) -> None:
    plan = planned(raters, pairs, opponents=1, repeats=0, checks=0)
    votes = [vote for vote in voted(plan) if vote.trial < answers]
    values = study_values(plan, votes)
    assert remark in values["remarks"]
    assert "nan" not in json.dumps(values, allow_nan=False).lower()
    assert report_markdown(values)


def test_ties_only_and_excluded_all() -> None:
    plan = planned(raters=2, pairs=8, opponents=1)
    votes = [Vote(rater, number, "tie", 1, 0) for rater in range(2) for number in range(14)]
    values = study_values(plan, votes)
    assert values["excluded"] == [1, 2]
    assert "no votes are left without the excluded raters" in values["remarks"]
    everybody = values["all"]["opponents"]["system 0"]
    assert everybody["shares"]["tie"]["value"] == 1
    assert everybody["elo"]["reason"] == "all votes are equal"
    assert "n/a" in report_markdown(values)


@pytest.mark.parametrize("prompt", ["=1+1", "\t=1+1"])
def test_cells_of_the_csv_are_no_formulas(prompt: str) -> None:
    plan = planned(raters=1, pairs=8)
    plan = replace(plan, pairs=[replace(pair, prompt=prompt) for pair in plan.pairs])
    rows = list(csv.DictReader(io.StringIO(votes_csv(named_votes(plan, voted(plan))))))
    assert len(rows) == 14
    assert {row["prompt"] for row in rows} == {f"'{prompt}"}


class Addresses(HTMLParser):
    """What a page loads, and its tables' cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href")]
        self.scripts += tag == "script"


def test_the_command_writes_page_tables_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = made_study(
        tmp_path, clips=4, systems=2, raters=3, pairs=4, repeats=1, checks=2, question="Which <b>one</b>?"
    )
    study = tmp_path / "study"
    store = open_votes(study)
    for vote in voted(plan):
        for side in ("left", "right"):
            store.play(vote.rater, vote.trial, side, 0)
            store.played(vote.rater, vote.trial, side, 5, 1)
        store.vote(vote.rater, vote.trial, vote.choice, 9.5)
    store.close()
    report_study(str(study))
    written = study / "report"
    assert {path.name for path in written.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "votes.csv",
        "votes.jsonl",
    }
    values = json.loads((written / "report.json").read_text())
    assert values["format"] == "magihuman-study-report/1"
    assert values["answered"] == 21
    assert values["seconds"]["median"] == 9.5
    rows = [json.loads(line) for line in (written / "votes.jsonl").read_text().splitlines()]
    assert len(rows) == 21
    assert {row["opponent"] for row in rows} == {*plan.opponents, DAMAGED}
    text = (written / "report.html").read_text()
    page = Addresses(text)
    assert len(page.loaded) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert page.scripts == 0
    assert "Which &lt;b&gt;one&lt;/b&gt;?" in text
    assert "published: daVinci-MagiHuman against LTX 2.3" in text
    for path in written.iterdir():
        assert not any(token in path.read_text() for token in plan.tokens)
    assert "Bradley-Terry-Davidson" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ['{"format": "magihuman-study/1"}', '{"format": "magihuman-study/1", "settings": {"x": 1}}']
)
def test_a_damaged_plan_is_an_error_of_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan.json was damaged \((KeyError|TypeError): .*put the old one back"):
        report_study(str(tmp_path))


def test_a_folder_without_a_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no plan\.json"):
        report_study(str(tmp_path))


def test_missing_values_are_left_out_of_a_mean() -> None:
    table = table_of(np.zeros(4, int), np.arange(4), np.arange(4))
    assert clustered_mean(table, np.array([1.0, 0.0, np.nan, np.nan])).value == 0.5
    assert clustered_mean(table, np.full(4, np.nan)).reason == "no votes"
