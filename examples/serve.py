"""`transformers serve` with speculation: the server runs in this process and patches each model that it loads.

python examples/serve.py HuggingFaceTB/SmolLM2-135M-Instruct 8000
curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Count to ten, twice."}], "max_tokens": 64}'

Needs transformers[serving]. Requests to a model are decoded one after another by its `generate`. Leave out
`continuous_batching=True`: a patched model refuses it, since that decoding loop does not speculate.
"""

import sys

from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

import specdec_triton as sdt


def main(name="HuggingFaceTB/SmolLM2-135M-Instruct", port=8000, non_blocking=False):
    load = ModelManager._load_model

    def load_and_patch(*args, **kwargs):
        model = load(*args, **kwargs)
        sdt.patch(model, drafter=sdt.PromptLookupDrafter())
        return model

    ModelManager._load_model = load_and_patch
    return Serve(name, port=int(port), non_blocking=non_blocking)


if __name__ == "__main__":
    main(*sys.argv[1:])
