"""Random tiny DFlash heads, written as checkpoints in the published layouts.

Names, shapes and configs are those of z-lab/dflash and its published heads, of Muse Glimmer's assistant in
transformers, and of vllm-project/speculators. vLLM reads all of them. If a writer leaves a choice open, vLLM's
reading holds. See `checkpoints` for the letters and for the weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import LLAMA3, WINDOW, Head, Layout, layer_config, random_tensors, speculators_config, write_tensors


@dataclass(frozen=True, kw_only=True)
class DFlashLayout(Layout):
    """A published form of a DFlash checkpoint, with one choice of its options.

    Attributes:
        writer: "z-lab", "muse" or "speculators".
        block_size: number of rows of a block.
        mask: the mask token.
        from_anchor: True if row i of a block predicts the token after it; else the token at it, for i >= 1.
        causal: for each layer, True if rows of a block see no later row of it.
        section: further entries of "dflash_config" in config.json.

    In `windows`, a row sees keys whose positions are less than the window before its own. `states` are those after the
    layers in z-lab's ids.
    """

    kind: str = "dflash"
    writer: str = "z-lab"
    ids: tuple[int, ...] | None = (1, 3, 5)
    states: tuple[int | str, ...] = (2, 4, 6)
    draft_vocab: int | None = None
    heads: tuple[int, int, int | None] = (4, 2, 16)
    num_layers: int = 2
    model_type: str = "qwen3"
    own: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("input_layernorm", "hidden_norm", "norm")
    block_size: int = 5
    mask: int = 60
    from_anchor: bool = False
    causal: tuple[bool, ...] = (False, False)
    section: dict[str, Any] | None = None


_SPECULATORS = {"writer": "speculators", "ids": (2, 4, 6), "own": ("lm_head", "embed_tokens")}

# Layouts for a target of 8 layers. Without ids, z-lab's code spaces as many as the head has layers evenly between the
# outputs of layers 1 and L - 3, and one layer reads the output of layer L // 2.
DFLASH_LAYOUTS = {
    "z-lab": DFlashLayout(heads=(2, 1, 8)),
    "z-lab, no ids": DFlashLayout(ids=None, states=(2, 3, 5, 6), num_layers=4, causal=(False,) * 4, block_size=4),
    "z-lab, one layer": DFlashLayout(ids=None, states=(5,), num_layers=1, causal=(False,), block_size=8),
    "z-lab, biases": DFlashLayout(biases=("qkv", "o"), rope_scaling=LLAMA3, heads=(2, 2, 12)),
    # since Qwen3.5, sliding layers are causal and the size of the block is in "dflash_config"
    "z-lab, sliding": DFlashLayout(windows=(WINDOW, None), causal=(True, False), section={"block_size": 5}),
    "z-lab, sliding and not causal": DFlashLayout(
        windows=(WINDOW, None), section={"causal": False, "swa_window_size": WINDOW}
    ),
    "z-lab, causal": DFlashLayout(causal=(True, True), section={"causal": True}),
    # MiMo's heads name no types of layers
    "z-lab, use_swa": DFlashLayout(windows=(WINDOW, WINDOW), section={"use_swa": True, "swa_window_size": WINDOW}),
    # in transformers, a key at a distance of just the window is seen
    "muse": DFlashLayout(
        writer="muse",
        names=(("fc.", "encoder.fc."), ("hidden_norm.", "encoder.output_norm_enc.")),
        windows=(WINDOW + 1, None),
        ids=(0, 4),
        states=(1, 5),
    ),
    "speculators": DFlashLayout(**_SPECULATORS, draft_vocab=40),
    "speculators, converted": DFlashLayout(**_SPECULATORS, rope_scaling=LLAMA3, block_size=3),
    "speculators, wider target": DFlashLayout(
        **_SPECULATORS, hidden=24, heads=(3, 1, 16), draft_vocab=40, flags={"target_hidden_size": 32}
    ),
    "speculators, sliding": DFlashLayout(
        **_SPECULATORS,
        windows=(WINDOW, None),
        causal=(True, False),
        draft_vocab=40,
        flags={"sliding_window_non_causal": False},
    ),
    "speculators, sliding and not causal": DFlashLayout(
        **_SPECULATORS, windows=(None, WINDOW), flags={"sliding_window_non_causal": True}
    ),
    "speculators, from the anchor": DFlashLayout(
        **_SPECULATORS, draft_vocab=40, from_anchor=True, block_size=4, flags={"sample_from_anchor": True}
    ),
}


def write_dflash(folder: Path, target, layout: str | DFlashLayout, seed: int = 0) -> Head:
    """Write a random head for `target` in a layout, or in the layout `DFLASH_LAYOUTS[layout]`."""
    layout = DFLASH_LAYOUTS[layout] if isinstance(layout, str) else layout
    config = target.config.get_text_config()
    return write_tensors(
        folder, target, layout, random_tensors(layout, config, seed), config=dflash_config(layout, config)
    )


def dflash_config(layout: DFlashLayout, target) -> dict:
    """config.json of a DFlash head, for a target of the config `target`."""
    if layout.writer == "speculators":
        config = speculators_config(layout, target, "dflash", "DFlashSpeculator") | {
            "aux_hidden_state_layer_ids": list(layout.ids),
            "block_size": layout.block_size,
            "draft_vocab_size": layout.draft_vocab or target.vocab_size,
            "mask_token_id": layout.mask,
            "sample_from_anchor": False,
            "sliding_window_non_causal": False,
            "target_hidden_size": None,
        }
        return config | layout.flags
    config = layer_config(layout, target)
    section: dict[str, Any] = {"mask_token_id": layout.mask}
    if layout.ids is not None:
        section["target_layer_ids"] = list(layout.ids)
    if layout.writer == "muse":
        config |= section | {"architectures": ["MuseGlimmerAssistantModel"], "model_type": "muse_glimmer_assistant"}
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}}
        return config | {"block_size": layout.block_size} | layout.flags
    section |= layout.section or {}
    config |= {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "dflash_config": section,
        "num_target_layers": target.num_hidden_layers,
    }
    if "block_size" not in section:
        config["block_size"] = layout.block_size
    if section.get("use_swa"):
        for name in ("layer_types", "sliding_window", "use_sliding_window"):
            del config[name]
    elif not layout.windows:
        types = ["full_attention"] * layout.num_layers
        config |= {"layer_types": types, "sliding_window": None, "use_sliding_window": False}
    return config | layout.flags
