"""Medusa's heads: each predicts the token at one of the next positions, all from one hidden state of the target.

Source: Medusa (Cai et al. 2024, arXiv 2401.10774). Head number h, counted from 0, takes the target's hidden state
after the final norm at the position whose own output is the root of a tree. It predicts the token h + 1 after the root.

Letters: B sequences, D heads, L residual blocks of each head, H hidden size, V vocabulary, DV tokens that a head knows.
"""

import re

import torch
from torch import nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from .checkpoint import Checkpoint

# Names of a block's weight or bias, and of a head's output layer, in Medusa's own layout and in vLLM's. The groups are
# the numbers of the head and of the block or layer.
BLOCKS = (r"(\d+)\.(\d+)\.linear\.(weight|bias)", r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
OUTPUTS = (r"(\d+)\.(\d+)\.weight", r"lm_heads\.(\d+)()\.weight")
PREFIXES = ("medusa_head.", "medusa_heads.")  # a checkpoint with a prefix may also hold the target
# a reduced vocabulary: token i of the heads is token token_map[i] or i + d2t[i] of the target
TOKEN_MAP, OFFSETS = "token_map", "d2t"
SHARED = "lm_head.weight"
UNUSED = {TOKEN_MAP, OFFSETS, "t2d", "embed_tokens.weight", "verifier_lm_head.weight"}
# Vocabularies whose sizes differ by at most this share are assumed to belong to one tokenizer with different padding.
VOCABULARY_PADDING = 0.01


class MedusaHeads(nn.Module):
    """The heads of a target. They are stacked: each layer of all heads is one matrix product.

    A block computes x + SiLU(W x + b). After its blocks, a head has an output layer without a bias: its own, one that
    all heads share, or the target's.

    Args:
        weight: [L, D, H, H]. Weights of the blocks.
        bias: [L, D, H]. Their biases; None if there are none.
        output: [D, DV, H], or [1, DV, H] if all heads share it; None if the heads use the target's output layer.
        target_ids: [DV] int64. The target's token for each token of the heads; None if they are equal.
        scale: factor of the logits.

    Attributes:
        num_heads: D.
        hidden_size: H.
        vocab_size: number of tokens, from 0, among which those are that the heads may propose; None if the target
            decides it.
        num_known: number of tokens that the heads may propose; None if the target decides it.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output: torch.Tensor | None,
        target_ids: torch.Tensor | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        _, self.num_heads, self.hidden_size, _ = weight.shape
        for name, tensor in (("weight", weight), ("bias", bias), ("output", output)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("target_ids", target_ids)
        self.vocab_size = self.num_known = None if output is None else output.shape[1]
        if target_ids is not None:
            self.vocab_size, self.num_known = 1 + int(target_ids.max()), len(target_ids)
        self.scale = scale

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "MedusaHeads":
        """The heads of a checkpoint in Medusa's own layout or in vLLM's. They are counted by their tensors, because
        the number in published configs is often another one.

        Args:
            checkpoint: the checkpoint.
            dtype: of the weights; None for that of the checkpoint.
            device: of the weights; None for the CPU.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape; the message names it.
        """
        return _Reader(checkpoint).heads(dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def check_target(self, target: PreTrainedModel) -> None:
        """Refuse a target that these heads were not made for.

        Raises:
            ValueError: hidden size, vocabulary, dtype or device differ; the message names both sides.
        """
        config = target.config.get_text_config(decoder=True)
        known = config.vocab_size if self.vocab_size is None else self.vocab_size
        most = config.vocab_size * (1 + VOCABULARY_PADDING)
        least = 0 if self.target_ids is not None else config.vocab_size * (1 - VOCABULARY_PADDING)
        for name, fits, wanted, got in (
            ("hidden size", config.hidden_size == self.hidden_size, config.hidden_size, self.hidden_size),
            ("vocabulary", least <= known <= most, f"{config.vocab_size} tokens", f"{known} tokens"),
            ("dtype", target.dtype == self.dtype, target.dtype, self.dtype),
            ("device", target.device == self.device, target.device, self.device),
        ):
            if not fits:
                raise ValueError(
                    f"MedusaHeads: the heads must have the {name} of the target {type(target).__name__}, {wanted}, "
                    f"got {got}"
                )

    def forward(
        self, state: torch.Tensor, num_heads: int | None = None, target_output: nn.Module | None = None
    ) -> torch.Tensor:
        """Logits of the first heads.

        Args:
            state: [B, H]. The target's hidden states after the final norm.
            num_heads: number of heads to run; None for all.
            target_output: gives the target's logits after these states, if the heads have no output layer.

        Returns:
            [B, num_heads, V]. -inf for tokens that the heads do not know.
        """
        count = self.num_heads if num_heads is None else num_heads
        hidden = state.expand(count, *state.shape)
        for layer, weight in enumerate(self.weight):
            inner = hidden @ weight[:count].mT
            hidden = hidden + silu(inner if self.bias is None else inner + self.bias[layer, :count, None])
        if self.output is None:
            logits = target_output(hidden)
        elif len(self.output) == 1:
            logits = linear(hidden, self.output[0])
        else:
            logits = hidden @ self.output[:count].mT
        logits = logits.transpose(0, 1)
        if self.scale != 1:
            logits = logits * self.scale
        if self.target_ids is None:
            return logits
        if self.output is None:
            logits = logits[..., self.target_ids]
        unknown = logits.new_full((*logits.shape[:2], self.vocab_size), float("-inf"))
        return unknown.index_copy_(2, self.target_ids, logits)


class _Reader:
    """Finds the tensors of the heads in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        self.source, self.config = checkpoint.source, checkpoint.config
        tensors = checkpoint.tensors
        for prefix in PREFIXES:
            if any(name.startswith(prefix) for name in tensors):
                own = (name for name in tensors if name.startswith(prefix) or name in UNUSED)
                tensors = {name.removeprefix(prefix): checkpoint.tensors[name] for name in own}
        self.tensors = tensors
        self.blocks: dict[tuple[int, int, str], torch.Tensor] = {}  # by head, block, and "weight" or "bias"
        self.outputs: dict[int, torch.Tensor] = {}  # by head
        layers: dict[int, str] = {}  # number of the output layer among a head's layers, in Medusa's own layout
        unknown = []
        for name, tensor in tensors.items():
            if found := _match(BLOCKS, name):
                self.blocks[int(found[1]), int(found[2]), found[3]] = tensor
            elif found := _match(OUTPUTS, name):
                self.outputs[int(found[1])] = tensor
                layers[int(found[1])] = found[2]
            elif name == SHARED and self.config.get("original_lm_head"):
                self.outputs[0] = tensor
            elif name not in UNUSED:
                unknown.append(name)
        numbers = {head for head, *_ in self.blocks} | set(self.outputs)
        if unknown or not numbers:
            raise self.error("the tensors of Medusa's heads alone", ", ".join(unknown[:3]) or "none")
        self.num_heads = 1 + max(numbers)
        self.num_blocks = 1 + max((block for _, block, _ in self.blocks), default=-1)
        wrong = sorted(number for head, number in layers.items() if number and int(number) != self.num_blocks)
        if wrong:
            raise self.error(f"{self.num_blocks} blocks and then an output layer in each head", f"a layer {wrong[0]}")

    def error(self, wanted: str, got: str) -> ValueError:
        return ValueError(f"MedusaHeads: {self.source} must hold {wanted}, got {got}")

    def heads(self, dtype: torch.dtype | None, device: torch.device | str | None) -> MedusaHeads:
        target_ids = self.target_ids()
        outputs = self.all_outputs(target_ids)
        known = outputs or [tensor for (*_, name), tensor in self.blocks.items() if name == "weight"]
        if not known:
            raise self.error("the weights of the heads", "their biases alone")
        hidden, dtype = known[0].shape[-1], known[0].dtype if dtype is None else dtype
        for tensor in outputs:
            if list(tensor.shape) != (wanted := [len(outputs[0]), hidden]):
                raise self.error(f"output layers of one shape, {wanted}", str(list(tensor.shape)))
        stack = self.num_blocks, self.num_heads
        has_bias = any(name == "bias" for *_, name in self.blocks)
        weight = _stacked(self.all_blocks("weight", [hidden, hidden]), [hidden, hidden], dtype, device)
        bias = _stacked(self.all_blocks("bias", [hidden]), [hidden], dtype, device) if has_bias else None
        return MedusaHeads(
            weight.unflatten(0, stack),
            None if bias is None else bias.unflatten(0, stack),
            _stacked(outputs, list(outputs[0].shape), dtype, device) if outputs else None,
            None if target_ids is None else target_ids.to(device),
            self.config.get("logit_scale", 1.0),
        )

    def all_blocks(self, name: str, shape: list[int]) -> list[torch.Tensor]:
        """The weights or biases of all blocks, block by block."""
        places = [(head, block) for block in range(self.num_blocks) for head in range(self.num_heads)]
        for head, block in places:
            tensor = self.blocks.get((head, block, name))
            if tensor is None or list(tensor.shape) != shape:
                got = "none" if tensor is None else str(list(tensor.shape))
                raise self.error(f"the {name} {shape} of block {block} of head {head}", got)
        return [self.blocks[head, block, name] for head, block in places]

    def all_outputs(self, target_ids: torch.Tensor | None) -> list[torch.Tensor]:
        """The output layer of each head; one if they share it, none if they use the target's. A layer of the whole
        vocabulary is reduced to the tokens of the heads."""
        heads = sorted(self.outputs)
        is_shared = self.config.get("original_lm_head") and heads in ([], [0])
        if not is_shared and heads != list(range(self.num_heads)):
            raise self.error(f"an output layer for each of {self.num_heads} heads", f"those of the heads {heads}")
        outputs = [self.outputs[head] for head in heads]
        if target_ids is None:
            return outputs
        for tensor in outputs:
            if len(tensor) != len(target_ids) and len(tensor) <= (last := int(target_ids.max())):
                raise self.error(
                    f"output layers of {len(target_ids)} tokens, or of all tokens up to {last}", str(list(tensor.shape))
                )
        return [tensor if len(tensor) == len(target_ids) else tensor[target_ids] for tensor in outputs]

    def target_ids(self) -> torch.Tensor | None:
        """The target's token for each token of the heads; None if they are equal."""
        if OFFSETS in self.tensors:
            offsets = self.tensors[OFFSETS].long()
            return torch.arange(len(offsets)) + offsets
        whole, reduced = (self.config.get(name) for name in ("vocab_size", "truncated_vocab_size"))
        if whole is None or reduced is None or reduced >= whole:  # vLLM then ignores the map
            return None
        if TOKEN_MAP not in self.tensors:
            raise self.error(f"{TOKEN_MAP}, because the config has {reduced} of {whole} tokens", "none")
        return self.tensors[TOKEN_MAP].long()


def _match(patterns: tuple[str, ...], name: str) -> re.Match | None:
    return next((found for pattern in patterns if (found := re.fullmatch(pattern, name))), None)


def _stacked(
    parts: list[torch.Tensor], shape: list[int], dtype: torch.dtype, device: torch.device | str | None
) -> torch.Tensor:
    """[len(parts), *shape]. Each tensor is converted and moved on its own, so that no more than one is in memory
    twice."""
    stacked = torch.empty(len(parts), *shape, dtype=dtype, device=device)
    for place, part in zip(stacked, parts, strict=True):
        place.copy_(part)
    return stacked
