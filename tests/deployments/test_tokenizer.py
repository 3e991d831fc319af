import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

import workers.bundled
from deployments.errors import RequestError
from deployments.tokenizer import ChatTokenizer, Detokenizer, StopMatcher, TokenBytes
from tests.deployments.fakes import byte_tokenizer, chat_tokenizer

TOKENIZER = byte_tokenizer()
TOKEN_BYTES = TokenBytes(TOKENIZER)


def streamed(ids, token_bytes=TOKEN_BYTES):
    detokenizer = Detokenizer(token_bytes)
    return [*(detokenizer.feed(i) for i in ids), detokenizer.finish()]


@given(st.text())
@example("👩‍👩‍👧‍👦 é é עברית")
def test_a_text_comes_back_as_it_was(text):
    assert "".join(streamed(TOKENIZER.encode(text).ids)) == text


@given(st.text())
def test_never_half_a_character(text):
    assert all("\ufffd" not in piece for piece in streamed(text.replace("\ufffd", "").encode()))


@given(st.lists(st.integers(0, 300)))
def test_any_ids_read_as_the_library_reads_them(ids):
    assert "".join(streamed(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert chat_tokenizer().decode(ids) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_appears_with_its_last_byte():
    assert streamed("aé€".encode()) == ["a", "", "é", "", "", "€", ""]


def test_what_was_never_completed_is_a_replacement_character():
    assert streamed("€".encode()[:2]) == ["", "", "\ufffd"]


def test_invalid_bytes_do_not_pile_up():
    assert all(len(piece) <= 2 for piece in streamed([0xFF, 0xC3] * 1000))


def sentencepiece() -> Tokenizer:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocab |= {"\u2581hello": 257, "\u2581wor": 258, "ld": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken("<unk>")])
    return tokenizer


def test_byte_fallback_tokens_are_bytes():
    token_bytes = TokenBytes(sentencepiece())
    ids = [257, 258, 259, *(1 + byte for byte in " 😀".encode())]
    assert "".join(streamed(ids, token_bytes)) == " hello world 😀"
    assert streamed([1 + byte for byte in "é".encode()], token_bytes) == ["", "é", ""]


def test_a_vocabulary_that_cannot_be_streamed_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="has the decoder WordPiece: only"):
        TokenBytes(tokenizer)


def test_part_of_a_character_is_shown_as_bytes():
    tokenizer = chat_tokenizer()
    assert [tokenizer.token_text(i) for i in (65, 0xC3, 256, 999)] == [
        "A",
        "bytes:\\xc3",
        "</s>",
        "",
    ]


# Stop strings.


def passed(pieces, stops):
    matcher = StopMatcher(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    return [*shown, matcher.finish()], matcher.stopped


def truncated(text, stops):
    """The definition: the stop that is complete first, and the longest of those."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def test_a_stop_string_may_lie_across_pieces():
    assert passed(["ab", "c<", "e", "nd>x"], ["<end>"]) == (["ab", "c", "", "", ""], True)


def test_only_what_may_begin_a_stop_is_kept_back():
    assert passed(["a<e", "a<", "ena"], ["<end>"]) == (["a", "<ea", "<ena", ""], False)


def test_what_was_kept_back_is_shown_in_the_end():
    assert passed(["abc<en"], ["<end>"]) == (["abc", "<en"], False)


def test_the_stop_that_is_complete_first_counts():
    assert passed(["abcdef"], ["bcde", "cd"]) == (["ab", ""], True)
    assert passed(["abcdef"], ["cd", "bcd"]) == (["a", ""], True)


@settings(max_examples=300)
@given(
    st.text("ab€é", max_size=40),
    st.lists(st.text("ab€é", min_size=1, max_size=5), max_size=4),
    st.data(),
)
def test_the_result_does_not_depend_on_how_bytes_were_cut(text, stops, data):
    expected = truncated(text, stops)
    detokenizer, matcher = Detokenizer(TOKEN_BYTES), StopMatcher(stops)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=len(text.encode())))
    shown, rest = "", text.encode()
    for size in sizes:
        piece = "".join(detokenizer.feed(byte) for byte in rest[:size])
        rest = rest[size:]
        shown += matcher.feed(piece)
        assert expected.startswith(shown)
    shown += matcher.feed(detokenizer.finish()) + matcher.finish()
    assert shown == expected
    assert matcher.stopped == (expected != text)


# Chat templates.


def test_a_chat_is_rendered_and_encoded():
    tokenizer = chat_tokenizer()
    ids = tokenizer.encode_chat([{"role": "user", "content": "hé"}], {})
    assert ids == [257, *"user: hé\n".encode(), 257, *b"assistant: "]


# Checkpoint folders.


def save(folder: Path, **config: object) -> Path:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def written_by(folder: Path) -> str:
    ids = ChatTokenizer.load(folder).encode_chat([], {})
    return bytes(i for i in ids if i < 256).decode()


def test_the_template_is_found_wherever_it_is_kept(tmp_path):
    save(tmp_path, chat_template="config {{ eos_token }}", eos_token={"content": "E"})
    assert written_by(tmp_path) == "config E"
    save(tmp_path, chat_template=[{"name": "default", "template": "named"}, {"name": "rag"}])
    assert written_by(tmp_path) == "named"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert written_by(tmp_path) == "beside"


def test_a_model_without_a_template_says_so(tmp_path):
    tokenizer = ChatTokenizer.load(save(tmp_path))
    with pytest.raises(RequestError, match="no chat template: use /v1/completions"):
        tokenizer.encode_chat([], {})


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        ChatTokenizer.load(tmp_path)


def test_the_bundled_model_can_chat():
    tokenizer = ChatTokenizer.load(workers.bundled.path())
    ids = tokenizer.encode_chat([{"role": "user", "content": "2+2"}], {})
    assert "2+2" in tokenizer.decode(ids)
