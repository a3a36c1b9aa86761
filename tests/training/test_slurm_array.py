"""A sweep of four DMD-2 trainings as a real Slurm array: killed and preempted in four ways, all end as unbroken runs do."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import training_stub
import yaml
from slurm_cluster import SlurmCluster, missing

from magihuman.io.files import CONFIGS

STEPS = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster(Path(folder), cpus=6) as found:
        found.environment["PATH"] = f"{Path(sys.executable).parent}:{found.environment['PATH']}"
        yield found


def write_sweep(folder: Path, shards: Path, parent: Path) -> None:
    fixed = dict(
        word.split("=", 1) for word in [*training_stub.SMALL, f"data.module.shards={shards}", f"init={parent}"]
    )
    fixed |= {
        "recipe": "dmd2", "trainer.max_steps": STEPS, "recipe.fake_score.warmup": 0, "checkpoint.every_steps": 2,
        "trainer.log_every": 1, "trainer.precision": "fp32",
        "callbacks.slow": {"_target_": "training_stub.DieAt", "delay": 0.3},
        "after_fit": {"compare": None, "evaluation": {"_target_": "training_stub.evaluate_slowly", "file": "${folder}/at"}},
    }  # fmt: skip
    content = {
        "fixed": fixed,
        "grid": {"optim.lr": [1e-4, 2e-4]},
        "seeds": 2,
        "metric": {"name": "metrics.loss", "goal": "min"},
    }
    (folder / "four.yaml").write_text(yaml.safe_dump(content))


def sweep(cluster: SlurmCluster, *words: str) -> str:
    command = [sys.executable, "-m", "magihuman.sweep", "four.yaml", *words]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps_of(folder: Path) -> list[int]:
    """Of metrics.csv."""
    file = folder / "metrics.csv"
    return [int(line.split(",")[0]) for line in file.read_text().splitlines()[1:]] if file.exists() else []


def record(folder: Path) -> dict:
    file = folder / "run.json"
    return json.loads(file.read_text()) if file.exists() else {}


def act(pending: dict[str, tuple[Callable[[], bool], Callable[[], object]]], done: Callable[[], bool]) -> None:
    """Do each action once, when its condition holds, until `done`."""
    until, ended = time.monotonic() + 900, False
    while pending or not ended:
        assert time.monotonic() < until, "the jobs do not end"
        ended = done()
        for name, (ready, action) in list(pending.items()):
            if ready():
                action()
                del pending[name]
        assert not (ended and pending), f"{list(pending)} did not come"
        time.sleep(0.05 if pending else 0.5)


def test_four_elements_end_as_unbroken_runs_do(cluster, shards, parent, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path, shards, parent)
    folders = [Path(f"runs/dmd2/four-{element}") for element in range(4)]
    for folder in folders[:3]:  # only element 3 waits in its evaluation
        folder.mkdir(parents=True)
        (folder / "at").touch()
    options = "--cpus-per-task=1 --time=01:00:00"
    said = sweep(cluster, "launcher=slurm", f"sbatch={options}")
    job = said.split("as job ")[1].split(":")[0]
    assert "elements 0, 1, 2, 3" in said
    assert {record(folder)["status"] for folder in folders} <= {"queued", "running"}
    wandb = [record(folder)["wandb"] for folder in folders]

    def preempt(element: int) -> None:
        cluster.run("scancel", "--signal=USR1", f"{job}_{element}")

    def left() -> list[str]:
        return cluster.run("squeue", "-h", "--array", "-o", "%K").split()

    act(
        {
            "its first moments": (lambda: f"{job}_2.0" in cluster.run("squeue", "-s", "-h", "-o", "%i"), lambda: preempt(2)),
            "steps of 0": (
                lambda: len(steps_of(folders[0])) >= 3, lambda: os.kill(record(folders[0])["pid"], signal.SIGKILL)
            ),
            "steps of 1": (lambda: len(steps_of(folders[1])) >= 3, lambda: preempt(1)),
            "evaluation of 3": (lambda: (folders[3] / "at").exists(), lambda: preempt(3)),
        },
        lambda: not left(),
    )  # fmt: skip
    assert [record(folder)["status"] for folder in folders] == ["running", "finished", "finished", "finished"]
    shown = sweep(cluster, "status")
    assert "lost" in shown.splitlines()[1]  # it was killed, and could not write it down
    assert shown.splitlines()[-1] == "3 finished, 1 lost"
    assert "elements 0" in sweep(cluster, "launcher=slurm", f"sbatch={options}")
    assert "#SBATCH --array=0\n" in Path("runs/sweeps/four/array.sbatch").read_text()
    act({}, lambda: not left())
    assert sweep(cluster, "status").splitlines()[-1] == "4 finished"
    assert "nothing to start" in sweep(cluster, "launcher=slurm")

    points = json.loads(Path("runs/sweeps/four/points.json").read_text())["points"]
    for point, folder in zip(points, folders, strict=True):
        now = record(folder)
        assert now["sweep"] == "four"
        assert now["wandb"] == point["wandb"] == wandb[point["element"]]
        assert now["restarts"] == (0 if point["element"] == 0 else 1)  # Slurm requeued the others; 0 has a new job
        assert steps_of(folder) == list(range(1, STEPS + 1))
        assert now["results"]["evaluation"]["calls"] == (2 if point["element"] == 3 else 1)
        unbroken = tmp_path / "unbroken" / folder.name
        unbroken.mkdir(parents=True)
        (unbroken / "at").touch()
        train_here(unbroken, point["overrides"])
        exported = [path / "export" / "model-00001-of-00001.safetensors" for path in (folder, unbroken)]
        assert exported[0].read_bytes() == exported[1].read_bytes()
    assert len({(folder / "export" / "model-00001-of-00001.safetensors").read_bytes() for folder in folders}) == 4


def train_here(folder: Path, overrides: list[str]) -> None:
    from omegaconf import OmegaConf

    from magihuman.composition import plain
    from magihuman.config import validate
    from magihuman.train import train

    config = training_stub.compose([*overrides, f"folder={folder}"])
    node = plain(config)
    train(node, OmegaConf.to_yaml(config), folder, validate(node))


def test_srun_torchrun_and_submitit_train_and_are_requeued(cluster, shards, tmp_path, monkeypatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e '.[slurm]'")
    monkeypatch.chdir(tmp_path)
    words = [
        *training_stub.SMALL, "+recipe=pretrain", f"data.module.shards={shards}", "data.module.batch_size=4",
        "trainer.max_steps=6", "trainer.precision=fp32", "trainer.log_every=1", "checkpoint.every_steps=2",
        "+callbacks.slow={_target_: training_stub.DieAt, delay: 0.5}",
    ]  # fmt: skip
    jobs, script = {}, str(CONFIGS.parent / "slurm" / "train.sbatch")
    size = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=01:00:00", "--output=%x-%j.out"]
    for launch in ("srun", "torchrun"):
        cluster.environment["LAUNCH"] = launch
        jobs[launch] = cluster.run(
            "sbatch", "--parsable", *size, script, f"folder={launch}", "strategy=ddp", *words
        ).strip()  # fmt: skip
    del cluster.environment["LAUNCH"]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=60"]
    command = [sys.executable, "-m", "magihuman.train", "-m", *launcher, "folder=submitit-${seed}", "seed=0,1", *words]
    waiting = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:

        def preempt(name: str, number: str) -> None:
            job = jobs.get(name) or record(Path(name))["job"]
            cluster.run("scancel", f"--signal={number}", job)

        act(
            {
                "srun": (lambda: len(steps_of(Path("srun"))) >= 3, lambda: preempt("srun", "USR1")),
                "torchrun": (lambda: len(steps_of(Path("torchrun"))) >= 3, lambda: preempt("torchrun", "USR1")),
                "submitit": (lambda: len(steps_of(Path("submitit-1"))) >= 3, lambda: preempt("submitit-1", "USR2")),
            },
            lambda: waiting.poll() is not None and not cluster.run("squeue", "-h").strip(),
        )
        assert waiting.returncode == 0, waiting.stderr and waiting.stderr.read().decode()
    finally:
        waiting.kill()
    for name, restarts in (("srun", 1), ("torchrun", 1), ("submitit-0", 0), ("submitit-1", 1)):
        now = record(Path(name))
        assert (now["status"], now["restarts"], now["starts"]) == ("finished", restarts, restarts + 1), name
        assert steps_of(Path(name)) == list(range(1, STEPS + 1))
    files = [Path(name) / "export" / "model-00001-of-00001.safetensors" for name in ("srun", "torchrun")]
    assert files[0].read_bytes() == files[1].read_bytes()
