"""Tiny random models of every tested family, and prompts for them."""

from typing import NamedTuple

import torch
import transformers
from packaging.version import Version

VOCAB, PAD, BOS, EOS = 61, 0, 1, 2
WINDOW, CHUNK = 6, 8  # the prompts and texts of the tests are longer than both
NEVER = 10_000  # an EOS token that no model here can emit; None would mean the one in the model's generation config

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
    "tie_word_embeddings": False,  # with tied random embeddings, a model would repeat one token for ever
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WINDOW = {**_GROUPED, "sliding_window": WINDOW}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MIXED = {**_WINDOW, "sliding_window_pattern": 2}


class Family(NamedTuple):
    """The config of a model, and the features of its attention other than equal numbers of query and key heads and full
    attention."""

    model: str
    options: dict
    features: str = ""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {**_GROUPED, "num_hidden_layers": 2}, "GQA"),
    "llama4": Family(
        "Llama4ForCausalLM",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": CHUNK,
            "no_rope_layer_interval": 2,
            "floor_scale": 4,
        },
        "GQA, chunks on layers with rope",
    ),
    "qwen2": Family("Qwen2ForCausalLM", _GROUPED, "GQA"),
    "qwen2_window": Family(
        "Qwen2ForCausalLM",
        {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
        "GQA, window on some layers",
    ),
    "qwen3": Family("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}, "GQA"),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "GQA",
    ),
    "mistral": Family("MistralForCausalLM", {**_GROUPED, "sliding_window": None}, "GQA"),
    "mistral_window": Family("MistralForCausalLM", _WINDOW, "GQA, window"),
    "mixtral": Family("MixtralForCausalLM", {**_GROUPED, **_EXPERTS}, "GQA"),
    "gemma": Family("GemmaForCausalLM", {**_COMMON, "head_dim": 16, "num_key_value_heads": 1}, "MQA"),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_WINDOW, "head_dim": 8, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
        "GQA, window on some layers, softcap",
    ),
    "gemma3": Family("Gemma3ForCausalLM", {**_MIXED, "head_dim": 8}, "GQA, window on some layers"),
    "phi": Family("PhiForCausalLM", _COMMON),
    "phi3": Family("Phi3ForCausalLM", {**_GROUPED, "sliding_window": None}, "GQA"),
    "phi3_window": Family("Phi3ForCausalLM", _WINDOW, "GQA, window"),
    "gpt_neox": Family("GPTNeoXForCausalLM", _COMMON),
    "gpt2": Family("GPT2LMHeadModel", _COMMON, "learned positions"),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", _COMMON, "MQA, learned positions"),
    "opt": Family("OPTForCausalLM", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}, "learned positions"),
    "gpt_oss": Family("GptOssForCausalLM", {**_WINDOW, **_EXPERTS, "head_dim": 8}, "GQA, window on some layers, sinks"),
    "cohere2": Family("Cohere2ForCausalLM", {**_MIXED}, "GQA, window on some layers"),
    "olmo2": Family("Olmo2ForCausalLM", _GROUPED, "GQA"),
    "granite": Family("GraniteForCausalLM", {**_GROUPED, "attention_multiplier": 0.2}, "GQA, a scale of its own"),
    "starcoder2": Family("Starcoder2ForCausalLM", _WINDOW, "GQA, window"),
    "stablelm": Family("StableLmForCausalLM", _GROUPED, "GQA"),
    "smollm3": Family("SmolLM3ForCausalLM", {**_GROUPED, "no_rope_layer_interval": 2}, "GQA, layers without positions"),
    "glm4": Family("Glm4ForCausalLM", {**_GROUPED, "head_dim": 8}, "GQA"),
    "exaone4": Family("Exaone4ForCausalLM", {**_MIXED}, "GQA, window on some layers"),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **_COMMON,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "MLA: values narrower than keys",
    ),
}
# families for tests that do not depend on the family
FEW = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral_window", "gpt_neox")

_MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_n_groups": 1}
_SEQ2SEQ = {"vocab_size": VOCAB, "d_model": 16}

# name -> (model, words of the error with which `patch` refuses it)
REFUSED = {
    "falcon": Family("FalconForCausalLM", _COMMON, "AttentionInterface"),
    "bloom": Family("BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "n_head": 4}, "AttentionInterface"),
    "mpt": Family("MptForCausalLM", {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4}, "AttentionInterface"),
    "mamba": Family(
        "MambaForCausalLM", {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1}, "recurrent state"
    ),
    "jamba": Family("JambaForCausalLM", {**_GROUPED, "num_experts": 2, "use_mamba_kernels": False}, "recurrent state"),
    "recurrent_gemma": Family(
        "RecurrentGemmaForCausalLM", {**_GROUPED, "lru_width": 32, "attention_window_size": 8}, "recurrent state"
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {**_GROUPED, "num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
        "recurrent state",
    ),
    "falcon_h1": Family("FalconH1ForCausalLM", {**_GROUPED, **_MAMBA}, "recurrent state"),
    "t5": Family(
        "T5ForConditionalGeneration",
        {**_SEQ2SEQ, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "decoder-only",
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        {**_SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        "decoder-only",
    ),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        {**FAMILIES["deepseek_v3"].options, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
        "by their positions",
    ),
    "phimoe_window": Family("PhimoeForCausalLM", {**_WINDOW, **_EXPERTS}, "sliding_window"),
}
# GPT-J uses the attention interface since transformers 5.24
_ported = Version(transformers.__version__).release >= (5, 24)
(FAMILIES if _ported else REFUSED)["gptj"] = Family(
    "GPTJForCausalLM", {**_COMMON, "rotary_dim": 4}, "rotary in part" if _ported else "AttentionInterface"
)


def build(family: str, seed: int = 0, **options) -> transformers.PreTrainedModel:
    """A model whose weights are large enough that its greedy text varies, and that every input of a layer affects the
    text."""
    model_class, defaults, _ = (FAMILIES | REFUSED)[family]
    model_class = getattr(transformers, model_class)
    torch.manual_seed(seed)
    model = enlarge_weights(model_class(model_class.config_class(**{**defaults, **options})))
    if family == "gemma2":
        model.set_attn_implementation("eager")  # some versions of transformers ignore the softcap under sdpa
    return model


def enlarge_weights(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Draw new weights, large enough that greedy text does not repeat one token for ever."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 2 / weight.shape[-1] ** 0.5)
    return model.eval()


def perturbed(family: str, noise: float = 0.05, **options) -> transformers.PreTrainedModel:
    """`build(family)` with noise on each weight, in standard deviations. As a draft model it is sometimes right."""
    return add_noise(build(family, **options), noise)


def add_noise(model, noise: float, seed: int = 0):
    """Add noise to the weights of a model in place, for each tensor in proportion to its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return model


def prompt(batch: int = 2, length: int = 9, padding: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens. Every row except the last is padded on the left by `padding`."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if batch > 1 and padding:
        mask[:-1, :padding] = 0
        input_ids[:-1, :padding] = PAD
    return {"input_ids": input_ids, "attention_mask": mask}
