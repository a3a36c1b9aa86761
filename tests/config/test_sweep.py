"""Sweeps: points from a file, frozen in a folder; what is wrong in one line; the table; the file for Slurm and for W&B."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from magihuman import multirun
from magihuman.config import available
from magihuman.errors import UserError
from magihuman.io.files import CONFIGS
from magihuman.sweep import array, element
from magihuman.sweep.__main__ import SweepCommand, launch, main, parse
from magihuman.sweep.points import Point, Points, freeze, read_file
from magihuman.sweep.table import last_loss, states, table, value_at
from magihuman.training import lock
from magihuman.training.runs import RunFolder

METRIC = {"name": "metrics.loss", "goal": "min"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MAGIHUMAN_SWEEP", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "SLURM_PROCID", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the test does
        monkeypatch.delenv(name)
    return tmp_path


def sweep_file(**content) -> str:
    Path("s.yaml").write_text(yaml.safe_dump({"metric": METRIC, "fixed": {"recipe": "pretrain"}, **content}))
    return "s.yaml"


def frozen(words: tuple[str, ...] = (), **content) -> Points:
    return freeze(read_file(sweep_file(**content)), words, Path("runs/sweeps/s"), "runs")


@pytest.mark.parametrize("name", available("sweep"))
def test_every_sweep_is_valid(name) -> None:
    sweep = freeze(read_file(name), [], Path("runs/sweeps") / name, "runs")
    points = sweep.points
    assert sweep.recipe in available("recipe")
    assert [point.element for point in points] == list(range(len(points)))
    assert [point.folder for point in points] == [f"runs/{sweep.recipe}/{name}-{n}" for n in range(len(points))]
    assert len({point.wandb for point in points}) == len(points)


def test_grid_points_and_seeds_multiply_in_a_fixed_order() -> None:
    found = frozen(grid={"optim.lr": [1e-3, 2.5e-5], "optim.warmup": [1, 2]}, seeds=[5, 7]).differing()
    assert found == [
        f"optim.lr={rate} optim.warmup={warmup} seed={seed}"
        for rate in ("0.001", "2.5e-05")
        for warmup in (1, 2)
        for seed in (5, 7)
    ]
    assert frozen(points=[{"optim.lr": 0.1}, {"optim": "muon"}], seeds=2).differing() == [
        "optim.lr=0.1 seed=0", "optim.lr=0.1 seed=1", "optim=muon seed=0", "optim=muon seed=1",
    ]  # fmt: skip


def test_values_arrive_in_the_configuration_as_the_file_has_them() -> None:
    from training_stub import compose

    values = {
        "optim.betas": [0.5, 0.25], "callbacks.samples": None, "trainer.compile": True, "recipe.sigma": {"mean": 0.25},
        "prompts": ["a, b", "it's = {x}"],
    }  # fmt: skip
    (point,) = frozen(points=[values]).points
    config = compose(point.overrides)
    assert (list(config.optim.betas), config.callbacks.samples, config.trainer.compile) == ([0.5, 0.25], None, True)
    assert (config.recipe.sigma.mean, config.recipe.sigma.kind) == (0.25, "logit_normal")
    assert list(config.prompts) == ["a, b", "it's = {x}"]


def test_the_command_line_replaces_what_is_fixed() -> None:
    points = frozen(("+recipe=sr", "init=tiny/base", "trainer.max_steps=7"), seeds=1).points
    assert points[0].folder == "runs/sr/s-0"
    assert sorted(points[0].overrides) == ["+recipe=sr", "init=tiny/base", "name=s-0", "seed=0", "trainer.max_steps=7"]
    assert (
        frozen(("experiment=tiny_base",), seeds=1).points[0].folder == "runs/pretrain/s-0"
    )  # not the experiment's name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grids": {}}, "s.yaml: unknown key 'grids', did you mean 'grid'?; there are fixed, grid, points, seeds, metric"),
        ({}, "s.yaml: give at least one of grid, points and seeds"),
        ({"grid": {"optim.lr": 0.1}}, "s.yaml: grid.optim.lr=0.1 should be a list of values"),
        ({"grid": {"optim.lr": []}}, "s.yaml: grid.optim.lr=[] should be a list of values"),
        ({"points": {"optim.lr": 0.1}}, "s.yaml: points should be a list of mappings, such as [{optim.lr: 1.0e-3}]"),
        ({"points": ["optim.lr=1"]}, "s.yaml: points[0] should be a mapping of settings"),
        ({"seeds": 0}, "s.yaml: seeds=0 should be how many, or a list of whole numbers"),
        ({"seeds": [0, "a"]}, "s.yaml: seeds=[0, 'a'] should be how many"),
        ({"seeds": 2, "grid": {"seed": [1]}}, "s.yaml: seed is given in two of fixed, grid, points and seeds"),
        ({"seeds": 2, "fixed": {"name": "x"}}, "s.yaml: fixed: name is not a setting of a sweep"),
        ({"seeds": 2, "metric": {"name": "loss", "goal": "min"}}, "metric.name='loss' should begin with results. or metrics."),
        ({"seeds": 2, "metric": {"name": "metrics.loss", "goal": "low"}}, "metric.goal='low' should be max or min"),
        ({"seeds": 2, "metric": None}, "s.yaml: metric should have name and goal, such as metric: {name:"),
        ({"grid": {"optim.lrr": [1]}}, "element 0 (recipe=pretrain optim.lrr=1 name=s-0): unknown setting optim.lrr, did you"),
        ({"grid": {"optim.lr": [0.1, -1]}}, "element 1 (recipe=pretrain optim.lr=-1 name=s-1): optim.lr=-1 should be > 0"),
        ({"grid": {"optim.lr": [0.1, "1e-1"]}}, "elements 0 and 1 are the same training (recipe=pretrain optim.lr=1e-1)"),
        ({"grid": {"optim": ["sgd"]}}, "element 0 (recipe=pretrain optim=sgd name=s-0): no optim 'sgd'"),
        ({"grid": {"seed": ["1,2"]}}, "element 0 (recipe=pretrain seed=1,2 name=s-0): "),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_line_and_nothing_is_written(content, message) -> None:
    with pytest.raises(UserError) as error:
        frozen(**content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_files_that_cannot_be_read_are_one_line() -> None:
    Path("broken.yaml").write_text("grid: [")
    Path("list.yaml").write_text("- 1")
    for name, message in {
        "pretrain_lrs": "no sweep 'pretrain_lrs', did you mean 'pretrain_lr'?; choose from dmd2_arms, dmd2_lr, ",
        "no/where.yaml": "no sweep 'no/where.yaml'",
        "broken.yaml": "broken.yaml cannot be read: while parsing",
        "list.yaml": "list.yaml: should be a mapping with fixed, grid, points, seeds, metric",
    }.items():
        with pytest.raises(UserError, match=None) as error:
            read_file(name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def write_run(folder: str, **record) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "run.json").write_text(json.dumps({"sweep": "s", **record}))
    if record.get("status") == "running":  # by this process, which is alive
        content = {"kernel": lock.this_kernel(), "pid": os.getpid(), "started": lock.start_time(os.getpid())}
        Path(folder, lock.LOCK).write_text(json.dumps(content))
    return Path(folder)


def test_an_element_keeps_its_folder_and_wandb_id_and_points_may_only_be_added() -> None:
    first = frozen(grid={"optim.lr": [0.1, 0.2]})
    assert frozen(grid={"optim.lr": [0.3, 0.4]}).differing() == ["optim.lr=0.3", "optim.lr=0.4"]  # nothing has begun
    first = frozen(grid={"optim.lr": [0.1, 0.2]})
    write_run(first.points[1].folder, status="failed")
    more = frozen(grid={"optim.lr": [0.05, 0.1, 0.2]})
    assert more.points[:2] == first.points
    assert more.points[2].overrides == ["recipe=pretrain", "optim.lr=0.05", "name=s-2"]
    for words, grid, message in (
        ((), [0.1, 0.2], "element 2 has optim.lr=0.05 and the file and command now say optim.lr="),
        (
            ("trainer.max_steps=5",),
            [0.05, 0.1, 0.2],
            "element 0 has no other setting and the file and command now say trainer.max",
        ),
    ):
        with pytest.raises(UserError, match=message):
            frozen(words, grid={"optim.lr": grid})
    assert Points.load(Path("runs/sweeps/s")) == more


def test_the_run_folder_of_another_training_is_not_taken() -> None:
    write_run("runs/pretrain/s-1", sweep=None, status="finished")
    with pytest.raises(
        UserError, match="runs/pretrain/s-1 holds a training already, of no sweep s; give another name="
    ):
        frozen(seeds=2)
    write_run("runs/pretrain/s-1", sweep="s", wandb="abc")  # its points.json is lost
    assert frozen(seeds=2).points[1].wandb == "abc"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", None),
        ("seed=1", "no sweep given"),
        ("pretrain_lr stat", "'stat' is not of the form key=value; the only command behind NAME is status"),
        ("pretrain_lr --dryrun", "there is no option --dryrun; write dryrun=VALUE, or --dry-run"),
        ("pretrain_lr launcher=pbs", "launcher='pbs' should be one of local, slurm, wandb"),
        ("pretrain_lr parallel=4", "sbatch= and parallel= are for launcher=slurm"),
        ("pretrain_lr launcher=slurm parallel=0", "parallel=0 should be a whole number from 1 on"),
        ("pretrain_lr element=x", "element='x' should be an integer or null"),
        (
            "pretrain_lr element=0",
            "runs/sweeps/pretrain_lr holds no sweep; start it with python -m magihuman.sweep pretrain_lr",
        ),
        ("pretrain_lr status seed=3", "seed=3: the points are frozen"),
        ("pretrain_lr status", "runs/sweeps/pretrain_lr holds no sweep"),
        ("pretrain_lr folder=x", "folder=x: runs of a sweep are <runs>/RECIPE/NAME-ELEMENT"),
        ("pretrain_lr name=a/b", "name=a/b is not the name of a folder"),
        ("pretrain_lr name=a=b", "name=a=b: the name of a sweep is a word of its own"),
        ("pretrain_lr name=a.yaml", "name=a.yaml: the name of a sweep is a word of its own"),
        ("pretrain_lr sort=true", "sort= is for status"),
        ("pretrain_lr optim.lr=1e-3", "optim.lr is swept by the file pretrain_lr; change it there"),
        ("pretrain_lr +recipe=nothing", "no recipe 'nothing'"),
        ("pretrain_lr name=a name=b", "name is given twice"),
        ("pretrain_lr dry_run=maybe", "dry_run='maybe' should be true or false"),
        ("pretrain_lr launcher=slurm sbatch=gpu --dry-run", "'gpu' should be of the form --name=value"),
        (
            "pretrain_lr launcher=slurm sbatch=--nodes=2 --dry-run",
            "--nodes comes from trainer.nodes and trainer.devices",
        ),
        (
            "pretrain_lr launcher=slurm sbatch=--array=2 --dry-run",
            "--array comes from the points that have not finished",
        ),
    ],
)
def test_wrong_commands_are_one_line(monkeypatch, capsys, line, message) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", *line.split()])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    written = capsys.readouterr()
    if message is None:
        assert written.out.startswith("usage: python -m magihuman.sweep NAME")
        return
    assert written.err.startswith("error: ")
    assert message in written.err
    assert written.err.count("\n") == 1


# ---- Running here ----


def test_elements_run_one_by_one_and_finished_ones_are_left_alone(monkeypatch, capsys) -> None:
    sweep_file(grid={"optim.lr": [0.1, 0.2, 0.3]})
    ran: list[int] = []

    def run(command: list[str]) -> tuple[int, None]:
        number = int(command[-1].removeprefix("element="))
        ran.append(number)
        assert command[1:-1] == ["-m", "magihuman.sweep", "s", "runs=here"]
        point = Points.load(Path("here/sweeps/s")).element(number)
        bad = number == 1 and ran.count(1) == 1
        write_run(point.folder, status="failed" if bad else "finished", metrics={"loss": 1.0 - number / 10})
        return (2 if bad else 0), None

    monkeypatch.setattr(multirun, "run_and_pass_signals", run)
    options = parse(["s.yaml", "runs=here"])
    launch(parse(["s.yaml", "runs=here", "--dry-run"]))
    assert not Path("here").exists()
    with pytest.raises(UserError, match=r"1 of 3 elements have not finished \(1\); their messages are above"):
        launch(options)
    assert ran == [0, 1, 2]  # one that fails does not end the others
    launch(options)
    launch(options)
    assert ran == [0, 1, 2, 1]
    assert "nothing to start" in capsys.readouterr().out
    monkeypatch.setattr(multirun, "run_and_pass_signals", lambda command: (75, None))
    write_run("here/pretrain/s-0", status="preempted")
    with pytest.raises(SystemExit) as left:
        launch(options)
    assert left.value.code == 75


def test_an_element_becomes_its_training(monkeypatch) -> None:
    point = frozen(grid={"optim.lr": [0.1, 0.2]}).points[1]
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: called.append(words))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, numbers: None)
    element.run_element(Path("runs/sweeps/s"), 1)
    assert called == [[sys.executable, "-m", "magihuman.train", "recipe=pretrain", "optim.lr=0.2", "name=s-1"]]
    assert os.environ["MAGIHUMAN_SWEEP"] == "s"
    record = RunFolder(point.folder).read()
    assert (record["status"], record["sweep"], record["wandb"]) == ("queued", "s", point.wandb)
    write_run(point.folder, status="preempted", wandb=point.wandb, starts=2)
    element.run_element(Path("runs/sweeps/s"), 1)
    assert RunFolder(point.folder).read()["status"] == "preempted"  # the training writes the next one
    with pytest.raises(UserError, match="element=7: the sweep s has the elements 0 to 1"):
        element.run_element(Path("runs/sweeps/s"), 7)


def test_under_an_agent_the_first_start_takes_its_run_and_later_ones_continue_it(monkeypatch, capsys) -> None:
    point = frozen(seeds=1).points[0]
    monkeypatch.setattr(os, "execv", lambda program, words: None)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, numbers: None)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    element.run_element(Path("runs/sweeps/s"), 0)
    assert RunFolder(point.folder).read()["wandb"] == "agent1"
    assert os.environ["WANDB_RUN_ID"] == "agent1"
    write_run(point.folder, wandb="agent1", starts=1)
    monkeypatch.setenv("WANDB_RUN_ID", "agent2")
    element.run_element(Path("runs/sweeps/s"), 0)
    assert RunFolder(point.folder).read()["wandb"] == "agent1"
    assert not {"WANDB_RUN_ID", "WANDB_SWEEP_ID"} & set(os.environ)
    assert "continues its W&B run agent1; the agent's new run agent2 stays empty" in capsys.readouterr().out


def test_the_setting_sweep_is_the_name_and_changes_no_result(monkeypatch) -> None:
    from training_stub import compose

    from magihuman.composition import plain
    from magihuman.config import changes, validate

    alone = plain(compose(["+recipe=pretrain", "folder=x"]))
    monkeypatch.setenv("MAGIHUMAN_SWEEP", "s")
    within = plain(compose(["+recipe=pretrain", "folder=x"]))
    assert (validate(alone).sweep, validate(within).sweep) == (None, "s")
    assert changes(alone, within) == []
    with pytest.raises(UserError, match=r"sweep=s: sweeps are run by python -m magihuman.sweep s"):
        compose(["+recipe=pretrain", "sweep=s"])


def test_the_words_that_a_launcher_gets_name_the_sweep() -> None:
    for line in ("pretrain_lr", "pretrain_lr name=lr_v1.5 runs=r", "my/lr_v1.5.yaml"):
        options = parse(line.split())
        assert parse([*options.again, "element=0"]).folder == options.folder
    assert parse(["pretrain_lr", "name=lr_v1.5"]).folder.name == "lr_v1.5"


# ---- The table ----


def test_the_table_has_state_progress_loss_and_metric_and_sorts_by_it(monkeypatch) -> None:
    points = frozen(grid={"optim.lr": [0.1, 0.2, 0.3]}, metric={"name": "results.eval.score", "goal": "max"})
    a, b = (Path(points.points[n].folder) for n in (0, 1))
    write_run(str(a), status="finished", steps=20, results={"eval": {"score": {"value": 0.25, "low": 0.1}}})
    write_run(
        str(b), status="running", stage="training", results={"eval": {"score": 0.5}},
        progress={"step": 7, "max_steps": 20, "seconds_left": 3900.0, "time": "2026-01-01 00:00:00"},
    )  # fmt: skip
    (a / "metrics.csv").write_text("step,loss,lr\n1,3.5,0\n2,2.25,0\n3,,0\n4,1")
    shown = table(points, states(points)).splitlines()
    assert [line.split() for line in shown[1:4]] == [
        ["0", "optim.lr=0.1", "finished", "20", "2.25", "0.25"],
        ["1", "optim.lr=0.2", "running:", "training", "7/20", "1", "h", "05", "min", "0.5"],
        ["2", "optim.lr=0.3", "missing"],
    ]
    assert shown[0].split()[-2:] == ["results.eval.score", "(max)"]
    assert shown[4] == "1 finished, 1 running, 1 missing"
    assert [line.split()[0] for line in table(points, states(points), sort=True).splitlines()[1:4]] == ["1", "0", "2"]


def test_a_queued_element_that_no_queue_has_is_lost() -> None:
    points = frozen(seeds=3)
    for point in points.points[:2]:
        write_run(point.folder, status="queued")
    Path(points.points[2].folder).mkdir()
    Path(points.points[2].folder, "run.json").write_text("{")
    assert states(points) == {0: "queued", 1: "queued", 2: "damaged"}
    assert states(points, lambda: {1}) == {0: "lost", 1: "queued", 2: "damaged"}


def test_numbers_are_found_by_name_whatever_keys_hold() -> None:
    record = {"metrics": {"val/video": 1.5, "a.b": 2}, "results": {"eval": {"x": {"value": 3}, "y": None, "z": True}}}
    for name, value in {
        "metrics.val/video": 1.5, "metrics.a.b": 2.0, "results.eval.x": 3.0, "results.eval.y": None, "results.eval.z": None,
        "results.eval.x.low": None, "metrics": None, "results.none.x": None,
    }.items():  # fmt: skip
        assert value_at(record, name) == value, name


def test_the_last_loss_is_found_at_the_end_of_a_long_file(tmp_path) -> None:
    rows = "".join(f"{n},{n / 8}\n" for n in range(20000))
    (tmp_path / "metrics.csv").write_text("step,loss\n" + rows)
    assert last_loss(tmp_path) == 19999 / 8
    (tmp_path / "metrics.csv").write_text("step,lr\n1,2\n")
    assert last_loss(tmp_path) is None


def test_five_hundred_points_are_shown_in_a_second_without_torch(tmp_path) -> None:
    points = Points(
        "s",
        "pretrain",
        METRIC,
        [Point(n, [f"seed={n}", f"name=s-{n}"], f"runs/pretrain/s-{n}", "x") for n in range(500)],
    )
    points.save(Path("runs/sweeps/s"))
    for point in points.points:
        write_run(point.folder, status="finished", metrics={"loss": point.element})
        Path(point.folder, "metrics.csv").write_text("step,loss\n" + "1,2.0\n" * 200)
    code = (
        "import sys, time; start = time.process_time(); sys.argv = ['sweep', 's', 'status', 'sort=true']\n"
        "from magihuman.sweep.__main__ import main; main()\n"
        "print('torch' in sys.modules or 'hydra' in sys.modules, time.process_time() - start)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == 503
    assert out[1].split() == ["0", "seed=0", "finished", "2", "0"]
    heavy, seconds = out[-1].split()
    assert heavy == "False"
    assert float(seconds) < 1.0


# ---- Slurm and W&B ----


def slurm(folder: Path, queue: str = "", refuse: bool = False) -> Path:
    """Stand-ins for sbatch and squeue; what was submitted is in `submitted`."""
    folder.mkdir(exist_ok=True)
    submitted = folder / "submitted"
    scripts = {
        "sbatch": "echo 'sbatch: error: Invalid account' >&2; exit 1"
        if refuse
        else f'echo "$@" >> {submitted}; echo "17;cluster"',
        "squeue": f"cat <<'END'\n{queue}\nEND",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return submitted


def array_of(file: str = "runs/sweeps/s/array.sbatch") -> dict[str, str]:
    options = [
        line.split(" ")[1].partition("=") for line in Path(file).read_text().splitlines() if line.startswith("#SBATCH")
    ]
    return {name: value.strip('"') for name, _, value in options}


def test_slurm_gets_the_elements_that_are_left_and_no_others(monkeypatch, tmp_path, capsys) -> None:
    sweep_file(seeds=6)
    here = str(Path("runs/sweeps/s").resolve())
    submitted = slurm(tmp_path / "bin", f"4|{here}\n5|/another/sweep/of/this/name\nN/A|{here}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CONTAINER", "my image.sif")
    write_run("runs/pretrain/s-0", status="finished")
    write_run("runs/pretrain/s-1", status="failed", starts=2, wandb="kept")
    write_run("runs/pretrain/s-2", status="preempted")
    write_run("runs/pretrain/s-3", status="running")
    write_run("runs/pretrain/s-4", status="queued")
    launch(
        parse(
            ["s.yaml", "launcher=slurm", "parallel=2", "sbatch=--partition=gpu --qos='a b' --time=2:00:00 --exclusive"]
        )
    )
    assert submitted.read_text() == "--parsable runs/sweeps/s/array.sbatch\n"
    options = array_of()
    assert options["--array"] == "1-2,5%2"
    for name, value in {
        "--job-name": "s", "--comment": here, "--chdir": str(tmp_path), "--partition": "gpu", "--qos": "a", "--time": "2:00:00",
        "--exclusive": "", "--signal": "USR1@120", "--requeue": "", "--open-mode": "append", "--nodes": "1",
        "--ntasks-per-node": "1", "--gpus-per-node": "1", "--output": f"{here}/logs/%x-%A_%a.out",
    }.items():  # fmt: skip
        assert options[name] == value, name
    assert "--account" not in options
    text = Path("runs/sweeps/s/array.sbatch").read_text()
    assert '\nset -- python -m magihuman.sweep s element="$SLURM_ARRAY_TASK_ID"\n' in text
    assert "\nCONTAINER='my image.sif'" in text
    assert Path("runs/sweeps/s/logs").is_dir()
    records = [RunFolder(f"runs/pretrain/s-{n}").read() for n in range(6)]
    assert [record["status"] for record in records] == ["finished", "queued", "queued", "running", "queued", "queued"]
    assert records[1]["wandb"] == "kept"
    assert records[1]["starts"] == 2
    out = capsys.readouterr().out
    assert "elements that wait or run are left alone: 3, 4" in out
    assert "submitted runs/sweeps/s/array.sbatch as job 17: elements 1, 2, 5" in out
    assert "python -m magihuman.sweep s status" in out


def test_what_slurm_refuses_leaves_the_records_as_they_were(monkeypatch, tmp_path) -> None:
    sweep_file(seeds=2)
    slurm(tmp_path / "bin", refuse=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    write_run("runs/pretrain/s-1", status="failed")
    with pytest.raises(
        UserError, match=r"sbatch: sbatch: error: Invalid account; set options with sbatch='--name=value ...'"
    ):
        launch(parse(["s.yaml", "launcher=slurm"]))
    assert RunFolder("runs/pretrain/s-1").read()["status"] == "failed"
    assert not Path("runs/pretrain/s-0/run.json").exists()


def test_the_array_has_the_size_of_a_training(monkeypatch) -> None:
    words = (
        "trainer.devices=4",
        "trainer.nodes=2",
        "strategy=ddp",
        "data.module.batch_size=8",
        "trainer.accelerator=cpu",
    )
    options = SweepCommand(file="s")
    array.write_array(frozen(words, seeds=1), options.folder, [0], options.again, "", None)
    assert {name: array_of()[name] for name in ("--nodes", "--ntasks-per-node")} == {
        "--nodes": "2",
        "--ntasks-per-node": "4",
    }
    assert "--gpus-per-node" not in array_of()
    mixed = frozen(("strategy=ddp",), grid={"trainer.devices": [1, 2]})
    with pytest.raises(
        UserError, match=r"a Slurm array has one size, and points of this sweep differ in trainer\.nodes"
    ):
        array.write_array(mixed, options.folder, [0], options.again, "", None)


def test_the_wandb_sweep_runs_our_elements() -> None:
    sweep_file(seeds=3, metric={"name": "results.eval.score", "goal": "max"})
    launch(parse(["s.yaml", "runs=here", "launcher=wandb"]))
    content = yaml.safe_load(Path("here/sweeps/s/wandb.yaml").read_text())
    assert content["parameters"] == {"element": {"values": [0, 1, 2]}}
    assert content["metric"] == {"name": "eval.score", "goal": "maximize"}
    assert content["method"] == "grid"
    assert content["command"] == ["python", "-m", "magihuman.sweep", "s", "runs=here", "${args_no_hyphens}"]
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args  # as its agent fills the command in

    filled = create_sweep_command_args({"args": {"element": {"value": 2}}})["args_no_hyphens"]
    options = parse([*content["command"][3:-1], *filled])
    assert (options.folder, options.element) == (Path("here/sweeps/s"), 2)


def test_sweep_files_are_no_group_of_settings() -> None:
    from magihuman.config import groups

    assert "sweep" not in groups()
    assert (CONFIGS / "sweep").is_dir()
