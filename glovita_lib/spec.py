"""Base of all spec Structs."""

import msgspec


class UserError(Exception):
    """A mistake of the user: the message is shown without a traceback, exit code 2.

    The message says what was offered, what is valid and how to mend it; several mistakes are
    several lines.
    """


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the spec; every field has a default or is required, a bound and a docstring with
    its unit."""
