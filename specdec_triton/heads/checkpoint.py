"""Reads the checkpoint of a draft head and says which kind of head it is."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

PATTERNS = ("*.safetensors", "*.bin", "*.pt")  # of the files of tensors; the first pattern that matches is read
# files that trainers leave, and one of DFlash heads that is read by itself
NOT_TENSORS = re.compile(r"(training_args|optimizer|scheduler|rng_state.*|mask_embedding)\.(bin|pt)")
MASK_EMBEDDING = "mask_embedding"  # name of that file and of its tensor: the embedding of the mask token
PREFIX = re.compile(r"^(?:draft_model\.|model\.|language_model\.)+")  # of the names in some exports
MEDUSA = re.compile(r"^(medusa_heads?\.)?(\d+\.\d+\.(linear\.)?weight$|blocks\.\d+\.layers\.\d+\.|lm_heads\.\d+\.)")
# kinds of heads that are not supported -> names of tensors that only they have
UNSUPPORTED = {
    "DSpark": re.compile(r"^(logit_head\.)?(markov|confidence)_head\."),
    "Domino": re.compile(r"^(logit_head\.)?(prefix_gru|embed_proj)\."),
    "DFlash 2": re.compile(r"(^|\.)(candidate_selector\.|\w+_conv\.(base_kernel|kernel_projection))"),
    "Hydra": re.compile(r"(^|\.)hydra"),
    "MTP": re.compile(r"(^|\.)mtp(_layers|_block)?\.|\.(eh_proj|enorm|hnorm)\.weight$"),
    "MLPSpeculator": re.compile(r"^(speculator\.)?(emb|proj|head|ln)\.\d+\.weight$"),
}
# parts that heads of EAGLE and DFlash must not have -> the names of their tensors
UNSUPPORTED_PARTS = {
    "parallel Medusa heads": re.compile(r"^parallel_draft_heads\."),
    "a mixture of experts": re.compile(r"^(midlayer|layers\.\d+)\.mlp\.experts\."),
    "latent attention (MLA)": re.compile(r"\.self_attn\.(kv_a_|kv_b_|q_a_|q_b_)"),
}
# `speculators_model_type` in a config, or `projector_type` in its `dflash_config` -> the kind
UNSUPPORTED_TYPES = {"dspark": "DSpark", "dflash2": "DFlash 2", "domino": "Domino", "mtp": "MTP"}
# `model_type` of transformers' assistants that read the target's states -> the kind
UNSUPPORTED_ASSISTANTS = dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "a Gemma 4 assistant")
MUSE = "muse_glimmer_assistant"  # transformers' `model_type` of the DFlash heads of Muse Glimmer
# kinds that a head's name does not load -> the way to load them
INSTEAD = {
    "a Gemma 4 assistant": "load it with Gemma4AssistantDrafter.from_pretrained",
    "MTP": "load the layers for multi-token prediction with MTPDrafter.from_target",
}


@dataclass(frozen=True)
class Checkpoint:
    """The files of a draft head.

    Attributes:
        source: the folder or the name on the hub, as the user gave it. For error messages.
        config: config.json; empty if there is none.
        tensors: name in the file -> tensor, on the CPU. They may be mapped from the file.
    """

    source: str
    config: dict
    tensors: dict[str, torch.Tensor]


def read_checkpoint(name_or_path: str | PathLike) -> Checkpoint:
    """Read a head from a local folder, or from the hub. Pickled files are read as tensors only: no code in them runs.

    Raises:
        ValueError: there is neither such a folder nor such a repository, it has no tensors, two files have a tensor of
            the same name, a file cannot be read, or it names another mask token than the config.
    """
    source = str(name_or_path)
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=["config.json", *PATTERNS]))
        except Exception as error:  # the hub raises errors of many classes, also of its HTTP client
            raise ValueError(
                f"read_checkpoint: the head must be a local folder or the name of a repository on the hub, got "
                f"{source!r}: {error}"
            ) from error
    files = tensor_files(folder)
    if not files:
        raise ValueError(f"read_checkpoint: the head must have a file {' or '.join(PATTERNS)}, got none in {source}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        read = _tensors(file)
        twice = sorted(tensors.keys() & read.keys())
        if twice:
            raise ValueError(
                f"read_checkpoint: {source} must have each tensor once, got {twice[0]} again in {file.name}"
            )
        tensors.update(read)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path = folder / f"{MASK_EMBEDDING}.pt"
    if path.exists():
        tensors[MASK_EMBEDDING] = _mask_embedding(path, config)
    return Checkpoint(source, config, tensors)


def tensor_files(folder: Path) -> list[Path]:
    """The files of tensors in a folder, all of one format."""
    matches = (
        sorted(each for each in folder.glob(pattern) if not NOT_TENSORS.fullmatch(each.name)) for pattern in PATTERNS
    )
    return next(filter(None, matches), [])


def tensor_names(folder: Path) -> list[str]:
    """The names of the tensors in a folder. Tensors are not read."""
    names: list[str] = []
    for file in tensor_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
        else:
            names += _tensors(file)
    return names


def _mask_embedding(file: Path, config: dict) -> torch.Tensor:
    """The embedding of the mask token, which some DFlash heads keep in a file of its own."""
    read = _read(file)
    if not isinstance(read, dict):
        read = {"embedding": read}
    embedding, stated = read.get("embedding"), (config.get("dflash_config") or {}).get("mask_token_id")
    if not torch.is_tensor(embedding):
        raise ValueError(f"read_checkpoint: {file} must hold a tensor 'embedding', got {type(embedding).__name__}")
    if read.get("mask_token_id", stated) != stated:
        raise ValueError(
            f"read_checkpoint: {file} must be of the mask token {stated} of config.json, got {read['mask_token_id']}"
        )
    return embedding


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    read = _read(file)
    other = (
        [name for name, value in read.items() if not torch.is_tensor(value)] if isinstance(read, dict) else [file.name]
    )
    if other:
        raise ValueError(f"read_checkpoint: {file} must be a dict of tensors, got another value for {other[0]}")
    return read


def _read(file: Path) -> Any:
    """The tensors of a file by their names, if the file is well-formed."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # the format of torch before 1.6, which is not a zip file, cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"read_checkpoint: {file} must hold tensors only, and could not be read: {error}") from error


def plain_name(name: str) -> str:
    """The name of a tensor without the prefixes that some exports add."""
    return PREFIX.sub("", name)


def rope_options(config: dict) -> dict:
    """The options of a config's rotary embedding, of whichever version of transformers."""
    options = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return options.get("sliding_attention") or options.get("full_attention") or options


def layer_config(config: dict) -> dict:
    """The part of a head's config that describes its layers. speculators nests it."""
    return config.get("transformer_layer_config") or config


def kind_of(tensor_names: Iterable[str], config: dict) -> str | None:
    """The kind of a draft head, by the names of its tensors.

    Args:
        tensor_names: all names in the checkpoint.
        config: config.json.

    Returns:
        "eagle3" for EAGLE-3 and P-EAGLE, "eagle" for EAGLE-1 and EAGLE-2, "dflash", "medusa"; None if it is not a draft
        head.

    Raises:
        ValueError: it is a head of a kind that is not supported; the message names the kind.
    """
    names = {plain_name(name) for name in tensor_names}
    of_writer, dflash = config.get("speculators_model_type", ""), config.get("dflash_config")
    is_eagle3 = any(re.match(r"(midlayer|layers\.0)\.hidden_norm\.weight$", name) for name in names)
    has_fc = bool({"fc.weight", "fusion_fc.weight", "encoder.fc.weight"} & names)
    is_medusa = any(map(MEDUSA.match, names))
    is_dflash = dflash is not None or of_writer == "dflash" or config.get("model_type") == MUSE
    is_dflash = is_dflash or (has_fc and bool({"hidden_norm.weight", "encoder.output_norm_enc.weight"} & names))
    unsupported = UNSUPPORTED_ASSISTANTS.get(config.get("model_type", ""))
    is_model = {"embed_tokens.weight", "norm.weight"} <= names
    if is_model and not (unsupported or is_eagle3 or has_fc or is_medusa):
        return None  # a language model
    projector = (dflash or {}).get("projector_type", "")
    unsupported = unsupported or UNSUPPORTED_TYPES.get(of_writer) or UNSUPPORTED_TYPES.get(projector)
    unsupported = unsupported or next(
        (kind for kind, each in UNSUPPORTED.items() if any(map(each.search, names))), None
    )
    if any(key.startswith("hydra_") for key in config):
        unsupported = "Hydra"
    if unsupported is None and (is_eagle3 or has_fc or is_dflash):
        rope = rope_options(layer_config(config))
        parts = [part for part, each in UNSUPPORTED_PARTS.items() if any(map(each.search, names))]
        if "mrope_section" in rope or "mrope" in (rope.get("rope_type"), rope.get("type")):
            parts.append("multimodal rotary positions (mrope)")
        if parts:
            unsupported = f"{'DFlash' if is_dflash else 'EAGLE'} with {parts[0]}"
    if unsupported:
        raise ValueError(
            f"kind_of: the draft head must be EAGLE-1, EAGLE-2, EAGLE-3, P-EAGLE, DFlash or Medusa, got {unsupported}: "
            f"{INSTEAD.get(unsupported, 'use another one')}"
        )
    if is_dflash:
        return "dflash"
    if is_eagle3:
        return "eagle3"
    if has_fc and {"layers.0.self_attn.q_proj.weight", "transformer.self_attn.q_proj.weight"} & names:
        return "eagle"
    return "medusa" if is_medusa else None
