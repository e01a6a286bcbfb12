import json
import signal
import subprocess
import sys

import pytest
import typer

import reallm
from reallm import cli
from reallm.calibrate.text import text_sha256
from reallm.cli import main


def run(capsys, *arguments):
    code = main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def measured(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_json_has_the_figures_and_where_they_come_from(tiny_llama, text_file, capsys):
    result = measured(capsys, tiny_llama, "--text", text_file, "--context", 64, "--windows", 3)
    assert result["windows"] == 3 and result["context"] == 64 and result["tokens"] == 3 * 63
    assert result["perplexity"] > 1 and result["kl"] is None and result["top1"] is None
    assert result["text_sha256"] == text_sha256(text_file)
    assert result["model"] == str(tiny_llama)
    assert set(result["versions"]) == {"reallm", "python", "torch", "transformers"}


def test_a_model_is_at_no_distance_from_itself(tiny_llama, text_file, capsys):
    result = measured(capsys, tiny_llama, "--text", text_file, "--context", 64, "--reference", tiny_llama)
    assert result["kl"] == pytest.approx(0, abs=1e-6) and result["top1"] == 1


def test_another_model_is_at_a_distance(tiny_llama, other_llama, text_file, capsys):
    result = measured(capsys, tiny_llama, "--text", text_file, "--context", 64, "--reference", other_llama)
    assert result["kl"] > 0.1 and result["top1"] < 1


def test_the_table_says_how_much_was_scored_and_stdout_has_nothing_else(tiny_llama, text_file, capsys):
    code, out, err = run(capsys, tiny_llama, "--text", text_file, "--context", 64, "--windows", 2)
    assert code == 0 and err == ""
    assert "2 windows of 64 tokens, 126 scored" in out and "perplexity" in out and "scoring" not in out


def test_the_table_shows_the_distance_only_with_a_reference(tiny_llama, text_file, capsys):
    arguments = (tiny_llama, "--text", text_file, "--context", 64, "--windows", 1)
    assert "KL" not in run(capsys, *arguments)[1]
    assert "100.00 %" in run(capsys, *arguments, "--reference", tiny_llama)[1]


def test_output_gets_the_same_json(tiny_llama, text_file, tmp_path, capsys):
    path = tmp_path / "result.json"
    result = measured(capsys, tiny_llama, "--text", text_file, "--context", 64, "--windows", 1, "--output", path)
    assert json.loads(path.read_text()) == result


@pytest.mark.parametrize("link", [False, True])
def test_an_output_that_is_there_is_refused_before_anything_is_measured(tiny_llama, text_file, tmp_path, capsys, link):
    path = tmp_path / "result.json"
    path.symlink_to(tmp_path / "nowhere") if link else path.write_text("precious")
    code, out, err = run(capsys, tiny_llama, "--text", text_file, "--windows", 1, "--output", path)
    assert (code, out) == (2, "") and f"--output: {path} exists; give another name or remove it" in err
    assert not (tmp_path / "nowhere").exists() if link else path.read_text() == "precious"


def test_batches_and_documents_are_accepted(tiny_llama, jsonl_file, capsys):
    one = measured(capsys, tiny_llama, "--text", jsonl_file, "--context", 16)
    three = measured(capsys, tiny_llama, "--text", jsonl_file, "--context", 16, "--batch-size", 3)
    assert one["nll"] == pytest.approx(three["nll"], rel=1e-5)


def test_the_dtype_is_the_one_asked_for(tiny_llama, text_file, capsys):
    arguments = ("--text", text_file, "--context", 64, "--windows", 1)
    assert measured(capsys, tiny_llama, *arguments, "--dtype", "bfloat16")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "TEXT", "--context", "1"], "context"),
        (["--text", "TEXT", "--context", "513"], "--context 512"),
        (["--text", "TEXT", "--windows", "0"], "windows"),
        (["--text", "TEXT", "--windows", "x"], "windows"),
        (["--text", "TEXT", "--reference", "nowhere/at/all"], "nowhere/at/all"),
        (["--text", "TEXT", "--output", "no/folder/x.json"], "no/folder"),
        (["--text", "TEXT", "--mode", "fast"], "decode_per_use"),
        (["--text", "TEXT", "--device", "toaster"], "toaster"),
        (["--text", "TEXT", "--no-such-option"], "--no-such-option"),
        (["--text", "TEXT", "--limit", "3"], "--limit 3 requires --tasks"),
        (["--text", "TEXT", "--tasks-data", "x"], "--tasks-data x requires --tasks"),
        ([], "--text"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_2(tiny_llama, text_file, capsys, arguments, says):
    arguments = [str(text_file) if word == "TEXT" else word for word in arguments]
    code, out, err = run(capsys, tiny_llama, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and says in err


def test_an_adapter_in_place_of_a_model_is_named_with_the_model_that_it_is_of(text_file, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "SmolLM2-3bit"}')
    for command in (["eval", str(tmp_path), "--text", str(text_file)], ["generate", str(tmp_path), "Hello"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"{tmp_path}: is an adapter of SmolLM2-3bit; give that as MODEL, and --adapter {tmp_path}" in err


def test_a_reference_that_reads_other_tokens_is_refused(tiny_llama, foreign_llama, text_file, capsys):
    code, _, err = run(capsys, tiny_llama, "--text", text_file, "--context", 64, "--reference", foreign_llama)
    assert code == 2 and "tokenizer" in err


def test_a_figure_that_is_infinite_is_null_in_json_not_broken_json():
    from reallm.evaluate.measure import to_json

    assert json.loads(to_json({"perplexity": float("inf"), "nll": 800.0})) == {"perplexity": None, "nll": 800.0}


def test_a_usage_error_names_the_command_whose_help_helps(capsys):
    main(["eval"])
    assert capsys.readouterr().err.endswith("See: reallm eval --help\n")


@pytest.mark.slow
def test_ctrl_c_ends_a_running_command_with_130(tiny_llama, text_file):
    code = "import sys; from reallm.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["generate", str(tiny_llama), "x", "--max-new-tokens", "490", "--temperature", "3"]
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # background processes of a shell ignore SIGINT
    )
    running.stdout.read(1)  # output has begun: loading is over
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "")


def test_an_unknown_command_is_one_line_and_exit_2(capsys):
    assert main(["levitate"]) == 2
    err = capsys.readouterr().err
    assert "levitate" in err and err.count("\n") == 1


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "eval" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"reallm {reallm.__version__}\n"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (typer.Abort, 130), (BrokenPipeError, 0)])
def test_an_interruption_ends_without_a_traceback(monkeypatch, error, code):
    def interrupted(*_, **__):
        raise error

    monkeypatch.setattr("sys.stdout", sys.stdout)  # restored afterwards: a broken pipe replaces it
    monkeypatch.setattr(cli, "app", interrupted)
    assert main(["eval"]) == code


def test_our_own_mistakes_are_not_dressed_up_as_the_users(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        main(["eval"])


def test_help_loads_neither_torch_nor_transformers():
    code = "import sys, reallm.cli; reallm.cli.main(['eval', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
