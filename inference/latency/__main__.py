"""Commands of `inference.latency`: python -m inference.latency COMMAND [key=value ...]."""

from collections.abc import Callable

from inference.latency.calibrate import predict
from inference.latency.collect import collect
from inference.latency.decoders import decode
from inference.latency.ladder import ladder
from inference.latency.measure import measure
from inference.latency.micro import micro
from inference.latency.suite import suite
from inference.latency.tables import table
from inference.latency.training import train
from magihuman.command import run_one

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
    print(run_one(COMMANDS, "python -m inference.latency"))
