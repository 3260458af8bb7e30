"""`manifest.json`: what the output folder holds and what made it, written at the end of every run, before `_SUCCESS` only.

It names every data file with its rows and its footer digest (which covers the whole file: `seal`) and the SHA-256 of
everything else that is written down for good: spec, plan, batch_stats, the footers' copy, the report. No data file is
read for it: workers tell the digests when they commit. Sums of what is never changed are carried from manifest to
manifest, so that damage between two runs is not blessed by the second.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from batchgen.batch_stats import list_stats_files
from batchgen.driver.fence import Put
from batchgen.errors import NotFound
from batchgen.manifest import COMMITTED, PLAN_FOLDER, SPEC, CommittedShard, read_json
from batchgen.report.records import REPORT_HTML, REPORT_JSON
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.worker.seal import digest, is_json_whole, seal_json
from batchgen.write import FORMAT_VERSION

MANIFEST = "manifest.json"
# Rewritten by every run that ends; everything else is written once.
REWRITTEN = (COMMITTED, REPORT_JSON, REPORT_HTML)


def make_manifest(
    spec: JobSpec,
    committed: Iterable[CommittedShard],
    report: Mapping[str, Any],
    *,
    tokenizer_sha256: str | None,
    checksums: Mapping[str, str],
    is_trial: bool,
) -> dict[str, Any]:
    """Every data file with its rows, beside the report's count of rows: input times n = output = ok plus error."""
    shards = sorted(committed, key=lambda shard: shard.info.path)
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": report["fingerprint"],
        "epoch": report["epoch"],
        "is_trial": is_trial,
        "exit_code": report["exit_code"],
        "model": {"path": spec.model.path, "revision": spec.model.revision},
        "tokenizer_sha256": tokenizer_sha256,
        "engine": {"kind": spec.engine.kind, "versions": list_engine_versions(shards)},
        "rows": report["rows"],
        "files": [
            {
                "path": shard.info.path,
                "num_bytes": shard.info.num_bytes,
                "version": shard.info.version,
                "num_rows": shard.footer.num_rows_ok + shard.footer.num_rows_error,
                "num_rows_error": shard.footer.num_rows_error,
                "footer_sha256": shard.footer_sha256,
            }
            for shard in shards
        ],
        "checksums": dict(checksums),
    }


def list_engine_versions(shards: Iterable[CommittedShard]) -> list[str]:
    """Of every batch that has rows in the output; several where the engine was changed between runs."""
    batches = (batch for shard in shards for batch in shard.footer.batches)
    return sorted({batch.engine_version for batch in batches if batch.engine_version is not None})


def write_manifest(
    storage: Storage,
    put: Put,
    spec: JobSpec,
    committed: Iterable[CommittedShard],
    report: Mapping[str, Any],
    *,
    is_trial: bool,
) -> None:
    """After everything that it has sums of."""
    saved = read_json(storage, SPEC) or {}
    value = make_manifest(
        spec,
        committed,
        report,
        tokenizer_sha256=saved.get("tokenizer_sha256"),
        checksums=list_checksums(storage, _read_earlier_checksums(storage)),
        is_trial=is_trial,
    )
    put(MANIFEST, seal_json(value))


def list_checksums(storage: Storage, earlier: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 by path of what is there; of what is written once, the sum that an earlier manifest has."""
    planned = [info.path for info in storage.list_files(PLAN_FOLDER, ".parquet")]
    kept = [*list_stats_files(storage), *planned]
    known = {path: earlier[path] for path in [SPEC, *kept] if path in earlier}
    for path in [SPEC, *kept, *REWRITTEN]:
        if path not in known:
            known[path] = digest(storage.read_bytes(path))
    return known


def _read_earlier_checksums(storage: Storage) -> dict[str, str]:
    try:
        raw = storage.read_bytes(MANIFEST)
        is_whole = is_json_whole(raw)
    except (NotFound, ValueError, RecursionError):
        return {}
    return dict((read_json(storage, MANIFEST) or {}).get("checksums", {})) if is_whole else {}
