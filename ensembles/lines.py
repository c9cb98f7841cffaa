"""Where in a config.pbtxt it stands what a GraphError's path speaks of. Pure: it reads the text, and judges nothing.

protobuf's own parser tells no lines of what it has read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""#[^\n]*|(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<sign>[{}<>\[\]:;,])|(?P<word>[^\s{}<>\[\]:;,"'#]+)"""
)
_STEP = re.compile(r"step (\d+) '.*?'(?: (?P<kind>\S+))?(?: '(?P<name>.*)')?", re.DOTALL)
_NAMED = re.compile(r"(input|output|step) '(.*)'", re.DOTALL)


@dataclass(slots=True)
class Field:
    """A field of the file: its value, or the fields of its message."""

    name: str
    line: int
    value: str = ""
    inside: list["Field"] = field(default_factory=list)

    def all(self, name: str) -> Iterator["Field"]:
        return (entry for entry in self.inside if entry.name == name)

    def first(self, name: str) -> str:
        """The value of its first field of that name; "" where it has none."""
        return next((entry.value for entry in self.all(name)), "")


def line_of(text: str, path: str) -> int:
    """The line, from 1 on, of what `path` speaks of, as "step 3 'gate' input_map 'x'"; 0 where that is not found."""
    whole = read(text)
    match = next(_found(whole, path), None)
    return match.line if match else 0


def _found(whole: Field, path: str) -> Iterator[Field]:
    """What the path speaks of, the closest first."""
    steps = [step for graph in whole.all("ensemble_scheduling") for step in graph.all("step")]
    if path.startswith("parameters."):
        key = path.removeprefix("parameters.")
        yield from (entry for entry in whole.all("parameters") if entry.first("key") == key)
    if match := _STEP.match(path):
        step = steps[int(match[1])] if int(match[1]) < len(steps) else whole
        kind, name = match["kind"] or "", match["name"]
        yield from (entry for entry in step.all(kind) if name is not None and entry.first("key") == name)
        keys = {f"{kind}.{entry.first('value')}" for entry in step.all("output_map")}
        yield from (entry for entry in whole.all("parameters") if entry.first("key") in keys)
        yield step
    if match := _NAMED.match(path):
        kind, name = match.groups()
        named = steps if kind == "step" else whole.all(kind)
        yield from (entry for entry in named if entry.first("model_name" if kind == "step" else "name") == name)
    if path.startswith("ensemble_scheduling"):
        yield from whole.all("ensemble_scheduling")


def read(text: str) -> Field:
    """The fields of a file that parses, in a field without a name."""
    whole = Field("", 0)
    reader, line, position = _Reader(whole), 1, 0
    for match in _TOKEN.finditer(text):
        line, position = line + text.count("\n", position, match.start()), match.start()
        reader.take(match, line)
    return whole


class _Reader:
    """Token by token. `[` and `,` stand between values of one field."""

    def __init__(self, whole: Field) -> None:
        self._around: list[tuple[Field, str, bool]] = []
        self._message, self._name, self._is_list, self._is_value = whole, "", False, False
        self._last: Field | None = None

    def take(self, match: re.Match[str], line: int) -> None:
        if match["sign"]:
            self._sign(match["sign"], line)
        elif match["text"] is not None or match["word"] is not None:
            self._word(_plain(match), line, match["text"] is not None)

    def _sign(self, sign: str, line: int) -> None:
        self._last = None
        if sign in "{<":
            inner = Field(self._name, line)
            self._message.inside.append(inner)
            self._around.append((self._message, self._name, self._is_list))
            self._message, self._is_list, self._is_value = inner, False, False
        elif sign in "}>" and self._around:
            self._message, self._name, self._is_list = self._around.pop()
            self._is_value = False
        else:
            self._is_list = sign == "[" or (self._is_list and sign != "]")
            self._is_value = sign in ":[" or (sign == "," and self._is_list)

    def _word(self, said: str, line: int, is_text: bool) -> None:
        if is_text and self._last is not None:  # a text in parts
            self._last.value += said
        elif self._is_value:
            self._last = Field(self._name, line, said)
            self._message.inside.append(self._last)
            self._is_value = False
        else:
            self._name, self._last = said, None


def _plain(match: re.Match[str]) -> str:
    text = match["text"]
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text is not None else match["word"]
