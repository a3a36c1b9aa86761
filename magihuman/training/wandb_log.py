"""W&B: one run per run folder with settings, lineage, metrics, sample clips and final scores, online or offline.

Nothing here stops or slows a training: W&B's process sends in the background, the waits for its server are limited, and
an error of W&B is a note. run.json and metrics.csv of the run folder have the same values.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from magihuman.config import WandbSettings
from magihuman.errors import UserError
from magihuman.io.provenance import without_secrets
from magihuman.schema import one_line
from magihuman.training.runs import RunFolder

SECONDS = {"init_timeout": 30.0, "finish_timeout": 300.0}
"""Longest waits for W&B's server, at the start and for what is still to be sent at the end; W&B's own are 90 s and no limit.
The variables WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT change them."""
PREEMPTED_SECONDS = 15.0
"""Longest wait at the end of a preempted run: Slurm ends the job soon."""
EXIT_CODES = {"finished": 0, "preempted": 75}
"""Of W&B's run by the status of the run folder; 1 otherwise."""


class WandbMirror(WandbLogger):
    """Lightning's W&B logger, whose errors do not stop a training.

        logger.log_metrics({"loss": 0.5}, step=10)
        logger.experiment                              # W&B's own run, for anything else

    Args:
        run: W&B's run, open, in `mode` (`online`, `offline`).
        folder: of the run.
        upload: whether the exported weights are sent, too.
    """

    def __init__(self, run: Any, folder: RunFolder, mode: str, upload: bool = False) -> None:
        super().__init__(experiment=run, save_dir=str(folder.path))
        self.folder = folder
        self.mode = mode
        self.upload = upload
        self._closed = False
        self._failed: set[str] = set()

    def _try(self, what: str, instead: str, send: Callable[[], Any]) -> None:
        """Call W&B; its first error with `what` is a note, and further calls with it are left out."""
        if what in self._failed:
            return
        try:
            send()
        except Exception as error:
            self._failed.add(what)
            print(f"note: W&B has failed with {what} ({reason(error)}); {instead}", flush=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one line."""
        send = super().log_metrics
        self._try("metrics", "further values are in metrics.csv only", lambda: send(dict(metrics), step))

    @rank_zero_only
    def log_samples(self, clips: Sequence[Any], sheet: Path, step: int) -> None:
        """Send sample clips: `samples/00`, ... by prompt, to compare over steps; `samples/table`; the contact sheet.

        Args:
            clips: with `prompt`, `seed` and `file`, an mp4.
        """

        def send() -> None:
            import wandb

            videos = [wandb.Video(str(clip.file), caption=clip.prompt, format="mp4") for clip in clips]
            rows = [[step, clip.prompt, clip.seed, video] for clip, video in zip(clips, videos, strict=True)]
            self.experiment.log(
                {
                    "trainer/global_step": step,
                    "samples/sheet": wandb.Image(str(sheet)),
                    "samples/table": wandb.Table(columns=["step", "prompt", "seed", "clip"], data=rows),
                    **{f"samples/{number:02d}": video for number, video in enumerate(videos)},
                }
            )

        self._try("sample clips", "they are in samples/ of the run folder only", send)

    @rank_zero_only
    def use_parents(self, parents: Sequence[Mapping[str, Any]]) -> None:
        """Declare what the run is made from as W&B's input artifacts, in the background.

        Offline W&B has no input artifacts; `provenance.parents` of its config has the same.

        Args:
            parents: with `role`, `name` and `sha256`, as in run.json.
        """
        if self.mode != "online":
            return

        def send() -> None:
            for parent in parents:
                kind = "model" if parent["role"] == "init" else "dataset"
                self._use(_artifact(kind, dict(parent)))

        def lineage() -> None:
            self._try("input artifacts", "run.json has what the run is made from", send)

        threading.Thread(target=lineage, daemon=True, name="wandb-inputs").start()

    def _use(self, artifact: Any) -> None:
        """The artifact of this name that another run has made, or a new one."""
        try:
            self.experiment.use_artifact(f"{artifact.name}:latest", type=artifact.type)
        except Exception:  # CommError or ValueError: there is none
            self.experiment.use_artifact(artifact)

    @rank_zero_only
    def close(self) -> None:
        """Write the final scores, status and export into W&B's summary, and end W&B's run. A second call does nothing."""
        run, record = self.experiment, self.folder.read()
        if self._closed:
            return
        self._closed = True
        status = str(record.get("status", "failed"))
        self._try("final scores", "run.json has them", lambda: run.summary.update(summary(record)))
        if status == "finished" and "export" in record:
            self._try(
                "the exported model's artifact", "it is in export/ only", lambda: self._log_export(record["export"])
            )
        if status == "preempted":
            self._try("the mark of a preemption", "run.json has it", run.mark_preempting)
        self._finish(run, EXIT_CODES.get(status, 1), PREEMPTED_SECONDS if status == "preempted" else None)
        if self.mode == "offline":
            print(
                f"W&B: offline; send it with: wandb sync {self.folder.path}/wandb/offline-run-*-{run.id} (what the run is "
                "made from is in its config: W&B has no input artifacts offline)",
                flush=True,
            )

    def _log_export(self, export: Mapping[str, Any]) -> None:
        artifact = _artifact("model", {"path": str(self.folder.export.resolve()), **export})
        if self.upload:
            artifact.add_dir(str(self.folder.export))
        self.experiment.log_artifact(artifact, aliases=["latest", self.folder.path.name])

    def _finish(self, run: Any, exit_code: int, seconds: float | None) -> None:
        def finish() -> None:
            self._try("its end", "metrics.csv and run.json have everything", lambda: run.finish(exit_code=exit_code))

        if self.mode != "online":
            seconds = None
        last = threading.Thread(target=finish, daemon=True)
        last.start()
        last.join(seconds)


def _artifact(kind: str, facts: Mapping[str, Any]) -> Any:
    """An artifact of W&B named after a fingerprint, so that all runs mean the same one; it holds no weights and no data.

    Args:
        facts: with sha256; the artifact's metadata.
    """
    import wandb

    artifact = wandb.Artifact(f"{kind}-{facts['sha256'][:16]}", type=kind, metadata=dict(facts))
    with artifact.new_file("sha256.txt") as file:
        file.write(f"{facts['sha256']}\n")
    return artifact


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """W&B's summary of a run from its run.json: status, hash of the export, and `eval/NAME/METRIC` of all evaluations.

    summary({"status": "finished", "results": {"eval": {"sync": {"value": 0.9, "low": 0.8, "high": 1.0}}}})
    # {"status": "finished", "eval/eval/sync": 0.9, "eval/eval/sync/low": 0.8, "eval/eval/sync/high": 1.0}
    """
    found = {key: record[key] for key in ("status", "steps", "starts", "error") if record.get(key) is not None}
    if "export" in record:
        found["export/sha256"] = record["export"]["sha256"]
    for name, seconds in record.get("seconds", {}).items():
        found[f"seconds/{name}"] = seconds
    for name, result in record.get("results", {}).items():
        found |= scores(result, f"eval/{name}")
    return found


def scores(result: Any, path: str) -> dict[str, Any]:
    """Numbers, and words such as verdicts, of a nested result by `path/KEY/KEY`; `{value, low, high}` is one score.

    Lists and file names are left out.
    """
    if isinstance(result, Mapping):
        measure = isinstance(result.get("value"), int | float)
        found: dict[str, Any] = {}
        for key, value in result.items():
            if measure and key == "value":
                found[path] = value
            elif not (measure and isinstance(value, str)):
                found |= scores(value, f"{path}/{key}")
        return found
    number = isinstance(result, int | float)
    word = isinstance(result, str) and 0 < len(result) <= 80 and "/" not in result
    return {path: result} if number or word else {}


@rank_zero_only
def open_wandb(folder: RunFolder, settings: WandbSettings, config: Mapping[str, Any]) -> WandbMirror | None:
    """The W&B run of this folder, continued where one exists; its files go to wandb/ in the folder.

    A user who is logged in but cannot reach W&B gets an offline run, or an error where online was asked for. None where
    not even that can be made. In a sweep of W&B the run is the one that its agent has made.

    Args:
        config: the whole configuration of the training.

    Raises:
        UserError: W&B is asked to be online and is not.
    """
    import wandb

    chosen = os.environ.get("WANDB_MODE") or settings.mode
    first = chosen if chosen != "auto" else "online" if _logged_in() else "offline"
    record = folder.read()
    identifier = _identifier(record, folder)
    folder.update(wandb=identifier)
    os.environ.setdefault("WANDB_SILENT", "true")
    limits = {name: value for name, value in SECONDS.items() if f"WANDB_{name.upper()}" not in os.environ}
    typed = sys.argv
    for mode in dict.fromkeys((first, "offline")):
        try:
            sys.argv = without_secrets(typed)  # wandb.init records the command line
            run = wandb.init(
                name=f"{folder.path.parent.name}/{folder.path.name}",
                dir=str(folder.path),
                project=settings.project,
                entity=settings.entity,
                group=config.get("sweep"),
                job_type=str(config["recipe"]["_target_"]).split(".")[-2:][0],
                tags=list(settings.tags),
                notes=settings.notes,
                id=identifier,
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                settings={key: value for key, value in limits.items() if key in wandb.Settings.model_fields},
            )
            run.define_metric("*", step_metric="trainer/global_step")
            known = without_secrets({**config, "provenance": _provenance(folder, record)})
            run.config.update(known, allow_val_change=True)
        except Exception as error:
            wandb.teardown(1)  # the failed run would hold the identifier
            if chosen == "online":
                raise UserError(f"W&B: {reason(error)}; give logger.wandb.mode=offline or logger=csv") from error
            if mode == "offline":
                print(f"note: W&B is left out ({reason(error)}); metrics.csv has the values", flush=True)
            else:
                print(
                    f"note: W&B cannot be used online ({reason(error)}); logging offline, later send it with: wandb sync "
                    f"{folder.path}/wandb/offline-run-*-{identifier}",
                    flush=True,
                )
        else:
            logger = WandbMirror(run, folder, mode, settings.upload)
            logger.use_parents(without_secrets(record.get("parents", ())))
            return logger
        finally:
            sys.argv = typed
    return None


def _identifier(record: Mapping[str, Any], folder: RunFolder) -> str:
    """Of W&B's run: that of the sweep's agent, else that of the run folder, else a new one."""
    kept = record.get("wandb")
    agent = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    if agent is None:
        return kept or os.urandom(4).hex()
    if kept not in (None, agent) and record.get("starts", 1) > 1:
        print(
            f"note: W&B's agent has a new run {agent} for {folder.path}; the earlier part of the training is in {kept}",
            flush=True,
        )
    return agent


def _provenance(folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
    """What W&B's config has beside the settings: where, how often and from what the run was started."""
    known = record.get("provenance", {})
    return {
        "folder": str(folder.path.resolve()),
        **{key: record.get(key) for key in ("host", "job", "starts", "restarts", "parents", "config_sha256")},
        "command": known.get("command"),
        **{key: known.get("code", {}).get(key) for key in ("commit", "changed")},
        "libraries": known.get("libraries"),
    }


def reason(error: Exception) -> str:
    """An error in a line of at most 200 characters."""
    return one_line(str(error) or type(error).__name__)[:200]


def _logged_in() -> bool:
    """Whether W&B has a key, without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
