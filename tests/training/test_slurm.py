"""The sbatch files are valid shell, and the commands in them are valid configurations."""

import os
import subprocess
from pathlib import Path

import pytest
import training_stub

from magihuman.composition import plain
from magihuman.config import validate
from magihuman.io.files import CONFIGS

SCRIPTS = sorted((CONFIGS.parent / "slurm").glob("*.sbatch"))
SLURM = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "4", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "17"}


def test_the_promised_scripts_are_there() -> None:
    assert {path.stem for path in SCRIPTS} == {"one_node", "many_nodes", "array", "requeue"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_valid_and_so_is_its_command(script: Path, tmp_path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    recorder = tmp_path / "srun"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    recorder.chmod(0o755)
    environment = {**os.environ, **SLURM, "SHARDS": "some where", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = subprocess.run(["bash", script, "seed=5"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:3] == ["python", "-m", "magihuman.train"]
    settings = validate(plain(training_stub.compose(["folder=run", *words[3:]])))
    assert settings.seed == 5
    if "data=shards" in words:
        assert settings.data.module["shards"] == "some where"
        missing = subprocess.run(["bash", script], env={**environment, "SHARDS": ""}, capture_output=True, text=True)
        assert missing.returncode != 0
        assert "give the folder of shards" in missing.stderr


def test_the_array_has_a_value_for_every_number() -> None:
    text = (CONFIGS.parent / "slurm" / "array.sbatch").read_text()
    last = int(text.split("--array=0-")[1].split("%")[0])
    assert len(text.split("RATES=(")[1].split(")")[0].split()) == last + 1
