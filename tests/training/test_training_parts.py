"""Random numbers, meters, ramps, motion weights, the sync gap, FLOPs, run folders and checkpoint names."""

import errno
import json
import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_stub

from magihuman import composition, cpu, train
from magihuman.config import StrategySettings, TrainerSettings
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.flops import forward_flops
from magihuman.training import parallel, runs
from magihuman.training.callbacks import Divergence, Meter, data_warnings
from magihuman.training.checkpoint import find_resume, point_to
from magihuman.training.loggers import CSVLog
from magihuman.training.motion import CLAMP, motion_weight, sync_gap
from magihuman.training.optim import Ramp, value_at
from magihuman.training.report import write_report
from magihuman.training.rng import BatchRng, stream
from magihuman.training.runs import RunFolder


def test_draws_depend_on_seed_batch_and_sample_alone() -> None:
    both = BatchRng(0, 7, [3, 5])
    assert torch.equal(both.normal((2, 4))[1], BatchRng(0, 7, [5]).normal((2, 4))[0])
    different = [BatchRng(1, 7, [5]), BatchRng(0, 8, [5]), BatchRng(0, 7, [6])]
    values = [float(d.uniform()) for d in [BatchRng(0, 7, [5]), *different]]
    assert len(set(values)) == 4
    assert stream(1, 23) != stream(12, 3)
    many = BatchRng(0, 0, range(4000))
    assert float(many.uniform().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(many.chance(0.3).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(many.normal((1,)).std()) == pytest.approx(1.0, abs=0.04)
    never, often = BatchRng(0, 7, [3, 5]), BatchRng(0, 7, [3, 5])
    assert not never.chance(0.0).any()
    often.chance(0.5)
    assert torch.equal(never.uniform(), often.uniform())  # another probability changes no later number


def test_a_meter_averages_with_weights_and_by_band() -> None:
    meter = Meter()
    meter.add("loss", torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0]))
    meter.add("loss", 6.0)
    meter.add("never", torch.tensor([2.0]), torch.tensor([0.0]))
    values, sigma = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.1, 0.5, 1.0])
    meter.add_bands("x", values, sigma, torch.tensor([1.0, 1.0, 1.0]), (0.0, 0.5, 1.0))
    figures = meter.flush()
    assert figures == {"loss": pytest.approx(14 / 5), "x/sigma_0.0_0.5": 1.0, "x/sigma_0.5_1.0": 3.0}
    assert meter.flush() == {}


def diverges(losses: list[float], every: int = 5) -> int | None:
    """The step at which a training with these losses is stopped, or None."""
    recipe = SimpleNamespace(
        meter=Meter(["loss"]), watched=["loss"], step=0, stepped=True, max_steps=len(losses), device="cpu",
        learning_rates="optim.lr", require_finite=lambda limit: None,
    )  # fmt: skip
    check = Divergence(every)
    for loss in losses:
        recipe.step += 1
        recipe.meter.add("loss", loss)
        try:
            check.on_train_batch_end(SimpleNamespace(should_stop=False), recipe, None, None, 0)
        except UserError:
            return recipe.step
    return None


def test_a_divergence_is_told_from_noise_and_from_spikes() -> None:
    assert diverges([2.0] + [2.1] * 9 + [21.0] * 90) == 30
    assert diverges([2.0, *(10.0**n for n in range(2, 30))]) == 25  # the first step alone was healthy
    assert diverges([2.0] * 50 + [1e6] * 19 + [2.0] * 50) is None
    assert diverges([2.0] + [19.0] * 100) is None
    assert diverges([2.0, 3.0, 50.0, 60.0, 70.0, 60.0, 50.0]) == 7  # a short one, at its end
    assert diverges([2.0, 3.0, 50.0, 60.0, 70.0, 60.0, 6.0]) is None
    assert diverges([0.05, 0.6, 0.7, 0.6]) is None  # too short to judge
    assert diverges([2.0]) is None
    assert diverges([0.0, 2.0, 2.0, 2.0, 2.0, 2.0]) is None
    assert diverges([0.0, 0.0, 2.0] + [50.0] * 97) == 25  # the first batches had no audio
    # One sample per step, whose loss depends on its noise level.
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert diverges((0.02 * 50 ** torch.rand(2000, generator=draw)).tolist()) is None


def test_a_divergence_is_found_after_a_resume() -> None:
    check = Divergence(1)
    check.load_state_dict({"first": {"loss": 2.0}})
    assert check.state_dict() == {"first": {"loss": 2.0}}


def test_odd_data_are_said() -> None:
    batch = training_stub.batch(range(4))
    assert data_warnings(batch) == []
    still = {**batch, "video": batch["video"][:, :, :1].expand(-1, -1, 3, -1, -1)}
    assert data_warnings(still) == ["nothing moves in all 4 clips of the first batch"]
    grey, silent = torch.full_like(batch["video"], 0.3), torch.full_like(batch["audio"], 0.1)
    assert data_warnings({"video": grey, "audio": silent}) == [
        "the frames of all 4 clips of the first batch are of a single colour",
        "all 4 clips of the first batch have the same frames",
        "the audio of all 4 clips of the first batch does not change; it may be silence",
    ]
    one = {key: batch[key][[0, 0, 0]] for key in ("video", "audio")}
    assert data_warnings(one) == ["all 3 clips of the first batch have the same frames"]
    assert data_warnings(training_stub.batch(range(2), sound=False)) == []


def test_ramps() -> None:
    ramp = Ramp(0.2, 1.0, begin=0.5, finish=0.9)
    assert [ramp.at(p) for p in (0, 0.5, 0.7, 0.9, 1)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    assert value_at(0.3, 0.7) == 0.3
    assert Ramp(0.5, 0.1, 0.0, 0.0).at(0.0) == 0.1
    with pytest.raises(UserError):
        Ramp(0, 1, begin=0.6, finish=0.5)


def test_motion_weight_is_relative_variance_clamped_above_a_floor() -> None:
    x0 = torch.zeros(2, 3, 4, 5, 5)
    x0[0, :, ::2, 0, 0] = 1.0  # one place moves: 25 times the mean variance, clamped
    weight = motion_weight(x0, floor=0.2)
    assert weight.shape == (2, 1, 1, 5, 5)
    assert float(weight[0, 0, 0, 0, 0]) == pytest.approx(0.2 + 0.8 * CLAMP)
    assert float(weight[0, 0, 0, 1, 1]) == pytest.approx(0.2)
    assert torch.equal(weight[1], torch.ones(1, 1, 5, 5))  # nothing moves
    moving = torch.randn(1, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    variance = moving.var(dim=2, correction=0).mean(1)
    torch.testing.assert_close(motion_weight(moving, 0.0)[0, 0, 0], (variance / variance.mean())[0])
    assert torch.equal(motion_weight(moving, 1.0), torch.ones(1, 1, 1, 5, 5))
    assert torch.equal(motion_weight(moving[:, :, :1], 0.0), torch.ones(1, 1, 1, 5, 5))


def test_sync_gap_tells_a_listener_from_a_deaf_network() -> None:
    batch = training_stub.batch(range(8))
    video, audio = batch["video"], batch["audio"]
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(video.shape, generator=draw), torch.zeros(audio.shape)

    def listener(v, a, text):  # paints the mouth from the sound, which is at half amplitude at sigma .5
        x0 = torch.full_like(v, 0.5)
        x0[:, :, :, 2:, 1:3] = 2 * (2 * a[:, ::4, 0])[:, None, :, None, None]
        return (v - x0) / 0.95, a

    def deaf(v, a, text):
        return (v - 0.5) / 0.95, a

    text = batch["text"]
    assert sync_gap(listener, video, audio, text, noise) == pytest.approx(1.0, abs=1e-4)
    assert sync_gap(deaf, video, audio, text, noise) == 0.0
    assert math.isnan(sync_gap(deaf, video[:1], audio[:1], text[:1], noise))
    assert math.isnan(sync_gap(deaf, video, audio[:, :0], text, noise))


def test_flops_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from magihuman import zoo

    config = DiTConfig(3, 32, 8, 2, 12, 4, 5, mm_layers=(0, 2), gelu7_layers=(0,))
    denoiser = zoo.build(config, PackConfig(), compute_dtype=torch.float32, seed=0)
    denoiser.model.attention_backend = "reference"  # plain products, which the counter sees
    with FlopCounterMode(display=False) as counter:
        denoiser(torch.zeros(1, 3, 3, 4, 4), torch.zeros(1, 9, 4), [torch.zeros(6, 5)])
    assert forward_flops(config, 12, 9, 6).total == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_metrics_survive_a_rewind_and_new_columns(tmp_path) -> None:
    log = CSVLog(tmp_path)
    for step in range(1, 5):
        log.log_metrics({"loss": step / 2}, step)
    log.log_metrics({"loss": 9.0, "gap": 0.1}, 5)
    again = CSVLog(tmp_path)
    again.rewind(3)
    again.log_metrics({"gap": 0.2}, 4)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,loss,gap", "1,0.5,", "2,1,", "3,1.5,", "4,,0.2",
    ]  # fmt: skip


def test_a_torn_last_line_is_dropped(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.")
    log = CSVLog(tmp_path)
    log.rewind(1)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n"


def test_run_json_merges_and_says_when_it_is_damaged(tmp_path) -> None:
    run = RunFolder(tmp_path / "a")
    run.update(status="running", metrics={"loss": 1.0})
    run.update(metrics={"gap": 2.0})
    assert run.read()["metrics"] == {"loss": 1.0, "gap": 2.0}
    (run.path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        run.read()


def test_find_resume(tmp_path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    assert find_resume("auto", folder) is None
    for step in (3, 6):
        torch.save({}, folder / f"step-{step:08d}.ckpt")
    assert find_resume("auto", folder).name == "step-00000006.ckpt"
    point_to(folder, folder / "step-00000003.ckpt")
    assert find_resume("auto", folder).name == "step-00000003.ckpt"  # the link is the last complete one
    assert find_resume("none", folder) is None
    assert find_resume(str(tmp_path / "run"), folder / "elsewhere").name == "step-00000003.ckpt"
    with pytest.raises(UserError, match="no checkpoint there"):
        find_resume(str(tmp_path / "nothing"), folder)


def test_run_folders_are_named_so_that_every_process_agrees(monkeypatch) -> None:
    for variable in ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", composition.RUN_NAME):
        monkeypatch.delenv(variable, raising=False)
    node = {"recipe": {"_target_": "recipes.pretrain.Pretrain"}, "runs": "runs", "name": None, "folder": None}
    assert composition.choose_folder({**node, "name": "a"}).as_posix() == "runs/pretrain/a"
    assert composition.choose_folder({**node, "folder": "x/y"}).as_posix() == "x/y"
    assert composition.choose_folder(node, 3).name.endswith("-3")
    assert composition.choose_folder({**node, "name": "a"}, 3).name == "a-3"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="name="):
        composition.choose_folder(node)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert composition.choose_folder(node).name == "job-17"  # the same after a requeue
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert composition.choose_folder(node).name == "job-16-4"
    monkeypatch.setenv(composition.RUN_NAME, "given")
    assert composition.choose_folder(node).name == "given"


def test_progress_names_what_follows_and_how_long_it_took_before(tmp_path) -> None:
    config = "model: null\nrecipe: {a: 1}\nafter_fit: {eval: {n: %d}, report: {}, none: null}\n"
    assert (
        train.afterwards(config % 1, tmp_path / "a") == ", then after_fit: eval (time unknown), report (time unknown)"
    )
    before = RunFolder(tmp_path / "before")
    before.update(seconds={"eval": 120.0})
    (before.path / "config.yaml").write_text(config % 1)
    assert (
        train.afterwards(config % 1, tmp_path / "a") == ", then after_fit: eval (about 2.0 min), report (time unknown)"
    )
    assert "eval (time unknown)" in train.afterwards(config % 2, tmp_path / "a")
    assert train.afterwards("after_fit: null\n", tmp_path / "a") == ""


def test_strategies_that_cannot_run_say_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[scale\]', or choose strategy=fsdp2"):
        parallel.build_strategy(StrategySettings("zero2"), TrainerSettings(1))
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "mine")
    with pytest.raises(UserError, match=r"a Slurm job of 4 tasks .*, which srun has to start"):
        parallel.check_launch(TrainerSettings(1))
    with pytest.raises(UserError, match="which srun has to start"):  # srun did not
        parallel.check_launch(TrainerSettings(1, devices=4))
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    parallel.check_launch(TrainerSettings(1))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="torchrun started 8 processes"):
        parallel.check_launch(TrainerSettings(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="0 CUDA devices are visible"):
        parallel.check_device(TrainerSettings(1, accelerator="cuda"))


def test_the_report_shows_figures_and_curves(tmp_path) -> None:
    run = RunFolder(tmp_path)
    run.update(
        recipe="recipes.x.X", name="a", created="today", steps=2, metrics={"loss": 0.25},
        results={"eval": {"sync": 0.5}}, provenance={"command": ["python"], "seed": 3},
    )  # fmt: skip
    log = CSVLog(tmp_path)
    log.log_metrics({"loss/video": 1.0}, 1)
    log.log_metrics({"loss/video": 0.5, "val/sync_gap": 0.1}, 2)
    assert write_report(str(tmp_path)) == {"report": str(tmp_path / "report.md")}
    text = (tmp_path / "report.md").read_text()
    assert "| loss | 0.25 |" in text
    assert '"sync": 0.5' in text
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 2
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.md").write_text("| a table |\n")
    (tmp_path / "eval" / "clips.png").write_bytes(b"")
    run.update(results={"eval": {"scores": str(tmp_path / "eval" / "scores.json")}})
    write_report(str(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "| a table |" in text
    assert "![clips](eval/clips.png)" in text


def test_a_continuation_keeps_the_settings_it_replaces(tmp_path) -> None:
    run, config = RunFolder(tmp_path), {"recipe": {"_target_": "recipes.x.X"}, "seed": 3}
    run.start(config, "lr: 0\n")  # nothing was trained with these
    run.start(config, "lr: 1\n")
    run.update(steps=6)
    (tmp_path / "metrics.csv").write_text("step\n")
    run.start(config, "lr: 1\n")
    assert run.read()["earlier"] == []
    run.start(config, "lr: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "lr: 2\n"
    assert (tmp_path / "config-1.yaml").read_text() == "lr: 1\n"
    assert run.read()["earlier"][0]["config"] == "config-1.yaml"
    assert run.read()["earlier"][0]["steps"] == 6


def test_slow_bf16_of_a_cpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without AVX512-BF16 a training of minutes takes hours."""
    times = iter([0, 0.7, 0, 0.3, 0, 0.9, 0, 0.2, 0, 0.1, 0, 0.4])  # three products in bf16, three in fp32
    with monkeypatch.context() as patch:
        patch.setattr(cpu.time, "perf_counter", lambda: next(times))
        assert cpu.bf16_slowdown() == pytest.approx(3.0)

    def said(slowdown: float, **options: Any) -> str:
        monkeypatch.setattr(train, "bf16_slowdown", lambda: slowdown)
        settings: Any = SimpleNamespace(trainer=TrainerSettings(1, **options))
        train.warn_of_slow_bf16(settings)
        return capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "77 times slower in bf16 than in fp32" in said(77.0)
    assert "trainer.precision=fp32" in said(77.0, accelerator="cpu")
    assert said(0.6) == said(77.0, precision="fp32") == said(77.0, accelerator="cuda") == ""


def test_a_full_disk_ends_a_training_with_its_reason_and_leaves_no_partial_checkpoint(
    monkeypatch, shards, tmp_path
) -> None:
    written, full = os.fsync, OSError(errno.ENOSPC, "No space left on device")

    def fill(number: int) -> None:
        if ".ckpt" in os.readlink(f"/proc/self/fd/{number}"):
            monkeypatch.setattr(runs, "write_atomically", refuse)
            raise full
        written(number)

    def refuse(*_: object) -> None:
        raise full

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match="No space left"):
        training_stub.train_here(tmp_path / "run", shards, ["+recipe=pretrain"])
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"  # changed in place
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_full_disk_is_one_line_for_sharded_checkpoints_too(monkeypatch, tmp_path, capsys) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    def fill(*_: object) -> None:
        raise CheckpointException("failed", {1: (OSError(errno.ENOSPC, "No space left on device"), None)})  # type: ignore[dict-item]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", fill)
    monkeypatch.setattr("sys.argv", ["train", "+recipe=pretrain", "folder=run"])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: run: the disk is full; make room\n"


def test_a_lock_that_deepspeed_will_wait_for_is_said(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(parallel, "_zero", lambda *_: "strategy")
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm").mkdir(parents=True)
    for there in (False, True):
        if there:
            (tmp_path / "py311_cpu/deepspeed_shm_comm/lock").touch()
        assert parallel.build_strategy(StrategySettings("zero2"), TrainerSettings(1)) == "strategy"
        assert (f"while {tmp_path}/py311_cpu/deepspeed_shm_comm/lock exists" in capsys.readouterr().out) == there


def test_evaluations_after_a_training_have_the_threads_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Lightning sets it
    try:
        for cores, threads in ((4, 2), (1, 1)):  # of one core a process that Slurm binds to it
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
            cpu.tune_cpu(1)
            cpu.take_threads_of(2)
            assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (threads, str(threads))
    finally:
        torch.set_num_threads(before)
