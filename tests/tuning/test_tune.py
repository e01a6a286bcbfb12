"""`reallm tune`: closer to the original model at the same bytes, resumable, deterministic for a seed."""

import filecmp
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm
from reallm.checkpoint import read_ledger, work_folder
from reallm.cli import main
from reallm.errors import ArtifactError, RecipeError, SourceError, TextError
from reallm.hf import load, load_tokenizer
from reallm.tuning import blockwise, end_to_end
from reallm.tuning.data import draw_batch, load_windows, split_windows
from reallm.tuning.distributed import ProcessGroup
from reallm.tuning.optimizer import Diverged

RATES = {"learning_rate": 5e-3, "block_learning_rate": 5e-3}
QUICK = {"context": 32, "batch": 4, "validation_windows": 8, "validate_every": 20, **RATES}
BLOCKS = {"method": "both", "block_windows": 16, "block_epochs": 2}
SHORT = {**QUICK, **BLOCKS, "tokens": 10 * 4 * 32, "validate_every": 4}


@pytest.fixture(scope="module")
def tuned(compressed, tiny_llama, tuning_text, tmp_path_factory):
    """(output folder, TuneResult) of a whole run."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, reallm.tune(compressed, out, text=(tuning_text,), reference=str(tiny_llama), **SHORT)


def same(one, other, files=("model.safetensors", "config.json")):
    return all(filecmp.cmp(one / file, other / file, shallow=False) for file in files)


def divergence(original, compressed, text):
    windows = load_windows([text], load_tokenizer(original), 32)[:16].ids
    with torch.no_grad():
        logits = [load(folder)(windows).logits.log_softmax(-1) for folder in (original, compressed)]
    return (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()


@pytest.mark.parametrize(
    "how",
    [
        {"method": "end-to-end"},
        {"method": "blockwise", "block_error": "outputs"},
    ],
    ids=str,
)
def test_tuning_brings_the_model_nearer_to_the_original(compressed, tiny_llama, tuning_text, text_file, tmp_path, how):
    reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), reference=str(tiny_llama), **how, **QUICK)
    before, after = (divergence(tiny_llama, folder, text_file) for folder in (compressed, tmp_path / "out"))
    assert after < 0.9 * before


def test_every_tensor_keeps_its_bytes_and_the_ledger_says_so(compressed, tuned):
    before, after = (read_ledger(folder) for folder in (compressed, tuned[0]))
    rows = [[row for row in ledger.rows if row.file != "config.json"] for ledger in (before, after)]
    assert rows[0] == rows[1] and before.bits_per_weight == after.bits_per_weight
    assert (compressed / "model.safetensors").stat().st_size == (tuned[0] / "model.safetensors").stat().st_size


def test_codes_stay_and_what_was_named_changes(compressed, tuned):
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (compressed, tuned[0]))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "scales",
        "scales_max",
        "left",
        "right",
        "left_scales",
        "right_scales",
        "gain",
        "codebook",
        "weight",
    }
    assert not any(name.endswith("codes") for name in changed)
    assert all(torch.equal(before[n], after[n]) for n in before if "embed_tokens" in n)


def test_block_by_block_what_lies_outside_of_blocks_is_not_counted(compressed, tiny_llama, tuning_text, tmp_path):
    options = {**SHORT, "method": "blockwise", "train": "norms", "reference": str(tiny_llama)}
    tuned = reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), **options)
    assert tuned.counts == {"norms": 2 * 2 * 64}  # two blocks; the last norm is outside them


def test_of_an_entropy_coded_artifact_the_codes_keep_their_bytes(tiny_llama, tuning_text, tmp_path):
    (tmp_path / "mine.yaml").write_text('rules: [{match: "*", format: {format: uniform, bits: 5, group_size: 16}}]')
    reallm.compress(tiny_llama, tmp_path / "in", recipe=str(tmp_path / "mine.yaml"), coding=True)
    options = {**SHORT, "method": "end-to-end", "reference": str(tiny_llama)}
    reallm.tune(tmp_path / "in", tmp_path / "out", text=(tuning_text,), **options)
    ledgers = [read_ledger(tmp_path / side) for side in ("in", "out")]
    rows = [{row.name: row.nbytes for row in ledger.rows if row.role == "codes"} for ledger in ledgers]
    assert rows[0] == rows[1] and any(matrix.coded for matrix in ledgers[0].compressed_matrices)
    assert divergence(tiny_llama, tmp_path / "out", tuning_text) < divergence(tiny_llama, tmp_path / "in", tuning_text)


def test_the_provenance_says_how_it_was_tuned(tuned):
    note = json.loads((tuned[0] / "config.json").read_text())["quantization_config"]["provenance"]["tuned"][0]
    assert note["method"] == "both" and note["steps"] == 10 and note["context"] == 32 and "loss" in note


def test_a_tuned_artifact_can_be_tuned_again(tuned, tiny_llama, tuning_text, tmp_path):
    options = {**SHORT, "method": "end-to-end", "loss": "ce", "tokens": 128}
    reallm.tune(tuned[0], tmp_path / "out", text=(tuning_text,), **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization_config"]["provenance"]["tuned"]) == 2


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    compressed, tiny_llama, tuning_text, tuned, tmp_path
):
    for seed, name in ((0, "one"), (1, "two")):
        reallm.tune(compressed, tmp_path / name, text=(tuning_text,), reference=str(tiny_llama), seed=seed, **SHORT)
    assert same(tuned[0], tmp_path / "one") and not same(tuned[0], tmp_path / "two", ["model.safetensors"])


def diverge(*_):
    raise Diverged


def in_step_eight(event):
    return event.get("step") == 8 and event["phase"] == "end-to-end"


@pytest.mark.parametrize("events", [2, 6, 8, 9, 15, 18])
def test_a_killed_run_goes_on_to_the_same_bytes(compressed, tiny_llama, tuning_text, tuned, tmp_path, events, killed):
    arguments = {"text": (tuning_text,), "reference": str(tiny_llama), **SHORT}
    with killed(at=events + 1) as kill:
        reallm.tune(compressed, tmp_path / "out", listener=kill, **arguments)
    assert not (tmp_path / "out").exists() and work_folder(tmp_path / "out").exists()
    reallm.tune(compressed, tmp_path / "out", resume=True, **arguments)
    assert same(tuned[0], tmp_path / "out") and not work_folder(tmp_path / "out").exists()


def test_a_run_killed_after_its_last_rename_is_finished_by_resume(
    compressed, tiny_llama, tuning_text, tuned, tmp_path, monkeypatch, killed
):
    arguments = {"text": (tuning_text,), "reference": str(tiny_llama), **SHORT}
    with monkeypatch.context() as patch, killed(at=1) as kill:
        patch.setattr("reallm.tuning.tuning_run.remove_work_folder", kill)
        reallm.tune(compressed, tmp_path / "out", **arguments)
    assert (tmp_path / "out").exists() and work_folder(tmp_path / "out").exists()
    reallm.tune(compressed, tmp_path / "out", resume=True, **arguments)
    assert same(tuned[0], tmp_path / "out") and not work_folder(tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="exists; give another --output"):
        reallm.tune(compressed, tmp_path / "out", resume=True, **arguments)


def test_an_adapter_killed_after_its_last_rename_is_finished_by_resume(
    compressed, tuning_text, tmp_path, monkeypatch, killed
):
    arguments = {"text": (tuning_text,), "loss": "ce", "adapter": 2, "context": 32, "batch": 4, "tokens": 256}
    with monkeypatch.context() as patch, killed(at=1) as kill:
        patch.setattr("reallm.tuning.tuning_run.remove_work_folder", kill)
        reallm.tune(compressed, tmp_path / "out", **arguments)
    found = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    reallm.tune(compressed, tmp_path / "out", resume=True, **arguments)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == found
    assert not work_folder(tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="exists; give another --output"):
        reallm.tune(compressed, tmp_path / "out", resume=True, **arguments)


def test_the_checksums_of_a_tuned_artifact_are_its_own(compressed, tuned, tmp_path):
    load(tuned[0])
    shutil.copytree(tuned[0], tmp_path / "mixed")
    shutil.copyfile(compressed / "model.safetensors", tmp_path / "mixed" / "model.safetensors")
    with pytest.raises(ArtifactError, match="is not as it was written"):
        load(tmp_path / "mixed")


def test_a_resumed_run_does_not_do_finished_work_again(compressed, tiny_llama, tuning_text, tmp_path, killed):
    arguments = {"text": (tuning_text,), "reference": str(tiny_llama), **SHORT}
    with killed(when=in_step_eight) as kill:
        reallm.tune(compressed, tmp_path / "out", listener=kill, **arguments)
    again = reallm.tune(compressed, tmp_path / "out", resume=True, **arguments).events
    assert not [event for event in again if event["phase"] == "block"]
    assert min(event["step"] for event in again if event["phase"] == "end-to-end") == 5


STATES = ["block-00000.safetensors", "step.safetensors", "best.safetensors"]
DAMAGES = [(file, damage) for file in STATES for damage in ("cut", "other names", "other shapes")]


@pytest.mark.parametrize(("file", "damage"), [*DAMAGES, ("step.safetensors", "beyond the end")])
def test_a_damaged_state_is_one_error_that_names_its_file(
    compressed, tiny_llama, tuning_text, tmp_path, file, damage, killed
):
    arguments = {"text": (tuning_text,), "reference": str(tiny_llama), **SHORT}
    with killed(when=in_step_eight) as kill:
        reallm.tune(compressed, tmp_path / "out", listener=kill, **arguments)
    path = work_folder(tmp_path / "out") / file
    if file.startswith("block"):  # read only while no step was saved
        (path.parent / "step.safetensors").unlink()
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "other names":
        save_file({f"x{name}": tensor for name, tensor in tensors.items()}, path)
    elif damage == "other shapes":  # would broadcast
        save_file({name: tensor.reshape(-1)[:1].clone() for name, tensor in tensors.items()}, path)
    else:
        save_file(tensors | {"steps": torch.tensor([10**6])}, path)
    with pytest.raises(ArtifactError, match=file if damage != "beyond the end" else "is of step 1000000 of"):
        reallm.tune(compressed, tmp_path / "out", resume=True, **arguments)


def test_a_log_that_cannot_be_written_is_refused_before_any_work(compressed, tiny_llama, tuning_text, tmp_path):
    arguments = {"text": (tuning_text,), "reference": str(tiny_llama), **SHORT}
    for log in (tmp_path / "no" / "log", tmp_path):
        with pytest.raises(RecipeError, match="--log .*: not a file in an existing folder"):
            reallm.tune(compressed, tmp_path / "out", log=log, **arguments)
        assert not list(tmp_path.iterdir())


def test_other_settings_are_refused_on_resume(compressed, tiny_llama, tuning_text, tmp_path, killed):
    arguments = {"text": (tuning_text,), "reference": str(tiny_llama), **SHORT}

    def stop(event):  # once there is something to resume from
        if event["phase"] == "validation":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reallm.tune(compressed, tmp_path / "out", listener=stop, **arguments)
    with pytest.raises(RecipeError, match="--resume: learning rate was 0.005 and is now 0.0001; go back"):
        reallm.tune(compressed, tmp_path / "out", resume=True, **{**arguments, "learning_rate": 1e-4})
    with pytest.raises(RecipeError, match="--resume: block error was loss and is now outputs; go back"):
        reallm.tune(compressed, tmp_path / "out", resume=True, **{**arguments, "block_error": "outputs"})


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "ce"},
        {"loss": "mix"},
        {"top_k": 16},
        {"save_memory": True},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_end_to_end_lowers_its_loss_in_every_way(compressed, tiny_llama, tuning_text, tmp_path, settings):
    options = {**QUICK, "method": "end-to-end", "reference": str(tiny_llama), **settings}
    figures = reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), **options).end_to_end
    key = "ce" if settings.get("loss") == "ce" else "kl"
    assert figures["after"][key] < 0.95 * figures["before"][key]


def losses(compressed, tiny_llama, tuning_text, out, **settings):
    options = {**SHORT, "method": "end-to-end", "reference": str(tiny_llama), "tokens": 3 * 4 * 32, **settings}
    events = reallm.tune(compressed, out, text=(tuning_text,), **options).events
    return torch.tensor([event["loss"] for event in events if event["phase"] == "end-to-end"])


@pytest.mark.parametrize(
    "settings", [{"micro_batch": 1}, {"checkpointing": False}, {"save_memory": True}, {"top_k": 512}], ids=str
)
def test_how_it_is_computed_changes_no_loss(compressed, tiny_llama, tuning_text, tmp_path, settings):
    plain = losses(compressed, tiny_llama, tuning_text, tmp_path / "one")
    other = losses(compressed, tiny_llama, tuning_text, tmp_path / "two", **settings)
    torch.testing.assert_close(plain, other, rtol=5e-3 if "top_k" in settings else 1e-4, atol=0)


def test_logits_in_chunks_give_the_same_loss(compressed, tiny_llama, tuning_text, tmp_path, monkeypatch):
    plain = losses(compressed, tiny_llama, tuning_text, tmp_path / "one")
    monkeypatch.setattr("reallm.tuning.losses.CHUNK_VALUES", {"cpu": 512 * 7})
    torch.testing.assert_close(plain, losses(compressed, tiny_llama, tuning_text, tmp_path / "two"), rtol=1e-5, atol=0)


def test_what_validation_sees_is_what_the_file_holds(compressed, tiny_llama, tuning_text, tmp_path):
    options = {**QUICK, "method": "end-to-end", "reference": str(tiny_llama)}
    seen = reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), **options).end_to_end["after"]["kl"]
    windows = split_windows(load_windows([tuning_text], load_tokenizer(tiny_llama), 32), 8, 0)[1].ids
    with torch.no_grad():
        logits = [load(folder)(windows).logits[:, :-1].log_softmax(-1) for folder in (tiny_llama, tmp_path / "out")]
    held = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    assert abs(held - seen) / seen < 1e-6


def test_blocks_end_no_worse_than_they_began(compressed, tiny_llama, tuning_text, tmp_path):
    options = {**SHORT, "method": "blockwise", "block_learning_rate": 3.0}  # far too high
    events = reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), reference=str(tiny_llama), **options).events
    errors = [event for event in events if event["phase"] == "block"]
    assert {event["block"] for event in errors} == {0, 1}
    # Later errors were worse, so the initial parameters are restored.
    assert errors[0]["validation"] < errors[1]["validation"]
    assert same(compressed, tmp_path / "out", ["model.safetensors"])


def test_a_loss_that_is_not_finite_ends_with_the_last_good_parameters(
    compressed, tiny_llama, tuning_text, tmp_path, monkeypatch
):
    step, calls = end_to_end._LossEvaluator.sums, iter(range(1000))

    def poisoned(self, windows, rows, kind):
        loss, sums = step(self, windows, rows, kind)
        return (loss * float("nan") if kind == "training" and next(calls) == 6 else loss), sums

    monkeypatch.setattr(end_to_end._LossEvaluator, "sums", poisoned)
    options = {**SHORT, "method": "end-to-end", "reference": str(tiny_llama)}
    figures = reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), **options).end_to_end
    assert figures["stopped"] == "loss or gradient not finite at step 7" and figures["best_step"] == 4
    assert all(p.isfinite().all() for p in load(tmp_path / "out").parameters())
    assert divergence(tiny_llama, tmp_path / "out", tuning_text) < divergence(tiny_llama, compressed, tuning_text)


def test_a_loss_that_is_never_finite_is_an_error(compressed, tiny_llama, tuning_text, tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end.Optimizer, "step", diverge)
    options = {**SHORT, "method": "end-to-end", "reference": str(tiny_llama)}
    with pytest.raises(
        SourceError, match=f"not finite before the first step.*the original model .{tiny_llama}. and in the"
    ):
        reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_diverges_keeps_its_best_parameters(compressed, tiny_llama, tuning_text, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise.Optimizer, "step", diverge)
    options = {**SHORT, "method": "blockwise"}
    reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), reference=str(tiny_llama), **options)
    assert same(compressed, tmp_path / "out", ["model.safetensors"])


def curve(events):
    """Return the losses of steps and the errors or KL of validations."""
    silent = ("begin", "gradients")
    return torch.tensor([e.get("loss", e.get("validation", e.get("kl"))) for e in events if e["phase"] not in silent])


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])  # through gloo, through NCCL
def test_two_processes_give_the_loss_curve_of_one(compressed, tiny_llama, tuning_text, tmp_path, device):
    script = tmp_path / "tune.py"
    script.write_text("import sys\nfrom reallm.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    settings = {**SHORT, "tokens": 5 * 4 * 32, "device": device, "dtype": "float32"}
    words = [str(compressed), "--text", tuning_text, "--reference", str(tiny_llama), "-o", str(tmp_path / "two")]
    words += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    done = subprocess.run(
        [*starter, str(script), "tune", *words, "--log", str(tmp_path / "log")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained") == 1  # one process prints
    of_two = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    one = reallm.tune(compressed, tmp_path / "one", text=(tuning_text,), reference=str(tiny_llama), **settings)
    torch.testing.assert_close(curve(of_two), curve(one.events), rtol=1e-3, atol=1e-5)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(RecipeError, match="--batch 4 cannot be split evenly over 3 processes"):
        ProcessGroup(0, 3).check_batch("--batch", 4)


def test_windows_are_drawn_once_each_and_then_again():
    steps = torch.cat([draw_batch(10, 4, step, seed=0) for step in range(5)])
    assert steps[:10].sort().values.tolist() == steps[10:].sort().values.tolist() == list(range(10))
    assert steps[:10].tolist() != steps[10:].tolist()


def test_validation_windows_do_not_train(tiny_llama, tuning_text):
    windows = load_windows([tuning_text], load_tokenizer(tiny_llama), 32)
    training, validation = split_windows(windows, 8, seed=0)
    assert len(validation) == 8 and len(training) + 8 == len(windows)
    rows = {tuple(row) for row in training.ids.tolist()}
    assert not rows & {tuple(row) for row in validation.ids.tolist()}


def test_of_prompts_and_responses_the_responses_count(tiny_llama, tmp_path):
    tokenizer = load_tokenizer(tiny_llama)
    rows = [{"prompt": "What does the river hold?\n", "response": " Stone and light."}] * 20
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    windows = load_windows([tmp_path / "task.jsonl"], tokenizer, 24)
    flat, counted = windows.ids.flatten(), windows.loss_mask.flatten()
    text = tokenizer.decode(flat[counted])
    assert "light" in text and "river" not in text and (flat[counted] == tokenizer.eos_token_id).any()
    assert not windows.loss_mask[:, 0].any()


def test_windows_inside_a_long_prompt_are_left_out(compressed, tiny_llama, tmp_path):
    path, words = tmp_path / "long.jsonl", "the river holds stone " * 30
    path.write_text("\n".join(json.dumps({"prompt": words, "response": " Light."}) for _ in range(8)))
    windows = load_windows([path], load_tokenizer(tiny_llama), 32)
    assert 2 <= len(windows) <= 16 and windows.loss_mask.any(1).all()
    done = reallm.tune(compressed, tmp_path / "out", text=(str(path),), loss="ce", context=32, batch=1, tokens=640)
    assert done.end_to_end["steps"] == 20  # a step without a gradient would have raised


def test_responses_too_rare_for_two_windows_say_so(tiny_llama, tmp_path):
    path = tmp_path / "rare.jsonl"
    path.write_text(json.dumps({"prompt": "the river holds stone " * 99, "response": ""}))
    with pytest.raises(TextError, match=r"rare.jsonl: [01] of \d+ windows of 32 contain a token of a response"):
        load_windows([path], load_tokenizer(tiny_llama), 32)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "What?"}', 'line 3: no "response" field with a string in it'),
        ('{"prompt": "What?", "response": null}', 'line 3: no "response" field'),
        ('{"text": "A river."}', 'line 3: no "prompt" field'),
        ("[1]", 'line 3: no "prompt" field'),
        ('{"prompt": ', "line 3, column 12: not JSON"),
    ],
)
def test_of_prompts_and_responses_the_line_that_is_not_one_is_named(tiny_llama, tmp_path, line, says):
    good, path = json.dumps({"prompt": "What?", "response": " Stone."}), tmp_path / "task.jsonl"
    path.write_text("\n".join([good, good, line, good]))
    with pytest.raises(TextError, match=f"task.jsonl, {says}"):
        load_windows([path], load_tokenizer(tiny_llama), 4)


def test_prompts_and_responses_may_begin_with_a_byte_order_mark(tiny_llama, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"prompt": "What?", "response": " Stone and light." * 9}), encoding="utf-8-sig")
    assert len(load_windows([path], load_tokenizer(tiny_llama), 4)) > 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--text", "missing.txt"], "missing.txt: no such file; --text takes"),
        (["--validation", "missing.txt"], "missing.txt: no such file; --validation takes"),
        (["--train", "scales,codes"], "--train 'codes' is not one of residual, scales"),
        (["--train", "embedding"], "--train embedding: names no parameter group"),
        (["--train", "outliers"], "--train outliers: this model has none of them"),
        (["--method", "fast"], "--method 'fast' is not one of blockwise, end-to-end, both"),
        (["--block-error", "plain"], "--block-error 'plain' is not one of loss, outputs"),
        (["--loss", "mse"], "--loss 'mse' is not one of kl, ce, mix"),
        (["--context", "1024"], "--context 1024 is longer than the 512 positions"),
        (["--batch", "0"], "--batch 0 is below 1"),
        (["--learning-rate", "0"], "--learning-rate 0.0 is not above 0"),
        (["--learning-rate", "1e38"], "--learning-rate 1e+38 is not above 0 and at most 1e+30"),
        (["--method", "blockwise", "--train", "norms,embedding"], "remove --train embedding"),
        (["--device", "cuda:77"], "--device 'cuda:77' is not available"),
        (["--reference", "nowhere/at/all"], "nowhere/at/all: no such file"),
        (["--batch", "4096", "--method", "both"], "use a smaller --batch"),
        (["--adapter", "4", "--train", "norms"], "--adapter 4 trains only new residuals; remove --train norms"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_2(compressed, tiny_llama, tuning_text, tmp_path, capsys, options, says):
    given = dict(zip(options[::2], options[1::2], strict=True))
    usual = {"--text": tuning_text, "--reference": str(tiny_llama), "--context": "32"}
    words = [word for pair in (usual | given).items() for word in pair]
    assert main(["tune", str(compressed), "-o", str(tmp_path / "out"), *words]) == 2
    assert says in capsys.readouterr().err


def test_no_output_lies_in_a_compressed_model(compressed, tuning_text, tmp_path, capsys):
    shutil.copytree(compressed, tmp_path / "made")
    out = tmp_path / "made" / "tuned"
    assert main(["tune", str(compressed), "-o", str(out), "--text", tuning_text, "--loss", "ce"]) == 2
    assert f"{out} would lie in {tmp_path / 'made'} and count towards its bytes" in capsys.readouterr().err


def test_the_default_tunes_the_whole_model_and_no_block(compressed, tiny_llama, tuning_text, tmp_path):
    settings = {**QUICK, "tokens": 128, "validate_every": 1}
    events = reallm.tune(
        compressed, tmp_path / "out", text=(tuning_text,), reference=str(tiny_llama), **settings
    ).events
    assert {event["phase"] for event in events} == {"begin", "end-to-end", "validation"}


def test_the_original_is_needed_for_its_outputs(compressed, tuning_text, tmp_path):
    with pytest.raises(RecipeError, match="needs the original model: give --reference MODEL"):
        reallm.tune(compressed, tmp_path / "out", text=(tuning_text,))


def test_an_original_of_other_blocks_is_refused(compressed, tuning_text, tmp_path, tiny_llama):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers = 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "shallow")
    with pytest.raises(SourceError, match="the original model has 1 blocks of width 64, the compressed model 2"):
        reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), reference=str(tmp_path / "shallow"), **SHORT)


def test_too_little_text_says_so(compressed, tiny_llama, jsonl_file, tmp_path):
    with pytest.raises(TextError, match="tokens do not fill two windows of 400; lower --context"):
        options = {"reference": str(tiny_llama), "context": 400}
        reallm.tune(compressed, tmp_path / "out", text=(str(jsonl_file),), **options)


def test_the_command_says_what_it_did(compressed, tiny_llama, tuning_text, tmp_path, capsys):
    words = [
        "--text",
        tuning_text,
        "--reference",
        str(tiny_llama),
        "--context",
        "32",
        "--tokens",
        "512",
        "--batch",
        "4",
    ]
    assert (
        main(["tune", str(compressed), "-o", str(tmp_path / "out"), *words, "--method", "both", "--block-windows", "8"])
        == 0
    )
    out = capsys.readouterr().out
    assert "trained" in out and "KL" in out and "blocks      2 tuned" in out
    bits = out.rsplit("bits", 1)[1].split()
    assert bits[0] == bits[4]


def another_original(source, folder):
    """The same vocabulary and shapes, different weights."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_another_original_of_the_same_tokens_is_a_warning(compressed, tiny_llama, tuning_text, tmp_path, capsys):
    words = ["--text", tuning_text, "--context", "32", "--tokens", "128", "--batch", "4"]
    other = another_original(tiny_llama, tmp_path / "other")
    for name, warned in ((other, True), (str(tiny_llama), False)):
        out = tmp_path / ("first" if warned else "second")
        assert main(["tune", str(compressed), "-o", str(out), *words, "--reference", name]) == 0
        err = " ".join(capsys.readouterr().err.split())
        assert (f"warning: --reference {name} is not the source model of {compressed}" in err) == warned


def test_an_original_of_other_tokens_is_refused(compressed, tiny_llama, tuning_text, tmp_path):
    other = another_original(tiny_llama, tmp_path / "other")
    tokenizer = (tmp_path / "other" / "tokenizer.json").read_text(encoding="utf-8")
    assert '"</s>"' in tokenizer
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer.replace('"</s>"', '"</t>"'), encoding="utf-8")
    config = (tmp_path / "other" / "tokenizer_config.json").read_text(encoding="utf-8")
    (tmp_path / "other" / "tokenizer_config.json").write_text(config.replace('"</s>"', '"</t>"'), encoding="utf-8")
    with pytest.raises(SourceError, match="other: its tokenizer differs from the artifact's"):
        reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), reference=other, **SHORT)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_the_kl_of_the_likeliest_tokens_is_called_that(compressed, tiny_llama, tuning_text, tmp_path, capsys):
    words = [
        "--text",
        tuning_text,
        "--reference",
        str(tiny_llama),
        "--context",
        "32",
        "--tokens",
        "256",
        "--batch",
        "4",
    ]
    log = tmp_path / "log"
    words += ["--top-k", "4", "--log", str(log)]
    assert main(["tune", str(compressed), "-o", str(tmp_path / "out"), *words]) == 0
    out, err = capsys.readouterr()
    assert (
        "\ntop-k KL    " in out
        and "teacher's top 4 tokens, all others as one: lower than the KL that eval measures" in out
    )
    assert "validation top-4 KL" in err and "\nKL " not in out and "validation KL" not in err
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(event["top_k"] == 4 for event in events if "kl" in event)


@pytest.mark.parametrize("name", ["nowhere/log", "l" * 300, ""])
def test_the_command_says_that_a_log_cannot_be_written_and_leaves_nothing(
    compressed, tuning_text, tmp_path, capsys, name
):
    words = ["--text", tuning_text, "--context", "32", "--loss", "ce", "--log", str(tmp_path / name)]
    assert main(["tune", str(compressed), "-o", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert "not a file in an existing folder that can be written" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
