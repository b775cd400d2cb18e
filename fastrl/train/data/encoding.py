"""Records to tokens: prompts with their completions, conversations, preference pairs, labelled completions.

    encoder = Encoder(tokenizer, stop_ids=stop_token_ids(model, tokenizer))
    encoded = supervised_examples(read_records("train.jsonl"), encoder, max_tokens=512)
    encoded.examples, encoded.dropped, encoded.cut

| kind | fields of a record | function |
|---|---|---|
| supervised | `prompt`, `completion` | `supervised_examples` |
| supervised | `messages`, of which the assistant's turns are trained | `supervised_examples` |
| preference | `prompt`, `chosen`, `rejected` | `preference_examples` |
| preference | `chosen`, `rejected` as whole conversations | `preference_examples` |
| unpaired | `prompt`, `completion`, `label` (true or false) | `unpaired_examples` |

A preference record may have a number `margin`: how much better the chosen completion is, for reward models.

A prompt or a completion is a text, or a list of messages `{"role", "content"}`. The encoder tokenises the prompt on its
own, as sampling does. Then it tokenises the completion, with the stop token at its end. So training sees the tokens
that the model has to sample.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from fastrl.train.data.records import Records

CHAT_TEMPLATE = "chat"
logger = logging.getLogger(__name__)


Overlong = Literal["drop", "cut"]


Message = Mapping[str, Any]


T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A token sequence, and the tokens to train."""

    ids: list[int]
    trained: list[bool]
    """Whether each token is a target. The first one never is, because nothing predicts it."""

    @classmethod
    def of(cls, prompt: Sequence[int], completion: Sequence[int]) -> Example:
        """Return the example that trains the completion."""
        return cls([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))

    @property
    def n_trained(self) -> int:
        """Number of targets."""
        return sum(self.trained)


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt with a better and a worse completion, as token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0
    """How much better the chosen completion is: the field `margin` of the record, or 0."""


@dataclass(frozen=True)
class UnpairedExample:
    """A prompt with a desirable or undesirable completion, as token ids."""

    prompt: list[int]
    completion: list[int]
    label: bool


@dataclass(frozen=True)
class Encoded(Generic[T]):
    """Examples, and the counts of dropped and cut ones."""

    examples: list[T]
    dropped: int
    """Records that gave no example: too long, or pairs of two equal completions."""
    cut: int
    """Examples that lost the end of a completion."""


@dataclass(frozen=True)
class Encoder:
    """Turns texts and conversations into tokens."""

    tokenizer: Any
    stop_ids: Sequence[int]
    """Tokens that end a completion, see `fastrl.train.pretrained.stop_token_ids`."""
    template: str = CHAT_TEMPLATE
    """`chat`, or a text with `{prompt}`, as in `fastrl.train.data.encoding.encode_prompts`."""
    system: str | None = None
    """System message for conversations without one."""

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a prompt, ready for a completion."""
        if isinstance(prompt, str):
            return encode_prompts(self.tokenizer, [prompt], template=self.template, system=self.system)[0]
        if prompt and isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
            raise ValueError(
                "a prompt must not end with a turn of the assistant: the template would close it and open another; "
                "move its text to the beginning of the completion"
            )
        return self._ids(self._render(self._begun(prompt), True))

    def completion(self, prompt: str | Sequence[Message], completion: str | Sequence[Message]) -> list[int]:
        """Return the ids of a completion of `prompt`, with the stop token at its end."""
        text = completion if isinstance(completion, str) else _only_turn(completion)
        if self.template != CHAT_TEMPLATE:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt of messages needs prompt_template 'chat', got {self.template!r}")
            return [*self._ids(text), self.tokenizer.eos_token_id]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        example = self.conversation([*turns, {"role": "assistant", "content": text}], last_only=True)
        return example.ids[example.trained.index(True) :]

    def conversation(self, messages: Sequence[Message], *, last_only: bool = False) -> Example:
        """Return a conversation that trains the assistant's turns, or only the last of them.

        The example ends with the last of these turns. A turn is trained up to and including its stop token.

        Raises:
            ValueError: there is no turn of the assistant, or the chat template ends a turn without a stop token, or it
                writes a turn differently once the conversation goes on, so that no cut into prompt and completion fits.
        """
        turns = self._begun(messages)
        spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not spoken:
            raise ValueError("a conversation must have a turn of the assistant, got none")
        whole = self._render(turns[: spoken[-1] + 1], False)
        ids: list[int] = []
        trained: list[bool] = []
        done = 0
        for index in spoken[-1:] if last_only else spoken:
            before = self._render(turns[:index], True)
            after = self._render(turns[: index + 1], False)
            if last_only and not after.startswith(before):
                return self._after_a_prefill(turns[:index], before, after)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"the chat template writes the conversation up to message {index + 1} differently once it goes on; "
                    "split such a conversation into records of one trained turn each"
                )
            asked, said = self._ids(whole[done : len(before)]), self._ids(whole[len(before) : len(after)])
            end = self._end(said)
            ids += [*asked, *said]
            trained += [False] * len(asked) + [True] * end + [False] * (len(said) - end)
            done = len(after)
        last = len(trained) - trained[::-1].index(True)
        return Example(ids[:last], trained[:last])

    def _after_a_prefill(self, turns: Sequence[Message], asked: str, whole: str) -> Example:
        """Return the example where the generation prompt holds what a finished turn lacks, such as an empty thought.

        The model has to go on from the generation prompt, so what the finished turn writes behind their common
        beginning is the completion.
        """
        begun = self._render(turns, False)
        if not (asked.startswith(begun) and whole.startswith(begun)):
            raise ValueError(
                "the chat template writes the messages before the trained turn differently once the turn is there, so "
                "that its generation prompt fits no completion; split such a conversation, or use another template"
            )
        pairs = zip(asked, whole, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(asked), len(whole)))
        prompt, said = self._ids(asked), self._ids(whole[shared:])
        return Example.of(prompt, said[: self._end(said)])

    def _end(self, said: Sequence[int]) -> int:
        """Return the length of a turn including its stop token."""
        stops = [position for position, token in enumerate(said) if token in self.stop_ids]
        if not stops:
            raise ValueError(
                f"the chat template ends a turn of the assistant without one of the stop tokens {list(self.stop_ids)}: "
                "a model that is trained on it would not learn to stop"
            )
        return stops[-1] + 1

    def _begun(self, messages: Sequence[Message]) -> list[Message]:
        for number, message in enumerate(messages, start=1):
            if not (
                isinstance(message, Mapping)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            ):
                raise ValueError(f"message {number} must have the texts role and content, got {message!r:.80}")
        if not messages:
            raise ValueError("a conversation must have at least one message, got none")
        if self.system is None or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        if self.template != CHAT_TEMPLATE:
            raise ValueError(f"messages need prompt_template 'chat', got {self.template!r}")
        if not self.tokenizer.chat_template:
            raise ValueError("messages need a tokenizer with a chat template; this one has none")
        return self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def supervised_examples(
    records: Records, encoder: Encoder, *, max_tokens: int | None = None, overlong: Overlong = "drop"
) -> Encoded[Example]:
    """Return the examples of supervised records. The top of the module lists their fields.

    Args:
        records: a result of `read_records`.
        encoder: the tokenizer and the template.
        max_tokens: longest example, prompt and completion together. None sets no limit.
        overlong: `drop` leaves longer examples out. `cut` removes the end of the example, and drops it if no target
            is left. Both are counted.

    Raises:
        ValueError: a record without its fields or with wrong ones (the message names the place), or none fits.
    """

    def make(record: Mapping[str, Any]) -> Example:
        if "messages" in record:
            return encoder.conversation(_typed(record, "messages", list))
        if "prompt" not in record:
            raise ValueError(
                f"expected the fields prompt and completion, or messages, got {', '.join(record) or 'none'}"
            )
        prompt, completion = _prompt(record), _completion(record, "completion")
        return Example.of(encoder.prompt(prompt), encoder.completion(prompt, completion))

    def cut(example: Example, limit: int) -> Example | None:
        short = Example(example.ids[:limit], example.trained[:limit])
        return short if any(short.trained) else None

    return _encode(records, make, lambda example: len(example.ids), cut, max_tokens, overlong)


def preference_examples(
    records: Records, encoder: Encoder, *, max_tokens: int | None = None, overlong: Overlong = "drop"
) -> Encoded[PreferenceExample]:
    """Return the pairs of preference records, with the arguments and errors of `supervised_examples`.

    A pair is as long as its prompt with the longer completion. A pair of equal tokens, as given or as cut, teaches
    nothing: it is dropped. Without a field `prompt`, the prompt is the messages
    that `chosen` and `rejected` have in common at their beginning.
    """

    def make(record: Mapping[str, Any]) -> PreferenceExample:
        prompt, chosen, rejected = _pair(record)
        return PreferenceExample(
            encoder.prompt(prompt),
            encoder.completion(prompt, chosen),
            encoder.completion(prompt, rejected),
            _margin(record),
        )

    def length(pair: PreferenceExample) -> int:
        return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))

    def cut(pair: PreferenceExample, limit: int) -> PreferenceExample | None:
        left = limit - len(pair.prompt)
        if left <= 0:
            return None
        return dataclasses.replace(pair, chosen=pair.chosen[:left], rejected=pair.rejected[:left])

    encoded = _encode(records, make, length, cut, max_tokens, overlong)
    pairs = [pair for pair in encoded.examples if pair.chosen != pair.rejected]
    equal = len(encoded.examples) - len(pairs)
    if not pairs:
        raise ValueError(
            f"in all {equal} pairs of {records.source} that fit, chosen and rejected are the same tokens: there is no "
            "difference to learn from; if they were cut, raise max_tokens"
        )
    if equal:
        logger.warning("%s: %d pairs are left out, their two completions are the same tokens", records.source, equal)
    return Encoded(pairs, encoded.dropped + equal, encoded.cut)


def unpaired_examples(
    records: Records, encoder: Encoder, *, max_tokens: int | None = None, overlong: Overlong = "drop"
) -> Encoded[UnpairedExample]:
    """Return the examples of unpaired records, with the arguments and errors of `supervised_examples`."""

    def make(record: Mapping[str, Any]) -> UnpairedExample:
        prompt, completion, label = _prompt(record), _completion(record, "completion"), record.get("label")
        if not isinstance(label, bool | int | float) or label not in (0, 1):
            raise ValueError(f"the field label must be true or false, got {label!r:.80}")
        return UnpairedExample(encoder.prompt(prompt), encoder.completion(prompt, completion), bool(label))

    def cut(example: UnpairedExample, limit: int) -> UnpairedExample | None:
        left = limit - len(example.prompt)
        return UnpairedExample(example.prompt, example.completion[:left], example.label) if left > 0 else None

    return _encode(records, make, lambda e: len(e.prompt) + len(e.completion), cut, max_tokens, overlong)


def _encode(
    records: Records,
    make: Callable[[Mapping[str, Any]], T],
    length: Callable[[T], int],
    cut: Callable[[T, int], T | None],
    max_tokens: int | None,
    overlong: Overlong,
) -> Encoded[T]:
    if overlong not in get_args(Overlong):
        raise ValueError(f"overlong must be drop or cut, got {overlong!r}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    examples: list[T] = []
    dropped = cut_count = 0
    shortest = 0
    for index, record in enumerate(records):
        try:
            example = make(record)
        except ValueError as error:
            raise ValueError(f"{records.where(index)}: {error}") from error
        if max_tokens is None or length(example) <= max_tokens:
            examples.append(example)
            continue
        shortest = min(shortest or length(example), length(example))
        short = cut(example, max_tokens) if overlong == "cut" else None
        if short is None:
            dropped += 1
        else:
            examples.append(short)
            cut_count += 1
    if not examples:
        raise ValueError(
            f"none of the {len(records)} records of {records.source} fits max_tokens={max_tokens}: the shortest has "
            f"{shortest} tokens"
        )
    if dropped or cut_count:
        logger.warning(
            "%s: of %d records longer than %s tokens were %d, %d dropped and %d cut",
            records.source, len(records), max_tokens, dropped + cut_count, dropped, cut_count,
        )  # fmt: skip
    return Encoded(examples, dropped, cut_count)


def _typed(record: Mapping[str, Any], name: str, kinds: type | tuple[type, ...]) -> Any:
    if record.get(name) is None:
        state = "null, expected a value" if name in record else "missing"
        raise ValueError(f"the field {name} is {state}; the record has {', '.join(map(str, record)) or 'none'}")
    if not isinstance(record[name], kinds):
        shown = "a list of messages" if kinds is list else "a text or a list of messages"
        raise ValueError(f"the field {name} must be {shown}, got {type(record[name]).__name__}")
    return record[name]


def _prompt(record: Mapping[str, Any]) -> Any:
    return _typed(record, "prompt", (str, list))


def _completion(record: Mapping[str, Any], name: str) -> Any:
    return _typed(record, name, (str, list))


def _pair(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return prompt, chosen and rejected of a record."""
    chosen, rejected = _completion(record, "chosen"), _completion(record, "rejected")
    if record.get("prompt") is not None:
        return _prompt(record), chosen, rejected
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise ValueError(
            "the field prompt is missing; only chosen and rejected lists of messages hold it in themselves"
        )
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if same == 0:
        raise ValueError("chosen and rejected must begin with the same messages where there is no field prompt")
    return chosen[:same], chosen[same:], rejected[same:]


def _margin(record: Mapping[str, Any]) -> float:
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"the field margin must be a finite number, got {margin!r:.80}")
    return float(margin)


def _only_turn(completion: Sequence[Message]) -> str:
    """Return the text of a completion in messages."""
    turns = [(turn.get("role"), turn.get("content")) for turn in completion if isinstance(turn, Mapping)]
    if len(completion) != 1 or [role for role, _ in turns] != ["assistant"] or not isinstance(turns[0][1], str):
        raise ValueError(
            f"a completion of messages must be one turn of the assistant, got roles {[r for r, _ in turns]}"
        )
    return turns[0][1]


def encode_prompts(
    tokenizer: Any, questions: Sequence[str], *, template: str = CHAT_TEMPLATE, system: str | None = None
) -> list[list[int]]:
    """Return the token ids of each question put into `template`.

    `template` is "chat" for the tokenizer's own chat template, or any text with `{prompt}`. The text may spell out
    special tokens. `system` is a system message for the chat template.
    """
    if template == CHAT_TEMPLATE:
        if not tokenizer.chat_template:
            raise ValueError("prompt_template 'chat' needs a tokenizer with a chat template; this one has none")
        start = [{"role": "system", "content": system}] if system is not None else []
        texts = [
            tokenizer.apply_chat_template(
                [*start, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
    elif "{prompt}" in template:
        if system is not None:
            raise ValueError("system_prompt belongs to prompt_template 'chat'; write it into the template instead")
        texts = [template.replace("{prompt}", question) for question in questions]
    else:
        raise ValueError(f"prompt_template must be {CHAT_TEMPLATE!r} or contain '{{prompt}}', got {template!r}")
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    for question, ids in zip(questions, encoded, strict=True):
        if not ids:
            raise ValueError(f"a prompt must have at least one token, got none for {question!r}")
    return encoded


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `(ids, mask)`, both (P, T), padded on the left. The lengths make the mask, not the padding token."""
    width = max(len(ids) for ids in sequences)
    padded = [[pad_id] * (width - len(ids)) + list(ids) for ids in sequences]
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.arange(width) >= (width - lengths)[:, None]
    return torch.tensor(padded, device=device), mask.to(device)
