"""The same in a terminal with plain input, as over ssh: one command a line, nothing that needs a cursor.

Tokens have their numbers before them, faint, and where no space stands between two there is a |. The less likely a
token, the redder. What a model says may hold characters
that steer a terminal; they are shown as pictures (\\x1b is ␛).
"""

from __future__ import annotations

import math
import re
import shlex
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import payloads
from .desk import Desk, Unsaved

HELP = """\
Before each token stands its number; a | where no blank stands between two, as a
blank belongs to the token after it.

  7               what else could stand at token 7
  7 2             put the second of these there, and go on
  7 = Aurora      put these words there (quotes keep blanks: 7 = " Aurora"; a
                  quote itself: 7 = '"')
  7 2 c=0.9       with confidence 0.9; or p=0.9, a target probability
  n               the next token of which the model was not sure
  u, r            undo, redo
  x 7             take the mark off token 7
  k               mark as right what only the trained model says (with --adapter)
  g               go on with the answer; Ctrl-C interrupts it
  a               accept: write the answer to the file, and go to the next prompt
  s, o 3          skip to the next prompt, or open prompt 3
  l               list the prompts
  ask WORDS       a prompt of your own;  then WORDS: as the next turn, after accepting
  q               quit"""
HIDDEN = re.compile("[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
NUMBER = re.compile(r"-?\d+")
EDIT = re.compile(r"(-?\d+)\s*(?:=\s*(?P<text>.*)|(?P<choice>-?\d+))?$", re.DOTALL)
STRENGTH = re.compile(r"\s+([cp])=(\S+)$")
REDDEST = 0.01  # the probability from which on a token is as red as can be


def visible(text: str) -> str:
    return HIDDEN.sub(lambda found: _picture(found[0]), text)


def _picture(letter: str) -> str:
    if letter == "\n":
        return "↵"
    code = ord(letter)
    return chr(0x2400 + code) if code < 0x20 else f"‹U+{code:04X}›"


class Terminal:
    """Reads commands until q or the end of the input.

    Args:
        desk: what is corrected.
        console: of rich, where it writes.
        read: gives the next line; EOFError at the end.
    """

    def __init__(self, desk: Desk, console: Console | None = None, read: Callable[[str], str] = input) -> None:
        self.desk, self.read = desk, read
        self.console = console or Console(highlight=False)
        self._quiet = threading.Event()
        self._quiet.set()
        self._leave = desk.listen(self._hear)
        self._at = -1  # the last doubtful token

    def run(self) -> None:
        self.console.print(f"{self.desk.name}: h lists the commands, q quits.", markup=False)
        try:
            self._do(self.desk.begin)
            while True:
                try:
                    line = self.read("> ").strip()
                except (EOFError, KeyboardInterrupt):
                    return
                if line in ("q", "quit"):
                    return
                if line:
                    self._command(line)
        finally:
            self._leave()

    # What is done.

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if EDIT.match(STRENGTH.sub("", line)):
            self._edit(line)
            return
        plain: dict[str, Callable[[], Any]] = {
            "k": self.desk.keep, "u": self.desk.undo, "r": self.desk.redo, "g": self.desk.go_on, "a": self._accept,
            "s": self._skip,
        }  # fmt: skip
        if name in plain and not rest:
            self._do(plain[name])
        elif name in ("h", "?", "help"):
            self.console.print(HELP, markup=False)
        elif name == "n":
            self._next()
        elif name == "l":
            self._list()
        elif name in ("x", "o") and NUMBER.fullmatch(rest.strip()):
            number = int(rest)
            call = self._unmark if name == "x" else self._open
            self._do(lambda **given: call(number, **given))
        elif name in ("ask", "then") and rest:
            self._do(lambda **given: self.desk.ask(rest, follow=name == "then", **given))
        else:
            self._say(f"No such command: {line[:40]}; h lists them.", "red")

    def _edit(self, line: str) -> None:
        strength = STRENGTH.search(line)
        found = EDIT.match(STRENGTH.sub("", line))
        position, text, choice = int(found[1]), found["text"], found["choice"]
        if text is None and choice is None:
            self._show_choices(position)
            return
        try:
            given: dict[str, Any] = {} if strength is None else _strength(strength[1], strength[2])
            what = self._words(text) if choice is None else self._choice(position, int(choice))
        except ValueError as error:
            self._say(str(error), "red")
            return
        self._do(lambda: self.desk.replace(position, what, **given))

    @staticmethod
    def _words(text: str) -> str:
        """A " begins a text in quotes; a ' only where another ends it, since 's and 'm are tokens."""
        if not (text[:1] == '"' or (text[:1] == "'" == text[-1:] and len(text) > 1)):
            return text
        try:
            (found,) = shlex.split(text)
        except ValueError:
            raise ValueError(f"Expected one text between two quotes, got {text}; a quote itself is '\"'.") from None
        return found

    def _unmark(self, position: int) -> None:
        last = len(self.desk.state().get("tokens", ())) - 1
        if not 0 <= position <= last:
            raise ValueError(f"Expected a token from 0 to {last}, got {position}.")
        self.desk.unmark(position)

    def _open(self, number: int, **given: Any) -> None:
        if not 1 <= number <= len(self.desk.tasks):
            raise ValueError(f"Expected a prompt from 1 to {len(self.desk.tasks)}, got {number}; l lists them.")
        self.desk.open(number - 1, **given)

    def _choice(self, position: int, number: int) -> int:
        found = self.desk.likeliest(position)
        if not 1 <= number <= len(found):
            raise ValueError(f"Expected a number from 1 to {len(found)}, got {number}.")
        return found[number - 1]["id"]

    def _accept(self) -> None:
        self.desk.accept()
        self._say(f"Written to {self.desk.file.path}.", "green")

    def _skip(self, **given: Any) -> None:
        following = self.desk.next_open()
        if following is None:
            raise ValueError("There is no other prompt without a record.")
        self.desk.open(following, **given)

    def _do(self, call: Callable[..., Any]) -> None:
        """A call that changes the answer; what comes of it is printed, and this waits until the model has ended."""
        try:
            before = self.desk.version
            try:
                call()
            except Unsaved as error:
                if self.read(f"{error} Discard them? [y/N] ").strip().lower() not in ("y", "yes"):
                    return
                call(discard=True)
            if self.desk.version != before:
                self._wait()
        except (ValueError, TypeError, OSError, TimeoutError) as error:
            self._say(str(error), "red")

    def _wait(self) -> None:
        while True:
            try:
                while not self._quiet.wait(0.1):
                    pass
                break
            except KeyboardInterrupt:
                self.desk.stop()
        self._show()

    # What is seen.

    def _hear(self, kind: str, what: dict[str, Any]) -> None:
        if kind == "state":
            if what["generating"]:
                self._quiet.clear()
                before = "".join(token["text"] for token in what.get("tokens", ()))
                self.console.print(Text(visible(before), "dim"), end="", soft_wrap=True)
            else:
                if not self._quiet.is_set():
                    self.console.print()
                self._quiet.set()
        elif kind == "token" and not self._quiet.is_set():
            self.console.print(Text(visible(what["token"]["text"]), "dim"), end="", soft_wrap=True)

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(visible(text), style))

    def _show(self) -> None:
        state = self.desk.state()
        self._at = -1
        for note in state["notes"]:
            self._say(note, "yellow")
        if state["current"] is None:
            again = "o 1 (or another number of the list, l) to open one again, or " if self.desk.tasks else ""
            self._say(f"No prompt is open; type: {again}ask WORDS")
            return
        for message in state["messages"]:
            self._say(f"{message['role']}: {message['text']}", "bold")
        line = Text()
        for token in state["tokens"]:
            line.append_text(_marked(token))
            if "\n" in token["text"]:
                line.append("\n" * token["text"].count("\n"))
        self.console.print(line)
        anchors = sum("anchor" in token for token in state["tokens"])
        how = "accepted" if state["accepted"] else "finished" if state["finished"] else "not finished"
        said = f"{payloads.count(len(state['tokens']), 'token')}, {anchors} corrected, {how}"
        self._say(f"[{state['done']} of {state['total']} done] {said}", "dim")

    def _show_choices(self, position: int) -> None:
        try:
            found = self.desk.likeliest(position)
        except ValueError as error:
            self._say(str(error), "red")
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("", justify="right")
        table.add_column("token")
        table.add_column("probability", justify="right")
        table.add_column("")
        for number, choice in enumerate(found, 1):
            text = visible(choice.get("name") or choice["text"]).replace(" ", "·")
            bar = Text("█" * round(20 * choice["p"]), "blue")
            table.add_row(str(number), Text(text), f"{100 * choice['p']:.3g} %", bar)
        self.console.print(table)

    def _next(self) -> None:
        try:
            found = self.desk.suspicious(self._at)
        except ValueError as error:
            self._say(str(error), "red")
            return
        if found is None:
            self._say("No doubtful token after this one." if self._at >= 0 else "The model was sure of every token.")
            self._at = -1
            return
        self._at = found
        self.console.print(Text("token ") + _marked(self.desk.state()["tokens"][found]))
        self._show_choices(found)

    def _list(self) -> None:
        state = self.desk.state()
        for number, task in enumerate(self.desk.list_tasks(), 1):
            mark = ">" if number - 1 == state["current"] else "✓" if task["records"] else " "
            self._say(f"{mark} {number:3d}  {task['title']}")


def _marked(token: dict[str, Any]) -> Text:
    """A token with its number, in the colour of its probability; one that was put right with the old one struck out."""
    text = visible(token.get("name") if token.get("special") or not token["text"] else token["text"])
    body = text.lstrip(" ")
    line = Text()
    line.append(" " * (len(text) - len(body)) or "|", "dim")
    line.append(f"{token['position']}:", "dim")
    anchor = token.get("anchor")
    if anchor is not None:
        line.append(visible(anchor["was"] or "").strip(), "strike dim")
        line.append("→", "dim")
        line.append(body or "␣", "bold black on yellow")
        return line
    doubt = min(1.0, -math.log(max(token["p"], 1e-9)) / -math.log(REDDEST))
    line.append(body or "␣", "" if doubt < 0.15 else "red" if doubt > 0.5 else "yellow")
    return line


def _strength(name: str, text: str) -> dict[str, float]:
    """What c=… and p=… ask for."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < 1 or (name == "c" and value == 1)):
        most = "up to 1" if name == "c" else "below 1"
        raise ValueError(f"{name}: expected a number above 0 and {most}, as in {name}=0.9, got {name}={text}.")
    return {"confidence" if name == "c" else "target_probability": value}
