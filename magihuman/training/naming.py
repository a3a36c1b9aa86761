"""Where a run's folder is, decided before anything heavy is imported."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magihuman.errors import UserError

RUN_NAME = "MAGIHUMAN_RUN"
"""Environment variable by which a process that Lightning starts learns the run's name."""


def processes_launched() -> int:
    """Processes that torchrun or srun started; 1 when Lightning starts them itself, or there is one."""
    tasks = os.environ.get("SLURM_NTASKS") if in_batch_job() else None
    return int(os.environ.get("WORLD_SIZE") or tasks or 1)


def in_batch_job() -> bool:
    """Whether a Slurm job runs this, not a person in an allocation of theirs (who may run several trainings)."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def choose_folder(node: Mapping[str, Any], job_number: int | None = None) -> Path:
    """The run folder: `folder`, or <runs>/<recipe>/<name>; without a name, the Slurm job or the time.

    Args:
        node: the configuration, with a recipe.
        job_number: of a sweep's job, so that jobs of one second differ.

    Raises:
        UserError: several processes were started from outside and could not agree on a time.
    """
    if node.get("folder") is not None:
        return Path(node["folder"])
    recipe = str(node["recipe"]["_target_"]).split(".")[-2]
    name = node.get("name") or os.environ.get(RUN_NAME)
    if name is None and in_batch_job():
        name = "job-" + os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
        name += "-" + os.environ["SLURM_ARRAY_TASK_ID"] if "SLURM_ARRAY_TASK_ID" in os.environ else ""
    if name is None and processes_launched() > 1:
        raise UserError(
            "several processes were started and need one run folder; give it a name with name=..."
        )
    if name is None:
        name = time.strftime("%Y%m%d-%H%M%S") + (f"-{job_number}" if job_number is not None else "")
    return Path(node["runs"]) / recipe / str(name)
