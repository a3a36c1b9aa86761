"""python -m inference.prompting: the form of a prompt checked, and made by chat models that may misbehave."""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from inference.prompting import chat_client as chats
from inference.prompting.__main__ import SYSTEM, BadAnswer, main, rewrite, tidy
from inference.prompting.format import check_form, seconds_for, speaking_seconds, spoken_text
from magihuman.errors import UserError

GOOD = """\
An old woman with white hair in a blue apron stands in a sunlit kitchen, smiles at the near, still camera and says warmly, \
"Good morning, my dear."

Dialogue:
<Old woman, English>: "Good morning, my dear."

Background Sound:
<A kettle that begins to sing>"""
MAIN, DIALOGUE, SOUND = GOOD.split("\n\n")
SILENT = "An old woman with white hair stands in a sunlit kitchen and smiles at the near, still camera."
NOTHING = "Background Sound:\n<No prominent background sound>"


def faults(prompt: str, seconds: float | None = None) -> list[str]:
    return [fault.rpartition("; ")[0] for fault in check_form(prompt, seconds).faults]


@pytest.mark.parametrize(
    "prompt",
    [
        GOOD,
        " ".join(GOOD.split()),  # a prompt a line, as prompts=FILE.txt has them
        GOOD.lower(),
        f"{SILENT}\n\nDialogue: <No dialogue>\n\nBackground Sound: <No background sound>",
        f"{SILENT}\n\n{NOTHING}",  # nobody speaks: no block
        f"Anna says “ja” to Ben.\n\nDialogue:\nAnna (softly):\n“Ja.”\nBen: «Ja» he adds, «ja.»\n\n{SOUND}",
        f'A says "Yes.", B "No."\n\nDialogue: <A, English>: "Yes." <B, English>: "No."\n\n{SOUND}',
        f"A woman says 「你 好」.\n\nDialogue:\n<女 人, 普 通 话>：「你 好」\n\n{SOUND}",
        # The form of the release's guide: in every script the speech stands twice, characters with spaces between them.
        'A girl in a red coat says, " 안 녕 , 친 구 ." She nods.\n\nDialogue:\n<Girl in red coat, Korean>: " 안 녕 , 친 구 ."'
        f"\n\n{NOTHING}",
        'A cook lifts a lid: "お い し い、で す ね。"\n\nDialogue:\n<Cook, Japanese>: "お い し い、で す ね。"\n\n'
        + NOTHING,
        # The release's example is a cell of a CSV table: in quotation marks, those inside doubled.
        f'"{MAIN}\n\n{DIALOGUE}\n\n{NOTHING}"'.replace('"Good', '""Good').replace('dear."', 'dear.""'),
        f"They share a quiet dialogue: smiles. {GOOD}",
    ],
)
def test_good_forms(prompt: str) -> None:
    assert faults(prompt) == []


def test_the_pages_example_has_the_form() -> None:
    page = (Path(__file__).parents[2] / "inference" / "README.md").read_text()
    (example,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert faults(example) == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            MAIN,
            [
                "the description quotes \"Good morning, my dear.\" without a block 'Dialogue:'",
                "the block 'Background Sound:' is missing",
            ],
        ),
        (SILENT, ["the block 'Background Sound:' is missing"]),
        (f"{SILENT}\n\n{DIALOGUE}\n\n{SOUND}", ['the words "Good morning, my dear." are not in the description']),
        (
            'A woman says "你好".\n\nDialogue:\n<Woman, Mandarin>: "你好"\n\n' + SOUND,
            ["Chinese, Japanese or Korean characters stand side by side"],
        ),
        (
            'A woman says "어 서오세요".\n\nDialogue:\n<Woman, Korean>: "어 서오세요"\n\n' + SOUND,
            ["Chinese, Japanese or Korean characters stand side by side"],
        ),
        (f"{MAIN}\n\n{DIALOGUE}", ["the block 'Background Sound:' is missing"]),
        (f"{MAIN}\n\n{SOUND}\n\n{DIALOGUE}", ["'Background Sound:' stands before 'Dialogue:'"]),
        (f"{DIALOGUE}\n\n{SOUND}", ["no description stands before the blocks"]),
        (f"Here is it:\n\n{GOOD}", ["the description has several paragraphs"]),
        (f"{GOOD}\n\nDo you like it?", ["text follows the block 'Background Sound:'"]),
        (f"{MAIN}\n\nDialogue:\n\n{SOUND}", ["'Dialogue:' is empty"]),
        (f"{MAIN}\n\n{DIALOGUE}\n\nBackground Sound:", ["'Background Sound:' is empty"]),
        (f"{MAIN}\n\n{DIALOGUE}\n\n{DIALOGUE}\n\n{SOUND}", ["'Dialogue:' stands 2 times"]),
        (f"{MAIN}\n\n{DIALOGUE}\n<Man, English>:\n\n{SOUND}", ["the speaker <Man, English> has no line"]),
        (f"{MAIN}\n\nDialogue: <Man, English>\n\n{SOUND}", ["the speaker <Man, English> has no line"]),
        (f'{MAIN}\n\nDialogue:\nBen: "..."\n\n{SOUND}', ["the speaker Ben has no line"]),
        (f'He says "hello".\n\nDialogue:\n"Hello."\n\n{SOUND}', ['"Hello." has no speaker']),
        (f"{MAIN}\n\nDialogue:\nBen: Hello.\n\n{SOUND}", ["speech without quotation marks: Hello."]),
        (f"{MAIN}\n\nDialogue:\nNone.\n\n{SOUND}", ["speech without quotation marks: None."]),
        (f'{MAIN}\n\nDialogue:\nBen: "Hello.\n\n{SOUND}', ['a quotation mark in Ben: "Hello. has no partner']),
        (GOOD.replace("Dialogue:", "**Dialogue:**"), ["the prompt has markup (such as ** or # or list marks)"]),
        (f"{MAIN}\n\n## {DIALOGUE}\n\n{SOUND}", ["the prompt has markup (such as ** or # or list marks)"]),
        (GOOD.replace("near", "near " * 640), ["the prompt has 684 words, and the text encoder reads 640 tokens"]),
        ("", None),
    ],
)
def test_faults_are_named_with_their_remedy(prompt: str, expected: list[str] | None) -> None:
    found = check_form(prompt).faults
    assert all(fault.rpartition("; ")[2] for fault in found)
    if expected is None:
        assert len(found) == 2
    else:
        assert faults(prompt) == expected


def test_length_of_the_dialogue() -> None:
    assert check_form(GOOD).seconds == 3  # 6 syllables, a comma, half a second before and after
    assert faults(GOOD, seconds=3) == []
    assert faults(GOOD, seconds=2) == ["the dialogue takes about 3 s and the clip has 2 s"]


def test_mixed_languages_are_a_note_only() -> None:
    assert check_form(GOOD).notes == ()
    mixed = check_form(GOOD.replace("my dear", "你 好 吗"))
    assert not mixed.faults
    assert "Latin, Chinese or Japanese" in mixed.notes[0]
    japanese = check_form(GOOD.replace("Good morning, my dear.", "今 日 は い い 天 気"))
    assert japanese.notes == ()
    named = check_form(GOOD.replace("\n\nBackground", '\n<Man, German>: "Moin."\n\nBackground'))
    assert "English, German" in named.notes[0]
    silent = check_form(f"{SILENT} She says “hi”.\n\nDialogue: <No dialogue>\n\n{SOUND}")
    assert silent.seconds is None
    assert "only those there are timed" in silent.notes[0]


@pytest.mark.parametrize(
    "answer",
    [
        f"<think>\nDialogue: hm\n</think>\n\n{GOOD}",
        f"hm, let me see</think>{GOOD}",
        f"```text\n{GOOD}\n```",
        GOOD.replace("Dialogue:", "**Dialogue:**").replace("Background Sound:", "### Background Sound："),
        f"\x1b{GOOD}\x07\n",
    ],
)
def test_what_chat_models_wrap_around_a_prompt_is_taken_off(answer: str) -> None:
    assert tidy(answer) == GOOD


def test_characters_of_an_answer_get_the_spaces_of_the_training_captions() -> None:
    assert tidy('says "今日はABC，天気。안녕"') == 'says "今 日 はABC，天 気。안 녕"'


def test_a_bad_answer_gets_one_more_try_with_its_faults_named() -> None:
    answers = iter([MAIN, GOOD])
    heard: list[list[chats.Message]] = []

    def chat(messages: list[chats.Message]) -> str:
        heard.append(list(messages))
        return next(answers)

    assert rewrite("a kitchen, she says “Good morning, my dear”", chat, seconds=4) == GOOD
    assert [m["role"] for m in heard[1]] == ["system", "user", "assistant", "user"]
    assert heard[0][0]["content"] == SYSTEM
    assert "4 seconds" in heard[0][1]["content"]
    assert "without a block 'Dialogue:'" in heard[1][3]["content"]


def test_words_that_were_asked_for_may_not_change() -> None:
    with pytest.raises(BadAnswer, match="the requested words “Good evening”"):
        rewrite('an old woman says "Good evening"', lambda _: GOOD)


class Server:
    """An OpenAI-compatible server with the replies that a test sets: (status, body, headers) or a function."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.requests.append((self.path, headers, json.loads(raw)))
                reply = server.replies.pop(0)
                if callable(reply):
                    reply(self)
                    return
                status, body, headers = reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def says(self, text: object, **choice: object) -> None:
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, **choice}]})
        self.replies.append((200, body.encode(), {"Content-Type": "application/json"}))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(words)
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return run


def test_from_a_request_to_a_prompt(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-1")
    server.says(MAIN)
    server.says(GOOD, finish_reason="stop")
    status, out, err = run("a kitchen in the morning", f"endpoint={server.url}/", "model=some-chat", "api_key=MY_KEY")
    assert (status, out) == (0, GOOD + "\n")
    assert "about 3 s" in err
    path, headers, body = server.requests[1]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret-1"
    assert body["model"] == "some-chat"
    assert "a kitchen in the morning" in body["messages"][1]["content"]
    assert "is missing" in body["messages"][3]["content"]


def test_an_answer_that_stays_bad_is_refused(server: Server, run: Run) -> None:
    for _ in range(2):
        server.says(MAIN)
    status, out, err = run("request=a kitchen", f"endpoint={server.url}/chat/completions")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "also after a second try: the description quotes" in err
    assert "without a block 'Dialogue:' and 1 more" in err
    assert "authorization" not in server.requests[0][1]
    assert "model" not in server.requests[0][2]


def refuses(status: int, message: str = "", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    return (
        status,
        json.dumps({"error": {"message": message}}).encode(),
        {"Content-Type": "application/json", **headers},
    )


def late(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.4)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (refuses(401, "wrong key secret-2\nsecond line"), r"refuses the key: 401 \(wrong key \*\*\*; second"),
        (refuses(404, "no model x"), r"404 \(no model x\); check endpoint= .* and model="),
        (refuses(429), "429; wait"),
        (refuses(500), "error 500; try again later"),
        (refuses(302, Location="http://127.0.0.1:9/other"), r"points to http://127.0.0.1:9/other \(302\)"),
        ((200, b"<html>", {}), "does not answer as a chat API does .starts '<html>'"),
        ((200, b'{"choices": []}', {}), "does not answer as a chat API does"),
        ((200, b"x", {"Content-Length": "9"}), "cannot reach .*/v1: "),
        ((200, b"{", {"Content-Type": "application/json"}), "does not answer as a chat API does"),
        (late, "no answer within 0.2 s"),
        ("", "empty answer"),
        ("cut", "cut off at the server's length limit"),
    ],
)
def test_what_goes_wrong_with_an_endpoint_is_one_line(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch, reply: Any, said: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-2")
    if isinstance(reply, str):
        server.says(reply, finish_reason="length" if reply else "stop")
    else:
        server.replies += [reply] * (1 + chats.RETRIES)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    timeout = 0.2 if reply is late else 30
    status, out, err = run("request=x", f"endpoint={server.url}", f"timeout={timeout}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "secret-2" not in err
    assert re.search(said, err), err


def test_an_error_of_the_server_is_tried_again(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    server.replies.append(refuses(500))
    server.says(GOOD)
    status, out, _ = run("request=a kitchen", f"endpoint={server.url}")
    assert (status, out) == (0, GOOD + "\n")


def test_a_missing_client_names_the_command_that_installs_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    status, _, err = run("request=x", "endpoint=http://127.0.0.1:9/v1")
    assert status == 2
    assert "pip install 'magihuman[prompts]'" in err


def test_no_server_and_no_network(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    status, _, err = run("request=x", "endpoint=http://127.0.0.1:9/v1")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot reach http://127.0.0.1:9/v1: " in err
    assert "is the server running" in err

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    status, _, err = run("request=x", "endpoint=http://no-such-host.invalid/v1")
    assert status == 2
    assert "this machine's network" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "usage: python -m inference.prompting"),
        (("request=x",), "name a chat model"),
        (("request=x", "check=y"), "either request=TEXT"),
        (("request= ", "model=m"), "request is empty"),
        (("request=x", "model=no/such"), "hf download no/such"),
        (("request=x", "model=./nowhere"), "not a folder of a transformers model"),
        (("request=x", "endpoint=127.0.0.1:8000"), "is not an address"),
        (("request=x", "endpoint=http://u:sk@h/v1"), "must not hold a key"),
        (("request=x", "endpoint=http://h/v1", "api_key=sk-123"), "not the key"),
        (("request=x", "endpoint=http://h/v1", "api_key=NO_SUCH_KEY"), "NO_SUCH_KEY: that environment"),
        (("check=missing.txt",), "no such file"),
        (("check=x", "seconds=0"), "seconds must be more than 0"),
    ],
)
def test_bad_settings(run: Run, words: tuple[str, ...], said: str) -> None:
    status, out, err = run(*words)
    assert status == (0 if not words else 2)
    assert said in out + err
    assert "sk-123" not in err


def test_a_key_nobody_named_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-3")
    sent = {url: chats._key(None, url)[0] for url in ("http://10.0.0.1/v1", "http://localhost/v1", "https://a.b/v1")}
    assert list(sent.values()) == ["", "secret-3", "secret-3"]
    assert chats._key("OPENAI_API_KEY", "http://10.0.0.1/v1")[0] == "secret-3"


def test_checking_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(GOOD)
    status, out, _ = run(f"check={tmp_path / 'good.txt'}")
    assert (status, out) == (0, "note: the dialogue needs about 3 s\nthe form is good\n")
    status, out, _ = run(f"check={MAIN}")
    assert status == 1
    assert out.startswith("fault: the description quotes")
    assert "without a block 'Dialogue:'; add a block that starts with 'Dialogue:'" in out
    lines = [json.dumps({"prompt": text, "name": name}) for name, text in (("a", GOOD), ("b", MAIN))]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    status, out, _ = run(f"check={tmp_path / 'p.jsonl'}")
    assert status == 1
    assert "b: fault: the description quotes" in out
    assert out.endswith("1 of 2 prompts have faults\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    assert run(f"check={tmp_path / 'binary.txt'}")[0] == 2


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of one layer that reads and writes characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {letter: i for i, letter in enumerate(["<eos>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)  # its first tokens are not the end
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=0, **size)).save_pretrained(folder)
    return folder


def test_a_transformers_model(tiny_chat: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = run("request=x", f"model={tiny_chat}", "max_tokens=3")
    assert status == 2
    assert "was cut off at 3 tokens; raise max_tokens=" in err

    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    asked = []

    def generate(self: object, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.append((tokenizer.decode(input_ids[0]), options["do_sample"]))
        answer = tokenizer(GOOD + "<eos>", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, answer], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    status, out, _ = run("request=a kitchen", f"model={tiny_chat}")
    assert (status, out) == (0, GOOD + "\n")
    # This template refuses a system turn, so the instructions open the user's.
    assert asked == [(f"user: {SYSTEM}\n\na kitchen\n", False)]


def test_a_transformers_model_that_cannot_chat(tiny_chat: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_chat / name).read_bytes())
    with pytest.raises(UserError, match="has no chat template"):
        chats.transformers_chat(str(tmp_path), 10)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(UserError, match="cannot be loaded as a chat model"):
        chats.transformers_chat(str(tmp_path), 10)


# seconds=auto: what is said, and how long it takes in its language.


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("A man walks.", ""),
        ('He says "hello there" and "bye".', "hello there\nbye"),
        ("Dialogue: <Woman, English>: Good morning. Background Sound: birds", "Good morning."),
        ('A "sign".\nDialogue:\nAnna (softly): "Yes."\nBen: "No."\nBackground Sound: rain', "Yes.\nNo."),
        ("dialogue:\nAnna: Yes, please\nBen: No", "Yes, please\n No"),
        ("她说：「你好」", "你好"),
        ("Er sagt „Guten Tag“.", "Guten Tag"),
        ("Dialogue: Background Sound: wind", ""),
    ],
)
def test_what_is_said(prompt: str, said: str) -> None:
    assert spoken_text(prompt) == said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("ma bi so", 3 / 4.5),
        ("Good morning", 3 / 4.5),
        ("Здравствуйте", 3 / 4.5),
        ("你好吗", 3 / 4.5),
        ("こんにちは", 5 / 7),
        ("きょう", 2 / 7),  # the small kana belongs to the mora before it
        ("안녕하세요", 5 / 5),
        ("مرحبا", 5 / 11),
        ("42", 2 / 3),
        ("Yes. No!", 2 / 4.5 + 0.4),
        ("Yes, no", 2 / 4.5 + 0.2),
        ("Wait... go", 2 / 4.5 + 0.4),
        ("¿Qué tal?", 2 / 4.5),
    ],
)
def test_how_long_it_takes(text: str, seconds: float) -> None:
    assert speaking_seconds(text) == pytest.approx(seconds)


def test_whole_seconds() -> None:
    assert seconds_for("a street in rain") is None
    assert seconds_for('"Hi"') == 2
    assert seconds_for('"' + "la " * 27 + '"') == 7  # 6 s of speech, half a second around it on each side
