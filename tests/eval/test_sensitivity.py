"""The matrix of faults and metrics: verdicts on values whose answer is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import output
from eval.faults import FAULTS, Fault
from eval.metrics.registry import Metric, measurements, metrics
from eval.sensitivity import blind_spots, broken_claims, cell, figure, matrix, measure_faults, run
from magihuman.errors import UserError

CLEAN = np.array([1.0, 2.0, 3.0, 4.0])
SD = float(CLEAN.std(ddof=1))
FAULT = Fault("dust", "dust", "grains", (1, 2, 3), None, "frames")


def verdict(direction: Any, steps: list[float], target: float | None = None) -> dict[str, Any]:
    """Answer of a metric whose value changes by `steps` with the strengths, in all clips almost alike."""
    jitter = np.array([0.01, -0.01, 0.02, -0.02])
    return cell(Metric("m", "m", direction=direction, target=target), CLEAN, [CLEAN + s + jitter for s in steps])


@pytest.mark.parametrize(
    ("direction", "steps", "expected"),
    [
        ("down", [1, 2, 3], "ordered"),
        ("up", [-1, -2, -3], "ordered"),
        ("down", [-1, -2, -3], "reversed"),
        ("down", [2, 1, 3], "seen"),
        ("down", [0.0, 0.0, 0.01], "blind"),
        ("target", [-1, -2, -3], "ordered"),
        ("target", [1, 2, 3], "ordered"),
        ("target", [1, -2, -3], "seen"),
        ("", [1, 2, 3], "ordered"),
    ],
)
def test_verdicts(direction: str, steps: list[float], expected: str) -> None:
    assert verdict(direction, steps)["verdict"] == expected


def test_the_effect_is_in_deviations_of_the_clean_clips() -> None:
    found = verdict("up", [-1, -2, -3])
    assert found["effect"] == pytest.approx(3 / SD)
    assert found["low"] < found["effect"] < found["high"]
    assert found["means"] == pytest.approx([2.5, 1.5, 0.5, -0.5])


def test_a_target_with_a_number_is_approached_from_either_side() -> None:
    assert verdict("target", [1, 2, 3], target=0.0)["verdict"] == "ordered"
    assert verdict("target", [-0.2, -0.5, -0.9], target=0.0)["verdict"] == "reversed"


def test_a_clip_without_a_value_is_left_out_of_all_strengths() -> None:
    weak, strong = CLEAN + 1, CLEAN + 2
    weak[0] = np.nan
    found = cell(Metric("m", "m", direction="down"), CLEAN, [weak, strong])
    assert found["n"] == 3
    assert found["means"] == pytest.approx([3, 4, 5])
    weak[1] = np.nan
    assert cell(Metric("m", "m", direction="down"), CLEAN, [weak, strong])["verdict"] == "no value"


def test_equal_clean_clips_give_a_bounded_effect() -> None:
    found = cell(Metric("m", "m", direction="up"), np.full(4, 99.0), [np.full(4, 40.0), np.full(4, 30.0)])
    assert found["effect"] == 99.0
    assert found["verdict"] == "ordered"


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    metrics = {
        "good": Metric("good", "good", direction="down", sees=("dust",)),
        "false": Metric("false", "false", direction="down", sees=("dust",)),
        "never": Metric("never", "never"),
    }
    clean = [{"good": x, "false": x, "never": None} for x in CLEAN]
    faulty = [[{"good": x + s, "false": x - s} for x in CLEAN] for s in (1, 2, 3)]
    rust = Fault("rust", "rust", "", (1,), None, "frames")
    return matrix(clean, {"dust": faulty, "rust": [clean]}, metrics, {"dust": FAULT, "rust": rust})


def test_broken_claims_and_blind_spots_are_named(values: dict[str, Any]) -> None:
    assert list(values["metrics"]) == ["good", "false"]
    assert broken_claims(values) == ["false does not order dust: reversed"]
    assert blind_spots(values) == ["rust"]


def test_other_numbers_of_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="dust: expected 3 strengths of 1 clips"):
        matrix([{"m": 1.0}], {"dust": [[{"m": 1.0}]]}, {"m": Metric("m", "m")}, {"dust": FAULT})


def test_table_and_figure_show_claims_and_effects(values: dict[str, Any]) -> None:
    assert "| false | (-2.3) ✓ | · |" in output.BY_FORMAT[values["format"]](values)
    axes = figure(values).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dust", "rust"]
    assert sorted(text.get_text() for text in axes.texts) == ["-2.3", "2.3"]
    framed = [patch for patch in axes.patches if not patch.get_fill()]
    assert len(framed) == 2


def test_nothing_of_a_figure_with_few_faults_is_cut(committed: dict[str, Any]) -> None:
    metrics = {name: committed["metrics"][name] for name in list(committed["metrics"])[:3]}
    for names in (["blur"], ["blur", "hum", "delay"]):
        faults = {name: committed["faults"][name] for name in names}
        drawn = figure({**committed, "faults": faults, "metrics": metrics})
        drawn.draw_without_rendering()
        box = drawn.get_tightbbox()  # of all that is drawn, in inches
        assert box.x0 >= 0
        assert box.x1 <= drawn.get_figwidth()


# ---- The committed matrix, and its evidence ----

COMMITTED = Path(__file__).resolve().parents[2] / "eval/results/sensitivity/sensitivity.json"
NEEDS_A_MODEL = {"words", "voice"}
"""Faults that only a recogniser and a speaker network can order; they are in the matrix to show it."""
OF_TWO_CHANNELS = {"channel_balance"}
"""Metrics without a value of the matrix's clips, whose sound has one channel."""


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(COMMITTED.read_text())


def test_claims_of_dnsmos_hold_in_its_committed_matrix() -> None:
    found = json.loads((COMMITTED.parents[1] / "sensitivity_speech/sensitivity.json").read_text())
    assert broken_claims(found) == []
    claims = {metric.key: list(metric.sees) for metric in measurements()["speech_quality"].metrics}
    assert {key: row["claims"] for key, row in found["metrics"].items()} == claims


def test_every_claim_holds_in_the_committed_matrix(committed: dict[str, Any]) -> None:
    assert broken_claims(committed) == []


def test_the_committed_matrix_has_todays_claims_and_faults(committed: dict[str, Any]) -> None:
    for key, row in committed["metrics"].items():
        assert row["claims"] == list(metrics()[key].sees), f"{key}: run python -m eval.sensitivity again"
    known = {name: [float(s) for s in fault.strengths] for name, fault in FAULTS.items()}
    assert {name: [float(s) for s in fault["strengths"]] for name, fault in committed["faults"].items()} == known
    measured = {metric.key for name in NAMES for metric in measurements()[name].metrics}
    assert measured - OF_TWO_CHANNELS <= committed["metrics"].keys()


def test_every_fault_is_claimed_or_a_known_blind_spot(committed: dict[str, Any]) -> None:
    claimed = {fault for row in committed["metrics"].values() for fault in row["claims"]}
    assert set(committed["faults"]) - claimed == NEEDS_A_MODEL


NAMES = ("motion", "picture", "sound", "fidelity", "av_offset", "av_align")


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(set(FAULTS) - NEEDS_A_MODEL))
def test_metrics_order_the_faults_that_they_claim(fault: str) -> None:
    """On four other clips than those of the committed matrix."""
    pytest.importorskip("cv2", reason="needs opencv-python-headless (extra eval)")
    pytest.importorskip("espeakng_loader", reason="needs espeakng-loader (extra dev)")
    claiming = [name for name in NAMES if any(fault in metric.sees for metric in measurements()[name].metrics)]
    found = measure_faults(4, claiming, [fault], seed=5, progress=False)
    assert claiming
    assert broken_claims(found) == []


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(UserError, match="faults=dust is not known; it can be all, delay"):
        run(faults="dust")


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(UserError, match="clips=2"):
        run(clips=2)
