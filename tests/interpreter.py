"""Triton's interpreter, as quick as it can be."""

from triton.runtime import interpreter


def patch_once() -> None:
    """Have the language made Python's once for every launch.

    The interpreter does so again whenever a kernel calls another function, which changes nothing
    and takes a third of all its time.
    """
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
