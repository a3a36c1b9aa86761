"""Text features of one prompt as a file, such as of the negative prompt for `recipe.negative` of a distillation.

MAGIHUMAN_RELEASE=CHECKOUT python -m inference.encode_text output=negative.safetensors
python -m inference.encode_text text="blurred, shaking" output=negative.safetensors
"""

import hashlib

from magihuman.codecs.bundle import allow_codecs


def make(
    output: str, text: str | None = None, file: str | None = None, codecs: str = "released", device: str = "auto"
) -> str:
    """Encode one text and write its features.

    Args:
        output: the safetensors file: text [S,Ct] fp16
        text: what to encode; none takes the release's negative prompt, from its code in the folder MAGIHUMAN_RELEASE
        file: a text file instead of text
        codecs: whose text encoder: released, tiny, scene, or package.module:function of your own
        device: auto, cpu or cuda

    Returns:
        what was written.

    Raises:
        UserError: both texts are given, there is none, or the text encoder is not there.
    """
    from inference.conditioning import read_negative_prompt, released_negative_prompt
    from inference.loading import choose_device
    from magihuman.codecs.bundle import load_bundle
    from magihuman.errors import UserError
    from magihuman.io.text_features import write_text_features

    if text is not None and file is not None:
        raise UserError("give text= or file=, not both")
    warning = None
    if file is not None:
        text, warning = read_negative_prompt(file, "file")
    elif text is None:
        text = released_negative_prompt()
    allow_codecs(codecs)
    bundle = load_bundle(codecs, choose_device(device))
    features = bundle.text_encoder.encode([text])[0]
    facts = {"encoder": bundle.contract.text_encoder, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_text_features(output, features, facts)
    said = f"{output}: {features.shape[0]} tokens of {len(text)} characters"
    return said if warning is None or codecs != "released" else f"note: {warning}\n{said}"


if __name__ == "__main__":
    from magihuman.cli import run

    print(run(make, "python -m inference.encode_text"))
