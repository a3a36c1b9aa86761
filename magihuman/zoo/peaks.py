"""Peak memory of inference in every mode, as a table and as JSON: python -m magihuman.zoo peaks MODEL.

Computed by the formulas of `magihuman.zoo.footprint`, never measured; each number says so of itself.
"""

import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version
from magihuman.zoo.plan import GB, MEMORY, RESERVE, SIZES, peak
from magihuman.zoo.plan_command import check_numbers, infer_request, model_of

FORMAT = "magihuman-peaks/1"
DECODERS = ("wan", "turbo")
WEIGHTS = ("bf16", "fp8", "int4")


def peaks(
    model: str,
    seconds: float = 5.0,
    text: int = 340,
    batch: int = 1,
    guided: bool | None = None,
    cfg_passes: int = 1,
    output: str | None = None,
) -> str:
    """The computed peak of GPU memory for every resolution, decoder, storage of weights and memory= of infer.

    From text to video with the released codecs; products in bfloat16; decimal GB.

    Args:
        model: an architecture or a checkpoint with released codecs, such as 15b
        seconds: length of the clip
        text: tokens of a prompt
        batch: clips at once
        guided: with guidance in the first stage; none is the model's own setting
        cfg_passes: 1, both sides of the guidance at once; 2, one after the other
        output: JSON file to write the numbers to, in bytes

    Raises:
        UserError: a setting that cannot be, or a file that cannot be written.
    """
    check_numbers(seconds=seconds, text=text, batch=batch)
    if cfg_passes not in (1, 2):
        raise UserError(f"cfg_passes={cfg_passes} is unknown; choose one of 1, 2")
    known = model_of(model)
    if not known.released:
        raise UserError(f"{model} has codecs of its own; peaks are for released ones, such as those of 15b")
    guided = known.guided if guided is None else guided
    rows: list[dict[str, Any]] = []
    for resolution, (height, width, enlarged) in SIZES.items():
        request = infer_request(known, (height, width), enlarged, seconds, text, batch, guided, cfg_passes)
        for decoder in DECODERS:
            for weights in WEIGHTS:
                for memory in MEMORY:
                    form = None if weights == "bf16" else weights
                    mode = replace(request, turbo=decoder == "turbo", weights=form, memory=memory)
                    named = {
                        "resolution": resolution,
                        "decoder": decoder,
                        "weights": weights,
                        "memory": memory,
                    }
                    rows.append({**named, "bytes": peak(mode), "how": "computed"})
    settings = {
        "seconds": seconds,
        "text": text,
        "batch": batch,
        "guided": guided,
        "cfg_passes": cfg_passes,
    }
    if output is not None:
        given = [f"{name}={value}" for name, value in settings.items()]
        command = ["python", "-m", "magihuman.zoo", "peaks", model, *given, f"output={output}"]
        values = {
            "format": FORMAT,
            "model": model,
            "parameters": known.config.parameter_count(),
            "settings": settings,
            "assumed_for_cuda_bytes": RESERVE,
            "peaks": rows,
            "provenance": {
                "how": "computed from the config, not measured",
                "command": shlex.join(command),
                "code": code_version(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
        try:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(output), json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write output={output}: {error.strerror or error}") from error
    sides = "with guidance" if guided else "without guidance"
    lines = [
        f"{model}, {seconds:g} s, {sides}, batch {batch}: peak in GB by memory=; computed, none measured",
        " " * 28 + "".join(f"{memory:>10}" for memory in MEMORY),
    ]
    for i in range(0, len(rows), len(MEMORY)):
        name = "  ".join(f"{rows[i][key]:<8}" for key in ("resolution", "decoder", "weights"))
        lines.append(name + "".join(f"{row['bytes'] / GB:>10.2f}" for row in rows[i : i + len(MEMORY)]))
    return "\n".join(lines)
