"""EAGLE heads: reading their files, and their model against a literal computation."""

import re

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from checkpoints import LAYOUTS, LLAMA3, write_head
from literal_eagle import LiteralDraft
from specdec_triton.forward.attention import call_with_tree_attention, config_ids
from specdec_triton.forward.cache import TreeCache
from specdec_triton.forward.checks import graph_hazard
from specdec_triton.forward.fusion import fuse
from specdec_triton.forward.versions import CACHE
from specdec_triton.heads.checkpoint import Checkpoint, read_checkpoint
from specdec_triton.heads.eagle import EagleModel
from specdec_triton.tools.host_sync import count_host_reads
from specdec_triton.tree import DraftTree, Topology, pack_tree

V, DV, H, HT, E, MLP = 97, 40, 24, 28, 20, 36
HEADS, KV, DIM = 4, 2, 10  # 4 * 10 != H
EPS, BASE = 1e-3, 777.0
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "vocab_size": V, "draft_vocab_size": DV,
    "hidden_size": H, "intermediate_size": MLP, "num_hidden_layers": 40, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "head_dim": DIM, "hidden_act": "silu", "rms_norm_eps": EPS, "rope_theta": BASE,
    "max_position_embeddings": 16, "target_hidden_size": HT, "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


class Weights(dict):
    """Random weights in SafeAILab's names. Norms are not one."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def linear(self, name, rows, columns, bias=False):
        self[f"{name}.weight"] = torch.randn(rows, columns, generator=self.generator) * columns**-0.5
        if bias:
            self[f"{name}.bias"] = torch.randn(rows, generator=self.generator)

    def norm(self, name, size):
        self[f"{name}.weight"] = 1 + 0.5 * torch.randn(size, generator=self.generator)

    def layer(self, name, columns, bias=False, qk_norm=False, input_norm=None):
        for part, rows in (("q", HEADS * DIM), ("k", KV * DIM), ("v", KV * DIM)):
            self.linear(f"{name}.self_attn.{part}_proj", rows, columns, bias)
        self.linear(f"{name}.self_attn.o_proj", H, HEADS * DIM, bias)
        for part in ("q_norm", "k_norm") if qk_norm else ():
            self.norm(f"{name}.self_attn.{part}", DIM)
        for part, rows, width in (("gate", MLP, H), ("up", MLP, H), ("down", H, MLP)):
            self.linear(f"{name}.mlp.{part}_proj", rows, width)
        self.norm(f"{name}.post_attention_layernorm", H)
        if input_norm:
            self.norm(f"{name}.input_layernorm", input_norm)


def eagle3(seed=0, taps=3, layers=1, bias=False, qk_norm=False, norms=None, embedding=E, own=True, reduced=True):
    """Tensors of an EAGLE-3 head. `norms`: "input_norm" or "fc_norm"."""
    weights = Weights(seed)
    weights.linear("fc", H, taps * HT)
    weights.layer("midlayer", embedding + H, bias, qk_norm, embedding)
    weights.norm("midlayer.hidden_norm", H)
    for index in range(1, layers):
        weights.layer(f"layers.{index}", H, bias, qk_norm, H)
    weights.norm("norm", H)
    if norms == "input_norm":
        weights.norm("input_norm", taps * HT)
    for tap in range(taps) if norms == "fc_norm" else ():
        weights.norm(f"fc_norm.{tap}", HT)
    weights.linear("lm_head", DV if reduced else V, H)
    if own:
        weights.linear("embed_tokens", V, embedding)
    if reduced:
        ids = torch.randperm(V, generator=weights.generator)[:DV].sort().values
        weights["d2t"] = ids - torch.arange(DV)
        weights["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    return weights


def eagle1(seed=0, bias=True, layers=1, qkv_bias=False, norms=(), embedding=H):
    weights = Weights(seed)
    weights.linear("fc", H, embedding + H, bias)
    for index in range(layers):
        weights.layer(f"layers.{index}", H, qkv_bias, input_norm=H if index or "input_layernorm" in norms else None)
    for name, size in (("embedding_layernorm", embedding), ("hidden_states_layernorm", H), ("norm", H)):
        if name in norms:
            weights.norm(name, size)
    return weights


def nested(config, **more):
    """The config in speculators' layout."""
    layers = {name: config[name] for name in config if name not in ("architectures", "draft_vocab_size")}
    outer = {"speculators_model_type": "eagle3", "draft_vocab_size": DV, "target_hidden_size": HT}
    return {**outer, "transformer_layer_config": layers, "speculators_config": {"algorithm": "eagle3"}, **more}


def load(tensors, config=CONFIG, **options):
    return EagleModel.from_checkpoint(Checkpoint("a/head", config, dict(tensors)), **options)


def target(cls=LlamaForCausalLM, config=LlamaConfig, **options):
    sizes = {"vocab_size": V, "hidden_size": HT, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
    return cls(config(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": 8, **options})).eval()


# ---- the computation, literally ----


def rms(states, weight):
    return weight * states / (states.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def rotated(states, positions, base):
    """states [B, heads, N, DIM]."""
    angles = positions[:, None, :, None] * base ** (-torch.arange(0, DIM, 2) / DIM)
    one, other = states.chunk(2, dim=-1)
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], dim=-1)


def attended(weights, name, states, positions, base, window=100):
    """Causal self-attention over [B, N, columns]."""

    def projected(part, heads):
        linear = f"{name}.self_attn.{part}"
        values = functional.linear(states, weights[f"{linear}_proj.weight"], weights.get(f"{linear}_proj.bias"))
        values = values.unflatten(-1, (heads, DIM)).transpose(1, 2)
        return rms(values, weights[f"{linear}_norm.weight"]) if f"{linear}_norm.weight" in weights else values

    query, key = (rotated(projected(*part), positions, base) for part in (("q", HEADS), ("k", KV)))
    key, value = (each.repeat_interleave(HEADS // KV, dim=1) for each in (key, projected("v", KV)))
    scores = query @ key.transpose(2, 3) / DIM**0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    older = torch.ones_like(later).tril(-window)
    heads = scores.masked_fill(later | older, -torch.inf).softmax(-1) @ value
    output = f"{name}.self_attn.o_proj"
    return functional.linear(
        heads.transpose(1, 2).flatten(2), weights[f"{output}.weight"], weights.get(f"{output}.bias")
    )


def mlp(weights, name, stream):
    states = rms(stream, weights[f"{name}.post_attention_layernorm.weight"])
    gate, up, down = (weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up", "down"))
    return stream + (functional.silu(states @ gate) * (states @ up)) @ down


def later_layer(weights, name, stream, positions, base):
    states = rms(stream, weights[f"{name}.input_layernorm.weight"])
    return mlp(weights, name, stream + attended(weights, name, states, positions, base))


def literal_features(weights, states):
    if "fc_norm.0.weight" in weights:
        states = [rms(each, weights[f"fc_norm.{tap}.weight"]) for tap, each in enumerate(states)]
    joint = torch.cat(states, dim=-1)
    joint = rms(joint, weights["input_norm.weight"]) if "input_norm.weight" in weights else joint
    return joint @ weights["fc.weight"].T


def literal_eagle3(
    weights, embeds, features, positions, base=BASE, normed_residual=False, norm_output=False, window=100
):
    """The state that is fed back, and the input of the output layer."""
    normed = rms(features, weights["midlayer.hidden_norm.weight"])
    inputs = torch.cat([rms(embeds, weights["midlayer.input_layernorm.weight"]), normed], dim=-1)
    stream = normed if normed_residual else features
    stream = mlp(weights, "midlayer", stream + attended(weights, "midlayer", inputs, positions, base, window))
    index = 1
    while f"layers.{index}.mlp.up_proj.weight" in weights:
        stream = later_layer(weights, f"layers.{index}", stream, positions, base)
        index += 1
    normed = rms(stream, weights["norm.weight"])
    return (normed if norm_output else stream), normed


def literal_eagle1(weights, embeds, features, positions, base=BASE):
    if "embedding_layernorm.weight" in weights:
        embeds = rms(embeds, weights["embedding_layernorm.weight"])
    if "hidden_states_layernorm.weight" in weights:
        features = rms(features, weights["hidden_states_layernorm.weight"])
    stream = functional.linear(torch.cat([embeds, features], dim=-1), weights["fc.weight"], weights.get("fc.bias"))
    if "layers.0.input_layernorm.weight" in weights:
        stream = later_layer(weights, "layers.0", stream, positions, base)
    else:
        stream = mlp(weights, "layers.0", stream + attended(weights, "layers.0", stream, positions, base))
    index = 1
    while f"layers.{index}.mlp.up_proj.weight" in weights:
        stream = later_layer(weights, f"layers.{index}", stream, positions, base)
        index += 1
    return stream, rms(stream, weights["norm.weight"]) if "norm.weight" in weights else stream


def rows(model, count=7, batch=2, seed=5):
    """Embeddings, features and positions."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, count, model.embedding_size, generator=generator)
    return embeds, torch.randn(batch, count, H, generator=generator), torch.arange(count).expand(batch, count)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def check(model, literal, weights, **options):
    """The model over all rows at once, and in chunks with a cache, is the literal computation."""
    embeds, features, positions = rows(model)
    state, head_input = literal(weights, embeds, features, positions, **options)
    found = model(embeds, features, positions).last_hidden_state
    close(found, state)
    close(model.logits_input(found), head_input)
    cache, chunks = DynamicCache(), []
    for first, last in ((0, 3), (3, 4), (4, 7)):
        part = slice(first, last)
        output = model(embeds[:, part], features[:, part], positions[:, part], **{CACHE: cache})
        chunks.append(output.last_hidden_state)
        assert output[CACHE] is cache and cache.get_seq_length() == last
    close(torch.cat(chunks, dim=1), state)
    return model


EAGLE3 = {
    "plain": ({}, {}),
    "shared embedding": ({"own": False}, {}),
    "whole vocabulary": ({"reduced": False}, {}),
    "bias": ({"bias": True}, {}),
    "three layers": ({"layers": 3}, {}),
    "qwen3": ({"qk_norm": True, "layers": 2}, {}),
    "input_norm": ({"norms": "input_norm"}, {"norm_before_fc": True}),
    "fc_norm": ({"norms": "fc_norm"}, {}),
    "five taps": ({"taps": 5, "norms": "fc_norm"}, {"eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3, 8]}),
    "norm_output": ({"layers": 2}, {"norm_output": True}),
    "norm_before_residual": ({}, {"norm_before_residual": True}),
}


@pytest.mark.parametrize("name", EAGLE3)
def test_eagle3_is_the_literal_computation(name):
    options, config = EAGLE3[name]
    weights = eagle3(**options)
    model = load(weights, {**CONFIG, **config})
    flags = {"normed_residual": "norm_before_residual", "norm_output": "norm_output"}
    check(model, literal_eagle3, weights, **{key: bool(config.get(flag)) for key, flag in flags.items()})
    states = torch.randn(options.get("taps", 3), 2, 5, HT).unbind()
    close(model.features(states), literal_features(weights, states))
    assert model.kind == "eagle3" and model.target_hidden_size == HT and model.config.hidden_size == H
    assert (model.embed_tokens is None) == ("embed_tokens.weight" not in weights)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    if "d2t" in weights:
        assert model.target_ids.tolist() == weights["t2d"].nonzero()[:, 0].tolist()
    else:
        assert model.target_ids is None


EAGLE1 = {
    "bias": {},
    "no bias": {"bias": False},
    "qkv bias": {"qkv_bias": True},
    "two layers": {"layers": 2},
    "HASS": {"norms": ("embedding_layernorm", "hidden_states_layernorm")},
    "speculators": {"norms": ("embedding_layernorm", "input_layernorm", "norm")},
}


@pytest.mark.parametrize("name", EAGLE1)
def test_eagle1_is_the_literal_computation(name):
    weights = eagle1(**EAGLE1[name])
    model = check(load(weights), literal_eagle1, weights)
    assert model.kind == "eagle" and model.lm_head is model.embed_tokens is model.target_ids is None
    state = torch.randn(2, 3, H)
    assert model.features((state,)) is state
    assert model.taps(target(hidden_size=H)) == ("final",)


# ---- tree forwards ----

TREE = Topology((-1, 0, 0, 1, 1, 2, 3, 6), (0, 0, 1, 0, 1, 0, 0, 0))
START, LENGTH = (0, 2), 6  # a row with left padding


def prefilled(model, seed=5):
    """A cache of `LENGTH` columns, and the columns' rows."""
    embeds, features, _ = rows(model, LENGTH, seed=seed)
    padding = torch.tensor(START)[:, None]
    columns, cache = torch.arange(LENGTH), DynamicCache()
    for part in (slice(0, 4), slice(4, LENGTH)):
        mask = (columns[: part.stop] >= padding).long()
        positions = (columns[part] - padding).clamp(min=0)
        model(embeds[:, part], features[:, part], positions, attention_mask=mask, **{CACHE: cache})
    return cache, embeds, features


def over_tree(model, call, cache, embeds, features):
    """A tree forward as `TreeRunner` calls it. Returns the states [B, N, H]."""
    tree = DraftTree.from_topology(TREE, torch.zeros(2, TREE.num_nodes, dtype=torch.long))
    base, start = torch.full((2,), LENGTH), torch.tensor(START)
    tree_cache = TreeCache.from_prefill(cache, 32)
    tree_cache.place(base[:, None] + torch.arange(TREE.num_nodes))
    arguments = {
        "input_ids": tree.tokens,
        "position_ids": base[:, None] + tree.depth - start[:, None],
        "attention_mask": pack_tree(tree.depth, tree.ancestors, start, base)[:, None],
        "use_cache": True,
        "return_dict": True,
        CACHE: tree_cache,
    }
    inputs = {"inputs_embeds": embeds, "features": features}
    return call_with_tree_attention(None, config_ids(model), call, **arguments, **inputs).last_hidden_state


def path_to(node):
    return [*path_to(TREE.parents[node]), node] if node >= 0 else []


WINDOW = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 3}
TREES = {
    "window": lambda: load(eagle3(layers=2), {**CONFIG, **WINDOW}),
    "qwen3 window": lambda: load(eagle3(layers=2, qk_norm=True), nested({**CONFIG, **WINDOW})),
    "eagle3": lambda: load(eagle3()),
    "two layers": lambda: load(eagle3(layers=2, bias=True), {**CONFIG, "norm_output": True}),
    "qwen3": lambda: load(eagle3(layers=2, qk_norm=True)),
    "eagle1": lambda: load(eagle1(layers=2)),
}


@pytest.mark.parametrize("name", TREES)
def test_a_node_of_a_tree_has_the_state_of_its_path(name):
    model = TREES[name]()
    cache, *prompt = prefilled(model)
    nodes = rows(model, TREE.num_nodes, seed=6)[:2]
    states = over_tree(model, model, cache, *nodes)
    for row, start in enumerate(START):
        for node in range(TREE.num_nodes):
            path = path_to(node)
            text = [
                torch.cat([one[row, start:], other[row, path]])[None] for one, other in zip(prompt, nodes, strict=True)
            ]
            positions = torch.arange(text[0].shape[1])[None]
            close(states[row, node], model(*text, positions).last_hidden_state[0, -1])


@pytest.mark.parametrize("name", TREES)
def test_fused_layers_compute_the_same(name):
    model = TREES[name]()
    layers, is_eagle3, is_qwen3 = len(model.layers), model.kind == "eagle3", "qwen3" in name
    fused, family = fuse(model), "Qwen3" if is_qwen3 else "Llama"
    norms = {"LlamaRMSNorm": 4 if is_eagle3 else 1}
    later = {f"{family}DecoderLayer": layers - 1} if layers > 1 else {}
    norms[f"{family}RMSNorm"] = norms.get(f"{family}RMSNorm", 0) + 2 * (layers - 1)
    if is_qwen3:
        norms[f"{family}RMSNorm"] += 2 * layers
    parts = {f"{family}Attention": layers, f"{family}MLP": layers}
    assert not fused.left
    assert fused.replaced == {name: count for name, count in {**norms, **later, **parts}.items() if count}
    nodes = rows(model, TREE.num_nodes, seed=6)[:2]
    wanted = over_tree(model, model, prefilled(model)[0], *nodes)
    found = over_tree(fused.model, fused.model, prefilled(model)[0], *nodes)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    close(fused.model.logits_input(found), model.logits_input(wanted))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_sliding_window(qk_norm):
    weights = eagle3(layers=2, qk_norm=qk_norm)
    check(load(weights, {**CONFIG, **WINDOW}), literal_eagle3, weights, window=3)
    for options in ({"use_sliding_window": False}, {"layer_types": None}, {"sliding_window": None}):
        check(load(weights, {**CONFIG, **WINDOW, **options}), literal_eagle3, weights)


# ---- files of all layouts ----


def tiny_target(seed=3):
    """A target for `checkpoints.LAYOUTS`. Its norms are random."""
    torch.manual_seed(seed)
    model = target(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_attention_heads=4, head_dim=8, num_key_value_heads=2
    )
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0, 0.3) if "norm" in name else torch.nn.init.normal_(weight, 0.0, 0.2)
    return model


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_chain_drafted_by_a_file_of_each_layout_is_the_literal_one(tmp_path, name):
    """The whole way from a file to logits: its taps, features, embeddings and two steps with the state fed back."""
    verifier = tiny_target()
    head = write_head(tmp_path, verifier, name)
    model = EagleModel.from_checkpoint(read_checkpoint(tmp_path))
    model.check_target(verifier)
    assert model.kind == head.layout.kind and model.taps(verifier) == head.layout.states
    text, path = [7, 3, 55, 20, 31, 8, 14, 2, 9], (4, 33, 50)
    literal = LiteralDraft(head, verifier, text)
    embedding = model.embed_tokens or verifier.get_input_embeddings()
    output_layer = model.lm_head or verifier.get_output_embeddings()
    states = [each[None].float() for each in literal._states(verifier)]
    features, cache, positions = model.features(states), DynamicCache(), torch.arange(len(text) - 1)[None]
    tokens = torch.tensor([text[1:]])
    for depth in range(len(path) + 1):
        output = model(embedding(tokens), features, positions, **{CACHE: cache}).last_hidden_state[:, -1:]
        logits = output_layer(model.logits_input(output))[0, 0]
        wanted = literal.logits(path[:depth])
        ids = torch.arange(len(wanted)) if model.target_ids is None else model.target_ids
        torch.testing.assert_close(logits.double(), wanted[ids], rtol=1e-3, atol=1e-3)
        features, positions = output, positions[:, -1:] + 1
        tokens = torch.tensor([[*path, 0][depth : depth + 1]])


# ---- which layers ----

LAYERS = "eagle_aux_hidden_state_layer_ids"


def speculators(weights):
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "config, options, taps",
    [
        ({}, {}, (2, 4, 5)),
        ({"eagle_config": {LAYERS: [1, 3, 4]}}, {}, (2, 4, 5)),  # outputs of layers, because the first is 1
        ({"eagle_config": {LAYERS: [1, 3, 7]}}, {}, (2, 4, "last")),
        ({"eagle_config": {LAYERS: [0, 3, 8]}}, {}, (0, 3, "last")),
        ({LAYERS: [1, 3, 4]}, {"layer_meaning": "input"}, (1, 3, 4)),
        ({LAYERS: [2, 3, 4]}, {"layer_meaning": "output"}, (3, 4, 5)),
        ({LAYERS: [2, 3, 4]}, {"layers": (5, 6, 7)}, (5, 6, 7)),
        ({LAYERS: [2, 3, 4]}, {"layers": [1, 6, 7]}, (2, 7, "last")),
        ({LAYERS: []}, {}, (2, 4, 5)),
        ({LAYERS: [1, 3, 8], "speculators_model_type": "eagle3"}, {}, (1, 3, "last")),
        ({LAYERS: [1, 3, 8], "speculators_config": {}}, {}, (1, 3, "last")),
    ],
)
def test_layer_ids(config, options, taps):
    model = load(eagle3(), {**CONFIG, **config}, **options)
    assert model.taps(target()) == taps
    assert model.layer_meaning in repr(model) and f"rope_theta={BASE}" in repr(model)


def test_one_tap():
    """`use_aux_hidden_state: false`: the feature is the target's last hidden state, through `fc` if there is one."""
    config = {**CONFIG, "eagle_config": {"use_aux_hidden_state": False, LAYERS: [1, 3, 4]}}
    weights = eagle3(taps=1)
    model = load(weights, config)
    assert model.taps(target()) == ("final",)
    state = torch.randn(1, 2, HT)
    close(model.features((state,)), state @ weights["fc.weight"].T)
    assert load(weights, config, layers=(4,)).taps(target()) == (4,)
    del weights["fc.weight"]
    model = load(weights, {**config, "target_hidden_size": None})
    assert torch.equal(model.features((state[..., :H],)), state[..., :H])
    assert model.taps(target(hidden_size=H)) == ("final",)
    check(model, literal_eagle3, weights)


# ---- rotary embedding ----

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 3.0}


@pytest.mark.parametrize(
    "options",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": YARN},
        {"rope_theta": 1.0, "rope_parameters": {**LLAMA3, "rope_theta": BASE}},  # the newer form holds
        {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": BASE}},
        {
            "rope_parameters": {
                "sliding_attention": {**LLAMA3, "rope_theta": BASE},
                "full_attention": {"rope_type": "no"},
            }
        },
    ],
)
@pytest.mark.parametrize("place", ["flat", "nested"])
def test_rope_scaling_is_that_of_transformers(options, place):
    config = {**CONFIG, **options}
    model = load(eagle3(), config if place == "flat" else nested(config))
    rope = options.get("rope_parameters") or options["rope_scaling"]
    rope = {"rope_theta": BASE, **rope.get("sliding_attention", rope)}
    rope["rope_type"] = rope.pop("type", None) or rope["rope_type"]
    wanted, unscaled = (
        LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=H, num_attention_heads=HEADS, head_dim=DIM, max_position_embeddings=16, rope_parameters=each
            )
        )
        for each in (rope, {"rope_type": "default", "rope_theta": BASE})
    )
    torch.testing.assert_close(model.rotary_emb.inv_freq, wanted.inv_freq, rtol=0, atol=0)
    assert model.rotary_emb.attention_scaling == wanted.attention_scaling
    assert torch.equal(wanted.inv_freq, unscaled.inv_freq) == (rope["rope_type"] == "default")


def test_the_base_is_10000_if_none_is_given_and_an_override_wins():
    weights, without = eagle3(), {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    check(load(weights, without), literal_eagle3, weights, base=10000.0)
    check(load(weights, {**without, "rope_scaling": None}, rope_theta=5e5), literal_eagle3, weights, base=5e5)
    config = {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    check(load(weights, config, rope_theta=3e3), literal_eagle3, weights, base=3e3)
    scaled = load(weights, {**CONFIG, "rope_scaling": dict(LLAMA3)}, rope_theta=3e3).config.rope_parameters
    assert (scaled["rope_theta"], scaled["rope_type"]) == (3e3, "llama3")


def test_positions_beyond_the_config_do_not_matter():
    weights = eagle3()
    model = load(weights)
    embeds, features, positions = rows(model)
    found = model(embeds, features, positions + 100_000).last_hidden_state
    state, _ = literal_eagle3(weights, embeds, features, positions)
    torch.testing.assert_close(found, state, rtol=1e-2, atol=1e-2)  # only differences of positions count


# ---- loading ----


def test_dtype_and_device_of_the_file_and_of_the_call():
    weights = eagle3()
    half = {name: each.bfloat16() if each.is_floating_point() else each for name, each in weights.items()}
    model = load(half)
    assert model.dtype == torch.bfloat16 and not model.training and model.device.type == "cpu"
    assert not any(weight.requires_grad for weight in model.parameters())
    model = load(half, dtype=torch.float16, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    assert model.target_ids.dtype == torch.int64 and model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_embeddings_of_the_head_are_its_output_layer():
    weights = eagle3(embedding=H, reduced=False)
    head = weights.pop("lm_head.weight")
    assert load(weights).lm_head is None
    model = load(weights, {**CONFIG, "tie_word_embeddings": True})
    assert torch.equal(model.lm_head.weight, weights["embed_tokens.weight"])
    model = load({**weights, "lm_head.weight": head}, {**CONFIG, "tie_word_embeddings": True})
    assert torch.equal(model.lm_head.weight, head)


def test_tables_and_parts_of_the_target_are_not_read():
    weights = eagle3()
    rest = {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(DIM // 2), "verifier_norm.weight": torch.ones(HT)}
    assert len(load({**weights, **rest}).state_dict()) == len(weights) - 2  # d2t and t2d


def test_offsets_of_zero_over_the_whole_vocabulary_are_no_reduction():
    assert load({**eagle3(reduced=False), "d2t": torch.zeros(V, dtype=torch.int64)}).target_ids is None


FC, QUERY = "fc.weight", "midlayer.self_attn.q_proj.weight"


def changed(**tensors):
    """EAGLE-3 tensors, some of them replaced; those of None are removed. In names, __ stands for a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: each for name, each in {**eagle3(), **named}.items() if each is not None}


def ids_of_d2t(change):
    """d2t with other ids."""
    ids = eagle3()["d2t"] + torch.arange(DV)
    change(ids)
    return {"d2t": ids - torch.arange(DV)}


@pytest.mark.parametrize(
    "tensors, config, message",
    [
        (changed(midlayer__mlp__up_proj__weight=None), {}, "layers.0.mlp.up_proj.weight must be [36, 24], got none"),
        (changed(midlayer__self_attn__k_proj__weight=torch.ones(20, 24)), {},
         "midlayer.self_attn.k_proj.weight must be [20, 44], got [20, 24]"),
        (changed(midlayer__self_attn__q_proj__weight=torch.ones(40, 24)), {},
         f"{QUERY} must have more than hidden_size=24 columns (embedding and feature), got [40, 24]"),
        (changed(midlayer__self_attn__q_proj__weight=None), {}, "q_proj.weight must be a tensor of 2 dimensions"),
        (changed(norm__weight=torch.ones(23)), {}, "norm.weight must be [24], got [23]"),
        (changed(adapter__weight=torch.ones(2)), {}, "adapter.weight must not be there, got [2]: this tensor is not"),
        (changed(layers__0__mlp__up_proj__weight=torch.ones(36, 24)), {}, "must have each tensor once, got midlayer."),
        (changed(layers__2__mlp__up_proj__weight=torch.ones(36, 24)), {}, "layers.1.self_attn.q_proj.weight must be"),
        (changed(fc__weight=torch.ones(24, 85)), {}, "the target's hidden size 28 as its columns, got 85"),
        (changed(fc__weight=torch.ones(24, 84).to(torch.float8_e4m3fn)), {}, "fc.weight must be in fp32, bf16 or fp16"),
        (changed(midlayer__mlp__up_proj__weight=torch.ones(36, 24, dtype=torch.int8)), {}, "quantized heads are not"),
        (changed(), {"quantization_config": {}}, None),
        (changed(), {"quantization_config": {"quant_method": "fp8"}}, "must not be quantized, got a"),
        (changed(), {"hidden_size": None}, "config.json must have hidden_size, got None"),
        (changed(), {"num_attention_heads": 0}, "config.json must have num_attention_heads, got 0"),
        (changed(), {"head_dim": 12}, "midlayer.self_attn.q_proj.weight must be [48, 44], got [40, 44]"),
        (changed(), {"head_dim": None}, None),
        (changed(), {LAYERS: [2, 4]}, "layers must name the 3 layers whose hidden states it takes, got [2, 4]"),
        (changed(), {LAYERS: [2, 4, -1]}, "layers must be numbers of layers from 0, got [2, 4, -1]"),
        (changed(), {"use_aux_hidden_state": False}, "one hidden state (use_aux_hidden_state is false), got 3"),
        (changed(), {"norm_before_fc": True}, "input_norm.weight must be there with norm_before_fc=True"),
        (changed(input_norm__weight=torch.ones(84)), {"norm_before_fc": False}, "input_norm.weight must not be there"),
        (changed(), {"fc_norm": True}, "fc_norm.0.weight must be there with fc_norm=True"),
        (changed(fc_norm__0__weight=torch.ones(28)), {}, "fc_norm.1.weight must be [28], got none"),
        (changed(), {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "llama3, yarn, got 'dynamic'"),
        (changed(), {"rope_scaling": {"type": "linear"}}, "rope of type 'linear' must have factor, got no factor"),
        (changed(), {"layer_types": ["chunked_attention"]}, "or sliding_attention, got chunked_attention"),
        (eagle3(layers=2), {"layer_types": ["sliding_attention"], "sliding_window": 3}, "must name the 2 layers of"),
        (changed(), {"partial_rotary_factor": 0.5}, "must cover the whole head, got partial_rotary_factor=0.5"),
        (changed(), {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "multimodal rotary positions (mrope)"),
        (changed(mask_hidden=torch.ones(1, 1, 84)), {}, "have mask_token_id or pard_token or ptd_token_id, the mask"),
        (changed(mask_hidden=torch.ones(1, 84)), {"ptd_token_id": "96"}, None),
        (changed(mask_hidden=torch.ones(1, 84)), {"mask_token_id": -1}, "the mask token, got -1"),
        (changed(mask_hidden=torch.ones(1, 84)), {"mask_token_id": 5, "num_depths": 0.5}, "at least 1, got 0.5"),
        (changed(mask_hidden=torch.ones(1, 1, 28)), {"mask_token_id": 5}, "mask_hidden must be [1, 1, 84], as wide as"),
        (changed(), {"speculators_model_type": "peagle", "mask_token_id": 5}, "mask_hidden must be [1, 1, 84]"),
        ({"0.0.linear.weight": torch.ones(2, 2)}, {}, "must hold an EAGLE head, got medusa"),
        ({"weight": torch.ones(2)}, {}, "must hold an EAGLE head, got tensors of another model"),
        (changed(d2t=torch.zeros(DV)), {}, "d2t must be integers [DV], got torch.float32 [40]"),
        (changed(d2t=torch.zeros(DV - 1, dtype=torch.long)), {}, "each of the 39 tokens of d2t, got [40, 24]"),
        (changed(lm_head__weight=None), {}, "lm_head.weight must be a tensor of 2 dimensions, got none"),
        (changed(**ids_of_d2t(lambda ids: ids[1:2].fill_(ids[0]))), {}, "got 39 distinct ids of 40, from"),
        (changed(**ids_of_d2t(lambda ids: ids[-1:].fill_(97))), {}, "to distinct ids below vocab_size=97, got 40"),
        (changed(**ids_of_d2t(lambda ids: ids[:1].fill_(-1))), {}, "got 40 distinct ids of 40, from -1 to"),
        (changed(d2t=torch.arange(V - DV, V)), {}, "it seems to hold the ids themselves"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(tensors, config, message):
    if message is None:
        assert load(tensors, {**CONFIG, **config}).config.head_dim == DIM
        return
    with pytest.raises(ValueError, match=rf"^EagleModel: a/head: .*{re.escape(message)}"):
        load(tensors, {**CONFIG, **config})


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="layer_meaning must be 'input', 'output' or None, got 'hidden'"):
        load(eagle3(), layer_meaning="hidden")
    with pytest.raises(
        ValueError, match=r"layers must be None for EAGLE-1, which takes the last hidden state, got \[1\]"
    ):
        load(eagle1(), layers=(1,))
    with pytest.raises(ValueError, match=r"layers must be numbers of layers from 0, got \[True, 3, 4\]"):
        load(eagle3(), layers=(True, 3, 4))


# ---- the target ----


@pytest.mark.parametrize(
    "head, options, message",
    [
        ({}, {}, None),
        ({"reduced": False}, {}, None),
        ({"reduced": False}, {"vocab_size": V - 1}, "the target's vocabulary must be 97, the rows of lm_head, got 96"),
        ({}, {"hidden_size": 24}, "the target's hidden size must be 28, got 24"),
        ({}, {"vocab_size": 50}, "the target's vocabulary must be larger than"),
        ({}, {"vocab_size": 120}, "the target's vocabulary must be at most 97, the rows of embed_tokens, got 120"),
        ({"own": False}, {}, "the width of the target's embeddings, which are shared, must be 20, got 28"),
        ({"own": False, "embedding": HT}, {}, None),
        ({}, {"num_hidden_layers": 2}, "names no layers and takes 3 hidden states"),
        ({"taps": 2}, {}, "names no layers and takes 2 hidden states"),
    ],
)
def test_targets_that_do_not_fit_are_refused(head, options, message):
    model, verifier = load(eagle3(**head)), target(**options)
    if message is None:
        model.check_target(verifier)
        return
    with pytest.raises(ValueError, match=f"a/head.*{re.escape(message)}") as error:
        model.check_target(verifier)
    assert "LlamaForCausalLM" in str(error.value)


def test_other_misfits_with_a_target():
    with pytest.raises(
        ValueError, match="layer ids must be at most 8 .inputs of the 8 layers of Llama.*, got 9 in a/head"
    ):
        load(eagle3(), layers=(0, 3, 9)).check_target(target())
    with pytest.raises(
        ValueError, match="layer ids must be at most 7 .outputs of the 8 layers of Llama.*, got 8 in a/head"
    ):
        load(eagle3(), layers=(1, 3, 8)).check_target(target())
    with pytest.raises(ValueError, match="the dtype must be torch.bfloat16, got torch.float32"):
        load(eagle3(), dtype=torch.bfloat16).check_target(target())
    head = load({**eagle3(own=False, embedding=HT), "mask_hidden": torch.ones(1, 1, 84)}, CONFIG | {"pard_token": V})
    with pytest.raises(ValueError, match="the number of embeddings must be larger than 97, the mask token, got 97"):
        head.check_target(target())
    with pytest.raises(ValueError, match="the device must be cpu, got meta"):
        load(eagle3()).check_target(target().to("meta"))
    weights = eagle3(reduced=False)
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match="target's output layer, which is shared, must be 24, got 28"):
        load(weights).check_target(target())
    with pytest.raises(ValueError, match="the target's hidden size must be 24, got 28"):
        load(eagle1()).check_target(target())
    load(eagle1()).check_target(target(hidden_size=H))


# ---- capture and compilation ----


@pytest.mark.parametrize("name", TREES)
def test_a_tree_forward_reads_nothing_on_the_host_and_is_one_graph(name):
    model = TREES[name]()
    nodes = rows(model, TREE.num_nodes, seed=6)[:2]
    wanted = over_tree(model, model, prefilled(model)[0], *nodes)
    states = torch.randn(3, 2, 5, HT if model.kind == "eagle3" else H).unbind()

    def run(embeds, features, **arguments):
        with count_host_reads() as reads:
            output = model(embeds, features, **arguments)
            model.logits_input(output.last_hidden_state), model.features(states)
        assert reads.total == 0
        return output

    assert torch.equal(
        over_tree(
            model,
            lambda inputs_embeds, features, **rest: run(inputs_embeds, features, **rest),
            prefilled(model)[0],
            *nodes,
        ),
        wanted,
    )
    assert graph_hazard(model) is None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(over_tree(model, compiled, prefilled(model)[0], *nodes), wanted)
