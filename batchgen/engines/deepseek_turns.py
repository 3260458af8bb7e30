"""The messages of a DeepSeek-V3.2 chat as checked turns: who may say what, and in which order. Pure.

A chat that comes out of here can be rendered, and an answer can follow it. Whatever can't raises BadRow 'bad_messages',
which says the message and the reason and quotes nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from batchgen.errors import BadRow

ASKING = ("user", "developer")


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of an earlier answer."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, checked. `number` counts from 0 in the row's chat. `call_id`: of which call this is the result."""

    number: int
    role: str
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    response_format: Any = None


def refuse(number: int, reason: str) -> NoReturn:
    raise BadRow("bad_messages", f"message {number}: {reason}")


def make_turns(messages: Sequence[Any], *, thinking: bool) -> tuple[list[Turn], int]:
    """(turns, number of the last question; -1 where there is none). Raises BadRow."""
    turns = [make_turn(message, number) for number, message in enumerate(messages)]
    last_asked = max((turn.number for turn in turns if turn.role in ASKING), default=-1)
    check_order(turns, last_asked if thinking else len(turns))
    return turns, last_asked


def make_turn(message: Any, number: int) -> Turn:
    """The message with all that its role may have. Raises BadRow."""
    if not isinstance(message, dict):
        refuse(number, "must be a struct with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "assistant", "tool", *ASKING):
        refuse(number, "the roles are system, developer, user, assistant and tool")
    if not isinstance(content, str) and not (content is None and role in ("system", "assistant")):
        refuse(number, "content must be text")
    turn = Turn(number, str(role), content or "")
    if role == "developer" and not content:
        refuse(number, "a developer message must have content")
    if role in ("system", "developer"):
        tools = make_tools(message.get("tools"), number)
        return replace(turn, tools=tools, response_format=message.get("response_format"))
    if role == "tool":
        return replace(turn, call_id=get_id(message, "tool_call_id"))
    return replace(turn, **make_answered(message, number)) if role == "assistant" else turn


def make_tools(tools: Any, number: int) -> tuple[dict[str, Any], ...]:
    if tools is not None and not isinstance(tools, list | tuple):
        refuse(number, "tools must be a list of tool definitions")
    if not all(isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in tools or ()):
        refuse(number, "each of tools must be a struct with a function")
    return tuple(tools or ())


def make_answered(message: dict[str, Any], number: int) -> dict[str, Any]:
    """What the assistant thought and called."""
    reasoning, calls = message.get("reasoning") or message.get("reasoning_content"), message.get("tool_calls")
    if reasoning is not None and not isinstance(reasoning, str):
        refuse(number, "reasoning must be text")
    if calls is not None and not isinstance(calls, list | tuple):
        refuse(number, "tool_calls must be a list")
    return {"reasoning": reasoning or "", "calls": tuple(make_call(call, number) for call in calls or ())}


def make_call(call: Any, number: int) -> Call:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        refuse(number, "each of tool_calls must be a struct with a function that has a name")
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        refuse(number, "the arguments of a tool call are not valid JSON")
    if not isinstance(arguments, dict):
        refuse(number, "the arguments of a tool call must be a JSON object")
    return Call(function["name"], arguments, get_id(call, "id"))


def get_id(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None


def check_order(turns: Sequence[Turn], last_asked: int) -> None:
    """Raises BadRow for turns that no answer can follow. `last_asked`: the answers after it must have been thought."""
    if not turns:
        raise BadRow("bad_messages", "the chat holds no message")
    if turns[-1].role not in ("tool", *ASKING):
        refuse(turns[-1].number, "the last message must be the user's or a tool's, or there is nothing to answer")
    for turn in turns:
        if turn.role == "tool":
            check_results(turns, turn)
        if turn.role == "assistant" and turn.number > last_asked and not (turn.reasoning or turn.calls):
            refuse(turn.number, "after the last user message an answer must have reasoning or tool_calls (thinking)")


def check_results(turns: Sequence[Turn], turn: Turn) -> None:
    results = list_results(turns, turn.number)
    before = turns[turn.number - 1] if turn.number else None
    if before is None or (before.role not in ("assistant", "tool") or (results and not before.calls)):
        refuse(turn.number, "a tool's result must follow the tool_calls that it answers")
    if results and before.role == "assistant" and len(results) != len(before.calls):
        refuse(turn.number, f"{len(before.calls)} tool_calls need as many results, not {len(results)}")


def list_results(turns: Sequence[Turn], number: int) -> list[Turn]:
    """The results that stand together from here on; none where the turn before is one of them."""
    if number and turns[number - 1].role == "tool":
        return []
    end = next((turn.number for turn in turns[number:] if turn.role != "tool"), len(turns))
    return list(turns[number:end])
