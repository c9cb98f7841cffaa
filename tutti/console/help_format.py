"""How help looks: paragraphs fill the line, and examples stay lines of their own. Knows no command."""

import argparse

_HEAD = "examples:"


class Help(argparse.HelpFormatter):
    """argparse's own, but for the examples at the end."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_HEAD):
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


def examples(*lines: str) -> str:
    """The end of a command's help. What stands behind two spaces and a # says what a line does."""
    return "\n".join([_HEAD, *(f"  {line}" for line in lines)])
