"""Image and video pre- and post-processing, and the inputs of super-resolution."""

import numpy as np
import PIL
import torch
from PIL import Image

from magihuman.flow.super_resolution import (
    AUDIO_NOISE,
    NOISE_INDEX,
    noise_audio,
    noise_video,
    signal_amplitude,
    upsample_latents,
)
from magihuman.media.images import crop_to_aspect, frames_to_uint8, image_to_frame, resize_frames
from magihuman.zoo.checks import Result, VectorCase, agree, compare

OTHER_PILLOW = 2 / 255 * 2
"""Allowed where another Pillow made the vectors: its Lanczos filter may round by two levels."""
SUPER_RESOLUTION = 1e-6


def check_image(case: VectorCase) -> list[Result]:
    """The crop to the aspect ratio, then resizing and scaling."""
    tolerance = 0.0 if case.meta.get("pillow") == PIL.__version__ else OTHER_PILLOW
    results = []
    for i, sizes in enumerate(case.meta["cases"]):
        image = Image.fromarray(case.tensors[f"{i}/image"].numpy())
        height, width = sizes["target_h"], sizes["target_w"]
        stored = list(case.tensors[f"{i}/preprocessed"].shape[-2:])
        if stored != [height, width]:
            results.append(agree(f"{i}/preprocessed", stored, [height, width]))
            continue
        crop = crop_to_aspect(image, height, width)
        results.append(agree(f"{i}/source", image.size, (sizes["src_w"], sizes["src_h"])))
        results.append(agree(f"{i}/crop", list(crop.size), sizes["crop_size"]))
        cropped = torch.from_numpy(np.array(crop))
        frame = image_to_frame(image, height, width)[:, :, 0]
        results.append(compare(f"{i}/cropped", cropped, case.tensors[f"{i}/cropped"]))
        results.append(compare(f"{i}/preprocessed", frame, case.tensors[f"{i}/preprocessed"], tolerance))
    return results


def check_video_uint8(case: VectorCase) -> list[Result]:
    """8-bit frames, and finished frames resized (`up_MODE_wW_hH`)."""
    frames = frames_to_uint8(case.tensors["video"])[0]
    results = [compare("uint8", frames, case.tensors["uint8"])]
    for name, stored in case.group("up_").items():
        mode = name.split("_")[0]
        resized = resize_frames(frames, stored.shape[1], stored.shape[2], mode)  # type: ignore[arg-type]
        results.append(compare(f"up_{name}", resized, stored))
    return results


def check_sr_prepare(case: VectorCase) -> list[Result]:
    """Upsampled latents, their noised version, and the noised audio."""
    tensors, meta = case.tensors, case.meta
    index, scale = meta.get("noise_value", NOISE_INDEX), meta.get("sr_audio_noise_scale", AUDIO_NOISE)
    height, width = tensors["upsampled"].shape[-2:]
    upsampled = upsample_latents(tensors["br_video"], height, width)
    video = noise_video(upsampled, tensors["video_noise"], signal_amplitude(index))
    audio = noise_audio(tensors["br_audio"], tensors["audio_noise"], scale)
    return [
        compare("upsampled", upsampled, tensors["upsampled"], SUPER_RESOLUTION),
        compare("sr_video_init", video, tensors["sr_video_init"], SUPER_RESOLUTION),
        compare("sr_audio", audio, tensors["sr_audio"], SUPER_RESOLUTION),
    ]
