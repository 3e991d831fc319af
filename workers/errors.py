"""What can be wrong with a model folder, or with its fit to the ranks.

    ValueError
      BadModelConfig        config.json cannot be served as it is
        UnknownArchitecture no code here for this architecture
      BadCheckpoint         the weight files are incomplete, damaged or another model's
      BadSplit              the model does not divide over so many ranks

Every message says what was asked, what there is and what to change.
"""


class BadModelConfig(ValueError):
    """config.json is missing, malformed or asks for something that is not offered."""


class UnknownArchitecture(BadModelConfig):
    """config.json names a model that nobody has written here."""


class BadCheckpoint(ValueError):
    """The folder's weights are not what config.json describes."""


class BadSplit(ValueError):
    """Heads, experts or columns that do not divide over the ranks."""
