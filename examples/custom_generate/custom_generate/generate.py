import specdec_triton as sdt


def generate(model, tree=None, seed=None, **arguments):
    if arguments.get("assistant_model") is None:
        arguments.setdefault("prompt_lookup_num_tokens", 10)
    with sdt.patched(model, tree=tree, seed=seed):
        # the class's own: `from_pretrained` may have replaced `model.generate` by this function
        return type(model).generate(model, **arguments)
