"""The errors a user sees: one line that names what is wrong and what to do.

The command line prints `str(error)` alone and exits with `error.exit_code`; anything else is a bug and keeps its traceback.
"""


class FormularyError(Exception):
    """A clear refusal: the input cannot be used, and nothing was changed. Exit code 1."""

    exit_code = 1


class UsageError(FormularyError):
    """The call itself is wrong: an unknown method, parameter or option. Exit code 2."""

    exit_code = 2


def nearest(word: str, known, *, count: int = 1) -> str:
    """`; did you mean 'gptq'?`, or an empty string when nothing known is near.

    >>> nearest("gtpq", ["gptq", "gla"])
    "; did you mean 'gptq'?"
    """
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
