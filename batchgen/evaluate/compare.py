"""Two runs, or more, of the same benchmarks side by side: what each scored, what that says, and how fast each was.

A comparison needs the same questions, prompts and sampling on both sides; anything else is refused by name. Evaluations
are matched by their place below the two folders, so that one folder may hold many.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchgen.errors import InputError
from batchgen.evaluate.benchmarks import CARD
from batchgen.evaluate.folder import SCORES, SUMMARY, read_stored
from batchgen.evaluate.statistics import Comparison, compare_scores, comparison_to_json
from batchgen.manifest import read_json
from batchgen.storage import Storage

# Asking fewer or more samples is no other question; a seed only makes it repeatable.
FREE_SAMPLING = ("n", "seed")
# Of a summary, for a comparison.
NEEDED = ("benchmark", "title", "digest", "sampling", "speed")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation as it was scored. `rights`: by question, of each sample; `clusters`: by question."""

    url: str
    summary: dict[str, Any]
    rights: dict[str, list[bool]]
    clusters: dict[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: a benchmark, two runs. `name`: where it lies below the folders."""

    name: str
    title: str
    benchmark: str
    other_name: str
    base: dict[str, Any]
    other: dict[str, Any]
    comparison: Comparison


def read_evaluations(url: str) -> dict[str, Evaluation]:
    """All below a folder, by their place in it ('' for the folder itself). Raises InputError where there is none."""
    root = Storage(url)
    return {place: read_evaluation(Storage(root.url(place))) for place in find_places(root)}


def find_places(root: Storage) -> list[str]:
    """Raises InputError where there is none."""
    paths = {info.path for info in root.list_files()}
    places = [path[: -len(SUMMARY)].rstrip("/") for path in sorted(paths) if f"/{path}".endswith(f"/{SUMMARY}")]
    places = [place for place in places if f"{place}/{SCORES}".lstrip("/") in paths]
    if not places:
        raise InputError(f"{root.root}: holds no scores; batchgen evaluate run, or score, makes them")
    return places


def read_evaluation(storage: Storage) -> Evaluation:
    """Raises InputError while programs were not run: nothing is known of them."""
    summary = read_json(storage, SUMMARY) or {}
    if missing := [name for name in NEEDED if name not in summary]:
        raise InputError(f"{storage.url(SUMMARY)}: lacks {missing[0]}; batchgen evaluate score OUT writes it again")
    rights: dict[str, list[bool]] = defaultdict(list)
    clusters = {}
    for row in read_stored(storage, SCORES, ["question", "cluster", "is_right"]).to_pylist():
        if row["is_right"] is None:
            raise InputError(f"{storage.root}: its programs were not run; batchgen evaluate score OUT --run-code")
        rights[row["question"]].append(row["is_right"])
        clusters[row["question"]] = row["cluster"]
    return Evaluation(storage.root, summary, dict(rights), clusters)


def compare_folders(base: str, others: Sequence[str], *, margin: float, confidence: float) -> list[Line]:
    """Lines by place, then by other. Raises InputError where nothing, or not the same, was asked of both."""
    ours = read_evaluations(base)
    lines = []
    names = name_folders([base, *others])[1:]
    found = [(name, read_evaluations(url)) for name, url in zip(names, others, strict=True)]
    for place in sorted(ours):
        for name, theirs in found:
            if place in theirs:
                lines.append(compare_two(place, name, ours[place], theirs[place], margin, confidence))
    if not lines:
        raise InputError(f"{base} and {', '.join(others)}: hold no evaluation at the same place; name folders alike")
    return lines


def list_unmatched(base: str, others: Sequence[str]) -> list[str]:
    """Evaluations that have nothing beside them."""
    places = {url: set(find_places(Storage(url))) for url in [base, *others]}
    everywhere = set.union(*places.values())
    return [f"{url} has no '{place}'" for url, there in places.items() for place in sorted(everywhere - there)]


def name_folders(urls: Sequence[str]) -> list[str]:
    """Short names: the last part of each, or the whole where that does not tell them apart."""
    short = [url.rstrip("/").rpartition("/")[2] for url in urls]
    return short if len(set(short)) == len(short) else [url.rstrip("/") for url in urls]


def compare_two(
    place: str, other_name: str, base: Evaluation, other: Evaluation, margin: float, confidence: float
) -> Line:
    check_same(base, other)
    questions = sorted(base.rights)
    sizes = {len(evaluation.rights[question]) for evaluation in (base, other) for question in questions}
    try:
        comparison = compare_scores(
            [_share(base.rights[question]) for question in questions],
            [_share(other.rights[question]) for question in questions],
            [base.clusters[question] for question in questions],
            num_samples=min(_count(base), _count(other)),
            is_single=sizes == {1},
            margin=margin,
            confidence=confidence,
        )
    except ValueError as error:
        raise InputError(f"{base.url}: {error}") from error
    title, benchmark = base.summary["title"], base.summary["benchmark"]
    return Line(place or benchmark, title, benchmark, other_name, base.summary, other.summary, comparison)


def _share(rights: Sequence[bool]) -> float:
    return sum(rights) / len(rights)


def _count(evaluation: Evaluation) -> int:
    return sum(map(len, evaluation.rights.values()))


def check_same(base: Evaluation, other: Evaluation) -> None:
    """Raises InputError."""
    pair = f"{base.url} and {other.url}"
    for name in ("benchmark", "digest"):
        if base.summary[name] != other.summary[name]:
            what = "are different benchmarks" if name == "benchmark" else "asked different questions or prompts"
            raise InputError(f"{pair}: {what}; run both with one dataset and prompt")
    ours, theirs = base.summary["sampling"], other.summary["sampling"]
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in FREE_SAMPLING and ours.get(name) != theirs.get(name):
            raise InputError(
                f"{pair}: sampling.{name} is {ours.get(name)} in one and {theirs.get(name)} in the other; run both alike"
            )


def line_to_json(line: Line) -> dict[str, Any]:
    card = CARD.get(line.benchmark)
    return {
        "name": line.name,
        "benchmark": line.benchmark,
        "other_name": line.other_name,
        "base": line.base,
        "other": line.other,
        "card": None if card is None else {"fp8": card[0], "nvfp4": card[1]},
        "comparison": comparison_to_json(line.comparison),
    }
