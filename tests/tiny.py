"""A tiny random Llama with a tiny tokenizer, for tests of loading and of the command line."""

import json

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
END_ID = 0
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# two merges, because transformers 5.17 reads a list of one merge as a string
MERGES = [("a", "b"), ("x", "y")]
TOKENS = [*SPECIAL, *ALPHABET, *("".join(pair) for pair in MERGES)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and three special tokens."""
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[END_ID], pad_token=SPECIAL[END_ID])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """Random weights that are large enough that greedy text does not repeat one token for ever."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def save(folder, seed: int = 0, layers: int = 2):
    """Write model and tokenizer to `folder` and return it."""
    model(seed, layers).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def add_mtp_layer(folder, noise: float = 1.0, seed: int = 0) -> None:
    """Add an MTP layer, with DeepSeek's names of tensors, to the Llama in a folder. Its first layer keeps the embedding
    of the token and adds noise of this size; its block is that of the target's first layer."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    layer, norm = f"model.layers.{layers}.", tensors["model.norm.weight"]
    block = {name: each for name, each in tensors.items() if name.startswith("model.layers.0.")}
    added = {layer + name.split(".", 3)[3]: each.clone() for name, each in block.items()}
    random = torch.Generator().manual_seed(seed)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        added[f"{layer}{name}.weight"] = (1 + 0.3 * torch.randn(norm.shape, generator=random)).to(norm.dtype)
    eh_proj = (
        torch.eye(len(norm), 2 * len(norm))
        + noise * torch.randn(len(norm), 2 * len(norm), generator=random) / len(norm) ** 0.5
    )
    eh_proj = eh_proj.to(norm.dtype)
    save_file(tensors | added | {f"{layer}eh_proj.weight": eh_proj}, file, metadata={"format": "pt"})


def save_gguf(file, source: LlamaForCausalLM, without: str | None = None) -> None:
    """Write `source` with the tokenizer above as an unquantized GGUF file, without weights whose names are like
    `without`."""
    import gguf

    config = source.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(END_ID)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(END_ID)
    writer.add_chat_template(CHAT_TEMPLATE)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in source.state_dict().items():
        if without and without in name:
            continue
        if name.endswith("q_proj.weight"):
            tensor = _interleave_rope(tensor, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            tensor = _interleave_rope(tensor, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    # llama.cpp pairs neighbouring channels; transformers pairs the two halves of a head
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def saved_config(folder) -> dict:
    """The contents of config.json in a folder of a transformers model."""
    return json.loads((folder / "config.json").read_text())
