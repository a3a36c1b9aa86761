"""`python -m magihuman.train +recipe=NAME`: data, training, export, and what follows, in stages.

Thin on purpose: the configuration is checked by `magihuman.config`, the objects of a training are made by
`magihuman.training.session`, the algorithm is a recipe, and everything outside this package is reached
through `_target_` strings.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from magihuman.cli import calm_bars
from magihuman.config import CONFIGS, TrainSettings, explain, validate
from magihuman.errors import UserError, report_and_exit
from magihuman.schema import call

SLOW_BF16 = 3.0
"""A note is printed if bf16 matrix products of the CPU take more than this many times the fp32 time."""


def is_main_process() -> bool:
    """Whether this process speaks and writes for the job; from the launchers' variables, before any group exists."""
    rank = next((os.environ[v] for v in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if v in os.environ), "0")
    return int(rank) == 0


def say(text: str) -> None:
    """One line of progress."""
    if is_main_process():
        print(text, flush=True)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and its time."""
    say(f"== {title}")
    start = time.monotonic()
    yield
    say(f"   {title}: {time.monotonic() - start:.0f} s")


def make_data(settings: TrainSettings) -> tuple[Any, Path]:
    """The data module and its shards (or file of prompts), made first where the configuration says how."""
    from magihuman.codecs.bundle import load_bundle
    from magihuman.training.session import require_fit

    module = dict(settings.data.module)
    if settings.data.make is not None:
        # The tiny world's contract is at hand, so a misfit fails before the work.
        if settings.model is not None and settings.data.make.get("codecs") == "tiny":
            require_fit(settings.model, load_bundle("tiny").contract)
        with stage("clips and shards"):
            module["shards"] = str(call(settings.data.make, "data.make"))
    return call(module, "data.module"), Path(module["shards"] if "shards" in module else module["file"])


def train(node: Mapping[str, Any], config_yaml: str, folder: Path, settings: TrainSettings) -> Path:
    """Run every stage; returns the run folder.

    Args:
        node: the resolved configuration; config_yaml: as text, for the run folder.
        folder: of the run.

    Raises:
        UserError: anything a user can put right.
        SystemExit: with status 75 when a signal stopped the training and it can be continued.
    """
    from magihuman import cpu
    from magihuman.training import session
    from magihuman.training.checkpoint import find_resume, require_same_training
    from magihuman.training.runs import RunFolder

    cpu.tune(settings.trainer.threads)
    session.quiet()
    run = RunFolder(folder)
    resume = find_resume(settings.resume, run.checkpoints)
    record = run.read()
    if settings.resume == "none" and record:
        raise UserError(
            f"{folder} holds a training already; remove it, choose another name=, or use resume=auto"
        )
    if record.get("status") == "finished" and record.get("steps", 0) >= settings.trainer.max_steps:
        say(
            f"{folder} is finished ({record['steps']} steps); for more give a larger trainer.max_steps or a new name="
        )
        return folder

    if resume is not None:
        require_same_training(resume, node)
    session.find_init(settings)  # a wrong name is to fail before the data is made
    warn_of_slow_bf16(settings)
    data, shards = make_data(settings)
    provenance = {"recipe": settings.recipe["_target_"], "seed": settings.seed}
    context = session.build_context(settings, data, provenance)
    recipe = call(settings.recipe, "recipe", context=context)
    if is_main_process():
        run.start(node, config_yaml, session.parents(settings, shards))
    trained = session.Session(settings, run, node, recipe)
    try:
        with stage(f"training {settings.trainer.max_steps} steps into {folder}"):
            fit(trained, recipe, data, resume, folder)
        if trained.preemption.stopped_at is not None:
            stopped(trained, run)
        with stage("export"):
            recipe.export(run.export)
            run.update(status="trained", steps=recipe.step, metrics=trained.lines.last)
        if trained.trainer.is_global_zero:
            after_fit(settings, run)
            run.update(status="finished")
    except BaseException as error:
        if is_main_process() and not isinstance(error, SystemExit):
            run.update(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        for logger in trained.loggers:
            logger.finalize("success" if sys.exc_info()[0] is None else "failed")
    say(f"done: {folder}")
    return folder


def warn_of_slow_bf16(settings: TrainSettings) -> None:
    """Print a note if the training runs in bf16 on a CPU whose bf16 matrix products are slow."""
    import torch

    from magihuman import cpu

    options = settings.trainer
    on_gpu = options.accelerator == "cuda" or (options.accelerator == "auto" and torch.cuda.is_available())
    if on_gpu or options.precision != "bf16" or not is_main_process():
        return
    slowdown = cpu.bf16_slowdown()
    if slowdown > SLOW_BF16:
        say(
            f"note: matrix products are {slowdown:.0f} times slower in bf16 than in fp32 on this CPU, as on most "
            "without AVX512-BF16 or AMX; trainer.precision=fp32 is faster here, and results differ by rounding"
        )


def fit(trained: Any, recipe: Any, data: Any, resume: Path | None, folder: Path) -> None:
    """Train from `resume` (or from the start), leaving the checkpoint of the last step behind."""
    from magihuman.training.checkpoint import step_of
    from magihuman.training.preempt import SIGNALS
    from magihuman.training.runs import RUN_NAME, CSVLog

    step = 0
    if resume is not None:
        say(f"   continuing from {resume.name}")
        step = step_of(resume)
    for logger in trained.loggers:
        if isinstance(logger, CSVLog):
            logger.rewind(step)
    os.environ[RUN_NAME] = folder.name
    # Lightning and the preemption callback both take the signals; what follows the training is to end by them.
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        trained.trainer.fit(recipe, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        del os.environ[RUN_NAME]


def stopped(trained: Any, run: Any) -> None:
    """Record a preemption, requeue under Slurm, and leave."""
    from magihuman.training.preempt import EXIT_STATUS, requeue

    at, reason = trained.preemption.stopped_at, trained.preemption.received
    run.update(status="preempted", steps=at, metrics=trained.lines.last)
    say(f"stopped by {reason} after step {at}; the same command with folder={run.path} continues")
    requeue()
    raise SystemExit(EXIT_STATUS)


def after_fit(settings: TrainSettings, run: Any) -> None:
    """Evaluations and reports of the configuration, in its order; their figures go to run.json."""
    for name, node in (settings.after_fit or {}).items():
        if node is None:
            continue
        with stage(name):
            result = call(node, f"after_fit.{name}")
        if isinstance(result, Mapping):
            run.update(results={name: dict(result)})


def main() -> None:
    """The command line."""
    calm_bars()
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def job(config: Any) -> None:
        from magihuman.training.runs import choose_folder

        try:
            of_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
            job_number = HydraConfig.get().job.num if of_sweep else None
            if "_target_" in (config.recipe or {}):
                config.folder = str(choose_folder(plain(config), job_number))
            node = plain(config)
            settings = validate(node)
            train(node, OmegaConf.to_yaml(config), Path(config.folder), settings)
        except UserError as error:
            report_and_exit(error)
        except KeyboardInterrupt:
            print("interrupted; the checkpoints are kept", file=sys.stderr)
            raise SystemExit(130) from None

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us whole, and leave as one line
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not isinstance(error, HydraException | OmegaConfBaseException) and not _from_hydra(error):
            raise
        report_and_exit(UserError(explain(error)))


def _from_hydra(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "hydra" in trace.tb_frame.f_code.co_filename


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
        raise UserError(explain(error)) from error
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


if __name__ == "__main__":
    main()
