"""The one exception that means: what the user gave cannot be used."""


class InputError(Exception):
    """Input that cannot be used: a file, a row, a configuration, a plan.

    The message is one line that says what was given, what the limit is and what to do about it. Scripts print it
    and exit with code 2; anything else that is raised is a defect and shows its traceback.
    """
