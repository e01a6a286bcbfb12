"""One budget for the whole file: met, never exceeded, or refused before any work."""

import importlib.util
import json
import re

import pytest
import torch
import yaml

import reallm
from reallm.allocate.candidates import calibrated_candidates
from reallm.allocate.loss_prediction import load_corrections
from reallm.allocate.options import parse_size
from reallm.checkpoint import read_ledger, read_manifest
from reallm.errors import RecipeError
from reallm.formats import from_spec
from reallm.pipeline import Settings, prepare, run
from reallm.pipeline.artifact_size import ArtifactSize, nbytes_by_file
from reallm.pipeline.job import RESERVED_FOR_TUNING

CALIBRATION = {"calibration_windows": 6, "calibration_context": 64}


def total(folder):
    return sum(nbytes_by_file(folder).values())


def taken(folder):
    """Bytes of a size that are used: what is left for notes of tuning counts."""
    return total(folder) + RESERVED_FOR_TUNING


def test_the_foretold_bytes_are_those_of_the_files(tiny_llama, tmp_path):
    for number, settings in enumerate(({"bits": 3}, {"recipe": "mixed", "exclude": ("*.1.*",), "embedding": "keep"})):
        job = prepare(tiny_llama, Settings(**settings))
        run(job, tmp_path / str(number))
        assert ArtifactSize(job).nbytes(job.plan) == total(tmp_path / str(number))


@pytest.mark.parametrize("size", [63_000, 74_000, 75_000, 75_500, 100_001, 180_000])
def test_a_size_is_met_within_half_a_percent_and_never_exceeded(tiny_llama, tmp_path, size):
    reallm.compress(tiny_llama, tmp_path / "out", size=size)
    assert 0.995 * size <= taken(tmp_path / "out") <= size
    assert torch.isfinite(reallm.load(tmp_path / "out")(torch.arange(8)[None]).logits).all()


def test_what_is_fitted_again_for_a_size_is_told(tiny_llama, tmp_path):
    told = []
    job = prepare(tiny_llama, Settings(size=80_000))
    run(job, tmp_path / "out", progress=lambda name, done, total: told.append((name, done)))
    again = [re.fullmatch(r"([\d,]+) bytes for 80,000; matrices in other formats: (\d+)", name) for name, _ in told]
    rounds = [(int(m[1].replace(",", "")), int(m[2])) for m in again if m]
    assert rounds and all(count > 0 and not 79_600 <= nbytes <= 80_000 for nbytes, count in rounds)
    assert all(done == 0 for (_, done), m in zip(told, again, strict=True) if m)


def test_bits_per_parameter_are_those_of_the_ledger(tiny_llama, tmp_path):
    reallm.compress(tiny_llama, tmp_path / "out", bits_per_parameter=7.5)
    ledger = read_ledger(tmp_path / "out")
    assert 0.995 * 7.5 <= 8 * taken(tmp_path / "out") / ledger.parameters <= 7.5
    assert 8 * total(tmp_path / "out") / ledger.parameters == ledger.bits_per_parameter


@pytest.mark.parametrize("size", [70_000, 110_000])
def test_a_size_with_calibration_is_met_and_a_second_budget_asks_the_model_nothing(
    tiny_llama, text_file, tmp_path, size, monkeypatch
):
    settings = {"calibration": (str(text_file),), "analysis": str(tmp_path / "cache"), **CALIBRATION}
    reallm.compress(tiny_llama, tmp_path / "out", size=size, **settings)
    assert 0.995 * size <= taken(tmp_path / "out") <= size
    monkeypatch.setattr("reallm.pipeline.budget.compute_analysis", None)
    small, large = (prepare(tiny_llama, Settings(size=size + more, **settings)).forecast for more in (0, 20_000))
    assert small.calibrated and large.loss < small.loss


def test_too_small_a_size_names_the_smallest_possible_which_then_works(tiny_llama, tmp_path):
    with pytest.raises(RecipeError, match=r"smallest possible is ([\d,]+) bytes .*of tokenizer") as caught:
        prepare(tiny_llama, Settings(size=30_000))
    least = int(str(caught.value).split("possible is ")[1].split(" bytes")[0].replace(",", ""))
    reallm.compress(tiny_llama, tmp_path / "out", size=least)
    assert 0.98 * least < total(tmp_path / "out") <= least


def test_a_size_that_the_tokenizer_alone_exceeds_says_so(tiny_llama):
    with pytest.raises(RecipeError, match=r"--size 9,000 bytes is too small: .*1\d,\d\d\d of tokenizer"):
        prepare(tiny_llama, Settings(size=9_000))


def test_more_bytes_than_the_model_has_use_for_are_refused_naming_the_most(tiny_llama):
    with pytest.raises(RecipeError, match="the largest useful is"):
        prepare(tiny_llama, Settings(size=900_000))


@pytest.mark.parametrize("text", ["60MB", "60 mb", "60000KB", "0.06GB", "60000000", "57.220458984375MiB"])
def test_sizes_are_read_in_decimal_and_binary_units(text):
    assert parse_size(text) == 60_000_000


@pytest.mark.parametrize("text", ["", "MB", "60TB", "-3MB", "0", "sixty", "1e6"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("goal", [{}, {"bits": 3, "size": 10}, {"bits_per_parameter": 2.0, "size": 10}])
def test_one_goal_is_given(tiny_llama, goal):
    with pytest.raises(RecipeError, match="give one of --bits, --size, --bits-per-parameter, --recipe"):
        prepare(tiny_llama, Settings(**goal))


@pytest.mark.parametrize("kept", [{"embedding": "keep"}, {"exclude": ("*.1.*",)}, {"rank": 2}])
def test_what_is_kept_or_added_is_inside_the_size(tiny_llama, tmp_path, kept):
    size = 150_000 if "rank" in kept else 235_000
    reallm.compress(tiny_llama, tmp_path / "out", size=size, **kept)
    assert 0.995 * size <= taken(tmp_path / "out") <= size


def test_an_interrupted_run_with_a_size_goes_on_to_the_same_bytes(tiny_llama, tmp_path, killed):
    job = prepare(tiny_llama, Settings(size=81_000))
    calls = []
    run(job, tmp_path / "whole", progress=lambda *values: calls.append(values))
    assert len(calls) > 15, "nothing was fitted again: the size should be one that asks for it"
    for number in (5, 16, 29):
        out = tmp_path / str(number)
        with killed(at=number + 1) as kill:
            run(job, out, progress=kill)
        run(job, out, resume=True)
        for file in (tmp_path / "whole").iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes()


def cli(*arguments):
    from reallm.cli import main

    return main([*map(str, arguments)])


def plan(*arguments):
    assert cli("plan", *arguments) == 0


CALIBRATED = ("--analysis-windows", 4, "--analysis-context", 64)


def test_a_plan_is_written_edited_and_carried_out_as_it_says(tiny_llama, text_file, tmp_path):
    file = tmp_path / "plan.yaml"
    plan(tiny_llama, "-o", file, "--size", "80KB", "--calibration", text_file, *CALIBRATED)
    text = file.read_text()
    assert text.count(" bytes, ") == 15 and text.count(" loss ") >= 15  # beside every matrix, the embedding too
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if "layers.1.self_attn.q_proj" in line)
    lines[place] = '- {match: "model.layers.1.self_attn.q_proj", format: {format: uniform, bits: 7}}'
    file.write_text("\n".join(lines))
    reallm.compress(tiny_llama, tmp_path / "out", recipe=str(file))
    wanted = {rule["match"]: rule["format"] for rule in yaml.safe_load(file.read_text())["rules"]}
    found = {m.name: m for m in read_ledger(tmp_path / "out").compressed_matrices}
    for name, spec in wanted.items():
        assert from_spec(spec) == found[name].fmt
    assert found["model.layers.1.self_attn.q_proj"].fmt.bits == 7
    assert yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["coding"] is True


def formats_of(folder):
    return {matrix.name: matrix.fmt for matrix in read_ledger(folder).compressed_matrices}


def name_of(folder):
    (name,) = {yaml.safe_load((folder / "plan.yaml").read_text())["name"], read_manifest(folder).provenance["recipe"]}
    return name


def test_a_recipe_that_fits_the_size_is_kept_however_little_of_it_it_takes(tiny_llama, tmp_path):
    reallm.compress(tiny_llama, tmp_path / "out", recipe="rtn4", size=120_000)
    assert total(tmp_path / "out") < 0.9 * 120_000 and name_of(tmp_path / "out") == "rtn4"
    assert {fmt.name for fmt in formats_of(tmp_path / "out").values()} == {"uniform"}


def test_a_calibrated_plan_is_kept_by_its_size_without_the_text(tiny_llama, text_file, tmp_path, capsys):
    file, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan(tiny_llama, "-o", file, "--size", "75KB", "--calibration", text_file, *CALIBRATED)
    assert cli("compress", tiny_llama, "-o", out, "--recipe", file, "--size", "75KB") == 0
    rules = {rule["match"]: from_spec(rule["format"]) for rule in yaml.safe_load(file.read_text())["rules"]}
    assert formats_of(out).items() >= rules.items() and total(out) <= 75_000
    assert "changed to fit" not in capsys.readouterr().out


def test_a_recipe_a_little_too_large_for_the_size_is_changed_in_few_matrices_and_says_so(tiny_llama, tmp_path, capsys):
    reallm.compress(tiny_llama, tmp_path / "whole", recipe="rtn4", coding=True)
    size = total(tmp_path / "whole") - 1_500
    arguments = ("compress", tiny_llama, "-o", tmp_path / "out", "--recipe", "rtn4", "--size", size)
    assert cli(*arguments, "--dry-run") == 0 and " too many; " in capsys.readouterr().out
    assert cli(*arguments) == 0
    assert total(tmp_path / "out") <= size and name_of(tmp_path / "out") == f"rtn4, changed to fit {size} bytes"
    whole, out = formats_of(tmp_path / "whole"), formats_of(tmp_path / "out")
    changed = [name for name in whole if whole[name] != out[name]]
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(changed) <= 3 and f"{len(changed)} of 15 matrices changed to fit the size" in lines
    assert all(any(line.startswith(name) for line in lines) for name in changed)


@pytest.mark.parametrize("size", [50_000, 9_000])
def test_a_recipe_much_too_large_for_the_size_is_refused_before_any_work(tiny_llama, size):
    with pytest.raises(
        RecipeError, match=r"recipe rtn4 takes about 10\d,\d{3} bytes, [\d,]+ more than .*give --size 10"
    ):
        prepare(tiny_llama, Settings(recipe="rtn4", size=size))


def test_an_interrupted_run_that_changes_a_recipe_goes_on_to_the_same_bytes(tiny_llama, tmp_path, killed):
    reallm.compress(tiny_llama, tmp_path / "fits", recipe="rtn4", coding=True)
    size = total(tmp_path / "fits") - 1_500
    job = prepare(tiny_llama, Settings(recipe="rtn4", size=size))
    run(job, tmp_path / "whole")
    with killed(at=16) as kill:
        run(job, tmp_path / "out", progress=kill)
    assert (tmp_path / "out.work" / "changed.json").is_file(), "killed before anything was changed"
    with pytest.raises(RecipeError, match=f"size was {size} bytes and is now 99000"):
        run(prepare(tiny_llama, Settings(recipe="rtn4", size=99_000)), tmp_path / "out", resume=True)
    run(job, tmp_path / "out", resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_the_frontier_holds_a_point_for_every_size(tiny_llama, tmp_path):
    plan(tiny_llama, "-o", tmp_path / "frontier.json", "--sizes", "70KB,90KB,140KB")
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    assert [point["size"] for point in points] == [70_000, 90_000, 140_000]
    losses = [point["loss"] for point in points]
    assert losses == sorted(losses, reverse=True) and all(len(point["plan"]) == 15 for point in points)


def test_the_frontier_is_drawn_where_matplotlib_is(tiny_llama, tmp_path):
    pytest.importorskip("matplotlib")
    plan(tiny_llama, "-o", tmp_path / "frontier.json", "--sizes", "90KB,70KB")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "goal", "says"),
    [
        ("text.txt", "--sizes", "the file is written as JSON; name it .json"),
        ("text.txt", "--size", "the file is written as YAML; name it .yaml"),
        ("z.yaml", "--sizes", "name it .json"),
        ("z.json", "--size", "name it .yaml"),
        ("plan.yaml", "--size", "plan.yaml exists; give another name or remove it"),
        ("frontier.json", "--sizes", "frontier.json exists; give another name or remove it"),
        ("drawn.json", "--sizes", "drawn.png exists; give another name or remove it"),
        ("no/plan.yaml", "--size", "does not exist; make it first"),
    ],
)
def test_a_plan_is_not_written_over_a_file_nor_under_a_suffix_of_another_kind(
    tiny_llama, tmp_path, capsys, name, goal, says
):
    from reallm.cli import main

    for there in ("text.txt", "plan.yaml", "frontier.json", "drawn.png"):
        (tmp_path / there).write_text("mine")
    assert main(["plan", str(tiny_llama), "-o", str(tmp_path / name), goal, "80KB"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --output") and says in err and err.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "plan.yaml", "frontier.json", "drawn.png"}
    assert all(file.read_text() == "mine" for file in tmp_path.iterdir())


def test_bits_with_calibration_are_met_and_chosen_by_the_end_loss(tiny_llama, text_file):
    for bits in (2.5, 4.0):
        job = prepare(tiny_llama, Settings(bits=bits, calibration=(str(text_file),), **CALIBRATION))
        assert job.forecast.calibrated and 0.99 * bits <= job.plan.block_bits <= bits


def test_corrections_that_are_no_mapping_are_one_line_without_a_stray_colon(tmp_path):
    (tmp_path / "text.txt").write_text("once upon a time")
    with pytest.raises(RecipeError, match=r"text\.txt: the file: input should be"):
        load_corrections(tmp_path / "text.txt")


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_budget_says_which_candidates_lack_their_package(tiny_llama, tmp_path, capsys, monkeypatch, command):
    from reallm.cli import main

    find = importlib.util.find_spec
    gone = {"constriction"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    calibrated_candidates.cache_clear()
    goal = ["--size", "80KB", *(["--dry-run"] if command == "compress" else [])]
    for name, said in (("a.yaml", 1), ("b.yaml", 0)):
        assert main([command, str(tiny_llama), "-o", str(tmp_path / name), *goal]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "constriction" in line]
        assert len(lines) == said and all('pip install ".[entropy]"' in line for line in lines)
        gone.clear()
        calibrated_candidates.cache_clear()


def test_corrections_change_what_is_chosen(tiny_llama, text_file, tmp_path):
    def bits_of(role, **changes):
        cache = str(tmp_path / "cache")
        goal = {"bits": 4.0, "calibration": (str(text_file),), "analysis": cache, **CALIBRATION}
        job = prepare(tiny_llama, Settings(**goal, **changes))
        entries = [e for e in job.plan.entries if e.matrix.role == role]
        return sum(8 * e.nbytes / e.matrix.weights for e in entries) / len(entries), job

    file = tmp_path / "corrections.yaml"
    file.write_text(
        "factors: {q: 50}\ncandidates: {block: "
        + json.dumps(
            [
                {"format": "uniform", "bits": b, "symmetric": True, "group_size": g}
                for b in range(2, 9)
                for g in (0, 32, 64)
            ]
        )
        + "}"
    )
    before, _ = bits_of("q")
    after, job = bits_of("q", corrections=str(file))
    assert after > before + 0.5
    assert {e.fmt.name for e in job.plan.entries if e.matrix.kind == "block"} == {"uniform"}
    file.write_text("losses: [{match: '*', format: {format: uniform, bits: 8}, loss: nonsense}]")
    with pytest.raises(RecipeError, match="corrections.yaml: losses.0.loss"):
        bits_of("q", corrections=str(file))


def codewords_of(plan):
    names = {table for entry in plan.entries for table in entry.fmt.shared_decoders()}
    assert names == set(plan.shared_decoders) and all(name.startswith("codeword_") for name in names)
    return [entry for entry in plan.entries if entry.fmt.shared_decoders()]


@pytest.fixture
def large_ones(tmp_path):
    """Candidates that leave all that is small to neural ones: for a model this small a decoder is dear."""
    file = tmp_path / "large.yaml"
    specs = [{"format": "uniform", "bits": bits, "group_size": size} for bits in (3, 4, 8) for size in (0, 32, 64)]
    file.write_text(json.dumps({"candidates": {"block": specs}}))
    return str(file)


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0])
def test_neural_candidates_keep_to_the_bits_with_the_decoders_they_share(tiny_llama, large_ones, tmp_path, bits):
    job = prepare(tiny_llama, Settings(bits=bits, candidates=("neural",), corrections=large_ones))
    assert codewords_of(job.plan) and 0.99 * bits <= job.plan.block_bits <= bits
    run(job, tmp_path / "out")
    assert read_ledger(tmp_path / "out").sum_bytes("role")["decoders"] > 0
    assert ArtifactSize(job).nbytes(job.plan) == total(tmp_path / "out")


def test_neural_candidates_keep_to_a_size(tiny_llama, text_file, tmp_path):
    only = tmp_path / "codewords.yaml"
    only.write_text("candidates: {block: [{format: uniform, bits: 8}, {format: uniform, bits: 4}]}")
    settings = {
        "size": 80_000,
        "candidates": ("neural",),
        "corrections": str(only),
        "analysis": str(tmp_path / "cache"),
    }
    job = prepare(tiny_llama, Settings(calibration=(str(text_file),), **settings, **CALIBRATION))
    assert codewords_of(job.plan)
    run(job, tmp_path / "out")
    assert 0.995 * 80_000 <= taken(tmp_path / "out") <= 80_000
    assert torch.isfinite(reallm.load(tmp_path / "out")(torch.arange(8)[None]).logits).all()


def test_decoders_that_a_model_is_too_small_for_are_not_shared(tiny_llama, tmp_path):
    file = tmp_path / "corrections.yaml"
    dear = {"format": "codeword", "index_bits": 8, "digit_bits": 8, "vector_dim": 32, "hidden": 0, "decoder_bits": 16}
    dear["shared"] = "dear"
    plain = [{"format": "normal_float", "bits": bits} for bits in (1, 2)]
    file.write_text(
        json.dumps({"candidates": {"block": [dear, *plain]}, "losses": [{"match": "*", "format": dear, "loss": 0.0}]})
    )
    plan = prepare(tiny_llama, Settings(bits=1.5, corrections=str(file))).plan
    assert not plan.shared_decoders and 0.99 * 1.5 <= plan.block_bits <= 1.5
    file.write_text(json.dumps({"candidates": {"block": [dear]}}))
    with pytest.raises(RecipeError, match="no room for the decoders|is not possible"):
        prepare(tiny_llama, Settings(bits=2.5, corrections=str(file)))


def test_bits_without_calibration_heed_corrections(tiny_llama, tmp_path):
    file = tmp_path / "corrections.yaml"
    specs = [{"format": "uniform", "bits": bits, "symmetric": True} for bits in range(2, 9)]
    file.write_text(json.dumps({"candidates": {"block": specs}}))
    plan = prepare(tiny_llama, Settings(bits=4.0, corrections=str(file))).plan
    assert {entry.fmt.name for entry in plan.entries if entry.matrix.kind == "block"} == {"uniform"}


def test_a_wrong_word_for_candidates_is_refused(tiny_llama):
    with pytest.raises(RecipeError, match="--candidates 'neurol' is not one of neural"):
        prepare(tiny_llama, Settings(bits=3, candidates=("neurol",)))
    with pytest.raises(RecipeError, match="--candidates applies to budgets"):
        prepare(tiny_llama, Settings(recipe="mixed", candidates=("neural",)))


def test_a_calibrated_size_ends_with_predicted_and_realised_loss(tiny_llama, text_file, tmp_path, capsys):
    from reallm.cli import main

    options = ["--calibration-context", "64", "--calibration-windows", "6"]
    arguments = ["compress", str(tiny_llama), "-o", str(tmp_path / "out"), "--size", "90KB"]
    assert main([*arguments, "--calibration", str(text_file), *options]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("loss (KL)") and "held out" in line
    predicted, realised = (float(line.split(word)[1].split()[0].strip(",")) for word in ("predicted", "realised"))
    assert 0.2 < predicted / realised < 5


def test_a_damaged_analysis_is_one_line(tiny_llama, text_file, tmp_path):
    settings = Settings(size=80_000, calibration=(str(text_file),), analysis=str(tmp_path), **CALIBRATION)
    prepare(tiny_llama, settings)
    (file,) = tmp_path.glob("analysis-*.json")
    file.write_text("{")
    with pytest.raises(RecipeError, match="damaged .*remove it"):
        prepare(tiny_llama, settings)
