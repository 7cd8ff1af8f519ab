"""Your own drafter: this one drafts the four tokens after the latest earlier occurrence of the last token.

python examples/own_drafter.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys

import torch
from transformers import pipeline

import specdec_triton as sdt


class LatestDrafter(sdt.Drafter):
    def start(self, context, tree=None):  # called once in each `generate`
        return LatestSession(context)


class LatestSession(sdt.DraftSession):
    def __init__(self, context):
        self.context, self.max_nodes, self.max_depth = context, 5, 4

    def draft(self):  # called in each round, for all rows of the batch
        text, last, root = self.context.tokens, self.context.length[:, None], self.context.root[:, None]
        column = torch.arange(text.shape[1], device=text.device)
        latest = torch.where((text == root) & (column < last), column, 0).amax(1, keepdim=True)
        following = text.gather(1, (latest + column[1:5]).minimum(last))
        return sdt.DraftTree.from_topology(sdt.Topology.chain(4), torch.cat([root, following], 1))


def main(name="HuggingFaceTB/SmolLM2-135M-Instruct"):
    pipe = pipeline("text-generation", model=name)
    sdt.patch(pipe.model, drafter=LatestDrafter())
    text = pipe("One, two, three, four, one, two, three, four, one,", do_sample=False, max_new_tokens=48)
    print(text[0]["generated_text"], sdt.stats(pipe.model), sep="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
