"""Criteria, streamers and scores: they get the same calls and values as in plain decoding."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import specdec_triton as sdt
from families import EOS, NEVER, PAD, build, prompt
from helpers import TREES, assert_same_output, drafter_of, last_columns, oracle, prepared_processors, speculative
from specdec_triton.engine import graph_runner, output

INF = float("inf")


class Recorder(StoppingCriteria):
    """A criterion that stops each row at its own column and remembers every call."""

    def __init__(self, stops):
        self.stops, self.calls = torch.tensor(stops), []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.tolist(), None if scores is None else len(scores)))
        self.scores = scores
        return input_ids.shape[1] >= self.stops


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("stops", [(12, 20, 17), (10, 99, 11), (16, 16, 16)])
def test_criteria_are_called_as_in_plain_generate(stops, eos, monkeypatch):
    monkeypatch.setattr(sdt.forward.cache, "BUCKET", 1)  # no spare slot for a row that ran past its stop
    model, inputs = build("llama", eos_token_id=eos), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD}
    plain_calls, our_calls = Recorder(stops), Recorder(stops)
    plain = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([plain_calls]))
    text = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=oracle(text, tree=sdt.Topology.chain(3))):
        ours = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([our_calls]))
    assert torch.equal(ours, plain)
    assert our_calls.calls == plain_calls.calls


class Aside:
    """Replaces the context in which criteria run."""

    inside = False

    def __enter__(self):
        Aside.inside = True

    def __exit__(self, *error):
        Aside.inside = False


def test_criteria_copy_each_token_to_the_device_once_and_wait_for_no_round(monkeypatch):
    model, inputs, copied, asked = build("llama"), prompt(batch=3), [], []
    from_numpy = torch.from_numpy

    def copying(array):
        if Aside.inside:
            copied.append(array.size)
        return from_numpy(array)

    def criterion(input_ids, scores, **kwargs):
        assert Aside.inside and input_ids.is_contiguous()
        asked.append(input_ids)
        input_ids[:] = -1  # a copy of its own
        return torch.zeros(3, dtype=torch.bool)

    monkeypatch.setattr(output.Output, "_aside", lambda self: Aside())
    monkeypatch.setattr(torch, "from_numpy", copying)
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options)
    stopping = StoppingCriteriaList([criterion])
    text, _ = speculative(model, drafter_of("oracle", plain), {**inputs, **options, "stopping_criteria": stopping})
    assert torch.equal(text, plain) and len(asked) == 30
    assert copied == [3 * (inputs["input_ids"].shape[1] + 1), *[3] * 29]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stops", [(12, 20), (10, 60), (31, 12)])
def test_criteria_get_the_scores_of_all_rows(stops, lag, monkeypatch):
    """At each column, criteria get the scores of finished rows, too, however long ago they ended."""
    monkeypatch.setitem(graph_runner.LAG, "cpu", lag)
    monkeypatch.setattr(sdt.forward.cache, "BUCKET", 1)
    monkeypatch.setattr(output, "AHEAD", 3)
    model, inputs = build("llama"), prompt()
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": NEVER, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.2}

    class Judge(Recorder):
        """A criterion that ends a row by its scores, so that the scores decide the text."""

        def __call__(self, input_ids, scores, **kwargs):
            flagged = super().__call__(input_ids, scores)
            high = torch.stack(scores)[:, :, 7].sum(0)
            return flagged | (high.flip(0) > 25)  # by the scores of the other row

    calls, our_calls = Judge(stops), Judge(stops)
    plain = model.generate(**inputs, **options, stopping_criteria=[calls])
    for drafter in (oracle(plain.sequences, 0.1, tree=TREES["wide"]), sdt.PromptLookupDrafter(branches=2)):
        our_calls = Judge(stops)
        with sdt.patched(model, drafter=drafter):
            ours = model.generate(**inputs, **options, stopping_criteria=[our_calls])
        assert torch.equal(ours.sequences, plain.sequences) and our_calls.calls == calls.calls
        torch.testing.assert_close(our_calls.scores, calls.scores, rtol=1e-3, atol=1e-3)
        assert_same_output(model, ours, plain, inputs)


class Collector(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("batch", [1, 2])
def test_a_streamer_gets_the_tokens_of_plain_generate(batch):
    model, inputs = build("llama"), prompt(batch=batch)
    options = {"do_sample": False, "max_new_tokens": 15, "eos_token_id": EOS}
    theirs, ours = Collector(), Collector()
    plain = model.generate(**inputs, **options, streamer=theirs)
    with sdt.patched(model, drafter=oracle(plain)):
        model.generate(**inputs, **options, streamer=ours)
    assert ours.puts == theirs.puts and ours.ended


def test_tokens_are_streamed_as_they_are_accepted():
    model, inputs = build("llama"), prompt(batch=1)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    rounds = []

    class Clock(BaseStreamer):
        def put(self, value):
            rounds.append(sdt.stats(model).rounds if sdt.stats(model) is not before else -1)

        def end(self):
            pass

    with sdt.patched(model, drafter=oracle(plain, 0.0, tree=sdt.Topology.chain(4))):
        model.generate(**inputs, do_sample=False, max_new_tokens=20)
        before = sdt.stats(model)
        model.generate(**inputs, do_sample=False, max_new_tokens=20, streamer=Clock())
    assert rounds[:7] == [-1, 0, 1, 1, 1, 1, 1]  # the prompt, its first token, then five tokens of one round


PENALTIES = {
    "none": {},
    "device": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "cut": {"begin_suppress_tokens": [11, 12], "renormalize_logits": True},
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("lag", "padding"), [(0, 3), (1, 0)])
def test_scores_logits_and_cache_of_all_rows(lag, penalty, padding, monkeypatch):
    monkeypatch.setitem(graph_runner.LAG, "cpu", lag)
    monkeypatch.setattr(sdt.forward.cache, "BUCKET", 1)  # no spare slot
    model, inputs = build("llama"), prompt(batch=3, padding=padding)
    options = {"do_sample": False, "max_new_tokens": 26, "return_dict_in_generate": True, **PENALTIES[penalty]}
    options |= {"output_scores": True, "output_logits": True, "pad_token_id": PAD}
    free = model.generate(**inputs, **options, eos_token_id=NEVER).sequences
    options["eos_token_id"] = [int(free[0, 12]), int(free[2, 20])]
    plain = model.generate(**inputs, **options)
    assert len(last_columns(plain.sequences)) > 1
    names = ("none", "model", "tree", "dynamic", "lookup", "oracle", "early")
    for name in names if penalty == "none" else names[-2:-1]:
        ours, _ = speculative(model, drafter_of(name, plain.sequences), {**inputs, **options})
        assert_same_output(model, ours, plain, inputs)
    options |= {"output_scores": False, "output_logits": False}
    ours, _ = speculative(model, drafter_of("oracle", plain.sequences), {**inputs, **options})
    assert_same_output(model, ours, model.generate(**inputs, **options), inputs)


@pytest.mark.parametrize(("family", "ended"), [("llama4", 10), ("gpt_oss", 60)])
def test_more_columns_after_the_end_than_one_forward_takes(family, ended, monkeypatch):
    """With windows, chunks and sinks. One row continues for long."""
    monkeypatch.setattr(sdt.engine.finished_rows, "CHUNK", 16)
    model, inputs = build(family), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 70, "return_dict_in_generate": True, "output_scores": True}
    options |= {"eos_token_id": NEVER, "pad_token_id": PAD}
    stops = {"stopping_criteria": [Recorder((12, ended, 79))]}
    plain = model.generate(**inputs, **options, **stops)
    with sdt.patched(model, drafter=oracle(plain.sequences, tree=TREES["wide"])):
        ours = model.generate(**inputs, **options, **stops)
    torch.testing.assert_close(ours.scores, plain.scores, rtol=1e-3, atol=1e-3)
    assert torch.equal(ours.sequences, plain.sequences)


@pytest.mark.parametrize("rule", ["coupled", "block", "multi_round"])
def test_sampled_scores_of_all_rows(rule):
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": True, "max_new_tokens": 30, "return_dict_in_generate": True, "top_k": 9, "min_p": 0.01}
    options |= {"output_scores": True, "output_logits": True, "pad_token_id": PAD, "eos_token_id": list(range(3, 9))}
    with sdt.patched(model, drafter=sdt.ModelDrafter(build("llama", seed=1), num_tokens=3), rule=rule, seed=2):
        ours = model.generate(**inputs, **options)
    assert len(last_columns(ours.sequences)) > 1
    wanted = teacher_forced(model, inputs, ours, options)
    torch.testing.assert_close(ours.logits, wanted.logits, rtol=1e-3, atol=1e-3)
    for got, scores in zip(ours.scores, wanted.scores, strict=True):
        torch.testing.assert_close(got, scores, rtol=1e-3, atol=1e-3)


def teacher_forced(model, inputs, ours, options):
    """Plain `generate`, forced to emit the given text."""

    def force(input_ids, scores):
        token = ours.sequences[:, input_ids.shape[1]]
        return torch.full_like(scores, -INF).scatter(1, token[:, None], 0.0)

    options = {**options, "do_sample": False, "logits_processor": [force], "output_scores": False}
    forced = model.generate(**inputs, **options)
    assert torch.equal(forced.sequences, ours.sequences)
    warpers = prepared_processors(model, inputs, {**options, "do_sample": True, "logits_processor": None})
    forced.scores = tuple(warpers(None, logits.clone()) for logits in forced.logits)
    return forced


def test_without_anything_kept_rows_that_ended_cost_nothing(monkeypatch):
    """No additional forwards and reads."""
    monkeypatch.setattr(sdt.engine.finished_rows.FinishedRows, "run", None)
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD}
    free = model.generate(**inputs, **options, eos_token_id=NEVER)
    options["eos_token_id"] = [int(free[0, 12]), int(free[2, 17])]
    plain = model.generate(**inputs, **options)
    assert len(last_columns(plain)) > 1
    with sdt.patched(model, drafter=oracle(plain)):
        assert torch.equal(model.generate(**inputs, **options), plain)


def test_an_end_while_a_processor_raises():
    """A row ended in the same round, and the criterion that ends the call sees its scores after the end."""
    model, inputs = build("llama"), prompt(padding=0)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    text = model.generate(**inputs, **options, eos_token_id=NEVER).sequences
    eos = int(text[0, 15])
    assert eos not in text[0, 9:15].tolist() + text[1, 9:17].tolist()
    outputs, calls, raised = [], [], []

    def guarded(input_ids, scores):
        if input_ids.shape[1] > limit and not raised:
            raised.append(True)
            raise ValueError("too long")
        return scores

    guarded.stateless = True
    for drafter in (None, oracle(text, 0.0, tree=TREES["wide"])):
        limit = 16 if drafter else 99
        recorder = Recorder((99, 17))
        given = {**inputs, **options, "eos_token_id": eos, "logits_processor": [guarded]}
        given["stopping_criteria"] = [recorder]
        outputs.append(speculative(model, drafter, given)[0] if drafter else model.generate(**given))
        calls.append(recorder)
    assert raised and outputs[0].sequences.shape[1] == 17 and calls[0].calls == calls[1].calls
    assert_same_output(model, *outputs[::-1], inputs)
