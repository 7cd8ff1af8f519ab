"""Random valid and invalid calls of the ops and of generate: the result is correct, or a ValueError names the fault.

The quick tests draw the same few examples in every run; the slow tests draw thousands of new ones.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import specdec_triton as sdt
from by_hand import accept_greedy_by_hand, append_by_hand, attention_by_hand, rotary_by_hand
from families import EOS, NEVER, PAD, VOCAB, build, prompt
from helpers import snapshot
from sampled_cases import FILTERS, case
from specdec_triton import ops
from specdec_triton.ops.filters import Filters
from specdec_triton.ops.reference import WORD_BITS
from specdec_triton.ops.rules import RULES, SAMPLING, WEIGHING_RULES

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def fuzz(examples, **limits):
    return settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None, **limits)


def parents_of(draw, batch, nodes, padding=True):
    """[B, N] int32: parents of random trees, in which some nodes are padding."""
    rows = []
    for _ in range(batch):
        row = [-1]
        for node in range(1, nodes):
            real = [0] + [other for other in range(1, node) if row[other] >= 0]
            row.append(draw(st.sampled_from(real + ([-1] if padding else []))))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32)


@st.composite
def attention_calls(draw):
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    nodes, dim, value_dim = draw(st.integers(1, 7)), draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([1, 4, 8]))
    rows = draw(st.integers(1, nodes))
    start = torch.tensor([draw(st.integers(0, 3)) for _ in range(batch)])
    length = start + torch.tensor([draw(st.integers(0, 6)) for _ in range(batch)])
    slots = int(length.max()) + nodes + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tree = sdt.DraftTree.from_parents(torch.zeros(batch, nodes, dtype=torch.int64), parents_of(draw, batch, nodes))
    key, value = (torch.randn(batch, kv_heads, slots, each, generator=generator) for each in (dim, value_dim))
    columns = torch.arange(slots)
    unused = (columns < start[:, None]) | (columns >= (length + nodes)[:, None])
    for tensor in (key, value):
        tensor.masked_fill_(unused[:, None, :, None], draw(st.sampled_from([0.0, float("nan"), float("inf")])))
    options = {
        "query": torch.randn(batch, kv_heads * group, rows, dim, generator=generator),
        "key": key,
        "value": value,
        "packed_tree": tree.pack(start, length),
        "scale": draw(st.sampled_from([None, 1.0, 0.1])),
        "sliding_window": draw(st.sampled_from([None, 1, 3, 100])),
        "chunk_size": draw(st.sampled_from([None, 1, 4])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.sampled_from([None, torch.randn(kv_heads * group, generator=generator)])),
    }
    return options


def packed_attention_by_hand(query, key, value, packed_tree, impl=None, **options):
    nodes = packed_tree.shape[1]

    def visible(b, i):
        *words, depth, start, length = packed_tree[b, nodes - query.shape[2] + i].tolist()
        ancestors = [node for node in range(nodes) if words[node // WORD_BITS] >> node % WORD_BITS & 1]
        tree = [(length + node, length - start + int(packed_tree[b, node, -3])) for node in ancestors]
        return length - start + depth, [(slot, slot - start) for slot in range(start, length)] + tree

    return attention_by_hand(query, key, value, visible, **options)


@st.composite
def acceptance_calls(draw):
    batch, nodes, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randint(-3, 4, (batch, nodes, vocab), generator=generator).float()  # with ties
    infinite = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return {
        "logits": logits.masked_fill(infinite, float("-inf")).to(draw(st.sampled_from(ops.FLOAT_DTYPES))),
        "tokens": torch.randint(0, vocab, (batch, nodes), generator=generator),
        "parents": parents_of(draw, batch, nodes),
        "max_depth": draw(st.integers(0, nodes - 1)),
        "budget": draw(st.sampled_from([None, torch.randint(0, 5, (batch,), generator=generator)])),
        "eos_ids": draw(st.sampled_from([None, torch.tensor([0]), torch.tensor([1, 3]), torch.tensor([]).long()])),
    }


def acceptance_by_hand(logits, tokens, parents, max_depth, budget, eos_ids, impl=None):
    budget = torch.full((len(tokens),), max_depth + 1) if budget is None else budget
    ends = [] if eos_ids is None else eos_ids.tolist()
    rows = [
        accept_greedy_by_hand(*row, max_depth, left, ends)
        for *row, left in zip(logits.float(), tokens.tolist(), parents.tolist(), budget.tolist(), strict=True)
    ]
    paths, length, next_ids = zip(*rows, strict=True)
    path = torch.tensor(paths, dtype=torch.int32).view(len(rows), max_depth)
    return path, torch.tensor(length), torch.tensor(next_ids), torch.zeros(len(rows), dtype=torch.bool)


@st.composite
def sampling_calls(draw):
    rule = draw(st.sampled_from(list(RULES)))
    sampling = draw(st.sampled_from(SAMPLING)) if rule in WEIGHING_RULES else "none"
    batch, nodes, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 9))
    kind, dtype = draw(st.sampled_from(FILTERS)), draw(st.sampled_from(ops.FLOAT_DTYPES))
    arguments = case(rule, sampling, batch, nodes, vocab, kind, dtype, draw(st.integers(0, 1000)))
    arguments = {name: value.cpu() if torch.is_tensor(value) else value for name, value in arguments.items()}
    return arguments | {"eos_ids": draw(st.sampled_from([None, torch.tensor([0, 3])]))}


def sampling_by_hand(impl=None, **arguments):
    return ops.accept_sample(**rearranged(arguments, "contiguous"), impl="reference")


@st.composite
def compaction_calls(draw):
    batch, slots, depth = draw(st.integers(1, 3)), draw(st.integers(2, 12)), draw(st.integers(0, 4))
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    depth = min(depth, slots - 1)
    base = torch.tensor([draw(st.integers(0, slots - 1 - depth)) for _ in range(batch)])
    path = []
    for row in range(batch):
        nodes = draw(st.sets(st.integers(1, max(slots - 1 - int(base[row]), 1)), max_size=depth)) if depth else set()
        path.append(sorted(nodes) + [-1] * (depth - len(nodes)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]))
    size = batch * slots * sum(widths)
    storage = (torch.arange(size) % 120).to(dtype)
    return {
        "storage": storage,
        "widths": widths,
        "base": base,
        "path": torch.tensor(path, dtype=torch.int32).view(batch, depth),
    }


def compaction_by_hand(storage, widths, base, path, impl=None):
    moved = storage.clone()
    batch = len(base)
    slots, offset = storage.numel() // (batch * sum(widths)), 0
    for width in widths:
        size = batch * slots * width
        before, after = (each[offset : offset + size].view(batch, slots, width) for each in (storage, moved))
        for row in range(batch):
            for place, node in enumerate(path[row].tolist()):
                if node >= 0:
                    after[row, base[row] + 1 + place] = before[row, base[row] + node]
        offset += size
    return moved


def compact(storage, **arguments):
    storage = storage.clone() if isinstance(storage, torch.Tensor) else storage
    ops.compact_kv(storage, **arguments)
    return storage


@st.composite
def append_calls(draw):
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    depth = draw(st.integers(0, nodes - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    accepted = [draw(st.integers(0, depth)) for _ in range(batch)]
    left = [draw(st.integers(0, 3)) for _ in range(batch)]  # rows without any are finished
    path = [[*range(1, count + 1)] + [-1] * (depth - count) for count in accepted]
    return {
        "text": torch.randint(0, 50, (batch, 20), generator=generator),
        "length": torch.tensor([draw(st.integers(0, 9)) for _ in range(batch)]),
        "position": torch.tensor([draw(st.integers(0, 9)) for _ in range(batch)]),
        "budget": torch.tensor([each and each + count for each, count in zip(left, accepted, strict=True)]),
        "tokens": torch.randint(0, 9, (batch, nodes), generator=generator),
        "parents": parents_of(draw, batch, nodes),
        "path": torch.tensor(path, dtype=torch.int32).view(batch, depth),
        "next_ids": torch.randint(0, 9, (batch,), generator=generator),
        "has_nan": torch.rand(batch, generator=generator) < 0.3,
        "eos_ids": draw(st.sampled_from([None, torch.tensor([0]), torch.tensor([1, 3]), torch.tensor([]).long()])),
        "draft_nan": draw(st.sampled_from([None, torch.rand(batch, generator=generator) < 0.5])),
    }


def append(path, next_ids, has_nan, impl=None, **arguments):
    for name in ("text", "length", "position", "budget"):
        if torch.is_tensor(arguments[name]):
            arguments[name] = arguments[name].clone(memory_format=torch.contiguous_format)
    length = (path >= 0).sum(-1) if torch.is_tensor(path) else path
    report = ops.append_tokens(**arguments, accepted=ops.Acceptance(path, length, next_ids, has_nan), impl=impl)
    return report, *(arguments[name] for name in ("text", "length", "position", "budget"))


def appended_by_hand(impl=None, **arguments):
    lists = {name: value if value is None else value.tolist() for name, value in arguments.items()}
    accepted = [sum(node >= 0 for node in row) for row in lists["path"]]
    return tuple(map(torch.tensor, append_by_hand(**lists, accepted_length=accepted)))


@st.composite
def rotary_calls(draw):
    batch, nodes, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(2, 9))
    heads, kv_heads, value_dim = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    rotated, slots = 2 * draw(st.integers(1, dim // 2)), nodes + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    order = [draw(st.permutations(range(slots)))[:nodes] for _ in range(batch)]
    return {
        "query": normal(batch, nodes, heads, dim),
        "key": normal(batch, nodes, kv_heads, dim),
        "value": normal(batch, nodes, kv_heads, value_dim),
        "cos": normal(draw(st.sampled_from([1, batch])), nodes, rotated),
        "sin": normal(draw(st.sampled_from([1, batch])), nodes, rotated),
        "keys": normal(batch, kv_heads, slots, dim),
        "values": normal(batch, kv_heads, slots, value_dim),
        "slots": torch.tensor(order),
        "interleaved": draw(st.booleans()),
        "query_norm": draw(st.sampled_from([None, normal(dim)])),
        "key_norm": draw(st.sampled_from([None, normal(dim)])),
        "eps": draw(st.sampled_from([1e-6, 0.5])),
        "style": draw(st.sampled_from(["cast_first", "cast_last", "one_plus"])),
    }


def rotate(keys, values, impl=None, **arguments):
    planes = [
        each.clone(memory_format=torch.contiguous_format) if torch.is_tensor(each) else each for each in (keys, values)
    ]
    arguments |= dict(zip(("keys", "values"), planes, strict=True))
    return ops.rotary_and_cache(**arguments, impl=impl), *planes


CALLS = {
    "tree_attention": (attention_calls(), ops.tree_attention, packed_attention_by_hand),
    "accept_greedy": (acceptance_calls(), ops.accept_greedy, acceptance_by_hand),
    "accept_sample": (sampling_calls(), ops.accept_sample, sampling_by_hand),
    "compact_kv": (compaction_calls(), compact, compaction_by_hand),
    "append_tokens": (append_calls(), append, appended_by_hand),
    "rotary_and_cache": (rotary_calls(), rotate, rotary_by_hand),
}


def sliced(tensor):
    """A view of every second element of a larger tensor; the other elements are invalid values."""
    wide = torch.full([2 * size + 1 for size in tensor.shape], 77).to(tensor.dtype)
    view = wide[tuple(slice(1, 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


# the first row for all, if rows are expanded
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda tensor: (
        tensor.permute(*range(tensor.dim())[::-1]).contiguous().permute(*range(tensor.dim())[::-1])
    ),
    "sliced": sliced,
    "expanded": lambda tensor: tensor[:1].expand_as(tensor),
}


def rearranged(arguments, layout):
    """The same arguments with another memory layout of each tensor except the storage. `layout` is a name or a function
    of the argument's name."""
    if isinstance(layout, str):
        layout = LAYOUTS[layout]

    def moved(name, value):
        if isinstance(value, Filters):
            return Filters(*(moved(name, option) for option in value.tensors), max_top_k=value.max_top_k)
        return layout(value) if torch.is_tensor(value) and value.numel() and name != "storage" else value

    return {name: moved(name, value) for name, value in arguments.items()}


# the caller must ensure their contents, and the op could not detect a change of shape
PROMISES = ("packed_tree", "parents", "path", "base", "slots")


def spoil(draw, name, value):
    """Replace an argument by another value, which is occasionally also valid."""
    if not isinstance(value, torch.Tensor):
        return draw(st.sampled_from([None, -1, 0, 0.0, True, float("nan"), 10**9, "text", (), torch.zeros(1)]))
    dims = st.integers(0, value.dim() - 1)
    changes = [
        lambda: None,
        lambda: value.tolist(),
        lambda: value[None],
        lambda: value[0],
        lambda: torch.cat([value, value]),
        lambda: value.narrow(draw(dims), 0, 0),
        lambda: value.to(torch.float64),
        lambda: value.to(torch.bool),
        lambda: value.to("meta"),
    ]
    if name not in PROMISES:
        dtypes = st.sampled_from([torch.int32, torch.int64, torch.float16, torch.float32])
        changes += [
            lambda: torch.cat([value, value], draw(dims)),
            lambda: value.to(draw(dtypes)),
            lambda: value.transpose(draw(dims), draw(dims)),
        ]
    return draw(st.sampled_from(changes))()


def check_op(op, data, impl):
    calls, function, by_hand = CALLS[op]
    layouts = st.sampled_from(["contiguous", "transposed", "sliced"])
    arguments = rearranged(data.draw(calls), lambda tensor: LAYOUTS[data.draw(layouts)](tensor))
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(arguments)))
        arguments[name] = spoil(data.draw, name, arguments[name])
    try:
        got = function(**arguments, impl=impl)
    except ValueError as error:
        assert str(error).startswith(f"{op}: ") and ", got " in str(error), error
        return
    wanted = by_hand(**arguments)
    if op == "tree_attention":
        tolerance = 1e-4 if arguments["query"].dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance)
    elif op == "rotary_and_cache":
        for mine, hand in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, hand, rtol=1e-4, atol=1e-4, equal_nan=True)
    elif op == "accept_sample" and impl == "triton":
        # with different rounding of sums, a choice may differ: test_kernel_accept_sample compares more closely
        again = function(**rearranged(arguments, "contiguous"), impl=impl)
        assert all(torch.equal(ours, other) for ours, other in zip(got, again, strict=True))
    elif op.startswith("accept") or op == "append_tokens":
        assert all(torch.equal(ours, hand) for ours, hand in zip(got, wanted, strict=True))
    else:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("op", CALLS)
@given(data=st.data())
@fuzz(60, derandomize=True)
def test_ops(op, data):
    check_op(op, data, None)


def whole_call(op):
    """Arguments for all parameters. All tensors have more than one element in each dimension."""
    random = torch.Generator().manual_seed(4)
    parents = torch.tensor([[-1, 0, 0, 1, 2, 4], [-1, 0, 1, 1, 0, -1]], dtype=torch.int32)
    if op == "tree_attention":
        tree = sdt.DraftTree.from_parents(torch.zeros(2, 6, dtype=torch.int64), parents)
        query, key, value = (torch.randn(2, *shape, generator=random) for shape in ((4, 6, 8), (2, 30, 8), (2, 30, 4)))
        packed = tree.pack(torch.tensor([1, 3]), torch.tensor([9, 20]))
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
        return {"query": query, "key": key, "value": value, "packed_tree": packed, "sinks": sinks, "sliding_window": 9}
    if op == "compact_kv":
        base, path = torch.tensor([2, 5]), torch.tensor([[2, 3, 6], [1, 4, -1]], dtype=torch.int32)
        return {"storage": torch.arange(2 * 12 * 7).float(), "widths": [3, 4], "base": base, "path": path}
    more = {"budget": torch.tensor([4, 3]), "eos_ids": torch.tensor([2, 6])}
    if op == "append_tokens":
        text, tokens, flags = torch.arange(40).view(2, 20), torch.arange(12).view(2, 6), torch.tensor([True, False])
        given = {"text": text, "length": torch.tensor([3, 8]), "position": torch.tensor([3, 6]), "tokens": tokens}
        path = torch.tensor([[1, 3, 5], [2, 3, 4]], dtype=torch.int32)
        given |= {"parents": parents, "path": path, "next_ids": torch.tensor([7, 6])}
        return given | more | {"has_nan": flags, "draft_nan": ~flags}
    if op == "rotary_and_cache":
        states = [torch.randn(2, 3, heads, dim, generator=random) for heads, dim in ((4, 8), (2, 8), (2, 6))]
        given = dict(zip(("query", "key", "value"), states, strict=True))
        given |= {name: torch.randn(2, 3, 4, generator=random) for name in ("cos", "sin")}
        given |= {name: torch.randn(2, 2, 9, dim, generator=random) for name, dim in (("keys", 8), ("values", 6))}
        given |= {"slots": torch.tensor([[3, 8, 0], [5, 1, 2]]), "query_norm": torch.randn(8, generator=random)}
        return given | {"eps": 1e-6}
    if op == "accept_sample":
        return case("multi_round", "without", 2, 6, 9, "all", torch.float16, 3) | more
    logits = torch.randint(-3, 4, (2, 6, 9), generator=random).half()
    return {"logits": logits, "tokens": logits.argmax(-1), "parents": parents, "max_depth": 3} | more


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_strides(impl, op, layout):
    """With any layout of the tensors, the result is that of contiguous ones from the reference."""
    given = {name: value.cpu() if torch.is_tensor(value) else value for name, value in whole_call(op).items()}
    arguments, function = rearranged(given, layout), CALLS[op][1]
    for name, value in arguments.items():
        assert (
            not torch.is_tensor(value)
            or name in ("storage", "eos_ids", "base", "budget")
            or not (value.is_contiguous() and value.dim() > 1)
        ), name
    wanted = function(**rearranged(arguments, "contiguous"), impl="reference")
    got = function(**arguments, impl=impl)
    for ours, hand in zip(*((result,) if torch.is_tensor(result) else result for result in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, hand, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", CALLS)
@given(data=st.data())
@fuzz(3000)
def test_ops_at_length(op, data):
    check_op(op, data, None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", CALLS)
@given(data=st.data())
@fuzz(400)
def test_kernels_at_length(op, data):
    check_op(op, data, "triton")


MODEL, DRAFT = build("llama"), build("llama", seed=1)
ASSISTANCE = [
    {"prompt_lookup_num_tokens": 1},
    {"prompt_lookup_num_tokens": 7, "max_matching_ngram_size": 1},
    {"assistant_model": DRAFT},
    {"assistant_model": MODEL},
    {"assistant_early_exit": 1},
    {"assistant_early_exit": 2},
    {"drafter": sdt.PromptLookupDrafter(branches=2)},
    {"drafter": sdt.ModelDrafter(DRAFT, tree=7)},
    {"drafter": sdt.EarlyExitDrafter(skip=[1], tree=sdt.Topology.from_widths([2, 2]))},
    {"drafter": sdt.ModelDrafter(DRAFT), "tree": 3},
]
SUPPORTED = {
    "max_new_tokens": st.integers(1, 14),
    "min_new_tokens": st.integers(0, 6),
    "eos_token_id": st.sampled_from([EOS, NEVER, [EOS, 5, 9], list(range(3, 30))]),
    "repetition_penalty": st.sampled_from([0.7, 1.3]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.sampled_from([[[5], [7, 8]], [[token] for token in range(10, 40)]]),
    "suppress_tokens": st.sampled_from([[3, 4, 5]]),
    "forced_eos_token_id": st.just(EOS),
    "exponential_decay_length_penalty": st.just((2, 1.5)),
    "sequence_bias": st.just([[[11], 4.0], [[12, 13], -3.0]]),
    "prefix_allowed_tokens_fn": st.just(lambda row, text: [int(text[-1]) % VOCAB, *range(row + 3, VOCAB, 2)]),
    "output_scores": st.booleans(),
    "output_logits": st.booleans(),
    "return_dict_in_generate": st.booleans(),
    "pad_token_id": st.just(PAD),
    "stopping_criteria": st.just([lambda ids, scores, **kwargs: ids[:, -1] % 7 == 3]),
    "renormalize_logits": st.booleans(),
    "remove_invalid_values": st.booleans(),
    "use_cache": st.just(True),
    "cache_implementation": st.just("dynamic"),
    "num_beams": st.just(1),
    "prefill_chunk_size": st.integers(1, 4),
}
UNSUPPORTED = {
    "num_beams": st.just(2),
    "use_cache": st.just(False),
    "cache_implementation": st.sampled_from(["static", "offloaded", "quantized", "nonsense"]),
    "output_attentions": st.just(True),
    "output_hidden_states": st.just(True),
    "num_return_sequences": st.just(2),
    "max_new_tokens": st.sampled_from([0, -3]),
    "min_new_tokens": st.just(-1),
    "repetition_penalty": st.sampled_from([0.0, -1.0]),
    "bad_words_ids": st.just([[]]),
    "guidance_scale": st.just(1.5),
    "use_mtp": st.just(True),
    "assistant_ensemble_weight": st.just(0.5),
    "synced_gpus": st.just(True),
    "unknown_argument": st.just(1),
    "inputs_embeds": st.just(torch.zeros(1, 3, 32)),
    "attention_mask": st.sampled_from([torch.ones(1, 3), torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]])]),
    "tree": st.sampled_from([0, True, "wide", 2.5]),
    "rule": st.sampled_from(["nonsense", 3]),
    "impl": st.sampled_from(["cuda", 1]),
}
OURS = {"drafter", "tree", "rule", "impl"}


@st.composite
def generate_calls(draw):
    names = draw(st.lists(st.sampled_from(sorted(SUPPORTED)), max_size=5, unique=True))
    options = {"max_new_tokens": 8, "eos_token_id": NEVER, "do_sample": False}
    options |= {name: draw(SUPPORTED[name]) for name in names}
    if "exponential_decay_length_penalty" in options and options["eos_token_id"] == NEVER:
        options["eos_token_id"] = EOS  # plain generate uses the id as an index
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(UNSUPPORTED)))
        options[name] = draw(UNSUPPORTED[name])
    batch = draw(st.integers(1, 3))
    inputs = prompt(batch, draw(st.integers(4, 12)), draw(st.integers(0, 3)), seed=draw(st.integers(0, 99)))
    return {**inputs, **options}, draw(st.sampled_from(ASSISTANCE)), draw(st.sampled_from([None, "reference"]))


def check_generate(call):
    """Compare plain and speculative calls: the same output, an error of this package that names the refused argument,
    or the same error in both."""
    options, assistance, impl = call
    ours = {name: options.pop(name) for name in OURS & set(options)}
    plain = failure = None
    try:
        plain = MODEL.generate(**options)
    except Exception as error:  # whichever error transformers raises
        failure = error
    before = snapshot(MODEL), snapshot(DRAFT)
    patch = {"impl": impl} | {name: value for name, value in assistance.items() if name in OURS} | ours
    asked = {name: value for name, value in assistance.items() if name not in OURS}
    try:
        with sdt.patched(MODEL, **patch):
            result = MODEL.generate(**options, **asked)
    except Exception as error:
        refused = isinstance(error, ValueError) and ", got " in str(error)
        same = type(error) is type(failure) and str(error) == str(failure)
        assert refused or same, f"{error!r} against {failure!r}"
    else:
        assert failure is None, f"no error against {failure!r}"
        assert_same(result, plain)
    assert (snapshot(MODEL), snapshot(DRAFT)) == before


def assert_same(ours, plain):
    assert type(ours) is type(plain) or isinstance(ours, torch.Tensor) == isinstance(plain, torch.Tensor)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, plain)
        return
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        got, wanted = getattr(ours, name), getattr(plain, name)
        assert (got is None) == (wanted is None)
        for one, other in zip(got or (), wanted or (), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@given(call=generate_calls())
@fuzz(40, derandomize=True)
def test_generate(call):
    check_generate(call)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(call=generate_calls())
@fuzz(300)
def test_generate_at_length(call):
    check_generate(call)
