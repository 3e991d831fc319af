"""render.py runs in an environment of its own; doctest must not import it here."""

collect_ignore = ["render.py"]
