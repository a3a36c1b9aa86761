"""Commands of the benchmark: python -m inference.benchmark COMMAND [key=value ...].

Here are their settings; what measures, and torch with it, is imported when a command runs, so that --help is quick.
"""

from collections.abc import Callable
from pathlib import Path

from inference.benchmark.case_options import MeasureOptions
from magihuman.cli import run_one
from magihuman.errors import UserError

RUNS = "runs/latency"


def measure(chosen: MeasureOptions) -> str:
    """Measure every stage of a clip and write the times to a new file in inference/results/latency.

    Raises:
        UserError: a setting that cannot be, or a README that differs.
    """
    if chosen.check:
        from inference.benchmark import figure, result_files, result_tables

        result_tables.render_readme(check=True)
        figures = figure.check_figures(result_files.FOLDER)
        return f"the README's tables and figures ({len(figures)}) are those of the result files"
    from inference.benchmark import measure as clips

    return clips.measure(chosen)


def decode(
    size: str = "all", decoder: str = "all", device: str = "auto", repeat: int = 5, output: str | None = None
) -> str:
    """Parameters, FLOPs, peak memory and time of the video decoders; on a CPU the released sizes are computed only.

    Args:
        size: 256p, 540p, 1080p, all of them, or tiny
        decoder: a name, or all: turbo and wan as published, and the students of configs/decoder
        device: auto, cpu or cuda
        repeat: timed clips
        output: another folder for the result

    Raises:
        UserError: a setting that cannot be.
    """
    from inference.benchmark import video_decoders

    return video_decoders.decode(size, decoder, device, repeat, folder_of(output))


def decode_cost(output: str | None = None) -> str:
    """Counts of the light decoders at 256p, 540p and 1080p with predicted times, and CPU times at a small size.

    Args:
        output: JSON file to write everything to

    Raises:
        UserError: a file that cannot be written.
    """
    from inference.benchmark import video_decoders

    return video_decoders.cost_report(folder_of(output))


def micro(
    size: str = "256p", what: str = "products,experts,attention", device: str = "auto", output: str | None = None
) -> str:
    """Time products, experts and attention alone, at the shapes of a clip's last stage.

    Args:
        size: as for measure
        what: of products, experts, attention
        device: auto, cpu or cuda
        output: another folder for the result

    Raises:
        UserError: a setting that cannot be.
    """
    from inference.benchmark import micro as kernels
    from inference.benchmark.roofline.cases import make

    return kernels.micro(make(size), what, device, folder_of(output))


def ladder(
    size: str = "256p",
    rungs: str = "eager,pad,compile,grouped,attention,fp8,fp8_attention",
    options: str | None = None,
    device: str = "auto",
    repeat: int = 3,
    output: str | None = None,
) -> str:
    """Time one pass of every stage after each optimisation, in the order of the predictions.

    A rung that cannot run here is recorded with its reason.

    Args:
        size: as for measure
        rungs: of eager, pad, compile, grouped, attention, fp8, fp8_attention
        options: changes of every rung's options, such as compile=off
        device: auto, cpu or cuda
        repeat: timed passes
        output: another folder for the result

    Raises:
        UserError: a setting that cannot be.
    """
    from inference.benchmark import ladder as climbing
    from inference.benchmark.roofline.cases import make

    return climbing.ladder(make(size), rungs, options, device, repeat, folder_of(output))


def suite(minutes: float = 8.5, dry: bool = False, steps: str | None = None, output: str | None = None) -> str:
    """Measure everything about inference on one GPU within a time budget, the most valuable first.

    Each result is appended to OUTPUT/suite.jsonl as soon as it is known; OUTPUT/suite.log is the log. Afterwards, on
    any machine: `python -m inference.benchmark collect input=OUTPUT/suite.jsonl`.

    Example:
        python -m inference.benchmark suite
        python -m inference.benchmark suite minutes=4 steps="fp8 256p,fp8 1080p"

    Args:
        minutes: time budget; what does not fit is skipped, and said
        dry: the same steps with a tiny network on the CPU, in seconds: nothing of it is a result
        steps: names of some of the steps, separated by commas; what they need is run too
        output: folder of the results instead of runs/latency (dry: runs/latency-dry)

    Raises:
        UserError: no GPU, or a setting that cannot be.
    """
    from inference.benchmark.budget import run_benchmark
    from inference.benchmark.suite import SuiteBench

    return run_benchmark("suite", SuiteBench, minutes, dry, steps, runs_folder(output, dry))


def train(minutes: float = 3.5, dry: bool = False, steps: str | None = None, output: str | None = None) -> str:
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
    from importlib.util import find_spec

    if find_spec("lightning") is None:
        raise UserError("train runs the recipes, which need lightning: pip install lightning")
    from inference.benchmark.budget import run_benchmark
    from inference.benchmark.training_steps import TrainingBench

    return run_benchmark("train", TrainingBench, minutes, dry, steps, runs_folder(output, dry))


def collect(input: str = RUNS, output: str | None = None) -> str:
    """Turn the results of `suite` and `train` into committed files, and render tables, figure and README.

    Example:
        python -m inference.benchmark collect input=runs/latency
        git add inference && git commit -m "Latency on an H100"

    Args:
        input: a .jsonl file of `suite` or `train`, or a folder of them
        output: another folder than inference/results/latency; README and predictions are then left alone

    Raises:
        UserError: no such file, a file of something else, or nothing but dry runs.
    """
    from inference.benchmark import collect as collecting

    return collecting.collect(Path(input), folder_of(output))


def predict(size: str = "tiny", tier: str = "fast", output: str | None = None, results: str | None = None) -> str:
    """Predict a clip's passes from the newest microbenchmarks of its size, and compare with the newest measurement.

    Args:
        size: as for measure; `micro size=...` must have been measured
        tier: whose forms of products are taken: fp8 for fp8, padded for others on a GPU
        output: another folder for the prediction than inference/results/predictions
        results: another folder of measurements

    Raises:
        UserError: there are no microbenchmarks of this size.
    """
    from inference.benchmark import calibrate

    return calibrate.predict(size, tier, folder_of(output), folder_of(results))


def table(output: str | None = None, picture: bool = True) -> str:
    """Show all tables of the result files, and draw the bars with the published ones.

    Args:
        output: another folder of results
        picture: draw latency.png into it (needs matplotlib)
    """
    from inference.benchmark import figure, result_files, result_tables

    folder = folder_of(output) or result_files.FOLDER
    tables = result_tables.all_tables(folder)
    return f"{tables}\n\ndrawn: {figure.draw(folder)}" if picture else tables


def folder_of(output: str | None) -> Path | None:
    """A folder that was named; None is the usual one."""
    return None if output is None else Path(output)


def runs_folder(output: str | None, dry: bool) -> Path:
    """Folder of a run; that of dry runs is another one, unless it was named."""
    return Path(output or (f"{RUNS}-dry" if dry else RUNS))


COMMANDS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (measure, decode, decode_cost, micro, ladder, suite, train, collect, predict, table)
}


if __name__ == "__main__":
    print(run_one(COMMANDS, "python -m inference.benchmark"))
