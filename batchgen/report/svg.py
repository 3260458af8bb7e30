"""Shapes of a chart as SVG text. Pure; every text is escaped here.

A plot is drawn in a box of WIDTH x HEIGHT that the page stretches to whatever room there is: shapes only, no text in it, so
that letters stay as large as the reader's on a phone. Axis labels are the page's own. Colours are the page's classes.
"""

import html
from collections.abc import Iterable, Sequence

WIDTH, HEIGHT = 1000.0, 100.0

Points = Sequence[tuple[float, float]]
_SIGNS = dict.fromkeys({*range(32)} - {*b"\t\n"}, "�")


def clean(text: object) -> str:
    """Control characters (C0 but tab and newline) as a visible sign, lone surrogates as `?`."""
    return str(text).translate(_SIGNS).encode(errors="replace").decode()


def escape(text: object) -> str:
    """Clean, and nothing in it is markup."""
    return html.escape(clean(text))


def plot(title: str, description: str, shapes: Iterable[str], *, height: float = HEIGHT) -> str:
    """`title` and `description` are what a screen reader says of it."""
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {_number(height)}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"{''.join(shapes)}</svg>"
    )


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    place = " ".join(
        f'{name}="{_number(value)}"'
        for name, value in zip(("x", "y", "width", "height"), (x, y, width, height), strict=True)
    )
    return f'<rect class="{kind}" {place}>{inner}</rect>' if inner else f'<rect class="{kind}" {place}/>'


def line(points: Points, kind: str) -> str:
    path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
    return f'<polyline class="line {kind}" points="{path}"/>' if points else ""


def area(points: Points, floor: Points, kind: str) -> str:
    """Between the points and, back again, the floor's."""
    around = [*points, *reversed(floor)]
    return f'<polygon class="{kind}" points="{" ".join(f"{_number(x)},{_number(y)}" for x, y in around)}"/>'


def vertical(x: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_number(x)}" x2="{_number(x)}" y1="0" y2="{HEIGHT:g}"/>'


def grid(parts: int = 4) -> list[str]:
    """Faint lines across at equal heights."""
    heights = (HEIGHT * place / parts for place in range(parts + 1))
    return [f'<line class="grid" x1="0" x2="{WIDTH:g}" y1="{_number(y)}" y2="{_number(y)}"/>' for y in heights]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def make_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers' columns, all but the first, stand to the right."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
