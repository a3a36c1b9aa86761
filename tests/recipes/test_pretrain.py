"""Pretraining: what the loss is, what is masked, what is drawn, and that it learns."""

from typing import Any

import pytest
import torch
import training_stub
from small_dit import patchify_target

from magihuman.config import OptimSettings, StrategySettings, TrainerSettings
from magihuman.errors import UserError
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import Sampling, Size
from magihuman.models.config import DiTConfig, PackConfig, TreadConfig
from magihuman.training.context import TrainingContext
from magihuman.training.motion import motion_weight
from magihuman.training.optim import Ramp, build_optimizer
from magihuman.training.rng import BatchRng
from recipes.pretrain import Pretrain

DIT = DiTConfig(2, 32, 16, 1, 12, 4, 5, mm_layers=(0,), gelu7_layers=(0,))


def recipe(**settings: Any) -> Pretrain:
    context = TrainingContext(
        model=DIT, pack=PackConfig(), codecs="stub", contract=training_stub.CONTRACT, size=Size(9, 16, 16),
        null_text=torch.full((1, 5), 7.0), optim=OptimSettings(algorithm="muon", lr=0.02, adamw_lr=0.01),
        trainer=TrainerSettings(100, precision="fp32"), strategy=StrategySettings(),
    )  # fmt: skip
    plain = {
        "text_drop": 0.0,
        "first_frame": 0.0,
        "audio_conditioning": 0.0,
        "sigma": SigmaPrior(),
        "sampling": Sampling(),
    }
    made = Pretrain(context, **{**plain, **settings})
    made.configure_model()
    return made


def rng(count: int, batch: int = 0) -> BatchRng:
    return BatchRng(0, batch, range(count))


class Predicts(torch.nn.Module):
    """Stands in for the network: a fixed velocity, and a record of its inputs."""

    def __init__(self, video: torch.Tensor, audio: torch.Tensor) -> None:
        super().__init__()
        self.video, self.audio = video, audio

    def forward(self, video, audio, text):
        self.seen = video, audio, text
        return self.video, self.audio


def loss_of(made: Pretrain, batch: dict, error_video: torch.Tensor, error_audio: torch.Tensor, batch_number: int = 0):
    """Loss where the network is off by the given errors."""
    noised = made.noised(batch, rng(len(batch["video"]), batch_number), conditioned=True)
    made.denoiser = Predicts(noised.video_target + error_video, noised.audio_target + error_audio)
    return float(made.loss(batch, rng(len(batch["video"]), batch_number))), noised


def test_inputs_lie_on_the_path_and_a_perfect_network_has_no_loss() -> None:
    made, batch = recipe(), training_stub.batch(range(6))
    loss, noised = loss_of(made, batch, torch.zeros(()), torch.zeros(()))
    assert loss == 0
    noise = noised.video_target + batch["video"]
    s = noised.video_sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noised.video, (1 - s) * batch["video"] + s * noise)
    assert abs(float(noise.mean())) < 0.1
    assert 0.9 < float(noise.std()) < 1.1
    torch.testing.assert_close(noised.audio - batch["audio"], noised.audio_sigma.view(-1, 1, 1) * noised.audio_target)


def test_each_modality_is_a_mean_of_its_own_and_weighted() -> None:
    batch = training_stub.batch(range(4))
    loss, _ = loss_of(recipe(video_weight=2.0, audio_weight=0.5), batch, torch.tensor(3.0), torch.tensor(4.0))
    assert loss == pytest.approx(2.0 * 9 + 0.5 * 16)  # 144 video values a sample and 36 of audio count alike


def test_moving_places_count_more() -> None:
    batch = training_stub.batch(range(4))
    still, moving = torch.zeros(batch["video"].shape), torch.zeros(batch["video"].shape)
    still[:, :, :, 0, 0], moving[:, :, :, 3, 2] = 1.0, 1.0
    made = recipe(motion_floor=0.25)
    weight = motion_weight(batch["video"], 0.25)[0, 0, 0]
    ratio = loss_of(made, batch, moving, torch.zeros(()))[0] / loss_of(made, batch, still, torch.zeros(()))[0]
    assert ratio == pytest.approx(float(weight[3, 2] / weight[0, 0]))
    assert ratio == pytest.approx((0.25 + 0.75 * 4) / 0.25)  # a quarter of the places holds all the motion
    ramped = recipe(motion_floor=Ramp(0.25, 1.0))
    ramped.step = ramped.max_steps
    assert loss_of(ramped, batch, moving, torch.zeros(()))[0] == pytest.approx(
        loss_of(ramped, batch, still, torch.zeros(()))[0]
    )


def test_a_given_first_frame_is_clean_and_out_of_the_loss() -> None:
    batch = training_stub.batch(range(4))
    error = torch.zeros(batch["video"].shape)
    error[:, :, 0] = 100.0
    loss, noised = loss_of(recipe(first_frame=1.0), batch, error, torch.zeros(()))
    assert loss == 0
    assert torch.equal(noised.video[:, :, 0], batch["video"][:, :, 0])
    assert not torch.equal(noised.video[:, :, 1:], batch["video"][:, :, 1:])
    error[:, :, 1:] = 2.0
    assert loss_of(recipe(first_frame=1.0), batch, error, torch.zeros(()))[0] == pytest.approx(4.0)


@pytest.mark.parametrize(("given", "other"), [("audio", "video"), ("video", "audio")])
def test_a_given_modality_is_clean_and_out_of_the_loss(given, other) -> None:
    batch = training_stub.batch(range(4))
    made = recipe(**{f"{given}_conditioning": 1.0})
    errors = {given: torch.tensor(100.0), other: torch.tensor(2.0)}
    loss, noised = loss_of(made, batch, errors["video"], errors["audio"])
    assert loss == pytest.approx(4.0)
    assert torch.equal(getattr(noised, given), batch[given])
    assert not torch.equal(getattr(noised, other), batch[other])
    figures = made.meter.flush()
    assert f"loss/{given}" not in figures
    assert figures[f"loss/{other}"] == pytest.approx(4.0)


def test_conditions_come_with_their_probabilities_and_ramps() -> None:
    batch = training_stub.batch(range(400))
    made = recipe(first_frame=0.3, audio_conditioning=Ramp(0.6, 0.0), video_conditioning=0.2, text_drop=0.1)
    noised = made.noised(batch, rng(400), conditioned=True)
    audio_given = (noised.audio_mask.flatten() == 0).float().mean()
    video_given = (noised.video_mask.flatten(1).amax(1) == 0).float().mean()
    assert float(audio_given) == pytest.approx(0.6, abs=0.07)
    assert float(video_given) == pytest.approx(0.2, abs=0.06)
    assert not ((noised.audio_mask.flatten() == 0) & (noised.video_mask.flatten(1).amax(1) == 0)).any()
    first = (noised.video_mask[:, 0, 0].flatten() == 0).float().mean()
    assert float(first) == pytest.approx(0.3 + 0.7 * 0.2, abs=0.07)
    dropped = [float(t.flatten()[0]) == 7.0 and len(t) == 1 for t in noised.text]
    assert sum(dropped) / 400 == pytest.approx(0.1, abs=0.04)
    made.step = made.max_steps
    assert float(made.noised(batch, rng(400), conditioned=True).audio_mask.min()) == 1
    unconditioned = made.noised(batch, rng(400), conditioned=False)
    assert float(unconditioned.video_mask.min()) == 1
    # A changed probability shifts no other draw.
    assert torch.equal(unconditioned.video_sigma, noised.video_sigma)
    with pytest.raises(UserError, match="exceeds 1"):
        recipe(audio_conditioning=0.7, video_conditioning=0.4)


def test_clips_without_sound_and_still_pictures_contribute_what_they_have() -> None:
    for batch in (training_stub.batch(range(3), sound=False), training_stub.batch(range(3), sound=False, frames=1)):
        made = recipe(
            audio_conditioning=0.5, video_conditioning=0.5, first_frame=1.0 if batch["video"].shape[2] == 1 else 0.0
        )
        loss, _ = loss_of(made, batch, torch.tensor(3.0), torch.zeros(3, 0, 4))
        assert loss == pytest.approx(9.0)  # nothing is given: there is no other modality, no other frame
        assert "loss/audio" not in made.meter.flush()
        real = recipe()
        real.loss(batch, rng(3)).backward()
        # Every weight has a gradient (of zero), so that replicas never wait for each other.
        assert all(p.grad is not None for p in real.denoiser.parameters())


def test_the_target_follows_the_output_layout() -> None:
    # O5: the model writes tokens in another channel order than it reads. Tokens in the output order of the true
    # velocity give no loss; in the input order they do.
    from magihuman.models.tokens import patchify

    made, batch = recipe(), training_stub.batch(range(3))
    noised = made.noised(batch, rng(3), conditioned=True)

    class Fixed(torch.nn.Module):
        tokens = patchify_target(noised.video_target, 2).flatten(0, 1)

        def forward(self, video, audio, text, layout):
            return self.tokens, noised.audio_target.flatten(0, 1)

    fixed = Fixed()
    made.denoiser.model.forward = fixed.forward
    assert float(made.loss(batch, rng(3))) == 0
    fixed.tokens = patchify(noised.video_target, 2).flatten(0, 1)
    assert float(made.loss(batch, rng(3))) > 0.1


def test_losses_are_counted_by_noise_level() -> None:
    made, batch = recipe(), training_stub.batch(range(300))
    _, noised = loss_of(made, batch, torch.tensor(2.0), torch.tensor(1.0))
    made.meter.flush()
    error = noised.video_sigma.view(-1, 1, 1, 1, 1).expand(batch["video"].shape)
    loss_of(made, batch, error, torch.zeros(()))
    figures = made.meter.flush()
    bands = [figures[f"video/sigma_{low:.1f}_{low + 0.2:.1f}"] for low in (0.0, 0.2, 0.4, 0.6, 0.8)]
    for low, band in zip((0.0, 0.2, 0.4, 0.6, 0.8), bands, strict=True):
        assert low**2 <= band <= (low + 0.2) ** 2


def train(made: Pretrain, steps: int) -> dict[str, float]:
    """Held-out figures after a short training on clips whose moving part follows their sound."""
    optimizer = build_optimizer(made.denoiser, DIT, made.context.optim)
    held_out = training_stub.batch(range(10_000, 10_016))
    for number in range(steps):
        batch = training_stub.batch(range(16 * number, 16 * number + 16))
        made.loss(batch, BatchRng(0, number, batch["index"])).backward()
        optimizer.step()
        optimizer.zero_grad()
        made.after_step()
    made.denoiser.eval()
    return made.validation_metrics(made.denoiser, held_out, rng(16))


def test_losses_fall_and_motion_weights_with_given_sound_teach_the_video_to_listen() -> None:
    listening = {"sigma": SigmaPrior(coupling="independent"), "motion_floor": 0.2, "audio_conditioning": 0.5}
    fresh = train(recipe(), 0)
    apart, shared = recipe(**listening), recipe()
    after, control = train(apart, 100), train(shared, 100)
    assert fresh["val/sync_gap"] == 0  # the heads start at zero
    for figures in (after, control):
        assert figures["val/video"] < 0.5 * fresh["val/video"]
        assert figures["val/audio"] < 0.5 * fresh["val/audio"]
    # Where all places weigh alike and both modalities are equally noisy, the video hardly learns to use the sound.
    assert control["val/sync_gap"] < 0.06
    assert after["val/sync_gap"] > 0.12
    assert apart.ema.updates == 100


def test_token_routing_is_for_training_only() -> None:
    made, batch = recipe(tread=TreadConfig(0.5, 1, 1)), training_stub.batch(range(2))
    made.denoiser.model.init_weights(1)
    torch.nn.init.normal_(made.denoiser.model.final_linear_video.weight)
    text = batch["text"]
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(made.denoiser(batch["video"], batch["audio"], text)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    made.denoiser.eval()
    assert torch.equal(
        made.denoiser(batch["video"], batch["audio"], text)[0], made.denoiser(batch["video"], batch["audio"], text)[0]
    )
    assert made.ema.module.model.tread is None  # what is sampled never routes
