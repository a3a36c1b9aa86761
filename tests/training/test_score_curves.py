"""`callbacks=scores`: values as of eval.score, weights as without it, the same curve after a resume, notes for errors."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import training_stub
from training_stub import KeepingScorer, train_here

from eval.clip_list import read_clips
from eval.scoring import score
from magihuman.composition import plain
from magihuman.config import validate
from magihuman.errors import UserError
from magihuman.training.callbacks import Meter
from magihuman.training.report import read_metrics, score_figure
from magihuman.training.score_curves import ScoreCurves

SCORES = (
    "callbacks.scores={_target_: magihuman.training.score_curves.ScoreCurves, every_steps: 2, "
    "pipeline: {_target_: training_stub.NumberPipeline, _partial_: true}, scorer: {_target_: training_stub.NumberScorer}}"
)
TRAINING = ["+recipe=pretrain", "callbacks.validation=null"]


@pytest.fixture(scope="module")
def scored(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with scores at steps 2 and 3 of 3."""
    return train_here(tmp_path_factory.mktemp("scored") / "run", shards, [*TRAINING, SCORES])


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    return {k: v for k, v in read_metrics(run / "metrics.csv").items() if k.startswith("scores/")}


def test_curves_and_their_cost_are_logged(scored: Path) -> None:
    found = curves(scored)
    assert sorted(found) == ["scores/number", "scores/number_high", "scores/number_low"]
    assert [step for step, _ in found["scores/number"]] == [2, 3]
    assert found["scores/number"][0][1] != found["scores/number"][1][1]  # of the weights of their step
    assert json.loads((scored / "run.json").read_text())["metrics"].keys() > found.keys()
    with (scored / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["1", "2", "3"]  # a line per step, none for the scores alone
    assert [bool(row["time/scores"]) for row in rows] == [False, True, True]
    for row in rows:
        assert sum(float(value) for key, value in row.items() if key.startswith("time/") and value) == pytest.approx(1)


def test_weights_are_those_of_a_training_without(scored: Path, shards: Path, tmp_path: Path) -> None:
    bare = train_here(tmp_path / "bare", shards, TRAINING)
    weights = "export/model-00001-of-00001.safetensors"
    assert (bare / weights).read_bytes() == (scored / weights).read_bytes()


def test_a_resumed_training_has_the_same_curve(scored: Path, shards: Path, tmp_path: Path) -> None:
    """Killed after the scores of step 2, before their checkpoint: they are measured again and not twice in the curve."""
    overrides = [*TRAINING, SCORES, "checkpoint.every_steps=1"]
    run = train_here(tmp_path / "run", shards, [*overrides, "trainer.max_steps=2"])
    (run / "checkpoints/step-00000002.ckpt").unlink()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running", "steps": 1}))
    with (run / "metrics.csv").open("a") as stream:
        stream.write("2\n")  # a line that the kill has torn
    assert curves(train_here(run, shards, overrides)) == curves(scored)


def test_an_error_of_the_scorer_is_a_note(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = SCORES.replace("NumberScorer", "KeepingScorer, folder: /proc/none, clips: 1")
    run = train_here(tmp_path / "run", shards, [*TRAINING, broken])
    said = capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert curves(run) == {}
    assert said.count("note: the clips of step 2 are not scored: FileNotFoundError") == 1
    assert "step 3 are not scored" not in said  # once is enough


@pytest.mark.slow
def test_values_are_those_of_eval_on_the_same_clips(tmp_path: Path) -> None:
    """On puppets, with their codecs, the pipeline and the puppets' metrics."""
    from data.tiny.dataset import ensure

    puppets = Path(ensure(folder=str(tmp_path / "puppets"), clips=6, workers=1, world="tiny"))
    network = [
        "callbacks=scores", "callbacks.scores.every_steps=2", "callbacks.scores.settings={steps: 1}",
        "callbacks.scores.pipeline={_target_: inference.pipeline.Pipeline, _partial_: true}",
        f"callbacks.scores.scorer={{_target_: training_stub.KeepingScorer, clips: 3, folder: {tmp_path}/clips}}",
        "data.module.batch_size=2", "model.pack.patch_size=4",
        "model.dit.video_in_channels=192", "model.dit.audio_in_channels=64", "model.dit.text_in_channels=128",
    ]  # fmt: skip
    found = curves(train_here(tmp_path / "run", puppets, [*TRAINING, *network]))
    for step, folder in zip((2, 3), sorted((tmp_path / "clips").iterdir()), strict=True):
        summary = score(read_clips(folder), ["puppets"], progress=False).summary()
        expected = {
            f"scores/{key}{end}": measure[of]
            for key, measure in summary.items()
            for end, of in (("", "value"), ("_low", "low"), ("_high", "high"))
            if measure[of] is not None
        }
        logged = {name: dict(points)[step] for name, points in found.items() if step in dict(points)}
        assert logged.keys() == expected.keys()
        assert len(logged) > 30
        assert all(math.isclose(logged[name], value, rel_tol=1e-5, abs_tol=1e-9) for name, value in expected.items())


class TestScoreCurves:
    """The callback with a scorer of known values."""

    @staticmethod
    def recipe(step: int, log_every: int = 5) -> SimpleNamespace:
        strategy = SimpleNamespace(name="ddp", context_parallel=1)
        context = SimpleNamespace(codecs="tiny", trainer=SimpleNamespace(log_every=log_every), strategy=strategy)
        return SimpleNamespace(step=step, stepped=True, max_steps=20, context=context, spent={}, meter=Meter())

    @staticmethod
    def trainer(rank: int, sent: dict) -> SimpleNamespace:
        strategy = SimpleNamespace(broadcast=lambda found: sent.setdefault("found", found))
        return SimpleNamespace(is_global_zero=rank == 0, strategy=strategy, default_root_dir=".")

    def test_other_processes_get_the_main_ones_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        measures = {
            "a": {"value": 0.5, "low": 0.25, "high": 0.75},
            "b": {"value": 2.0, "low": None, "high": None},
            "c": {"value": None, "reason": "the package cv2 is not installed"},
        }
        scorer = SimpleNamespace(choose=lambda codecs: ["x"])
        callback, sent = ScoreCurves(print, lambda *_: measures, 10), {}
        callback.generate = lambda *_: []
        for rank in (0, 1):  # with one network per process the main process samples alone
            recipe = self.recipe(10)
            callback.on_train_batch_end(self.trainer(rank, sent), recipe, None, None, 0)
            assert recipe.meter.flush() == {
                "scores/a": 0.5,
                "scores/a_low": 0.25,
                "scores/a_high": 0.75,
                "scores/b": 2.0,
            }
            assert recipe.spent.keys() == {"scores"}
        said = capsys.readouterr().out
        assert said == "note: scores/c has no value at step 10: the package cv2 is not installed\n"
        assert scorer.choose("tiny") == ["x"]

    @pytest.mark.parametrize(("step", "due"), [(9, False), (10, True), (19, False), (20, True)])
    def test_at_intervals_and_at_the_last_step(self, step: int, due: bool) -> None:
        assert ScoreCurves(print, print, 10).due(self.recipe(step)) is due

    def test_an_interval_between_log_lines_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"every_steps=12 is no multiple of trainer.log_every=5; give 10"):
            ScoreCurves(print, print, 12).on_fit_start(SimpleNamespace(), self.recipe(0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+recipe=pretrain", "callbacks.samples=null"], "callbacks.samples does, which is null"),
        (["+recipe=turbo_vae"], "callbacks.samples does, which is null"),
        (
            ["+recipe=pretrain", "callbacks.scores.scorer.metrics=[vowls]"],
            "metrics=vowls is not known; did you mean vowels",
        ),
        (["+recipe=pretrain", "callbacks.scores.scorer.clips=0"], "scorer.clips=0 is impossible"),
    ],
)
def test_what_cannot_be_is_one_line(overrides: list[str], message: str) -> None:
    from magihuman.training.context import build_callbacks

    config = training_stub.compose(["folder=x", "callbacks=scores", *overrides])

    def make() -> None:
        found = build_callbacks(validate(plain(config)))
        next(each for each in found if isinstance(each, ScoreCurves)).scorer.choose("tiny")

    with pytest.raises(UserError, match=message):
        make()


def test_prompts_and_metrics_by_world() -> None:
    from eval.metrics.registry import measurements

    tiny = KeepingScorer(clips=3)
    assert len(set(tiny.choose("tiny"))) == 3
    assert tiny.measurements("tiny") == ["puppets"]
    real = KeepingScorer(clips=3, prompts=("one", "two"))
    assert real.choose("released") == ["one", "two", "one"]
    known = measurements()
    assert all({*known[name].inputs} <= {"frames", "audio"} for name in real.measurements("released"))
    assert "puppets" not in real.measurements("released")
    with pytest.raises(UserError, match="no prompts to sample"):
        KeepingScorer(clips=3).choose("released")


def test_the_figure_has_a_band_per_score() -> None:
    series = {
        "scores/vowels": [(2, 0.5), (4, 0.75)],
        "scores/vowels_low": [(2, 0.25), (4, 0.5)],
        "scores/vowels_high": [(2, 0.625), (4, 1.0)],
        "scores/flow": [(2, 3.0)],
        "scores/too_low": [(2, 1.0)],
        "loss": [(1, 2.0)],
    }
    figure = score_figure(series)
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == ["flow", "too_low", "vowels"]
    band = figure.axes[2].collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} == {(2, 0.25), (4, 0.5), (4, 1.0), (2, 0.625)}
    assert not figure.axes[0].collections
    assert score_figure({"loss": [(1, 2.0)]}) is None
