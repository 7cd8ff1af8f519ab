"""DFlash heads: reading their files, the options of their layers, and which targets they fit. `test_dflash` compares
their drafts in the published layouts."""

import json
import math
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import linear, silu
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DFlashCache

from specdec_triton.forward.checks import graph_hazard
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.forward.versions import CACHE
from specdec_triton.heads.checkpoint import Checkpoint, read_checkpoint
from specdec_triton.heads.dflash import DFlashModel
from specdec_triton.heads.eagle import EagleModel
from specdec_triton.tools.host_sync import count_host_reads
from specdec_triton.tree import pack_bits

V, DV, H, HT, MLP = 97, 40, 24, 28, 36
HEADS, KV, DIM = 4, 2, 10  # 4 * 10 != H
EPS, BASE, MASK, BLOCK, LAYERS, TAPS = 0.02, 777.0, 90, 5, 2, 2
WINDOW = 6
OPTIONS = {"mask_token_id": MASK, "target_layer_ids": [1, 3], "block_size": BLOCK}  # in "dflash_config"
CONFIG = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "vocab_size": V, "hidden_size": H,
    "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "head_dim": DIM, "rms_norm_eps": EPS, "rope_theta": BASE, "target_hidden_size": HT, "num_target_layers": 8,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


def tensors(seed=0, taps=TAPS, layers=LAYERS, sinks=False, own=False, **more):
    """Random tensors of a head, in z-lab's names. Norms are not one."""
    random, found = torch.Generator().manual_seed(seed), {}

    def add(name, *shape):
        weight = torch.randn(shape, generator=random)
        found[name] = 1 + 0.4 * weight if "norm" in name else weight * shape[-1] ** -0.5

    for layer in (f"layers.{number}" for number in range(layers)):
        for part, rows in (("q", HEADS * DIM), ("k", KV * DIM), ("v", KV * DIM)):
            add(f"{layer}.self_attn.{part}_proj.weight", rows, H)
        add(f"{layer}.self_attn.o_proj.weight", H, HEADS * DIM)
        for part, rows, columns in (("gate", MLP, H), ("up", MLP, H), ("down", H, MLP)):
            add(f"{layer}.mlp.{part}_proj.weight", rows, columns)
        for part in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{part}.weight", H)
        for part in ("q_norm", "k_norm"):
            add(f"{layer}.self_attn.{part}.weight", DIM)
        if sinks:
            add(f"{layer}.self_attn.attention_sink_bias", HEADS)
    add("fc.weight", H, taps * HT)
    add("hidden_norm.weight", H)
    add("norm.weight", H)
    if own:
        add("embed_tokens.weight", V, H)
        add("lm_head.weight", V, H)
    return found | more


def load(found=None, options=OPTIONS, config=CONFIG, **arguments):
    found = tensors() if found is None else found
    return DFlashModel.from_checkpoint(Checkpoint("a/head", {"dflash_config": options, **config}, found), **arguments)


def target(cls=LlamaForCausalLM, config=LlamaConfig, **options):
    sizes = {"vocab_size": V, "hidden_size": HT, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
    return cls(config(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": 8, **options})).eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Run:
    """A head over a batch with left padding: the prompt in two chunks, then rounds with a tree cache.

    Attributes:
        features: [B, 40, H]. Context rows by column.
        start, length: [B] int64.
        runner: runs the head.
    """

    def __init__(self, model, prompt=12, rows=4, features=None, **options):
        self.model, self.rows = model, rows
        self.features = model.features([randn(3, 40, HT, seed=1), randn(3, 40, HT, seed=2)])
        self.start = torch.tensor([0, 3, 5])
        self.length = torch.full((3,), prompt)
        cache = DynamicCache()
        for chunk in (range(5), range(5, prompt)):
            positions = (torch.tensor(chunk) - self.start[:, None]).clamp(min=0)
            outputs = model(features=self.features[:, chunk], position_ids=positions, **{CACHE: cache})
            assert outputs.last_hidden_state is None
        self.runner = TreeRunner(model, self.start, 1000, "reference", name="draft", **options)
        self.runner.take_cache(cache, 64, prompt)

    def round(self, count, block=None):
        """Run the next `count` [B] context rows, and a block [B, n, H]. Returns the block's states [B, n, H]."""
        columns = self.length[:, None] + torch.arange(self.rows)
        features = self.features.gather(1, columns[..., None].expand(-1, -1, H))
        size = 0 if block is None else block.shape[1]
        depth = torch.cat((torch.arange(self.rows).expand(3, -1), count[:, None] + torch.arange(size)), 1)
        seen = torch.ones(3, self.rows + size, self.rows + size, dtype=torch.bool).tril()
        seen[:, self.rows :, : self.rows] = (torch.arange(self.rows) < count[:, None])[:, None]
        seen[:, self.rows :, self.rows :] = True
        tokens = torch.zeros_like(depth)
        more = {"features": features, "inputs_embeds": block}
        outputs = self.runner.run(tokens, depth, pack_bits(seen), self.length.clone(), **more)
        self.length = self.length + count
        return outputs.last_hidden_state

    def context(self, row):
        """The context rows [R, H] of a sequence so far."""
        return self.features[row, self.start[row] : self.length[row]]


def literal(model, weights, context, block, scale=1.0, share=1.0):
    """The states [n, H] of a block [n, H] after context rows [R, H], in fp64. The window and the kind of each layer are
    those of the model."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    context, x, count = context.double(), block.double(), len(context)
    positions = torch.arange(count + len(x))
    distance = positions[count:, None] - positions

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weights[f"{name}.weight"]

    def rotated(x, positions):
        size = int(DIM * share)
        angles = positions[:, None] * BASE ** (-torch.arange(0, size, 2).double() / size)
        turned = torch.view_as_complex(torch.stack((x[..., : size // 2], x[..., size // 2 : size]), -1).contiguous())
        turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles))
        return torch.cat((turned[..., 0], turned[..., 1], x[..., size:]), -1)

    for number, layer in enumerate(model.layers):
        name, window = f"layers.{number}", layer.self_attn.sliding_window
        normed = norm(x, f"{name}.input_layernorm")
        rows = torch.cat((context, normed))
        queries, keys, values = (
            linear(each, weights[f"{name}.self_attn.{part}_proj.weight"]).view(len(each), -1, DIM).transpose(0, 1)
            for part, each in (("q", normed), ("k", rows), ("v", rows))
        )
        queries = rotated(norm(queries, f"{name}.self_attn.q_norm"), positions[count:])
        keys = rotated(norm(keys, f"{name}.self_attn.k_norm"), positions).repeat_interleave(HEADS // KV, 0)
        seen = (distance < (window or 1000)) & ((distance >= 0) | (not model.causal[number]))
        scores = (queries @ keys.mT * DIM**-0.5).masked_fill(~seen, -math.inf)
        sinks = weights.get(f"{name}.self_attn.attention_sink_bias", torch.full((HEADS,), -math.inf))
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(x), 1).double()), -1).softmax(-1)[..., :-1]
        attended = (scores @ values.repeat_interleave(HEADS // KV, 0) * scale).transpose(0, 1).flatten(1)
        x = x + linear(attended, weights[f"{name}.self_attn.o_proj.weight"])
        normed = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (linear(normed, weights[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        x = x + linear(silu(gate) * up, weights[f"{name}.mlp.down_proj.weight"])
    return x


MIMO = {"use_swa": True, "swa_window_size": WINDOW, "attention_sink_bias": True, "attention_value_scale": 0.6}
LAYER_OPTIONS = {
    "z-lab": ({}, {}, (None, None), (False, False)),
    "sliding": (SLIDING, {}, (WINDOW, None), (True, False)),
    "sliding, not causal": (SLIDING, {"causal": False}, (WINDOW, None), (False, False)),
    "causal": ({"is_causal": True}, {"causal": False}, (None, None), (True, True)),
    "MiMo": ({"partial_rotary_factor": 0.4}, MIMO, (WINDOW, WINDOW), (False, False)),
    "MiMo with types": (
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 5, "use_sliding_window": True, "is_causal": False},
        {"attention_sink_bias": True},
        (5, 5),
        (False, False),
    ),
    "use_swa and types": (SLIDING, {"use_swa": True, "swa_window_size": 4}, (4, None), (True, False)),
    "use_swa and full layers": (
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}, MIMO, (WINDOW, WINDOW), (False, False),
    ),
    "full layers": ({"layer_types": ["full_attention"] * 2, "sliding_window": 3}, {}, (None, None), (False, False)),
    "speculators": (
        {**SLIDING, "speculators_model_type": "dflash", "sliding_window_non_causal": False}, {}, (WINDOW, None),
        (True, False),
    ),
    "speculators, not causal": (
        {**SLIDING, "speculators_model_type": "dflash", "sliding_window_non_causal": True}, {}, (WINDOW, None),
        (False, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYER_OPTIONS)
@torch.no_grad()
def test_blocks_in_a_tree_cache_equal_a_literal_computation(name):
    config, options, windows, causal = LAYER_OPTIONS[name]
    weights = tensors(sinks="attention_sink_bias" in options)
    model = load(weights, {**OPTIONS, **options}, {**CONFIG, **config})
    assert tuple(layer.self_attn.sliding_window for layer in model.layers) == windows and model.causal == causal
    run = Run(model, fused=name in ("z-lab", "MiMo"))
    given = {"scale": options.get("attention_value_scale", 1.0), "share": config.get("partial_rotary_factor", 1.0)}
    for number, count in enumerate(torch.tensor([[1, 3, 4], [2, 1, 4], [4, 2, 3]])):
        if number == 1:
            assert run.round(torch.tensor([2, 0, 3])) is None  # a round without a draft
        block = randn(3, BLOCK, H, seed=number)
        states = run.round(count, block)
        for row in range(3):
            wanted = literal(model, weights, run.context(row), block[row], **given)
            torch.testing.assert_close(states[row].double(), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_context_rows_have_the_same_keys_and_values_in_a_prompt_and_beside_a_block():
    model = load(tensors(), OPTIONS, {**CONFIG, **SLIDING})
    prompt, beside = Run(model, prompt=18), Run(model, prompt=12)
    beside.round(torch.tensor([4, 4, 4]), randn(3, BLOCK, H))
    beside.round(torch.tensor([2, 2, 2]))
    for one, other in zip(prompt.runner.cache.layers, beside.runner.cache.layers, strict=True):
        for each in ("keys", "values"):
            kept, written = getattr(one, each)[:, :, :18], getattr(other, each)[:, :, :18]
            for row, start in enumerate(prompt.start):
                torch.testing.assert_close(written[row, :, start:], kept[row, :, start:], rtol=1e-5, atol=1e-5)
                assert kept[row, :, start:].abs().amax(-1).min() > 0


@torch.no_grad()
def test_forwards_can_be_captured():
    model = load(tensors(sinks=True), {**OPTIONS, **MIMO, "causal": True})
    assert graph_hazard(model) is None
    run = Run(model, fixed=True)
    block, count = randn(3, BLOCK, H), torch.tensor([1, 2, 3])
    run.round(count, block)
    with count_host_reads() as reads:
        run.round(count, block)
        run.round(count)
    assert reads.total == 0


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forwards_are_one_graph():
    config = {**CONFIG, **SLIDING, "partial_rotary_factor": 0.4}
    eager, compiled = (
        Run(load(tensors(sinks=True), {**OPTIONS, "attention_sink_bias": True}, config), compiled=each)
        for each in (False, True)
    )
    for number, size in enumerate((BLOCK, BLOCK, 3)):
        block, count = randn(3, size, H, seed=number), torch.tensor([1, 2, 3])
        torch.testing.assert_close(compiled.round(count, block), eager.round(count, block), rtol=1e-4, atol=1e-4)


def test_a_block_needs_a_packed_tree():
    model, cache = load(), DynamicCache()
    block = {"features": randn(1, 2, H), "position_ids": torch.arange(7)[None], "inputs_embeds": randn(1, 5, H)}
    for mask, got in ((None, "None"), (torch.ones(1, 7), r"torch.float32 \[1, 7\]")):
        with pytest.raises(ValueError, match=rf"attention_mask must be a packed tree, .* for a block, got {got}"):
            model(**block, attention_mask=mask, **{CACHE: cache})


# --- options of the head


@torch.no_grad()
def test_the_context_is_made_from_joined_states():
    weights = tensors()
    states = randn(1, 3, HT, seed=1), randn(1, 3, HT, seed=2)
    joined = linear(torch.cat(states, -1), weights["fc.weight"])
    wanted = joined * (joined.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weights["hidden_norm.weight"]
    torch.testing.assert_close(load(weights).features(states), wanted)
    bias = randn(H, seed=5)
    assert not torch.allclose(load({**weights, "fc.bias": bias}).features(states), wanted)


@pytest.mark.parametrize(
    "options, first",
    [({}, 1), ({"sample_from_anchor": True}, 0), ({"shift_label": True}, 0), ({"sample_from_anchor": False}, 1)],
)
@torch.no_grad()
def test_rows_that_predict(options, first):
    model, states = load(options={**OPTIONS, **options}), randn(2, BLOCK, H)
    assert (model.block_size, model.mask_token_id, model.num_drafted) == (BLOCK, MASK, BLOCK - first)
    assert torch.equal(model.logits_input(states), model.final_norm(states)[:, first:])


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    "options, config, arguments, taps",
    [
        (OPTIONS, {}, {}, (2, 4)),
        (OPTIONS | {"target_layer_ids": [0, 7]}, {}, {}, (1, "last")),
        (OPTIONS, {}, {"layers": (2, 5)}, (3, 6)),
        (OPTIONS, {}, {"layer_meaning": "input"}, (1, 3)),
        (without(OPTIONS, "target_layer_ids"), {"target_layer_ids": [2, 4]}, {}, (3, 5)),
        (OPTIONS, {"eagle_aux_hidden_state_layer_ids": [2, 4]}, {}, (2, 4)),
        (without(OPTIONS, "target_layer_ids"), {"eagle_aux_hidden_state_layer_ids": [2, 4]}, {}, (2, 4)),
        (OPTIONS, {"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": [2, 8]}, {}, (2, "last")),
        (without(OPTIONS, "target_layer_ids"), {}, {}, (2, 6)),
        (without(OPTIONS, "target_layer_ids"), {"speculators_model_type": "dflash"}, {"layers": [1, 3]}, (1, 3)),
    ],
)
def test_taps(options, config, arguments, taps):
    assert load(options=options, config={**CONFIG, **config}, **arguments).taps(target()) == taps


@pytest.mark.parametrize("count, ids", [(1, [4]), (2, [1, 5]), (3, [1, 3, 5]), (4, [1, 2, 4, 5]), (5, [1, 2, 3, 4, 5])])
def test_default_taps_are_those_of_z_lab(count, ids):
    options = without(OPTIONS, "target_layer_ids")
    assert load(tensors(taps=count), options).taps(target()) == tuple(each + 1 for each in ids)
    with pytest.raises(ValueError, match="takes 6 hidden states; the default is for at least 9 layers, and Llama"):
        load(tensors(taps=6), options).taps(target())


@pytest.mark.parametrize("nested", [False, True])
def test_a_reduced_vocabulary_and_own_layers(nested):
    ids = torch.arange(V)[3::2][:DV]
    found = tensors(own=True, d2t=ids - torch.arange(DV), t2d=torch.ones(V, dtype=torch.bool))
    found |= {"lm_head.weight": randn(DV, H), "verifier_lm_head.weight": randn(DV, H)}
    config, options = CONFIG, OPTIONS
    if nested:
        config = {"transformer_layer_config": without(CONFIG, "target_hidden_size"), "target_hidden_size": HT}
        config |= {"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": [2, 4], **OPTIONS}
    model = load(found, options, config)
    assert torch.equal(model.target_ids, ids) and model.lm_head.out_features == DV
    assert model.config.rope_parameters["rope_theta"] == BASE and model.taps(target()) == (2, 4)
    model.check_target(target())
    tokens = torch.tensor([[5, MASK, V + 3]])  # the target's table may be padded
    assert torch.equal(model.embedded(None, tokens), found["embed_tokens.weight"][[5, MASK, V - 1]][None])


def test_names_and_arguments():
    prefixed = {f"model.{name}": tensor for name, tensor in tensors().items()}
    head = load(prefixed, rope_theta=50.0, dtype=torch.bfloat16)
    assert head.dtype == torch.bfloat16 and head.config.rope_parameters["rope_theta"] == 50.0
    assert repr(head).count("source='a/head', block_size=5, layers=(1, 3) (output), rope_theta=50.0") == 1
    assert not head.training and not any(each.requires_grad for each in head.parameters())
    assert load(config=without(CONFIG, "rope_theta")).config.rope_parameters["rope_theta"] == 10000.0


def test_embeddings_of_a_block():
    tokens = torch.tensor([[4, MASK, MASK]])
    llama = target(hidden_size=H)
    table = llama.get_input_embeddings().weight
    assert torch.equal(load().embedded(llama, tokens), table[tokens])
    mask = randn(1, H)
    found = load(tensors(mask_embedding=mask)).embedded(llama, tokens)
    assert torch.equal(found[0, 0], table[4]) and torch.equal(found[0, 1:], mask.expand(2, -1))
    gemma = target(transformers.GemmaForCausalLM, transformers.GemmaConfig, hidden_size=H)
    torch.testing.assert_close(load().embedded(gemma, tokens), gemma.get_input_embeddings()(tokens))


def test_the_embedding_of_the_mask_token_may_have_a_file(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "dflash_config": OPTIONS}))
    mask = randn(H)
    for saved in (mask, {"embedding": mask[None], "mask_token_id": MASK}):
        torch.save(saved, tmp_path / "mask_embedding.pt")
        model = DFlashModel.from_checkpoint(read_checkpoint(tmp_path))
        assert torch.equal(model.mask_embedding, mask)
    torch.save({"embedding": mask, "mask_token_id": 3}, tmp_path / "mask_embedding.pt")
    with pytest.raises(ValueError, match="mask_embedding.pt must be of the mask token 90 of config.json, got 3"):
        read_checkpoint(tmp_path)
    torch.save({"weight": mask}, tmp_path / "mask_embedding.pt")
    with pytest.raises(ValueError, match="mask_embedding.pt must hold a tensor 'embedding', got NoneType"):
        read_checkpoint(tmp_path)


# --- Muse Glimmer

MUSE = {
    "hidden_size": H, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "head_dim": DIM, "sliding_window": WINDOW, "block_size": BLOCK, "mask_token_id": MASK,
    "target_layer_ids": [1, 4], "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def assistant(**options):
    config = transformers.MuseGlimmerAssistantConfig(**{**MUSE, **options})
    model = transformers.MuseGlimmerAssistantModel(config).eval()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(randn(*weight.shape, seed=number) * 0.3 + (weight.dim() == 1))
    return model


def test_a_head_of_muse_shares_its_parameters():
    theirs = assistant()
    theirs.layers[0].mlp.up_proj.weight.requires_grad_(False)
    wanted = {id(weight): weight.requires_grad for weight in theirs.parameters()}
    head = DFlashModel.from_assistant(theirs)
    assert {id(weight): weight.requires_grad for weight in head.parameters()} == wanted
    assert {id(weight): weight.requires_grad for weight in theirs.parameters()} == wanted
    assert sum(wanted.values()) == len(wanted) - 1
    assert head.block_size == BLOCK and head.num_drafted == BLOCK - 1 and head.mask_token_id == MASK
    assert head.layer_ids == (1, 4) and head.layer_meaning == "output" and not any(head.causal)
    assert [layer.self_attn.sliding_window for layer in head.layers] == [WINDOW + 1, None]
    assert head.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"] == 500000


@torch.no_grad()
def test_a_block_of_muse_is_that_of_transformers():
    theirs = assistant()
    head = DFlashModel.from_assistant(theirs)
    loaded = DFlashModel.from_checkpoint(Checkpoint("muse", theirs.config.to_dict(), theirs.state_dict()))
    states, block, count = [randn(1, 12, H, seed=number) for number in (1, 2)], randn(1, BLOCK, H), 12
    cache = DFlashCache(config=theirs.config)
    cache.set_previous_accepted_tokens(count)
    wanted = theirs(
        noise_embeds=block,
        context_hidden_states=torch.cat(states, -1),
        position_ids=torch.arange(count + BLOCK)[None],
        **{CACHE: cache},
    ).last_hidden_state
    seen = torch.ones(1, 2 + BLOCK, 2 + BLOCK, dtype=torch.bool).tril()
    seen[:, 2:] = True
    for model in (head, loaded):
        features, cache = model.features(states), DynamicCache()
        model(features=features[:, :-2], position_ids=torch.arange(count - 2)[None], **{CACHE: cache})
        runner = TreeRunner(model, torch.zeros(1, dtype=torch.int64), 1000, "reference", name="draft")
        runner.take_cache(cache, 64, count - 2)
        depth, base = torch.arange(2 + BLOCK)[None], torch.tensor([count - 2])
        more = {"features": features[:, -2:], "inputs_embeds": block}
        outputs = runner.run(torch.zeros_like(depth), depth, pack_bits(seen), base, **more)
        torch.testing.assert_close(model.logits_input(outputs.last_hidden_state), wanted[:, 1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_embeddings_of_muse_are_not_normed():
    config = transformers.MuseGlimmerTextConfig(
        vocab_size=V, hidden_size=H, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    muse = transformers.MuseGlimmerTextModel(config)
    table, tokens = muse.get_input_embeddings(), torch.tensor([[3, MASK]])
    assert not torch.allclose(table(tokens), table.weight[tokens])
    assert torch.equal(DFlashModel.from_assistant(assistant()).embedded(muse, tokens), table.weight[tokens])


def test_other_assistants_are_refused():
    with pytest.raises(ValueError, match="^DFlashModel: LlamaForCausalLM: must hold a DFlash head, got tensors of ano"):
        DFlashModel.from_assistant(target())


# --- errors


def changed(**more):
    return {name: tensor for name, tensor in tensors(**more).items() if tensor is not None}


QUERIES, UP, KEYS_NORM = (
    f"layers.{each}.weight" for each in ("0.self_attn.q_proj", "0.mlp.up_proj", "1.self_attn.k_norm")
)


@pytest.mark.parametrize(
    "found, options, config, message",
    [
        (changed(**{UP: None}), {}, {}, f"{UP} must be [36, 24], got none"),
        (changed(**{KEYS_NORM: None}), {}, {}, f"{KEYS_NORM} must be [10], got none"),
        (changed(**{"norm.weight": randn(23)}), {}, {}, "norm.weight must be [24], got [23]"),
        (changed(**{"hidden_norm.weight": None}), {}, {}, "hidden_norm.weight must be [24], got none"),
        (changed(**{"layers.0.g_proj.weight": randn(2)}), {}, {}, "must not be there, got [2]: this tensor is not"),
        (changed(**{"fc.weight": randn(H, 57)}), {}, {}, "the target's hidden size 28 as its columns, got 57"),
        (changed(**{QUERIES: None}), {}, {}, f"{QUERIES} must be a tensor of 2 dimensions, got none"),
        (changed(**{QUERIES: torch.ones(40, H, dtype=torch.int8)}), {}, {}, "quantized heads are not"),
        (changed(mask_embedding=randn(23)), {}, {}, "mask_embedding must be [24], got [23]"),
        (changed(d2t=torch.ones(DV)), {}, {}, "d2t must be integers [DV], got torch.float32 [40]"),
        (changed(d2t=torch.ones(DV).long()), {}, {}, "lm_head.weight must be a tensor of 2 dimensions, got none"),
        (changed(), {}, {"quantization_config": {"quant_method": "fp8"}}, "must not be quantized, got a"),
        (changed(), {"block_size": None}, {}, "config.json must have block_size, a number of at least 2, got None"),
        (changed(), {"block_size": 1}, {}, "config.json must have block_size, a number of at least 2, got 1"),
        (changed(), {"block_size": 1, "sample_from_anchor": True}, {}, None),
        (changed(), {"mask_token_id": None, "mask_token": "<m>"}, {}, "have mask_token_id, the mask token, got None"),
        (changed(), {"target_layer_ids": [1]}, {}, "must name the 2 layers whose hidden states it takes, got [1]"),
        (changed(), {"target_layer_ids": [1, -1]}, {}, "layers must be numbers of layers from 0, got [1, -1]"),
        (changed(), {"use_swa": True}, {}, "must be a number of at least 1 for sliding layers, got None"),
        (changed(), {}, {**SLIDING, "use_sliding_window": False}, "at least 1 for sliding layers, got None"),
        (changed(), {}, {**SLIDING, "layer_types": ["sliding_attention"]}, "name the 2 layers of the file, got 1"),
        (changed(), {}, {"layer_types": ["linear_attention"]}, "or sliding_attention, got linear_attention"),
        (changed(), {"attention_sink_bias": True}, {}, "self_attn.attention_sink_bias must be [4], got none"),
        (changed(), {}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "llama3, yarn, got 'dynamic'"),
        (changed(), {"projector_type": "domino"}, {}, "got Domino: use another one"),
        ({"weight": torch.ones(2)}, None, {}, "must hold a DFlash head, got tensors of another model"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(found, options, config, message):
    given = {**CONFIG, **config} | ({} if options is None else {"dflash_config": {**OPTIONS, **options}})
    if message is None:
        DFlashModel.from_checkpoint(Checkpoint("a/head", given, found))
        return
    with pytest.raises(ValueError, match=rf"^DFlashModel: a/head: .*{re.escape(message)}"):
        DFlashModel.from_checkpoint(Checkpoint("a/head", given, found))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="DFlashModel: layer_meaning must be 'input', 'output' or None, got 'both'"):
        load(layer_meaning="both")
    with pytest.raises(ValueError, match="DFlashModel: layers must be a list of numbers of layers or None, got 3"):
        load(layers=3)
    with pytest.raises(ValueError, match="EagleModel: a/head: must hold an EAGLE head, got dflash"):
        EagleModel.from_checkpoint(Checkpoint("a/head", CONFIG, tensors()))


SAME_SIZE = {"config": {**CONFIG, "target_hidden_size": H}, "found": {**tensors(), "fc.weight": randn(H, 2 * H)}}
OWN = {"found": tensors(own=True)}


@pytest.mark.parametrize(
    "head, options, message",
    [
        ({}, {"hidden_size": 32}, "the target's hidden size must be 28, got 32"),
        ({}, {}, "the width of the target's embeddings, which are shared, must be 24, got 28"),
        (SAME_SIZE, {"hidden_size": H, "vocab_size": MASK}, "must be larger than 90, the mask token, got 90"),
        (OWN, {"vocab_size": 80}, "the target's vocabulary must be 97, the rows of lm_head, got 80"),
        (OWN, {"num_hidden_layers": 3}, r"layer ids must be at most 2 \(outputs of the 3 layers of Llama"),
        ({**OWN, "dtype": torch.bfloat16}, {}, "the dtype must be torch.bfloat16, got torch.float32"),
    ],
)  # fmt: skip
def test_misfits_with_a_target(head, options, message):
    with pytest.raises(ValueError, match=message):
        load(**head).check_target(target(**options))


def test_a_target_that_fits():
    load(**SAME_SIZE).check_target(target(hidden_size=H))
    load(**OWN).check_target(target())
