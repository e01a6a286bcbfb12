"""How every test runs, and tiny models built in place: random weights, a tokenizer trained on made-up lines."""

import contextlib
import dataclasses
import filecmp
import functools
import hashlib
import inspect
import json
import os
import random
import weakref
from pathlib import Path

import jaxtyping
import pytest

# Set before torch is imported, here and for processes that tests start. One thread: matrices of a test are small, and
# on busy cores threads that wait for each other make it up to six times slower. Where a test asks for two, the one that
# waits sleeps: spinning, fit/test_threads.py takes 94 s of CPU on busy cores in place of 14.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
os.environ |= {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

# Shapes and types are checked at the first calls that a test makes of a function, and then at one of so many: with
# checks at every step of training loops fits take 2.5 times as long.
CHECKED_CALLS, CHECKED_AFTERWARDS = 20, 50


class _Calls:
    """Which test runs: counts of calls begin again with each."""

    test = 0


def _checked_at_times(jaxtyped):
    """`jaxtyping.jaxtyped`, whose checks of functions are left out at most calls of those called very often."""

    @functools.wraps(jaxtyped)
    def decorate(function=None, **options):
        if function is None:
            return functools.partial(decorate, **options)
        checked = jaxtyped(function, **options)
        if not inspect.isfunction(function):
            return checked
        calls, test = 0, 0

        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal calls, test
            if test != _Calls.test:
                calls, test = 0, _Calls.test
            calls += 1
            due = calls <= CHECKED_CALLS or calls % CHECKED_AFTERWARDS == 0
            return (checked if due else function)(*args, **kwargs)

        return call

    return decorate


# The import hook of --jaxtyping-packages decorates by this name, module by module as they are imported.
jaxtyping.jaxtyped = _checked_at_times(jaxtyping.jaxtyped)


def pytest_runtest_logstart(nodeid, location):
    _Calls.test += 1


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_torch():
    """Where torch does not follow the variables of OpenMP. Tests of numbers of threads set their own."""
    import torch

    torch.set_num_threads(1)


WORDS = "the a of and to in river stone light house green old small walks sees holds under over then never".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def made_up_text(sentences: int, seed: int = 0) -> str:
    """English-looking lines, the same for the same seed."""
    rng = random.Random(seed)
    lines = (" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(sentences))
    return "".join(line.capitalize() + ".\n" for line in lines)


def train_tokenizer(vocab_size: int = 512):
    """A byte-level BPE tokenizer with <s>, </s> and a chat template; it adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([made_up_text(400)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def build_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A random 2-layer Llama with tied embeddings and its tokenizer, saved as transformers saves them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # the default 0.02 makes all tokens nearly as likely, and any model as good
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def _content(value):
    """What a value of an argument is known by: numbers of a tensor, fields of formats and objectives."""
    import torch

    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return tuple(value.shape), str(value.dtype), str(value.device), hashlib.sha256(raw).digest()
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return type(value), *((field.name, _content(getattr(value, field.name))) for field in fields)
    return value


@pytest.fixture(scope="session")
def remembered():
    """remembered(function): the function, which computes once in a process for all calls with equal arguments."""

    def of(function):
        found = {}

        @functools.wraps(function)
        def once(*args):
            key = tuple(map(_content, args))
            if key not in found:
                found[key] = function(*args)
            return found[key]

        return once

    return of


@pytest.fixture(scope="session")
def fitted(remembered):
    """fitted(fmt, weight, objective=None, seed=0): `fit`, done once for all tests of a process that ask the same.

    A caller is given its own copy of the tensors. Tests of what `fit` does again (determinism, threads) call it itself.
    """
    import torch

    from reallm.fit import fit
    from reallm.formats import map_tensors

    once = remembered(fit)

    def copy(fmt, weight, objective=None, seed=0):
        return map_tensors(torch.clone, once(fmt, weight, objective, seed))

    return copy


class Killed(Exception):
    """Raised in the middle of a run."""


@pytest.fixture(scope="session")
def killed():
    """`with killed(at=4) as kill: run(job, out, progress=kill)`: the run ends in the fourth call of `kill`.

    `when` is a condition on what the call is given, in place of its number. A run that gets to its end fails the test.
    """

    @contextlib.contextmanager
    def context(at=None, when=None):
        calls = 0

        def kill(*values):
            nonlocal calls
            calls += 1
            if calls == at or (when is not None and when(*values)):
                raise Killed

        with pytest.raises(Killed):
            yield kill

    return context


@pytest.fixture(scope="session")
def same_files():
    """same_files(one, other): whether two folders hold the same files, byte for byte, those named in `but` left out."""

    def same(one, other, but=()):
        first, second = (sorted({path.name for path in folder.iterdir()} - set(but)) for folder in (one, other))
        return first == second and not any(filecmp.cmpfiles(one, other, first, shallow=False)[1:])

    return same


@pytest.fixture(scope="session")
def finished_matrices():
    """finished_matrices(out): names of the files of matrices that a run which did not end has left."""
    from reallm.checkpoint import work_folder

    return lambda out: sorted(path.name for path in work_folder(out).glob("*.safetensors"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder with a tiny Llama. Shared by all tests: read it, never write into it."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def originals_alive(monkeypatch):
    """(references to whole originals and their weights, how many live at each block of a compressed stream)."""
    from reallm.calibrate.hidden_states import HiddenStateCache
    from reallm.source.model_source import FolderSource

    originals, alive = [], []
    load_whole, forward_block = FolderSource.load, HiddenStateCache.forward_block

    def loading(*arguments):
        model = load_whole(*arguments)
        originals.extend(map(weakref.ref, (model, *model.parameters())))
        return model

    def watching(stream, *arguments):
        alive.append(sum(original() is not None for original in originals))
        return forward_block(stream, *arguments)

    monkeypatch.setattr(FolderSource, "load", loading)
    monkeypatch.setattr(HiddenStateCache, "forward_block", watching)
    return originals, alive


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory) -> Path:
    """The same shape and tokenizer as `tiny_llama`, other weights."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "other-llama", seed=1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 1,500 tokens of plain text for the tiny models."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(made_up_text(200, seed=7), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory) -> Path:
    """Three documents in the usual one-object-a-line form."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": made_up_text(3, seed)}) + "\n" for seed in range(3)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def foreign_llama(tiny_llama, tmp_path_factory) -> Path:
    """The weights of `tiny_llama` with another tokenizer."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "foreign-llama"
    shutil.copytree(tiny_llama, folder)
    train_tokenizer(vocab_size=300).save_pretrained(folder)
    return folder


def _build(family: str, dtype=None, **changes):
    """A random model of two blocks, in eval mode."""
    import torch
    import transformers as t

    dtype = dtype or torch.float32

    torch.manual_seed(0)
    llama = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = {
        "llama": lambda: t.LlamaConfig(**{**llama, "tie_word_embeddings": False, **changes}),
        "tied": lambda: t.LlamaConfig(**{**llama, "tie_word_embeddings": True, **changes}),
        "qwen2": lambda: t.Qwen2Config(**{**llama, "tie_word_embeddings": True, **changes}),
        "gemma3": lambda: t.Gemma3TextConfig(**{**llama, "head_dim": 16, "query_pre_attn_scalar": 16, **changes}),
        "phi3": lambda: t.Phi3Config(**{**llama, **changes}),
        "mixtral": lambda: t.MixtralConfig(**{**llama, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(**{**llama, **experts, "num_experts": 4, "head_dim": 16, **changes}),
        "gpt_oss": lambda: t.GptOssConfig(
            **{**llama, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, **changes}
        ),
        "gpt2": lambda: t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, **changes),
        "opt": lambda: t.OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
            **changes,
        ),
        "neox": lambda: t.GPTNeoXConfig(**{**llama, **changes}),
    }[family]()
    config.dtype = dtype
    model = t.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros would hide a bias that got lost
                parameter.normal_(std=0.1)
    return model.eval()


def _save(model, folder: Path) -> Path:
    """A model as transformers saves it."""
    model.save_pretrained(folder)
    return folder


def _write_artifact(source_folder: Path, folder: Path) -> Path:
    """Compress without search: one format for blocks, one for embedding and head, one for experts."""
    from safetensors.torch import save_file

    from reallm.checkpoint import Manifest, StoredMatrix
    from reallm.fit import fit
    from reallm.formats.codebook import Codebook
    from reallm.formats.low_rank_plus import LowRankPlus
    from reallm.formats.uniform import Uniform
    from reallm.hf import marker_tensors, write_config
    from reallm.source import open_source, read_matrix, walk

    in_blocks = LowRankPlus(base=Uniform(bits=4, group_size=16), rank=2)
    of_kind = {"block": in_blocks, "expert": Codebook(vector_dim=1, index_bits=3)}
    table = Uniform(bits=8, group_size=16)
    source = open_source(source_folder)
    found = walk(source.skeleton)
    tensors, stored = {}, []
    for matrix in found.matrices:
        fmt = of_kind.get("expert" if matrix.expert is not None else matrix.kind, table)
        stored.append(StoredMatrix(matrix.name, fmt, matrix.shape, matrix.kind))
        parts = fit(fmt, read_matrix(source, matrix).float(), seed=0)
        packed = fmt.pack(parts, matrix.shape)
        tensors |= {f"{matrix.name}.{local}": tensor.contiguous() for local, tensor in packed.items()}
    tensors |= {unquantized.name: source.read(unquantized.name).contiguous() for unquantized in found.unquantized}
    folder.mkdir()
    write_config(source, Manifest(tuple(stored)), folder)
    save_file(tensors | marker_tensors(found.matrices), folder / "model.safetensors", {"format": "pt"})
    return folder


def _decoded_model(model, folder: Path):
    """The model with every matrix replaced by its decoded self, by a way that shares no code with loading."""
    from safetensors.torch import load_file

    from reallm.checkpoint import read_manifest
    from reallm.source import walk

    tensors = load_file(folder / "model.safetensors")
    formats = {matrix.name: matrix.fmt for matrix in read_manifest(folder).matrices}
    state = model.state_dict()
    for matrix in walk(model).matrices:
        fmt = formats[matrix.name]
        prefix = f"{matrix.name}."
        local = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        local = {name: tensor for name, tensor in local.items() if name in fmt.layout(matrix.shape)}
        weight = fmt.decode(fmt.unpack(local, matrix.shape), matrix.shape)
        target = state[matrix.parameter] if matrix.expert is None else state[matrix.parameter][matrix.expert]
        target.copy_(weight.T if matrix.transposed else weight)
    return model


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """folder = original(family): a saved tiny model, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = _save(_build(family), tmp_path_factory.mktemp("original") / family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def artifact(original, tmp_path_factory):
    """folder = artifact(family): a compressed tiny model, made once; copy before changing it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = _write_artifact(original(family), tmp_path_factory.mktemp("artifact") / family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def ids():
    """Two rows of token numbers."""
    import torch

    return torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))


# Helpers as fixtures: test files cannot import each other.
@pytest.fixture(scope="session")
def build():
    return _build


@pytest.fixture(scope="session")
def save():
    return _save


@pytest.fixture(scope="session")
def decoded_model():
    return _decoded_model


@pytest.fixture(scope="session")
def write_artifact():
    return _write_artifact
