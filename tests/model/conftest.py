"""Tiny models of several families and artifacts of them, written without the compressor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reallm.artifact import Manifest, StoredMatrix, read_manifest
from reallm.fit import fit
from reallm.formats.codebook import Codebook
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.uniform import Uniform
from reallm.model import marker_tensors, open_source, read_matrix, walk, write_config

BLOCKS = LowRankPlus(base=Uniform(bits=4, group_size=16), rank=2)
TABLE = Uniform(bits=8, group_size=16)
EXPERTS = Codebook(vector_dim=1, index_bits=3)


def _build(family: str, dtype: torch.dtype = torch.float32, **changes):
    """A random model of two blocks, in eval mode."""
    import transformers as t

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
    source = open_source(source_folder)
    found = walk(source.skeleton)
    tensors, stored = {}, []
    for matrix in found.matrices:
        fmt = EXPERTS if matrix.expert is not None else BLOCKS if matrix.kind == "block" else TABLE
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
