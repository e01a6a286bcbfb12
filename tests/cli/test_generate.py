import io

import pytest

from reallm.cli import main


def run(capsys, *arguments):
    code = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_answers_on_stdout_and_is_silent_on_stderr(tiny_llama, capsys):
    code, out, err = run(capsys, tiny_llama, "the river", "--max-new-tokens", 5)
    assert code == 0 and out.strip() and out.endswith("\n") and err == ""


def test_each_piece_is_shown_when_it_comes(tiny_llama, capsys, monkeypatch):
    shown = []

    def pieces(*_, **__):
        for piece in ("one", " two"):
            yield piece
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr("reallm.evaluate.generation.generate_stream", pieces)
    assert run(capsys, tiny_llama, "count") == (0, "\n", "")
    assert shown == ["one", " two"]


def test_the_prompt_may_come_from_stdin(tiny_llama, capsys, monkeypatch):
    direct = run(capsys, tiny_llama, "the river", "--max-new-tokens", 5)
    monkeypatch.setattr("sys.stdin", io.StringIO("the river"))
    assert run(capsys, tiny_llama, "-", "--max-new-tokens", 5) == direct


def test_raw_and_chat_prompts_are_different_questions(tiny_llama, capsys):
    raw = run(capsys, tiny_llama, "the river", "--raw", "--max-new-tokens", 8)
    chat = run(capsys, tiny_llama, "the river", "--chat", "--max-new-tokens", 8)
    assert raw[0] == chat[0] == 0 and raw[1] != chat[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--system", "x", "--raw"], "system message"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--mode", "fast"], "decode_per_use"),
        (["--dtype", "int3"], "bfloat16"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(tiny_llama, capsys, arguments, says):
    code, out, err = run(capsys, tiny_llama, "the river", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and says in err


def test_a_missing_model_is_one_line_and_exit_2(tmp_path, capsys):
    code, out, err = run(capsys, tmp_path / "nowhere", "hello")
    assert (code, out, err.count("\n")) == (2, "", 1) and "nowhere" in err
