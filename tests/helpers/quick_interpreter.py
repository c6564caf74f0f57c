"""Triton's interpreter in about half the time: what is set up for a launch is set up once."""


class Replaced:
    """What is to be undone when a launch ends."""

    def __init__(self, prepared, scope=None):
        self.prepared = prepared
        self.scope = scope

    def restore(self):
        self.prepared.clear()
        if self.scope is not None:
            self.scope.restore()


def prepare_once_a_launch():
    """Let the interpreter replace the language's functions once a launch, not in every call of a device function.

    When a launch begins, the interpreter replaces `tl.load`, `tl.where` and some hundred more by its own, and it
    restores them when the launch ends. It does so again at each call of a device function, where it finds nothing left
    to replace, undoes nothing, and takes half of the time of a launch to find that out. Here it happens once a launch
    for the functions of one module, which see the language under the same names.

    Where Triton's interpreter works in another way than this knows, it is left as it is.
    """
    from triton.runtime import interpreter

    plain = getattr(interpreter, "_patch_lang", None)
    if not hasattr(interpreter, "_LangPatchScope") or plain is None or hasattr(plain, "plain"):
        return
    prepared = set()  # of the launch under way: modules whose functions were met, by their globals

    def replace_once(function):
        module = id(function.__globals__)
        if module in prepared:
            return Replaced(prepared)
        prepared.add(module)
        return Replaced(prepared, plain(function))

    replace_once.plain, replace_once.prepared = plain, prepared
    interpreter._patch_lang = replace_once
