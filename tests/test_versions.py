"""An untested newer transformers gives one warning and no error."""

import warnings

import pytest

import specdec_triton as sdt
from families import NEVER, build, prompt


@pytest.mark.parametrize(("installed", "warns"), [("5.24.3", False), ("5.25.0", True), ("6.0.0.dev0", True)])
def test_a_newer_version_warns_once(installed, warns, monkeypatch):
    warn = sdt._patch.warn_if_untested
    monkeypatch.setattr(warn.__wrapped__.__globals__["transformers"], "__version__", installed)
    warn.cache_clear()
    model, options = build("llama"), {**prompt(), "do_sample": False, "max_new_tokens": 4, "eos_token_id": NEVER}
    plain = model.generate(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with sdt.patched(model):
                text = model.generate(**options, prompt_lookup_num_tokens=2)
    warn.cache_clear()
    messages = [str(warning.message) for warning in caught if "specdec_triton" in str(warning.message)]
    assert len(messages) == warns and all(f"up to 5.24, got {installed}" in message for message in messages)
    assert text.equal(plain)
