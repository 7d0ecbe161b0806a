"""Triton's interpreter, a third faster."""

from __future__ import annotations

import inspect

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """A function that a kernel calls has the language patched for it by the kernel's own launch.

    The interpreter looks for what there is to patch at each such call, which took a third of the time of all.
    """
    patch = interpreter._patch_lang
    if getattr(patch, "is_quick", False):
        return

    def quick(fn):
        langs = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
        if any(tl.core.is_builtin(lang.load) for lang in langs):
            return patch(fn)
        return interpreter._LangPatchScope()

    quick.is_quick = True
    interpreter._patch_lang = quick
