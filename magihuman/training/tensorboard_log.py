"""TensorBoard: the metrics of a run, contact sheets, sound of samples, and its settings beside the final scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from magihuman.io.provenance import without_secrets
from magihuman.training.runs import RunFolder
from magihuman.training.wandb_log import summary


class TensorBoardLog(Logger):
    """Logger of tensorboard/ in the run folder: `tensorboard --logdir runs` shows all runs.

    A resumed run repeats the steps after its checkpoint; `rewind` makes TensorBoard drop the earlier ones.

    Args:
        folder: of the run.
        config: the whole configuration; its single values are the hyperparameters.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder = folder
        self._config = config
        self._purge: int | None = None
        self._opened: Any = None

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> Any:
        """torch's SummaryWriter."""
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            self._opened = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self._purge)
        return self._opened

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`; before anything is logged."""
        self._purge = step + 1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one value per name."""
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """`close` writes them, beside the final scores."""

    @rank_zero_only
    def log_samples(self, clips: Sequence[Any], sheet: Path, step: int) -> None:
        """Write the contact sheet as an image and the sound of each clip.

        Args:
            clips: with `wave`, fp32 [channels,N] in [-1,1] or None, and `sample_rate` in Hz.
        """
        import numpy as np
        from PIL import Image

        with Image.open(sheet) as image:
            self.experiment.add_image("samples/sheet", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        for number, clip in enumerate(clips):
            if clip.wave is not None and clip.wave.numel():
                self.experiment.add_audio(f"samples/{number:02d}", clip.wave.mean(0), step, int(clip.sample_rate))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush, at the end of the training; evaluations may follow."""
        if self._opened is not None:
            self._opened.flush()

    @rank_zero_only
    def close(self) -> None:
        """Write the hyperparameters beside the final scores. A second call does nothing."""
        from torch.utils.tensorboard.summary import hparams

        if self._opened is None:
            return
        record = self.folder.read()
        found = {**record.get("metrics", {}), **summary(record)}
        scores = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        file = self._opened.file_writer
        for part in hparams({**_single(without_secrets(self._config)), "status": str(record.get("status"))}, scores):
            file.add_summary(part)
        for name, value in scores.items():
            if name not in record.get("metrics", {}):
                self._opened.add_scalar(name, value, record.get("steps"))
        self._opened.close()
        self._opened = None


def _single(node: Any, path: str = "") -> dict[str, Any]:
    """The numbers and words of nested settings by their dotted names; TensorBoard has no other."""
    if isinstance(node, Mapping):
        dot = f"{path}." if path else ""
        return {name: value for key in node for name, value in _single(node[key], f"{dot}{key}").items()}
    return {path: node} if isinstance(node, bool | int | float | str) else {}
