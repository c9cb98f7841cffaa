"""`tutti completion`: a script for a shell that completes commands, flags, choices and files.

It is made of the parsers that read the commands, so it is true; and it is static: no Python begins at a tab.
"""

import argparse
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tutti.app import commands
from tutti.console.arguments import Parser
from tutti.console.help_format import Help, examples

# What stands for a file or a folder in usage.
_PATHS = frozenset(["PATH", "FILE", "FOLDER", "PEM", "TRACE", "SCENARIO", "SOURCE"])


@dataclass(frozen=True, slots=True)
class Value:
    """What may stand in a place: one of the choices, a path, or anything."""

    choices: tuple[str, ...] = ()
    is_path: bool = False


@dataclass(frozen=True, slots=True)
class Flag:
    """`value` is None for a switch."""

    names: tuple[str, ...]
    help: str
    value: Value | None


@dataclass(frozen=True, slots=True)
class Place:
    """A command, as "export text", or "" for tutti itself: what may follow it."""

    path: str
    subcommands: tuple[tuple[str, str], ...]
    flags: tuple[Flag, ...]
    operand: Value | None


def main(arguments: Sequence[str]) -> int:
    """Print the script of one shell."""
    options = make_parser().parse_args(arguments)
    print({"bash": bash, "zsh": zsh, "fish": fish}[options.shell](list(places())))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tutti completion",
        description="Print what lets a shell complete commands, flags, choices and files at a tab. Add the line to the "
        "shell's own file, or keep the script in a file: it changes with a new version of tutti only.",
        epilog=examples(
            "source <(tutti completion bash)  # in ~/.bashrc",
            "source <(tutti completion zsh)  # in ~/.zshrc, behind compinit",
            "tutti completion fish > ~/.config/fish/completions/tutti.fish",
        ),
        formatter_class=Help,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that is to complete")
    return parser


def places() -> Iterator[Place]:
    """All of the commands, those above first."""
    words = tuple((name, _short(command.help)) for name, command in commands.COMMANDS.items())
    switches = Flag(("-h", "--help"), "show the commands", None), Flag(("--version",), "show the version", None)
    yield Place("", words, switches, None)
    for name, command in commands.COMMANDS.items():
        yield from _places(name, command.parser())


def _places(path: str, parser: argparse.ArgumentParser) -> Iterator[Place]:
    flags, operands, below = [], [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = {choice.dest: _short(str(choice.help)) for choice in action._choices_actions}
            parsers = action.choices
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            value = None if action.nargs == 0 else _value(action)
            text = str(action.help) % {**vars(action), "prog": "tutti"}
            flags.append(Flag(tuple(action.option_strings), _short(text), value))
        else:
            operands.append(_value(action))
    operand = next((positional for positional in operands if positional.choices or positional.is_path), None)
    yield Place(path, tuple(below.items()), tuple(flags), operand)
    for name in below:
        yield from _places(f"{path} {name}", parsers[name])


def _value(action: argparse.Action) -> Value:
    if action.choices is not None:
        return Value(tuple(map(str, action.choices)))
    if action.metavar == "BOOL":
        return Value(("true", "false"))
    return Value(is_path=action.type is Path or str(action.metavar) in _PATHS)


def _short(text: str) -> str:
    """What a help says first, in one line without what shells take for their own."""
    plain = re.sub(r"[^\w /.,*-]", "", re.split(r"[;:(]|, which", text)[0])
    return textwrap.shorten(plain, 60, placeholder="").rstrip(",")


def _walk(known: Sequence[Place]) -> Iterator[tuple[str, str, str]]:
    """(where, the word there, where it leads)."""
    for place in known:
        for name, _ in place.subcommands:
            yield place.path, name, f"{place.path} {name}".strip()


def _cases(known: Sequence[Place]) -> Iterator[tuple[str, Value]]:
    """Each "WHERE FLAG" whose value is awaited, and that value."""
    for place in known:
        for flag in place.flags:
            for name in flag.names:
                if flag.value is not None:
                    yield f"{place.path} {name}", flag.value


def _grouped(known: Sequence[Place]) -> Iterator[tuple[list[str], Value]]:
    """The cases that await the same, together."""
    by_value: dict[Value, list[str]] = {}
    for case, value in _cases(known):
        by_value.setdefault(value, []).append(case)
    for value, cases in by_value.items():
        yield cases, value


def _pattern(cases: Sequence[str]) -> str:
    return "|".join(f'"{case}"' for case in cases)


_BASH = """# bash completion of tutti, by: tutti completion bash
_tutti() {
  local cur=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} where="" i words="" paths=""
  if [[ $cur == "=" ]]; then
    cur=""
  elif [[ $before == "=" ]]; then
    before=${COMP_WORDS[COMP_CWORD-2]}
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$where ${COMP_WORDS[i]}" in
%(walk)s
    esac
  done
  case "$where $before" in
%(values)s
    *)
      case "$where" in
%(places)s
      esac
      ;;
  esac
  COMPREPLY=()
  while IFS= read -r i; do
    COMPREPLY+=("$i")
  done < <(compgen -W "$words" -- "$cur"; [[ -n $paths ]] && compgen -f -- "$cur")
  [[ -n $paths ]] && compopt -o filenames 2>/dev/null
  return 0
}
complete -F _tutti tutti"""


def bash(known: Sequence[Place]) -> str:
    """bash splits --flag=value into three words, and completes the last."""
    walk = "\n".join(f'      "{where} {name}") where="{to}" ;;' for where, name, to in _walk(known))
    values = "\n".join(f"    {_pattern(cases)}) {_assigned(value)} ;;" for cases, value in _grouped(known))
    rows = []
    for place in known:
        flags = " ".join(name for flag in place.flags for name in flag.names if name.startswith("--"))
        names = " ".join(name for name, _ in place.subcommands)
        operand = place.operand or Value()
        plain = f'words="{" ".join(filter(None, (names, *operand.choices)))}"{" paths=1" if operand.is_path else ""}'
        rows.append(f'        "{place.path}") if [[ $cur == -* ]]; then words="{flags}"; else {plain}; fi ;;')
    return _BASH % {"walk": walk, "values": values, "places": "\n".join(rows)}


def _assigned(value: Value) -> str:
    if value.is_path:
        return "paths=1"
    return f'words="{" ".join(value.choices)}"' if value.choices else ":"


_ZSH = """#compdef tutti
# zsh completion of tutti, by: tutti completion zsh
_tutti() {
  local where="" before="${words[CURRENT-1]}" i
  local -a told
  for ((i = 2; i < CURRENT; i++)); do
    case "$where ${words[i]}" in
%(walk)s
    esac
  done
  if [[ "$PREFIX" == --*=* ]]; then
    before="${PREFIX%%%%=*}"
    compset -P "*="
  fi
  case "$where $before" in
%(values)s
  esac
  case "$where" in
%(places)s
  esac
}
if [[ "${funcstack[1]}" == _tutti ]]; then
  _tutti "$@"
else
  compdef _tutti tutti
fi"""


def zsh(known: Sequence[Place]) -> str:
    """A word's help stands behind a colon, as _describe has it; --flag=value is one word, of which the value is."""
    walk = "\n".join(f'      "{where} {name}") where="{to}" ;;' for where, name, to in _walk(known))
    values = "\n".join(f"    ({_pattern(cases)}) {_added(value)}; return ;;" for cases, value in _grouped(known))
    rows = []
    for place in known:
        flags = [(name, flag.help) for flag in place.flags for name in flag.names if name.startswith("--")]
        plain = _described("command", place.subcommands) if place.subcommands else _added(place.operand or Value())
        choice = f'if [[ "$PREFIX" == -* ]]; then {_described("flag", flags)}; else {plain}; fi'
        rows.append(f'    ("{place.path}") {choice} ;;')
    return _ZSH % {"walk": walk, "values": values, "places": "\n".join(rows)}


def _described(heading: str, words: Iterable[tuple[str, str]]) -> str:
    told = " ".join(f"'{name}:{text}'" for name, text in words)
    return f"told=({told}); _describe {heading} told"


def _added(value: Value) -> str:
    if value.is_path:
        return "_files"
    return f"compadd -- {' '.join(value.choices)}" if value.choices else ":"


_FISH = """# fish completion of tutti, by: tutti completion fish
function __tutti_where
  set -l where ""
  for word in (commandline -opc)[2..-1]
    switch "$where $word"
%(walk)s
    end
  end
  test "$where" = "$argv[1]"
end
complete -c tutti -f
%(rows)s"""


def fish(known: Sequence[Place]) -> str:
    """A rule for each word, which holds in its place."""
    walk = "\n".join(f'      case "{where} {name}"\n        set where "{to}"' for where, name, to in _walk(known))
    rows = []
    for place in known:
        rule = f"complete -c tutti -n '__tutti_where \"{place.path}\"'"
        rows += [f"{rule} -a {name} -d '{text}'" for name, text in place.subcommands]
        if place.operand is not None:
            rows.append(f"{rule} {_offered(place.operand)}")
        for flag in place.flags:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names)
            value = "" if flag.value is None else f" {'-r' if flag.value.is_path else '-x'} {_offered(flag.value)}"
            rows.append(f"{rule} {names}{value} -d '{flag.help}'")
    return _FISH % {"walk": walk, "rows": "\n".join(rows)}


def _offered(value: Value) -> str:
    if value.is_path:
        return "-F"
    return f"-a '{' '.join(value.choices)}'" if value.choices else ""
