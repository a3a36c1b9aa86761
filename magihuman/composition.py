"""The configuration that Hydra composed: as plain containers, and the run folder that it names."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.schema import one_line

RUN_NAME = "MAGIHUMAN_RUN"
"""Environment variable that passes the run's name to processes that Lightning starts."""


def plain(config: Any) -> dict[str, Any]:
    """The configuration as dictionaries and lists, interpolations resolved.

    Raises:
        UserError: an interpolation that cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(with_cause(error)) from error
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def with_cause(error: BaseException) -> str:
    """A message of Hydra or OmegaConf in one line, with that of its cause where it says more."""
    text, cause = one_line(str(error)), one_line(str(error.__cause__ or ""))
    if "more than once in the final defaults list" in text:
        text += "; an experiment chooses its recipe itself, so give only one of them"
    return text if cause in text else f"{text}; {cause}"


def in_batch_job() -> bool:
    """Whether this runs in a Slurm batch job, and not in an interactive allocation (which may run several trainings)."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def choose_folder(node: Mapping[str, Any], job_number: int | None = None) -> Path:
    """The run folder: `folder`, or <runs>/<recipe>/<name>; without a name, the Slurm job or the time.

    Args:
        node: the configuration, with a recipe.
        job_number: of a sweep's job, which follows the name; None for a single training.

    Raises:
        UserError: an empty or unreadable name, or several processes were started from outside and could not agree on a time.
    """
    for key in ("name", "folder", "runs"):
        text = node.get(key)
        if text == "":
            raise UserError(f"{key}= is empty; give a folder, or leave it out")
        if str(text) != str(text).encode("utf-8", "replace").decode():
            raise UserError(f"{key}={text!r} is not UTF-8; choose another")
    if node.get("folder") is not None:
        return Path(node["folder"])
    recipe = str(node["recipe"]["_target_"]).split(".")[-2]
    name = node.get("name") or os.environ.get(RUN_NAME)
    if name is None and in_batch_job():
        name = "job-" + os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
        name += "-" + os.environ["SLURM_ARRAY_TASK_ID"] if "SLURM_ARRAY_TASK_ID" in os.environ else ""
    # Processes that torchrun or srun started; Lightning's own get RUN_NAME.
    tasks = os.environ.get("SLURM_NTASKS") if in_batch_job() else None
    if name is None and int(os.environ.get("WORLD_SIZE") or tasks or 1) > 1:
        raise UserError("several processes were started and need one run folder; give it a name with name=...")
    name = name or time.strftime("%Y%m%d-%H%M%S")
    return Path(node["runs"]) / recipe / (str(name) if job_number is None else f"{name}-{job_number}")
