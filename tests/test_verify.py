"""`batchgen verify`: finds whatever is done to a folder, and nothing on one to which nothing was done."""

import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_util import (
    SLOW_ENGINE,
    Tree,
    call_cli,
    list_output,
    make_prompts,
    make_tree,
    put_files,
    read_many,
    run,
    running,
    to_parquet,
    wait_for,
    write_file,
)
from mutations import MUTATIONS, SHOWING, Folder, Mutation, edit_json, edit_rows, list_data
from typer.testing import CliRunner

from batchgen.batches import FileFooter
from batchgen.cli import app
from batchgen.errors import OutputError
from batchgen.storage import Storage
from batchgen.verify.rows import KeyCheck, check_batches, check_plan, confirm_repeated
from batchgen.verify.verify import Verdict, verify
from batchgen.worker.seal import digest_footer, is_json_whole, seal_json, write_sealed
from batchgen.write import FOOTER_KEY

NUM_MUTATIONS = 100


@dataclass
class Place:
    """A job's output somewhere, and what is in it. `sync` makes the store hold another content."""

    out: str
    folder: Folder

    def sync(self, folder: Folder) -> None:
        changed = {path: data for path, data in folder.items() if self.folder.get(path) != data}
        put_files({f"{self.out}/{path}": data for path, data in changed.items()})
        Storage(self.out).delete_many(self.folder.keys() - folder.keys())
        self.folder = dict(folder)

    def verify(self) -> Verdict:
        return verify(Storage(self.out))


def read_out(out: str) -> Folder:
    names = list_output(out)
    return {name[len(out) + 1 :]: data for name, data in read_many(names).items()}


def make_job(root: str, name: str, **over: Any) -> Tree:
    """Two samples a row, the user's keys, rows that fail for good, and shards of several row groups' rows."""
    table = make_prompts(60).append_column("topic", pa.array([None if i % 7 else f"t{i}" for i in range(60)]))
    prompts = [None if i in (3, 44) else text for i, text in enumerate(table["prompt"].to_pylist())]
    table = table.set_column(0, "prompt", pa.array(prompts, pa.string()))
    paths = [f"{root}/in/{part}.parquet" for part in range(2)]
    for part, path in enumerate(paths):
        if path not in list_output(root, "in"):  # the same input for every job below one root
            write_file(path, table.slice(30 * part, 30))
    settings: Tree = {
        "input": {"paths": paths, "custom_id": "key", "passthrough": ["topic"]},
        "sampling": {"n": 2, "max_tokens": 32},
        "retry": {"max_error_rate": 0.2},
    }
    return make_tree(paths, f"{root}/{name}", **{**settings, **over})


def run_job(root: str, name: str) -> Folder:
    """In two runs, so that there is more than one file of everything."""
    tree = make_job(root, name)
    run(tree, limit=20)
    report, _ = run(tree)
    assert (report["exit_code"], report["rows"]["error"]) == (0, 4)
    return read_out(f"{root}/{name}")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Folder]:
    root = str(tmp_path_factory.mktemp("verify"))
    return Place(f"{root}/out", run_job(root, "out")), run_job(root, "other")


def mutate(place: Place, other: Folder, mutation: Mutation, seed: int) -> tuple[str, Verdict]:
    """(path that was touched, what verify says); the folder is as before afterwards."""
    before = dict(place.folder)
    folder = dict(before)
    rng = random.Random(seed)
    path = mutation(rng, folder, other)
    while folder == before:  # e.g. the same file of the other job
        path = mutation(rng, folder, other)
    place.sync(folder)
    try:
        return path, place.verify()
    finally:
        place.sync(before)


def check_found(path: str, verdict: Verdict) -> None:
    assert verdict.exit_code == 1
    assert any(path in str(finding) for finding in verdict.findings), [str(finding) for finding in verdict.findings]
    assert all(finding.what and finding.mend for finding in verdict.findings)


# ---- damage


def test_nothing_is_found_on_an_untouched_folder(local: tuple[Place, Folder]) -> None:
    verdict = local[0].verify()
    assert (verdict.findings, verdict.todo, verdict.exit_code) == ([], [], 0)
    assert (verdict.counts["rows_ok"], verdict.counts["rows_error"]) == (116, 4)
    assert verdict.counts["files_without_digest"] == 0
    assert verify(Storage(local[0].out), with_input=True).exit_code == 0


@pytest.mark.parametrize("seed", range(NUM_MUTATIONS))
def test_every_mutation_is_found(local: tuple[Place, Folder], seed: int) -> None:
    place, other = local
    check_found(*mutate(place, other, MUTATIONS[seed % len(MUTATIONS)], seed))


def test_every_bit_of_small_files_matters(local: tuple[Place, Folder]) -> None:
    place, before = local[0], dict(local[0].folder)
    for path in ("_SUCCESS", "manifest.json"):
        for position in range(0, len(before[path]), 1 if path == "_SUCCESS" else 37):
            data = bytearray(before[path])
            data[position] ^= 1 << (position % 8)
            assert read_wholeness(bytes(data)) is False, position
    assert place.folder == before


def read_wholeness(raw: bytes) -> bool | None:
    try:
        return is_json_whole(raw)
    except ValueError:
        return False


@pytest.mark.s3
def test_mutations_on_s3_are_found(s3_url: str) -> None:
    place, other = Place(f"{s3_url}/out", run_job(s3_url, "out")), run_job(s3_url, "other")
    assert place.verify().exit_code == 0
    for seed, mutation in enumerate(MUTATIONS):
        check_found(*mutate(place, other, mutation, seed))
    assert place.verify().exit_code == 0


# ---- folders of an earlier version, without digests


def make_old(folder: Folder) -> Folder:
    """The folder as the version before digests wrote it."""
    old = {}
    for path, data in folder.items():
        if path.startswith("data/"):
            parquet = pq.ParquetFile(pa.BufferReader(data))
            old[path] = to_parquet(parquet.read().replace_schema_metadata(parquet.schema_arrow.metadata))
        elif path in ("_batchgen/spec.json", "manifest.json", "_SUCCESS"):
            value = json.loads(data)
            for name in ("is_sealed", "sha256", "checksums", "tokenizer_sha256", "is_trial", "exit_code"):
                value.pop(name, None)
            for file in value.get("files", []):
                del file["footer_sha256"]
                file["num_bytes"] = len(old.get(file["path"], b"")) or len(folder[file["path"]])
            old[path] = json.dumps(value).encode()
        else:
            old[path] = data
    for file in (manifest := json.loads(old["manifest.json"]))["files"]:
        file["num_bytes"] = len(old[file["path"]])
    old["manifest.json"] = json.dumps(manifest).encode()
    return old


@pytest.fixture
def old_place(local: tuple[Place, Folder]) -> Iterator[Place]:
    place, before = local[0], dict(local[0].folder)
    place.sync(make_old(before))
    yield place
    place.sync(before)


def test_an_old_folder_is_right_and_says_what_could_not_be_checked(old_place: Place) -> None:
    verdict = old_place.verify()
    assert (verdict.findings, verdict.exit_code) == ([], 0)
    [note] = verdict.notes
    assert "6 shard files and _batchgen/spec.json, manifest.json, _SUCCESS were written by an earlier version" in note


@pytest.mark.parametrize("seed", range(3 * len(SHOWING)))
def test_rows_names_and_counts_show_damage_without_digests(
    old_place: Place, local: tuple[Place, Folder], seed: int
) -> None:
    check_found(*mutate(old_place, local[1], SHOWING[seed % len(SHOWING)], seed))


def test_an_old_folder_is_gone_on_with(tmp_path: Path) -> None:
    """Its shard files keep what they have; the next run's manifest has the digests of all footers."""
    tree = make_job(str(tmp_path), "out")
    run(tree, limit=20)
    place = Place(str(tmp_path / "out"), read_out(str(tmp_path / "out")))
    old = make_old(place.folder)
    del old["_batchgen/committed.parquet"]
    place.sync(old)
    report, _ = run(tree)
    assert report["exit_code"] == 0
    verdict = verify(Storage(place.out))
    assert (verdict.findings, verdict.exit_code) == ([], 0)
    assert 0 < verdict.counts["files_without_digest"] < verdict.counts["files"]


# ---- what a forger of one file must still meet


def test_a_resealed_file_is_not_the_one_of_the_manifest(local: tuple[Place, Folder]) -> None:
    place = local[0]
    folder = dict(place.folder)
    path = list_data(folder)[0]
    edit_rows(folder, path, with_other_text, seals_anew=True)
    before = dict(place.folder)
    assert folder != before
    place.sync(folder)
    try:
        [finding] = place.verify().findings
    finally:
        place.sync(before)
    assert finding.what == "its footer is not the one that manifest.json knows"


def test_a_resealed_manifest_must_still_count_right(local: tuple[Place, Folder]) -> None:
    place, before = local[0], dict(local[0].folder)
    value = json.loads(before["manifest.json"])
    del value["sha256"], value["is_sealed"]
    value["rows"]["ok"] += 1
    place.sync({**before, "manifest.json": seal_json(value)})
    try:
        found = [str(finding) for finding in place.verify().findings]
    finally:
        place.sync(before)
    assert any("counts rows that are not there: ok 117 where there are 116" in line for line in found)
    assert any("report.json: does not say what manifest.json says" in line for line in found)


# ---- unfinished jobs


def test_a_trial_is_right_and_unfinished(tmp_path: Path) -> None:
    run(make_job(str(tmp_path), "out"), limit=20)
    verdict = verify(Storage(str(tmp_path / "out")))
    assert (verdict.findings, verdict.exit_code, verdict.state) == ([], 3, "unfinished")
    assert verdict.todo == ["its last run was a trial (--limit); run the job without it"]


def read_digests(out: str) -> dict[str, str]:
    manifest = json.loads(Path(out, "manifest.json").read_bytes())
    return {file["path"]: file["footer_sha256"] for file in manifest["files"]}


def test_a_job_is_verified_while_it_runs_after_a_kill_and_at_its_end(tmp_path: Path) -> None:
    tree = make_job(str(tmp_path), "out", engine=SLOW_ENGINE, input={"custom_id": "key"})
    tree["input"] = make_job(str(tmp_path), "out")["input"]
    out, data = str(tmp_path / "out"), tmp_path / "out" / "data"
    with running(tmp_path, tree) as job:
        wait_for(lambda: job.err and len(list(data.glob("*"))) >= 2, what="two shards")
        verdict = verify(Storage(out))
        assert (verdict.findings, verdict.exit_code) == ([], 3)
        assert any("a run may be working on it: process" in line for line in verdict.todo)
        job.signal(signal.SIGKILL)
        job.wait()
    verdict = verify(Storage(out))
    assert (verdict.findings, verdict.exit_code) == ([], 3)
    assert "its last run ended without a word; run the job again" in verdict.todo
    assert any("shards are not done" in line for line in verdict.todo)
    check_rows_of_an_unfinished_job(out, data)
    report, _ = run(tree)
    assert report["exit_code"] == 0
    verdict = verify(Storage(out))
    assert (verdict.findings, verdict.todo, verdict.exit_code) == ([], [], 0)
    # Of the shards that the killed driver took in, too, and no row was read for it.
    assert read_digests(out) == {f"data/{path.name}": digest_footer(path.read_bytes()) for path in data.iterdir()}


def check_rows_of_an_unfinished_job(out: str, data: Path) -> None:
    """No manifest yet: the file's own seal shows it."""
    path = min(data.iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    [finding] = verify(Storage(out)).findings
    assert (finding.where, finding.what) == (str(path), "its rows are not the bytes that were committed")
    path.write_bytes(whole)


def test_a_damaged_journal_segment_is_named(tmp_path: Path) -> None:
    run(make_job(str(tmp_path), "out"), limit=20)
    segment = tmp_path / "out/_batchgen/journal/e000001-worker-0001-000001.parquet"
    segment.parent.mkdir(exist_ok=True)
    segment.write_bytes(b"PAR1 and no more")
    [finding] = verify(Storage(str(tmp_path / "out"))).findings
    assert finding.where == str(segment)
    assert str(finding).endswith("is damaged, or no journal segment; delete it: its rows are generated again")


# ---- error rows that are replaced


def make_failing(root: str, rate: float) -> Tree:
    over: Tree = {"retry": {"max_attempts": 1, "max_error_rate": 0.9, "backoff_s": 0.01}}
    tree = make_job(root, "out", **over)
    tree["engine"]["failure_rate"] = rate
    return tree


def test_replaced_error_rows_keep_every_digest_right(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run(make_failing(str(tmp_path), 0.4))
    first = read_digests(out)
    assert verify(Storage(out)).exit_code == 0
    report, _ = run(make_failing(str(tmp_path), 0.0))
    assert report["rows"]["error"] == 4
    assert verify(Storage(out)).findings == []
    second = read_digests(out)
    assert first.keys() == second.keys()
    assert any(first[path] != second[path] for path in first)


def with_other_text(table: pa.Table) -> pa.Table:
    texts = [text and f"{text}!" for text in table["text"].to_pylist()]
    place = table.schema.get_field_index("text")
    return table.set_column(place, table.schema.field(place), pa.array(texts, pa.string()))


def test_a_damaged_file_is_not_given_a_new_seal(tmp_path: Path) -> None:
    run(make_failing(str(tmp_path), 0.9))
    path = min((tmp_path / "out/data").iterdir())
    folder = {"data/x": path.read_bytes()}
    edit_rows(folder, "data/x", with_other_text)
    path.write_bytes(folder["data/x"])
    report, _ = run(make_failing(str(tmp_path), 0.0))
    assert report["state"] == "stopped"
    assert (
        f"{path}: was changed since it was written; restore it, or delete it to generate it again" in report["message"]
    )
    assert path.read_bytes() == folder["data/x"]
    path.unlink()
    report, _ = run(make_failing(str(tmp_path), 0.0))
    assert (report["state"], report["rows"]["error"]) == ("finished", 4)
    assert verify(Storage(str(tmp_path / "out"))).exit_code == 0


# ---- the input, the command


def test_input_that_was_changed_is_found_where_asked(tmp_path: Path) -> None:
    tree = make_job(str(tmp_path), "out")
    run(tree)
    first, second = tree["input"]["paths"]
    write_file(first, make_prompts(30))
    Path(second).unlink()
    storage = Storage(str(tmp_path / "out"))
    assert verify(storage).exit_code == 0
    verdict = verify(storage, with_input=True)
    assert verdict.exit_code == 1


def test_changed_input_is_named(tmp_path: Path) -> None:
    tree = make_job(str(tmp_path), "out")
    run(tree)
    write_file(tree["input"]["paths"][0], make_prompts(30))
    [finding] = verify(Storage(str(tmp_path / "out")), with_input=True).findings
    assert (finding.where, finding.what) == (tree["input"]["paths"][0], "was changed since it was planned")


def test_the_manifest_says_what_made_the_data(tmp_path: Path) -> None:
    run(make_job(str(tmp_path), "out"))
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert manifest["model"] == {"path": "embedded", "revision": None}
    assert manifest["engine"]["kind"] == "simulated"
    assert len(manifest["engine"]["versions"]) == 1
    assert len(manifest["tokenizer_sha256"]) == 64
    assert manifest["rows"]["output"] == 120


def invoke(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["verify", *args])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_one_line_a_finding(tmp_path: Path) -> None:
    run(make_job(str(tmp_path), "out"))
    out = str(tmp_path / "out")
    assert invoke(out) == (0, "", f"{out}: right; checked 6 of 6 shards, 120 rows, 0 findings\n")
    (tmp_path / "out/data/shard-000000002.parquet").unlink()
    (tmp_path / "out/data/notes.txt").write_text("mine")
    code, stdout, stderr = invoke(out, "--json")
    assert code == 1
    lines = stderr.splitlines()
    assert lines[0] == f"wrong: {out}/data/notes.txt: is no shard of this job's plan; move it away"
    assert lines[1].startswith(f"wrong: {out}/data/shard-000000002.parquet: is gone; restore it from a copy, or run")
    assert json.loads(stdout)["findings"][0]["where"] == f"{out}/data/notes.txt"
    assert (json.loads(stdout)["exit_code"], len(lines)) == (1, 3)


def test_what_is_no_job_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no job of batchgen; give the output\.path of one"):
        verify(Storage(str(tmp_path / "nothing")))
    assert call_cli("verify", str(tmp_path / "nothing"), "--json").code == 2


# ---- the pure part


def test_keys_with_one_hash_are_looked_at_again() -> None:
    check = KeyCheck()
    check.add([5, 6, 7])
    check.add([-9, 6, 8, -9])
    assert check.list_suspects() == {6, -9}
    assert KeyCheck().list_suspects() == set()
    places = [("a", "f row 1"), ("b", "f row 2"), ("a", "g row 7")]
    assert list(confirm_repeated(places)) == [("g row 7", "f row 1")]
    assert list(confirm_repeated(places[:2])) == []


def test_a_key_that_is_there_twice_is_found(tmp_path: Path) -> None:
    """Written so by somebody who also makes every digest anew."""
    run(make_job(str(tmp_path), "out"))
    folder = read_out(str(tmp_path / "out"))
    path = list_data(folder)[0]

    def edit(table: pa.Table) -> pa.Table:
        keys = table["custom_id"].to_pylist()
        keys[:2] = keys[4:6]
        return table.set_column(0, table.schema.field(0), pa.array(keys))

    edit_rows(folder, path, edit, seals_anew=True)
    del folder["manifest.json"], folder["report.json"], folder["_SUCCESS"]
    Place(str(tmp_path / "out"), read_out(str(tmp_path / "out"))).sync(folder)
    [finding] = verify(Storage(str(tmp_path / "out"))).findings
    where = f"{tmp_path}/out/{path}"
    assert str(finding).startswith(f"{where} row 2: has the custom_id of {where} row 0; ")


def test_stats_are_compared_with_the_rows() -> None:
    stats = [
        {"batch_id": "a", "num_rows_ok": 3, "completion_tokens": 30, "num_rows_copied": 0},
        {"batch_id": "b", "num_rows_ok": None, "completion_tokens": None, "num_rows_copied": None},
    ]
    assert list(check_batches(stats, {"a": (3, 30), "b": (0, 0)}, is_exact=True)) == []
    assert list(check_batches(stats, {"a": (2, 20)}, is_exact=False)) == []
    [fault] = check_batches(stats, {"a": (2, 20)}, is_exact=True)
    assert fault == "says 3 ok rows and 30 completion tokens of a; data/ holds 2 and 20"
    [fault] = check_batches(stats, {"c": (1, 1)}, is_exact=True)
    assert fault == "has no line for c, of which data/ holds rows"
    [fault] = check_batches([*stats, stats[0]], {}, is_exact=True)
    assert fault == "holds a more than once"


def test_a_plan_with_a_gap_or_an_overlap_is_found(local: tuple[Place, Folder]) -> None:
    from batchgen.manifest import read_plan

    saved = read_plan(Storage(local[0].out))
    assert saved is not None
    files, _, shards = saved
    assert check_plan(files, shards) == []
    assert check_plan(files, shards[:3]) == []
    assert check_plan(files, [*shards[:2], *shards[3:]]) == [
        "shard-000000003 does not begin where the one before it ends"
    ]
    assert check_plan(files, [shards[0], *shards]) == ["shard-000000000 does not begin where the one before it ends"]


def test_a_sealed_file_is_read_by_its_footer_alone() -> None:
    table = pa.table({"x": range(5000)}).replace_schema_metadata({FOOTER_KEY: b"{}"})
    data = write_sealed(table, row_group_rows=1000, compression_level=3).to_pybytes()
    assert pq.read_table(pa.BufferReader(data)).num_rows == 5000
    assert digest_footer(data) != digest_footer(write_sealed(table[:4999], row_group_rows=1000, compression_level=3))
    assert FileFooter.__dataclass_fields__.keys() >= {"fingerprint", "batches"}


def test_sealed_json_is_told_from_json_that_never_was() -> None:
    raw = seal_json({"a": 1.5, "text": "é", "none": None})
    assert is_json_whole(raw) is True
    assert is_json_whole(raw + b" ") is False
    assert is_json_whole(raw.replace(b"is_sealed", b"is_sealee")) is False
    assert is_json_whole(b'{"a": 1}') is None
    with pytest.raises(ValueError, match="no JSON object"):
        is_json_whole(b"[1]")


def test_editing_by_hand_is_found_even_where_it_changes_nothing(local: tuple[Place, Folder]) -> None:
    folder = dict(local[0].folder)
    edit_json(folder, "manifest.json", lambda _: None)
    assert folder == local[0].folder
    pretty = json.dumps(json.loads(folder["manifest.json"]), indent=1).encode()
    assert is_json_whole(pretty) is False
