"""The one exception that means: what the user gave cannot be used; and the check of its type."""


class InputError(Exception):
    """Input that cannot be used: a file, a row, a configuration, a plan.

    The message is one line that says what was given, what the limit is and what to do about it. Scripts print it
    and exit with code 2; anything else that is raised is a defect and shows its traceback.
    """


def check_type(given: object, kind: type, what: str) -> None:
    """Raises InputError unless what was given is of that type.

    Args:
        given: The object.
        kind: What it is to be.
        what: What it is given as, for the message.
    """
    if not isinstance(given, kind):
        raise InputError(f"{what} is of type {type(given).__name__}; give {kind.__name__}")
