"""A corpus from files: texts that outputs are likely to repeat. Source: REST (He et al. 2023, arXiv 2311.08252)."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from .history import History

BATCH = 1_000_000  # at least so many characters are tokenized at once, if there are so many
# names of the fields that make up a text -> their possible types
FIELDS: dict[tuple[str, ...], tuple[type, ...]] = {
    ("text",): (str,),
    ("prompt", "completion"): (str, list),
    ("messages",): (list,),
}
KINDS = {str: "strings", list: "lists of messages"}


def corpus_of(tokenizer, files: str | Path | Iterable[str | Path], max_tokens: int = 1_000_000) -> History:
    """A history with the texts of files as its corpus.

    Special tokens that are written in the texts become single tokens. None are added, except by the chat template.

    Args:
        tokenizer: of the target model.
        files: see `read_texts`; messages go through the tokenizer's chat template.
        max_tokens: see `History`.

    Raises:
        ValueError: a file is malformed, or the files have no text.
        OSError: a file cannot be read.
    """
    files = [files] if isinstance(files, str | Path) else list(files)
    history = History(max_tokens)

    def in_template(messages: list) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False)

    history.add_corpus(_tokenized(tokenizer, read_texts(files, in_template)))
    if not history.num_tokens:
        raise ValueError(f"corpus_of: files must have text, got none in {', '.join(map(str, files)) or 'no files'}")
    return history


def read_texts(files: Iterable[str | Path], in_template: Callable[[list], str]) -> Iterator[str]:
    """The texts of files in UTF-8, one by one.

    In a `.jsonl` file, each line is a JSON object with one text: the field "text", or "prompt" and "completion"
    together, or "messages", a list of dicts with "role" and "content". "prompt" and "completion" may also be lists of
    messages. Any other file is one text.

    Args:
        files: paths.
        in_template: messages -> text.

    Raises:
        ValueError: a file is not UTF-8, or a line is not such an object. The message names file and line.
        OSError: a file cannot be read.
    """
    for path in map(Path, files):
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _text_of(f"read_texts: {path}:{number}", line, in_template)
            continue
        try:
            yield path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"read_texts: {path} must be text in UTF-8, got byte {error.object[error.start]:#x} at {error.start}"
            ) from None


def _text_of(place: str, line: bytes, in_template: Callable[[list], str]) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} must be a JSON object in UTF-8, got {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{place} must be a JSON object, got a {type(found).__name__}")
    names = next((names for names in FIELDS if found.keys() >= set(names)), None)
    if names is None:
        wanted = ", or ".join(" and ".join(map(repr, names)) for names in FIELDS)
        raise ValueError(f"{place} must have {wanted}, got the fields {sorted(found)}")
    values = [found[name] for name in names]
    if {type(value) for value in values} not in [{kind} for kind in FIELDS[names]]:
        wanted = " or ".join(KINDS[kind] for kind in FIELDS[names])
        got = " and ".join(type(value).__name__ for value in values)
        raise ValueError(f"{place} must have {wanted} in {' and '.join(map(repr, names))}, got {got}")
    if isinstance(values[0], str):
        return "".join(values)
    try:
        return in_template(list(chain(*values)))
    except Exception as error:  # of any type: it comes from the template
        wanted = "messages that fit the tokenizer's chat template"
        raise ValueError(f"{place} must have {wanted}, got {type(error).__name__}: {error}") from error


def _tokenized(tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The token ids of each text [L] int32."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield from _encoded(tokenizer, batch)
            batch, size = [], 0
    if batch:
        yield from _encoded(tokenizer, batch)


def _encoded(tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    # `verbose` would warn of texts that are longer than the model's context
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return (np.array(ids, dtype=np.int32) for ids in encoded["input_ids"])
