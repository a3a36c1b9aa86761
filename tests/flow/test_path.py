"""The linear path and reductions over it."""

import torch

from magihuman.flow.guidance import combine
from magihuman.flow.path import add_noise, masked_mean_per_sample, velocity_target, x0_from_velocity


def test_ends_and_slope_of_the_path() -> None:
    x0, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert torch.equal(add_noise(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(3)), noise)
    near = (add_noise(x0, noise, 0.6) - add_noise(x0, noise, 0.4)) / 0.2
    torch.testing.assert_close(near, velocity_target(x0, noise), rtol=1e-4, atol=1e-5)


def test_data_comes_back_at_every_sample_own_level() -> None:
    x0, noise, sigma = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.1, 0.5, 0.9])
    x = add_noise(x0, noise, sigma)
    torch.testing.assert_close(x[1], 0.5 * x0[1] + 0.5 * noise[1])
    torch.testing.assert_close(x0_from_velocity(x, velocity_target(x0, noise), sigma), x0)


def test_half_precision_latents_are_handled_in_fp32() -> None:
    x0, noise = torch.randn(1, 4).half(), torch.randn(1, 4).half()
    assert add_noise(x0, noise, torch.tensor([0.3])).dtype == torch.float32
    assert add_noise(x0, noise, torch.tensor([0.3], dtype=torch.float64)).dtype == torch.float32
    assert torch.equal(add_noise(x0, noise, 0.3), 0.7 * x0.float() + 0.3 * noise.float())
    assert torch.equal(velocity_target(x0, noise), noise.float() - x0.float())
    assert torch.equal(x0_from_velocity(x0, noise, 0.3), x0.float() - 0.3 * noise.float())


def test_mean_counts_only_what_the_mask_names() -> None:
    values = torch.arange(12.0).view(2, 1, 3, 2)
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0]]).view(2, 1, 3, 1)
    assert masked_mean_per_sample(values, mask).tolist() == [0.5, 0.0]  # the second sample has no place at all
    assert masked_mean_per_sample(values).tolist() == [2.5, 8.5]
    assert masked_mean_per_sample(torch.zeros(2, 0, 4)).tolist() == [0.0, 0.0]


def test_mean_does_not_depend_on_how_many_places_others_have() -> None:
    values = torch.randn(2, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    alone = masked_mean_per_sample(values[:1, :2])
    torch.testing.assert_close(masked_mean_per_sample(values, mask)[:1], alone)


def test_empty_samples_have_finite_gradients() -> None:
    values = torch.randn(2, 5, requires_grad=True)
    masked_mean_per_sample(values, torch.zeros(2, 5)).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.zeros(2, 5))


def test_guidance_of_one_is_the_positive_prediction() -> None:
    positive, negative = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    torch.testing.assert_close(combine(positive, negative, 1.0), positive)
    assert torch.equal(combine(positive, negative, 0.0), negative)
    per_frame = combine(positive, negative, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(per_frame[..., 2], negative[..., 2] + 3 * (positive - negative)[..., 2])
