"""Processors that keep state or look at other rows: they get exactly the calls that plain `generate` makes."""

import pytest
import torch
from transformers import LogitsProcessorList, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation.streamers import BaseStreamer

import specdec_triton as sdt
from families import EOS, NEVER, PAD, VOCAB, build, prompt
from helpers import DRAFTERS, TREES, HostDrafter, assert_same_output, drafter_of, last_columns, oracle, speculative

INF = float("inf")
LENGTH = 9  # of the prompts
RULES = ("rejection", "block", "multi_round", "traversal", "typical")


class Memory:
    """Base class of processors that remember every call. Each one forbids or changes tokens by its state or by other
    rows."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        return self.process(input_ids, scores)


class Matcher(Memory):
    """A grammar with a state for each row, which the row's last token advances. Pad tokens after the end do not change
    it."""

    state = None

    def process(self, input_ids, scores):
        if self.state is None:
            self.state, self.over = [0] * len(input_ids), [False] * len(input_ids)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if not self.over[row]:
                    assert (token + self.state[row]) % 7, "a token that the call before forbade"
                    self.state[row] = (self.state[row] * 5 + token) % 7
                self.over[row] |= token == PAD
        for row, state in enumerate(self.state):
            scores[row, [token for token in range(VOCAB) if (token + state) % 7 == 0]] = -INF
        return scores


class ByText(Memory):
    """Keeps a state for each text. A text whose beginning was never passed raises a KeyError."""

    states = None

    def process(self, input_ids, scores):
        texts = [tuple(row) for row in input_ids.tolist()]
        if self.states is None:
            self.states = dict.fromkeys(texts, 0)
        else:
            self.states |= {text: (self.states[text[:-1]] * 3 + text[-1]) % VOCAB for text in texts}
        for row, text in enumerate(texts):
            scores[row, (self.states[text] + torch.arange(0, VOCAB, 6)) % VOCAB] = -INF
        return scores


class Counting(Memory):
    """Forbids tokens by the number of the call."""

    def process(self, input_ids, scores):
        return scores.index_fill(1, (len(self.calls) * 7 + torch.arange(0, VOCAB, 5)) % VOCAB, -INF)


class Across(Memory):
    """Guidance between rows: each row is pushed away from the row before it."""

    def process(self, input_ids, scores):
        return scores * 1.5 - scores.roll(1, 0) * 0.5


class Pairs(Memory):
    """All rows follow the text of the longest row, which has not ended."""

    def process(self, input_ids, scores):
        others = (input_ids == input_ids[:, :1]).long().sum(1).flip(0)
        return scores.scatter(1, (others[:, None] * 11 + torch.arange(0, VOCAB, 4)) % VOCAB, -INF)


KINDS = (Matcher, ByText, Counting, Across, Pairs)


def assert_same_calls(ours, plain):
    assert len(ours.calls) == len(plain.calls)
    for (our_ids, our_scores), (ids, scores) in zip(ours.calls, plain.calls, strict=True):
        assert torch.equal(our_ids, ids) and our_scores.dtype == scores.dtype == torch.float32
        torch.testing.assert_close(our_scores, scores, rtol=1e-3, atol=1e-3)


def ends_of(model, inputs, kind, **options):
    """Tokens that end the first row of the output of `kind` early and the second one later, if they occur."""
    options |= {"max_new_tokens": 18, "eos_token_id": NEVER}
    text = model.generate(**inputs, **options, logits_processor=[kind()])[:, LENGTH:].tolist()
    return [
        next((token for place, token in enumerate(row) if place >= first and token not in row[:place]), NEVER)
        for row, first in ((text[0], 4), (text[-1], 9))
    ]


def with_each(names):
    """Combinations of every drafter with some kinds, and of every kind with the oracle."""
    rotated = [(name, KINDS[place % len(KINDS)]) for place, name in enumerate(names) if name != "oracle"]
    return [*rotated, *(("oracle", kind) for kind in KINDS)]


@pytest.mark.parametrize(
    ("batch", "name", "kind"),
    [(1, "oracle", Matcher), (1, "tree", ByText), *((3, *each) for each in with_each([*DRAFTERS, "host"]))],
)
def test_greedy_in_exactly_plain_generates_calls(batch, name, kind):
    model, inputs = build("llama"), prompt(batch=batch)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD}
    options["eos_token_id"] = ends_of(model, inputs, kind, do_sample=False)
    calls, our_calls = kind(), kind()
    plain = model.generate(**inputs, **options, logits_processor=[calls])
    assert batch == 1 or len(last_columns(plain)) > 1
    drafter = HostDrafter(torch.nn.functional.pad(plain, (0, 24))) if name == "host" else drafter_of(name, plain)
    text, stats = speculative(model, drafter, {**inputs, **options, "logits_processor": [our_calls]})
    assert torch.equal(text, plain)
    assert_same_calls(our_calls, calls)
    assert stats.emitted == sum(int((row != PAD).nonzero().max()) + 1 - LENGTH for row in plain)


def test_rows_in_lockstep_accept_the_common_length():
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options, logits_processor=[Counting()])
    wrong = plain.clone()
    wrong[1, LENGTH + 3] = (wrong[1, LENGTH + 3] + 1) % VOCAB
    for text, rounds in ((plain, 4), (wrong, 5)):
        with sdt.patched(model, drafter=oracle(text, 0.0, tree=sdt.Topology.chain(5))):
            assert torch.equal(model.generate(**inputs, **options, logits_processor=[Counting()]), plain)
        assert sdt.stats(model).rounds == rounds and sdt.stats(model).acceptance_length == 24 / rounds


@pytest.mark.parametrize("family", ["gemma3", "qwen2_window"])
def test_where_columns_and_positions_differ(family):
    model, inputs = build(family), prompt(batch=4, length=LENGTH, padding=0)
    for row in range(4):
        inputs["attention_mask"][row, : 2 * row] = 0
    options = {"do_sample": False, "max_new_tokens": 80, "pad_token_id": PAD}
    options["eos_token_id"] = ends_of(model, inputs, Across, do_sample=False)[:1]
    calls, our_calls = Across(), Across()
    plain = model.generate(**inputs, **options, logits_processor=[calls])
    with sdt.patched(model, drafter=oracle(plain, 0.1, tree=TREES["skipping"], room=120)):
        assert torch.equal(model.generate(**inputs, **options, logits_processor=[our_calls]), plain)
    assert_same_calls(our_calls, calls)


class Events(BaseStreamer):
    """Processor, criterion and streamer in one object. It records its calls in order."""

    def __init__(self, stops):
        self.stops, self.log = torch.tensor(stops), []

    def processor(self, input_ids, scores):
        self.log.append(("processor", input_ids.tolist()))
        return scores.roll(1, 1)

    def criterion(self, input_ids, scores, **kwargs):
        given = None if scores is None else [scores[-1].isfinite().all().item(), len(scores)]
        self.log.append(("criterion", input_ids.tolist(), given))
        return input_ids.shape[1] >= self.stops

    def put(self, value):
        self.log.append(("put", value.tolist()))

    def end(self):
        self.log.append(("end",))


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("stops", [(12, 20, 17), (10, 99, 11), (16, 16, 16), (12, 99, 99)])
def test_processors_criteria_and_streamers_take_turns_as_in_plain_generate(stops, eos):
    """None of them is called for a column before all of them were called for the column before."""
    model, inputs = build("llama", eos_token_id=eos), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": PAD}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    logs = []
    for drafter in (None, lambda text: oracle(text, 0.1, tree=TREES["wide"])):
        events = Events(stops)
        calls = {"logits_processor": [events.processor], "stopping_criteria": [events.criterion], "streamer": events}
        if drafter is None:
            plain = model.generate(**inputs, **options, **calls)
        else:
            with sdt.patched(model, drafter=drafter(plain.sequences)):
                ours = model.generate(**inputs, **options, **calls)
        logs.append(events.log)
    assert torch.equal(ours.sequences, plain.sequences) and logs[0] == logs[1]
    torch.testing.assert_close(ours.scores, plain.scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), with_each(["model", "dynamic", "lookup", "oracle"]))
def test_sampling_in_the_calls_of_plain_steps(name, kind):
    """With "coupled", the text is that of the seed without a draft, and processors get the same calls."""
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": True, "max_new_tokens": 24, "pad_token_id": PAD, "top_k": 20, "temperature": 0.9}
    free, _ = speculative(model, None, {**inputs, **options, "eos_token_id": NEVER}, seed=3)
    options["eos_token_id"] = [int(free[0, 13]), *range(3, 6)]
    calls, our_calls = kind(), kind()
    plain, _ = speculative(model, None, {**inputs, **options, "logits_processor": [calls]}, seed=3)
    text, stats = speculative(
        model, drafter_of(name, plain), {**inputs, **options, "logits_processor": [our_calls]}, seed=3
    )
    assert torch.equal(text, plain) and stats.rule == "coupled"
    assert_same_calls(our_calls, calls)


def test_several_sequences_of_one_prompt():
    model, inputs = build("llama"), prompt()
    options = {"do_sample": True, "max_new_tokens": 20, "num_return_sequences": 3, "eos_token_id": list(range(3, 9))}
    options["pad_token_id"] = PAD
    calls, our_calls = Across(), Across()
    plain, _ = speculative(model, None, {**inputs, **options, "logits_processor": [calls]}, seed=1)
    assert len(plain) == 6 and len(last_columns(plain)) > 2
    text, _ = speculative(model, oracle(plain), {**inputs, **options, "logits_processor": [our_calls]}, seed=1)
    assert torch.equal(text, plain)
    assert_same_calls(our_calls, calls)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", [Across, Matcher])
def test_scores_logits_and_cache(kind, padding):
    model, inputs = build("llama"), prompt(batch=3, padding=padding)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    options["eos_token_id"] = ends_of(model, inputs, kind, do_sample=False)
    plain = model.generate(**inputs, **options, logits_processor=[kind()])
    assert len(last_columns(plain.sequences)) > 1
    with sdt.patched(model, drafter=oracle(plain.sequences, tree=TREES["wide"])):
        ours = model.generate(**inputs, **options, logits_processor=[kind()])
    assert_same_output(model, ours, plain, inputs)


@pytest.mark.parametrize("sampled", [True, False])
def test_classifier_free_guidance(sampled):
    """This processor runs the model itself, with its own cache."""
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": sampled, "max_new_tokens": 16, "guidance_scale": 1.7, "pad_token_id": PAD}
    options |= {"negative_prompt_ids": prompt(batch=3, padding=0, seed=4)["input_ids"], "eos_token_id": [5, 9, 12, 20]}
    if sampled:
        plain, _ = speculative(model, None, {**inputs, **options}, seed=7)
    else:
        plain = model.generate(**inputs, **options)
    for name in ("model", "oracle"):
        text, _ = speculative(model, drafter_of(name, plain), {**inputs, **options}, seed=7)
        assert torch.equal(text, plain)


def test_a_watermark_with_a_history():
    model, inputs = build("llama"), prompt(batch=3)
    mark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 9, 4, 12], context_history_size=8)
    options = {"do_sample": True, "max_new_tokens": 20, "watermarking_config": mark, "top_k": 30, "pad_token_id": PAD}
    options["eos_token_id"] = list(range(3, 8))
    plain, _ = speculative(model, None, {**inputs, **options}, seed=2)
    without = {name: option for name, option in options.items() if name != "watermarking_config"}
    assert not torch.equal(plain, speculative(model, None, {**inputs, **without}, seed=2)[0])
    for name in ("tree", "oracle"):
        text, _ = speculative(model, drafter_of(name, plain), {**inputs, **options}, seed=2)
        assert torch.equal(text, plain)


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_a_watermark_without_state_needs_no_lockstep(scheme, monkeypatch):
    monkeypatch.setattr(sdt.engine.generate, "Lockstep", None)
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": NEVER}
    options["watermarking_config"] = WatermarkingConfig(bias=3.0, seeding_scheme=scheme)
    plain = model.generate(**inputs, **options)
    text, stats = speculative(model, oracle(plain, tree=TREES["wide"]), {**inputs, **options})
    assert torch.equal(text, plain) and stats.acceptance_length > 1.5


def prefix_function(stateless):
    def allowed(row, text):
        return [(int(text[-1]) * 3 + step) % VOCAB for step in range(1, 9)]

    allowed.stateless = stateless
    return allowed


def row_wise(input_ids, scores):
    return scores.scatter(1, (input_ids[:, -1:] * 3 + torch.arange(0, VOCAB, 4)) % VOCAB, -INF)


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_look_at_many_nodes_take_functions_only(rule):
    model, inputs, draft = build("llama"), prompt(), sdt.ModelDrafter(build("llama", seed=1), num_tokens=3)
    options = {"do_sample": True, "max_new_tokens": 8}
    says_so = type("SaysSo", (Memory,), {"stateless": True, "process": staticmethod(row_wise)})
    with sdt.patched(model, drafter=draft, rule=rule, seed=0):
        for given, name, where in (
            ({"logits_processor": [Counting()]}, "Counting", "it"),
            ({"logits_processor": [row_wise]}, "row_wise", "it"),
            ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor", "its class"),
            ({"prefix_allowed_tokens_fn": prefix_function(1)}, "PrefixConstrainedLogitsProcessor", "the function"),
        ):
            message = f'with rule "{rule}".*got {name}, .*use rule="coupled".*set stateless = True on {where}'
            with pytest.raises(ValueError, match=message):
                model.generate(**inputs, **options, **given)
        model.generate(**inputs, **options, logits_processor=[says_so()])
        model.generate(**inputs, **options, prefix_allowed_tokens_fn=prefix_function(True))
        model.generate(**inputs, **options, watermarking_config=WatermarkingConfig())


def test_a_processor_marked_stateless_is_called_for_single_rows(monkeypatch):
    monkeypatch.setattr(sdt.engine.generate, "Lockstep", None)
    monkeypatch.setattr(row_wise, "stateless", True, raising=False)
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for given in ({"logits_processor": [row_wise]}, {"prefix_allowed_tokens_fn": prefix_function(True)}):
        free = model.generate(**inputs, **{**options, "eos_token_id": NEVER}, **given).sequences
        plain = model.generate(**inputs, **options, **given, eos_token_id=[int(free[0, 12]), int(free[1, 17])])
        assert len(last_columns(plain.sequences)) > 1
        with sdt.patched(model, drafter=oracle(plain.sequences, tree=TREES["wide"])):
            ours = model.generate(**inputs, **options, **given, eos_token_id=[int(free[0, 12]), int(free[1, 17])])
        assert_same_output(model, ours, plain, inputs)


def test_a_nan_is_found_before_its_column_is_told():
    model, inputs, events = build("llama"), prompt(), Events((99, 99))

    def poison(input_ids, scores):
        if input_ids.shape[1] > 12:
            scores[1, 3] = float("nan")
        return scores

    with sdt.patched(model), pytest.raises(RuntimeError, match="NaN or inf in row 1"):
        model.generate(
            **inputs, do_sample=False, prompt_lookup_num_tokens=3, logits_processor=[poison], streamer=events
        )
    assert len(events.log) == 1 + 4  # the prompt, and columns 9 to 12


def test_lists_are_called_as_one():
    """A processor after a stateful one gets its scores."""
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": NEVER, "repetition_penalty": 1.3}
    texts = []
    for drafter in (None, lambda: oracle(texts[0], tree=TREES["wide"])):
        processors = LogitsProcessorList([Across(), Counting()])
        given = {**inputs, **options, "logits_processor": processors}
        texts.append(model.generate(**given) if drafter is None else speculative(model, drafter(), given)[0])
    assert torch.equal(*texts)
