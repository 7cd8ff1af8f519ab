"""README, docs and the other pages: links lead somewhere, snippets run, commands parse, words are plain, and few."""

import ast
import collections
import io
import re
import shlex
import subprocess
import tokenize
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import specdec_triton as sdt
import tiny
from checkpoints import write_head
from specdec_triton._patch import SpeculativeModel
from specdec_triton.heads import checkpoint
from specdec_triton.tools import cli

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = [ROOT / path for path in TRACKED if path.endswith(".md") and not path.startswith("bench/results")]
GUIDES = [page for page in PAGES if page.parent.name == "docs" or page.name == "README.md"]
CODE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.S | re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
README_BYTES = 7 * 1024
# in 1,000 words of prose, over the whole repository
MOST = {"what": 1.0, "where": 1.5}
PER_WORDS = 1000

pytestmark = pytest.mark.skipif(not TRACKED, reason="not a git checkout")


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ +(.*)$", CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@named(PAGES)
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_in_the_sites_navigation():
    site = (ROOT / "mkdocs.yml").read_text()
    pages = {page.name for page in PAGES if page.parent.name == "docs"}
    assert pages == set(re.findall(r": (\w+\.md)$", site, re.M))


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


@pytest.fixture
def in_checkout(monkeypatch, tmp_path):
    """The current folder has links to all files of the checkout. Files that are written to it are elsewhere."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)


@pytest.fixture
def tiny_checkpoints(monkeypatch, tmp_path):
    """`from_pretrained` of the auto classes gives tiny models; the larger name's target is of another seed. The hub has
    a tiny head, and the models' folder an MTP layer."""
    write_head(tmp_path / "head", tiny.model(), "eagle1")
    (tmp_path / "model").mkdir()
    save_file(mtp_tensors(tiny.model()), tmp_path / "model" / "model.safetensors")
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, **options: tmp_path / "head")

    def model(name, **options):
        made = tiny.model(seed=int("0.5B" in name))
        made.generation_config.pad_token_id = tiny.END_ID
        made.config.name_or_path = str(tmp_path / "model")
        return made

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", staticmethod(model))

    def tokenizer(name, **options):
        made = tiny.tokenizer()
        made.padding_side = options.get("padding_side", "left")
        return made

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", staticmethod(tokenizer))


def mtp_tensors(model):
    """An MTP layer in Qwen's layout, with the model's first layer as its block."""
    size, block = model.config.hidden_size, model.model.layers[0].state_dict()
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    tensors = {f"mtp.{name}.weight": torch.ones(size) for name in norms}
    tensors["mtp.fc.weight"] = torch.eye(size, 2 * size)
    return tensors | {f"mtp.layers.0.{name}": tensor for name, tensor in block.items()}


def quickstart_names():
    """The names that the pages after the quickstart go on from."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("name", padding_side="left")
    model, draft = (transformers.AutoModelForCausalLM.from_pretrained(name) for name in ("target", "0.5B"))
    inputs = tokenizer(["def fibonacci(n):", "def is_prime(n):"], return_tensors="pt", padding=True)
    return {"sdt": sdt, "tokenizer": tokenizer, "model": model, "draft": draft, "inputs": dict(inputs)}


WITH_SNIPPETS = [page for page in PAGES if any(kind == "python" for kind, _ in CODE.findall(page.read_text()))]


@named(WITH_SNIPPETS)
def test_snippets_run(page, tiny_checkpoints, in_checkout, capsys):
    """One after the other, in one namespace."""
    names = quickstart_names()
    for kind, text in CODE.findall(page.read_text()):
        if kind == "python":
            exec(compile(text, str(page), "exec"), names)
    # a snippet must not leave the model patched for the reader's next lines
    assert not isinstance(names["model"], SpeculativeModel)


@named(GUIDES)
def test_commands_parse(page, in_checkout):
    """Each `specdec-triton` line is one that the command line takes, if the reader's files are there."""
    for name in ("conversation.txt", "utils.py", "answers.jsonl", "code.corpus"):
        Path(name).touch()
    for kind, text in CODE.findall(page.read_text()):
        for line in text.splitlines() if kind != "python" else ():
            if line.startswith("specdec-triton "):
                arguments = shlex.split(line, comments=True)[1:]
                parsed = cli._parser().parse_args(arguments)
                assert callable(parsed.run), line


def prose(path):
    """The words that a file says to a reader: a page's text, a module's docstrings and comments; no code."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return re.sub(r"`[^`]*`", " ", CODE.sub("", text))
    said = [
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    said += [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    return re.sub(r"`[^`]*`", " ", "\n".join(said))


def test_words_are_plain():
    """Sentences that begin or turn on "what" and "where" are those that readers stumble over."""
    counts = collections.Counter()
    for path in TRACKED:
        if (path.endswith(".py") or ROOT / path in PAGES) and not (ROOT / path).is_symlink():
            counts.update(re.findall(r"[a-z']+", prose(path).lower()))
    for word, most in MOST.items():
        found = PER_WORDS * counts[word] / counts.total()
        assert found <= most, f'"{word}" stands {found:.2f} times in {PER_WORDS} words of prose, at most {most}'
