"""Triton's interpreter, without what it does for nothing: half of its time."""

from dataclasses import replace

from triton.runtime import interpreter


def quicken() -> None:
    """Nothing that is computed or checked is another.

    Sums of whole numbers are looked over for overflows, of which only its debug mode tells; and the
    language is made Python's anew whenever a kernel calls another function.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    _patch_once()


def _patch_once() -> None:
    """Have the language made Python's once for every launch."""
    patch_lang = interpreter._patch_lang
    patched: set[int] = set()

    def patch(fn):
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        scope = patch_lang(fn)
        restore = scope.restore

        def restore_all():
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch
