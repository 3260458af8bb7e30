"""`{{ name }}` in the text of a job spec's tree. Pure: a tree and values in, a tree out.

Names and nothing else: no expressions, no filters, no defaults. A name that is not known is an error, never an empty text.
Only values of a tree are rendered, after YAML was read, so nothing that is put in can change the tree's shape. One kind of
name may be known and yet without a value: `previous.STAGE` on a pipeline's first run. Text that is no more than that
name is left out together with its key or its place in a list; inside longer text it is an error. A job's `prompt.template`
is left as it is: there doubled braces print one.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
Values = Mapping[str, str | None]

_OPENING = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_ABSENT = object()
# Where doubled braces mean a brace: a job's own template language.
_LEFT_ALONE: Path = ("prompt", "template")


class TemplateError(ValueError):
    """Something in the text at `path` of the tree can't be rendered. `line`: of it, counted from 0."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        super().__init__(message)
        self.path, self.line = path, line


def render(tree: Any, values: Values, path: Path = ()) -> Any:
    """The tree with every name replaced. Raises TemplateError."""
    found = _render(tree, values, path)
    return None if found is _ABSENT else found


def _render(tree: Any, values: Values, path: Path) -> Any:
    if isinstance(tree, str):
        return tree if path == _LEFT_ALONE else _render_text(tree, values, path)
    if isinstance(tree, Mapping):
        rendered = {key: _render(value, values, (*path, str(key))) for key, value in tree.items()}
        return {key: value for key, value in rendered.items() if value is not _ABSENT}
    if isinstance(tree, list | tuple):
        items = [_render(value, values, (*path, number)) for number, value in enumerate(tree)]
        kept = [item for item in items if item is not _ABSENT]
        return _ABSENT if items and not kept else kept
    return tree


def _render_text(text: str, values: Values, path: Path) -> Any:
    whole = _OPENING.fullmatch(text.strip())
    if whole is not None and text.count("{{") == 1:
        value = _look_up(whole.group(1), values, path, 0)
        return _ABSENT if value is None else value

    def put(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start())
        value = _look_up(match.group(1), values, path, line)
        if value is None:
            name = match.group(1).strip()
            raise TemplateError(
                path, line, f"'{name}' has no value on the first run; let it stand alone, to be left out"
            )
        return value

    return _OPENING.sub(put, text)


def _look_up(written: str, values: Values, path: Path, line: int) -> str | None:
    name = written.strip()
    if not _NAME.fullmatch(name):
        raise TemplateError(path, line, f"'{{{{ {name} }}}}' is no name; known: {', '.join(sorted(values))}")
    if name not in values:
        raise TemplateError(path, line, f"'{name}' is no template variable; known: {', '.join(sorted(values))}")
    return values[name]


def check_closed(text: str, path: Path) -> None:
    """For a rendered text in which no brace is meant to be one. Raises TemplateError."""
    left = next((braces for braces in ("{{", "}}") if braces in text), None)
    if left is not None:
        raise TemplateError(path, 0, f"'{left}' has no counterpart in '{text}'; write {{{{ name }}}}")


def list_names(tree: Any) -> Iterator[str]:
    """Every name that stands in a tree."""
    if isinstance(tree, str):
        yield from (match.group(1).strip() for match in _OPENING.finditer(tree))
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from list_names(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from list_names(value)
