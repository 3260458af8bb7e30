"""DeepSeek-V3.2's chat format: messages in, the text that the model was trained on out; and its answers taken apart. Pure.

The model has no Jinja template; `encoding/encoding_dsv32.py` beside its weights is the specification, and the input and
output files there are its examples, which our tests hold. Invariants: the text begins with the beginning-of-text token and
ends where the answer begins; no refusal quotes a message; parsing never fails: a tool call that is cut off or malformed
stays in the text as it was written.

Where we differ from the specification: conversations that it renders into something no answer can follow are refused
(the last turn is the assistant's, some results of several calls are missing); results that name their calls are put in
the calls' order, the only thing that tells them apart; an earlier developer message is kept, which it loses track of.
TensorRT-LLM's and vLLM's copies lack the blank lines of `TOOLS_TEXT`; DeepSeek's examples have them.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from batchgen.engines.deepseek_turns import ASKING, Call, Turn, list_results, make_turns, refuse
from batchgen.worker.answer import Parsed, split_reasoning

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
THINK, THINK_END = "<think>", "</think>"
DSML = "｜DSML｜"
CALLS, CALLS_END = f"<{DSML}function_calls>", f"</{DSML}function_calls>"

TOOLS_TEXT = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{CALLS}" block like the following as part of your reply to the user:
{CALLS}
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
{CALLS_END}

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

{CALLS}
...
{CALLS_END}

<function_results>
...
</function_results>

{THINK}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
"""
FORMAT_TEXT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

# Names hold no part of a mark, so that one that is not closed can't swallow the next parameter.
INVOKE = re.compile(rf'\s*<{DSML}invoke\s+name="([^｜]*?)">(.*?)</{DSML}invoke>\s*', re.DOTALL)
PARAMETER = re.compile(
    rf'\s*<{DSML}parameter\s+name="([^｜]*?)"\s+string="(true|false)">(.*?)</{DSML}parameter>\s*', re.DOTALL
)

Tools = Sequence[dict[str, Any]]


# ---- out -------------------------------------------------------------------------------------------------------------


def render_chat(messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Tools | None = None) -> str:
    """The whole prompt, ready for the answer. `tools` (OpenAI's definitions) join the system message at the beginning.
    Reasoning of answers before the last question is left out, as the model was trained. Raises BadRow."""
    turns, last_asked = make_turns(messages, thinking=thinking)
    head = "" if turns[0].role == "system" or not tools else render_system(Turn(-1, "system", ""), tools)
    rendered = [render_turn(turns, turn, last_asked, thinking, tools or ()) for turn in turns]
    return BOS + head + "".join(rendered)


def render_turn(turns: Sequence[Turn], turn: Turn, last_asked: int, thinking: bool, tools: Tools) -> str:
    """One message and, where an answer follows it, the mark that begins one."""
    begin = THINK if thinking and turn.number >= last_asked else THINK_END
    if turn.role == "system":
        return render_system(turn, tools if turn.number == 0 else ())
    if turn.role in ASKING:
        return f"<｜User｜>{render_question(turn)}<｜Assistant｜>{begin}"
    if turn.role == "assistant":
        thought = turn.reasoning + THINK_END if thinking and turn.number > last_asked else ""
        return thought + turn.content + render_calls(turn) + EOS
    results = list_results(turns, turn.number)
    return render_results(turns[turn.number - 1].calls, results) + begin if results else ""


def render_system(turn: Turn, tools: Tools) -> str:
    return turn.content + render_extras(turn, [*turn.tools, *tools])


def render_question(turn: Turn) -> str:
    if turn.role == "user":
        return turn.content
    return f"{render_extras(turn, turn.tools)}\n\n# The user's message is: {turn.content}"


def render_extras(turn: Turn, tools: Tools) -> str:
    """What a system or developer message tells beside its words."""
    functions = "\n".join(to_json(tool["function"], turn.number) for tool in tools)
    told = f"\n\n{TOOLS_TEXT}{functions}\n</functions>\n" if tools else ""
    if turn.response_format:
        told += f"\n\n{FORMAT_TEXT}{to_json(turn.response_format, turn.number)}"
    return told


def render_calls(turn: Turn) -> str:
    if not turn.calls:
        return ""
    invokes = [
        f'<{DSML}invoke name="{call.name}">\n{render_arguments(call, turn.number)}\n</{DSML}invoke>'
        for call in turn.calls
    ]
    return "\n".join([f"\n\n{CALLS}", *invokes, CALLS_END])


def render_arguments(call: Call, number: int) -> str:
    def render(name: str, value: Any) -> str:
        is_text = isinstance(value, str)
        shown = value if is_text else to_json(value, number)
        return f'<{DSML}parameter name="{name}" string="{str(is_text).lower()}">{shown}</{DSML}parameter>'

    return "\n".join(render(name, value) for name, value in call.arguments.items())


def render_results(calls: Sequence[Call], results: Sequence[Turn]) -> str:
    numbers = {call.id: number for number, call in enumerate(calls)}
    if {turn.call_id for turn in results} == numbers.keys():  # else they have no names, and come in the calls' order
        results = sorted(results, key=lambda turn: numbers[turn.call_id])
    shown = "".join(f"\n<result>{turn.content}</result>" for turn in results)
    return f"\n\n<function_results>{shown}\n</function_results>\n\n"


def to_json(value: Any, number: int) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        refuse(number, "holds a value that JSON has not")


# ---- in --------------------------------------------------------------------------------------------------------------


def parse_answer(text: str, *, thinking: bool, has_tools: bool) -> Parsed:
    """What the model wrote, taken apart. Without tools nothing is taken for a call of one. Calls that are cut off or
    malformed stay in the text, whole."""
    answer, reasoning = split_reasoning(text, thinking=thinking, think_end=THINK_END)
    before, _, block = answer.partition(CALLS)
    calls = parse_calls(block) if has_tools else []
    if not calls:
        return Parsed(answer, reasoning)
    mark = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
    made = [
        {
            "id": f"call_{mark}_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for number, call in enumerate(calls)
    ]
    return Parsed(before.removesuffix("\n\n"), reasoning, json.dumps(made, ensure_ascii=False))


def parse_calls(block: str) -> list[Call]:
    """The calls in what follows the opening mark; none where anything is not as it should be."""
    body, end, rest = block.rpartition(CALLS_END)
    if not end or rest.strip() not in ("", EOS):
        return []
    calls: list[Call] = []
    position = 0
    while position < len(body):
        found = INVOKE.match(body, position)
        arguments = parse_arguments(found[2]) if found is not None else None
        if found is None or arguments is None:
            return []
        calls.append(Call(found[1], arguments))
        position = found.end()
    return calls


def parse_arguments(body: str) -> dict[str, Any] | None:
    """None where a parameter is malformed, not closed (it would swallow the next one) or there twice."""
    arguments: dict[str, Any] = {}
    position = 0 if body.strip() else len(body)
    while position < len(body):
        found = PARAMETER.match(body, position)
        if found is None or DSML in found[3] or found[1] in arguments:
            return None
        try:
            arguments[found[1]] = found[3] if found[2] == "true" else json.loads(found[3], parse_constant=float_of)
        except (ValueError, RecursionError):
            return None
        position = found.end()
    return arguments


def float_of(name: str) -> NoReturn:
    """NaN and the infinities are no JSON, though Python reads them."""
    raise ValueError(name)
