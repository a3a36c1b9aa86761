"""The sweep as a W&B sweep, whose only parameter is the number of the element."""

from collections.abc import Sequence
from pathlib import Path

from magihuman.io.files import write_atomically
from magihuman.sweep.points import Points

FILE = "wandb.yaml"


def write_sweep(points: Points, folder: Path, command: Sequence[str], elements: Sequence[int]) -> Path:
    """Write the file for `wandb sweep` and return its path.

    Args:
        command: of the sweep without `element=`, words.
        elements: that agents shall run.
    """
    import yaml

    goal = {"max": "maximize", "min": "minimize"}[points.metric["goal"]]
    content = {
        "name": points.name,
        "method": "grid",
        "metric": {"name": points.metric["name"].partition(".")[2], "goal": goal},
        "parameters": {"element": {"values": list(elements)}},
        "command": ["python", "-m", "magihuman.sweep", *command, "${args_no_hyphens}"],
    }
    head = "# The points are in points.json next to this file; W&B chooses only the order of their numbers.\n"
    write_atomically(folder / FILE, head + yaml.safe_dump(content, sort_keys=False))
    return folder / FILE
