"""A pipeline's text: the tree that it stands for, and the line of each thing in it, for whoever finds one wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from batchgen.errors import SpecError
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.template import Path
from batchgen.specs.load import YAML_ERRORS


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tree came from: `lines` has the line (from 1) of each path in it, and the file where another was read in."""

    file: str
    lines: dict[Path, tuple[str, int]]

    def locate(self, path: Path, line: int = 0) -> str:
        """'file line 7' of a path, or of the nearest one around it. `line`: further down in that value."""
        while path and path not in self.lines:
            path = path[:-1]
        file, first = self.lines.get(path, (self.file, 1))
        return f"{file} line {first + line}"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A spec, and where it was written."""

    spec: PipelineSpec
    source: Source


def parse_source(text: str, file: str) -> tuple[dict[str, Any], Source]:
    """Plain values, and where each stands. Raises SpecError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise SpecError(
            f'{file}{where}: not valid YAML; mend the syntax there, and quote text with "{{{{ }}}}"'
        ) from error
    if not isinstance(tree, dict) or node is None:
        raise SpecError(f"{file} line 1: must be a mapping with name, state, schedule and stages")
    if (twice := _find_twice(node)) is not None:
        line = twice.start_mark.line + 1
        raise SpecError(f"{file} line {line}: '{twice.value}' stands there a second time; remove one of them")
    return tree, Source(file, {path: (file, line) for path, line in _walk(node, ())})


def _find_twice(node: yaml.Node) -> yaml.Node | None:
    """A key that its mapping has already."""
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen = set[str]()
        for key, value in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                return key  # type: ignore[no-any-return]
            seen.add(name)
            children.append(value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    return next((found for child in children if (found := _find_twice(child)) is not None), None)


def _walk(node: yaml.Node, path: Path) -> Iterator[tuple[Path, int]]:
    """(path, line counted from 1) of every value; of a block of text, of its first line."""
    is_block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    yield path, node.start_mark.line + 1 + is_block
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _walk(value, (*path, str(key.value)))
            if isinstance(value, yaml.CollectionNode):  # begins below its key, which is what people look for
                yield (*path, str(key.value)), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _walk(value, (*path, number))
