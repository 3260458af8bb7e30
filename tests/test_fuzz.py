"""Whatever bytes and values come in, nothing but an error of ours comes out. Derandomized: the same examples every time.

What is fuzzed is what others write or may have changed: specs, rows, and every kind of file in the output folder.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs_util import list_output, make_prompts, make_tree, read_many, run, write_file
from makers import make_ok, make_rows, make_shard
from makers import make_tree as make_small_tree

from batchgen import journal, manifest
from batchgen.batch_stats import read_batch_stats
from batchgen.driver.control import describe_status, find_lock, read_lost_batches, read_status
from batchgen.driver.job import check_fingerprint
from batchgen.driver.lease import FOLDER as LEASES
from batchgen.driver.lease import read_holder
from batchgen.errors import BadRow, BatchgenError, Damaged
from batchgen.length_files import LENGTHS, read_prior
from batchgen.prompt import (
    BadCell,
    list_columns,
    list_row_columns,
    make_custom_id,
    make_messages,
    make_prompt,
    make_row_sampling,
)
from batchgen.queue import inquiry, suspects
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import QueuedShard
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec, parse_spec
from batchgen.specs.validate import check_spec
from batchgen.storage import Storage
from batchgen.verify.verify import verify
from batchgen.worker.handoff import make_handoff_path, read_handoff, write_handoff
from batchgen.worker.seal import seal_json
from batchgen.worker.shard_footer import read_footer, read_whole_file
from batchgen.write import make_result_schema

fuzz = settings(
    derandomize=True,
    deadline=None,
    max_examples=int(os.environ.get("BATCHGEN_FUZZ_EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.binary(max_size=8),
    st.dates(),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=8), scalars), inner, max_size=4)
    ),
    max_leaves=12,
)


@contextlib.contextmanager
def only_ours() -> Any:
    """Errors of ours are an answer; anything else fails the test."""
    with contextlib.suppress(BatchgenError):
        yield


# ---- specs

FIELDS = {
    name: list(part.annotation.model_fields)
    for name, part in JobSpec.model_fields.items()
    if name != "engine" and part.annotation is not None
}
ENGINE_FIELDS = ["kind", "max_inflight", "slots", "base_urls", "api", "extra_body", "device", "length", "call_log"]


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A spec that works, with some fields changed to anything, sections replaced, fields added."""
    tree = make_small_tree()
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from([*FIELDS, "engine", "nonsense"]))
        if draw(st.integers(0, 4)) == 0 or not isinstance(tree.get(section, {}), dict):
            tree[section] = draw(values)
            continue
        names = [*FIELDS.get(section, ENGINE_FIELDS), "nonsense"]
        tree[section] = {**tree.get(section, {}), draw(st.sampled_from(names)): draw(values)}
    return tree


@fuzz
@given(trees())
def test_any_tree_makes_a_spec_or_a_refusal(tree: dict[str, Any]) -> None:
    with only_ours():
        spec = make_spec(tree)
        check_spec(spec)
        assert len(spec.fingerprint()) == 32
        assert make_spec(json.loads(spec.model_dump_json())).fingerprint() == spec.fingerprint()


@fuzz
@given(st.one_of(st.text(), values.map(lambda value: yaml.dump(value, allow_unicode=True))))
def test_any_text_makes_a_spec_or_a_refusal(text: str) -> None:
    with only_ours():
        parse_spec(text)


@fuzz
@given(st.data())
def test_a_spec_with_some_characters_changed_makes_a_spec_or_a_refusal(data: st.DataObject) -> None:
    text = list(yaml.dump(make_small_tree(sampling={"temperature": 0.5, "stop": ["a", "b"]})))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(text) - 1))
        text[position] = data.draw(st.sampled_from(list(":-{}[]&*!|>'\"%@`#,? \n\t0aé\x00\ud800")))
    overrides = data.draw(st.lists(st.text(max_size=12), max_size=2))
    with only_ours():
        parse_spec("".join(text), overrides)


# ---- rows

PROMPTS: list[dict[str, Any]] = [
    {"column": "a"},
    {"column": "a", "sampling": "b", "system": "be kind"},
    {"messages": "a", "sampling": "b"},
    {"prompt_token_ids": "a"},
    {"template": "{a} and {b}", "chat": False},
]
json_texts = values.map(lambda value: json.dumps(value, default=str, skipkeys=True))
cells = st.one_of(values, json_texts, st.just(BadCell("is not valid UTF-8")), st.text().map(lambda text: text + "]"))
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name"]), values, max_size=4), max_size=3
)


@fuzz
@given(st.sampled_from(PROMPTS), cells | messages, cells)
def test_any_row_makes_a_prompt_or_an_error_row(prompt: dict[str, Any], a: Any, b: Any) -> None:
    spec = make_spec(make_small_tree(prompt=prompt, input={"paths": ["/in"], "custom_id": "b"}))
    row = {"a": a, "b": b}
    assert set(list_row_columns(spec)) <= row.keys() == set(list_columns(spec)) | {"a", "b"}
    for make in (lambda: make_prompt(row, spec.prompt), lambda: make_row_sampling(row, spec)):
        with contextlib.suppress(BadRow):
            make()
    key = make_custom_id(row, "b", "f", 1)
    assert key is None or isinstance(key, str)


@fuzz
@given(st.integers(1, 5000))
def test_messages_may_be_nested_as_deeply_as_they_like(depth: int) -> None:
    with contextlib.suppress(BadRow):
        make_messages("[" * depth + "]" * depth, "a")


# ---- files of the output folder


class JobFolder:
    """A job's output and what was in it. Its repr is short: hypothesis shows it with every failure."""

    def __init__(self, root: str, files: dict[str, bytes]) -> None:
        self.root, self.files = root, files

    def __repr__(self) -> str:
        return f"JobFolder({self.root!r})"

    @contextlib.contextmanager
    def holding(self, changed: dict[str, bytes]) -> Iterator[Storage]:
        """The folder with other files for a while."""
        for path, data in changed.items():
            Path(self.root, path).write_bytes(data)
        try:
            yield Storage(self.root)
        finally:
            for path in changed:
                Path(self.root, path).write_bytes(self.files[path])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """Of a job with journal, lease, status and stats."""
    root = tmp_path_factory.mktemp("fuzz")
    write_file(root / "in.parquet", make_prompts(20))
    run(make_tree(root / "in.parquet", root / "out"))
    storage = Storage(str(root / "out"))
    rows = make_rows(*(make_ok(row) for row in range(5)))
    journal.write_segment(storage, SEGMENT, {0: rows, 1: rows}, read_fingerprint(storage))
    write_handoff(storage, HANDOFF_ID, [(0, 0), (3, 0)])
    group = suspects.Group(3, ((1, ((4, 5),)),), 1, (2,))
    state = suspects.Suspects((group,), ((0, ((2, 3), (7, 9))),), frozenset({1}), ((2, 1e9),), 4)
    storage.put(inquiry.PATH, seal_json(suspects.to_json(state)))
    storage.put(manifest.LOCK, json.dumps({"root": storage.root}).encode())
    contents = read_many(list_output(storage.root))
    return JobFolder(storage.root, {name[len(storage.root) + 1 :]: data for name, data in contents.items() if data})


SEGMENT = f"{journal.FOLDER}/e000001-worker-0001-000001.parquet"
SHARD = "data/shard-000000001.parquet"
HANDOFF_ID = "shard-000000000-e1-a1"
STATUS, LEASE = "_batchgen/status.json", f"{LEASES}/000000001.json"


def read_fingerprint(storage: Storage) -> str:
    return str((manifest.read_json(storage, manifest.SPEC) or {})["fingerprint"])


def read_segment(storage: Storage) -> None:
    refs = journal.read_index(storage, SEGMENT, read_fingerprint(storage))
    schema = make_result_schema(make_spec(make_small_tree()))
    journal.drop_repeated(pa.concat_tables(journal.read_ref(storage, ref, schema) for ref in refs.values()))


def read_shard(storage: Storage) -> None:
    read_footer(storage, SHARD)
    read_whole_file(storage.read_bytes(SHARD), SHARD)


def read_committed(storage: Storage) -> None:
    manifest.load_committed(storage, read_fingerprint(storage))


def read_control(storage: Storage) -> None:
    status = read_status(storage)
    read_lost_batches(storage)
    if status is not None:
        describe_status(storage, status)


def read_lease(storage: Storage) -> None:
    read_holder(find_lock(storage))


def read_suspects(storage: Storage) -> None:
    spec = make_spec(make_small_tree())
    queue = TrialQueue([QueuedShard(make_shard(0))], epoch=2, retry=spec.retry, cluster=spec.cluster)
    inquiry.Inquiry(storage, spec, queue, journal.JournalIndex(), print).load([0])


def read_lengths(storage: Storage) -> None:
    read_prior(make_spec(make_small_tree(input={"paths": ["/data/in.parquet"], "length_prior": storage.root})))


def read_spec(storage: Storage) -> None:
    check_fingerprint(storage, make_spec(make_small_tree()))


READERS: dict[str, tuple[str, Callable[[Storage], object]]] = {
    "segment": (SEGMENT, read_segment),
    "shard": (SHARD, read_shard),
    "committed copy": (manifest.COMMITTED, read_committed),
    "committed shard": (SHARD, read_committed),
    "plan": (manifest.PLAN_FILES, manifest.read_plan),
    "plan part": (manifest.PLAN_SHARDS.format(0), manifest.read_plan),
    "stats": ("batch_stats/run-000001.parquet", read_batch_stats),
    "status": (STATUS, read_control),
    "lease": (LEASE, read_lease),
    "lock": (manifest.LOCK, read_lease),
    "spec": (manifest.SPEC, read_spec),
    "suspects": (inquiry.PATH, read_suspects),
    "lengths": (LENGTHS, read_lengths),
    "handoff": (make_handoff_path(HANDOFF_ID), lambda storage: read_handoff(storage, HANDOFF_ID)),
}


def damage(data: st.DataObject, whole: bytes) -> bytes:
    kind = data.draw(st.sampled_from(["flip", "flip", "flip", "truncate", "splice", "any"]))
    if kind == "any":
        return data.draw(st.binary(max_size=60))
    if kind == "truncate":
        return whole[: data.draw(st.integers(0, len(whole) - 1))]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, len(whole) - 1))
        if kind == "splice":
            changed[position : position + 1] = data.draw(st.binary(max_size=4))
        else:
            changed[position % len(changed)] ^= data.draw(st.integers(1, 255))
    return bytes(changed)


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(data=st.data())
def test_damaged_files_are_read_or_refused(name: str, data: st.DataObject, folder: JobFolder) -> None:
    path, read = READERS[name]
    with folder.holding({path: damage(data, folder.files[path])}) as storage, only_ours():
        read(storage)


JSON_FILES = {name: entry for name, entry in READERS.items() if entry[0].endswith(".json")}


@pytest.mark.parametrize("name", JSON_FILES)
@fuzz
@given(data=st.data())
def test_json_of_any_shape_is_read_or_refused(name: str, data: st.DataObject, folder: JobFolder) -> None:
    """One field is something else, or missing."""
    path, read = JSON_FILES[name]
    value = json.loads(folder.files[path])
    changed = data.draw(st.sampled_from(sorted(value)))
    if data.draw(st.booleans()):
        value[changed] = data.draw(st.one_of(scalars, st.lists(scalars, max_size=3)))
    else:
        del value[changed]
    with folder.holding({path: json.dumps(value, default=str).encode()}) as storage, only_ours():
        read(storage)


@settings(fuzz, max_examples=fuzz.max_examples // 2)
@given(data=st.data())
def test_verify_has_a_word_for_everything(data: st.DataObject, folder: JobFolder) -> None:
    """Several files damaged at once, also those of which nothing is sealed."""
    paths = data.draw(st.lists(st.sampled_from(sorted(folder.files)), min_size=1, max_size=3, unique=True))
    changed = {path: damage(data, folder.files[path]) for path in paths}
    with folder.holding(changed) as storage, only_ours():
        verify(storage, with_input=True).to_json()


def test_no_flipped_bit_of_a_segment_changes_a_row(tmp_path: Path) -> None:
    """They would be committed: pages have checksums, and what is in the footer is compared with what must be there."""
    storage = Storage(str(tmp_path))
    rows = make_rows(make_ok(0, text="0123456789" * 20))
    refs = list(journal.write_segment(storage, SEGMENT, {0: rows}, "f").values())
    whole = storage.read_bytes(SEGMENT)
    num_refused = 0
    for position in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        Path(tmp_path, SEGMENT).write_bytes(changed)
        try:
            assert journal.read_ref(storage, refs[0], rows.schema).equals(rows), position
        except Damaged:
            num_refused += 1
    assert num_refused > len(whole) / 12
