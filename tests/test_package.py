"""`import reallm`: cheap, and known to transformers whichever came first. Each in a clean process."""

import subprocess
import sys

import pytest

KNOWN = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    "assert 'reallm' in AUTO_QUANTIZER_MAPPING and 'reallm' in AUTO_QUANTIZATION_CONFIG_MAPPING\n"
)


def run_clean(code):
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import reallm; from transformers import LlamaForCausalLM",
        "from transformers import LlamaForCausalLM; import reallm",
        "from transformers import AutoModelForCausalLM; import reallm, transformers.modeling_utils",
        "import reallm; from transformers.models.gpt2 import modeling_gpt2",
        "import reallm.model.quantizer",
        "import reallm; reallm.load; import reallm.model.quantizer",
    ],
)
def test_transformers_knows_us_in_any_order_of_imports(imports):
    run_clean(f"{imports}\n{KNOWN}")


def test_import_reallm_alone_loads_nothing_heavy():
    run_clean("import sys, reallm; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


@pytest.mark.slow
def test_the_exported_names_are_functions_also_after_their_files_were_imported():
    run_clean(
        "import reallm, reallm.pipeline, reallm.model.load, inspect\n"
        "assert all(inspect.isfunction(f) for f in (reallm.compress, reallm.load, reallm.load_tokenizer))"
    )


@pytest.mark.slow
def test_python_m_reallm_is_the_command():
    done = subprocess.run([sys.executable, "-m", "reallm", "tune"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, "-m", "reallm", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("reallm ")


def test_an_unknown_name_is_an_attribute_error():
    run_clean("import reallm\nassert not hasattr(reallm, 'decompress')")
