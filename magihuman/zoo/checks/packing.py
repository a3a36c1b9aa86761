"""Coordinates, rotary tables, packing, local windows, text padding. Integers and layouts must match exactly."""

import torch
from torch import Tensor

from magihuman.models.attention import local_mask, local_ranges
from magihuman.models.rotary import apply_rotary, rotary_bands, rotary_table
from magihuman.models.tokens import Layout, pad_or_trim, patchify, unpatchify
from magihuman.zoo.checks import Result, VectorCase, agree, compare

ROTARY = 1e-6
PATCH, RECEPTIVE_FIELD = 2, 11  # the data proxy's defaults, for cases that do not state them


def check_coords(case: VectorCase) -> list[Result]:
    """Coordinates, modality ids and rotary tables of several grids; one application of a table."""
    results = []
    tables = {}
    for i, grid in enumerate(case.meta["cases"]):
        patch = grid.get("patch", PATCH)
        stored = case.tensors[f"{i}/coords"]  # decides how much memory is taken
        tokens = grid["T"] * (grid["H"] // patch) * (grid["W"] // patch) + grid["La"] + grid["Lt"]
        if len(stored) != tokens:
            results.append(agree(f"{i}/coords", len(stored), tokens))
            continue
        layout = Layout.build(
            (grid["T"], grid["H"] // patch, grid["W"] // patch),
            grid["La"],
            [grid["Lt"]],
            coords_style=grid["style"],
            text_offset=grid.get("text_offset", 0),
        )
        results.append(compare(f"{i}/coords", layout.coords, case.tensors[f"{i}/coords"]))
        results.append(compare(f"{i}/modality", layout.modality, case.tensors[f"{i}/modality"]))
        for name, stored in case.group(f"{i}/rope_hd").items():
            tables[i, name] = rotary_table(layout.coords, rotary_bands(int(name)))
            results.append(compare(f"{i}/rope_hd{name}", tables[i, name], stored, ROTARY))
    for name, stored in case.group("bands_hd").items():
        results.append(compare(f"bands_hd{name}", rotary_bands(int(name)), stored, ROTARY))
    if "apply/q" in case.tensors:
        q = case.tensors["apply/q"]
        rotated = apply_rotary(q, tables[0, str(q.shape[-1])])
        results.append(compare("apply/out", rotated, case.tensors["apply/out"], ROTARY))
    return results


def check_data_proxy(case: VectorCase) -> list[Result]:
    """Latents to the packed sequence of all samples one after another, and the model's output back."""
    meta, patch = case.meta, case.meta["patch"]
    video, audio = case.tensors["in/x_t"], case.tensors["in/audio"][:, : meta["audio_len"]]
    shape = [meta[name] for name in ("B", "z", "T", "H", "W")]
    grid = (video.shape[2], video.shape[3], video.shape[4])
    text = [features[:length] for features, length in zip(case.tensors["in/text"], meta["text_lens"], strict=True)]
    layout = Layout.build(
        (grid[0], grid[1] // patch, grid[2] // patch),
        audio.shape[1],
        [len(t) for t in text],
        coords_style=meta["style"],
        text_offset=meta.get("text_offset", 0),
    )
    tokens = patchify(video, patch)
    width = max(tokens.shape[-1], audio.shape[-1], text[0].shape[-1])
    rows = [*tokens.flatten(0, 1).split(1), *audio.flatten(0, 1).split(1), *torch.cat(text).split(1)]
    packed = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])
    # The vectors keep samples one after another; ours are modality-major.
    order = torch.cat([layout.sample_rows(i) for i in range(layout.batch)])
    lengths = layout.cu_seqlens.diff()
    results = [
        agree("latents", list(video.shape), shape),
        compare("video_tokens", tokens, case.tensors["out/video_tokens"]),
        compare("packed", packed[order], case.tensors["out/packed"]),
        compare("coords", layout.coords[order], case.tensors["out/coords"]),
        compare("modality", layout.modality[order], case.tensors["out/modality"]),
        compare("sample lengths", lengths, case.tensors["out/cu_seqlens"].diff().sort().values),
        compare("max_seqlen", torch.tensor(layout.max_seqlen), case.tensors["out/max_seqlen"]),
    ]
    output = torch.empty_like(case.tensors["unpack_in"])
    output[order] = case.tensors["unpack_in"]  # into our packing, from which the model's output is unpacked
    video_rows, audio_rows, _ = output.split(layout.sizes)
    channels = video.shape[1]
    video_out = video_rows[:, : channels * patch**2].unflatten(0, (layout.batch, -1))
    audio_out = audio_rows[:, : audio.shape[-1]].unflatten(0, (layout.batch, -1))
    results += [
        compare("unpack_video", unpatchify(video_out, grid, patch, channels), case.tensors["unpack_video"]),
        compare("unpack_audio", audio_out, case.tensors["unpack_audio"]),
    ]
    return results + range_results(case, layout, meta.get("frame_receptive_field", RECEPTIVE_FIELD), "out")


def range_results(case: VectorCase, layout: Layout, receptive: int, prefix: str) -> list[Result]:
    """Compare stored query and key ranges, where the case has them."""
    if f"{prefix}/q_ranges" not in case.tensors:
        return []
    others = layout.audio_len + layout.text_lens[0]
    queries, keys = local_ranges(layout.video_len, others, layout.frames, receptive)
    return [
        compare("q_ranges", queries, case.tensors[f"{prefix}/q_ranges"]),
        compare("k_ranges", keys, case.tensors[f"{prefix}/k_ranges"]),
    ]


def check_local_ranges(case: VectorCase) -> list[Result]:
    """Range pairs, the mask, and that the pairs cover the mask without touching a key twice."""
    results = []
    for i, (video, others, frames, receptive) in enumerate(case.meta["cases"]):
        length = case.tensors[f"{i}/mask"].shape[0]
        if length != video + others:
            results.append(agree(f"{i}/mask", length, video + others))
            continue
        queries, keys = local_ranges(video, others, frames, receptive)
        covered = _cover(queries, keys, video + others)
        stored = case.tensors[f"{i}/mask"]
        results += [
            compare(f"{i}/q", queries, case.tensors[f"{i}/q"]),
            compare(f"{i}/k", keys, case.tensors[f"{i}/k"]),
            compare(f"{i}/mask", local_mask(video, others, frames, receptive), stored),
            compare(f"{i}/mask from ranges", covered, stored),
        ]
    return results


def _cover(queries: Tensor, keys: Tensor, length: int) -> Tensor:
    counts = torch.zeros(length, length, dtype=torch.int64)
    for (q0, q1), (k0, k1) in zip(queries.tolist(), keys.tolist(), strict=True):
        counts[q0:q1, k0:k1] += 1
    return counts


def check_text_pad(case: VectorCase) -> list[Result]:
    """Text features padded or cut to a fixed length."""
    padded, length = pad_or_trim(case.tensors["in"], case.tensors["out"].shape[1])
    true_length = torch.tensor(case.meta["length_returned"])
    return [compare("out", padded, case.tensors["out"]), compare("length", torch.tensor(length), true_length)]
