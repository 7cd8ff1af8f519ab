"""Tiny random models of many families, and prompts for them."""

import torch
import transformers

VOCAB, PAD, BOS, EOS = 61, 0, 1, 2
WINDOW = 6
NEVER = 10_000  # an EOS that no model here can emit (None means: as in the model's generation config)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

# name -> model class, config class, options, attention implementation of the plain reference
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _COMMON),
}


def build(family: str, seed: int = 0, **options) -> transformers.PreTrainedModel:
    """A model with weights large enough that its greedy text wanders."""
    model_class, config_class, defaults = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**defaults, **options})
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # some releases drop the softcap under sdpa
    return model


def prompt(batch: int = 2, length: int = 9, padding: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens; every row but the last is padded on the left by `padding`."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if batch > 1 and padding:
        mask[:-1, :padding] = 0
        input_ids[:-1, :padding] = PAD
    return {"input_ids": input_ids, "attention_mask": mask}
