"""Clients of chat models that write prompts: an OpenAI-compatible server, or a model loaded with transformers.

    chat = endpoint_chat("http://127.0.0.1:8000/v1", model=None, api_key=None, timeout=120)
    chat([{"role": "user", "content": "Say hello."}])

Both are functions from a conversation (`{"role": ..., "content": ...}`) to the text of the answer.
"""

import os
import re
import socket
import unicodedata
import urllib.parse
from collections.abc import Callable
from typing import Any

from magihuman.errors import UserError
from magihuman.schema import one_line

Message = dict[str, str]
Chat = Callable[[list[Message]], str]

DEFAULT_KEY = "OPENAI_API_KEY"
RETRIES = 2  # after lost connections, timeouts, rate limits and errors of the server
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def endpoint_chat(endpoint: str, model: str | None, api_key: str | None, timeout: float) -> Chat:
    """A chat with an OpenAI-compatible server, by the `openai` client.

    Args:
        endpoint: address up to `/v1`, or the whole of `.../chat/completions`.
        model: its name there; None sends none (servers with one model need none).
        api_key: name of the environment variable that holds the key. None: OPENAI_API_KEY, if it is set and the
            connection is https or stays on this machine.
        timeout: seconds to wait for the server, in each of up to 1 + RETRIES attempts.

    Raises:
        UserError: the address or the variable is unusable, or the client is not installed; on a call: no answer.
    """
    url = _address(endpoint)
    key, variable = _key(api_key, url)
    try:
        import openai
    except ImportError:
        raise UserError("endpoint= needs the openai client: pip install 'magihuman[prompts]'") from None

    client = openai.OpenAI(
        base_url=url,
        api_key=key or "none",
        timeout=timeout,
        max_retries=RETRIES,
        # A redirect would send the key to whichever address the server names.
        http_client=openai.DefaultHttpxClient(follow_redirects=False),
    )

    def answer(messages: list[Message]) -> str:
        # Without these, the client insists on a model and sends a header for a key that does not exist.
        options: Any = {"model": model or openai.omit, "messages": messages}
        headers: Any = {} if key else {"Authorization": openai.Omit()}
        try:
            found = client.chat.completions.create(**options, extra_headers=headers)
        except openai.APITimeoutError:
            raise UserError(f"{url} gave no answer within {timeout:g} s; try again or set a larger timeout=") from None
        except openai.APIConnectionError as error:
            raise UserError(_unreachable(error, url)) from None
        except openai.APIStatusError as error:
            raise UserError(_refusal(error, url, key, variable)) from None
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(f"{url} does not answer as a chat API does ({_plain(error)})") from None
        return _content(found, url)

    return answer


def _address(endpoint: str) -> str:
    """The address up to /v1, checked."""
    try:
        parts = urllib.parse.urlsplit(endpoint.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an unmatched bracket, or a port that is not a number
        usable = None
    if not usable or not re.fullmatch(r"[!-~]+", endpoint.strip()):
        raise UserError(f"endpoint={endpoint!r} is not an address; write for example http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            "endpoint= must not hold a key; put it into an environment variable and name that: api_key=NAME"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _key(api_key: str | None, url: str) -> tuple[str, str]:
    """(the key or "", the variable it is from)."""
    variable = api_key or DEFAULT_KEY
    # A value that looks like a key is not repeated in the message, which may end in logs.
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
        key = ""  # only a named variable is sent without encryption
    return key, variable


def _unreachable(error: Exception, url: str) -> str:
    """One line for a connection that failed, with the cause at the end of the chain of exceptions."""
    cause: BaseException = error
    while (below := cause.__cause__ or cause.__context__) is not None:
        cause = below
    hint = "is the server running there?"
    if isinstance(cause, socket.gaierror):
        hint = "check the address and this machine's network"
    return f"cannot reach {url}: {_plain(cause)}; {hint}"


def _refusal(error: Any, url: str, key: str, variable: str) -> str:
    """One line for an HTTP status, with the server's message."""
    status = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    message = _plain(body.get("message") or "")
    said = f" ({message.replace(key, '***') if key else message})" if message else ""
    if status in (401, 403):
        advice = f"check {variable}" if key else f"export {variable}=... or name another variable: api_key=NAME"
        return f"{url} refuses {'the key' if key else 'a call without key'}: {status}{said}; {advice}"
    if status == 404:
        return f"{url} has no such page or model: 404{said}; check endpoint= (most end in /v1) and model="
    if status == 429:
        return f"{url} has a limit or quota that is used up: 429{said}; wait, or use another endpoint="
    if 300 <= status < 400:
        where = _plain(error.response.headers.get("Location", "nowhere"))
        return f"{url} points to {where} ({status}), which is not followed; give that address as endpoint="
    remedy = "try again later" if status >= 500 else "check model= and the server's settings"
    return f"{url} answers with error {status}{said}; {remedy}"


def _content(found: Any, url: str) -> str:
    """The text of a checked answer."""
    choices = getattr(found, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        shown = _plain(str(found)[:80])
        raise UserError(f"{url} does not answer as a chat API does (starts {shown!r}); check endpoint=")
    if choices[0].finish_reason == "length":
        raise UserError(f"the answer of {url} was cut off at the server's length limit; raise it there")
    content = choices[0].message.content
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{url} gave an empty answer; try again or another model=")
    return content


def _plain(text: object) -> str:
    """Text of a server or library as one short line without control characters."""
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
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype="auto", output_loading_info=True
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

    from magihuman.io.files import is_hub_id

    if is_hub_id(model):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(model, local_files_only=True)
        except (OSError, ValueError):
            raise UserError(f"model={model} is not on this machine; fetch it with: hf download {model}") from None
    folder = Path(os.path.expanduser(model))
    if not (folder / "config.json").is_file():
        raise UserError(f"model={model} is not a folder of a transformers model; name one, a Hub id, or an endpoint=")
    return str(folder)
