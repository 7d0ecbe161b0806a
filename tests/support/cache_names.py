"""A Llama that calls its cache as one release of transformers does, whichever is installed."""

import inspect

from transformers import LlamaForCausalLM

NAMES = ("cache", "past_key_values")  # from 5.24 on, and before
SIGNATURE = inspect.signature(LlamaForCausalLM.forward)
INSTALLED = next(name for name in NAMES if name in SIGNATURE.parameters)


def llama_class(name):
    """Its forward takes the cache as `name`, and gives it back under that name."""

    def forward(self, *args, **kwargs):
        if name in kwargs:
            kwargs[INSTALLED] = kwargs.pop(name)
        out = LlamaForCausalLM.forward(self, *args, **kwargs)
        if not hasattr(out, name):
            vars(out)[name] = out.get(INSTALLED)
        return out

    own = SIGNATURE.parameters.values()
    forward.__signature__ = SIGNATURE.replace(
        parameters=[parameter.replace(name=name) if parameter.name == INSTALLED else parameter for parameter in own]
    )
    return type("LlamaForCausalLM", (LlamaForCausalLM,), {"forward": forward, "__module__": __name__})


def renaming(model, name):
    """The model, after a hook that renames what its callers, such as PEFT, give as the cache."""

    def hook(module, args, kwargs):
        given = next((n for n in NAMES if n in kwargs), None)
        return args, {name if n == given else n: value for n, value in kwargs.items()}

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model
