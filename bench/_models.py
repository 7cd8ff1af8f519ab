"""Models and texts for the end-to-end benches: real shapes and random weights, made on the device.

Greedy text of ordinary random weights depends on near-ties. Here the head holds the input embeddings in another order,
and the layers' outputs are scaled as in a deep residual net. A token's successor is then nearly always the next one in
that order, by a wide margin. Every weight is dense and is read as in a trained model.

A draft follows the target's order except after a set share of the tokens, so that its acceptance is controlled. Or it
is wrong after chosen tokens (see `wrong_after`), and replays the recorded agreement of a real pair. EAGLE and DFlash
heads have a set error rate, too: see `eagle_head` and `dflash_head`.
"""

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec_triton.heads.checkpoint import Checkpoint
from specdec_triton.heads.dflash import DFlashModel
from specdec_triton.heads.eagle import EagleModel
from specdec_triton.tools import plan
from specdec_triton.tree import Topology

# Qwen's shapes are made as Llamas, without biases of queries, keys and values. An untied head is read like a tied one.
SHAPES = {
    "llama 8B": plan.PRESETS["llama-3.1-8b"],
    "llama 1B": plan.PRESETS["llama-3.2-1b"],
    "qwen 1.5B": plan.PRESETS["qwen2.5-1.5b"],
    "qwen 0.5B": plan.PRESETS["qwen2.5-0.5b"],
    "tiny": {
        "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 512,
    },
    "tiny draft": {
        "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    # the same number of query heads to a key head as Qwen2.5
    "tiny qwen": {
        "num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "tiny qwen draft": {
        "num_hidden_layers": 1, "hidden_size": 224, "intermediate_size": 256, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
# the EAGLE-3 head of each target; that of Llama 3.1 8B has the shape of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
HEADS = {
    "llama 8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "draft_vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "draft_vocab_size": 128,
    },
}  # fmt: skip
# DFlash heads; that of Llama 3.1 8B has the shape of z-lab/Qwen3-8B-DFlash-b16, and Llama's vocabulary
BLOCKS = {
    "llama 8B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 5, "block_size": 16,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "num_hidden_layers": 2, "block_size": 4,
    },
}  # fmt: skip
NUM_TAPS = {"eagle": 3, "dflash": 5}
LAYER_STD = 0.02
OWN_WEIGHT = 2.0  # of the keys of a head: each element has this variance
FEATURE_SCALE = 0.1  # of a head's feature, relative to the embedding
KEY_SCALE = 4.0  # weight of the norms of a DFlash head's queries and keys
KEY_NOISE = 0.05  # of a DFlash head's keys, relative to their bias
NUM_FREQUENCIES = 8  # by which a DFlash head tells distances apart, the highest ones


def successors(vocab_size: int) -> torch.Tensor:
    """[V] int64. The successor of each token: one cycle through all tokens."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    follows = torch.empty_like(order)
    follows[order] = order.roll(-1)
    return follows


def wrong_after(flags: Sequence[int], last: int, vocab_size: int) -> torch.Tensor:
    """[V] bool. `errors` of a draft that replays `flags`: true for tokens after which the draft must be wrong.

    Args:
        flags: for each token of the text after the token `last`, whether the draft predicts it.
        last: the last token of the prompt.
        vocab_size: V, larger than the number of tokens of the text.
    """
    follows, wrong, token = successors(vocab_size), torch.zeros(vocab_size, dtype=torch.bool), last
    for flag in flags:
        wrong[token] = not flag
        token = int(follows[token])
    return wrong


def wrong_share(share: float, vocab_size: int) -> torch.Tensor:
    """[V] bool. True for this share of the tokens, 0 to 1, at random; the same tokens in every call."""
    return torch.rand(vocab_size, generator=torch.Generator().manual_seed(2)) < share


@torch.no_grad()
def synthetic(
    shape: str, dtype: torch.dtype, device: torch.device, errors: float | torch.Tensor = 0.0
) -> PreTrainedModel:
    """A Llama with one of `SHAPES` that follows the order except after some tokens.

    Args:
        shape: a name in `SHAPES`.
        dtype: of the weights.
        device: of the weights.
        errors: the share of tokens, 0 to 1, after which the model continues with a wrong one; or the tokens: [V] bool.
    """
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    own = {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 131072}
    own |= {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(**(SHAPES[shape] | own))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=config).to(device)  # its frequencies are no weights
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "layernorm.weight")):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, LAYER_STD, generator=generator)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.div_((2 * config.num_hidden_layers) ** 0.5)
    embedding = model.get_input_embeddings().weight.normal_(0.0, 1.0, generator=generator)
    follows = successors(config.vocab_size)
    head = model.get_output_embeddings().weight
    if not isinstance(errors, torch.Tensor):
        errors = wrong_share(errors, config.vocab_size)
    head[follows.to(device)] = embedding / config.hidden_size**0.5
    head[follows[errors].to(device)] *= -1  # the right successor gets the least logit
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def eagle_head(shape: str, target: PreTrainedModel, errors: float) -> EagleModel:
    """An EAGLE-3 head that follows the target's order except after some tokens, with dense random weights.

    A token's successor must follow from the token's embedding, which reaches the head's output through attention only.
    A key head and its query heads therefore have the same weights, so that a row attends to itself and hardly to any
    other. The output layer holds, for each token, the state that results from the token before it. The residual stream
    begins with the normed feature (`norm_before_residual`), which is small: otherwise the tokens of a path would add
    up. The launches and the weights that are read are those of a trained head.

    The reduced vocabulary consists of the first tokens of `prompts` with a batch of 1 and of the text that follows.

    Args:
        shape: a name in `HEADS`.
        target: a model made by `synthetic`. The head has its device and dtype, and its embedding.
        errors: the share of tokens, 0 to 1, after which the head continues with a wrong one. They are the tokens of
            `synthetic` with this share.
    """
    sizes, embedding = HEADS[shape], target.get_input_embeddings().weight
    hidden, head_dim, named = sizes["hidden_size"], sizes["head_dim"], sizes["draft_vocab_size"]
    key_heads, groups = sizes["num_key_value_heads"], sizes["num_attention_heads"] // sizes["num_key_value_heads"]
    target_size, inner, width = target.config.hidden_size, sizes["intermediate_size"], groups * key_heads * head_dim
    generator = torch.Generator(embedding.device).manual_seed(3)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return embedding.new_empty(rows, columns).normal_(0.0, std, generator=generator)

    keys = normal(key_heads * head_dim, target_size + hidden, (OWN_WEIGHT / target_size) ** 0.5)
    values, output = normal(len(keys), target_size + hidden, target_size**-0.5), normal(hidden, width, width**-0.5)
    ids = prompts(1, named, len(embedding), torch.device("cpu"))[0].sort().values
    before = successors(len(embedding)).argsort()[ids]  # the token whose successor each of them is
    attended = embedding[before.to(embedding.device)] @ values[:, :target_size].T
    states = attended.unflatten(-1, (key_heads, head_dim)).repeat_interleave(groups, 1).flatten(1) @ output.T
    states[wrong_share(errors, len(embedding))[before].to(embedding.device)] *= -1  # as in `synthetic`
    ones = embedding.new_ones(hidden)
    tensors = {
        "fc.weight": normal(hidden, NUM_TAPS["eagle"] * target_size, LAYER_STD),
        "midlayer.hidden_norm.weight": FEATURE_SCALE * ones,
        "midlayer.input_layernorm.weight": embedding.new_ones(target_size),
        "midlayer.self_attn.q_proj.weight": keys.unflatten(0, (key_heads, head_dim)).repeat_interleave(groups, 0)
        .flatten(0, 1),
        "midlayer.self_attn.k_proj.weight": keys,
        "midlayer.self_attn.v_proj.weight": values,
        "midlayer.self_attn.o_proj.weight": output,
        "midlayer.post_attention_layernorm.weight": ones,
        "midlayer.mlp.gate_proj.weight": normal(inner, hidden, LAYER_STD),
        "midlayer.mlp.up_proj.weight": normal(inner, hidden, LAYER_STD),
        "midlayer.mlp.down_proj.weight": normal(hidden, inner, FEATURE_SCALE * LAYER_STD),
        "norm.weight": ones,
        "lm_head.weight": states / hidden**0.5,
        "d2t": ids - torch.arange(named),
    }  # fmt: skip
    config = {"vocab_size": len(embedding), "target_hidden_size": target_size, "norm_before_residual": True}
    checkpoint = Checkpoint(f"a synthetic head of {shape}", sizes | config, tensors)
    last = target.config.num_hidden_layers - 1
    return EagleModel.from_checkpoint(checkpoint, layers=(0, last // 2, last), device=embedding.device)


@torch.no_grad()
def dflash_head(shape: str, target: PreTrainedModel, errors: float) -> DFlashModel:
    """A DFlash head that follows the target's order except after some tokens, with dense random weights.

    Row i of a block must predict the i-th successor of the root. In the first layer, each query head attends to the
    row at a distance of its own: the keys have a large bias, and the query of mask tokens is that bias at the distance.
    The heads of the distance i therefore read the root in row i and in no other. In other rows they read a mask token,
    whose values are 0, or a context row, whose values are small. Each row thus has another linear map of the root's
    embedding. The output layer holds, for each token, the sum of the states that predict it, one for each distance.
    The later layers have small outputs.

    The output layer is the head's own, as large as the target's. The target's could not name the tokens, because the
    order is random. The launches and the weights that are read are those of a trained head that uses the target's, but
    for the bias.

    Args:
        shape: a name in `BLOCKS`.
        target: a model made by `synthetic`. The head has its device and dtype, and its embedding.
        errors: the share of tokens, 0 to 1, after which the head continues with a wrong one, at all depths. They are
            the tokens of `synthetic` with this share.
    """
    sizes, embedding = BLOCKS[shape], target.get_input_embeddings().weight
    hidden, inner, dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, key_heads, drafted = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["block_size"] - 1
    device, theta = embedding.device, 10000.0
    generator = torch.Generator(device).manual_seed(4)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return embedding.new_empty(rows, columns).normal_(0.0, std, generator=generator)

    before = successors(len(embedding)).argsort()  # the token whose successor each token is
    mask_token = int(before[0])  # follows last in the text after the first token
    mask = torch.nn.functional.rms_norm(embedding[mask_token].float(), (hidden,)).to(embedding.dtype)

    def with_output(weight: torch.Tensor, output: torch.Tensor | float) -> torch.Tensor:
        """The weight, changed so that it maps `mask` to `output`."""
        return weight + torch.outer(output - weight @ mask, mask) / hidden

    distances = torch.arange(heads) % drafted + 1  # of each query head
    bias = embedding.new_zeros(2, dim // 2)
    bias[0, :NUM_FREQUENCIES] = (dim / NUM_FREQUENCIES) ** 0.5  # of mean square 1
    angles = distances[:, None] * theta ** (-torch.arange(dim // 2) / (dim // 2))
    queries = torch.stack((angles.cos(), -angles.sin()), 1).to(bias) * bias[0]  # the bias, turned back
    values = with_output(normal(key_heads * dim, hidden, hidden**-0.5), 0.0)
    output = normal(hidden, heads * dim, dim**-0.5)
    ones, small = embedding.new_ones(hidden), FEATURE_SCALE * LAYER_STD
    tensors = {
        "fc.weight": normal(hidden, NUM_TAPS["dflash"] * target.config.hidden_size, LAYER_STD),
        "hidden_norm.weight": FEATURE_SCALE * ones,
        "norm.weight": ones,
    }
    for layer in range(sizes["num_hidden_layers"]):
        tensors |= {
            f"layers.{layer}.{name}": tensor
            for name, tensor in {
                "input_layernorm.weight": ones,
                "post_attention_layernorm.weight": ones,
                "self_attn.q_proj.weight": normal(heads * dim, hidden, LAYER_STD),
                "self_attn.k_proj.weight": normal(key_heads * dim, hidden, LAYER_STD),
                "self_attn.v_proj.weight": normal(key_heads * dim, hidden, LAYER_STD),
                "self_attn.o_proj.weight": normal(hidden, heads * dim, small),
                "self_attn.q_norm.weight": embedding.new_ones(dim),
                "self_attn.k_norm.weight": embedding.new_ones(dim),
                "mlp.gate_proj.weight": normal(inner, hidden, LAYER_STD),
                "mlp.up_proj.weight": normal(inner, hidden, LAYER_STD),
                "mlp.down_proj.weight": normal(hidden, inner, small),
            }.items()
        }
    first = {
        "q_proj.weight": with_output(normal(heads * dim, hidden, hidden**-0.5), queries.flatten()),
        "k_proj.weight": normal(key_heads * dim, hidden, KEY_NOISE * hidden**-0.5),
        "k_proj.bias": bias.flatten().repeat(key_heads),
        "v_proj.weight": values,
        "o_proj.weight": output,
        "q_norm.weight": KEY_SCALE * embedding.new_ones(dim),
        "k_norm.weight": KEY_SCALE * embedding.new_ones(dim),
    }
    tensors |= {f"layers.0.self_attn.{name}": tensor for name, tensor in first.items()}
    roots = [torch.arange(len(embedding))]  # for each distance, the token so far before each token
    for _ in range(drafted):
        roots.append(before[roots[-1]])
    read = (embedding @ values.T).unflatten(-1, (key_heads, dim)).repeat_interleave(heads // key_heads, 1)
    read = [read[roots[distance].to(device), head] for head, distance in enumerate(distances.tolist())]
    states = torch.cat(read, 1) @ output.T
    states -= torch.outer(states @ mask, mask) / hidden  # the mask token is in every row
    states[wrong_share(errors, len(embedding))[before].to(device)] *= -1  # as in `synthetic`
    tensors["lm_head.weight"] = states / hidden**0.5
    config = sizes | {"model_type": "qwen3", "vocab_size": len(embedding), "rope_theta": theta}
    config["dflash_config"] = {"mask_token_id": mask_token}
    checkpoint = Checkpoint(f"a synthetic DFlash head of {shape}", config, tensors)
    return DFlashModel.from_checkpoint(checkpoint, layers=taps_of(target, NUM_TAPS["dflash"]), device=device)


def taps_of(target: PreTrainedModel, count: int) -> tuple[int, ...]:
    """Layers of the target at equal distances, from the first to the last."""
    last = target.config.num_hidden_layers - 1
    return tuple(round(last * tap / (count - 1)) for tap in range(count))


def prompts(batch: int, length: int, vocab_size: int, device: torch.device, repeats: bool = False) -> torch.Tensor:
    """[B, length] int64. Rows follow the order, from tokens far apart.

    Args:
        repeats: the prompt ends with its first token, so that its continuation repeats it.
    """
    follows = successors(vocab_size)
    tokens = torch.arange(batch) * (vocab_size // batch)
    columns = []
    for _ in range(length - repeats):
        columns.append(tokens)
        tokens = follows[tokens]
    if repeats:
        columns.append(columns[0])
    return torch.stack(columns, 1).to(device)


def spider(num_nodes: int, depth: int) -> Topology:
    """As many chains of `depth` from one root as fit into `num_nodes`; remaining nodes are a shorter chain. A path is
    as deep as its chain, so that acceptance does not depend on the number of nodes."""
    paths, left = [], num_nodes - 1
    while left > 0:
        paths.append((len(paths), *[0] * (min(depth, left) - 1)))
        left -= depth
    return Topology.from_paths(paths)


def expected_length(topology: Topology, error_rate: float) -> float:
    """Acceptance length of the oracle drafter: at each node one of the children, at random, is right unless the drafter
    errs."""

    def below(node: int) -> float:
        children = [child for child, parent in enumerate(topology.parents) if parent == node]
        return sum((1 - error_rate) * (1 + below(child)) for child in children) / len(children) if children else 0.0

    return 1 + below(0)


def error_rate(topology: Topology, acceptance_length: float) -> float | None:
    """The error rate at which the oracle drafter has this acceptance length; None if the tree is too shallow."""
    if expected_length(topology, 0.0) < acceptance_length:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_length(topology, middle) > acceptance_length else (low, middle)
    return (low + high) / 2
