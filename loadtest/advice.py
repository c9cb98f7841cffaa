"""What a person can do about requests that fail. Pure."""

import json

KEY = "give the key, with --api-key-file FILE or in target.headers"
_ADVICE = (
    (("HTTP 400", "INVALID_ARGUMENT"), "the inputs do not fit: give files, sizes or inputs in payloads"),
    (("HTTP 401", "HTTP 403", "UNAUTHENTICATED", "PERMISSION_DENIED"), KEY),
    (("HTTP 404", "NOT_FOUND"), "is the model still loaded? Ask for another in payloads"),
    (("HTTP 429", "HTTP 503", "UNAVAILABLE", "RESOURCE_EXHAUSTED"), "the server refuses: look at its log"),
    (("no answer in time",), "raise timeout_s, or look at the server's log"),
    (("the server cannot be reached", "the connection broke", "the stream broke"), "is the server still there?"),
)


def said(reason: str) -> str:
    """What a server says with an error, in one line: the text of Triton's JSON, or all of it."""
    try:
        told = json.loads(reason)
    except ValueError:
        told = reason
    text = told.get("error", reason) if isinstance(told, dict) else reason
    return " ".join(str(text).split())


def stopped_because(error: str, reason: str) -> str:
    """Why a run was ended whose first requests have all failed with `error`, and what to do."""
    told = said(reason)
    advice = next((text for kinds, text in _ADVICE if error.startswith(kinds)), "correct payloads (docs/loadtest.md)")
    return (
        f"the first requests have all failed alike, and the run was ended: {error}{': ' * bool(told)}{told}; {advice}"
    )
