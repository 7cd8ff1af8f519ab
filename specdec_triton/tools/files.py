"""Checks of model files that may be broken. Every fault becomes an error of one line that names the file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

# the files of a folder that transformers reads, each a JSON object
OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "model.safetensors.index.json",
)  # fmt: skip
AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
UNLIKELY = 2  # a config with more than so many times the weights in the files describes another model


def one_line(error: BaseException) -> str:
    """The message of an error in one line, after its type if the message alone does not explain the fault."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Any error in the block becomes a ValueError that names `source`, which the block reads.

    transformers, tokenizers, safetensors and gguf raise errors of any type for a malformed file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"load: {source} cannot be read: {one_line(error)}") from error


def read_object(file: Path) -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: it is not JSON, or JSON of another kind.
        OSError: it cannot be opened.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {file} must be JSON, got {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"load: {file} must be a JSON object, got a {type(found).__name__}")
    return found


def read_config(source: Path):
    """The transformers config of a folder, or of a config.json.

    Raises:
        ValueError: it is no config, or has a size that no model can have.
        OSError: it cannot be opened.
    """
    file = source / "config.json" if source.is_dir() else source
    found = read_object(file)
    parts = [(name, part) for name, part in found.items() if isinstance(part, dict)]
    for owner, part in [("", found), *((f"{name}.", part) for name, part in parts if name.endswith("text_config"))]:
        for name in AT_LEAST_ONE:
            size = part.get(name, 1)
            # a list has a size for each layer
            if isinstance(size, (int, float)) and not size >= 1:
                raise ValueError(f"load: {file}: {owner}{name} must be at least 1, got {size!r}")
    with reading(file):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no complete model, before anything in it is loaded.

    Raises:
        ValueError: a file is missing, malformed or truncated, or the config describes a model of another size than the
            weights.
        OSError: a file cannot be opened.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" not in names:
        ggufs = [name for name in names if name.endswith(".gguf")]
        hint = f"; name the file itself: {folder / ggufs[0]}" if ggufs else ""
        raise ValueError(f"load: {folder} must be a transformers folder with a config.json, got none{hint}")
    shards = [name for name in names if name.endswith(".safetensors")]
    if not shards:
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        came = f"{pickles[0]}, a pickle, which is never read" if pickles else "no weights"
        raise ValueError(f"load: {folder} must hold its weights as .safetensors, got {came}")
    objects = {name: read_object(folder / name) for name in OBJECTS if name in names}
    if "model.safetensors" not in names and "model.safetensors.index.json" in objects:
        placed = objects["model.safetensors.index.json"].get("weight_map")
        placed = set(placed.values()) if isinstance(placed, dict) else set()
        missing = sorted(str(name) for name in placed - set(names)) or ([] if placed else ["weight_map"])
        if missing:
            raise ValueError(
                f"load: {folder / 'model.safetensors.index.json'} must name files in the folder, got no {missing[0]}"
            )
    held = sum(_numbers_in(folder / shard) for shard in shards)
    config = read_config(folder)
    if getattr(config, "quantization_config", None) is None:
        with reading(folder / "config.json"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        wanted = sum(parameter.numel() for parameter in model.parameters())
        if wanted > UNLIKELY * held:
            raise ValueError(
                f"load: {folder / 'config.json'} must describe the model in the folder, got a "
                f"{type(model).__name__} of {wanted} weights, and the .safetensors hold {held}"
            )


def _numbers_in(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    file.open("rb").close()  # an OSError names the file
    with reading(file), safe_open(file, framework="pt") as tensors:
        return sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())  # noqa: SIM118
