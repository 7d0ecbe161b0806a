"""A command of ours, in this process."""

from typing import Any

from fused_losses import cli


def status(*words: Any) -> Any:
    """Its exit status."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys: Any, *words: Any) -> str:
    """The one line of a command that ends with status 2; without the command's name."""
    capsys.readouterr()
    assert status(*words) == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line.removeprefix(f"fused-losses {words[0]}: ")
