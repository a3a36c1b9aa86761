"""What the server that forks the processes of tests has imported."""

from multiprocessing import forkserver

MODULES = [
    "training_stub", "lightning.pytorch", "hydra", "magihuman.train", "recipes.pretrain", "data.encode", "webdataset.writer"
]  # fmt: skip
"""Of trainings and of data.prepare."""


def preload() -> None:
    """Let the server import all of them, whoever needs it first.

    There is one server per process, and its first user would choose: after data.prepare each process of a training would
    import the rest itself, which takes longer than its steps.
    """
    forkserver.set_forkserver_preload(MODULES)
    forkserver.set_forkserver_preload = lambda modules: None
