"""Training steps of the 15B network on one GPU, timed: `python -m inference.latency train`.

The recipes need lightning, so what runs them is imported when the command runs (`inference.latency.training_bench`).
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from inference.latency import records
from inference.latency.budget import BudgetedRun, choose
from inference.latency.measure import device_of
from inference.latency.suite import folder_for
from magihuman.errors import UserError


def train(
    minutes: float = 3.5,
    dry: bool = False,
    steps: str | None = None,
    output: str | None = None,
) -> str:
    """Time training steps of the 15B network on one GPU within a time budget, the most valuable first.

    Each result is appended to OUTPUT/train.jsonl as soon as it is known, with a log beside it. Then, on any machine:
    `python -m inference.latency collect input=OUTPUT/train.jsonl`.

    Example:
        python -m inference.latency train
        python -m inference.latency train minutes=2 steps="lora blocks,lora attention"

    Args:
        minutes: time budget; what does not fit is skipped, and said
        dry: the same steps with a tiny network on the CPU, in seconds: nothing of it is a result
        steps: names of some of the steps, separated by commas; what they need is run too
        output: folder of the results instead of runs/latency (dry: runs/latency-dry)

    Raises:
        UserError: no GPU, no lightning, or a setting that cannot be.
    """
    if not 0 < minutes < 1000:
        raise UserError(f"minutes={minutes:g} is impossible; give a number above 0 and below 1000")
    if not dry and not torch.cuda.is_available():
        raise UserError(
            "torch finds no GPU; `train dry=true` runs the same steps with a tiny network on the CPU"
        )
    if find_spec("lightning") is None:
        raise UserError("train runs the recipes, which need lightning: pip install lightning")
    from inference.latency.training_bench import TrainingBench

    device = device_of("cpu" if dry else "cuda")
    with tempfile.TemporaryDirectory() as scratch:
        bench = TrainingBench(device, dry, Path(scratch))
        folder = folder_for(output, dry)
        run = BudgetedRun(folder, "train", 60 * minutes, before=bench.reset_peak)
        bench.run = run
        chosen = choose(bench.steps(), steps)
        run.header("train", dry, records.provenance(device))
        table = run.run(chosen)
    return f"{table}\nnext: python -m inference.latency collect input={run.results}"
