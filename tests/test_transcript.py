"""Criteria, streamers and scores: what `generate` accepts is asked, fed and filled as plain decoding does it."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import specdec_triton as sdt
from families import EOS, NEVER, PAD, build, prompt
from test_generate import TREES, eos_in_mid_row, oracle


class Recorder(StoppingCriteria):
    """Stops each row at its own column; remembers every call."""

    def __init__(self, stops):
        self.stops, self.calls = torch.tensor(stops), []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.tolist(), None if scores is None else len(scores)))
        return input_ids.shape[1] >= self.stops


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("stops", [(12, 20, 17), (10, 99, 11), (16, 16, 16)])
def test_criteria_are_asked_as_plain_generate_asks_them(stops, eos, monkeypatch):
    monkeypatch.setattr(sdt.cache, "BUCKET", 1)  # no slot to spare: a row that ran past its stop needs its own
    model, inputs = build("llama", eos_token_id=eos), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD}
    plain_calls, our_calls = Recorder(stops), Recorder(stops)
    plain = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([plain_calls]))
    text = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=oracle(text, tree=sdt.Topology.chain(3))):
        ours = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([our_calls]))
    assert torch.equal(ours, plain)
    assert our_calls.calls == plain_calls.calls


def test_criteria_get_the_scores_and_a_stopped_row_has_none():
    model, inputs, stops = build("llama"), prompt(), (12, 20)
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": NEVER, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain_calls, our_calls = Recorder(stops), Recorder(stops)
    plain = model.generate(**inputs, **options, stopping_criteria=[plain_calls])
    with sdt.patched(model, drafter=oracle(plain.sequences, 0.0, tree=sdt.Topology.chain(5))):
        ours = model.generate(**inputs, **options, stopping_criteria=[our_calls])
    assert torch.equal(ours.sequences, plain.sequences) and our_calls.calls == plain_calls.calls
    assert [scores[0].isneginf().all().item() for scores in ours.scores] == [False] * 3 + [True] * 8
    assert not any(scores[1].isneginf().any() for scores in ours.scores)


class Collector(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("batch", [1, 2])
def test_a_streamer_gets_what_plain_generate_gives_it(batch):
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


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_scores_and_logits(penalty):
    model, inputs = build("llama"), prompt()
    options = {
        "do_sample": False,
        "max_new_tokens": 20,
        "repetition_penalty": penalty,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    options["eos_token_id"] = eos_in_mid_row(model, inputs, max_new_tokens=20, repetition_penalty=penalty)
    plain = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=oracle(plain.sequences, tree=TREES["wide"])):
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    ended = [
        9 + next((i + 1 for i, t in enumerate(row[9:].tolist()) if t in options["eos_token_id"]), 99)
        for row in plain.sequences
    ]
    assert min(ended) < plain.sequences.shape[1]
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name])
        for step, (got, wanted) in enumerate(zip(ours[name], plain[name], strict=True)):
            for row in range(2):
                if 9 + step < ended[row]:
                    torch.testing.assert_close(got[row], wanted[row], rtol=1e-3, atol=1e-4)
                else:
                    assert got[row].isneginf().all()
