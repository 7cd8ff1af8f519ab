"""EAGLE heads: reading their files, and their model against a literal computation."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from specdec_triton.forward.attention import call_with_tree_attention, config_ids
from specdec_triton.forward.cache import TreeCache
from specdec_triton.forward.fusion import fuse
from specdec_triton.forward.versions import CACHE
from specdec_triton.heads.checkpoint import Checkpoint
from specdec_triton.heads.eagle import EagleModel
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


def write(folder, tensors, config=CONFIG, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file({name: each.contiguous() for name, each in tensors.items()}, folder / file)
    else:
        torch.save(dict(tensors), folder / file)
    return folder


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


def attended(weights, name, states, positions, base):
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
    heads = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
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


def literal_eagle3(weights, embeds, features, positions, base=BASE, normed_residual=False, norm_output=False):
    """The state that is fed back, and the input of the output layer."""
    normed = rms(features, weights["midlayer.hidden_norm.weight"])
    inputs = torch.cat([rms(embeds, weights["midlayer.input_layernorm.weight"]), normed], dim=-1)
    stream = normed if normed_residual else features
    stream = mlp(weights, "midlayer", stream + attended(weights, "midlayer", inputs, positions, base))
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
    tree_cache.place(base, TREE.num_nodes)
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


TREES = {
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
    layers, is_eagle3, is_qwen3 = len(model.layers), model.kind == "eagle3", name == "qwen3"
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
