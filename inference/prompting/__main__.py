"""`python -m inference.prompting`: rewrites a plain request into the model's prompt format, or checks a prompt.

What to write into its three parts is said in inference/README.md, "Write prompts".
"""

import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from inference.prompting.chat_client import Chat, Message, endpoint_chat, transformers_chat
from inference.prompting.format import NO_SOUND, QUOTED, Report, check_form, letters, spaced
from inference.requests import read_requests
from magihuman.errors import UserError
from magihuman.io.text import TABLES, read_text

PROGRAM = "python -m inference.prompting"

SYSTEM = f"""\
You write prompts for a model that makes short clips of people with their speech. You get a plain request. Reply with \
the prompt alone: plain text, no introduction, no remarks, no markup, in exactly this layout:

(one paragraph of description)

Dialogue:
<speaker, language>: "words"

Background Sound:
<sounds>

Description: 150 to 200 words of English in one paragraph. Begin with the person's age, hair and clothes and the \
place with its light. Then tell what can be seen and heard in the course of the clip, above all in the face: eyes, brows, \
mouth, small movements of head and hands, the tone of the voice, turns of mood. Quote the spoken words at the moment \
when they are said, followed by how they are said. One continuous near shot with a still camera. \
If the request asks for large movements, let the same feeling show in face and upper body. Invent details that \
fit; contradict nothing that is requested. If the request says that a picture is given, describe only what it says of \
it and what changes; if it says that sound is given, the dialogue is what is said there.
Dialogue: the same words again, one line per turn. In angle brackets stand who speaks, told apart by what is seen, and \
the language; then a colon; then the words in double quotation marks. Words that the request gives are repeated exactly, \
in their language. If it wants speech but gives no words, write one or two short sentences. If nobody speaks, leave this \
part out.
Background Sound: a few words in angle brackets on the most prominent noise or music, or {NO_SOUND}.
Put a space between every two Chinese, Japanese or Korean characters. The whole has at most 400 words.
"""


class BadAnswer(Exception):
    """The chat model twice gave a prompt whose form is wrong."""


def rewrite(request: str, chat: Chat, seconds: float | None = None) -> str:
    """A prompt in good form that a chat model made of `request`.

    An answer with faults is sent back once with the faults named.

    Args:
        request: what is wanted, in any words and language; words within quotation marks are kept.
        chat: from `inference.prompting.chat_client`.
        seconds: the clip's length if it is fixed; the dialogue has to fit.

    Raises:
        BadAnswer: the second answer has faults too.
        UserError: no answer.
    """
    limit = f"\n\nThe clip has {seconds:g} seconds: the dialogue must fit." if seconds is not None else ""
    talk: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request.strip() + limit}]
    faults: list[str] = []
    for _ in range(2):
        answer = chat(talk)
        prompt = tidy(answer)
        faults = [*check_form(prompt, seconds).faults, *_changed_words(request, prompt)]
        if not faults:
            return prompt
        named = "\n".join(f"- {fault}" for fault in faults)
        talk += [
            {"role": "assistant", "content": prompt or "(nothing)"},
            {"role": "user", "content": f"This has faults:\n{named}\nReply with the corrected prompt alone."},
        ]
    raise BadAnswer(
        f"the chat model's answer has a wrong form, also after a second try: {faults[0].rpartition('; ')[0]}"
        f"{f' and {len(faults) - 1} more' if len(faults) > 1 else ''}; try another model or simpler words"
    )


def tidy(answer: str) -> str:
    """An answer without what chat models wrap around it (thoughts, code fences, bold headings, control characters), and
    with spaces between Chinese, Japanese and Korean characters."""
    text = re.sub(r"<think>.*?(?:</think>|\Z)|\A.*?</think>", "", answer, flags=re.DOTALL)
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cc")
    text = re.sub(r"\A\s*```\w*\n(.*?)\n?```\s*\Z", r"\1", text, flags=re.DOTALL)
    heading = r"^[^\S\n]*[#*_]*[^\S\n]*(dialogue|background sound)[*_]*[^\S\n]*[:：][*_]*[^\S\n]*"
    text = re.sub(heading, lambda m: f"{m[1].title()}: ", text, flags=re.IGNORECASE | re.MULTILINE)
    return spaced("\n".join(line.rstrip() for line in text.strip().splitlines()))


def _changed_words(request: str, prompt: str) -> list[str]:
    """Quoted words of the request that the prompt does not have; they may be a sign's, so anywhere will do."""
    wanted = [match.group()[1:-1] for match in QUOTED.finditer(request)]
    return [
        f"the requested words “{words}” are missing; repeat them exactly, speech under 'Dialogue:'"
        for words in wanted
        if letters(words) not in letters(prompt)
    ]


def make(
    request: str | None = None,
    check: str | None = None,
    model: str | None = None,
    endpoint: str | None = None,
    api_key: str | None = None,
    seconds: float | None = None,
    timeout: float = 120.0,
    max_tokens: int = 4096,
) -> int:
    """Turn a plain request into a prompt for the model, or check a prompt's form.

    Prints the prompt (remarks go to stderr); with check=, the faults with their remedies. Exit status 0: good form;
    1: a fault of form, in the checked text or in the chat model's answer; 2: anything else.

    Args:
        request: what is wanted in plain words, or a text file with it; words in quotation marks are kept; the key may
            be left out.
        check: a prompt, a text file with one, or a table as infer's prompts= takes; needs no model.
        model: the chat model: a transformers folder or cached Hub id; with endpoint=, its name there.
        endpoint: an OpenAI-compatible address such as http://127.0.0.1:8000/v1.
        api_key: name of the environment variable with the endpoint's key; if not given, OPENAI_API_KEY is sent where
            it is set, but over plain http to this machine only.
        seconds: length of the clip, if it is fixed: the dialogue has to fit.
        timeout: seconds to wait for the endpoint, in each of up to three attempts.
        max_tokens: longest answer of a transformers model.

    Returns:
        The exit status, 0 or 1.

    Raises:
        UserError: bad settings; no answer from the model.
    """
    if (request is None) == (check is None):
        raise UserError("give either request=TEXT (to rewrite it) or check=TEXT (to check a prompt)")
    for name, value in (("seconds", seconds), ("timeout", timeout), ("max_tokens", max_tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be more than 0, not {value:g}")
    if check is not None:
        return _checked(check, seconds)
    plain = _text(request or "", "request")
    if not re.search(r"\w", plain):
        raise UserError("request is empty; say what the clip shall show")
    if endpoint is not None:
        chat = endpoint_chat(endpoint, model, api_key, timeout)
    elif model is not None:
        chat = transformers_chat(model, max_tokens)
    else:
        raise UserError("name a chat model: model=FOLDER (transformers) or endpoint=URL (OpenAI-compatible)")
    try:
        prompt = rewrite(plain, chat, seconds)
    except BadAnswer as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for remark in _remarks(check_form(prompt, seconds)):
        print(remark, file=sys.stderr)
    print(prompt)
    return 0


def _checked(given: str, seconds: float | None) -> int:
    """Print the faults and notes of a prompt, or of all in a file; the exit status."""
    if Path(given).suffix.lower() in TABLES:
        prompts = {f"{request.name}: ": request.prompt for request in read_requests(given, 0)}
    else:
        prompts = {"": _text(given, "check")}
    bad = 0
    for name, prompt in prompts.items():
        report = check_form(prompt, seconds)
        bad += bool(report.faults)
        for line in [*(f"fault: {fault}" for fault in report.faults), *_remarks(report)]:
            print(f"{name}{line}")
    if len(prompts) > 1 and bad:
        print(f"{bad} of {len(prompts)} prompts have faults")
    else:
        print("the form has faults" if bad else "the form is good")
    return min(bad, 1)


def _remarks(report: Report) -> list[str]:
    lines = [f"note: {note}" for note in report.notes]
    needs = "no speech" if report.seconds is None else f"the dialogue needs about {report.seconds} s"
    return [*lines, f"note: {needs}"]


def _text(given: str, what: str) -> str:
    """The content of the file `given`, or `given` itself where it is no file.

    Raises:
        UserError: it looks like a file that does not exist, or cannot be read as text.
    """
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):  # too long for a path
        is_file = False
    if not is_file:
        if re.fullmatch(r"\S+\.(txt|md|text)|[./~]\S*/\S+", given):
            raise UserError(f"{what}={given}: no such file")
        return given
    return read_text(given, f"{what}={given}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: with status 0, 1 or 2 as `make` says, 130 after Ctrl-C.
    """
    from magihuman.cli import run

    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if not re.match(r"-|help\Z|\w+=", words[0]):
        words[0] = f"request={words[0]}"
    raise SystemExit(run(make, PROGRAM, words))


if __name__ == "__main__":
    main()
