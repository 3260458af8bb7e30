"""What enters a row's fingerprint, each part by itself, and what doesn't; and the index by which it is found again."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.records import Guided, Prompt, SamplingParams
from batchgen.reuse import index
from batchgen.reuse.fingerprint import DRAWING, Fingerprinter
from batchgen.reuse.index import build_index, make_pairs
from batchgen.specs.load import make_spec

BASE: dict[str, Any] = {
    "input": {"paths": ["in"]},
    "prompt": {"column": "prompt"},
    "engine": {"kind": "simulated"},
    "output": {"path": "out"},
}
IDS = (1, 2, 3)
PLAIN = Prompt(messages=({"role": "user", "content": "a"},))
SAMPLING = SamplingParams()


def make(
    ids: tuple[int, ...] | None = IDS,
    prompt: Prompt = PLAIN,
    sampling: SamplingParams = SAMPLING,
    n: int = 1,
    sections: dict[str, Any] | None = None,
) -> list[bytes]:
    return Fingerprinter(make_spec({**BASE, **(sections or {})})).make(ids, prompt, sampling, n)


OTHER_VALUES: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.9,
    "max_tokens": 1,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "stop": ("x",),
    "stop_token_ids": (4,),
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logprobs": 0,
    "thinking": True,
    "guided": Guided(regex="a+"),
}


def test_it_is_the_same_in_every_release() -> None:
    """Outputs of today are to be reused by the versions of tomorrow."""
    assert make()[0].hex() == "d515cc6a86e0e240e9223b3900ef9dea"


def test_every_sampling_field_enters_it() -> None:
    assert OTHER_VALUES.keys() == {field.name for field in fields(SamplingParams)}
    made = [make(sampling=replace(SAMPLING, **{name: value})) for name, value in OTHER_VALUES.items()]
    assert len({found[0] for found in [make(), *made]}) == len(made) + 1


def test_greedy_leaves_out_what_draws() -> None:
    greedy = replace(SAMPLING, temperature=0.0)
    for name, value in OTHER_VALUES.items():
        if name != "temperature":
            is_same = make(sampling=replace(greedy, **{name: value})) == make(sampling=greedy)
            assert is_same == (name in DRAWING), name


def test_samples_differ_unless_they_are_greedy() -> None:
    drawn, greedy = make(n=4), make(n=4, sampling=replace(SAMPLING, temperature=0.0))
    assert (len(set(drawn)), len(set(greedy))) == (4, 1)
    assert drawn[:1] == make()


MODELS = [
    {"model": {"path": "org/name"}},
    {"model": {"path": "org/name", "revision": "abc"}},
    {"engine": {"kind": "transformers"}},
    {"engine": {"kind": "transformers", "nvfp4": "w4a4"}},
    {"engine": {"kind": "openai", "base_urls": "http://h/v1"}},
    {"engine": {"kind": "openai", "base_urls": "http://h/v1", "extra_body": {"a": 1}}},
]


def test_model_revision_and_what_the_engine_says_of_the_data_enter_it() -> None:
    made = [make(sections=sections)[0] for sections in [{}, *MODELS]]
    assert len(set(made)) == len(made)


SAME: list[dict[str, Any]] = [
    {"engine": {"kind": "simulated", "max_inflight": 3, "slots": 2}},
    {"input": {"paths": ["elsewhere"], "custom_id": "key", "passthrough": ["topic"]}},
    {"output": {"path": "other", "token_ids": True}},
    {"model": {"max_model_len": 100}},
    {"cluster": {"workers": {"max": 4}}, "retry": {"max_attempts": 9}},
    {"prompt": {"template": "{a} {b}"}},
]


@pytest.mark.parametrize("sections", SAME, ids=str)
def test_nothing_else_enters_it(sections: dict[str, Any]) -> None:
    """A template does by what it renders, the context's length by the max_tokens that it leaves."""
    assert make(sections=sections) == make()


def test_a_prompt_that_is_rendered_here_counts_as_its_ids() -> None:
    other = Prompt(messages=({"role": "user", "content": "b"},))
    assert make(prompt=other) == make()
    assert make(prompt=replace(PLAIN, tools=({"type": "function"},))) != make()
    assert make(ids=(1, 2)) != make()


prompts = st.one_of(
    st.builds(Prompt, text=st.text()),
    st.builds(Prompt, token_ids=st.lists(st.integers(0, 99)).map(tuple)),
    st.builds(
        Prompt, messages=st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text()})).map(tuple)
    ),
)
ids = st.none() | st.lists(st.integers(0, 2**31), max_size=5).map(tuple)


@given(st.tuples(ids, prompts, st.integers(1, 3)), st.tuples(ids, prompts, st.integers(1, 3)))
def test_two_requests_have_one_fingerprint_only_where_they_are_one(
    one: tuple[tuple[int, ...] | None, Prompt, int], other: tuple[tuple[int, ...] | None, Prompt, int]
) -> None:
    def tell(asked: tuple[tuple[int, ...] | None, Prompt, int]) -> object:
        token_ids, prompt, n = asked
        return (prompt if token_ids is None else token_ids), n

    (made, *_), (theirs, *_) = (make(a, b, n=n)[n - 1 :] for a, b, n in (one, other))
    assert (made == theirs) == (tell(one) == tell(other))


# ---- found again -----------------------------------------------------------------------------------------------------

prints = st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=60)


@given(st.lists(prints, max_size=5), st.sampled_from([4, 2**24]))
def test_the_index_finds_what_was_added_and_nothing_else(files: list[list[tuple[int, bool]]], bound: int) -> None:
    """In memory and on disk; every place of a fingerprint that is there several times, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_ROWS_IN_MEMORY", bound)
        found = build_index(make_pairs(number, make_rows(rows)) for number, rows in enumerate(files))
    places: dict[int, list[tuple[int, int]]] = {}
    for number, rows in enumerate(files):
        for row, (value, is_ok) in enumerate(rows):
            if is_ok and value:
                places.setdefault(value, []).append((number, row))
    assert len(found) == sum(map(len, places.values()))
    for value in range(31):
        asked = [found.find([write(value)])[0] for _ in range(2 * len(places.get(value, [0])))]
        assert asked == [*places.get(value, [None]), *places.get(value, [None])], value


def write(value: int) -> bytes:
    """Spread over all buckets."""
    return (value * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") + value.to_bytes(8, "little")


def make_rows(rows: list[tuple[int, bool]]) -> pa.Table:
    """0 stands for a row without a fingerprint."""
    values = [write(value) if value else None for value, _ in rows]
    statuses = ["ok" if is_ok else "error" for _, is_ok in rows]
    return pa.table({"row_fingerprint": pa.array(values, pa.binary(16)), "status": pa.array(statuses, pa.string())})


def test_a_row_takes_sixteen_bytes() -> None:
    found = build_index([make_pairs(0, make_rows([(value, True) for value in range(1, 100)]))])
    assert found.num_bytes == 99 * 16
    assert np.all(np.diff(found.keys.astype(np.float64)) >= 0)
