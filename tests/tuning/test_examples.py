"""Task data: prompts, loss masks, and errors that name the line."""

import json
import types

import pytest

from reallm.cli import main
from reallm.errors import TextError
from reallm.hf import load_tokenizer
from reallm.tuning.data import load_windows
from reallm.tuning.examples import load_examples

USER, BOT = {"role": "user", "content": "River?"}, {"role": "assistant", "content": "Stone."}
DOLLY = {"instruction": "Name it.", "context": "A river.", "response": "Stone.", "category": "qa"}
ALPACA = {"instruction": "Name it.", "input": "A river.", "output": "Stone.", "text": "all of it"}


@pytest.fixture
def tokenizer(tiny_llama):
    found = load_tokenizer(tiny_llama)
    found.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return found


def written(folder, *rows):
    path = folder / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def array_of(folder, *rows):
    path = folder / "task.json"
    path.write_text(json.dumps(rows, indent=4))
    return path


def read(path, tokenizer):
    """Return (whole text, texts in the loss) of each example."""
    examples = load_examples(path, tokenizer)
    return [("".join(p.text for p in e), [p.text for p in e if p.loss_mask]) for e in examples]


@pytest.mark.parametrize("row", [DOLLY, ALPACA])
def test_an_instruction_and_its_context_are_the_users_message(tokenizer, tmp_path, row):
    whole, counted = read(written(tmp_path, row), tokenizer)[0]
    assert whole == "<user>Name it.\n\nA river.\n<assistant>Stone.\n" and counted == ["Stone.\n"]


@pytest.mark.parametrize("row", [DOLLY, ALPACA])
def test_without_a_chat_template_instructions_are_put_as_alpaca_puts_them(tokenizer, tmp_path, row):
    tokenizer.chat_template = None
    bare = {key: "" if key in ("context", "input") else value for key, value in row.items()}
    (whole, counted), (other, _) = read(written(tmp_path, row, bare), tokenizer)
    assert "further context. Write" in whole and "### Input:\nA river.\n\n### Response:\nStone." in whole
    assert "Input" not in other and "a task. Write" in other and counted == ["Stone."]


@pytest.mark.parametrize("field", ["response", "completion"])
def test_a_prompt_and_its_answer_stand_as_they_are(tokenizer, tmp_path, field):
    assert read(written(tmp_path, {"prompt": "River?", field: " Stone."}), tokenizer) == [
        ("River? Stone.", [" Stone."])
    ]


def test_of_messages_every_answer_counts_and_what_follows_the_last_is_left_out(tokenizer, tmp_path):
    messages = [{"role": "system", "content": "Old."}, USER, BOT, USER, BOT | {"content": "Light."}, USER]
    path = written(tmp_path, {"messages": messages})
    whole = "<system>Old.\n<user>River?\n<assistant>Stone.\n<user>River?\n<assistant>Light.\n"
    assert read(path, tokenizer) == [(whole, ["Stone.\n", "Light.\n"])]
    tokenizer.chat_template = None
    whole, counted = read(path, tokenizer)[0]
    assert counted == ["Stone.\n\n", "Light.\n\n"] and whole.startswith("### System:\nOld.\n\n### User:\nRiver?\n\n")


def test_conversations_are_messages_under_other_names(tokenizer, tmp_path):
    said = [
        {"from": "system", "value": "Old."},
        {"from": "human", "value": "River?"},
        {"from": "gpt", "value": "Stone."},
    ]
    messages = {"messages": [{"role": "system", "content": "Old."}, USER, BOT]}
    (tmp_path / "other").mkdir()
    expected = read(written(tmp_path / "other", messages), tokenizer)
    assert read(written(tmp_path, {"id": "x", "conversations": said}), tokenizer) == expected
    assert read(written(tmp_path, {"conversations": messages["messages"]}), tokenizer) == expected


def test_a_template_is_given_whatever_else_is_in_a_message(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m.turn }} {{ m.content }}\n{% endfor %}"
    path = written(tmp_path, {"messages": [USER | {"turn": 1}, BOT | {"turn": 2}]})
    assert read(path, tokenizer) == [("1 River?\n2 Stone.\n", ["2 Stone.\n"])]


def test_a_template_that_renders_the_last_answer_otherwise_gives_an_example_for_each(tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}~{% endif %}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = read(written(tmp_path, {"messages": [USER, BOT, USER, BOT]}), tokenizer)
    assert found == [
        ("<user>River?<assistant>~Stone.", ["~Stone."]),
        ("<user>River?<assistant>Stone.<user>River?<assistant>~Stone.", ["~Stone."]),
    ]


def test_tokens_that_the_template_wrote_do_not_come_twice(tokenizer, tmp_path):
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    path = written(tmp_path, *[{"messages": [USER, BOT]}] * 9)
    flat = load_windows([path], tokenizer, 4).ids.flatten().tolist()
    end = tokenizer.eos_token_id
    assert end in flat and [end, end] not in [flat[n : n + 2] for n in range(len(flat))]
    calls = types.SimpleNamespace(
        bos_token="<s>", bos_token_id=0, chat_template="x", apply_chat_template=tokenizer.apply_chat_template
    )

    class Beginning(types.SimpleNamespace):
        def __call__(self, text):
            return {"input_ids": [0, 5]}

    assert not read(path, Beginning(**vars(calls)))[0][0].startswith("<s>")
    assert read(path, tokenizer)[0][0].startswith("<s>")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (
            DOLLY,
            {"instruction": "Name it."},
            'line 2: no "response" field with a string in it; its fields are instruction',
        ),
        (DOLLY, DOLLY | {"context": 3}, 'line 2: no "context" field with a string'),
        (ALPACA, {"text": "x"}, 'line 2: no "instruction" field with a string in it; its fields are text'),
        (
            {"question": "a", "answer": "b"},
            DOLLY,
            'line 1: no "text" field; its fields are question, answer; --text reads',
        ),
        ({"messages": [USER, BOT]}, {"messages": "x"}, 'line 2: no "messages" field with a list'),
        ({"messages": [USER, BOT]}, {"messages": [USER]}, 'line 2: no message has the role "assistant"'),
        ({"messages": [USER, BOT]}, {"messages": [USER, {"role": "user"}]}, 'line 2, message 2: no "content" field'),
        ({"messages": [USER, BOT]}, {"messages": [3]}, 'line 2, message 1: no "role" field'),
        ({"conversations": [USER, BOT]}, {"conversations": 3}, 'line 2: no "conversations" field with a list'),
        ({"conversations": [USER, BOT]}, {"conversations": [{"from": "gpt"}]}, 'line 2, message 1: no "value" field'),
        ({"conversations": [USER, BOT]}, {"conversations": [{"from": "human", "value": ""}]}, "line 2: no message has"),
    ],
)
def test_a_line_of_other_fields_is_named_with_those_it_has(tokenizer, tmp_path, first, second, says):
    with pytest.raises(TextError, match=f"task.jsonl, {says}"):
        load_examples(written(tmp_path, first, second), tokenizer)
    with pytest.raises(TextError, match=f"task.json, {says.replace('line', 'element')}"):
        load_examples(array_of(tmp_path, first, second), tokenizer)


@pytest.mark.parametrize("row", [DOLLY, ALPACA, {"prompt": "River?", "response": " Stone."}, {"messages": [USER, BOT]}])
def test_an_array_gives_the_examples_of_its_elements_as_lines(tokenizer, tmp_path, row):
    lines = read(written(tmp_path, row, row), tokenizer)
    assert len(lines) == 2 and read(array_of(tmp_path, row, row), tokenizer) == lines


def test_an_array_of_texts_is_no_task_data(tokenizer, tmp_path):
    assert load_examples(array_of(tmp_path, {"text": "Stone."}), tokenizer) is None
    (tmp_path / "task.txt").write_text(json.dumps([DOLLY]))
    assert load_examples(tmp_path / "task.txt", tokenizer) is None


@pytest.mark.parametrize("rows", [[], ["River?"], [[DOLLY]], [{}], [None, DOLLY]])
def test_an_array_without_fields_in_its_first_element_is_refused(tokenizer, tmp_path, rows):
    with pytest.raises(TextError, match=r"task.json(: there is no text|, element 1: no \"text\" field)"):
        load_windows([array_of(tmp_path, *rows)], tokenizer, 4)


def test_a_template_that_refuses_messages_names_the_line(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(TextError, match="line 1: the model's chat template rejects these messages .no system here"):
        load_examples(written(tmp_path, {"messages": [USER, BOT]}), tokenizer)


@pytest.mark.parametrize(("form", "row", "answer"), [(written, DOLLY, "response"), (array_of, ALPACA, "output")])
def test_an_adapter_is_trained_on_data_of_dolly_and_alpaca(compressed, tmp_path, capsys, form, row, answer):
    data = form(tmp_path, *[row | {answer: f"Stone {n}."} for n in range(30)])
    words = [
        "--adapter",
        "1",
        "--data",
        str(data),
        "--loss",
        "ce",
        "--context",
        "32",
        "--batch",
        "2",
        "--tokens",
        "128",
    ]
    assert main(["tune", str(compressed), "-o", str(tmp_path / "dolly"), *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "dolly" / "adapter_config.json").is_file()


def test_a_name_in_place_of_the_rank_is_told_where_it_goes(compressed, tmp_path, capsys):
    assert main(["tune", str(compressed), "-o", str(tmp_path / "x"), "--adapter", "dolly", "--data", "d.jsonl"]) == 2
    assert "'dolly' is not a rank, a whole number such as 8" in (err := capsys.readouterr().err)
    assert "--adapter 8 -o dolly" in err
