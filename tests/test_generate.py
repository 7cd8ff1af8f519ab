"""Greedy texts in fp32: every token equals that of `model.generate(do_sample=False)`, and the arguments of `generate`
keep their meaning."""

import pytest
import torch
from transformers import EosTokenCriteria, MaxLengthCriteria

import specdec_triton as sdt
from families import EOS, FEW, NEVER, PAD, VOCAB, build, perturbed, prompt
from helpers import TREES, eos_in_mid_row, oracle


@pytest.mark.parametrize(
    ("family", "penalty"),
    [
        pytest.param(family, penalty, marks=[] if penalty > 1 or family == "llama" else pytest.mark.slow)
        for family in FEW
        for penalty in (1.0, 1.3)
    ],
)
def test_every_token_is_plain_generates(family, penalty):
    model, inputs = build(family), prompt()
    options = {"do_sample": False, "max_new_tokens": 24, "repetition_penalty": penalty}
    options["eos_token_id"] = eos_in_mid_row(model, inputs, **options)
    plain = model.generate(**inputs, **options)
    for name, tree in TREES.items():
        with sdt.patched(model, drafter=oracle(plain, tree=tree)):
            assert torch.equal(model.generate(**inputs, **options), plain), name
        assert sdt.stats(model).accepted > 0 and sdt.stats(model).lossless
    with sdt.patched(model):
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=4), plain)
        assert torch.equal(model.generate(**inputs, **options, assistant_model=perturbed(family)), plain)
        assert torch.equal(model.generate(**inputs, **options, assistant_model=build(family)), plain)
    for tree in (sdt.Topology.from_widths([2, 2, 1]), 16):
        with sdt.patched(model, drafter=sdt.ModelDrafter(build(family), tree=tree)):
            assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_batch_of_many_lengths(family):
    model, inputs = build(family), prompt(batch=5, length=12, padding=0)
    for row in range(5):
        inputs["attention_mask"][row, : 2 * row] = 0
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=30, eos_token_id=[EOS, 7, 9, 23])
    with sdt.patched(model, drafter=oracle(plain, tree=TREES["skipping"])):
        assert torch.equal(
            model.generate(**inputs, do_sample=False, max_new_tokens=30, eos_token_id=[EOS, 7, 9, 23]), plain
        )


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        pytest.param(family, batch, marks=[] if (place + batch) % 2 else pytest.mark.slow)
        for place, family in enumerate(FEW)
        for batch in (1, 2)
    ],
)
def test_rounds_without_a_draft(family, batch):
    """Without padding, the CPU runs transformers' own decoding step over the tree cache, alternating with trees."""
    model, inputs = build(family), prompt(batch=batch, padding=0)
    options = {"do_sample": False, "max_new_tokens": 24}
    plain = model.generate(**inputs, **options)
    for settings in ({}, {"impl": "reference"}, {"drafter": sdt.PromptLookupDrafter(num_tokens=3, max_ngram=1)}):
        ours = model.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(**settings))
        assert torch.equal(ours, plain), settings


def test_a_perfect_draft_takes_the_fewest_rounds():
    model, inputs = build("llama"), prompt()
    options = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options)
    for tree, rounds in ((sdt.Topology.chain(5), 4), (TREES["wide"], 6)):
        with sdt.patched(model, drafter=oracle(plain, error_rate=0.0, tree=tree)):
            assert torch.equal(model.generate(**inputs, **options), plain)
        stats = sdt.stats(model)
        assert stats.rounds == rounds and stats.emitted == 50
        assert stats.acceptance_length == pytest.approx(24 / rounds)


def test_a_draft_model_equal_to_the_target_is_always_accepted():
    """The draft's cache is correct after every round, with trees, compaction and catching up."""
    model, inputs = build("llama"), prompt()
    options = {"do_sample": False, "max_new_tokens": 31, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options)
    for tree, depth in ((sdt.Topology.chain(4), 4), (TREES["wide"], 3), (TREES["skipping"], None)):
        with sdt.patched(model, drafter=sdt.ModelDrafter(build("llama"), tree=tree)):
            assert torch.equal(model.generate(**inputs, **options), plain)
        stats = sdt.stats(model)
        if depth:
            assert stats.rounds == -(-30 // (depth + 1))
        else:
            assert stats.accepted == stats.row_rounds  # its most likely child is a leaf at depth 1


def test_a_finished_row_adds_no_rounds_and_keeps_its_text():
    model, inputs = build("llama"), prompt()
    free = model.generate(**inputs, do_sample=False, max_new_tokens=30, eos_token_id=NEVER)
    first_row = free[0, 9:].tolist()
    eos = next(token for token in first_row[2:10] if token not in free[1].tolist())
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": eos}
    plain = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=oracle(plain, 0.0, tree=sdt.Topology.chain(1))):
        assert torch.equal(model.generate(**inputs, **options), plain)
    alone = {name: tensor[1:] for name, tensor in inputs.items()}
    both = sdt.stats(model)
    with sdt.patched(model, drafter=oracle(plain[1:], 0.0, tree=sdt.Topology.chain(1))):
        model.generate(**alone, **options)
    assert both.rounds == sdt.stats(model).rounds
    assert both.row_rounds < 2 * both.rounds


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_short_outputs(max_new_tokens):
    model, inputs = build("llama"), prompt(batch=3, length=4, padding=3)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens}
    plain = model.generate(**inputs, **options)
    for drafter in (oracle(plain, 0.0), sdt.PromptLookupDrafter(), sdt.ModelDrafter(build("llama"))):
        with sdt.patched(model, drafter=drafter):
            assert torch.equal(model.generate(**inputs, **options), plain)


def test_a_long_output_grows_the_cache(monkeypatch):
    monkeypatch.setattr(sdt.engine.generate, "FIRST_RESERVE", 16)
    monkeypatch.setattr(sdt.forward.cache, "BUCKET", 16)
    capacities, allocate = [], sdt.TreeCache._allocate

    def spy(cache, capacity, like):
        capacities.append(capacity)
        allocate(cache, capacity, like)

    monkeypatch.setattr(sdt.TreeCache, "_allocate", spy)
    model, inputs = build("llama"), prompt(batch=2, length=5, padding=2)
    options = {"do_sample": False, "max_new_tokens": 150, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options)
    for drafter, caches in (
        (oracle(plain, 0.02, tree=sdt.Topology.chain(20)), 1),
        (sdt.ModelDrafter(build("llama"), num_tokens=30), 2),
    ):
        capacities.clear()
        with sdt.patched(model, drafter=drafter):
            assert torch.equal(model.generate(**inputs, **options), plain)
        assert len(capacities) > 2 * caches and max(capacities) >= 155


def test_min_new_tokens_and_bad_words():
    model, inputs = build("llama"), prompt()
    free = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=NEVER)
    options = {
        "do_sample": False,
        "max_new_tokens": 20,
        "min_new_tokens": 6,
        "eos_token_id": int(free[0, 11]),
        "bad_words_ids": [[int(free[1, 12])], [int(free[0, 10]), int(free[0, 11])]],
        "no_repeat_ngram_size": 2,
    }
    plain = model.generate(**inputs, **options)
    for drafter in (oracle(plain, tree=TREES["wide"]), sdt.PromptLookupDrafter()):
        with sdt.patched(model, drafter=drafter):
            assert torch.equal(model.generate(**inputs, **options), plain)


def test_a_processor_sees_each_nodes_own_path_at_its_own_row():
    """The processor forbids tokens that depend on the row and all earlier tokens, so a wrong text would change the
    result."""

    def forbid(input_ids, scores):
        rows = torch.arange(len(input_ids))
        banned = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(1) + 7 * rows
        return scores.scatter(1, (banned[:, None] + torch.arange(0, VOCAB, 6)) % VOCAB, float("-inf"))

    forbid.stateless = True
    model, inputs = build("llama"), prompt(batch=3)
    options = {"do_sample": False, "max_new_tokens": 20, "logits_processor": [forbid]}
    plain = model.generate(**inputs, **options)
    assert not torch.equal(plain, model.generate(**inputs, do_sample=False, max_new_tokens=20))
    with sdt.patched(model, drafter=oracle(plain, tree=TREES["wide"])):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert sdt.stats(model).acceptance_length > 1.5


def test_processors_are_called_as_plain_generate_calls_them():
    """With one row, the processors get the same calls, in the same order and with the same texts."""
    model, inputs, texts = build("llama"), prompt(batch=1), []

    def spy(input_ids, scores):
        texts[-1].append(input_ids.tolist())
        return scores.index_fill(1, input_ids[0, -1:], float("-inf"))

    options = {"do_sample": False, "max_new_tokens": 20, "logits_processor": [spy]}
    options["eos_token_id"] = int(
        model.generate(**inputs, do_sample=False, eos_token_id=NEVER, max_new_tokens=15)[0, -1]
    )
    texts.append([])
    plain = model.generate(**inputs, **options)
    texts.append([])
    with sdt.patched(model, drafter=oracle(plain, 0.2, tree=TREES["wide"])):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert texts[0] == texts[1]


def test_a_grammar_by_row():
    """Each row may only write its own sentence. transformers raises an exception for any other text."""
    model, inputs = build("llama"), prompt(batch=3, length=5, padding=2)
    sentences = [[5, 6, 7, 5, 6, 8, EOS], [9, 10, EOS], [11, 12, 11, 12, 11, 12, 11, 13, 14, EOS]]

    def allowed(row, ids):
        written = ids[5:].tolist()
        if EOS in written or PAD in written:
            return [PAD]
        return [sentences[row][len(written)]] if written == sentences[row][: len(written)] else []

    options = {"do_sample": False, "max_new_tokens": 12, "prefix_allowed_tokens_fn": allowed}
    plain = model.generate(**inputs, **options)
    assert plain[2, 5:].tolist() == sentences[2]
    wrong = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    for text in (plain, torch.where(torch.rand(3, 15) < 0.5, plain, wrong[:, :1])):
        with sdt.patched(model, drafter=oracle(text, 0.3, tree=TREES["wide"])):
            assert torch.equal(model.generate(**inputs, **options), plain)
    with sdt.patched(model):
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=4), plain)


def test_a_criterion_of_the_callers_replaces_the_default():
    model, inputs = build("llama"), prompt()
    text = model.generate(**inputs, do_sample=False, max_new_tokens=20, eos_token_id=NEVER)
    first, second = int(text[0, 13]), int(text[0, 18])
    for criterion in (MaxLengthCriteria(25), MaxLengthCriteria(11), EosTokenCriteria(second)):
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": first, "stopping_criteria": [criterion]}
        plain = model.generate(**inputs, **options)
        with sdt.patched(model, drafter=oracle(text)):
            assert torch.equal(model.generate(**inputs, **options), plain)


def test_prompts_of_other_integers():
    model, inputs = build("llama"), prompt()
    inputs["input_ids"] = inputs["input_ids"].int()
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    with sdt.patched(model):
        assert torch.equal(
            model.generate(**inputs, do_sample=False, max_new_tokens=8, prompt_lookup_num_tokens=3), plain
        )


def test_the_returned_cache_continues_the_text():
    model, inputs = build("llama"), prompt(batch=1)
    options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options, max_new_tokens=30)
    with sdt.patched(model, drafter=oracle(plain.sequences)):
        part = model.generate(**inputs, **options, max_new_tokens=12)
    assert part.past_key_values.get_seq_length() == part.sequences.shape[1] - 1
    rest = model.generate(part.sequences, **options, max_new_tokens=18, past_key_values=part.past_key_values)
    assert torch.equal(rest.sequences, plain.sequences)


def test_custom_generate():
    model, inputs = build("llama"), prompt()
    options = {"do_sample": False, "max_new_tokens": 20}
    plain = model.generate(**inputs, **options)
    ours = model.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(drafter=oracle(plain)))
    assert torch.equal(ours, plain) and sdt.stats(model).acceptance_length > 1
    ours = model.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate())
    assert torch.equal(ours, plain) and sdt.stats(model).acceptance_length == 1 and sdt.stats(model).drafted == 0


def test_stop_strings(tmp_path):
    import tiny

    model, tokenizer = tiny.model(), tiny.tokenizer()
    inputs = tokenizer("abc", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    pieces = [tokenizer.decode(plain[0, at : at + 1]) for at in range(plain.shape[1])]
    stop = next(piece for at, piece in enumerate(pieces) if at > 12 and piece.isascii() and piece.isalpha())
    options = {"do_sample": False, "max_new_tokens": 40, "stop_strings": [stop], "tokenizer": tokenizer}
    stopped = model.generate(**inputs, **options)
    assert stopped.shape[1] < plain.shape[1]
    with sdt.patched(model, drafter=oracle(plain, 0.0, tree=sdt.Topology.chain(7))):
        assert torch.equal(model.generate(**inputs, **options), stopped)


def test_a_nan_is_an_error_that_names_the_row():
    model, inputs = build("llama"), prompt()

    def poison(input_ids, scores):
        if input_ids.shape[1] > 12:
            scores[1, 3] = float("nan")
        return scores

    with (
        sdt.patched(model),
        pytest.raises(RuntimeError, match=r"accept_greedy: logits of LlamaForCausalLM.*NaN or inf in row 1"),
    ):
        model.generate(**inputs, do_sample=False, prompt_lookup_num_tokens=3, logits_processor=[poison])


def test_a_nan_where_the_target_does_not_go_is_not_an_error():
    model, inputs = build("llama"), prompt(batch=1)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=NEVER)
    never = next(token for token in range(3, VOCAB) if token not in plain[0].tolist())
    with torch.no_grad():
        model.lm_head.weight[PAD] = float("nan")  # would be every logit of the pad token, which is masked below

    def mend(input_ids, scores):
        return scores.nan_to_num(-100.0)

    wrong = plain.clone()
    wrong[:, 12] = never
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": NEVER, "logits_processor": [mend]}
    with sdt.patched(model, drafter=oracle(wrong, 0.0)):
        assert torch.equal(model.generate(**inputs, **options), plain)


def test_the_models_last_position_is_never_passed():
    model = build("llama", max_position_embeddings=32)
    fed = []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    inputs = prompt(batch=1)
    plain = model.generate(**inputs, do_sample=False, max_length=32, eos_token_id=NEVER)
    with sdt.patched(model, drafter=oracle(plain, tree=sdt.Topology.chain(8))):
        ours = model.generate(**inputs, do_sample=False, max_length=32, eos_token_id=NEVER)
    assert torch.equal(ours, plain) and max(fed) < 32


def test_bf16_emits_the_targets_choice_up_to_a_near_tie():
    """In bf16, every token is the best one by logits that are as close to fp32 logits (teacher-forced) as those of
    plain bf16.

    The fp32 logit of an emitted token is then below the best one by at most the rounding error of bf16. That error is
    measured on the text of plain `generate`.
    """
    model, inputs = build("llama").bfloat16(), prompt()
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": NEVER}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=oracle(plain.sequences, tree=TREES["wide"])):
        ours = model.generate(**inputs, **options)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 30, dtype=torch.int64)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.float()
    errors = []
    for output in (plain, ours):
        logits = torch.stack(output.logits, 1).float()
        assert torch.equal(logits.argmax(-1), output.sequences[:, 9:])
        with torch.no_grad():
            wanted = model(output.sequences, attention_mask=mask, position_ids=positions).logits[:, 8:-1]
        errors.append((logits - wanted).square().mean(-1).sqrt())  # at each position
    null, found = errors
    assert found.square().mean() < 1.5**2 * null.square().mean() and found.max() < 3 * null.max()


def test_chunked_prefill():
    model, inputs = build("gemma3"), prompt(length=11)
    options = {"do_sample": False, "max_new_tokens": 12, "prefill_chunk_size": 4}
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    with sdt.patched(model, drafter=oracle(plain)):
        assert torch.equal(model.generate(**inputs, **options), plain)
