"""Which metrics a PromQL expression reads. Not a parser: names outside of strings, labels, functions and `by (...)`."""

import re

WORDS = {"by", "on", "and", "or", "unless", "offset", "bool", "ignoring", "without", "group_left", "group_right"}


def list_metrics(expression: str) -> set[str]:
    text = re.sub(r'"[^"]*"', '""', expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    text = re.sub(r"\boffset\s+\w+", " ", text)
    found = re.findall(r"\b([a-zA-Z_:][\w:]*)\b(\s*\()?", text)
    return {name for name, is_call in found if not is_call and name not in WORDS}
