"""W&B's offline files, TensorBoard's events, and what happens when either fails."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_stub
import wandb_record
from one_process import Processes

from magihuman.config import LoggerSettings, WandbSettings
from magihuman.errors import UserError
from magihuman.training import loggers, wandb_log
from magihuman.training.callbacks import SampleClip
from magihuman.training.loggers import CSVLog
from magihuman.training.runs import RunFolder
from magihuman.training.wandb_log import WandbMirror, scores, summary, without_secrets

CONFIG = {"recipe": {"_target_": "recipes.pretrain.Pretrain", "text_drop": 0.1}, "seed": 3, "sweep": "rates"}
RESULT = {
    "scores": "runs/a/eval/scores.json",
    "n": 40,
    "sync": {"value": 0.9, "low": 0.8, "high": 1.0, "bound": 1.0, "status": "ok"},
    "nothing": {"value": None, "low": None},
    "verdicts": {"student": {"video": "better"}},
}


def opened(folder: RunFolder, settings: WandbSettings | None = None, config: dict[str, Any] = CONFIG) -> WandbMirror:
    _, logger = loggers.build_loggers(folder, LoggerSettings(wandb=settings or WandbSettings()), config)
    return logger


def clip(folder: Path, number: int = 0) -> SampleClip:
    file = folder / f"{number:02d}.mp4"
    file.write_bytes(b"mp4" + bytes(999))
    return SampleClip(f"says {number}", number, file, torch.zeros(1, 1600), 16000)


def sheet(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (12, 8), "red").save(folder / "sheet.png")
    return folder / "sheet.png"


def test_results_become_scores_that_a_table_sorts_by() -> None:
    assert scores(RESULT, "eval/eval") == {
        "eval/eval/n": 40,
        "eval/eval/sync": 0.9,
        "eval/eval/sync/low": 0.8,
        "eval/eval/sync/high": 1.0,
        "eval/eval/sync/bound": 1.0,
        "eval/eval/verdicts/student/video": "better",
    }
    record = {
        "status": "finished", "steps": 9, "export": {"sha256": "ab", "of": "all bytes"}, "seconds": {"eval": 2.5},
        "results": {"eval": {"x": 1}}, "metrics": {"loss": 1.0},
    }  # fmt: skip
    assert summary(record) == {
        "status": "finished", "steps": 9, "export/sha256": "ab", "seconds/eval": 2.5, "eval/eval/x": 1,
    }  # fmt: skip


def test_an_offline_run_holds_everything_that_a_later_sync_sends(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunFolder(tmp_path / "pretrain" / "a")
    parents = [{"role": "init", "name": "tiny/base", "sha256": "cd" * 32}]
    provenance = {"command": ["python", "-m", "magihuman.train"], "code": {"commit": "abc", "changed": False}}
    run.update(status="running", parents=parents, provenance=provenance, host="node7", job="17_3", starts=1)
    logger = opened(run, WandbSettings(tags=["x"], notes="first try"))
    logger.log_metrics({"loss/video": 0.5, "video/sigma_0.0_0.2": 0.25}, 10)
    logger.log_samples([clip(tmp_path, n) for n in range(2)], sheet(tmp_path), 10)
    run.update(status="finished", export={"sha256": "ef" * 32}, results={"eval": RESULT})
    logger.close()
    logger.close()
    said = capsys.readouterr().out
    assert said.count("wandb sync") == 1
    (found,) = wandb_record.read(run.path)
    assert f"{run.path}/wandb/offline-run-*-{run.read()['wandb']} " in said
    assert (found.run.run_group, found.run.job_type, found.run.display_name) == ("rates", "pretrain", "pretrain/a")
    assert (list(found.run.tags), found.run.notes, found.run.run_id) == (["x"], "first try", run.read()["wandb"])
    assert {key: found.config[key] for key in CONFIG} == CONFIG
    kept = found.config["provenance"]
    assert (kept["commit"], kept["host"], kept["job"], kept["parents"]) == ("abc", "node7", "17_3", parents)
    line, media = found.history
    assert (line["loss/video"], line["video/sigma_0.0_0.2"], line["trainer/global_step"]) == (0.5, 0.25, 10)
    table = media["samples/table"]
    assert (table["_type"], table["ncols"], table["nrows"]) == ("table-file", 4, 2)
    for number in range(2):
        video = media[f"samples/{number:02d}"]
        assert (video["_type"], video["caption"], video["size"]) == ("video-file", f"says {number}", 1002)
    folder = next(run.path.glob("wandb/offline-run-*/files"))
    rows = json.loads((folder / table["path"]).read_text())
    assert rows["columns"] == ["step", "prompt", "seed", "clip"]
    assert [row[:3] for row in rows["data"]] == [[10, "says 0", 0], [10, "says 1", 1]]
    assert (folder / media["samples/00"]["path"]).read_bytes() == (tmp_path / "00.mp4").read_bytes()
    assert media["samples/sheet"]["_type"] == "image-file"
    assert {key: found.summary[key] for key in ("status", "eval/eval/sync", "eval/eval/sync/low", "export/sha256")} == {
        "status": "finished", "eval/eval/sync": 0.9, "eval/eval/sync/low": 0.8, "export/sha256": "ef" * 32,
    }  # fmt: skip
    (model,) = (artifact for artifact in found.artifacts if artifact.type == "model")
    assert (model.name, model.type, json.loads(model.metadata)["sha256"]) == (f"model-{'ef' * 8}", "model", "ef" * 32)
    assert [entry.path for entry in model.manifest.contents] == ["sha256.txt"]  # no weights
    assert (found.exit_code, found.preempting) == (0, False)


def test_passwords_and_signatures_of_addresses_do_not_leave_the_run_folder(tmp_path, monkeypatch) -> None:
    address = "https://me:hunter2@host/a/{0..3}.tar?X-Sig=hunter2&b=1"
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = ["train", f"data.module.shards={address}"]
    monkeypatch.setattr("sys.argv", command)
    run = RunFolder(tmp_path / "pretrain" / "a")
    run.update(status="running", provenance={"command": command}, parents=[])
    logger = loggers.open_wandb(run, WandbSettings(), {**CONFIG, "data": {"module": {"shards": [address]}}})
    logger.close()
    assert sys.argv == command
    (found,) = wandb_record.read(run.path)
    assert found.config["data"] == {"module": {"shards": ["https://host/a/{0..3}.tar"]}}
    for file in (run.path / "wandb").rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert without_secrets("a@b.c: why? pipe:curl 's3://x/y?z' 3") == "a@b.c: why? pipe:curl 's3://x/y' 3"


def test_a_preempted_run_is_marked_and_continued_under_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunFolder(tmp_path / "pretrain" / "a")
    for start, status in enumerate(("preempted", "failed", "finished")):
        time.sleep(1.1 if start else 0)  # W&B names its folders by the second
        run.update(status="running")
        logger = opened(run)
        logger.log_metrics({"loss": 1.0}, start)
        run.update(status=status, error="ValueError: no" if status == "failed" else None)
        logger.close()
    found = sorted(wandb_record.read(run.path), key=lambda part: part.run.start_time.ToNanoseconds())
    assert {part.run.run_id for part in found} == {run.read()["wandb"]}
    assert [part.history[0]["trainer/global_step"] for part in found] == [0, 1, 2]
    assert [(part.summary["status"], part.exit_code, part.preempting) for part in found] == [
        ("preempted", 75, True), ("failed", 1, False), ("finished", 0, False),
    ]  # fmt: skip
    assert found[1].summary["error"] == "ValueError: no"


def test_exported_weights_are_sent_only_where_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunFolder(tmp_path / "a")
    run.export.mkdir(parents=True)
    (run.export / "model.safetensors").write_bytes(b"weights")
    logger = opened(run, WandbSettings(upload=True))
    run.update(status="finished", export={"sha256": "ef" * 32})
    logger.close()
    ((model,),) = (part.artifacts for part in wandb_record.read(run.path))
    assert sorted(entry.path for entry in model.manifest.contents) == ["model.safetensors", "sha256.txt"]


def test_in_a_sweep_of_wandb_the_run_is_its_agents(tmp_path, monkeypatch, capsys) -> None:
    import wandb

    wandb.teardown()  # it reads the variables once
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    run = RunFolder(tmp_path / "a")
    run.update(wandb="before1", starts=2)
    opened(run).close()
    assert "W&B's agent has a new run agent1" in capsys.readouterr().out
    (found,) = wandb_record.read(run.path)
    assert (found.run.run_id, found.run.sweep_id, run.read()["wandb"]) == ("agent1", "sweep1", "agent1")
    wandb.teardown()


class FakeRun:
    """Stands in for W&B's run online: notes calls, and fails where it is told to."""

    def __init__(self, failing: dict[str, Exception] | None = None) -> None:
        self.failing, self.calls, self.summary = failing or {}, [], {}
        self.id = "abc"

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> None:
            if name in self.failing:
                raise self.failing[name]
            self.calls.append((name, *arguments, named))

        return call


def online(folder: RunFolder, run: FakeRun) -> WandbMirror:
    logger = WandbMirror.__new__(WandbMirror)
    WandbMirror.__init__(logger, run, folder, "online")
    return logger


def test_online_parents_are_inputs_and_the_export_is_an_output_of_the_same_name(tmp_path) -> None:
    run = FakeRun()
    folder = RunFolder(tmp_path / "a")
    logger = online(folder, run)
    logger.use_parents(
        [
            {"role": "shards", "name": "shards", "sha256": "12" * 32},
            {"role": "init", "name": "tiny/base", "sha256": "ef" * 32},
        ]
    )
    for thread in wandb_log.threading.enumerate():
        if thread.daemon and thread.name.startswith("wandb-inputs"):
            thread.join()
    assert [(call[0], call[1], call[-1]["type"]) for call in run.calls] == [
        ("use_artifact", f"dataset-{'12' * 8}:latest", "dataset"), ("use_artifact", f"model-{'ef' * 8}:latest", "model"),
    ]  # fmt: skip
    run.calls.clear()
    folder.update(status="finished", export={"sha256": "ef" * 32})
    logger.close()
    name, artifact, named = run.calls[0]
    assert (name, artifact.name, named["aliases"]) == ("log_artifact", f"model-{'ef' * 8}", ["latest", "a"])
    assert run.calls[-1] == ("finish", {"exit_code": 0})


def test_an_error_of_wandb_does_not_stop_a_training(tmp_path, capsys) -> None:
    error = ConnectionResetError("Connection reset by peer")
    folder = RunFolder(tmp_path / "a")
    folder.update(status="finished", export={"sha256": "ef" * 32})
    logger = online(folder, FakeRun(dict.fromkeys(("log", "use_artifact", "log_artifact", "finish"), error)))
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
        logger.log_samples([clip(tmp_path)], sheet(tmp_path), step)
    logger.close()
    assert [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        "note: W&B has failed with metrics", "note: W&B has failed with sample clips",
        "note: W&B has failed with the exported model's artifact", "note: W&B has failed with its end",
    ]  # fmt: skip


def test_a_server_that_does_not_answer_holds_up_no_preempted_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(wandb_log, "PREEMPTED_SECONDS", 0.1)
    folder, run = RunFolder(tmp_path / "a"), FakeRun()
    folder.update(status="preempted")
    answered = threading.Event()
    run.finish = lambda **_: answered.wait(100)
    before = time.monotonic()
    online(folder, run).close()
    assert time.monotonic() - before < 50
    answered.set()
    assert [call[0] for call in run.calls] == ["mark_preempting"]


class FakeWandb:
    """Stands in for W&B: `failing` maps modes to errors of `init`."""

    def __init__(self, failing: dict[str, Exception]) -> None:
        self.failing, self.started = failing, []

    def init(self, mode: str, id: str, **_: object) -> Any:
        self.started.append((mode, id))
        if mode in self.failing:
            raise self.failing[mode]
        return SimpleNamespace(
            define_metric=lambda *_, **__: None, mode=mode, config=SimpleNamespace(update=lambda *_, **__: None)
        )


def loggers_with(monkeypatch, folder: RunFolder, failing: dict[str, Exception], mode: str) -> tuple[list, FakeWandb]:
    import wandb

    fake = FakeWandb(failing)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "init", fake.init)
    monkeypatch.setattr(wandb, "teardown", lambda *_: None)
    return loggers.build_loggers(folder, LoggerSettings(WandbSettings(mode=mode)), CONFIG), fake


def test_without_its_server_wandb_goes_on_offline(monkeypatch, tmp_path, capsys) -> None:
    folder, error = RunFolder(tmp_path / "a"), ConnectionError("no such\nhost")
    (_, logger), fake = loggers_with(monkeypatch, folder, {"online": error}, "auto")
    assert logger.experiment.mode == "offline"
    (first, name), (second, same) = fake.started
    assert (first, second, same) == ("online", "offline", name)
    assert capsys.readouterr().out == (
        "note: W&B cannot be used online (no such; host); logging offline, later send it with: wandb sync "
        f"{folder.path}/wandb/offline-run-*-{name}\n"
    )
    with pytest.raises(UserError, match=r"W&B: no such; host; give logger.wandb.mode=offline"):
        loggers_with(monkeypatch, folder, {"online": error}, "online")
    only_csv, _ = loggers_with(monkeypatch, folder, {"online": error, "offline": OSError("full")}, "auto")
    assert [type(logger) for logger in only_csv] == [CSVLog]
    assert "note: W&B is left out (full)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("key", ["a" * 40, "short"])
def test_wandb_that_cannot_be_reached_is_replaced_by_an_offline_run(key, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = RunFolder(tmp_path / "a")
    (_, logger) = loggers.build_loggers(folder, LoggerSettings(WandbSettings()), CONFIG)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.experiment.finish()
    assert "logging offline, later send it with: wandb sync" in capsys.readouterr().out
    assert len(list(tmp_path.glob(f"a/wandb/offline-run-*-{folder.read()['wandb']}"))) == 1


@pytest.mark.slow
def test_a_training_stopped_by_a_signal_is_marked_and_its_continuation_has_the_scores(shards, tmp_path) -> None:
    processes, folder = Processes(shards), tmp_path / "run"
    stop = f"after_fit={{one: {{_target_: training_stub.signal_once, file: {tmp_path}/stopped}}}}"
    words = "logger=wandb", "logger.tensorboard=true", stop
    where = {"WANDB_MODE": "offline", "MAGIHUMAN_SWEEP": "rates"}
    assert processes.run(folder, *words, **where) == 75
    (first,) = wandb_record.read(folder)
    assert (first.summary["status"], first.exit_code, first.preempting) == ("preempted", 75, True)
    assert [line["trainer/global_step"] for line in first.history] == list(range(1, 13))
    assert processes.run(folder, *words, **where) == 0
    second = max(wandb_record.read(folder), key=lambda part: part.run.start_time.ToNanoseconds())
    assert (second.summary["status"], second.summary["eval/one/sync"], second.exit_code) == ("finished", 1, 0)
    assert (second.run.run_id, second.run.run_group) == (first.run.run_id, "rates")
    assert [part.config["provenance"]["starts"] for part in (first, second)] == [1, 2]
    # The order of its files is that of the starts: what is shown is every step once, and the scores of the last.
    events = shown(folder / "tensorboard")
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.value for event in events.Scalars("eval/one/sync")] == [1.0]


# TensorBoard


def shown(folder: Path) -> Any:
    """What TensorBoard shows of a folder of events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), purge_orphaned_data=True).Reload()


def test_tensorboard_shows_metrics_samples_and_scores_and_forgets_what_a_resume_repeats(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    run = RunFolder(tmp_path / "a")
    for start in (0, 3):
        csv, logger = loggers.build_loggers(run, LoggerSettings(tensorboard=True), CONFIG)
        loggers.rewind([csv, logger], start)
        for step in range(start + 1, 6 if start == 0 else 5):  # the first is killed at 5, and its checkpoint is of 3
            logger.log_metrics({"loss/video": start + step / 10}, step)
        logger.log_samples([clip(tmp_path)], sheet(tmp_path), step)
        logger.finalize("success")
        run.update(status="finished", steps=step, metrics={"loss/video": 3.4}, results={"eval": RESULT})
        if start:
            loggers.close([csv, logger])
            loggers.close([csv, logger])
        time.sleep(1.1)  # its files are named by the second
    found = shown(run.path / "tensorboard")
    assert [(event.step, round(event.value, 6)) for event in found.Scalars("loss/video")] == [
        (1, 0.1), (2, 0.2), (3, 0.3), (4, 3.4),
    ]  # fmt: skip
    assert [(event.step, round(event.value, 6)) for event in found.Scalars("eval/eval/sync/low")] == [(4, 0.8)]
    (image,) = found.Images("samples/sheet")
    assert (image.step, image.width, image.height) == (4, 12, 8)
    (sound,) = found.Audio("samples/00")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (4, 16000.0, 1600)
    from tensorboard.plugins.hparams import plugin_data_pb2

    tag = "_hparams_/session_start_info"
    data = plugin_data_pb2.HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)
    settings = data.session_start_info.hparams
    assert (settings["recipe.text_drop"].number_value, settings["seed"].number_value) == (0.1, 3.0)
    assert settings["sweep"].string_value == "rates"


def test_a_missing_tensorboard_is_refused_before_data_are_made(monkeypatch) -> None:
    from magihuman import composition, config

    node = composition.plain(
        training_stub.compose([*training_stub.SMALL, "recipe=pretrain", "data.module.shards=x", "logger=tensorboard"])
    )
    assert config.validate(node).logger == LoggerSettings(tensorboard=True)
    both = composition.plain(
        training_stub.compose(
            [*training_stub.SMALL, "recipe=pretrain", "data.module.shards=x", "logger=wandb", "logger.tensorboard=true"]
        )
    )
    assert config.validate(both).logger == LoggerSettings(WandbSettings(), tensorboard=True)
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tensorboard\]'"):
        config.validate(node)


def test_a_training_logs_its_losses_by_modality_and_noise_level_and_ends_with_its_scores(
    shards, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = training_stub.train_here(
        tmp_path / "run", shards,
        ["+recipe=pretrain", "logger=wandb", "logger.tensorboard=true", "trainer.log_every=1",
         "after_fit={same: {_target_: training_stub.fixed_score}}"],
    )  # fmt: skip
    record = RunFolder(folder).read()
    (found,) = wandb_record.read(folder)
    steps = [line for line in found.history if "loss" in line]
    assert [line["trainer/global_step"] for line in steps] == [1, 2, 3]
    logged = set().union(*steps)
    assert {
        "loss/video", "loss/audio", "grad_norm", "not_finite", "lr", "samples_per_s", "tflops", "memory_gb", "divergence/loss",
        "damaged_samples", "time/data", "time/step", "time/checkpoint", "time/evaluation",
    } <= logged  # fmt: skip
    for modality in ("video", "audio"):
        assert [name for name in logged if name.startswith(f"{modality}/sigma_")]
    assert found.summary["eval/same/sync"] == 0.9
    assert (found.summary["status"], found.exit_code) == ("finished", 0)
    assert found.summary["export/sha256"] == record["export"]["sha256"]
    assert found.config["optim"]["lr"] == 2e-3
    assert found.config["provenance"]["parents"] == record["parents"]
    csv = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(csv) - {"step"} == logged - {"_step", "_timestamp", "_runtime", "trainer/global_step"}
    events = shown(folder / "tensorboard")
    assert {name for name in events.Tags()["scalars"] if "/same/" not in name} >= set(csv) - {"step"}
    assert events.Scalars("eval/same/sync")[0].step == 3
