"""Tokenizers of GGUF files: the ids that the file says, whatever version of transformers builds them, or one line."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from reallm.calibrate.text import leading_bos
from reallm.cli import main
from reallm.errors import SourceError
from reallm.hf import load_tokenizer
from reallm.source import open_source

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

TEXT = "The old house holds 2024  small lights.\n\tcafé ß漢 rivers see 13 stones"
CORPUS = [
    "The old house holds the small light. Rivers see 2024 stones and 13 houses. small stones, café déjà vu" * 2,
    "The river sees the stone. The house holds light and stones. old small rivers",
]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write(path, arch, kind, tokens, types, scores=(), merges=(), rows=None, stated=None, **more):
    """A GGUF file of a tiny model of one block with this tokenizer."""
    import numpy as np

    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(stated or len(tokens))
    if kind is not None:
        writer.add_tokenizer_model(kind)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
    if len(scores):
        writer.add_token_scores(list(scores))
    if len(merges):
        writer.add_token_merges(list(merges))
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    shapes |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    if arch.startswith("gemma"):
        shapes |= {"post_attention_norm": (32,), "post_ffw_norm": (32,)}
    if arch == "gemma3":
        shapes |= {"attn_q_norm": (16,), "attn_k_norm": (16,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"token_embd.weight": (rows or len(tokens), 32), "output_norm.weight": (32,)}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def byte_level():
    """(the tokenizers library's own BPE, its tokens, its merges)"""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return tokenizer, sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def pieces():
    """(pieces of a SentencePiece-BPE in the order in which they were made, its letters, its merges)"""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    made = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    return made, sorted(token for token in model["vocab"] if len(token) == 1), [" ".join(p) for p in model["merges"]]


def byte_level_file(path, byte_level, **more):
    _, tokens, merges = byte_level
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1)
    return write(
        path, "llama", "gpt2", tokens, types, **({"merges": merges, "bos_token_id": 0, "eos_token_id": 0} | more)
    )


def llama_file(path, pieces, shuffled=False, **more):
    """Of LLaMA 2's family: scores say the order of merging."""
    made, letters, _ = pieces
    made = sorted(made) if shuffled else made
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *made, *letters]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(made + letters)
    order = {piece: -float(place) for place, piece in enumerate(pieces[0] + letters)}
    more = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0} | more
    return write(path, "llama", "llama", tokens, types, [order.get(token, 0.0) for token in tokens], **more)


def gemma_file(path, pieces, arch="gemma3", **more):
    """Of Gemma's family: all scores alike, no merges, runs of spaces as they are, no space before the text."""
    made, letters, _ = pieces
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
    tokens = [*special, "  ", "   ", *BYTES, *made, *letters]
    types = [CONTROL] * 5 + [USER] * 2 + [BYTE] * 256 + [NORMAL] * len(made + letters)
    more = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "unk_token_id": 3} | more
    return write(path, arch, "llama", tokens, types, [-1000.0] * len(tokens), **more)


def unigram(pieces):
    """(tokens, scores) with the longer pieces the likelier."""
    made, letters, _ = pieces
    tokens = ["<pad>", "</s>", "<unk>", *letters, *made]
    return tokens, [0.0, 0.0, 0.0] + [-9.0 - 0.01 * n for n in range(len(letters))] + [-4.0 - 1 / len(m) for m in made]


def unigram_file(path, pieces, **more):
    tokens, scores = unigram(pieces)
    types = [CONTROL, CONTROL, UNKNOWN] + [NORMAL] * (len(tokens) - 3)
    more = {"eos_token_id": 1, "pad_token_id": 0, "unk_token_id": 2} | more
    return write(path, "llama", "t5", tokens, types, scores, **more)


def merged_ids(text, order, tokens):
    """SentencePiece-BPE by hand: the pair made first is joined first; letters without a token become bytes."""
    parts = list(text)
    while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if "".join(pair) in order]:
        best = min(pairs, key=lambda pair: order.index("".join(pair)))
        at = next(n for n in range(len(parts)) if tuple(parts[n : n + 2]) == best)
        parts[at : at + 2] = ["".join(best)]
    ids = []
    for part in parts:
        ids += [tokens.index(t) for t in ([part] if part in tokens else [f"<0x{b:02X}>" for b in part.encode()])]
    return ids


def best_ids(word, tokens, scores):
    """Unigram by hand: of all ways to cut a word the one of the highest sum of scores."""
    best = [(0.0, [])] + [(-1e9, [])] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(end):
            if (piece := word[start:end]) in tokens:
                number = tokens.index(piece)
                best[end] = max(best[end], (best[start][0] + scores[number], [*best[start][1], number]))
    return best[-1][1]


def ids_of(path, text, **options):
    return load_tokenizer(path)(text, **options).input_ids


def test_byte_level_bpe_gives_the_ids_of_the_tokenizers_library(byte_level, tmp_path):
    path = byte_level_file(tmp_path / "x.gguf", byte_level)
    assert ids_of(path, TEXT) == byte_level[0].encode(TEXT).ids


@pytest.mark.parametrize("shuffled", [False, True])
def test_sentencepiece_bpe_is_merged_by_the_scores_of_the_file(pieces, tmp_path, shuffled):
    path = llama_file(tmp_path / "x.gguf", pieces, shuffled)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *(sorted(pieces[0]) if shuffled else pieces[0]), *pieces[1]]
    assert ids_of(path, TEXT) == [1, *merged_ids("▁" + TEXT.replace(" ", "▁"), pieces[0], tokens)]


def test_sentencepiece_bpe_takes_the_merges_of_the_file_where_it_has_them(pieces, tmp_path):
    stated = llama_file(tmp_path / "x.gguf", pieces, merges=pieces[2])
    assert ids_of(stated, TEXT) == ids_of(llama_file(tmp_path / "y.gguf", pieces), TEXT)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_a_gemma_is_bpe_in_the_order_of_its_tokens(pieces, tmp_path, arch):
    path = gemma_file(tmp_path / "x.gguf", pieces, arch)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "▁▁", "▁▁▁", *BYTES, *pieces[0], *pieces[1]]
    order = ["▁▁", "▁▁▁", *pieces[0]]
    assert ids_of(path, TEXT) == [2, *merged_ids(TEXT.replace(" ", "▁"), order, tokens)]
    assert ids_of(path, "<start_of_turn>old", add_special_tokens=False)[0] == 4


def test_unigram_takes_the_likeliest_cut_by_the_scores_of_the_file(pieces, tmp_path):
    tokens, scores = unigram(pieces)
    words = ["▁" + word for word in "The old house holds 2024 small stones".split()]
    wanted = [number for word in words for number in best_ids(word, tokens, scores)]
    path = unigram_file(tmp_path / "x.gguf", pieces)
    assert ids_of(path, "The old house holds 2024 small stones", add_special_tokens=False) == wanted


def test_no_token_has_an_id_past_the_embedding(byte_level, pieces, tmp_path):
    for write_file, made_of in ((byte_level_file, byte_level), (gemma_file, pieces), (unigram_file, pieces)):
        path = write_file(tmp_path / "x.gguf", made_of)
        tokenizer, rows = load_tokenizer(path), open_source(path).config.vocab_size
        assert len(tokenizer) == rows
        assert max(tokenizer("<|endoftext|> <mask> <extra_id_0> <s>").input_ids) < rows


def test_the_begin_of_text_is_put_where_the_file_says_or_its_kind_does(byte_level, pieces, tmp_path):
    path = tmp_path / "x.gguf"
    assert leading_bos(load_tokenizer(llama_file(path, pieces))) == 1
    assert leading_bos(load_tokenizer(llama_file(path, pieces, add_bos_token=False))) is None
    assert leading_bos(load_tokenizer(gemma_file(path, pieces))) == 2
    assert leading_bos(load_tokenizer(byte_level_file(path, byte_level))) is None
    assert leading_bos(load_tokenizer(byte_level_file(path, byte_level, add_bos_token=True))) == 0
    assert leading_bos(load_tokenizer(byte_level_file(path, byte_level, tokenizer_pre="llama-bpe"))) == 0


def test_a_saved_tokenizer_of_a_gguf_file_gives_the_same_ids(byte_level, pieces, tmp_path):
    for number, path in enumerate(
        (
            byte_level_file(tmp_path / "0.gguf", byte_level),
            llama_file(tmp_path / "1.gguf", pieces),
            gemma_file(tmp_path / "2.gguf", pieces),
        )
    ):
        folder, source = tmp_path / f"out{number}", open_source(path)
        source.config.save_pretrained(folder)
        source.save_auxiliary_files(folder)
        saved, read = load_tokenizer(folder), load_tokenizer(path)
        assert saved(TEXT).input_ids == read(TEXT).input_ids and len(saved) == len(read)
        assert (saved.bos_token, saved.eos_token, saved.pad_token) == (read.bos_token, read.eos_token, read.pad_token)


def test_special_tokens_that_are_no_bytes_stay_whole(byte_level, tmp_path):
    tokenizer, tokens, merges = byte_level
    more = [*tokens, "<｜User｜>", "<think>"]
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1) + [CONTROL, USER]
    path = write(tmp_path / "x.gguf", "llama", "gpt2", more, types, merges=merges, eos_token_id=0)
    assert ids_of(path, "<｜User｜>old<think>") == [len(tokens), *tokenizer.encode("old").ids, len(tokens) + 1]
    assert load_tokenizer(path).decode([len(tokens), len(tokens) + 1]) == "<｜User｜><think>"


def test_runs_of_spaces_may_be_tokens_of_their_own_beside_those_that_merges_make(byte_level, tmp_path):
    _, tokens, merges = byte_level
    more, count = [*tokens, "ĠĠ", "  ", "    "], len(tokens)
    types = [CONTROL] + [NORMAL] * count + [USER, USER]
    path = write(tmp_path / "x.gguf", "llama", "gpt2", more, types, merges=[*merges, "Ġ Ġ"], eos_token_id=0)
    assert {count + 1, count + 2} <= set(ids_of(path, "old  house    holds"))
    more = [*tokens, "  "]
    path = write(
        tmp_path / "y.gguf", "llama", "gpt2", more, types[:1] + types[2:-1], merges=[*merges, "Ġ Ġ"], eos_token_id=0
    )
    assert load_tokenizer(path).decode(ids_of(path, "old  house")) == "old  house"


def test_padding_of_the_embedding_is_no_misfit(byte_level, tmp_path):
    tokens = [*byte_level[1], "[PAD0]", "[PAD1]"]
    types = [CONTROL] + [NORMAL] * (len(tokens) - 3) + [5, 5]
    path = write(tmp_path / "x.gguf", "llama", "gpt2", tokens, types, merges=byte_level[2], eos_token_id=0)
    assert len(load_tokenizer(path)) == len(tokens)


def dry_run(path, folder, capsys):
    code = main(["compress", str(path), "-o", str(folder / "out"), "--recipe", "rtn4", "--dry-run"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), err
    return err


def test_a_tokenizer_that_cannot_be_built_or_is_damaged_is_one_line_before_any_work(
    byte_level, pieces, tmp_path, capsys
):
    _, tokens, merges = byte_level
    types, path = [NORMAL] * len(tokens), tmp_path / "x.gguf"
    said = lambda *arguments, **more: dry_run(write(path, "llama", *arguments, **more), tmp_path, capsys)  # noqa: E731
    assert "cannot build its tokenizer of kind 'rwkv'" in said("rwkv", tokens, types, merges=merges)
    assert "holds no tokenizer" in said(None, tokens, types) and "holds no tokenizer" in said("none", tokens, types)
    assert "BPE without merges" in said("gpt2", tokens, types)
    assert "Unigram without scores" in said("t5", tokens, types)
    assert f"{len(tokens)} tokens, the embedding 300 rows" in said(
        "gpt2", tokens, types, merges=merges, rows=300, stated=300
    )
    assert f"{len(tokens)} tokens, and its embedding has 340 rows" in said(
        "gpt2", tokens, types, merges=merges, rows=340
    )
    assert f"{len(tokens)} tokens and 300 types" in said("gpt2", tokens, types[:300], merges=merges)
    assert "eos_token is 330, of" in said("gpt2", tokens, types, merges=merges, eos_token_id=330)
    assert "cannot build" in said("gpt2", tokens, types, merges=[*merges, "no such"])
    write(path, "llama", "gpt2", tokens, types, merges=merges)
    path.write_bytes(path.read_bytes().replace(b"hou", b"h\xff\xfe", 1))
    assert "cannot be read as GGUF" in dry_run(path, tmp_path, capsys)


@pytest.fixture
def built(monkeypatch):
    """built(change): the state of a tokenizer that transformers builds is changed, as a wrong version would."""
    import transformers

    real = transformers.AutoTokenizer.from_pretrained

    def use(change):
        def build(*arguments, **options):
            tokenizer = real(*arguments, **options)
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            change(state)
            tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
            return tokenizer

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", build)

    return use


def as_unigram(state):
    vocab = state["model"]["vocab"]
    state["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[t, -1000.0] for t in sorted(vocab, key=vocab.get)]}


def with_two_tokens_changed(state):
    vocab = state["model"]["vocab"]
    vocab["Q"], vocab["Z"] = vocab["Z"], vocab["Q"]


def with_other_merges(state):
    state["model"]["merges"].reverse()


def with_one_score_changed(state):
    state["model"]["vocab"][-1][1] -= 1.0


def without_special_tokens(state):
    state["added_tokens"] = [token for token in state["added_tokens"] if "turn" not in token["content"]]


def in_small_letters(state):
    state["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (gemma_file, as_unigram, "it is Unigram, 'llama' is BPE"),
        (byte_level_file, with_two_tokens_changed, "is 'Z', in the file 'Q'"),
        (byte_level_file, with_other_merges, "merges, which are not the"),
        (gemma_file, with_other_merges, "merges a sample of text in another order"),
        (llama_file, with_other_merges, "merges a sample of text in another order"),
        (unigram_file, with_one_score_changed, "has score"),
        (gemma_file, without_special_tokens, r"cuts special token 4 \('<start_of_turn>'\) into"),
        (byte_level_file, in_small_letters, "a sample of text comes back as 'the small"),
    ],
)
def test_a_tokenizer_that_is_not_the_files_is_refused_naming_what_differs(
    byte_level, pieces, tmp_path, built, kind, change, said
):
    path = kind(tmp_path / "x.gguf", byte_level if kind is byte_level_file else pieces)
    load_tokenizer(path)
    path.rename(tmp_path / "y.gguf")
    built(change)
    with pytest.raises(SourceError, match=f"is not the file's: .*{said}.*; give the Hugging Face folder"):
        load_tokenizer(tmp_path / "y.gguf")
