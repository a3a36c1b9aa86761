"""Chat models that write text for us: behind an OpenAI-compatible address, or loaded with transformers.

Both are functions from a conversation (`{"role": ..., "content": ...}`, as both worlds have it) to the answer's text.
"""

import json
import os
import re
import socket
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, IncompleteRead
from typing import Any

from magihuman.errors import UserError
from magihuman.schema import one_line

Message = dict[str, str]
Chat = Callable[[list[Message]], str]

DEFAULT_KEY = "OPENAI_API_KEY"
_LARGEST = 4 * 2**20  # bytes of an answer; a prompt has some thousands
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever the server says, and turn POST into GET."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def endpoint_chat(endpoint: str, model: str | None, api_key: str | None, timeout: float) -> Chat:
    """A chat with an OpenAI-compatible server.

    Args:
        endpoint: address up to `/v1`, or the whole of `.../chat/completions`.
        model: its name there; None sends none (servers with one model need none).
        api_key: name of the environment variable that holds the key. None: OPENAI_API_KEY, if it is set and the
            way is https or stays on this machine.
        timeout: seconds for one whole answer.

    Raises:
        UserError: the address or the variable is unusable; on a call: whatever keeps the answer from coming.
    """
    url = _address(endpoint)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    key, variable = _key(api_key, url)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    opener = urllib.request.build_opener(_NoRedirect)

    def answer(messages: list[Message]) -> str:
        body: dict[str, Any] = {"messages": messages, "stream": False}
        if model:
            body["model"] = model
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        late = UserError(f"{url} gave no answer within {timeout:g} s; try again or set a larger timeout=")
        try:
            raw = _read(opener, request, timeout)
        except urllib.error.HTTPError as error:
            raise UserError(_refusal(error, url, key, variable)) from None
        except TimeoutError:
            raise late from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise late from None
            name = isinstance(error.reason, socket.gaierror)
            hint = "check the address and this machine's network" if name else "is the server running there?"
            raise UserError(f"cannot reach {url}: {_plain(error.reason)}; {hint}") from None
        except (HTTPException, OSError) as error:
            raise UserError(f"the connection to {url} broke: {_plain(error)}; try again") from None
        return _content(raw, url)

    return answer


def _address(endpoint: str) -> str:
    try:
        parts = urllib.parse.urlsplit(endpoint.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets without partner, or a port that is no number
        usable = None
    if not usable or not re.fullmatch(r"[!-~]+", endpoint.strip()):
        raise UserError(f"endpoint={endpoint!r} is no address; write for example http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            "endpoint= must not hold a key; put it into an environment variable and name that: api_key=NAME"
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _key(api_key: str | None, url: str) -> tuple[str, str]:
    """(the key or "", the variable it is from)."""
    variable = api_key or DEFAULT_KEY
    # What looks like a key is not shown again: it would end in logs.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError(
            "api_key= takes the name of an environment variable (in capitals) that holds the key, not the key"
        )
    key = os.environ.get(variable, "").strip()
    if api_key and not key:
        raise UserError(f"api_key={api_key}: that environment variable is not set; export {api_key}=...")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {variable} holds characters that no key has; set it again")
    parts = urllib.parse.urlsplit(url)
    if not api_key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        key = ""  # nobody asked to send it in the clear
    return key, variable


def _read(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float) -> bytes:
    """The whole body; `timeout` bounds the sum of all waiting, not each piece."""
    end = time.monotonic() + timeout
    with opener.open(request, timeout=timeout) as response:
        pieces, size = [], 0
        while piece := response.read1(65536):
            pieces.append(piece)
            size += len(piece)
            if size > _LARGEST:
                raise UserError(f"{request.full_url} sent more than {_LARGEST >> 20} MiB; is it a chat API?")
            if time.monotonic() > end:
                raise TimeoutError
        if response.length:  # of what Content-Length promised; read1 itself is content with less
            raise IncompleteRead(b"".join(pieces), response.length)
    return b"".join(pieces)


def _refusal(error: urllib.error.HTTPError, url: str, key: str, variable: str) -> str:
    """One line for an HTTP status, with what the server says of it."""
    try:
        said = _server_message(error.read(65536))
    except (HTTPException, OSError):
        said = ""
    if key:
        said = said.replace(key, "***")
    said = f" ({said})" if said else ""
    if error.code in (401, 403):
        advice = (
            f"check {variable}" if key else f"export {variable}=... or name another variable: api_key=NAME"
        )
        return f"{url} refuses {'the key' if key else 'a call without key'}: {error.code}{said}; {advice}"
    if error.code == 404:
        return f"{url} knows no such page or model: 404{said}; check endpoint= (most end in /v1) and model="
    if error.code == 429:
        return f"{url} has a limit or quota that is used up: 429{said}; wait, or use another endpoint="
    if 300 <= error.code < 400:
        where = _plain(error.headers.get("Location", "nowhere"))
        return (
            f"{url} points to {where} ({error.code}), which is not followed; give that address as endpoint="
        )
    remedy = "try again later" if error.code >= 500 else "check model= and the server's settings"
    return f"{url} answers with error {error.code}{said}; {remedy}"


def _server_message(raw: bytes) -> str:
    try:
        found = json.loads(raw)
    except ValueError:
        return ""
    found = found.get("error", found) if isinstance(found, dict) else found
    found = found.get("message", "") if isinstance(found, dict) else found
    return _plain(found) if isinstance(found, str) else ""


def _content(raw: bytes, url: str) -> str:
    try:
        choice = json.loads(raw)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        shown = _plain(raw[:80].decode("utf-8", "replace"))
        raise UserError(
            f"{url} does not answer as a chat API does (starts {shown!r}); check endpoint="
        ) from None
    if choice.get("finish_reason") == "length":
        raise UserError(f"the answer of {url} was cut off at the server's length limit; raise it there")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{url} gave an empty answer; try again or another model=")
    return content


def _plain(text: object) -> str:
    """Foreign text as one short line without control characters."""
    line = one_line(str(text))
    return "".join(c for c in line if not unicodedata.category(c).startswith("C"))[:200]


def transformers_chat(model: str, max_tokens: int) -> Chat:
    """A chat with a model of this machine, on the GPU if there is one; greedy, so answers repeat.

    Args:
        model: a folder, or a Hub id that is in the cache; nothing is downloaded.
        max_tokens: longest answer.

    Raises:
        UserError: absent, incomplete, damaged, or not a chat model; on a call: an answer that was cut off.
    """
    folder = _model_folder(model)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto", output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds for damaged or foreign files
        raise UserError(f"model={model} cannot be loaded as a chat model: {_plain(error)}") from error
    network, report = loaded
    if report["missing_keys"]:  # transformers fills them with random numbers
        raise UserError(f"model={model} lacks {len(report['missing_keys'])} tensors; fetch it again")
    if not tokenizer.chat_template:
        raise UserError(f"model={model} has no chat template; name an instruction-tuned model")
    network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer(messages: list[Message]) -> str:
        inputs = _template(tokenizer, messages).to(network.device)
        with torch.inference_mode():
            tokens = network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        ends = network.generation_config.eos_token_id
        if len(new) >= max_tokens and int(new[-1]) not in (ends if isinstance(ends, list) else [ends]):
            raise UserError(f"the answer of {model} was cut off at {max_tokens} tokens; raise max_tokens=")
        return str(tokenizer.decode(new, skip_special_tokens=True))

    return answer


def _template(tokenizer: Any, messages: list[Message]) -> Any:
    """Token ids of the conversation; some models' templates refuse a system turn, which then opens the first."""
    from jinja2.exceptions import TemplateError

    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError:
        system, first, *rest = messages
        opening = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        return tokenizer.apply_chat_template([opening, *rest], **options)


def _model_folder(model: str) -> str:
    from pathlib import Path

    from magihuman.io.released_files import is_hub_id

    if is_hub_id(model):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(model, local_files_only=True)
        except (OSError, ValueError):
            raise UserError(
                f"model={model} is not on this machine; fetch it with: hf download {model}"
            ) from None
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model={model} is no folder of a transformers model; name one, a Hub id, or an endpoint="
        )
    return str(folder)
