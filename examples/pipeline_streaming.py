"""`transformers.pipeline` with a streamer: patch the pipeline's model, and words are printed as rounds accept them.

python examples/pipeline_streaming.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys

from transformers import TextStreamer, pipeline

import specdec_triton as sdt

PROMPT = "Repeat this sentence three times: the quick brown fox jumps over the lazy dog."


def main(name="HuggingFaceTB/SmolLM2-135M-Instruct"):
    pipe = pipeline("text-generation", model=name)
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with sdt.patched(pipe.model, drafter=sdt.PromptLookupDrafter()):
        pipe([{"role": "user", "content": PROMPT}], streamer=streamer, do_sample=False, max_new_tokens=64)
    stats = sdt.stats(pipe.model)
    print(f"\n{stats.emitted} tokens, acceptance length {stats.acceptance_length:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
