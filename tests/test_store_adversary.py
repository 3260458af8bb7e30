"""Whole jobs over a store that fails at random in every way S3 is known for, by a seed: slow-downs, internal errors,
resets, timeouts, replies lost after the store obeyed, bodies cut short, stale listings, conflicts of conditional writes,
expired credentials.

A run may stop for it, never with anything but an error of ours; started again it goes on, and in the end nothing is
missing, twice or damaged.
"""

from collections import Counter
from typing import Any

import pytest
from jobs_util import check_conserved, check_output, make_tree, merge, run, write_prompts
from s3_server import S3Proxy

from batchgen.errors import BatchgenError
from batchgen.storage import Storage
from batchgen.verify.verify import verify

pytestmark = pytest.mark.s3

MAX_RUNS = 20
MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 20)]


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.stores.s3.READ_TIMEOUT_S", 0.7)


def run_until_done(tree: dict[str, Any]) -> tuple[int, Counter[str]]:
    """(runs that it took, how each of them ended)."""
    ends: Counter[str] = Counter()
    for number in range(1, MAX_RUNS + 1):
        try:
            report, _ = run(tree)
        except BatchgenError as error:
            ends[type(error).__name__] += 1
            continue
        ends[report["state"]] += 1
        if report["exit_code"] == 0:
            return number, ends
    raise AssertionError(f"not done after {MAX_RUNS} runs: {ends}")


@pytest.mark.parametrize("seed", [*range(2), *MORE_SEEDS])
def test_a_job_comes_through_a_bad_store(s3_url: str, s3_proxy: S3Proxy, seed: int) -> None:
    files = write_prompts(f"{s3_url}/in", (30, 0, 25))
    tree = merge(make_tree(f"{s3_url}/in", f"{s3_url}/out"), {"cluster": {"lease_ttl_s": 30}})
    faults = s3_proxy.misbehave(seed, rate=0.08)
    run_until_done(tree)
    s3_proxy.behave()
    assert sum(faults.values()) > 5
    check_output(f"{s3_url}/out", files)
    check_conserved(f"{s3_url}/out", files)
    verdict = verify(Storage(f"{s3_url}/out"), with_input=True)
    assert [str(finding) for finding in verdict.findings] == []


@pytest.mark.parametrize("seed", [*range(1), *MORE_SEEDS])
def test_verify_never_blames_the_folder_for_its_store(s3_url: str, s3_proxy: S3Proxy, seed: int) -> None:
    """It finds nothing, or says that the store failed."""
    write_prompts(f"{s3_url}/in", (30,))
    run(merge(make_tree(f"{s3_url}/in", f"{s3_url}/out"), {"cluster": {"lease_ttl_s": 30}}))
    s3_proxy.misbehave(seed, rate=0.06)
    for _ in range(4):
        try:
            verdict = verify(Storage(f"{s3_url}/out"))
        except BatchgenError:
            continue
        assert [str(finding) for finding in verdict.findings] == []
    s3_proxy.behave()
    assert verify(Storage(f"{s3_url}/out")).exit_code == 0
