"""Tiny configs of any transformers class, by the names of its sizes.

A config is built from the class's own defaults, with every size replaced by a small one, sub-configs first. Values
that the class derives from other sizes (a default of None) stay derived. All hidden sizes are equal, and all numbers of
heads are equal, so that the parts of a model fit together.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig

HIDDEN, HEADS, KV_HEADS, HEAD, FEED_FORWARD, LAYERS = 64, 4, 2, 16, 96, 2
WORDS, VOCAB = 61, 96  # tokens of ordinary text, and of the whole vocabulary with the special tokens behind them
PAD, BOS, EOS = 0, 1, 2
WINDOW, CHUNK = 6, 8  # the texts of a check are longer
EXPERTS, RANK, POSITIONS, PATCHES = 4, 16, 256, 4


def at_most(limit: int) -> Callable[[int], int]:
    return lambda default: min(default, limit)


# the name of a size -> the small size, or a function of the default. The first match counts; without one, the default
RULES: list[tuple[str, int | Callable[[int], int]]] = [
    ("type_vocab_size|additional_vocab_size|n_langs", at_most(2)),
    ("vocab_offset", WORDS),
    ("codebook_size", HIDDEN),
    (r"\w*vocab_size\w*|\w*_vocab|num_embeddings", VOCAB),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers|attn_layer_offset|expert_layer_offset", at_most(1)),
    ("num_kv_shared_layers", at_most(LAYERS)),
    (r"num_key_value_groups|topk_group|\w*n_?groups?|n_shared_experts|num_shared_experts", at_most(1)),
    (r"\w*(num_key_value|num_kv|kv_n)_heads", KV_HEADS),
    ("mamba_n_heads|n_mamba_heads|mamba_num_heads", 2 * HEADS),
    ("mamba_d_ssm", 2 * HIDDEN),
    (r"qk_rope_head_dim|rotary_dim|d_rel", at_most(HEAD // 2)),
    (r"\w*head_?dim\w*|\w*head_size|dim_head|d_kv|kv_channels|query_pre_attn_scalar|mamba_d_head", at_most(HEAD)),
    (r"\w*heads?", HEADS),
    (r"\w*layers?|\w*depth|num_blocks|depths", at_most(LAYERS)),
    (r"\w*_rank|\w*lowrank", at_most(RANK)),
    (r"\w*(experts_per_tok|experts_per_token|top_?k|moe_k)", at_most(2)),
    (r"\w*experts|zero_expert_num", at_most(EXPERTS)),
    (r"\w*sliding_window(_size)?|\w*window_size|local_attention|\w*window_len", at_most(WINDOW)),
    (r"\w*attention_chunk_size|index_block_size", at_most(CHUNK)),
    (r"\w*(_pattern|_interval|_every_n_layers|_frequency|layer_period|layer_group_size)", at_most(2)),
    (r"\w*(intermediate|ffn|d_ff|dff|n_inner|mlp_dim|dim_ff|feed_forward_size|expert_dim)\w*", at_most(FEED_FORWARD)),
    (r"max_\w*position\w*|n_positions|n_ctx|max_seq_len|seq_len|context_length|\w*source_positions", POSITIONS),
    ("codebook_dim", HIDDEN),
    (r"num_position_embeddings", PATCHES**2),
    (r"(pos_emb|init_pos_emb)_(height|width)", PATCHES),
    (r"num_channels|in_channels|audio_channels|out_channels", at_most(3)),
    (
        r"\w*hidden_(size|dim)\w*|hidden_sizes|d_model|n_embd|dim|\w*emb(ed|edding)?_(dim|size)\w*|\w*channels?"
        r"|\w*proj(ection|ector)?_(dims?|size)|\w*(in|out|input|output)_(dim|size)|lru_width|d_inner|emb_dim",
        HIDDEN,
    ),
]
COMPILED = [(re.compile(pattern), small) for pattern, small in RULES]
TOKEN = re.compile(r"\w*(token|im_start|im_end|newline|patch)_(id|index|ids)|\w*_token_ids?")
LAYER_INDEXES = re.compile(r"\w*(indexes|layer_ids?|feature_layers?)")
TEXT = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS}
# sizes that some classes leave to their checkpoints
UNSAID = {
    "head_dim": HEAD,
    "num_key_value_heads": KV_HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
# against the defaults: a causal model of an encoder family needs is_decoder, and with tied random embeddings a text
# repeats one token forever
SWITCHES = {"is_decoder": True, "tie_word_embeddings": False}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE = {"<image>": VOCAB - 1}
# config class -> options that the rules cannot derive; a dict for a sub-config is merged into that sub-config's options
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "ChameleonConfig": {"vocabulary_map": _IMAGE | {"IMGIMGAA": VOCAB - 2}},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: _ROPE | {"mrope_section": [4, 2, 2]} for kind in ("sliding_attention", "full_attention")
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [HIDDEN, HIDDEN]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Dots3NoteTextConfig": {
        "num_key_value_heads": HEADS, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": RANK, "swa_kv_lora_rank": RANK, "swa_head_dim": HEAD + HEAD // 2,
        "swa_qk_nope_head_dim": HEAD, "swa_v_head_dim": HEAD,
    },
    "DoryConfig": {
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1, "n_output_layers": 1,
    },
    "Emu3Config": {"vocabulary_map": _IMAGE | {"<|extra_200|>": VOCAB - 2, "<|visual token 000000|>": VOCAB - 3}},
    "DiffusionGemmaTextConfig": {
        "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": FEED_FORWARD,
        "global_head_dim": 2 * HEAD,
    },
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [FEED_FORWARD, FEED_FORWARD], "rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]},
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [FEED_FORWARD] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "Gemma4TextConfig": {"global_head_dim": 2 * HEAD},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 2 * HEAD},
    "Glm5NextTextConfig": {"index_topk": 16},
    "Granite4VisionConfig": {"deepstack_layer_map": [[1, 1]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"head_dim": HEAD // 2},
    "Mamba2Config": {"num_heads": 2 * HEADS},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "PaddleOCRTextConfig": {"rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}},
    "PerceptionLMConfig": {"vision_config": {"model_args": {"embed_dim": HIDDEN}}},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "ReformerConfig": {"axial_pos_embds": False},
    "Step3p7TextConfig": {"sliding_window": WINDOW},
    "XmodConfig": {"default_language": "en_XX"},
}  # fmt: skip


# vision towers of the package timm are replaced: no text goes through them
STAND_INS = {"TimmWrapperConfig": CLIPVisionConfig, "Gemma3nVisionConfig": CLIPVisionConfig}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config of that class whose model has a few hundred thousand weights; its own defaults otherwise."""
    config = config_class(**tiny_options(config_class))
    for name, part in vars(config).items():
        if stand_in := STAND_INS.get(type(part).__name__):
            # not by setattr, which checks the class of a sub-config
            vars(config)[name] = stand_in(**(vars(part) | tiny_options(stand_in)))
    return config


def tiny_options(
    config_class: type[PreTrainedConfig],
    default: PreTrainedConfig | None = None,
    ids: dict[int, int] | None = None,
    exceptions: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments that make a tiny config of this class.

    Args:
        default: an instance whose defaults replace the class's, such as a sub-config of another config.
        ids: special token -> its id in the small vocabulary, so that all parts of a model agree.
        exceptions: options that the rules do not make.
    """
    default = config_class() if default is None else default
    ids = {} if ids is None else ids
    exceptions = EXCEPTIONS.get(config_class.__name__, {}) | (exceptions or {})
    defaults = dict(_defaults(config_class, default))
    layered = [value for name, value in vars(default).items() if name in defaults and _is_layered(value)]
    layers = max([LAYERS, *(len(set(value)) for value in layered)])
    options = {}
    for name, value in defaults.items():
        made = vars(default).get(name)
        if _is_layered(made):
            options[name] = _every_kind(made, layers)
        elif name == "num_hidden_layers":
            options[name] = layers
        elif value is not None:
            options[name] = _small(name, value, defaults, ids)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            options[name] = type(value)(**tiny_options(type(value), value, ids, exceptions.pop(name, None)))
    options |= {name: value for name, value in (TEXT | SWITCHES).items() if name in defaults}
    if "mrope_section" in (getattr(config_class, "ignore_keys_at_rope_validation", None) or ()):
        options["rope_parameters"] = _with_sections(
            vars(default).get("rope_parameters") or _ROPE, options.get("qk_rope_head_dim", HEAD)
        )
    return options | exceptions


def _defaults(config_class: type[PreTrainedConfig], default: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """The parameters and their defaults; None for values that the class derives."""
    own, said = vars(config_class()), vars(default)
    unsaid = UNSAID | ({"head_dim": None} if "qk_rope_head_dim" in said else {})
    for parameter in inspect.signature(config_class.__init__).parameters.values():
        name = parameter.name
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name == "self":
            continue
        value = None if parameter.default is parameter.empty else parameter.default
        if not isinstance(said.get(name), PreTrainedConfig) and said.get(name) != own.get(name):
            value = said.get(name)
        yield name, unsaid.get(name) if value is None else value


def _small(name: str, value: Any, defaults: dict[str, Any], ids: dict[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        if LAYER_INDEXES.fullmatch(name):
            return type(value)(range(min(len(value), LAYERS)))
        return type(value)(_small(name, item, defaults, ids) for item in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if TOKEN.fullmatch(name):
        return ids.setdefault(value, VOCAB - 1 - len(ids)) if value >= 0 else value
    if name == "image_size":
        patch = defaults.get("patch_size", 1)
        return PATCHES * patch if isinstance(patch, int) else value
    if name.endswith("key_value_heads"):
        if "qk_rope_head_dim" in defaults or value == defaults.get("num_attention_heads"):
            return HEADS  # one latent makes the keys of all heads
        return 1 if value == 1 else KV_HEADS
    small = next((small for pattern, small in COMPILED if pattern.fullmatch(name)), value)
    return small(value) if callable(small) else small


def _with_sections(rope: dict[str, Any], size: int) -> dict[str, Any]:
    """Rope of a head of `size`: half of the rotated channels for time, a quarter each for height and width."""
    half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    return rope | {"mrope_section": [half // 2, half // 4, half // 4]}


def _is_layered(value: Any) -> bool:
    return isinstance(value, list) and len(value) > LAYERS and all(isinstance(item, str) for item in value)


def _every_kind(layer_types: list[str], layers: int) -> list[str]:
    """A list of `layers` layers that repeats every kind, in the order of first occurrence."""
    kinds = list(dict.fromkeys(layer_types))
    return [kinds[layer % len(kinds)] for layer in range(layers)]
