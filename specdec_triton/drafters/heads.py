"""Tells the name of a trained draft head from that of a model, and loads the head. Creates the drafters of heads."""

import json
from collections.abc import Iterable, MutableMapping
from os import PathLike
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..forward.wrappers import unwrap
from ..heads.checkpoint import MUSE, kind_of, read_checkpoint, tensor_names
from ..heads.dflash import DFlashModel
from ..heads.eagle import EagleModel
from ..heads.medusa import MedusaHeads
from ..tree import DynamicTree, Topology
from .base import Drafter
from .dflash import DFlashDrafter
from .eagle import EagleDrafter
from .medusa import MedusaDrafter
from .model import SHARED_KV_ASSISTANTS, ModelDrafter
from .shared_kv import Gemma4AssistantDrafter

Head = EagleModel | DFlashModel | MedusaHeads
CONFIG = "config.json"
CLASSES: dict[str, type[DFlashModel] | type[MedusaHeads]] = {"dflash": DFlashModel, "medusa": MedusaHeads}  # by kind


def is_head(name_or_path: str | PathLike) -> bool:
    """True if this is the name of a draft head, also of one of a kind that is not supported. No weights are loaded or
    downloaded.

    The names of the tensors decide. On the hub, a repository without safetensors and GGUF files but with pickled
    weights counts as a head, because models are never loaded from pickles. A name that cannot be looked up, for
    example without a network, is not a head's.

    Args:
        name_or_path: a local folder, or a name on the hub.
    """
    path = Path(name_or_path).expanduser()
    try:
        names, config = _in_folder(path) if path.is_dir() else _on_hub(str(name_or_path))
    except Exception:  # a broken file, or errors of many classes of the hub: loading the model explains it
        return False
    if names is None:
        return True
    try:
        return kind_of(names, config) is not None
    except ValueError:  # it is not supported; loading the head says so
        return True


def load_head(name_or_path: str | PathLike, target: PreTrainedModel) -> Drafter:
    """A drafter with a trained head, in its default shape.

    Args:
        name_or_path: a local folder, or a name on the hub.
        target: the model that the head was trained for.

    Raises:
        ValueError: there is no such head, its kind is not supported (the message names it), or it does not fit the
            target.
    """
    return drafter_of(read_head(name_or_path, target))


def read_head(name_or_path: str | PathLike, target: PreTrainedModel) -> Head:
    """The head alone, in the target's dtype and on its device. For arguments and errors see `load_head`."""
    target = unwrap(target, "load_head")
    checkpoint = read_checkpoint(name_or_path)
    kind = kind_of(checkpoint.tensors, checkpoint.config)
    if kind is None:
        raise ValueError(f"load_head: {checkpoint.source} must hold a draft head, got tensors of another model")
    head = CLASSES.get(kind, EagleModel).from_checkpoint(checkpoint, dtype=target.dtype, device=target.device)
    head.check_target(target)
    return head


def drafter_of(head: Head, tree: Topology | DynamicTree | int | None = None) -> Drafter:
    """The drafter that runs a head."""
    if isinstance(head, MedusaHeads):
        return MedusaDrafter(head, tree)
    return DFlashDrafter(head, tree=tree) if isinstance(head, DFlashModel) else EagleDrafter(head, tree=tree)


def drafter_of_assistant(
    model: PreTrainedModel, kept: MutableMapping[PreTrainedModel, Drafter]
) -> DFlashDrafter | Gemma4AssistantDrafter | ModelDrafter:
    """The drafter that runs a model of transformers: a DFlash head, a Gemma 4 assistant, or a draft model.

    Args:
        model: the model.
        kept: gets the drafter of a DFlash head, which is made once. It shares the parameters of the model, and does not
            refer to the model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in SHARED_KV_ASSISTANTS:
        return Gemma4AssistantDrafter(model)
    if kind != MUSE:
        return ModelDrafter(model)
    if model not in kept:
        kept[model] = DFlashDrafter(DFlashModel.from_assistant(model))
    return kept[model]


def _in_folder(folder: Path) -> tuple[list[str], dict]:
    config = folder / CONFIG
    return tensor_names(folder), _read_config(config) if config.exists() else {}


def _read_config(file: str | PathLike) -> dict:
    config = json.loads(Path(file).read_text("utf-8"))
    return config if isinstance(config, dict) else {}


def _on_hub(name: str) -> tuple[Iterable[str] | None, dict]:
    """The names of the tensors in a repository, and its config. The names are None if only pickled weights are there,
    whose names cannot be read without a download."""
    try:
        validate_repo_id(name)
        known = _in_folder(Path(huggingface_hub.snapshot_download(name, local_files_only=True)))
        if known[0]:
            return known
    except HFValidationError:  # a path
        return [], {}
    except LocalEntryNotFoundError:
        pass
    files = huggingface_hub.list_repo_files(name)
    formats = {Path(file).suffix for file in files}
    names: Iterable[str] | None = []
    if ".safetensors" in formats:
        names = huggingface_hub.get_safetensors_metadata(name).weight_map
    elif ".gguf" not in formats and formats & {".bin", ".pt"}:
        return None, {}
    return names, _read_config(huggingface_hub.hf_hub_download(name, CONFIG)) if CONFIG in files else {}
