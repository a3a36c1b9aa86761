"""Commands of `inference.benchmark`: python -m inference.benchmark COMMAND [key=value ...]."""

from collections.abc import Callable

from inference.benchmark.calibrate import predict
from inference.benchmark.collect import collect
from inference.benchmark.decoder_bench import decode
from inference.benchmark.ladder import ladder
from inference.benchmark.measure import measure
from inference.benchmark.micro import micro
from inference.benchmark.suite import suite
from inference.benchmark.tables import table
from inference.benchmark.training import train
from magihuman.cli import run_one

COMMANDS: dict[str, Callable[..., str]] = {
    "measure": measure,
    "decode": decode,
    "micro": micro,
    "ladder": ladder,
    "suite": suite,
    "train": train,
    "collect": collect,
    "predict": predict,
    "table": table,
}

if __name__ == "__main__":
    print(run_one(COMMANDS, "python -m inference.benchmark"))
