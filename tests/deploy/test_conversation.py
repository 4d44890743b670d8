"""A conversation in the terminal: it remembers, forgets when told to, and ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.cli import main
from peftkit.deploy.chat import Conversation, Manner, converse, open_conversation
from peftkit.deploy.generate import generate
from peftkit.deploy.usable import Usable, open_usable
from peftkit.errors import InputError

SHORT = Manner(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Usable:
    return open_usable(tiny_llama)


@pytest.fixture
def talk(tiny: Usable) -> Callable[..., tuple[list[dict[str, str]], str, list[str]]]:
    """What was said at the end, what was written, and what was said beside it."""

    def run(*lines: str, manner: Manner = SHORT) -> tuple[list[dict[str, str]], str, list[str]]:
        written, told = list[str](), list[str]()
        conversation = Conversation(tiny, manner, write=written.append)
        said = converse(conversation, lines, write=written.append, say=told.append)
        return said, "".join(written), told

    return run


def test_the_first_answer_is_what_generate_writes_and_the_next_knows_it(
    talk: Any, tiny: Usable, tiny_llama: Path
) -> None:
    said, written, _ = talk("Hello", "And now?")
    first = generate(tiny_llama, "Hello", max_new_tokens=8)
    assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant"]
    assert said[1]["content"] == first
    assert written.splitlines()[0].strip() == first.splitlines()[0]
    alone = talk("And now?")[0][1]["content"]
    assert said[3]["content"] != alone, "the second answer depends on what was said before"


def test_reset_forgets_and_quit_ends(talk: Any) -> None:
    alone = talk("And now?")[0]
    said, _, told = talk("Hello", "", "/reset", "And now?", "/rest", "/quit", "never asked")
    assert said == alone
    assert told[0] == "forgotten"
    assert told[1].startswith("there is no /rest. /reset forgets")


def test_a_system_message_opens_every_conversation(talk: Any) -> None:
    said, _, _ = talk("Hello", "/reset", "Hello", manner=Manner(system="Answer in rhyme.", max_new_tokens=8))
    assert [message["role"] for message in said] == ["system", "user", "assistant"]
    assert said[2]["content"] != talk("Hello")[0][1]["content"]


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns(talk: Any) -> None:
    long = "word " * 120
    said, _, told = talk(long, long, long, manner=Manner(max_new_tokens=100))  # the model has 512 positions
    assert len(said) == 4
    assert told == ["the 2 oldest messages no longer fit and were left out"]
    said, _, told = talk("word " * 600, "Hello", manner=SHORT)
    assert "Say less, or lower --max-new-tokens" in told[0]
    assert len(said) == 2, "what was too long is not remembered"


def test_through_a_pipe_lines_are_answered_and_json_is_one_document(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate(tiny_llama, "Hello", max_new_tokens=8)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(["chat", str(tiny_llama), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == first
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(["chat", str(tiny_llama), "--max-new-tokens", "8", "--json"]) == 0
    messages = json.loads(capsys.readouterr().out)["messages"]
    assert messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]


def test_what_does_not_talk_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    known = json.loads((bare / "tokenizer_config.json").read_text())
    known.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(known))
    with pytest.raises(InputError, match=r"no chat template\. Let it go on from a text: peftkit generate"):
        open_conversation(str(bare), SHORT, write=print)
