"""Records to tokens: trained tokens, templates, long examples and wrong records."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_model import TEMPLATE, tiny_tokenizer

from fastrl.train.data.encoding import (
    Encoder,
    Example,
    encode_prompts,
    preference_examples,
    supervised_examples,
    unpaired_examples,
)
from fastrl.train.data.records import read_records

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
CHAT = Encoder(TOKENIZER, [END])
BARE = Encoder(TOKENIZER, [END], template="{prompt}")
TALK = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "bye"},
]


def encoder_with(template: str) -> Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, [END])


def trained_text(example: Example) -> str:
    return TOKENIZER.decode([token for token, trained in zip(example.ids, example.trained, strict=True) if trained])


def only(encoded: Any) -> Any:
    (example,) = encoded.examples
    return example


def test_a_prompt_is_encoded_as_for_sampling_and_the_completion_ends_with_a_stop() -> None:
    records = read_records([{"prompt": "1+1=", "completion": "2"}])
    chat = only(supervised_examples(records, CHAT))
    prompt = encode_prompts(TOKENIZER, ["1+1="])[0]
    assert chat.ids == [*prompt, *TOKENIZER("2").input_ids, END]
    assert chat.trained == [False] * len(prompt) + [True, True]
    assert chat.n_trained == 2
    bare = only(supervised_examples(records, BARE))
    assert TOKENIZER.decode(bare.ids) == "1+1=2<|im_end|>"
    assert trained_text(bare) == "2<|im_end|>"


def test_messages_are_the_same_as_texts() -> None:
    texts = {"prompt": "1+1=", "completion": "2"}
    messages = {"prompt": TALK[:1], "completion": TALK[1:2]}
    assert only(supervised_examples(read_records([texts]), CHAT)) == only(
        supervised_examples(read_records([messages]), CHAT)
    )
    assert only(supervised_examples(read_records([texts]), CHAT)) == only(
        supervised_examples(read_records([{"messages": TALK[:2]}]), CHAT)
    )


def test_every_turn_of_the_assistant_is_trained_and_nothing_else() -> None:
    example = only(supervised_examples(read_records([{"messages": TALK}]), CHAT))
    assert trained_text(example) == "2<|im_end|>3<|im_end|>"
    whole = TOKENIZER.apply_chat_template(TALK[:4], tokenize=False)
    assert TOKENIZER.decode(example.ids) == whole.removesuffix("\n")  # the example ends at its last target
    assert example.trained[-1]
    last = CHAT.completion(TALK[:3], TALK[3:4])
    assert TOKENIZER.decode(last) == "3<|im_end|>"


def test_the_system_message_of_the_encoder_is_for_conversations_without_one() -> None:
    encoder = Encoder(TOKENIZER, [END], system="be brief")
    own = [{"role": "system", "content": "own"}, *TALK[:2]]
    assert TOKENIZER.decode(encoder.conversation(TALK[:2]).ids).startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert TOKENIZER.decode(encoder.conversation(own).ids).startswith("<|im_start|>system\nown<|im_end|>")
    assert encoder.prompt(TALK[:1]) == encoder.prompt("1+1=")


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    rewrites = encoder_with(
        TEMPLATE.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '-')")
    )
    assert rewrites.conversation(TALK[:2])
    with pytest.raises(ValueError, match="up to message 2 differently once it goes on"):
        rewrites.conversation(TALK)
    assert trained_text(rewrites.conversation(TALK[:4], last_only=True)) == "3<|im_end|>"
    endless = encoder_with("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ValueError, match=r"without one of the stop tokens \[2\]"):
        endless.conversation(TALK[:2])


def test_preference_and_unpaired_records() -> None:
    pair = only(preference_examples(read_records([{"prompt": "1+1=", "chosen": "2", "rejected": "11"}]), CHAT))
    assert pair.prompt == encode_prompts(TOKENIZER, ["1+1="])[0]
    assert [TOKENIZER.decode(ids) for ids in (pair.chosen, pair.rejected)] == ["2<|im_end|>", "11<|im_end|>"]
    implicit = {"chosen": TALK[:2], "rejected": [TALK[0], {"role": "assistant", "content": "11"}]}
    assert only(preference_examples(read_records([implicit]), CHAT)) == pair
    unpaired = unpaired_examples(
        read_records([{"prompt": "1+1=", "completion": c, "label": y} for c, y in (("2", True), ("11", 0))]), CHAT
    ).examples
    assert [(e.prompt, e.completion, e.label) for e in unpaired] == [
        (pair.prompt, pair.chosen, True),
        (pair.prompt, pair.rejected, False),
    ]


def test_what_is_too_long_is_dropped_or_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    records = read_records(
        [{"prompt": "1", "completion": c} for c in ("2", "2" * 9)] + [{"prompt": "1" * 9, "completion": ""}]
    )
    whole = supervised_examples(records, BARE)
    assert ([len(e.ids) for e in whole.examples], whole.dropped, whole.cut) == ([3, 11, 10], 0, 0)
    dropped = supervised_examples(records, BARE, max_tokens=9)
    assert (dropped.examples, dropped.dropped, dropped.cut) == (whole.examples[:1], 2, 0)
    assert "of 3 records longer than 9 tokens were 2, 2 dropped and 0 cut" in caplog.text
    cut = supervised_examples(records, BARE, max_tokens=9, overlong="cut")
    assert (len(cut.examples), cut.dropped, cut.cut) == (2, 1, 1)  # of the long prompt nothing is left to train
    assert cut.examples[1] == Example(whole.examples[1].ids[:9], whole.examples[1].trained[:9])
    with pytest.raises(ValueError, match=r"none of the 3 records .* fits max_tokens=2: the shortest has 3 tokens"):
        supervised_examples(records, BARE, max_tokens=2)
    pairs = read_records([{"prompt": "1", "chosen": "2", "rejected": "3" * 9}])
    short = only(preference_examples(pairs, BARE, max_tokens=4, overlong="cut"))
    assert [len(ids) for ids in (short.prompt, short.chosen, short.rejected)] == [1, 2, 3]
    unpaired = read_records([{"prompt": "1", "completion": "2" * 9, "label": True}])
    assert len(only(unpaired_examples(unpaired, BARE, max_tokens=4, overlong="cut")).completion) == 3
    with pytest.raises(ValueError, match="overlong must be drop or cut"):
        supervised_examples(records, BARE, max_tokens=9, overlong="wrap")
    with pytest.raises(ValueError, match="max_tokens must be at least 2"):
        supervised_examples(records, BARE, max_tokens=1)


@pytest.mark.parametrize(
    ("function", "encoder", "record", "message"),
    [
        (supervised_examples, CHAT, {"text": "x"}, "expected the fields prompt and completion, or messages, got text"),
        (supervised_examples, CHAT, {"prompt": "x"}, "the field completion is missing; the record has prompt"),
        (
            supervised_examples,
            CHAT,
            {"prompt": 3, "completion": "x"},
            "prompt must be a text or a list of messages, got int",
        ),
        (supervised_examples, CHAT, {"messages": "x"}, "messages must be a list of messages, got str"),
        (supervised_examples, CHAT, {"messages": []}, "at least one message"),
        (supervised_examples, CHAT, {"messages": TALK[:1]}, "must have a turn of the assistant"),
        (supervised_examples, CHAT, {"messages": [{"role": "user"}]}, "message 1 must have the texts role and content"),
        (supervised_examples, CHAT, {"prompt": "x", "completion": TALK[:2]}, "must be one turn of the assistant"),
        (supervised_examples, CHAT, {"prompt": "x", "completion": ["y"]}, "must be one turn of the assistant"),
        (supervised_examples, BARE, {"messages": TALK}, "messages need prompt_template 'chat'"),
        (preference_examples, CHAT, {"prompt": "x", "chosen": "y"}, "the field rejected is missing"),
        (preference_examples, CHAT, {"chosen": "x", "rejected": "y"}, "the field prompt is missing"),
        (preference_examples, CHAT, {"chosen": TALK[:2], "rejected": TALK[2:4]}, "must begin with the same messages"),
        (unpaired_examples, CHAT, {"prompt": "x", "completion": "y"}, "label must be true or false, got None"),
        (unpaired_examples, CHAT, {"prompt": "x", "completion": "y", "label": 0.5}, "got 0.5"),
    ],
)
def test_a_wrong_record_is_refused_with_its_place(
    function: Any, encoder: Encoder, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^records, record 1: .*{message}"):
        function(read_records([record]), encoder)
