"""Locales of this machine: whether one is there, and the command that installs it."""

import locale

# That of graphs which change the case of texts and name none.
DEFAULT = "en_US.UTF-8"


def has(name: str) -> bool:
    """Whether texts can be compared and changed by a locale. Not for threads: it is set, and set back."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, name)
    except locale.Error:
        return False
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    return True


def install(name: str) -> str:
    """A command for Debian and its kin."""
    language, _, charset = name.partition(".")
    return f"apt-get install locales && localedef -i {language} -f {charset or 'UTF-8'} {name}"
