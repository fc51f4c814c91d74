"""What can go wrong, in two kinds: a bad request (the user can fix it) and a fallback (we went on, and say so)."""


class FeatherweightError(Exception):
    """Base of every error raised on purpose; the command line turns it into one sentence and exit code 1."""


class RequestError(FeatherweightError):
    """The request cannot be met as asked: one sentence with the tensor, both numbers and the fix; exit code 2."""


class FallbackWarning(UserWarning):
    """Something was done in a weaker way than asked for, and this names what and why."""
