"""Models and texts for the end-to-end benches: real shapes and random weights, made on the device.

Greedy text of ordinary random weights depends on near-ties. Here the head holds the input embeddings in another order,
and the layers' outputs are scaled as in a deep residual net. A token's successor is then nearly always the next one in
that order, by a wide margin. Every weight is dense and is read as in a trained model.

A draft follows the target's order except after a set share of the tokens, so that its acceptance is controlled. Or it
is wrong after chosen tokens (see `wrong_after`), and replays the recorded agreement of a real pair.
"""

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec_triton.tools import plan
from specdec_triton.tree import Topology

# Qwen's shapes are made as Llamas, without biases of queries, keys and values. An untied head is read like a tied one.
SHAPES = {
    "llama 8B": plan.PRESETS["llama-3.1-8b"],
    "llama 1B": plan.PRESETS["llama-3.2-1b"],
    "qwen 1.5B": plan.PRESETS["qwen2.5-1.5b"],
    "qwen 0.5B": plan.PRESETS["qwen2.5-0.5b"],
    "tiny": {
        "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8,
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
LAYER_STD = 0.02


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
        errors = torch.rand(config.vocab_size, generator=torch.Generator().manual_seed(2)) < errors
    head[follows.to(device)] = embedding / config.hidden_size**0.5
    head[follows[errors].to(device)] *= -1  # the right successor gets the least logit
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


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
