"""`python -m magihuman.train +recipe=NAME`: data, training, export and evaluation, one after the other.

The configuration is composed by Hydra from `configs/` and checked by `magihuman.config`; `magihuman.training.context`
makes the trainer; the algorithm is a recipe. Recipes, data and evaluations are reached through the `_target_` strings
of the configuration.
"""

import sys

from magihuman import preemption

if __name__ == "__main__" or sys.argv[0].endswith("magihuman-train"):  # before the imports below, which take a while
    preemption.install()

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from magihuman.cli import calm_bars
from magihuman.codecs.tiny_captions import of_another_form
from magihuman.composition import RUN_NAME, choose_folder, plain, with_cause
from magihuman.config import TrainSettings, available, changes, groups, validate
from magihuman.console import is_main_process, say, stage
from magihuman.cpu import bf16_slowdown, take_threads_of, tune_cpu
from magihuman.errors import NotApplicable, UserError, report_and_exit
from magihuman.io.files import CONFIGS, disk_problem, require_writable
from magihuman.io.provenance import fingerprint
from magihuman.multirun import INTERRUPTED, Sweep
from magihuman.overrides import overrides, swept
from magihuman.schema import call, one_line

SLOW_BF16 = 3.0
"""A note is printed if bf16 matrix products of the CPU take more than this many times the fp32 time."""


MAX_STOPS = 5
"""Starts in a row that signals may end at the same place; then the job is held, since it would be requeued for ever."""


def make_data(settings: TrainSettings) -> tuple[Any, Path]:
    """The data module and its shards (or file of prompts); the shards are made first where the configuration says how."""
    module = dict(settings.data.module)
    if settings.data.make is not None:
        with stage("clips and shards"):
            module["shards"] = str(call(settings.data.make, "data.make"))
    data = call(module, "data.module")
    data.context_parallel = settings.strategy.context_parallel
    return data, Path(module["shards"] if "shards" in module else module["file"])


def finished(run: Any, settings: TrainSettings, config_yaml: str, branching: bool = False) -> bool:
    """Whether the run folder holds this training, finished; says where a continuation changes settings.

    Args:
        branching: whether a new branch begins at an older checkpoint, whatever the folder holds.

    Raises:
        UserError: it holds a finished training with other settings, or resume=none and it holds any.
    """
    import yaml

    record, kept = run.read(), run.path / "config.yaml"
    if settings.resume == "none" and run.holds_training():
        raise UserError(f"{run.path} holds a training already; remove it, choose another name=, or use resume=auto")
    changed: list[str] = []
    if run.holds_training() and kept.exists():
        found = changes(yaml.safe_load(kept.read_text(encoding="utf-8")), yaml.safe_load(config_yaml))
        changed = [line for line in found if not line.startswith("trainer.max_steps ")]
    steps = record.get("steps", 0)
    if record.get("status") == "finished" and steps >= settings.trainer.max_steps and not branching:
        if changed:
            raise UserError(
                f"{run.path} is finished, with other settings ({'; '.join(changed)}); give another name=, or a "
                f"trainer.max_steps above {steps} to train on with the new settings"
            )
        say(f"{run.path} is finished ({steps} steps); for more give a larger trainer.max_steps or a new name=")
        return True
    if changed:
        say(f"note: {run.path} is continued with other settings ({'; '.join(changed)})")
    return False


def train(node: Mapping[str, Any], config_yaml: str, folder: Path, settings: TrainSettings) -> Path:
    """Run every stage; returns the run folder.

    Args:
        node: the resolved configuration; config_yaml: the same as text, for the run folder.
        folder: of the run.

    Raises:
        UserError: anything that a user can correct.
        SystemExit: with `preemption.STOPPED` when a signal stopped the training and it can be continued.
    """
    from magihuman.training.branch import is_new_branch
    from magihuman.training.lock import RunLock
    from magihuman.training.runs import RunFolder

    run, main = RunFolder(folder), is_main_process()
    if not main and RUN_NAME in os.environ:
        preemption.end_with_parent()
    lock = RunLock(folder, main)
    with preemption.recorded(lambda reason: stopped(run, lock, settings, reason), folder if main else None):
        try:
            branching = is_new_branch(settings.resume, run)
            if finished(run, settings, config_yaml, branching):
                return folder
            require_writable(folder / "run.json", "folder")
            with lock, ExitStack() as closing:
                try:
                    stages(node, config_yaml, run, settings, branching, closing)
                except BaseException as error:
                    if after_signal(error) is not None:
                        run.update(status="preempted", stage=run.stage)  # before loggers and Slurm take their time
                        raise
                    if run.read().get("status") in ("queued", "running"):
                        run.fail(error)
                    preemption.ended()  # else a signal while loggers are closed would requeue a failed job
                    raise
                preemption.ended()
        except BaseException as error:
            reason = after_signal(error)
            if reason is None:
                raise
            if not isinstance(error, preemption.Preempted):
                say(f"note: after {reason}: {type(error).__name__}: {one_line(str(error))[:300]}")
            preemption.leave(reason)
            raise SystemExit(preemption.STOPPED) from None
    say(f"done: {folder}")
    return folder


def stages(
    node: Mapping[str, Any], config_yaml: str, run: Any, settings: TrainSettings, branching: bool, closing: ExitStack
) -> None:
    """Everything between taking the lock and releasing it; a signal between the steps of the training raises Preempted.

    Args:
        closing: ends the loggers, once run.json has how the training ended.
    """
    from magihuman.training import branch
    from magihuman.training.checkpoint import require_same_training
    from magihuman.training.context import Session, build_context, build_recipe, check_before_data, parents, quiet
    from magihuman.training.loggers import close

    tune_cpu(settings.trainer.threads)
    quiet()
    resume = branch.find_start(settings.resume, run)
    if resume is not None:
        require_same_training(resume, node)
    check_before_data(settings)
    warn_of_slow_bf16(settings)
    if branching and resume is not None:
        branch.begin(run, resume)
    run.start(node, config_yaml)
    run.enter("data")
    data, shards = make_data(settings)
    preemption.check()
    context = build_context(settings, data, {"recipe": settings.recipe["_target_"], "seed": settings.seed})
    recipe = build_recipe(settings.recipe, context)
    for note in notes(settings, data, recipe):
        say(f"note: {note}")
    run.update(parents=parents(settings, shards, data) if is_main_process() else [])
    session = Session(settings, run, node, recipe, afterwards(config_yaml, run.path))
    closing.callback(close, session.loggers)
    with entering(run, "training", f"training {settings.trainer.max_steps} steps into {run.path}"):
        fit(session, recipe, data, resume, run.path)
        run.update(steps=recipe.step, metrics=session.lines.last)
        if session.preemption.stopped_at is not None:
            raise preemption.Preempted(session.preemption.received)
    if damaged := sorted(getattr(data, "skipped", ())):
        run.update(damaged_samples=damaged[:1000])
    if lost := getattr(data, "lost_connections", 0):
        run.update(lost_connections=lost)
    with entering(run, "export", "export"):
        recipe.export(run.export)
    if session.trainer.is_global_zero:
        run.update(export=fingerprint(run.export))
        write_cards(run)
        take_threads_of(settings.trainer.devices)
        after_fit(settings, run)
        write_cards(run)  # again: with their scores
        run.update(status="finished", stage=None)


@contextmanager
def entering(run: Any, name: str, title: str) -> Iterator[None]:
    """A stage: recorded, announced, and not left without a look at whether a signal came."""
    run.enter(name)
    with stage(title):
        yield
    preemption.check()


def after_signal(error: BaseException) -> str | None:
    """The signal that an error is the consequence of, or None for one of its own.

    After a signal to the job other processes have left, workers may be killed and connections end: what a library then raises
    is no failure of the training, which is continued from its last checkpoint. An error that is one happens again then.
    """
    if isinstance(error, preemption.Preempted):
        return str(error)
    if isinstance(error, UserError | KeyboardInterrupt | SystemExit):
        return None
    return preemption.received() or preemption.left_by_another()


def stopped(run: Any, lock: Any, settings: TrainSettings, reason: str) -> None:
    """Record a preemption and requeue the Slurm job, on the main process; the others tell the main process that they leave."""
    if not is_main_process():
        preemption.tell_main_process(run.path, reason)
        if RUN_NAME in os.environ:  # Lightning would kill the main process, which started this one
            preemption.wait_for_parent()
        return
    stops = 0
    if lock.held:
        stops = stops_at_this_place(run)
        run.update(status="preempted", stage=run.stage)
    lock.release()
    if settings.resume == "none" and run.holds_training():
        answer = "resume=none would refuse to continue; give the command without it"
    elif stops >= MAX_STOPS:
        answer = preemption.requeue(
            f"{stops} starts in a row were stopped in {run.stage} without progress; give it more time"
        )
    else:
        answer = preemption.requeue()
    if run.read().get("status") == "preempted":
        run.update(requeue=answer)
    steps = run.read().get("steps")
    where, export = f"in {run.stage}", ""
    if run.stage == "training" and steps:
        where = f"after step {steps}"
        export = f"; with trainer.max_steps={steps} after_fit=null too, it exports what there is, to sample from"
    told = "" if preemption.slurm_job() is None else f"; {preemption.told(answer)}"
    say(f"stopped by {reason} {where}{told}; the same command with folder={run.path} continues{export}")


def stops_at_this_place(run: Any) -> int:
    """How many starts in a row have been stopped in this stage after the same step, with this one; kept in run.json."""
    record = run.read()
    place, before = [run.stage, record.get("steps")], record.get("stops", {})
    # A job that a person has released after it was held has as many tries again.
    stops = before.get("count", 0) % MAX_STOPS + 1 if before.get("place") == place else 1
    run.update(stops={"place": place, "count": stops})
    return stops


def notes(settings: TrainSettings, data: Any, recipe: Any) -> list[str]:
    """What is odd about a training although it can run."""
    found = list(recipe.notes())
    prompts = ((settings.callbacks or {}).get("samples") or {}).get("prompts") or []
    if strange := of_another_form(prompts, codecs := getattr(data, "codecs", "")):
        found.append(
            f"{len(strange)} of {len(prompts)} prompts of the sample clips have not the form of codecs={codecs}, the first: "
            f"{strange[0]!r}; give prompts= of it, or prompts=[] callbacks.samples.held_out=4 for captions of held-out clips"
        )
    clips, batch = getattr(data, "train_samples", None), getattr(data, "batch_size", 0)
    if clips is not None and clips < batch:
        found.append(
            f"{clips} clips to train on are fewer than data.module.batch_size={batch}: every batch repeats some"
        )
    return found


def afterwards(config_yaml: str, folder: Path) -> str:
    """What follows the training, for its lines of progress: the evaluations, each with the minutes that it took in the
    newest other run of this recipe with the same model, recipe and evaluation, if there is one."""
    import yaml

    mine, parts = yaml.safe_load(config_yaml), []
    others = sorted(folder.parent.glob("*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    for name in (name for name, node in (mine.get("after_fit") or {}).items() if node is not None):
        took = next((seconds for file in others if (seconds := _took(file, name, mine)) is not None), None)
        parts.append(f"{name} ({'time unknown' if took is None else f'about {took / 60:.1f} min'})")
    return f", then after_fit: {', '.join(parts)}" if parts else ""


def _took(config: Path, name: str, mine: Mapping[str, Any]) -> float | None:
    """Seconds that an evaluation took in the run with this config.yaml; None if it did not run or had other settings."""
    import yaml

    from magihuman.training.runs import RunFolder

    try:
        theirs = yaml.safe_load(config.read_text(encoding="utf-8"))
        if [theirs[p] for p in ("model", "recipe")] != [mine[p] for p in ("model", "recipe")]:
            return None
        if theirs["after_fit"][name] != mine["after_fit"][name]:
            return None
        return float(RunFolder(config.parent).read()["seconds"][name])
    except (OSError, UserError, yaml.YAMLError, KeyError, TypeError):
        return None


def fit(session: Any, recipe: Any, data: Any, resume: Path | None, folder: Path) -> None:
    """Train from the checkpoint `resume` (or from the start) up to the checkpoint of the last step."""
    from magihuman.training.checkpoint import step_of
    from magihuman.training.loggers import rewind

    step = 0
    if resume is not None:
        say(f"   continuing from {resume.name}")
        step = step_of(resume)
    rewind(session.loggers, step)
    os.environ[RUN_NAME] = folder.name
    try:
        session.trainer.fit(recipe, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into status 1
            raise KeyboardInterrupt from None
        raise
    finally:
        del os.environ[RUN_NAME]


def after_fit(settings: TrainSettings, run: Any) -> None:
    """Call the evaluations and reports of the configuration in its order; their results go to run.json.

    What has finished already, for the same steps and with the same settings, is not called again.
    """
    steps = run.read().get("steps")
    again = False
    for name, node in (settings.after_fit or {}).items():
        if node is None:
            continue
        text = json.dumps(node, sort_keys=True, default=str)
        this = {"steps": steps, "settings": hashlib.sha256(text.encode()).hexdigest()[:16]}
        if run.read().get("evaluated", {}).get(name) == this and not again:
            say(f"note: after_fit.{name} is done already")
            continue
        again = True  # those after it may read what it writes
        start = time.monotonic()
        with entering(run, name, name):
            try:
                result = call(node, f"after_fit.{name}")
            except NotApplicable as reason:
                say(f"   note: after_fit.{name} is skipped: {reason}")
                continue
        results = {"results": {name: dict(result)}} if isinstance(result, Mapping) else {}
        run.update(seconds={name: round(time.monotonic() - start, 1)}, evaluated={name: this}, **results)


def write_cards(run: Any) -> None:
    """Model cards of what the run has exported; one that cannot be written is a note."""
    from magihuman.zoo.model_card import write_run_cards

    for note in write_run_cards(run.path):
        say(f"note: {note}")


def warn_of_slow_bf16(settings: TrainSettings) -> None:
    """Print a note if the training runs in bf16 on a CPU whose bf16 matrix products are slow."""
    import torch

    options = settings.trainer
    on_gpu = options.accelerator == "cuda" or (options.accelerator == "auto" and torch.cuda.is_available())
    if on_gpu or options.precision != "bf16" or not is_main_process():
        return
    slowdown = bf16_slowdown()
    if slowdown > SLOW_BF16:
        say(
            f"note: matrix products are {slowdown:.0f} times slower in bf16 than in fp32 on this CPU, as on most "
            "without AVX512-BF16 or AMX; trainer.precision=fp32 is faster here, also as part of trainer=cores (a process "
            "per core), and results differ by rounding"
        )


# -- the command line ----------------------------------------------------------------------------------------------


def main() -> None:
    """The command line."""
    calm_bars()
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    preemption.install()
    if not hasattr(signal, "SIGUSR1"):
        report_and_exit(UserError("training runs on Linux and macOS; on Windows use WSL2"))
    typed, composed = sys.argv[1:], False

    def job(config: Any) -> None:
        nonlocal composed
        composed = True
        now = HydraConfig.get()
        try:
            if now.mode == RunMode.MULTIRUN:
                sweep.run(config, now.job.num, list(now.overrides.task))
                return
            sys.argv[1:] = typed  # run.json and further processes get the command as it was typed
            if "_target_" in (config.recipe or {}):
                config.folder = str(choose_folder(plain(config)))
            node = plain(config)
            settings = validate(node)
            train(node, OmegaConf.to_yaml(config), Path(config.folder), settings)
        except UserError as error:
            report_and_exit(error)
        except BaseException as error:  # CheckpointException of torch.distributed is no Exception
            if (problem := disk_problem(error, config.folder)) is None:
                raise
            report_and_exit(problem)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us whole, and are printed as one line
    try:
        sys.argv[1:] = overrides(typed)
        if {"-h", "--help"} & set(typed):
            print(help_text([word for word in sys.argv[1:] if not word.startswith("-")]))
            return
        sweep = Sweep(swept(sys.argv[1:]) if {"-m", "--multirun"} & set(sys.argv) else set())
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()
        sweep.report()
    except UserError as error:
        report_and_exit(error)
    except preemption.Preempted as stop:  # within the few instructions around `train`
        preemption.leave(str(stop))
        raise SystemExit(preemption.STOPPED) from None
    except KeyboardInterrupt:
        print("interrupted; the checkpoints are kept", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed:
            raise
        report_and_exit(UserError(with_cause(error)))


def help_text(words: list[str]) -> str:
    """The help: groups with their choices, and the settings with these overrides. Hydra's own takes twice as long."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", words, return_hydra_config=True)
    header, footer = config.hydra.help.header, config.hydra.help.footer
    del config.hydra
    choices = "\n".join(f"{group}: {', '.join(available(group))}" for group in groups())
    return (
        f"{header}\nGroups and their choices:\n{choices}\n\nSettings (see the comments in configs/):\n\n"
        f"{OmegaConf.to_yaml(config)}\n{footer}"
    )


if __name__ == "__main__":
    main()
