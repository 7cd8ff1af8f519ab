"""A corpus from files: their texts, their tokens, and files that are malformed."""

import json
import logging

import numpy as np
import pytest

import tiny
from specdec_triton.drafters import corpus
from specdec_triton.drafters.corpus import corpus_of, read_texts

CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "xy"}]


def roles(messages):
    return "".join(f"[{message['role']}]{message['content']}" for message in messages)


def jsonl(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_texts_of_files(tmp_path):
    plain = tmp_path / "code.py"
    plain.write_bytes("\ufeffdef f():\r\n    return 'é'\n".encode())
    lines = jsonl(
        tmp_path / "texts.jsonl",
        {"text": "one\ntwo", "label": 3},
        "",
        {"prompt": "2 + 2 = ", "completion": "4"},
        {"messages": CONVERSATION},
        {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]},
    )
    texts = list(read_texts([plain, str(lines)], roles))
    talk = "[user]hi[assistant]xy"
    assert texts == ["def f():\n    return 'é'\n", "one\ntwo", "2 + 2 = 4", talk, talk]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "must be a JSON object in UTF-8, got JSONDecodeError"),
        ("[" * 100_000, "must be a JSON object in UTF-8, got RecursionError"),
        ('"text"', "must be a JSON object, got a str"),
        (
            {"prompt": "a", "answer": "b"},
            "must have 'text', or 'prompt' and 'completion', or 'messages', got the fields ['answer', 'prompt']",
        ),
        ({"text": 3}, "must have strings in 'text', got int"),
        ({"text": ["a"]}, "must have strings in 'text', got list"),
        ({"messages": "hi"}, "must have lists of messages in 'messages', got str"),
        (
            {"prompt": "a", "completion": CONVERSATION},
            "must have strings or lists of messages in 'prompt' and 'completion', got str and list",
        ),
        ({"messages": [{"role": "user"}]}, "must have messages that fit the tokenizer's chat template, got KeyError"),
        ({"messages": ["hi"]}, "must have messages that fit the tokenizer's chat template, got TypeError"),
    ],
)
def test_a_malformed_line_is_named(line, message, tmp_path):
    path = jsonl(tmp_path / "texts.jsonl", {"text": "fine"}, line, {"text": "fine"})
    texts = read_texts([path], roles)
    assert next(texts) == "fine"
    with pytest.raises(ValueError) as caught:
        next(texts)
    assert str(caught.value).startswith(f"read_texts: {path}:2 {message}")


def test_files_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc\xffdef")
    with pytest.raises(ValueError, match=r"weights.bin must be text in UTF-8, got byte 0xff at 3"):
        list(read_texts([path], roles))
    path = jsonl(tmp_path / "a.jsonl", "{}")
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"a.jsonl:1 must be a JSON object in UTF-8, got UnicodeDecodeError"):
        list(read_texts([path], roles))
    with pytest.raises(FileNotFoundError, match="absent"):
        list(read_texts([tmp_path / "absent"], roles))


@pytest.mark.parametrize("batch", [1, 8, 1_000_000])
def test_a_corpus_holds_the_tokens_of_all_texts(batch, tmp_path, monkeypatch):
    """Whatever the batches of the tokenizer; messages come through the chat template."""
    monkeypatch.setattr(corpus, "BATCH", batch)
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 4
    plain = tmp_path / "a.txt"
    plain.write_text("abc abd abc")
    lines = jsonl(tmp_path / "b.jsonl", {"text": "xyxz"}, {"text": ""}, {"messages": CONVERSATION})
    history = corpus_of(tokenizer, [plain, lines], max_tokens=7)
    texts = [tokenizer.encode(text) for text in ("abc abd abc", "xyxz", "<|user|>hi<|end|><|user|>xy<|end|>")]
    assert len(texts[2]) == 2 + 2 + 2 + 1  # special tokens are single ones
    (index,) = history.sources()
    assert index.text.tolist() == [token for text in texts for token in (*text, -1)]
    assert history.max_tokens == 7 and history.num_texts == 3
    assert history.sources()[0].find(np.array(tokenizer.encode("ab"))).next_tokens().keys() == {
        *tokenizer.encode("c"),
        *tokenizer.encode("d"),
    }


def test_no_tokens_are_added_and_no_warning_is_shown(tmp_path, caplog, capsys, monkeypatch):
    """A tokenizer that adds a token at the beginning, and has a short context."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", 1)])
    tokenizer.model_max_length = 4
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert tokenizer("c")["input_ids"] == [1, *tokenizer.encode("c", add_special_tokens=False)]
    path = tmp_path / "a.txt"
    path.write_text("c" * 9)
    assert corpus_of(tokenizer, path).num_tokens == 9
    assert not caplog.records and capsys.readouterr().err == ""


def test_files_without_text_are_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(ValueError, match=r"corpus_of: files must have text, got none in .*empty.txt"):
        corpus_of(tiny.tokenizer(), [path])
    with pytest.raises(ValueError, match="corpus_of: files must have text, got none in no files"):
        corpus_of(tiny.tokenizer(), [])


def test_a_tokenizer_without_a_template_takes_no_messages(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    path = jsonl(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    with pytest.raises(ValueError, match=r"a.jsonl:1 must have messages that fit the tokenizer's chat template, got"):
        corpus_of(tokenizer, path)
