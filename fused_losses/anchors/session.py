"""Correct a model's answer token by token: it answers, a wrong token is replaced, it goes on from there."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .answering import Answerer
from .arguments import check_goal, check_integer, check_number, check_sampling
from .chat import render
from .checked import check_known
from .exporting import anchor_of, original_of, record_of, state_of
from .history import Edit, State, later_edits
from .jsonl import Fault
from .predictions import KEPT, log_probabilities, predictions_of
from .prompts import as_messages, check_ids
from .records import Anchor, Record
from .spans import KnownTokenizer, Span, sharing, spell, text_of
from .views import Candidate, LaterEdit, Replacement, Token

NEAR = 16  # tokens decoded together with a new one


class AnchorSession:
    """A model's answer under correction, with everything that a page or a script needs to correct it.

        session = AnchorSession(model, tokenizer)
        session.start("What is your name?")
        for token in session.generate():
            print(token.text, end="")
        session.replace(4, " Aurora")
        list(session.generate())
        record = session.record()

    The model reads the tokens before a position and says one; the first wrong one is replaced, and it goes on from
    there. A replaced token that the original does not rank first is an **anchor**: what training shall make likely.

    Args:
        model: a causal language model of transformers, or a PEFT model, which generates as it is (adapter on).
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: of one call of `generate`.
        temperature: 0 takes the likeliest token; above, one is drawn by softmax(logits / temperature).
        top_p: in (0, 1]; drawn only from the fewest likeliest tokens that have this probability together.
        seed: of the draws. A token depends on the seed, its position and what stands before it alone, so that the same
            corrections give the same answer, also after undo, or when it is stopped between.
        reference: which model is the original, whose probabilities decide what is an anchor and stand in the record.
            None: this one, as it is. "base": this one without its PEFT adapter, for the next round of correction of a
            trained model. A model: that one (after full fine-tuning).
        round: of correction, noted in new anchors.
        agreement: n, see below.
        template_options: for the chat template, e.g. {"enable_thinking": False}.

    **Later edits.** After a replacement the model regenerates what follows. An edit that stood there before is kept,
    and moved, where the new continuation agrees with the old one. There the n = `agreement` tokens before it are the
    same as in the old one, and the model is about to say the token that was replaced, or the first one of the
    replacement. If the old continuation had that several times (context and token), the new one must have it as many
    times. Where fewer than n tokens lay between the replacement and the edit, these must be the same, and no others may
    lie between. Edits keep their order: one whose place would be before that of an earlier one is dropped. A kept edit
    is judged in the new context: a token that the original ranks first there is no anchor any more. `later_edits` says
    what became of each.

    **Threads.** `stop` may be called from any thread. The other calls wait for each other; a `generate` that is under
    way ends when the answer is changed.

    Raises:
        TypeError, ValueError: a model without a cache, a tokenizer of another model (more tokens than the head), a
        reference that is not there, options out of range; naming the argument.

    Memory: the KV cache of prompt and answer, and about 2.5 KB for each token that was ever generated, for the 32
    likeliest ones in its place. [T, V] logits are never kept. `reference` adds its own KV cache.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        reference: Any = None,
        round: int = 1,
        agreement: int = 4,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_integer("max_new_tokens", max_new_tokens, 1)
        check_integer("round", round, 1)
        check_integer("agreement", agreement, 1)
        check_sampling(temperature, top_p, seed)
        self._answerer = Answerer(model, tokenizer, reference)
        self.model, self.tokenizer, self.reference = model, tokenizer, reference
        self.max_new_tokens, self.round, self.agreement = max_new_tokens, round, agreement
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.template_options = template_options
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._run = 0  # a call of generate goes on while this is its number
        self._states: list[State] = []
        self._at = 0
        self.messages: list[dict[str, Any]] = []
        self.tools: list | None = None

    @property
    def prompt_ids(self) -> list[int]:
        """What the model sees before the answer."""
        return list(self._answerer.prompt_ids)

    def start(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: list | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        earlier: Record | None = None,
    ) -> None:
        """Begin the answer to a conversation, in the place of the one before and its history.

        Args:
            messages: one message of the user as a string, or the whole conversation: {"role": ..., "content": ...}
                each, the last one not the assistant's.
            tools: for the chat template, as `apply_chat_template` takes them.
            prompt_ids: what the model shall see, in the place of the chat template.
            earlier: a record of the same conversation, of an earlier round. Its anchors are kept where the new answer
                agrees with it, as later edits are.

        Raises:
            ValueError: no chat template; one that refuses the messages; a prompt that fills the model's context.
        """
        messages = as_messages(messages, given=prompt_ids is not None)
        if prompt_ids is None:
            prompt_ids = render(self.tokenizer, messages, tools, self.template_options)
        state = State()
        if earlier is not None:
            state.later = later_edits(self._state_of(earlier), 0, self.agreement)
        self._begin(messages, tools, check_ids(prompt_ids, self._answerer.vocabulary, "prompt_ids"), state)

    def open(self, record: Record) -> None:
        """Go on with a record: its conversation, its answer, its anchors, each an edit of its own.

        Raises:
            ValueError: a record of another tokenizer, or of ids that the model does not have.

        Cost: one forward of prompt and answer.
        """
        state = self._state_of(record)
        tools = None if record.tools is None else list(record.tools)
        self._begin(list(record.messages), tools, list(record.prompt_ids), state)
        with self._lock:
            state.predictions = predictions_of(self._answerer.forward, self.prompt_ids, state.ids)

    @functools.cached_property
    def _known(self) -> KnownTokenizer:
        return KnownTokenizer(self.tokenizer)

    def _begin(self, messages: list, tools: list | None, prompt_ids: list[int], state: State) -> None:
        length, most = len(prompt_ids) + max(1, len(state.ids)), self._answerer.most
        if most is not None and length > most:
            raise ValueError(f"messages: {length - 1} tokens leave no room in the context of {most}; shorten them")
        with self._lock:
            self._run += 1
            self.messages, self.tools, self._answerer.prompt_ids = messages, tools, prompt_ids
            self._states, self._at = [state], 0

    def _state_of(self, record: Record) -> State:
        if not isinstance(record, Record):
            raise TypeError(f"record: expected a Record, got {type(record).__name__}; read one with read_records")
        try:
            check_known(record, self._known)
        except Fault as fault:
            raise ValueError(f"record.{fault}") from None
        check_ids(record.prompt_ids, self._answerer.vocabulary, "record.prompt_ids")
        check_ids(record.completion.token_ids, self._answerer.vocabulary, "record.completion.token_ids")
        return state_of(record, self._answerer.ends)

    # The answer as it stands.

    @property
    def _state(self) -> State:
        if not self._states:
            raise ValueError("session: has no conversation yet; call start(messages) first")
        return self._states[self._at]

    @property
    def token_ids(self) -> list[int]:
        return list(self._state.ids)

    @property
    def text(self) -> str:
        """Of the whole answer, special tokens included."""
        return text_of(self.tokenizer, self._state.ids)

    @property
    def tokens(self) -> list[Token]:
        """Every token of the answer with its statistics, kept from the forward that generated it.

        probability p(token), entropy −Σ p ln p, margin p(token) − max over others, rank; under the session's model, at
        temperature 1. The anchors' probabilities are the original's.

        Cost: decoding; the model is not called.
        """
        with self._lock:
            state = self._state
            text, spans = spell(self.tokenizer, state.ids)
            return [self._token(state, at, text[slice(*span)], span) for at, span in enumerate(spans)]

    def _token(self, state: State, at: int, text: str, span: Span) -> Token:
        said, mark = state.predictions[at], state.marks.get(at)
        anchor = None if mark is None else anchor_of(self.tokenizer, at, state.ids[at], text, span, mark)
        numbers = said.probability, said.entropy, said.margin, said.rank
        return Token(at, state.ids[at], text, span, *numbers, state.edited(at), anchor)

    def _spelled_after(self, ids: list[int], before: Span) -> tuple[str, Span]:
        """Text and span of the last token, where the one before it has the span `before`; decodes the last few only."""
        text, spans = spell(self.tokenizer, ids[-NEAR:])
        start, stop = spans[-1]
        moved = before[0] - spans[-2][0] if len(spans) > 1 else 0
        return text[start:stop], (start + moved, stop + moved)

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        return tuple(token.anchor for token in self.tokens if token.anchor is not None)

    @property
    def finished(self) -> bool:
        """Whether the answer has its end-of-turn token."""
        return self._state.ended == "end of turn"

    @property
    def ended(self) -> str | None:
        """Why the last `generate` ended: "end of turn", "max_new_tokens", "context" (the model's is full), "stopped";
        None before and while it runs."""
        return self._state.ended

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages, and the answer as one more, without its end-of-turn token: for the next `start`."""
        ids = self._state.ids[:-1] if self.finished else self._state.ids
        return [*self.messages, {"role": "assistant", "content": text_of(self.tokenizer, ids)}]

    @property
    def later_edits(self) -> list[LaterEdit]:
        """What became of the edits after the last replacement. An edit without a place while `generate` goes on may
        still find one."""
        found = [(later.edit, later.position) for later in self._state.later]
        return [LaterEdit(edit.position, text_of(self.tokenizer, edit.token_ids), at) for edit, at in found]

    def likeliest(self, position: int, k: int = 10) -> list[Candidate]:
        """The k likeliest tokens at a position, the likeliest first, with their probabilities at temperature 1.

        `position`: 0 … T, where T is the one after the last token (not after an end of turn).

        Cost: none for k ≤ 32 at a position that has a token; else a forward of one token on a view of the KV cache (of
        the whole prefix, where the cache cannot be cropped).
        """
        with self._lock:
            state = self._state
            check_integer("k", k, 1)
            self._answerer.check_position(position, state)
            if position < len(state.ids) and k <= KEPT:
                said = state.predictions[position]
                pairs = list(zip(said.ids[:k], said.logprobs[:k], strict=True))
            else:
                logp = log_probabilities(self._answerer.peek(state, position))
                top = logp.topk(min(k, self._answerer.vocabulary))
                pairs = sorted(
                    zip(top.indices.tolist(), top.values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])
                )
            return [Candidate(token, text_of(self.tokenizer, [token]), math.exp(logp)) for token, logp in pairs]

    def suspicious(self, after: int = -1, *, share: float = 0.2, least: float = 0.5) -> int | None:
        """The next position after `after` where the model was least sure; None where there is none.

        Its doubt is entropy · (1 − margin), in nats: large where it spread over many tokens and another was as likely.
        (margin = p(token) − p(the likeliest other one), below 0 for a drawn token that is not the likeliest.)
        Suspicious are the `share` of the answer's tokens with the largest doubt, as far as that is at least `least`;
        but not what the user has replaced. They come in the order of the text, since a replacement changes what
        follows: after = the last one found visits each once.
        """
        check_number("share", share, 1.0)
        check_number("least", least, math.inf)
        with self._lock:
            return min((at for at in self._state.doubtful(share, least) if at > after), default=None)

    def kl_to_original(self) -> list[float]:
        """KL(original ‖ model) = Σ_v p_o(v) · (ln p_o(v) − ln p(v)) of each token of the answer, in nats, exact.

        Raises:
            ValueError: a session without `reference`, whose model is the original.

        Cost: one forward of the answer by each of both models; at most 512 rows of logits of each in memory.
        """
        with self._lock:
            return self._answerer.kl_to_original(self._state)

    def held_to_original(self) -> list[int]:
        """Positions of tokens that are no anchors, and that the original does not rank first where they stand.

        A trained model says them, or they were drawn. Training holds the original's probabilities there, and so takes
        back what was learnt; `keep` makes anchors of them.

        Cost: one forward of the answer by `reference`; none without one.
        """
        with self._lock:
            return self._answerer.held(self._state)

    def record(self) -> Record:
        """The answer with its anchors, for `write_records`, `RecordFile` and `rows`.

        Raises:
            ValueError: no answer yet.

        Cost: decoding; the first one hashes the original's tensors (one read of the model), the tokenizer's vocabulary.
        """
        with self._lock:
            state = self._state
            if not state.ids:
                raise ValueError("record: there is no answer yet; call generate() first")
            parts = self.messages, self.tools, self.prompt_ids, state.ids, state.marks
            return record_of(self._known, original_of(self.model, self.reference), *parts)

    # Generation.

    def generate(self, max_new_tokens: int | None = None) -> Iterator[Token]:
        """Goes on with the answer; yields each token as it comes, among them later edits where they are kept.

        Ends after an end-of-turn token (of generation_config.eos_token_id, or the tokenizer's), after max_new_tokens,
        where the model's context is full, on `stop`, and when the answer is changed. What was yielded stays. A second
        call goes on from there, unless the turn has ended. The model is first called when the first token is asked for.
        A token that is a part of a character reads as � until the character is whole; `tokens` then has it.

        Cost: a forward of one token each; before the first one, of what the KV cache does not hold (after `undo`).
        """
        if max_new_tokens is not None:
            check_integer("max_new_tokens", max_new_tokens, 1)
        with self._lock:
            state = self._state
            self._run += 1
            self._stopped.clear()
            if state.ended != "end of turn":
                state.ended = None
            return self._generate(state, self._run, len(state.ids) + (max_new_tokens or self.max_new_tokens))

    def _generate(self, state: State, run: int, last: int) -> Iterator[Token]:
        with self._lock:
            span = spell(self.tokenizer, state.ids).spans[-1] if state.ids else (0, 0)
        while True:
            with self._lock:
                if run != self._run or not self._goes_on(state, last):
                    return
                at = len(state.ids)
                proposal = self._answerer.proposal(state, self.temperature, self.top_p, self.seed)
                edit = state.next_edit(proposal)
                if edit is None:
                    self._answerer.put(state, proposal)
                else:
                    self._answerer.put_edit(state, edit)
                fresh = []
                for new in range(at, len(state.ids)):
                    text, span = self._spelled_after(state.ids[: new + 1], span)
                    fresh.append(self._token(state, new, text, span))
            yield from fresh

    def _goes_on(self, state: State, last: int) -> bool:
        if self._stopped.is_set():
            state.ended = state.ended or "stopped"
        elif len(state.ids) >= last:
            state.ended = state.ended or "max_new_tokens"
        elif self._answerer.room(state) < 1:
            state.ended = state.ended or "context"
        return state.ended is None

    def stop(self) -> None:
        """Ends a `generate` under way before its next token; from any thread, without waiting."""
        self._stopped.set()

    # Corrections.

    def replace(
        self,
        position: int,
        replacement: str | int | Sequence[int],
        *,
        confidence: float | None = None,
        target_probability: float | None = None,
        exact: bool = False,
    ) -> Replacement:
        """Put another token, or several, in the place of the one at `position`; `generate` goes on after it.

        What stood from there on goes, but `undo` brings it back, and later edits are kept where the new continuation
        agrees with the old one (see the class). Each of the new tokens that the original does not rank first where it
        stands becomes an anchor; with p* also only one whose probability is below p*. A replacement by the token that
        stands there leaves the answer as it is, and makes an anchor of a token that the model drew, or that a trained
        model says and its original would not; of one that is an anchor already it sets confidence or p* anew.

        Args:
            position: 0 … T; T, after the last token, appends (not after an end of turn).
            replacement: text, a token id, or token ids. The name of a special token is that token, so "<|im_end|>" ends
                the answer. Text becomes the tokens that it has after what stands before, which stays as it is.
            confidence: c in (0, 1] of its anchors, default 1.
            target_probability: p* in (0, 1), in its place.
            exact: text exactly as given. Else a word in the place of a token that begins with a space gets one too.

        Returns:
            A `Replacement`: tokens, text, anchors, and in words which are none.

        Raises:
            TypeError, ValueError: naming the argument: a position out of range, no text, text that the tokenizer cannot
            write there, ids that the model does not have, more than its context has place for.

        Cost: a forward of one token for each new one, on the KV cache cropped at `position`; where it cannot be cropped
        (recurrent layers, full sliding windows), a forward of the whole prefix. The same by the reference.
        """
        goal = check_goal(confidence, target_probability)
        with self._lock:
            old = self._state
            self._answerer.check_position(position, old)
            ids = self._answerer.replacement_ids(old, position, replacement, exact)
            edit = Edit(position, tuple(ids), self._proposal(old, position), *goal, self.round)
            if old.ids[position : position + len(ids)] == ids:
                return self._confirm(old, edit)
            new = old.until(position)
            covering = [edit.stop for edit in old.edits if edit.position <= position < edit.stop]
            new.later = later_edits(old, max([position + 1, *covering]), self.agreement)
            reasons = self._answerer.put_edit(new, edit)
            new.end = edit.stop
            self._push(new)
            return self._replacement(new, edit, True, reasons)

    def keep(self) -> tuple[Anchor, ...]:
        """Makes anchors of the tokens of `held_to_original`, of confidence 1, in one step; returns the new ones."""
        with self._lock:
            state = self._state
            held = self._answerer.held(state)
            if held:
                edits = [Edit(at, (state.ids[at],), state.ids[at], 1.0, None, self.round) for at in held]
                self._push(self._answerer.confirm(state, edits)[0])
            return tuple(anchor for anchor in self.anchors if anchor.position in held)

    def unmark(self, position: int) -> bool:
        """The token there is no anchor any more, nor are others of the same character. False where none was one."""
        with self._lock:
            same = sharing(spell(self.tokenizer, self._state.ids).spans, position)
            if not any(at in self._state.marks for at in same):
                return False
            self._push(self._state.without(same[0], same[-1] + 1))
            return True

    @property
    def can_undo(self) -> bool:
        return self._at > 0

    @property
    def can_redo(self) -> bool:
        return self._at + 1 < len(self._states)

    def undo(self) -> bool:
        """Takes the last `replace` or `unmark` back, with the answer as it stood, without a forward. False where there
        is none."""
        return self._move(-1)

    def redo(self) -> bool:
        """Takes the last `undo` back, with the continuation that was generated then. False where there is none."""
        return self._move(1)

    def _move(self, step: int) -> bool:
        with self._lock:
            if not 0 <= self._at + step < len(self._states):
                return False
            self._run, self._at = self._run + 1, self._at + step
            return True

    def _push(self, state: State) -> None:
        self._states[self._at + 1 :] = [state]
        self._run, self._at = self._run + 1, self._at + 1

    def _proposal(self, state: State, position: int) -> int:
        """What the model said at `position`, or is about to say."""
        said = state.proposal(position)
        return self._answerer.proposal(state, self.temperature, self.top_p, self.seed) if said is None else said

    def _confirm(self, old: State, edit: Edit) -> Replacement:
        """An edit to what stands there already."""
        new, reasons = self._answerer.confirm(old, [edit])
        changed = new.marks != old.marks
        if changed:
            self._push(new)
        return self._replacement(new, edit, changed, reasons)

    def _replacement(self, state: State, edit: Edit, changed: bool, reasons: list[str]) -> Replacement:
        text, spans = spell(self.tokenizer, state.ids)
        inside = range(edit.position, edit.stop)
        tokens = [self._token(state, at, text[slice(*spans[at])], spans[at]) for at in inside]
        found = [token.anchor for token in tokens if token.anchor is not None]
        own = text[spans[edit.position][0] : spans[edit.stop - 1][1]]
        what = f"{len(found)} of {len(inside)} tokens {'is an anchor' if len(found) == 1 else 'are anchors'}"
        return Replacement(edit.position, edit.token_ids, own, tuple(found), changed, "; ".join([what, *reasons]))
