"""The one error that means: what you gave us is wrong, and here is what to do."""


class InputError(ValueError):
    """Bad input of any kind; its message is one line that names the input, the place and the remedy."""
