import threading

import pytest
import torch

from reallm.errors import SourceError, TextError
from reallm.evaluate import generation as generate
from reallm.evaluate.generation import encode_prompt, generate_stream


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def generate_text(model, tokenizer, prompt="the river", **settings):
    return "".join(generate_stream(model, tokenizer, prompt, **{"max_new_tokens": 12, **settings}))


def test_the_pieces_joined_are_what_the_model_generates(model, tokenizer):
    ids = encode_prompt(tokenizer, "the river")
    whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    pieces = list(generate_stream(model, tokenizer, "the river", max_new_tokens=12, repetition_penalty=1.0))
    assert len(pieces) > 1
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer("ä€𝄞 end\nä")["input_ids"]
    pieces = list(generate._decode_stream(tokenizer, iter([[token] for token in ids])))
    assert "".join(pieces) == "ä€𝄞 end\nä"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_becomes_whole_is_not_lost(tokenizer):
    first = tokenizer("€")["input_ids"][:1]
    assert "".join(generate._decode_stream(tokenizer, iter([first]))) == "\ufffd"


def test_a_space_between_two_words_is_kept_wherever_decoding_starts_again(monkeypatch):
    class Strips:
        """Tokens are words with a leading space; decoding drops the first one's, as many tokenizers do."""

        def decode(self, ids, **_):
            return "".join(f" w{number}" for number in ids)[1:]

    monkeypatch.setattr(generate, "REDECODED_TOKENS", 10)
    pieces = generate._decode_stream(Strips(), iter([[number] for number in range(100)]))
    assert "".join(pieces) == " ".join(f"w{number}" for number in range(100))


def test_a_long_answer_is_the_same_however_it_is_cut(tokenizer, monkeypatch):
    ids = tokenizer("the ä€ river\n 𝄞 walks. " * 20)["input_ids"]
    monkeypatch.setattr(generate, "REDECODED_TOKENS", 9)
    assert "".join(generate._decode_stream(tokenizer, iter([[token] for token in ids]))) == tokenizer.decode(ids)


def test_the_same_seed_draws_the_same_text_and_another_does_not(model, tokenizer):
    texts = [generate_text(model, tokenizer, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_text_ignores_the_sampling_defaults_that_a_model_brings(model, tokenizer, monkeypatch):
    plain = generate_text(model, tokenizer)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 5.0)
    assert generate_text(model, tokenizer) == plain


def test_a_repetition_penalty_changes_a_repeating_answer(model, tokenizer):
    plain = generate_text(model, tokenizer, max_new_tokens=40, repetition_penalty=1.0)
    assert generate_text(model, tokenizer, max_new_tokens=40, repetition_penalty=3.0) != plain


def test_the_chat_template_is_used_when_there_is_one(tokenizer):
    text = tokenizer.decode(encode_prompt(tokenizer, "hello", system="be brief")[0])
    assert text == "<s>system\nbe brief</s>\n<s>user\nhello</s>\n<s>assistant\n"


def test_a_raw_prompt_goes_in_as_it_is(tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, "hello", chat=False)[0]) == "hello"


def test_a_missing_chat_template_is_noticed_only_when_asked_for(tokenizer):
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "hello")[0]) == "hello"
    with pytest.raises(SourceError, match="--raw"):
        encode_prompt(tokenizer, "hello", chat=True)


def test_a_system_message_without_a_template_is_refused(tokenizer):
    with pytest.raises(TextError, match="system message"):
        encode_prompt(tokenizer, "hello", chat=False, system="be brief")


def test_a_template_that_refuses_a_role_says_so_in_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(SourceError, match="no system here"):
        encode_prompt(tokenizer, "hello", system="x")


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(TextError, match="empty"):
        encode_prompt(tokenizer, "", chat=False)


def test_a_prompt_that_fills_the_model_is_refused_and_a_long_answer_stops_there(model, tokenizer):
    with pytest.raises(TextError, match="512 positions"):
        generate_stream(model, tokenizer, "the " * 600, chat=False)
    prompt_tokens = encode_prompt(tokenizer, "the " * 400, chat=False).shape[1]
    assert generate._remaining_tokens(model, prompt_tokens, 10_000) == 512 - prompt_tokens


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused_before_the_model_runs(model, tokenizer, settings):
    with pytest.raises(TextError, match=str(next(iter(settings.values())))):
        generate_stream(model, tokenizer, "x", **settings)


def test_an_error_inside_the_thread_reaches_the_reader(model, tokenizer, monkeypatch):
    def fail(**_):
        raise ZeroDivisionError("a broken layer")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="a broken layer"):
        generate_text(model, tokenizer)


def test_leaving_early_stops_the_model(model, tokenizer):
    before = threading.active_count()
    stream = generate_stream(model, tokenizer, "the river", max_new_tokens=400)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_model_without_parameters_is_asked_where_its_buffers_are():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(1))

        def get_input_embeddings(self):
            return self

    assert generate._device(Bare()) == torch.device("cpu")
