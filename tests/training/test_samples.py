"""Sample clips: held-out captions with their stored features, and which process loads and decodes what."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from magihuman.codecs import bundle as bundles
from magihuman.errors import UserError
from magihuman.models.config import Contract
from magihuman.training.callbacks import Samples

CONTRACT = Contract("v", "a", "t", 3, 4, 5, (4, 4, 4), 25.0, 16000, 1)
HELD_OUT = [
    {"caption": ["a cat", "", "a cat"], "text": [torch.full((n, 5), float(n)) for n in (1, 2, 3)]},
    {"caption": ["a dog", "a cow"], "text": [torch.full((n, 5), float(n)) for n in (4, 5)]},
]


class Made:
    """Stands in for a pipeline: remembers what it was made of and asked for."""

    calls: list[dict[str, Any]]

    def __init__(self, loaded: Any, codecs: Any) -> None:
        self.codecs = codecs

    def generate(self, prompts: list[str], seeds: list[int], **settings: Any) -> list[str]:
        features = self.codecs.text_encoder.encode([*prompts, ""])
        Made.calls.append({"codecs": self.codecs, "features": features, "settings": settings})
        return [f"clip of {prompt}" for prompt in prompts]


def process(
    main: bool, strategy: str, sent: list[Any], codecs: str = "released", held: Any = HELD_OUT
) -> tuple[Any, Any]:
    """Trainer and recipe of one process; what the main one broadcasts is appended to `sent`, from which others read."""

    def broadcast(value: Any) -> Any:
        if main:
            sent.append(value)
            return value
        return sent.pop(0)

    trainer = SimpleNamespace(
        is_global_zero=main,
        strategy=SimpleNamespace(broadcast=broadcast),
        datamodule=SimpleNamespace(val_dataloader=lambda: held if main else pytest.fail("only the main process reads")),
        default_root_dir=".",
    )
    context = SimpleNamespace(
        codecs=codecs, contract=CONTRACT, size=SimpleNamespace(frames=9, height=16, width=16),
        null_text=torch.zeros(1, 5), strategy=SimpleNamespace(name=strategy, context_parallel=1),
    )  # fmt: skip
    recipe = SimpleNamespace(
        context=context, device="cpu", network=nn.Linear(1, 1), export_config=lambda: None,
        sampling=SimpleNamespace(negative_prompt=""),
    )  # fmt: skip
    return trainer, recipe


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded: "media" for the codecs alone, "whole" with the text encoder."""
    found: list[str] = []

    def media(name: str, device: Any) -> tuple[str, str]:
        found.append("media")
        return "video codec", "audio codec"

    def whole(name: str, device: Any) -> Any:
        found.append("whole")
        text = SimpleNamespace(channels=5, encode=lambda prompts: [torch.full((2, 5), 9.0) for _ in prompts])
        return bundles.CodecBundle(name, CONTRACT, "video codec", "audio codec", text, 16, 16, 9)

    monkeypatch.setattr(bundles, "load_media_codecs", media)
    monkeypatch.setattr(bundles, "load_bundle", whole)
    Made.calls = []
    return found


def test_a_sharded_training_reads_codecs_and_captions_once_and_needs_no_text_encoder(loads: list[str]) -> None:
    sent: list[Any] = []
    made = {}
    for main in (True, False):
        trainer, recipe = process(main, "fsdp2", sent)
        samples = Samples(Made, [], settings={"steps": 2}, held_out=2)
        samples.on_train_start(trainer, recipe)
        assert samples.prompts == ["a cat", "a dog"]
        made[main] = samples.generate(trainer, recipe, samples.prompts)
    assert made[True] == ["clip of a cat", "clip of a dog"]
    assert loads == ["media"]
    first, second = Made.calls
    assert (first["codecs"].video_codec, second["codecs"].video_codec) == ("video codec", None)
    assert first["settings"] == {"steps": 2}
    assert second["settings"] == {"steps": 2, "decode": False}
    for call in (first, second):
        # Of a caption that occurs twice the later features; the empty prompt has those of the shards.
        assert [float(feature.mean()) for feature in call["features"]] == [3.0, 4.0, 0.0]


def test_given_prompts_are_encoded_once(loads: list[str]) -> None:
    trainer, recipe = process(True, "single", [])
    samples = Samples(Made, ["a bird"])
    for _ in range(2):
        samples.generate(trainer, recipe, samples.prompts)
    assert loads == ["whole"]
    assert [float(feature.mean()) for feature in Made.calls[1]["features"]] == [9.0, 0.0]


def test_other_processes_of_a_copied_network_do_not_sample(loads: list[str]) -> None:
    trainer, recipe = process(False, "ddp", [])
    samples = Samples(Made, [], held_out=2)
    samples.on_train_start(trainer, recipe)
    assert not samples.takes_part(trainer, recipe)
    assert not loads


@pytest.mark.parametrize("held", [[], [{"caption": [""], "text": [torch.ones(1, 5)]}]])
def test_no_held_out_captions_are_refused(held: Any) -> None:
    trainer, recipe = process(True, "single", [], held=held)
    with pytest.raises(UserError, match="held_out=3 needs captions of held-out clips"):
        Samples(Made, [], held_out=3).on_train_start(trainer, recipe)
