"""Tries each model type of transformers, built tiny, and finds out which ones keep plain `generate`'s text.

Each class is tried in its own process, so that a crash or an endless loop does not end the walk. Plain `generate` gives
the text, and three drafters must reproduce it: prompt lookup, an oracle that is right half of the time (a tree with
branches), and a draft model, which is the class itself with noise on its weights. The oracle is tried with and without
fused layers, the draft model with them. Greedy, in fp32, on a CPU.
"""

import copy
import inspect
import multiprocessing
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import specdec_triton as sdt

from .shrink import PAD, WORDS, tiny_config

MAPPINGS = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING", "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"}
EXACT, REFUSED, WRONG, CRASH = "exact", "refused in patch", "wrong", "crash"
# refused after `patch` accepted the model; plain `generate` does not run
LATE, NOT_BUILT = "refused after patch", "not built"
FAULTS = (WRONG, CRASH, LATE)

PROMPT, PADDING, NEW_TOKENS = 9, 3, 16  # together longer than every window and chunk of a tiny config
NEVER = 10_000  # an end-of-text token that no tiny model emits
SEEDS = 5  # of weights that are tried until a text is varied and has no near tie
MIN_WORDS, MIN_MARGIN = 6, 1e-3  # distinct words of a text; least margin of a choice, as a share of the logits' spread
TREE = sdt.Topology.from_widths([2, 2])
NOISE, TRIES = 0.1, 6  # first noise of the draft's weights; tries until some drafts are right and some are wrong
TYPE_IDS = ("token_type_ids", "mm_token_type_ids")  # processors add them to every text: zeros if it has no images
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": NEVER, "pad_token_id": PAD}
TIME_LIMIT_S, NICENESS = 120.0, 5


PACKAGE = Path(__file__).resolve().parent.parent


class Kind(NamedTuple):
    """A model type, its class in a mapping, and the mapping's name in `MAPPINGS`."""

    model_type: str
    model: str
    mapping: str


class Outcome(NamedTuple):
    """One of the outcomes above, and the reason, which is empty for `EXACT`."""

    word: str
    reason: str = ""


def kinds(mapping: str = "all", having: str = "") -> list[Kind]:
    """The model types of a mapping ("causal", "image-text" or "all") of the installed transformers. With `having`, only
    those with this text in the name of the type or the class."""
    found = []
    for name in MAPPINGS if mapping == "all" else [mapping]:
        classes = getattr(modeling_auto, MAPPINGS[name])._model_mapping
        found += [Kind(kind, model, name) for kind, model in classes.items()]
    return [kind for kind in found if having.lower() in f"{kind.model_type} {kind.model}".lower()]


def build(kind: Kind, seed: int = 0) -> PreTrainedModel:
    """A tiny model with large weights: its greedy text is varied and depends on every input of a layer."""
    model_class, config = getattr(transformers, kind.model), tiny_config(CONFIG_MAPPING[kind.model_type])
    if not isinstance(config, model_class.config_class):
        # the model's own config is a part of the mapping's
        config = next((part for part in vars(config).values() if isinstance(part, model_class.config_class)), config)
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5, generator=generator)
        head = model.get_output_embeddings()
        if isinstance(head, torch.nn.Linear):
            head.weight[WORDS:] = 0  # a text without images has no image tokens
    return model


def check(
    model_of_seed: Callable[[int], PreTrainedModel],
    images: bool = False,
    stage: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Try one model.

    Args:
        model_of_seed: makes the model with weights of a seed.
        images: the model takes images; it is also tried with the inputs that its processor adds to a text without them.
        stage: called with the name of each stage as it begins: "build", "plain" or "speculate".
    """
    stage("build")
    try:
        model = model_of_seed(0)
    except Exception as error:
        return Outcome(NOT_BUILT, _short(error))
    try:
        with sdt.patched(model):
            pass
    except ValueError as error:
        return Outcome(REFUSED, _refusal(error))
    stage("plain")
    try:
        model, calls = _with_a_good_text(model, model_of_seed, images)
    except Exception as error:
        return Outcome(NOT_BUILT, f"plain generate: {_short(error)}")
    stage("speculate")
    try:
        return _speculate(model, calls)
    except Exception as error:
        ours = isinstance(error, ValueError) and str(PACKAGE) in traceback.extract_tb(error.__traceback__)[-1].filename
        return Outcome(LATE, str(error)) if ours else Outcome(CRASH, f"{_short(error)} ({_location(error)})")


class Call(NamedTuple):
    """Inputs, and the text of plain `generate` for them."""

    inputs: dict[str, torch.Tensor]
    text: torch.Tensor
    words: int  # distinct ones of the new text, in the sequence with the fewest
    margin: float  # the least of a greedy choice, as a share of the logits' spread


def _with_a_good_text(
    model: PreTrainedModel, model_of_seed: Callable[[int], PreTrainedModel], images: bool
) -> tuple[PreTrainedModel, list[Call]]:
    """The model of the first seed whose texts are varied and have no near tie, or of the best seed; and its texts."""
    batch = padded_prompt()
    single = {name: tensor[1:] for name, tensor in batch.items()}
    tried = []
    for seed in range(SEEDS):
        model = model_of_seed(seed) if seed else model
        calls = [_plain(model, batch), _plain(model, single)]
        tried.append((min(call.words for call in calls), min(call.margin for call in calls), seed, model, calls))
        if tried[-1][0] >= MIN_WORDS and tried[-1][1] >= MIN_MARGIN:
            break
    else:
        tried.sort(key=lambda found: (found[1] >= MIN_MARGIN, *found[:3]))
    *_, model, calls = tried[-1]
    added = set(TYPE_IDS) & set(inspect.signature(model.forward).parameters) if images else ()
    for name in sorted(added):
        call = _plain(model, batch | {name: torch.zeros_like(batch["input_ids"])})
        # in some models zeros are a token type that changes the text
        calls += [call] if torch.equal(call.text, calls[0].text) else []
    return model, calls


def padded_prompt(batch: int = 2) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of random words; every row but the last is padded on the left."""
    ids = torch.randint(3, WORDS, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:-1, :PADDING], ids[:-1, :PADDING] = 0, PAD
    return {"input_ids": ids, "attention_mask": mask}


def _plain(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Call:
    output = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(output.logits)
    if not logits.isfinite().any(-1).all():
        raise ValueError("logits are not finite")
    best = logits.topk(2).values
    margin = ((best[..., 0] - best[..., 1]) / logits.std(-1)).min()
    words = min(len(set(row.tolist())) for row in output.sequences[:, -NEW_TOKENS:])
    return Call(inputs, output.sequences, words, float(margin))


def _speculate(model: PreTrainedModel, calls: list[Call]) -> Outcome:
    for call in calls:
        found = _with(model, call, sdt.OracleDrafter(call.text, 0.5, tree=TREE))
        if found:
            return found
    batch = calls[0]
    found = _with(model, batch, sdt.OracleDrafter(batch.text, 0.5, tree=TREE), fuse=True)
    if found:
        return found
    found = _with(model, batch, sdt.PromptLookupDrafter(max_ngram=1), must_draft=False)
    if found:
        return found
    noise = NOISE
    for _ in range(TRIES):
        drafter = sdt.ModelDrafter(noisy(model, noise), tree=TREE)
        found = _with(model, batch, drafter, fuse=True)
        if found is None or found.word != NOT_BUILT:
            break
        noise *= 3 if sdt.stats(model).accepted else 1 / 3
    return found or Outcome(EXACT)


def _with(
    model: PreTrainedModel, call: Call, drafter: sdt.Drafter, must_draft: bool = True, fuse: bool = False
) -> Outcome | None:
    """The fault of a call with this drafter. None: the text is plain's; some drafts were accepted and some rejected."""
    name = f"{type(drafter).__name__}{', fused layers' if fuse else ''}"
    with sdt.patched(model, drafter=drafter, fuse=fuse):
        text = model.generate(**call.inputs, **GREEDY)
    if not torch.equal(text, call.text):
        if not torch.equal(_plain(model, call.inputs).text, call.text):
            return Outcome(NOT_BUILT, "plain generate: another text each time")
        columns = (text != call.text).any(0).nonzero() if text.shape == call.text.shape else []
        place = f"from new token {int(columns[0]) - PROMPT} on" if len(columns) else f"{list(text.shape)}"
        added = sorted(set(call.inputs) - {"input_ids", "attention_mask"})
        return Outcome(WRONG, f"{name}, {len(text)} rows{', '.join(['', *added])}: {place}")
    stats = sdt.stats(model)
    if must_draft and not 0 < stats.accepted < drafter.tree.max_depth * stats.row_rounds:
        return Outcome(NOT_BUILT, f"no check: of {name}'s drafts all or none were accepted")
    return None


def noisy(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """A copy with noise on its weights, a share of their spread: a draft that is sometimes right."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                spread = noise * float(parameter.std(correction=0))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    return draft


def _short(error: Exception) -> str:
    line = (str(error).strip() or "no message").splitlines()
    # the second line of a validation error has the reason
    return f"{type(error).__name__}: {' '.join(part.strip() for part in line[:2])}"[:160]


def _location(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _refusal(error: Exception) -> str:
    found = re.search(r" must (.*?), got ", str(error))
    return found.group(1) if found else str(error)


def _child(kind: Kind, pipe: Connection) -> None:
    os.nice(NICENESS)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcome = check(
        lambda seed: build(kind, seed), kind.mapping == "image-text", lambda stage: pipe.send((stage, None))
    )
    pipe.send(("end", outcome))


def try_apart(kind: Kind, context: BaseContext, limit_s: float = TIME_LIMIT_S) -> Outcome:
    """`check` in a separate process, which may crash or take too long."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, theirs), daemon=True)
    process.start()
    theirs.close()
    stage, end = "build", time.monotonic() + limit_s
    try:
        while ours.poll(max(end - time.monotonic(), 0)):
            stage, outcome = ours.recv()
            if outcome:
                return outcome
        reason = f"did not end in {limit_s:.0f} s"
    except EOFError:
        process.join()
        reason = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Outcome(CRASH, reason) if stage == "speculate" else Outcome(NOT_BUILT, f"{stage}: {reason}")


def _context() -> BaseContext:
    """A context that forks this process, after it imported and ran everything that a check needs."""
    torch.set_num_threads(1)  # a fork has no other threads and would wait for them
    check(lambda seed: build(Kind("llama", "LlamaForCausalLM", "causal"), seed))
    return multiprocessing.get_context("fork")


def walk(todo: Iterable[Kind]) -> Iterator[tuple[Kind, Outcome]]:
    """Each kind and its outcome, as soon as it is known. A class that is in both mappings of a type is tried once."""
    todo, context = list(todo), _context()
    images = {kind[:2] for kind in todo if kind.mapping == "image-text"}
    known: dict[tuple[str, str], Outcome] = {}
    for kind in todo:
        if kind[:2] not in known:
            with_images = kind._replace(mapping="image-text") if kind[:2] in images else kind
            known[kind[:2]] = try_apart(with_images, context)
        yield kind, known[kind[:2]]
