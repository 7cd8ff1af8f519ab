"""Suffix decoding (Oliaro et al. 2024, arXiv 2411.04975) stated literally, in plain Python, with scans of all texts.

A place is a position of a text before which a sequence of tokens occurs. The token at that position follows the
sequence, so the end of a text is no place. Texts are lists of tokens.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

Texts = Sequence[Sequence[int]]


def places(texts: Texts, sequence: Sequence[int]) -> list[tuple[int, int]]:
    """(text, position) of each place of `sequence`."""
    length, wanted = len(sequence), list(sequence)
    return [
        (number, position)
        for number, text in enumerate(texts)
        for position in range(length, len(text))
        if list(text[position - length : position]) == wanted
    ]


def followers(texts: Texts, sequence: Sequence[int]) -> Counter:
    """Each token that follows `sequence`, and the number of places at which it does."""
    return Counter(texts[number][position] for number, position in places(texts, sequence))


def longest(texts: Texts, tail: Sequence[int], most: int | None = None) -> int:
    """The largest number of last tokens of `tail`, at most `most`, that have a place; 0 for none."""
    for length in range(len(tail) if most is None else min(most, len(tail)), 0, -1):
        if places(texts, tail[len(tail) - length :]):
            return length
    return 0


class Node(NamedTuple):
    """A draft token.

    Attributes:
        path: the draft tokens from the root to this one.
        chance: product of the shares along the path. The share of a token is the part of the places of the tokens
            before it at which it follows.
    """

    path: tuple[int, ...]
    chance: float


def best_first(texts: Texts, sequence: Sequence[int], num_tokens: int, min_chance: float, depth: int) -> list[Node]:
    """The `num_tokens` likeliest continuations of `sequence` of at most `depth` tokens, the likeliest first. All have a
    chance of at least `min_chance`."""

    def children(node: Node) -> list[Node]:
        counts = followers(texts, [*sequence, *node.path])
        total = sum(counts.values())
        found = [Node((*node.path, token), node.chance * count / total) for token, count in counts.items()]
        return [child for child in found if child.chance >= min_chance and len(child.path) <= depth]

    kept, frontier = [], children(Node((), 1.0))
    while frontier and len(kept) < num_tokens:
        best = max(frontier, key=lambda node: node.chance)
        frontier.remove(best)
        kept.append(best)
        frontier += children(best)
    return kept


def chance(texts: Texts, sequence: Sequence[int], path: Sequence[int]) -> float:
    """The chance of `path` after `sequence`, see `Node`; 0.0 if it has none."""
    result = 1.0
    for depth, token in enumerate(path):
        counts = followers(texts, [*sequence, *path[:depth]])
        result *= counts[token] / sum(counts.values()) if counts else 0.0
    return result


def likeliest_chain(
    texts: Texts, sequence: Sequence[int], num_tokens: int, min_chance: float
) -> tuple[list[Node], bool]:
    """The likeliest token, then the likeliest token after it, and so on, while their chance is at least `min_chance`.
    Also returns whether there was one likeliest token at each step."""
    kept: list[Node] = []
    node, is_unique = Node((), 1.0), True
    while len(kept) < num_tokens:
        counts = followers(texts, [*sequence, *node.path])
        if not counts:
            break
        best = max(counts.values())
        tokens = [token for token, count in counts.items() if count == best]
        node = Node((*node.path, tokens[0]), node.chance * best / sum(counts.values()))
        if node.chance < min_chance:
            break
        is_unique = is_unique and len(tokens) == 1
        kept.append(node)
    return kept, is_unique


def expected(nodes: Sequence[Node]) -> float:
    """The expected number of accepted tokens of a draft."""
    return sum(node.chance for node in nodes)


class LiteralHistory:
    """Earlier outputs, first in first out.

    Attributes:
        outputs: the texts that are kept, the oldest first. They have at most `max_tokens` tokens in all.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens, self.outputs = max_tokens, []

    def add(self, text: Sequence[int]) -> None:
        if self.max_tokens and len(text):
            self.outputs.append(list(text)[-self.max_tokens :])
        while sum(map(len, self.outputs)) > self.max_tokens:
            self.outputs.pop(0)
