"""Random tiny draft heads, written as checkpoints in the published layouts.

Names and shapes are those of SafeAILab/EAGLE, HASS, SpecForge and speculators. All weights are random, norms and
offsets included, so that no step of a draft can be left out or moved unseen. Head sizes, rope bases and eps are unlike
the target's.

Letters: V target vocabulary, DV draft vocabulary, H hidden size of the draft, Ht of the target.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from families import build

# The text of `favouring` consists mostly of these tokens, so that a random draft is sometimes right. The last of them
# is in no reduced vocabulary.
FAVOURED = (5, 17, 29, 41, 47, 58)
WINDOW = 6  # of sliding windows; texts are longer
INNER = 40  # intermediate size of every head
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
# options of the targets of 8 layers
TARGETS = {
    "llama": {"rope_theta": 90000.0},
    "qwen3": {"rope_theta": 90000.0},
    "gemma3": {},
}


@dataclass(frozen=True)
class Layout:
    """A published form of checkpoint, with one choice of its options.

    Attributes:
        kind: "eagle3", "eagle" for EAGLE-1 and EAGLE-2, or "dflash".
        writer: whose code writes such checkpoints; decides the form of config.json.
        names: (beginning of a name in `Head.tensors`, its beginning in the file), the first that matches.
        ids: ids of the target's layers in config.json; None leaves them out.
        states: the hidden states of the target that the head reads. i: the input of layer i; "last": the output of the
            last layer, before the final norm; "final": after it.
        draft_vocab: DV; None for the target's vocabulary.
        hidden: H; None for the target's.
        heads: query heads, key-value heads, head size. A head size of None is H / heads and not in config.json.
        rope_theta: None leaves it out of config.json; the base is then 10000.
        windows: for each layer, the number of rows that it sees, or None for all; () if no layer has a window.
        own: "embed_tokens" and "lm_head", as far as the file has them.
        biases: of "fc", "qkv" and "o".
        norms: optional norms, by the flags of the writers.
        flags: further entries of config.json.
    """

    kind: str = "eagle3"
    writer: str = "safeailab"
    names: tuple[tuple[str, str], ...] = ()
    ids: tuple[int, ...] | None = None
    states: tuple[int | str, ...] = (2, 4, 5)
    draft_vocab: int | None = 40
    hidden: int | None = None
    heads: tuple[int, int, int | None] = (2, 1, 8)
    rope_theta: float | None = 5000.0
    rope_scaling: dict | None = None
    num_layers: int = 1
    model_type: str = "llama"
    windows: tuple[int | None, ...] = ()
    own: tuple[str, ...] = ("lm_head",)
    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def mask_token(self) -> int | None:
        """The token of P-EAGLE's mask rows, as config.json states it; None for other heads."""
        names = ("mask_token_id", "pard_token", "ptd_token_id")
        return next((int(self.flags[name]) for name in names if name in self.flags), None)


@dataclass(frozen=True)
class Head:
    """A draft head, for its literal statement.

    Attributes:
        layout: its form.
        folder: its checkpoint.
        tensors: all tensors, fp32, named as in speculators (EAGLE-3) or SafeAILab (EAGLE-1), with `layers.{i}.` for
            every layer.
        rope_theta, eps, head_dim: those that hold, in config.json or not.
    """

    layout: Layout
    folder: Path
    tensors: dict[str, torch.Tensor]
    rope_theta: float
    eps: float
    head_dim: int


_MIDLAYER = (("layers.0.", "midlayer."),)
_SPECULATORS_EAGLE = (
    ("layers.0.", "transformer."),
    ("fc.", "fusion_fc."),
    ("norm.", "pre_lm_head_layernorm."),
)
_EAGLE1 = {"kind": "eagle", "states": ("final",), "draft_vocab": None, "own": ()}

# Layouts for a target of 8 layers. Without ids, the inputs of layers 2, L // 2 and L - 3 are read.
LAYOUTS = {
    "safeailab": Layout(names=_MIDLAYER, heads=(4, 2, None), rope_theta=None),
    "safeailab_whole_vocabulary": Layout(names=_MIDLAYER, draft_vocab=None, own=("lm_head", "embed_tokens")),
    "safeailab_wider_target": Layout(
        names=_MIDLAYER,
        hidden=24,
        heads=(3, 1, 16),
        own=("lm_head", "embed_tokens"),
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    # a first id of 1 marks a list of layers whose outputs are meant
    "specforge": Layout(
        writer="specforge",
        names=(*_MIDLAYER, ("", "")),
        ids=(1, 4, 6),
        states=(2, 5, 7),
        rope_scaling=LLAMA3,
    ),
    "specforge_draft_model": Layout(
        writer="specforge",
        names=(("layers.0.", "draft_model.midlayer."), ("", "draft_model.")),
        norms=("fc_norm",),
        ids=(0, 3, 6),
        states=(0, 3, 6),
        biases=("qkv",),
        flags={"norm_output": True, "fc_norm": True},
    ),
    "specforge_model": Layout(
        writer="specforge",
        names=(
            ("layers.0.", "model.midlayer."),
            ("lm_head.", "lm_head."),
            ("d2t", "d2t"),
            ("t2d", "t2d"),
            ("", "model."),
        ),
        own=("lm_head", "embed_tokens"),
        draft_vocab=None,
    ),
    "specforge_two_taps": Layout(
        writer="specforge", names=(*_MIDLAYER, ("", "")), ids=(3, 6), states=(3, 6), rope_theta=300.0
    ),
    "speculators": Layout(
        writer="speculators", ids=(1, 4, 6), states=(1, 4, 6), rope_scaling=LLAMA3, biases=("qkv", "o")
    ),
    "speculators_qwen3": Layout(
        writer="speculators",
        model_type="qwen3",
        ids=(2, 5, 8),
        states=(2, 5, "last"),
        own=("lm_head", "embed_tokens"),
        flags={"norm_before_residual": True},
    ),
    "speculators_norm_before_fc": Layout(
        writer="speculators",
        norms=("input_norm",),
        ids=(3, 5, 6),
        states=(3, 5, 6),
        flags={"norm_before_fc": True, "norm_before_residual": True},
    ),
    "speculators_3.1": Layout(
        writer="speculators",
        model_type="qwen3",
        num_layers=2,
        norms=("fc_norm",),
        flags={"fc_norm": True, "norm_output": True},
    ),
    "speculators_window": Layout(writer="speculators", windows=(WINDOW, None), num_layers=2),
    "speculators_qwen3_window": Layout(writer="speculators", model_type="qwen3", windows=(None, WINDOW), num_layers=2),
    "eagle1": Layout(**_EAGLE1, biases=("fc",), rope_theta=None, heads=(4, 2, None)),
    "eagle1_qwen2": Layout(
        **{**_EAGLE1, "own": ("embed_tokens",)}, biases=("qkv",), flags={"bias": False, "qkv_bias": True}
    ),
    "eagle1_two_layers": Layout(**_EAGLE1, biases=("fc",), num_layers=2),
    "hass": Layout(
        **_EAGLE1,
        biases=("fc",),
        norms=("embedding_layernorm", "hidden_states_layernorm"),
        flags={"add_para_norm": True},
    ),
    "speculators_eagle1": Layout(
        **_EAGLE1, writer="speculators", names=_SPECULATORS_EAGLE, flags={"layernorms": False, "fusion_bias": False}
    ),
    "speculators_hass": Layout(
        **_EAGLE1,
        writer="speculators",
        names=_SPECULATORS_EAGLE,
        biases=("fc",),
        norms=("embedding_layernorm", "input_layernorm", "norm"),
        flags={"layernorms": True, "fusion_bias": True},
    ),
}

# P-EAGLE heads, in the same way
PARALLEL_LAYOUTS = {
    "vllm": Layout(names=_MIDLAYER, num_layers=2, flags={"ptd_token_id": "59"}),
    "automodel": Layout(
        writer="specforge",
        names=(("lm_head.", "lm_head."), ("mask_hidden", "mask_hidden"), ("", "model.")),
        own=("lm_head", "embed_tokens"),
        draft_vocab=None,
        norms=("fc_norm",),
        flags={"fc_norm": True, "norm_output": True, "num_depths": 6, "mask_token_id": 0},
    ),
    "speculators": Layout(
        writer="speculators",
        model_type="qwen3",
        ids=(2, 5, 8),
        states=(2, 5, "last"),
        num_layers=2,
        windows=(None, WINDOW),
        own=("lm_head", "embed_tokens"),
        norms=("input_norm",),
        flags={
            "norm_before_fc": True,
            "norm_before_residual": True,
            "mask_token_id": 60,
            "speculators_model_type": "peagle",
            "speculators_config": {"proposal_methods": [{"speculative_tokens": 5}]},
        },
    ),
    "specforge_wider_target": Layout(
        writer="specforge",
        names=(*_MIDLAYER, ("", "")),
        hidden=24,
        heads=(3, 1, 16),
        own=("lm_head", "embed_tokens"),
        biases=("fc", "qkv", "o"),
        flags={"pard_token": 58},
    ),
}


def favouring(target, factor: float = 4.0):
    """The target itself, changed in place so that its text consists mostly of `FAVOURED` tokens."""
    with torch.no_grad():
        target.get_output_embeddings().weight[list(FAVOURED)] *= factor
    return target


def target_of(family: str = "llama", seed: int = 1, **options):
    """A target of 8 layers, whose text consists mostly of few tokens, so that random drafts are accepted at times."""
    return favouring(build(family, seed, num_hidden_layers=8, **{**TARGETS[family], **options}))


def write_head(folder: Path, target, layout: str | Layout, seed: int = 0) -> Head:
    """Write a random head for `target` in a layout, or in the layout `LAYOUTS[layout]`."""
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    return write_tensors(folder, target, layout, random_tensors(layout, target.config, seed))


def write_tensors(
    folder: Path, target, layout: Layout, tensors: dict[str, torch.Tensor], config: dict | None = None
) -> Head:
    """Write a head that consists of `tensors`, which are named as in `Head`. `config` is its config.json; None: that of
    an EAGLE head."""
    config = config or _config(layout, target.config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    named = {_renamed(name, layout.names): tensor for name, tensor in tensors.items()}
    if layout.writer == "safeailab":
        torch.save(named, folder / "pytorch_model.bin")
    else:
        save_file(named, folder / "model.safetensors")
    layer = config.get("transformer_layer_config", config)
    head_dim = layer.get("head_dim") or layer["hidden_size"] // layer["num_attention_heads"]
    return Head(layout, folder, tensors, layout.rope_theta or 10000.0, layer["rms_norm_eps"], head_dim)


def random_tensors(layout: Layout, target, seed: int) -> dict[str, torch.Tensor]:
    """Tensors named as in `Head`, for a target of the config `target`."""
    random = torch.Generator().manual_seed(seed)
    hidden, vocab = layout.hidden or target.hidden_size, target.vocab_size
    heads, kv_heads, head_dim = layout.heads
    head_dim = head_dim or hidden // heads
    eagle3, inner = layout.kind == "eagle3", INNER
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        # EAGLE-1's output goes to the target's head without a norm, and must be small there
        size = 0.3 if layout.kind == "eagle" and name.endswith(("fc", "o_proj", "down_proj")) else 1.5
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) * size / inputs**0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(outputs, generator=random) * 0.5

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.4 * torch.randn(size, generator=random)

    for layer in range(layout.num_layers):
        first, at = layer == 0, f"layers.{layer}"
        inputs = 2 * hidden if first and eagle3 else hidden
        for part, outputs in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            linear(f"{at}.self_attn.{part}_proj", outputs * head_dim, inputs, "qkv" in layout.biases)
        linear(f"{at}.self_attn.o_proj", hidden, heads * head_dim, "o" in layout.biases)
        if layout.model_type == "qwen3":
            norm(f"{at}.self_attn.q_norm", head_dim)
            norm(f"{at}.self_attn.k_norm", head_dim)
        for part in ("gate", "up"):
            linear(f"{at}.mlp.{part}_proj", inner, hidden)
        linear(f"{at}.mlp.down_proj", hidden, inner)
        norm(f"{at}.post_attention_layernorm", hidden)
        if eagle3 or not first or "input_layernorm" in layout.norms:
            norm(f"{at}.input_layernorm", hidden)
        if eagle3 and first:
            norm(f"{at}.hidden_norm", hidden)
    of_states = 2 * hidden if layout.kind == "eagle" else target.hidden_size * len(layout.states)
    linear("fc", hidden, of_states, "fc" in layout.biases)
    if "fc_norm" in layout.norms:
        for tap in range(len(layout.states)):
            norm(f"fc_norm.{tap}", target.hidden_size)
    if "input_norm" in layout.norms:
        norm("input_norm", target.hidden_size * len(layout.states))
    for name in ("embedding_layernorm", "hidden_states_layernorm", "hidden_norm"):
        if name in layout.norms:
            norm(name, hidden)
    if eagle3 or "norm" in layout.norms:
        norm("norm", hidden)
    if layout.mask_token is not None:
        tensors["mask_hidden"] = torch.randn(1, 1, target.hidden_size * len(layout.states), generator=random)
    if "embed_tokens" in layout.own:
        tensors["embed_tokens.weight"] = torch.randn(vocab, hidden, generator=random)
    if layout.draft_vocab is None:
        drafted = torch.arange(vocab)
    else:
        others = [token for token in range(vocab) if token not in FAVOURED]
        others = [others[place] for place in torch.randperm(len(others), generator=random).tolist()]
        drafted = torch.tensor(sorted([*FAVOURED[:-1], *others][: layout.draft_vocab]))
        tensors["d2t"] = drafted - torch.arange(len(drafted))
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, drafted, True)
    if "lm_head" in layout.own:
        linear("lm_head", len(drafted), hidden)
        tensors["lm_head.weight"][torch.isin(drafted, torch.tensor(FAVOURED))] *= 3
    return tensors


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for beginning, other in names:
        if name.startswith(beginning):
            return other + name[len(beginning) :]
    return name


def layer_config(layout: Layout, target) -> dict:
    """The part of config.json that describes the layers."""
    hidden = layout.hidden or target.hidden_size
    heads, kv_heads, head_dim = layout.heads
    layer: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": INNER,
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 16,
        "rms_norm_eps": 0.03,
        "vocab_size": target.vocab_size,
        "tie_word_embeddings": False,
        "model_type": layout.model_type,
    }
    if head_dim is not None:
        layer["head_dim"] = head_dim
    if layout.windows:
        types = ["sliding_attention" if window else "full_attention" for window in layout.windows]
        layer |= {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": types}
    if "qkv" in layout.biases and layout.kind != "eagle":
        layer["attention_bias"] = True
    if layout.writer == "speculators":  # as transformers 5 writes it
        rope = {"rope_type": "default", **(layout.rope_scaling or {})}
        layer["rope_parameters"] = {**rope, "rope_theta": layout.rope_theta or 10000.0}
    else:
        layer["rope_scaling"] = layout.rope_scaling
        if layout.rope_theta is not None:
            layer["rope_theta"] = layout.rope_theta
        if layout.writer == "specforge" and layout.rope_scaling:  # its exports write both forms
            layer["rope_parameters"] = {**layout.rope_scaling, "rope_theta": layout.rope_theta}
    return layer


def speculators_config(layout: Layout, target, named: str, architecture: str) -> dict:
    """What config.json of every kind of head has in speculators' form."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    return {
        "architectures": [architecture],
        "speculators_model_type": named,
        "transformer_layer_config": layer_config(layout, target),
        "speculators_config": {
            "algorithm": named,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": "tiny", "architectures": target.architectures},
        },
    }


def _config(layout: Layout, target) -> dict:
    """config.json of an EAGLE head."""
    ids = {} if layout.ids is None else {"eagle_aux_hidden_state_layer_ids": list(layout.ids)}
    if layout.writer == "speculators":
        named = "eagle3" if layout.kind == "eagle3" else "eagle"
        architecture = "Eagle3Speculator" if named == "eagle3" else "EagleSpeculator"
        config = speculators_config(layout, target, named, architecture) | ids
        if layout.kind == "eagle3":
            flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
            config |= dict.fromkeys(flags, False) | {"draft_vocab_size": layout.draft_vocab or target.vocab_size}
            config["target_hidden_size"] = None
        return config | layout.flags
    architecture = "LlamaForCausalLMEagle3" if layout.kind == "eagle3" else "LlamaForCausalLM"
    config = {**layer_config(layout, target), "architectures": [architecture], **layout.flags}
    if ids:
        config["eagle_config"] = ids
    if layout.draft_vocab is not None:
        config["draft_vocab_size"] = layout.draft_vocab
    if layout.hidden is not None:
        config["target_hidden_size"] = target.hidden_size
    return config
