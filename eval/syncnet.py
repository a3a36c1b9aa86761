"""SyncNet (Chung and Zisserman, "Out of time", 2016): embeddings of lips and of speech, and how well they fit at each offset.

    network = load_syncnet(Path("syncnet_v2.model"))
    sync_scores(network.of_lips(crops), network.of_speech(mfcc(wave)))

Layers and names are those of syncnet_v2.model, published with github.com/joonson/syncnet_python (MIT), so that its weights
load; the code is ours.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from magihuman.errors import UserError

WINDOW = 5  # frames
FPS = 25
MOST = 15  # frames of offset that are searched to either side
_ROWS = 4  # of MFCC per frame
_SPEECH = WINDOW * _ROWS
_BATCH = 32
_CHUNK = 32  # windows of lips that are computed at once: 130 MB of activations in the first layer

# Channels, kernel, stride, padding, then kernel, stride, padding of the pooling, which keeps its place where it does nothing.
_SPEECH_LAYERS: tuple[Any, ...] = (
    (64, (3, 3), 1, 1, ((1, 1), 1, 0)),
    (192, (3, 3), 1, 1, ((3, 3), (1, 2), 0)),
    (384, (3, 3), 1, 1, None),
    (256, (3, 3), 1, 1, None),
    (256, (3, 3), 1, 1, ((3, 3), (2, 2), 0)),
    (512, (5, 4), 1, 0, None),
)
_LIP_LAYERS: tuple[Any, ...] = (
    (96, (5, 7, 7), (1, 2, 2), 0, ((1, 3, 3), (1, 2, 2), 0)),
    (256, (1, 5, 5), (1, 2, 2), (0, 1, 1), ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    (256, (1, 3, 3), 1, (0, 1, 1), None),
    (256, (1, 3, 3), 1, (0, 1, 1), None),
    (256, (1, 3, 3), 1, (0, 1, 1), ((1, 3, 3), (1, 2, 2), 0)),
    (512, (1, 6, 6), 1, 0, None),
)


def _convolutions(channels: int, layers: tuple[Any, ...], conv: Any, norm: Any, pool: Any) -> nn.Sequential:
    made: list[nn.Module] = []
    for out, kernel, stride, padding, pooling in layers:
        made += [conv(channels, out, kernel, stride, padding), norm(out), nn.ReLU()]
        if pooling is not None:
            made.append(pool(*pooling))
        channels = out
    return nn.Sequential(*made)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """Two towers that map 0.2 s of lips and of speech to 1024 numbers, near each other where they belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = _convolutions(1, _SPEECH_LAYERS, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        self.netfcaud = _head()
        self.netfclip = _head()
        self.netcnnlip = _convolutions(3, _LIP_LAYERS, nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)

    @torch.inference_mode()
    def of_lips(self, crops: np.ndarray) -> torch.Tensor:
        """Embeddings fp32 [F-4,1024] of faces uint8 [F,224,224,3] RGB at 25 fps, F > 4, of frames i to i+4 each.

        Only the first layer reaches over time, so windows that overlap share the others.
        """
        place = next(self.parameters()).device
        found = []
        for first in range(0, len(crops) - WINDOW + 1, _CHUNK):
            part = np.ascontiguousarray(crops[first : first + _CHUNK + WINDOW - 1, ..., ::-1])  # BGR
            video = torch.from_numpy(part).to(place).permute(3, 0, 1, 2)[None].float()
            found.append(self.netfclip(self.netcnnlip(video)[0, :, :, 0, 0].T))
        return torch.cat(found).cpu()

    @torch.inference_mode()
    def of_speech(self, coefficients: np.ndarray) -> torch.Tensor:
        """Embeddings fp32 [n,1024] of MFCC [T,13], T > 19: windows of 20 rows that start 4 rows (a frame) apart."""
        place = next(self.parameters()).device
        windows = torch.from_numpy(coefficients).float().unfold(0, _SPEECH, _ROWS)[:, None]
        return torch.cat(
            [self.netfcaud(self.netcnnaud(part.to(place)).flatten(1)) for part in windows.split(_BATCH)]
        ).cpu()


def load_syncnet(path: Path, device: str = "auto") -> SyncNet:
    """SyncNet with the weights of a file such as syncnet_v2.model: a dict of tensors; nothing in it is executed.

    Raises:
        UserError: the file cannot be read, or holds other tensors.
    """
    from inference.loading import choose_device

    try:
        state = torch.load(path.expanduser(), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of many types, and torch's text is a page on how to read it unsafely
        raise UserError(
            f"{path} is no PyTorch file of tensors; give syncnet_v2.model of github.com/joonson/syncnet_python"
        ) from error
    network = SyncNet()
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = (
        {name: tuple(getattr(value, "shape", ())) for name, value in state.items()} if isinstance(state, dict) else {}
    )
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # files of old versions have none
    wrong = [name for name in wanted if given.get(name) != wanted[name] and name not in counters - given.keys()]
    if wrong or given.keys() - wanted.keys():
        name = wrong[0] if wrong else min(given.keys() - wanted.keys())
        raise UserError(
            f"{path} is no SyncNet: {name} is {given.get(name, 'missing')}, wanted {wanted.get(name, 'no such tensor')}"
        )
    network.load_state_dict(state, strict=False)
    return network.to(choose_device(device)).eval()


class SyncScores(NamedTuple):
    """LSE-D, LSE-C and the offset of the sound in frames: negative where it is late."""

    distance: float
    confidence: float
    offset: int


def sync_scores(lips: torch.Tensor, speech: torch.Tensor, most: int = MOST) -> SyncScores:
    """Mean distance of lips [n,D] and speech [n,D] at the best of 2 x `most` + 1 offsets, and the median's lead over it.

    As in syncnet_python: speech is continued by zeros at both ends, and these distances count, too. LSE-D and LSE-C are
    the names that Wav2Lip (arXiv:2008.10010) gave to the two.
    """
    padded = nn.functional.pad(speech, (0, 0, most, most))
    means = torch.stack(
        [
            nn.functional.pairwise_distance(lips, padded[shift : shift + len(lips)]).mean()
            for shift in range(2 * most + 1)
        ]
    )
    best = int(means.argmin())
    return SyncScores(float(means[best]), float(means.median() - means[best]), most - best)
