"""Drafts with a Gemma 4 assistant: a few layers of queries over the target's own keys and values.

Sources: `Gemma4AssistantForCausalLM` and `SinglePositionMultiTokenCandidateGenerator` of transformers. vLLM calls the
method Gemma 4 MTP, SGLang frozen-KV MTP.

The input of a node joins the target's embedding of the node's token and a hidden state. At the root, it is the target's
state after the final norm, at the last verified column. At other nodes, it is the assistant's own output at the node's
parent. Each layer of the assistant reads the keys and values of the target's last layer of the same type that computes
its own. All nodes have the root's position. They see the columns that the target sees from there, but neither the root
nor each other. The assistant has no keys and values, so it neither runs the prompt nor drops anything after a
rejection.

Engines differ in details. transformers, LiteRT-LM, llama.cpp and mlx-vlm use the root's position, vLLM and SGLang that
of the last verified token. transformers and LiteRT-LM also show the column of the root, which then holds a rejected
token or nothing; the others do not.

Letters: B sequences, n nodes of a forward, N tree nodes, S cache slots, V vocabulary, H hidden size of the assistant,
Ht hidden size of the target.
"""

from functools import cache

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..forward.checks import graph_hazard
from ..forward.copies import shared_copy
from ..forward.preparation import NextStep
from ..forward.runner import TreeRunner
from ..forward.wrappers import num_weights, unwrap
from ..ops.reference import Acceptance
from ..tree import WORD_BITS, DynamicTree, Topology, bits_of_nodes
from .base import DraftContext, Drafter, topology_of
from .dynamic import DynamicSession
from .forwards import DraftForwards
from .head_forwards import LastState, last_states
from .length import assistant_tokens
from .level_session import LevelSession
from .model import SHARED_KV_ASSISTANTS, SHARED_KV_VERSIONS, check_drafted, check_shape

NAME = "Gemma4AssistantDrafter"


class Gemma4AssistantDrafter(Drafter):
    """Drafts with a Gemma 4 assistant, which reads the keys and values of its target.

    Tokens are chosen by the acceptance rule as by `ModelDrafter`. Each level of a draft takes one forward of the
    assistant. The prompt takes none.

    Args:
        model: a `Gemma4AssistantForCausalLM` or `Gemma4UnifiedAssistantForCausalLM`, on the target's device and in its
            dtype. It is not changed.
        num_tokens: length of a chain. If `num_tokens` and `tree` are None, it is `num_assistant_tokens` of the
            assistant's generation config, or 5 if that is not set.
        tree: a topology, a number of nodes (root included) or a `DynamicTree`, instead of a chain.
        replacement: see `ModelDrafter`.

    Raises:
        ValueError: the model is not such an assistant, `num_tokens` and `tree` are both given, or a value is not valid.
    """

    resizable = follows_text = True

    def __init__(
        self,
        model: PreTrainedModel,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
    ):
        model = unwrap(model, NAME)
        if model.config.model_type not in SHARED_KV_ASSISTANTS:
            raise ValueError(
                f"{NAME}: model must be of type {' or '.join(SHARED_KV_ASSISTANTS)}, got {type(model).__name__}"
            )
        self.model, self.num_tokens, self.tree, self.replacement = model, num_tokens, tree, replacement
        check_shape(self)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        target: PreTrainedModel | None = None,
        *,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Gemma4AssistantDrafter":
        """Load an assistant from a folder or from the hub.

        Args:
            name_or_path: a local folder, or a name on the hub.
            target: the model that the assistant drafts for. The assistant gets its device and dtype, and is checked
                against it.
            num_tokens, tree, replacement: see the class.
            dtype, device: of the assistant, if there is no `target`; the checkpoint's dtype and the CPU by default.

        Raises:
            ValueError: the installed transformers cannot build the model, it is not an assistant, or it does not fit
                the target.
        """
        if target is not None:
            target = unwrap(target, f"{NAME}.from_pretrained")
            dtype, device = dtype or target.dtype, device or target.device
        try:
            model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype or "auto")
        except ValueError as error:
            raise ValueError(
                f"{NAME}: transformers must build Gemma 4 assistants ({SHARED_KV_VERSIONS}), got {name_or_path} with "
                f"transformers {transformers.__version__}: {error}"
            ) from error
        drafter = cls(model.to(device or "cpu").eval(), num_tokens, tree, replacement)
        if target is not None:
            drafter.check(target)
        return drafter

    def check(self, model, rule=None, tree=None):
        _check_target(self.model, model)
        known = model.config.get_text_config(decoder=True).vocab_size
        embedder = self.model.masked_embedding
        if embedder is not None:
            known = min(known, embedder.centroid_intermediate_top_k * embedder.vocab_size_per_centroid)
        check_drafted(self, self._shape(tree, rule), rule, known, "the number of tokens that the assistant can name")

    def _shape(self, tree: Topology | DynamicTree | int | None, rule: str | None) -> Topology | DynamicTree:
        length = self.num_tokens or assistant_tokens(NAME, self.model.generation_config)
        return topology_of(self.tree if tree is None else tree, Topology.chain(length), rule)

    def taps(self, model):
        return ("final",)

    def prompt_reader(self, context):
        return LastState()

    def graph_hazard(self):
        return graph_hazard(_over_trees(self.model))

    def start(self, context, tree=None):
        shape = self._shape(tree, context.rule)
        if isinstance(shape, DynamicTree):
            return DynamicSession(SharedKVForwards(self.model, context, shape.width), context, shape)
        return LevelSession(SharedKVForwards(self.model, context, shape.num_nodes), context, shape, self.replacement)


class SharedKVForwards(DraftForwards):
    """Forwards of an assistant over the target's cache.

    Args:
        model: the assistant.
        context: the call's sequences. Its `prompt_reader` is that of `Gemma4AssistantDrafter`.
        most_nodes: largest number of nodes of one forward.
    """

    num_first = 1

    def __init__(self, model: PreTrainedModel, context: DraftContext, most_nodes: int):
        self.context, self._model = context, _over_trees(model)
        target, buffers = context.target, context.buffers
        self._sources = shared_layers(target.model.config.get_text_config(decoder=True))
        self._runner = TreeRunner(
            self._model, context.start, context.max_length - 1, context.impl, context.fixed_shapes, context.compiled,
            context.fused, buffers, "draft",
        )  # fmt: skip
        self._runner.cache = target.cache
        self._runner.step = NextStep(target.step.origin)
        # all nodes are at the root's place, and see no node
        words = bits_of_nodes(most_nodes).shape[1]
        self._depth = buffers.put("draft.depth", context.start.new_zeros(len(context.start), most_nodes))
        self._ancestors = buffers.put("draft.ancestors", self._depth[..., None].expand(-1, -1, words).contiguous())
        # [B, Ht]: the target's state at the last verified column
        self._verified = buffers.put("draft.state", context.prompt_reader.state)

    @property
    def slots(self):
        return self._runner.cache.slots

    @property
    def weights(self):
        model = self._model
        unread = 0 if model.masked_embedding is None else num_weights(model.lm_head)
        if model.lm_head.weight is not model.model.embed_tokens.weight:
            unread += num_weights(model.model.embed_tokens)
        return num_weights(model) - unread

    def follow(self, levels, rows=None):
        """The cache must have a slot for each node, although none is written."""
        self._runner.cache.reserve(self.context.longest + self._depth.shape[1])

    def advance(self):
        return self.context.root[:, None]

    def begin(self):
        root = self.advance()
        return root, self._run(root, self._verified[:, None])

    def expand(self, tokens, parents, depth, ancestors):
        parents = parents.expand(len(tokens), -1)[..., None].expand(-1, -1, self._states.shape[-1])
        return self._run(tokens, self._states.gather(1, parents))

    def _run(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Logits [B, n, V] at n nodes with these tokens [B, n] and states [B, n, Ht] of their parents."""
        context, cache, count = self.context, self._runner.cache, tokens.shape[1]
        words = -(-count // WORD_BITS)
        outputs = self._runner.run(
            tokens,
            self._depth[:, :count],
            self._ancestors[:, :count, :words].contiguous(),
            context.length,
            inputs_embeds=torch.cat((context.target.model.get_input_embeddings()(tokens), states), -1),
            shared_kv_states={kind: cache.planes(layer) for kind, layer in self._sources.items()},
            logits_to_keep=None,  # transformers 5.24 fails if it is a number and there are several nodes
        )
        self._states = outputs.last_hidden_state
        return outputs.logits

    def observe(self, accepted: Acceptance, slots):
        self._verified.copy_(last_states(self.context, accepted))


def shared_layers(config: PreTrainedConfig) -> dict[str, int]:
    """For each type of layers, the last layer of a model with this config that computes keys and values of its own."""
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    return {kind: layer for layer, kind in enumerate(config.layer_types[:own])}


def _check_target(assistant: PreTrainedModel, target: PreTrainedModel) -> None:
    """Refuse a target whose hidden states or keys an assistant cannot read.

    Raises:
        ValueError: the message names the values that differ.
    """
    own, config = assistant.config.get_text_config(), target.config.get_text_config(decoder=True)
    sources = shared_layers(config) if getattr(config, "layer_types", None) else {}
    options = [
        ("device", assistant.device, target.device),
        ("dtype", assistant.dtype, target.dtype),
        ("hidden size", assistant.config.backbone_hidden_size, config.hidden_size),
    ]
    for kind in dict.fromkeys(own.layer_types):
        layer = own.layer_types.index(kind)
        options.append((f"head size in {kind} layers", _head_dim(own, layer), _head_dim(config, sources.get(kind))))
    wanted = [f"{name} {mine}" for name, mine, theirs in options if mine != theirs]
    got = [str(theirs) for _, mine, theirs in options if mine != theirs]
    if wanted:
        raise ValueError(
            f"{NAME}: the target must have {', '.join(wanted)}, as the assistant expects, got {type(target).__name__} "
            f"with {', '.join(got)}: use the assistant of this target"
        )


def _head_dim(config: PreTrainedConfig, layer: int | None) -> int | None:
    """The size of a layer's heads; None without a layer."""
    if layer is None:
        return None
    of_layers = getattr(config, "per_layer_config", None)
    return getattr(config if of_layers is None else of_layers[layer], "head_dim", None)


def _over_trees(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of an assistant that takes a packed tree as its mask, and never reads values on the host. It shares the
    assistant's modules."""
    parts = dict(model._modules)
    if model.masked_embedding is not None:
        parts["masked_embedding"] = _LikelyTokens(model.masked_embedding)
    copied = shared_copy(model, parts)
    copied.__class__ = _with_packed_masks(type(model))
    return copied


@cache
def _with_packed_masks(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass with other masks. It is made once, so that compiled code serves all copies."""
    methods = {"create_attention_masks": _packed_masks, "__module__": __name__}
    return type(f"TreeReading{kind.__name__}", (kind,), methods)


def _packed_masks(model: nn.Module, inputs_embeds: torch.Tensor, tree: torch.Tensor, shared_kv_states: dict) -> dict:
    """The packed tree for each type of layers. The assistant would make dense masks for one query."""
    return dict.fromkeys(shared_kv_states, tree)


class _LikelyTokens(nn.Module):
    """The logits of the tokens of the likeliest centroids. Other tokens have logit -inf: transformers gives them the
    lowest of all rows minus 1, which it reads on the host.

    Args:
        embedder: the `Gemma4AssistantMaskedEmbedder`.
    """

    def __init__(self, embedder: nn.Module):
        super().__init__()
        self.centroids, self.count = embedder.centroids, embedder.centroid_intermediate_top_k
        # a view, because captured rounds of later calls read it
        self.register_buffer("tokens", embedder.token_ordering.view(embedder.num_centroids, -1))

    def forward(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits [B, n, V] after states [B, n, H], by a language head [V, H]."""
        tokens = self.tokens[self.centroids(states).topk(self.count).indices].flatten(2).long()
        logits = (weight[tokens] @ states[..., None]).squeeze(-1)
        everywhere = logits.new_full((*states.shape[:2], len(weight)), float("-inf"))
        return everywhere.scatter(-1, tokens, logits)
