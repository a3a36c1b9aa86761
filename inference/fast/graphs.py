"""CUDA graphs of a whole forward pass: the host launches one thing instead of some hundreds.

Worth it where a step takes little time, so for short sequences; a long sequence only loses memory.
"""

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from magihuman.models.tokens import Layout

LONGEST = 16384
"""Tokens up to which a forward pass is recorded: above, launching takes less than a hundredth of the step."""

_KEPT = 4

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Graphs:
    """Records a forward pass on its second call with a layout, replays it from then on.

    The first call runs plainly and so warms up what must not happen while recording (kernels that are compiled or
    tuned when they are first used). Recording waits for the device once.
    """

    def __init__(self) -> None:
        self._met: WeakSet[Layout] = WeakSet()
        self._recorded: dict[Layout, _Recording] = {}

    def __call__(
        self, layout: Layout, forward: Forward, video: Tensor, audio: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """forward(video, audio, text), through a graph where there is one for this layout.

        Args:
            forward: launches the same work in every call with this layout, on tensors that stay where they are but
                for its arguments.
        """
        if not video.is_cuda or layout not in self._met:
            outputs = forward(video, audio, text)
            self._met.add(layout)  # a call that failed has warmed up nothing
            return outputs
        if layout not in self._recorded:
            while len(self._recorded) >= _KEPT:
                self._recorded.pop(next(iter(self._recorded)))
            self._recorded[layout] = _Recording(forward, video, audio, text)
        return self._recorded[layout].replay(video, audio, text)


class _Recording:
    def __init__(self, forward: Forward, *inputs: Tensor) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = forward(*self.inputs)

    def replay(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        video, audio = self.outputs
        return video.clone(), audio.clone()  # the next replay writes over them
