"""Tiny models, built in place: random weights, a tokenizer trained on a few made-up lines."""

import json
import random
import weakref
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder with a tiny Llama. Shared by all tests: read it, never write into it."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def originals_alive(monkeypatch):
    """(references to whole originals and their weights, how many live at each block of a compressed stream)."""
    from reallm.model.source import FolderSource
    from reallm.model.stream import Stream

    originals, alive = [], []
    load_whole, through = FolderSource.load, Stream.through

    def loading(*arguments):
        model = load_whole(*arguments)
        originals.extend(map(weakref.ref, (model, *model.parameters())))
        return model

    def watching(stream, *arguments):
        alive.append(sum(original() is not None for original in originals))
        return through(stream, *arguments)

    monkeypatch.setattr(FolderSource, "load", loading)
    monkeypatch.setattr(Stream, "through", watching)
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
