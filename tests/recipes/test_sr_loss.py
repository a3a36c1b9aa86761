"""What reaches the network in super-resolution's training, and the loss of what it answers, written out by hand."""

from typing import Any

import pytest
import torch
from small_sr import RELEASED, Fixed, clips, recipe

from magihuman.flow.sigmas import zero_snr_table
from magihuman.flow.super_resolution import AUDIO_NOISE, NOISE_INDEX, coarsen, start
from magihuman.training.first_stage import FirstStage, FirstStageSettings
from magihuman.training.motion import motion_weight
from magihuman.training.rng import BatchRng


class Listener(torch.nn.Module):
    """Keeps what it is given and answers with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []
        self.said: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self, video: torch.Tensor, audio: torch.Tensor, text: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(len(self.given))
        self.given.append((video, audio, text))
        self.said.append((torch.randn(video.shape, generator=draw), torch.randn(audio.shape, generator=draw)))
        return self.said[-1]


def test_the_loss_is_that_of_the_network_s_answer_to_the_noised_clip() -> None:
    batch = clips()
    made = recipe(first_frame=0.5, audio_weight=0.3, motion_floor=0.25)
    network: Any = Listener()
    made.denoiser = network
    loss = made.loss(batch, BatchRng(0, 0, range(4)))
    noised = made.noised(made.paired(batch), BatchRng(0, 0, range(4)), conditioned=True)
    ((video, audio, text),), ((said, sounded),) = network.given, network.said
    assert torch.equal(video, noised.video)
    assert torch.equal(audio, noised.audio)
    assert all(torch.equal(a, b) for a, b in zip(text, batch["text"], strict=True))
    moving = motion_weight(batch["video_sr"], 0.25).expand_as(said)
    assert float(moving.std()) > 0.1
    given = noised.mask[:, 0, 0, 0, 0] == 0
    assert {True, False} == set(given.tolist())
    total = 0.0
    for i in range(4):
        error = moving[i] * (said[i] - noised.video_target[i]).square()
        total += float(error[:, 1:].mean() if given[i] else error.mean())
        total += 0.3 * float((sounded[i] - noised.audio_target[i]).square().mean())
    assert float(loss) == pytest.approx(total / 4, rel=1e-5)


def test_the_sound_and_its_velocity_lead_back_to_the_clip_s_own() -> None:
    batch, made = clips(), recipe(audio_noise=(0.7, 0.7))
    noised = made.noised(made.paired(batch), BatchRng(0, 0, range(4)), conditioned=False)
    torch.testing.assert_close(noised.audio - 0.7 * noised.audio_target, batch["audio"])


def test_the_source_is_made_of_the_first_stage_s_latents() -> None:
    batch = clips()
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 3, 8, 8, generator=draw), torch.randn(4, 9, 4, generator=draw)
    made = recipe(**RELEASED, first_stage=FirstStageSettings(coarse=1.0, coarse_factors=(4,)))
    rng = Fixed([*noise, torch.zeros_like(batch["video"])])
    noised = made.noised(made.paired(batch), rng, conditioned=False)
    signal = zero_snr_table()[NOISE_INDEX].item()
    wanted, _ = start(coarsen(batch["video"], 4), batch["audio"], noise, signal)
    torch.testing.assert_close(noised.video_target + batch["video_sr"].float(), wanted)


def test_resampled_clips_keep_their_own_words_and_sound() -> None:
    text = [torch.full((2, 5), float(i)) for i in range(20)]
    sound = torch.arange(20.0).view(-1, 1, 1).expand(-1, 9, 4)
    video = torch.randn(20, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    network: Any = Listener()
    settings = FirstStageSettings(base="x", base_share=0.5, base_steps=1)
    made = FirstStage(settings, network)(video, sound, text, BatchRng(0, 0, range(20)))
    changed = (made != video).flatten(1).any(1).nonzero().flatten().tolist()
    ((_, heard, words),) = network.given
    assert 4 <= len(changed) <= 16
    assert heard[:, 0, 0].tolist() == changed
    assert [int(w[0, 0]) for w in words] == changed


def test_held_out_figures_are_with_the_sound_and_with_noise_in_its_place() -> None:
    batch, made = clips(), recipe()
    network: Any = Listener()
    figures = made.validation_metrics(network, batch, BatchRng(0, 0, range(4)))
    with_sound, without = network.given[1], network.given[2]
    assert torch.equal(with_sound[0], without[0])
    torch.testing.assert_close(with_sound[1], AUDIO_NOISE * without[1] + (1 - AUDIO_NOISE) * batch["audio"])
    moving = motion_weight(batch["video_sr"], 0.0)
    errors = [
        float((moving * (given[0] - said[0] - batch["video_sr"]).square()).mean())
        for given, said in zip(network.given[1:], network.said[1:], strict=True)
    ]
    assert figures["val/start"] == pytest.approx(errors[0], rel=1e-5)
    assert figures["val/audio_gap"] == pytest.approx((errors[1] - errors[0]) / errors[1], rel=1e-4)
