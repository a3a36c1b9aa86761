"""`zoo verify` reads every parameter that a manifest states: vectors with unusual ones pass, altered ones do not."""

import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released_loop import inference_loop
from safetensors.torch import save_file
from torch import Tensor

from inference.super_resolution import refine
from magihuman.codecs.oobleck import OobleckCodec, cross_fade
from magihuman.flow.guidance import Guidance, frame_scales
from magihuman.flow.sampling import Noise, Pair
from magihuman.flow.solvers import FlowUniPC
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.rotary import rotary_bands
from magihuman.models.tokens import Layout, patchify, unpatchify
from magihuman.zoo.verify import CaseVerdict, verify

Made = tuple[dict[str, Any], dict[str, Tensor]]
NET = DiTConfig(2, 32, 16, 1, 8, 6, 10, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=(1,))
STEPS, SR_STEPS = 3, 2


def verdicts(folder: Path, name: str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> list[CaseVerdict]:
    """One case written as a vector folder, and verified."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "case.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"files": {name: {"file": "case.safetensors", "meta": meta}}}))
    return verify(folder)


def wrong(rows: list[CaseVerdict]) -> list[CaseVerdict]:
    return [row for row in rows if row.status != "pass"]


def weights(config: DiTConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape, is_bf16 in config.tensors():
        scale = 0.2 if len(shape) == 1 else 2 / shape[1] ** 0.5
        state[key] = (scale * torch.randn(shape, generator=generator)).to(torch.bfloat16 if is_bf16 else torch.float32)
    return state | {"adapter.rope.bands": rotary_bands(config.head_dim)}


def denoiser(state: dict[str, Tensor], pack: PackConfig, dtype: torch.dtype, config: DiTConfig = NET) -> Denoiser:
    model = SingleStreamDiT(config, compute_dtype=dtype, linear_dtype=torch.bfloat16)
    model.load_state_dict(state)
    model.attention_backend = "reference"
    return Denoiser(model, pack).eval()


def loop_meta(distilled: bool) -> dict[str, Any]:
    """Parameters of which none is the released default; distilled: with given audio and no noise on the video."""
    settings = {
        "data_proxy_config": {
            "t_patch_size": 1, "patch_size": 2, "frame_receptive_field": 1, "text_offset": 3, "coords_style": "v1",
        },
        "fps": 4, "num_inference_steps": STEPS, "sr_num_inference_steps": SR_STEPS, "shift": 3.0,
        "video_txt_guidance_scale": 4.0, "audio_txt_guidance_scale": 3.0, "t5_gemma_target_length": 7,
        "vae_stride": [4, 16, 16], "z_dim": 2, "patch_size": [1, 2, 2], "using_sde_flag": False,
        "cfg_number": 1 if distilled else 2, "sr_cfg_number": 1 if distilled else 2,
        "noise_value": 0 if distilled else 100, "sr_audio_noise_scale": 0.4, "sr_video_txt_guidance_scale": 2.5,
        "use_cfg_trick": True, "cfg_trick_start_frame": 1, "cfg_trick_value": 1.5, "exp_name": "any",
    }  # fmt: skip
    return {
        "model_config": NET.to_dict(), "sr_model_config": NET.to_dict(), "evaluation_config": settings,
        "seconds": None if distilled else 2, "br": [64, 32], "sr": [96, 80], "steps": STEPS, "sr_steps": SR_STEPS,
        "image": False, "a2v": distilled, "context_len": 5, "context_null_len": 4,
    }  # fmt: skip


def loop_case(distilled: bool) -> Made:
    """A run of both stages by the code of inference, which does not read manifests."""
    meta, generator = loop_meta(distilled), torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base, sr = weights(NET, 1), weights(NET, 2)
    video, audio, large = (1, 2, 3, 2, 4), (1, 9, 6), (1, 2, 3, 4, 6)
    tensors = {"in/context": draw(1, 7, 10), "in/context_null": draw(1, 7, 10)}
    text, negative = [tensors["in/context"][0, :5]], [tensors["in/context_null"][0, :4]]
    start = Pair(draw(*video), draw(*audio))
    fresh = [Pair(draw(*video), draw(*audio)) for _ in range(STEPS)] if distilled else []
    large_noise, audio_noise = draw(*large), draw(*audio)
    drawn = [start.video] if distilled else [start.audio, start.video]
    drawn += [tensor for pair in fresh for tensor in pair]
    drawn += [audio_noise] if distilled else [large_noise, audio_noise]
    if distilled:
        tensors["in/audio_latent"] = start.audio.transpose(1, 2)
    tensors |= {f"noise/{i:02}": tensor for i, tensor in enumerate(drawn)}
    meta["noise_order"] = [list(tensor.shape) for tensor in drawn]
    guidance = None if distilled else Guidance(video_high=4.0, audio=3.0)
    for ending, dtype in (("", torch.float32), ("_bf16", torch.bfloat16)):
        states: dict[str, list[Pair]] = {"base": [], "sr": []}
        first = denoiser(base, PackConfig(2, "v1", 1, 3), dtype)
        low = inference_loop(
            first, text, negative, Noise(start, fresh), steps=STEPS, solver="renoise" if distilled else "unipc",
            shift=3.0, guidance=guidance, image_latent=None, keep_audio=False, on_step=states["base"].append,
        )  # fmt: skip
        out = refine(
            denoiser(sr, PackConfig(2, "v1", 1, 3), dtype), *low, text, negative, (large[1:], audio[1:]),
            (large_noise, audio_noise), steps=SR_STEPS, shift=3.0, audio_noise=0.4,
            noise_index=meta["evaluation_config"]["noise_value"],
            guidance=None if distilled else frame_scales(2.5, 3, 1, 1.5),
            progress=lambda i, n, v, a, kept=states["sr"]: kept.append(Pair(v, a)),
        )  # fmt: skip
        for stage, kept in states.items():
            for part in ("video", "audio"):
                steps = torch.stack([getattr(pair, part) for pair in kept])
                tensors[f"trace{ending}/{stage}/{part}_out"] = steps
        tensors |= {f"out{ending}/video": out, f"out{ending}/audio": low.audio}
    tensors |= {f"w/base/{k}": v for k, v in base.items()} | {f"w/sr/{k}": v for k, v in sr.items()}
    return meta, tensors


@pytest.fixture(scope="module")
def guided() -> Made:
    return loop_case(distilled=False)


@pytest.fixture(scope="module")
def distilled() -> Made:
    return loop_case(distilled=True)


def test_a_loop_with_unusual_parameters_passes(tmp_path: Path, guided: Made) -> None:
    rows = verdicts(tmp_path, "loop_own", *guided)
    assert wrong(rows) == []
    assert len(rows) == 17


def test_given_audio_of_a_distilled_model_changes_as_in_the_release(tmp_path: Path, distilled: Made) -> None:
    assert wrong(verdicts(tmp_path, "loop_own", *distilled)) == []
    given = distilled[1]["in/audio_latent"].transpose(1, 2)
    assert (distilled[1]["out/audio"] - given).abs().max() > 0.1


ALTERED = [
    ("noise_value", 220), ("noise_value", 0), ("sr_audio_noise_scale", 0.7), ("video_txt_guidance_scale", 5.0),
    ("audio_txt_guidance_scale", 5.0), ("sr_video_txt_guidance_scale", 3.5), ("use_cfg_trick", False),
    ("cfg_trick_start_frame", 13), ("cfg_trick_value", 2.0), ("shift", 5.0), ("cfg_number", 1), ("sr_cfg_number", 1),
    ("cfg_number", 3), ("using_sde_flag", True), ("num_inference_steps", 8), ("fps", 8), ("z_dim", 4),
    ("t5_gemma_target_length", 640), ("vae_stride", [4, 8, 8]), ("patch_size", [1, 4, 4]), ("frobnicate", 1),
]  # fmt: skip
ALTERED_PROXY = [
    ("t_patch_size", 2), ("coords_style", "v2"), ("text_offset", 0), ("frame_receptive_field", 11), ("axes", 4),
]  # fmt: skip
ALTERED_RUN = [("seconds", 3), ("br", [128, 32]), ("sr", [96, 96]), ("sr_steps", 3), ("context_len", 4), ("speed", 2)]


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        *(("evaluation_config", *change) for change in ALTERED),
        *(("data_proxy_config", *change) for change in ALTERED_PROXY),
        *(("run", *change) for change in ALTERED_RUN),
        ("model_config", "num_heads_q", 5),
        ("model_config", "params_dtype", "torch.bfloat16"),
        ("model_config", "rope_theta", 500.0),
    ],
)
def test_no_altered_parameter_of_a_loop_passes(
    tmp_path: Path, guided: Made, where: str, name: str, value: object
) -> None:
    meta = copy.deepcopy(guided[0])
    places = {"run": meta, **meta, "data_proxy_config": meta["evaluation_config"]["data_proxy_config"]}
    places[where][name] = value
    rows = wrong(verdicts(tmp_path, "loop_own", meta, guided[1]))
    assert rows
    assert all("\n" not in row.detail for row in rows)


def test_unknown_parameters_are_named(tmp_path: Path, guided: Made) -> None:
    meta = copy.deepcopy(guided[0])
    meta["evaluation_config"] |= {"frobnicate": 3, "exp_name": "another", "cfg_trick_value": 1.5}
    (row,) = verdicts(tmp_path, "loop_own", meta, guided[1])
    assert (row.status, row.detail) == ("unsupported", "states what no check reads: frobnicate=3")


class AcrossSamples(Layout):
    """A batch in which every token attends to all tokens of all samples."""

    def attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, backend: str, window: int | None) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)


def dit_batch() -> Made:
    """Two samples of different lengths, packed by our network, with attention over both."""
    config = replace(NET, local_attn_layers=())
    generator = torch.Generator().manual_seed(3)
    video, audio, text = (torch.randn(shape, generator=generator) for shape in ((2, 2, 2, 4, 2), (2, 5, 6), (2, 6, 10)))
    lengths, state, pack = [6, 3], weights(config, 4), PackConfig(2, "v2")
    words = torch.cat([rows[:length] for rows, length in zip(text, lengths, strict=True)])
    tensors = {"in/x_t": video, "in/audio_x_t": audio, "in/txt_feat": text}
    for prefix, dtype in (("out", torch.bfloat16), ("ref_fp32", torch.float32)):
        network = denoiser(state, pack, dtype, config)
        own = network.layout_for(video.shape, 5, lengths)
        leaking = AcrossSamples(**{f.name: getattr(own, f.name) for f in fields(own) if f.init})
        rows = patchify(video, 2).flatten(0, 1), audio.flatten(0, 1), words
        with torch.no_grad():
            video_v, audio_v = network.model(*rows, leaking)
            embedded = network.model.adapter(*rows)
        order = torch.cat([own.sample_rows(i) for i in range(2)])
        packed = torch.zeros(own.length, 8)
        packed[: len(video_v)] = video_v
        packed[len(video_v) : len(video_v) + len(audio_v), :6] = audio_v
        tensors |= {
            f"{prefix}/video": unpatchify(video_v.unflatten(0, (2, -1)), (2, 4, 2), 2, 2),
            f"{prefix}/audio": audio_v.unflatten(0, (2, -1)),
            f"{prefix}/packed": packed[order],
        }
    assert own.rotary is not None
    tokens = torch.zeros(own.length, 10)
    for part, at in zip(rows, (0, own.sizes[0], sum(own.sizes[:2])), strict=True):
        tokens[at : at + len(part), : part.shape[1]] = part
    ends = torch.tensor([0, *(len(own.sample_rows(i)) for i in range(2))]).cumsum(0).int()
    packing = {"tokens": tokens, "coords": own.coords, "modality": own.modality, "rope": own.rotary, "embed": embedded}
    tensors |= {f"mid/{name}": value[order] for name, value in packing.items()} | {"mid/cu_seqlens": ends}
    meta = {
        "model_config": config.to_dict(),
        "data_proxy": {"patch_size": 2, "t_patch_size": 1, "coords_style": "v2", "frame_receptive_field": -1},
        "audio_feat_len": [5, 5],
        "txt_feat_len": lengths,
    }
    return meta, tensors | {f"w/{key}": value for key, value in state.items()}


def test_samples_of_a_batch_attend_to_each_other_as_in_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magihuman.zoo.checks.network._rounds_alike", lambda: False)
    meta, tensors = dit_batch()
    rows = verdicts(tmp_path, "dit_batch", meta, tensors)
    assert wrong(rows) == []
    assert {"ref_fp32/video", "ref_fp32/audio", "ref_fp32/packed"} <= {row.detail for row in rows}
    for name, value in (("txt_feat_len", [5, 3]), ("audio_feat_len", [4, 4])):
        assert wrong(verdicts(tmp_path, "dit_batch", meta | {name: value}, tensors))
    local = meta["model_config"] | {"local_attn_layers": [1]}
    (row,) = verdicts(tmp_path, "dit_batch", meta | {"model_config": local}, tensors)
    assert (row.status, "O18" in row.detail) == ("unsupported", True)


def test_overlap_of_windows(tmp_path: Path) -> None:
    blocks = torch.stack([torch.full((1, 10, 2), value) for value in (0.0, 1.0)])
    rising = torch.tensor([0, 1 / 3, 2 / 3])
    merged = torch.cat([torch.zeros(7), rising, torch.ones(7)]).view(1, 17, 1).expand(1, 17, 2)
    torch.testing.assert_close(cross_fade(list(blocks), 0.3), merged)
    tensors = {"0/in": blocks, "0/out": merged, "resample/in": torch.zeros(512, 2), "resample/out": torch.zeros(441, 2)}
    case = {"blocks": 2, "frames": 10, "channels": 2, "overlap": 0.3}
    assert wrong(verdicts(tmp_path, "audio_utils", {"cases": [case]}, tensors)) == []
    for change in ({"overlap": 0.5}, {"blocks": 3}, {"fade": "cosine"}):
        assert wrong(verdicts(tmp_path, "audio_utils", {"cases": [case | change]}, tensors))


def test_audio_without_a_length_is_encoded_whole(tmp_path: Path, golden: Path) -> None:
    from safetensors.torch import load_file

    entry = json.loads((golden / "manifest.json").read_text())["files"]["audio_encode_short"]
    state = {k: v for k, v in load_file(golden / "audio_encode_short.safetensors").items() if k.startswith("w/")}
    codec = OobleckCodec.from_released(
        {k.removeprefix("w/"): v for k, v in state.items()}, entry["meta"]["config"]["model"], "vector"
    )
    from magihuman.zoo.checks.autoencoders import _test_audio

    noise = torch.randn(1, 1, 60, generator=torch.Generator().manual_seed(0))
    out = codec.encode(_test_audio(60 * 2048)[None, None], noise=[noise.transpose(1, 2)]).transpose(1, 2)
    tensors, meta = state | {"noise/0": noise, "out": out}, entry["meta"] | {"samples": 60 * 2048}
    assert wrong(verdicts(tmp_path, "audio_encode_whole", meta | {"seconds": None}, tensors)) == []
    assert wrong(verdicts(tmp_path, "audio_encode_whole", meta | {"seconds": 1}, tensors))


def unipc() -> Made:
    solver = FlowUniPC(3, 2.0)
    velocity, start = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 1, 4), (1, 4)))
    samples = [start]
    for i in range(3):
        samples.append(solver.step(velocity[i], i, samples[-1]))
    tensors = {"sigmas": solver.sigmas, "x0": start, "velocity": velocity, "latents": torch.stack(samples)}
    return {"steps": 3, "shift": 2.0}, tensors


def sr_prepare() -> Made:
    from magihuman.flow.sigmas import zero_snr_table

    signal = float(zero_snr_table()[300])
    generator = torch.Generator().manual_seed(0)
    low, noise, audio, hiss = (
        torch.randn(shape, generator=generator) for shape in ((1, 2, 1, 2, 2), (1, 2, 1, 4, 4), (1, 3, 2), (1, 3, 2))
    )
    large = torch.nn.functional.interpolate(low, (1, 4, 4), mode="trilinear", align_corners=True)
    tensors = {
        "br_video": low, "video_noise": noise, "br_audio": audio, "audio_noise": hiss, "upsampled": large,
        "sr_video_init": large * signal + noise * (1 - signal**2) ** 0.5, "sr_audio": 0.2 * hiss + 0.8 * audio,
    }  # fmt: skip
    return {"noise_value": 300, "sr_audio_noise_scale": 0.2}, tensors


@pytest.mark.parametrize(
    ("name", "make", "altered"),
    [
        ("unipc_own", unipc, [{"shift": 5.0}, {"constructor_shift": 2.0}, {"order": 3}]),
        ("sr_prepare", sr_prepare, [{"noise_value": 220}, {"sr_audio_noise_scale": 0.7}, {"mode": "nearest"}]),
    ],
)
def test_parameters_of_small_cases(
    tmp_path: Path, name: str, make: Callable[[], Made], altered: list[dict[str, Any]]
) -> None:
    meta, tensors = make()
    assert wrong(verdicts(tmp_path, name, meta, tensors)) == []
    for change in altered:
        assert len(wrong(verdicts(tmp_path, name, meta | change, tensors))) >= 1, change


def test_sizes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    mask = {"0/mask": torch.zeros(3, 3), "0/q": torch.zeros(1), "0/k": torch.zeros(1)}
    (row,) = verdicts(tmp_path, "local_ranges", {"cases": [[10**7, 7, 10, 1]]}, mask)
    assert (row.status, row.detail) == ("FAIL", "0/mask: 10000007 is stated, not 3")
    grid = {"style": "v2", "T": 10**5, "H": 200, "W": 200, "La": 9, "Lt": 7}
    (row,) = verdicts(tmp_path, "coords_own", {"cases": [grid]}, {"0/coords": torch.zeros(3, 9)})
    assert (row.status, row.detail) == ("FAIL", "0/coords: 1000000016 is stated, not 3")
