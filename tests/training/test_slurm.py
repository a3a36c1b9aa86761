"""The sbatch file is valid shell, starts valid trainings in each of its ways, and requeues what a signal has stopped."""

import os
import subprocess
from pathlib import Path

import pytest
import training_stub

from magihuman.composition import plain
from magihuman.config import validate
from magihuman.io.files import CONFIGS

SCRIPT = CONFIGS.parent / "slurm" / "train.sbatch"
SLURM = {
    "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "123417", "SLURM_CPUS_PER_TASK": "6",
    "SLURM_JOB_NODELIST": "n[1-4]",
}  # fmt: skip
TRAINING = [
    "+recipe=pretrain",
    "data=shards",
    "data.module.shards=some where",
    "strategy=fsdp2",
    "data.module.batch_size=32",
]


def submit(tmp_path: Path, *words: str, status: int = 0, **environment: str) -> tuple[int, list[str], list[str]]:
    """Run the script; its status, the words of srun, and those of scontrol."""
    stand_ins = {
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/srun.txt; exit {status}',
        # More names than a pipe holds: what reads only the first must not end the job.
        "scontrol": f'if [ "$1" = show ]; then seq -f n%g 100000; else echo "$@" >> {tmp_path}/scontrol.txt; fi',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", SCRIPT, *words], env={**os.environ, **SLURM, **path, **environment}, capture_output=True, text=True
    )
    asked = tmp_path / "scontrol.txt"
    assert (tmp_path / "srun.txt").exists(), done.stderr
    return (
        done.returncode,
        (tmp_path / "srun.txt").read_text().splitlines(),
        asked.read_text().splitlines() if asked.exists() else [],
    )


def test_it_is_valid_shell_with_the_options_of_a_training_that_can_be_requeued() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    for option in ("--signal=USR1@120", "--requeue", "--open-mode=append", "--output=slurm/logs/%x-%j.out"):
        assert option in options
    assert (SCRIPT.parent / "logs").is_dir()  # Slurm makes no folders


def test_srun_starts_one_process_per_task(tmp_path) -> None:
    status, words, asked = submit(tmp_path, *TRAINING)
    assert (status, asked) == (0, [])
    assert words[:6] == ["--wait=0", "--kill-on-bad-exit=0", "--cpus-per-task=6", "python", "-m", "magihuman.train"]
    settings = validate(plain(training_stub.compose(["folder=run", *words[6:]])))
    assert (settings.trainer.devices, settings.trainer.nodes) == (8, 4)
    assert settings.data.module["shards"] == "some where"


def test_settings_of_the_command_line_win(tmp_path) -> None:
    words = submit(tmp_path, "+recipe=dmd2", "trainer.devices=1", "trainer.nodes=1")[1]
    settings = validate(plain(training_stub.compose(["folder=run", *words[6:]])))
    assert (settings.trainer.devices, settings.trainer.nodes) == (1, 1)
    assert settings.recipe["_target_"] == "recipes.dmd2.DMD2"


def test_torchrun_meets_on_the_first_node_and_leaves_the_signal_to_its_processes(tmp_path) -> None:
    words = submit(tmp_path, *TRAINING, LAUNCH="torchrun")[1]
    at = words.index("--nnodes=4")
    assert words[2:at] == [
        "--ntasks=4", "--ntasks-per-node=1", "--cpus-per-task=48",
        "bash", "-c", 'trap "" USR1; exec "$@"', "torchrun", "torchrun",
    ]  # fmt: skip
    assert words[at + 1 : at + 7] == [
        "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-id=123417", "--rdzv-endpoint=n1:23417", "-m", "magihuman.train",
    ]  # fmt: skip
    validate(plain(training_stub.compose(["folder=run", *words[at + 7 :]])))


def test_any_other_command_is_run_as_it_is(tmp_path) -> None:
    assert submit(tmp_path, "wandb", "agent", "--count", "1", "me/p/x")[1][3:] == [
        "wandb",
        "agent",
        "--count",
        "1",
        "me/p/x",
    ]


def test_environment_and_containers(tmp_path) -> None:
    (tmp_path / "env.sh").write_text('false; export HERE="$UNSET/venv"')
    (tmp_path / "srun.txt").unlink(missing_ok=True)
    words = submit(tmp_path, "seed=1", SETUP=str(tmp_path / "env.sh"), CONTAINER="/my images/a.sif", MOUNTS="/data,/b")[
        1
    ]
    assert words[3:8] == ["apptainer", "exec", "--nv", "--bind", "/data,/b"]
    assert words[8:10] == ["/my images/a.sif", "python"]
    words = submit(tmp_path, "seed=1", CONTAINER="nvcr.io#nvidia/pytorch", MOUNTS="/data")[1]
    assert words[3] == "--container-image=nvcr.io#nvidia/pytorch"
    assert words[5] == f"--container-mounts={os.getcwd()},/data"
    assert words[6:8] == ["python", "-m"]


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (1, False), (2, False), (137, False), (75, False), (138, True)]
)
def test_a_stopped_job_is_requeued_and_a_failed_one_is_not(tmp_path, status, requeued) -> None:
    assert submit(tmp_path, "seed=1", status=status)[::2] == (status, ["requeue 123417"] if requeued else [])


def test_the_script_requeues_where_a_container_has_no_scontrol(tmp_path) -> None:
    assert submit(tmp_path, "seed=1", status=75, CONTAINER="a.sif")[::2] == (75, ["requeue 123417"])
    assert submit(tmp_path, "seed=1", status=1, CONTAINER="a.sif")[2] == ["requeue 123417"]  # the one of before


def test_another_command_that_the_time_limit_ends_is_not_requeued_for_ever(tmp_path) -> None:
    file = tmp_path / "later.sh"
    file.write_text("SECONDS=120\n")  # as if the command had run so long
    assert submit(tmp_path, "wandb", "agent", status=138, SETUP=str(file))[::2] == (138, [])
    assert submit(tmp_path, "seed=1", status=75, SETUP=str(file), CONTAINER="a.sif")[::2] == (75, ["requeue 123417"])


def test_an_element_of_an_array_is_requeued_alone(tmp_path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}
    assert submit(tmp_path, "seed=1", status=138, **array)[2] == ["requeue 16_3"]
