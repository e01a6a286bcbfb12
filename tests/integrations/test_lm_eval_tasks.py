import importlib.util
import json
import math

import pytest
import torch

import reallm
from reallm.cli import main
from reallm.errors import SourceError, TextError
from reallm.integrations import lm_eval_tasks as ours
from reallm.integrations.lm_eval_tasks import score_tasks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install ".[tasks]"'
)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny files in the format of the published data sets."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [{"text": text, "label": label} for text, label in (("A river.", "A"), ("A stone house.", "B"))]
    asked = [{"stem": f"Which of {n} is old?", "choices": choices} for n in range(3)]
    lines(
        folder / "ARC-Easy-Test.jsonl",
        [{"id": str(n), "question": q, "answerKey": "AB"[n % 2]} for n, q in enumerate(asked)],
    )
    lines(folder / "piqa-valid.jsonl", [{"goal": "See light.", "sol1": "Walk.", "sol2": "Hold it."}] * 4)
    (folder / "piqa-valid-labels.lst").write_text("0\n1\n1\n0\n")
    lines(folder / "lambada_test.jsonl", [{"text": "The old house holds the small light"}] * 2)
    return folder


@pytest.fixture(scope="module")
def compressed(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "out"
    reallm.compress(tiny_llama, out, bits=4)
    return out


def figures(result):
    return {(t["task"], name): figure for t in result["tasks"] for name, figure in t["metrics"].items()}


def log_probability(model, tokenizer, context, continuation):
    """Return the log-probability of a continuation after a context, in nats."""
    before = tokenizer(context)["input_ids"]
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(log_probs[place - 1, ids[0, place]].item() for place in range(len(before), ids.shape[1]))


@needs_lm_eval
def test_figures_are_those_of_the_prompts_of_lm_eval_scored_by_hand(tiny_llama, data):
    model, tokenizer = reallm.load(tiny_llama), reallm.load_tokenizer(tiny_llama)
    found = figures(score_tasks(str(tiny_llama), ["arc_easy", "piqa", "lambada"], data=data, batch_size=2))
    right = 0
    for number in range(3):
        prompt = f"Question: Which of {number} is old?\nAnswer:"
        of = [log_probability(model, tokenizer, prompt, f" {text}") for text in ("A river.", "A stone house.")]
        right += of.index(max(of)) == number % 2
    assert found["arc_easy", "acc"]["model"] == pytest.approx(right / 3)
    prompt = "Question: See light.\nAnswer:"
    of = [log_probability(model, tokenizer, prompt, f" {text}") for text in ("Walk.", "Hold it.")]
    share = 0.5  # two of each label
    assert found["piqa", "acc"]["model"] == share and of[0] != of[1]
    word = log_probability(model, tokenizer, "The old house holds the small", " light")
    assert found["lambada_openai", "perplexity"]["model"] == pytest.approx(math.exp(-word), rel=1e-3)
    assert found["piqa", "acc"]["stderr"] == pytest.approx(math.sqrt(0.25 / 3))


@needs_lm_eval
def test_an_artifact_is_scored_in_both_modes_together_with_the_original(compressed, tiny_llama, data):
    options = {"data": data, "reference": str(tiny_llama)}
    decoded_once = score_tasks(str(compressed), ["lambada"], **options)
    each_time = score_tasks(str(compressed), ["lambada"], mode="decode_per_use", **options)
    perplexity = figures(decoded_once)["lambada_openai", "perplexity"]
    assert perplexity["model"] != perplexity["reference"]
    assert perplexity["model"] == pytest.approx(figures(each_time)["lambada_openai", "perplexity"]["model"], rel=1e-4)
    alone = figures(score_tasks(str(tiny_llama), ["lambada"], data=data))
    assert perplexity["reference"] == alone["lambada_openai", "perplexity"]["model"]


@needs_lm_eval
def test_the_result_says_what_was_scored_with_which_versions(tiny_llama, data):
    result = score_tasks(str(tiny_llama), ["piqa"], data=data, limit=3)
    (row,) = result["tasks"]
    assert row["examples"] == 3 and set(row["data"]) == {"piqa-valid.jsonl", "piqa-valid-labels.lst"}
    assert {"reallm", "torch", "transformers", "lm_eval", "datasets"} <= set(result["versions"])
    assert row["metrics"]["acc"].keys() == {"model", "stderr"}


@needs_lm_eval
def test_task_files_are_found_whatever_capitals_their_names_have(tiny_llama, data, tmp_path):
    for file in data.iterdir():
        (tmp_path / file.name.upper()).write_bytes(file.read_bytes())
    names = ["piqa", "lambada"]
    assert figures(score_tasks(str(tiny_llama), names, data=tmp_path)) == figures(
        score_tasks(str(tiny_llama), names, data=data)
    )


@needs_lm_eval
def test_the_command_prints_a_table_and_nothing_else_and_json_with_a_text(tiny_llama, text_file, data, capsys):
    arguments = ["eval", str(tiny_llama), "--tasks", "piqa,lambada", "--tasks-data", str(data)]
    assert main([*arguments, "--reference", str(tiny_llama)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "piqa" in out and "50.00 ± 28.87 %" in out and "perplexity" in out
    assert len({line.index("acc") for line in out.split("\n") if " acc " in line}) == 1
    assert main([*arguments, "--text", str(text_file), "--context", "64", "--windows", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] > 1 and [row["task"] for row in result["tasks"]] == ["piqa", "lambada_openai"]


@needs_lm_eval
def test_any_task_of_lm_eval_is_taken_and_its_data_set_missed_in_one_line(tiny_llama, data, monkeypatch):
    def no_hub(*_, **__):
        raise ConnectionError("no hub")

    import datasets

    # The file name on the stack tells that the error comes from datasets.
    monkeypatch.setattr(datasets, "load_dataset", eval_in(datasets.__file__, no_hub))
    with pytest.raises(TextError, match="(?s)winogrande.*no hub.*--tasks-data"):
        score_tasks(str(tiny_llama), ["piqa", "winogrande"], data=data)


def eval_in(file, function):
    """Return the function as if it were defined in that file."""
    namespace = {"function": function}
    exec(compile("def called(*a, **k):\n    return function(*a, **k)", file, "exec"), namespace)
    return namespace["called"]


@needs_lm_eval
@pytest.mark.parametrize(
    ("names", "file", "content", "says"),
    [
        (["arc_hard_to_find"], None, None, "arc_hard_to_find"),
        (["piqa"], "piqa-valid-labels.lst", "0\n", "4 questions and 1 labels"),
        (["piqa"], "piqa-valid-labels.lst", None, "piqa-valid-labels.lst"),
        (["lambada"], "lambada_test.jsonl", '{"words": "x"}\n', "lambada_test.jsonl"),
        (["lambada"], "lambada_test.jsonl", "", "empty"),
        (["arc_easy"], "ARC-Easy-Test.jsonl", "no json", "ARC-Easy-Test.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tiny_llama, data, tmp_path, names, file, content, says):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if file:
        (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(TextError, match=says):
        score_tasks(str(tiny_llama), names, data=tmp_path)


def test_a_missing_package_is_one_line_with_the_extra(tiny_llama, monkeypatch):
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r'pip install "\.\[tasks\]" in the clone'):
        score_tasks(str(tiny_llama), ["piqa"])


@needs_lm_eval
def test_a_folder_that_is_not_there_is_named(tiny_llama, tmp_path):
    with pytest.raises(TextError, match="nowhere"):
        score_tasks(str(tiny_llama), ["piqa"], data=tmp_path / "nowhere")
