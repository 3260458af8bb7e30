"""The tokenizer seam over the embedded model: ids, the double-BOS trap, refusals that quote nothing, threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.errors import BadRow, SpecError
from batchgen.spec import ModelSpec

BOS, EOS, PAD, USER, THINK, THINK_END = 0, 1, 2, 3, 5, 6
EMBEDDED = Path(sys.modules["batchgen"].__file__ or "").parent / "embedded"


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer(ModelSpec())


def ask(text: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]


def copy_model(folder: Path, **changes: str | None) -> ModelSpec:
    """The embedded tokenizer in a folder of its own; `changes`: file stem -> new text, None to leave it out."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        text = changes.get(Path(file).stem, (EMBEDDED / file).read_text(encoding="utf-8"))
        if text is not None:
            (folder / file).write_text(text, encoding="utf-8")
    return ModelSpec(path=str(folder))


def test_a_chat_begins_with_one_bos_and_ends_where_the_answer_begins(tokenizer: HFTokenizer) -> None:
    chat = tokenizer.encode_chat(ask("Add 3 and 4."), thinking=False)
    thinking = tokenizer.encode_chat(ask("Add 3 and 4."), thinking=True)
    assert chat[:2] == [BOS, USER]
    assert chat.count(BOS) == 1
    assert chat[-1] == THINK_END
    assert thinking == [*chat[:-1], THINK]


def test_a_bare_text_gets_the_models_own_bos(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode("Add 3 and 4.")
    assert ids[0] == BOS
    assert tokenizer.decode(ids) == "Add 3 and 4."


def test_a_rendered_chat_shows_its_special_tokens(tokenizer: HFTokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ask("1 + 1 = ?"), {"role": "assistant", "content": "2"}]
    text = tokenizer.render_chat([*messages, *ask("2 + 2 = ?")], thinking=False)
    assert text == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1 + 1 = ?<｜Assistant｜></think>2<｜end▁of▁sentence｜>"
        "<｜User｜>2 + 2 = ?<｜Assistant｜></think>"
    )


def test_decode_keeps_thinking_marks_and_drops_the_other_special_tokens(tokenizer: HFTokenizer) -> None:
    working = tokenizer.encode("7+5+0=12")
    assert tokenizer.decode([THINK, *working, THINK_END, EOS, PAD]) == "<think>7+5+0=12</think>"
    assert tokenizer.think_end == "</think>"
    assert tokenizer.vocab_size == 294


def test_decode_ignores_ids_without_a_token(tokenizer: HFTokenizer) -> None:
    assert tokenizer.decode([300, 303]) == ""


@pytest.mark.parametrize("text", ["é", "漢字 🙂\n\tx", "a\u200db", "\ufeff", " two  spaces ", "🧑‍🚀"])
def test_any_unicode_survives_the_round_trip(tokenizer: HFTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ask(None),
        ask(["SECRET"]),
        [{"role": "user"}],
        [{}],
        ["SECRET"],
        [{"role": "SECRET", "content": "SECRET"}, *ask("SECRET")],
        [*ask("SECRET"), {"role": "assistant", "content": "SECRET"}],
    ],
)
def test_messages_the_template_refuses_are_a_bad_row_that_quotes_nothing(
    tokenizer: HFTokenizer, messages: list[dict[str, object]]
) -> None:
    with pytest.raises(BadRow) as caught:
        tokenizer.encode_chat(messages, thinking=False)
    assert caught.value.error_type == "bad_messages"
    assert "SECRET" not in str(caught.value)


def test_no_chat_template_is_refused_with_the_mend(tmp_path: Path) -> None:
    bare = HFTokenizer(copy_model(tmp_path, chat_template=None))
    assert bare.encode("1") == HFTokenizer(ModelSpec()).encode("1")
    with pytest.raises(SpecError, match=r"prompt\.chat: .*set prompt\.chat: false"):
        bare.encode_chat(ask("1"), thinking=False)


def test_a_broken_template_is_the_models_fault_not_the_rows(tmp_path: Path) -> None:
    broken = HFTokenizer(copy_model(tmp_path, chat_template="{% for m in %}"))
    with pytest.raises(SpecError, match=r"chat template of .* is broken"):
        broken.encode_chat(ask("1"), thinking=False)


@pytest.mark.parametrize("text", ['{"version": "1.0", "trunc', "not json"])
def test_a_half_copied_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"model\.path: can't load the tokenizer"):
        HFTokenizer(copy_model(tmp_path, tokenizer=text))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/no-such-model"])
def test_a_missing_folder_is_refused_before_the_hub_is_asked(path: str) -> None:
    with pytest.raises(SpecError, match=r"model\.path: .* is not a folder"):
        HFTokenizer(ModelSpec(path=path))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"model\.path: can't load the tokenizer"):
        HFTokenizer(ModelSpec(path=str(tmp_path)))


def test_many_threads_get_the_same_ids() -> None:
    tokenizer = HFTokenizer(ModelSpec())
    texts = [f"What is {number} + {number}?" * 20 for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(tokenizer.encode, texts))
        assert list(pool.map(tokenizer.decode, ids)) == texts


def test_without_torch_it_loads_and_says_nothing() -> None:
    code = """
import sys
sys.modules["torch"] = None
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.spec import ModelSpec
print(HFTokenizer(ModelSpec()).encode("1"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[0, 23]\n", "")
