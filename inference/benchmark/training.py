"""Training steps of the 15B network on one GPU, timed: `python -m inference.benchmark train`.

The recipes need lightning, so what runs them is imported when the command runs (`inference.benchmark.training_bench`).
"""

from importlib.util import find_spec

from inference.benchmark.runner import run_benchmark
from magihuman.errors import UserError


def train(
    minutes: float = 3.5,
    dry: bool = False,
    steps: str | None = None,
    output: str | None = None,
) -> str:
    """Time training steps of the 15B network on one GPU within a time budget, the most valuable first.

    Each result is appended to OUTPUT/train.jsonl as soon as it is known; OUTPUT/train.log is the log. Afterwards, on
    any machine: `python -m inference.benchmark collect input=OUTPUT/train.jsonl`.

    Example:
        python -m inference.benchmark train
        python -m inference.benchmark train minutes=2 steps="lora blocks,lora attention"

    Args:
        minutes: time budget; what does not fit is skipped, and said
        dry: the same steps with a tiny network on the CPU, in seconds: nothing of it is a result
        steps: names of some of the steps, separated by commas; what they need is run too
        output: folder of the results instead of runs/latency (dry: runs/latency-dry)

    Raises:
        UserError: no GPU, no lightning, or a setting that cannot be.
    """
    if find_spec("lightning") is None:
        raise UserError("train runs the recipes, which need lightning: pip install lightning")
    from inference.benchmark.training_bench import TrainingBench

    return run_benchmark("train", TrainingBench, minutes, dry, steps, output)
