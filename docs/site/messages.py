"""The page of every message of the package: errors and warnings, read from the code, by what one was doing.

    python docs/site/messages.py    # prints it

Nothing is imported. Values that a message names are shown as …; a message that is passed on from elsewhere is there,
not here.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# What one was doing, the files whose messages belong there (the first that fits), and what helps in general.
AREAS = (
    ("Calling a loss", ("op", "validation", "checks", "preparation", "head", "labels", "tokens", "problem", "shards",
                        "autograd", "compiled", "reference", "parameters", "preference", "sparse/", "importing"),
     "The name before the colon is the argument. Nothing has been computed yet, so a call that is repeated with "
     "another value begins where it would have begun."),
    ("An objective's options and fields", ("objectives/",),
     "Options belong to the constructor, tensors to the call. A field is a column of the batch."),
    ("Patching a model", ("huggingface/collator", "huggingface/fields", "huggingface/rows", "huggingface/"),
     "These come from `fl.patch`, from the first forward with labels, from the collator, or from a callback. The model "
     "is as it was before: `fl.unpatch(model)` gives it its own loss back."),
    ("In a trainer that reads YAML files", ("integrations/",),
     "The name before the colon is the key of the file."),
    ("Corrected answers and their files", ("anchors/page/",  "anchors/",),
     "A message about a file names file, line and field. Nothing is written half: a file is as it was before."),
    ("`fused-losses train`", ("training/",),
     "Arguments and data are checked before the model is loaded."),
    ("`fused-losses check`", ("checking/",),
     "Files are checked before the model is loaded."),
    ("Backends and compiled kernels", ("backends/", "kernels/", "build", "selfcheck"),
     "`fused-losses info` lists the backends, and for each that cannot run the reason. `backend=\"auto\"` takes "
     "another one without an error."),
    ("Other commands", ("cli/", "demo/", "bench/"),
     "Exit status 2: an argument or a file is wrong, or a package is missing. `--help` lists what there is."),
)  # fmt: skip
INTRODUCTION = """\
---
search: {{boost: 2}}
---

# Every message

All {count} messages of the package, read from its code when this page was built: errors and warnings. Search for a few
words of yours; what the message puts in, such as names and numbers, is written as `…`. Most messages have three
parts: the name of what is wrong, what was expected and what came, and after a semicolon what to do.

What is behind the frequent ones, and what else may go wrong: [Troubleshooting](troubleshooting.md).
"""


KINDS = {
    "warnings.warn": "warning", "self._warn": "warning", "parser.error": "exit status 2",
    "SystemExit": "exit status 2", "sys.exit": "exit status 2", "Fault": "ValueError",
    "argparse.ArgumentTypeError": "exit status 2", "pickle.PicklingError": "PicklingError",
    "Refusal": "the page says it", "Stale": "the page says it", "Unsaved": "the page says it",
}  # fmt: skip


class Message(NamedTuple):
    file: str
    line: int
    kind: str
    text: str


def page(package: Path) -> str:
    found = messages(package)
    parts = [INTRODUCTION.format(count=len(found))]
    for title, _, help_ in AREAS:
        mine = [message for message in found if area(message.file) == title]
        if not mine:
            continue
        parts += [f"## {title}\n", f"{help_}\n"]
        for file in dict.fromkeys(message.file for message in mine):
            parts.append(f"### `{file}`\n")
            parts += dict.fromkeys(f"- {code(message.text)} {message.kind}" for message in mine if message.file == file)
            parts.append("")
    return "\n".join(parts)


def area(file: str) -> str | None:
    """Of a file of the package: the title of its part of the page; None: it has none."""
    name = file.removesuffix(".py")
    for title, files, _ in AREAS:
        if any(name == known or (known.endswith("/") and name.startswith(known)) for known in files):
            return title
    return None


@functools.cache
def messages(package: Path) -> list[Message]:
    """Of all files of a package, in their order; each once."""
    files = sorted(package.rglob("*.py"))
    trees = {path.relative_to(package).as_posix(): ast.parse(path.read_text()) for path in files}
    constants = {file: _assigned(tree.body) for file, tree in trees.items()}
    named = [name for found in constants.values() for name in found]
    shared = {name: value for found in constants.values() for name, value in found.items() if named.count(name) == 1}
    return [m for file, tree in trees.items() for m in _of(file, tree, {**shared, **constants[file]})]


def raised(tree: ast.AST) -> Iterator[tuple[ast.AST, str, ast.Call]]:
    """Where an error is made, a warning given or a command ended with words: the scope, its kind, the call."""
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))]
    seen = set()
    for scope in reversed(scopes):  # inner ones first
        for node in ast.walk(scope):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or id(call) in seen:
                continue
            name = ast.unparse(call.func)
            if isinstance(node, ast.Raise) or name in KINDS or re.fullmatch(r"[A-Z]\w*Error", name):
                seen.add(id(call))
                yield scope, KINDS.get(name, name), call


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, ast.expr | None]:
    """What names stand for; None where it is one thing here and another there."""
    found: dict[str, ast.expr | None] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            found[name] = None if name in found else node.value
    return found


def _of(file: str, tree: ast.AST, constants: dict[str, ast.expr | None]) -> Iterator[Message]:
    for scope, kind, call in raised(tree):
        names = {**constants, **_assigned(ast.walk(scope))}
        texts = [" ".join(text(argument, names).split()) for argument in call.args]
        said = max(texts, key=len, default="")
        if re.search(r"[a-z]{2}.* .*[a-z]{2}", said):
            kind = "error" if not re.fullmatch(r"[A-Za-z][\w. ]+\d?", kind) else kind
            yield Message(file, call.lineno, kind, said)


def text(node: ast.expr | None, names: dict[str, ast.expr | None], depth: int = 0) -> str:
    """What a string expression says, as far as the code tells."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, names, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        said = text(node.value, names, depth)
        return repr(said) if node.conversion == ord("r") and "…" not in said else said
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left, names, depth) + text(node.right, names, depth)
    if isinstance(node, ast.IfExp):
        return f"{text(node.body, names, depth)}|{text(node.orelse, names, depth)}".strip("|") if depth < 3 else "…"
    if isinstance(node, ast.Name | ast.Attribute) and depth < 3:
        name = node.id if isinstance(node, ast.Name) else node.attr
        value = names.get(name)
        if isinstance(value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp):
            return text(value, {**names, name: None}, depth + 1)
    return "…"


def code(said: str) -> str:
    """As inline code, whatever backticks it has."""
    fence = "``" if "`" in said else "`"
    pad = " " if fence == "``" else ""
    return f"{fence}{pad}{said}{pad}{fence}"


if __name__ == "__main__":
    print(page(Path(__file__).parents[2] / "fused_losses"))
