"""The one error that is not a mistake in the call."""


class Missing(RuntimeError):
    """Something that has to be installed or fetched is not there; the message says what, and a way out, in one sentence."""
