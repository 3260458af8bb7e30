"""The text of a growing answer: all pieces are the whole, and a token costs the same at the end as at the beginning."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engines.byte_tokenizer import ByteTokenizer
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.records import Generation, Result, RowId, Timing, Usage
from batchgen.serve.deltas import Deltas
from batchgen.serve.growing import MAX_WINDOW, GrowingText
from batchgen.spec import ModelSpec
from batchgen.worker.answer import split_reasoning
from batchgen.worker.stops import Decode, cut_text


def make_metaspace_decode() -> Decode:
    """As Llama 2's: a word's space is in front of it, the first word of a text has none, what is unknown goes by bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary = {**bytes_, "▁one": 256, "two": 257, "▁": 258, "▁é": 259, "</think>": 260}
    model = tokenizers.models.BPE(vocabulary, [], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(content=" ", left=1)]
    )
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def grow(decode: Decode, pieces: Sequence[Sequence[int]]) -> str:
    growing = GrowingText(decode)
    return "".join(growing.add(piece) for piece in pieces)


def cut(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


@given(st.lists(st.sampled_from([256, 257, 258, 259, 260, *"€".encode(), *b"a "]), max_size=60), st.integers(1, 5))
def test_a_space_that_the_first_token_lacks_is_there_for_all_others(tokens: list[int], size: int) -> None:
    decode = make_metaspace_decode()
    # Broken bytes take their neighbours with them in this format: only whole characters are looked at.
    ids = [one for token in tokens for one in ("€".encode() if 0x80 <= token < 256 else [token])]
    assert grow(decode, cut(ids, size)) == decode(ids)


@given(st.binary(max_size=300), st.integers(1, 9))
def test_broken_bytes_show_as_they_do_in_the_whole(raw: bytes, size: int) -> None:
    decode = ByteTokenizer().decode
    shown = grow(decode, cut(list(raw), size))
    whole = decode(list(raw))
    assert whole.startswith(shown)
    assert whole[len(shown) :].strip("\ufffd") == ""


@given(st.text(max_size=80), st.integers(1, 5))
@settings(deadline=None)
def test_the_embedded_models_tokens_too(text: str, size: int) -> None:
    tokenizer = HFTokenizer(ModelSpec())
    ids = tokenizer.encode(text)
    shown, whole = grow(tokenizer.decode, cut(ids, size)), tokenizer.decode(ids)
    assert whole.startswith(shown)
    assert whole[len(shown) :].strip("\ufffd") == ""


@pytest.mark.parametrize("text", ["word " * 400, "€" * 700, "\ufffd" * 700], ids=["words", "characters", "broken"])
def test_a_token_costs_the_same_however_long_the_answer_is(text: str) -> None:
    decoded = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return bytes(ids).decode(errors="replace")

    raw = b"\xff" * 2000 if text[0] == "\ufffd" else text.encode()
    growing = GrowingText(decode)
    shown = "".join(growing.add([byte]) for byte in raw)
    assert max(decoded) <= MAX_WINDOW + 1
    assert len(text) - len(shown) <= (0 if raw[0] != 255 else MAX_WINDOW)


@given(
    st.text("ab<>/think\nSTOP", max_size=60),
    st.sampled_from([(), ("STOP",), ("</think>\n",), ("k>a", "OP"), ("b", "</th")]),
    st.booleans(),
    st.integers(1, 9),
    st.booleans(),
)
def test_pieces_are_the_answer_wherever_marks_and_stop_strings_meet(
    text: str, stop: tuple[str, ...], thinking: bool, size: int, has_mark: bool
) -> None:
    text = text.replace("b", "</think>") if has_mark else text
    think_end = "</think>" if thinking else None
    final, reasoning = split_reasoning(cut_text(text, stop), thinking=thinking, think_end=think_end)
    deltas = Deltas(0, ByteTokenizer().decode, think_end, stop)
    pieces = [deltas.add(piece) for piece in cut(list(text.encode()), size)]
    result = Result(
        RowId("", 0, 0), 1, Timing(), Generation(final, (), "stop", Usage()), None, text=final, reasoning=reasoning
    )
    pieces.append(deltas.finish(result))
    assert "".join(piece.text for piece in pieces if piece) == final
    assert "".join(piece.reasoning for piece in pieces if piece) == (reasoning or "")
