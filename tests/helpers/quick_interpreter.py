"""Triton's interpreter in about a fourth of the time, with no check less: what it does over and over is done once.

Each function replaces one part of Triton, in the versions whose parts were read; others are left as they are.
"""

import numpy

READ = ("3.6.0", "3.9.0")


def speed_up():
    import triton
    from triton.language import core
    from triton.runtime import interpreter

    if triton.__version__ not in READ or hasattr(interpreter._patch_lang, "prepared"):
        return
    # A class of the interpreter's own: a compiler in this process uses the plain one. Triton 3.6 makes an object of it
    # for each function of the language, 3.9 one for all.
    semantic = type("QuickSemantic", (interpreter.TritonSemantic,), {})
    interpreter.TritonSemantic = semantic
    interpreter.interpreter_semantic = semantic(interpreter.interpreter_builder)
    prepare_once_a_launch(interpreter)
    check_overflow_at_once(semantic)
    look_dtypes_up_once(interpreter)
    look_shapes_up_once(core)
    broadcast_where_shapes_differ(semantic)


class Replaced:
    """What is to be undone when a launch ends."""

    def __init__(self, prepared, scope=None):
        self.prepared = prepared
        self.scope = scope

    def restore(self):
        self.prepared.clear()
        if self.scope is not None:
            self.scope.restore()


def prepare_once_a_launch(interpreter):
    """Let the interpreter replace the language's functions once a launch, not in every call of a device function.

    When a launch begins, the interpreter replaces `tl.load`, `tl.where` and some hundred more by its own, and it
    restores them when the launch ends. It does so again at each call of a device function, where it finds nothing left
    to replace, undoes nothing, and takes half of the time of a launch to find that out. Here it happens once a launch
    for `triton.language`, and once for its core, if a function sees that one.
    """
    plain = interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    seen = {}  # what each module sees of the language, by the address of its globals
    prepared = set()  # of that, what is replaced in the launch under way

    def replace_once(function):
        module = id(function.__globals__)
        if module not in seen:
            seen[module] = {id(value) for value in function.__globals__.values() if value in languages}
        if seen[module] <= prepared:
            return Replaced(prepared)
        prepared.update(seen[module])
        return Replaced(prepared, plain(function))

    replace_once.plain, replace_once.prepared = plain, prepared
    interpreter._patch_lang = replace_once


def check_overflow_at_once(semantic):
    """Let numpy look for integer overflow, not ten operations of the language.

    At each sum, difference and product of integers below 64 bits the interpreter forms the number in 64 bits and
    compares it with the type's bounds; what it finds it asserts in debug mode alone, which it never enters. Here it is
    asserted.
    """
    operations = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}

    def check(self, left, right, operation):
        dtype = left.type.scalar
        if dtype.int_bitwidth >= 64:
            return
        numbers = (side.handle.data.astype(numpy.int64) for side in (left, right))
        result = operations[operation.__name__](*numbers)
        within = (result <= dtype.get_int_max_value()) & (result >= dtype.get_int_min_value())
        assert within.all(), f"int{dtype.int_bitwidth} overflow detected for operation {operation.__name__}"

    semantic.binary_op_sanitize_overflow_impl = check


def look_dtypes_up_once(interpreter):
    """Let the interpreter keep which numpy dtype belongs to a dtype of the language, not make a table at each use."""
    plain = interpreter._get_np_dtype
    known = {}

    def look_up(dtype):
        if dtype.name not in known:
            known[dtype.name] = plain(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = look_up


def look_shapes_up_once(core):
    """Let the language check a shape, and wrap its numbers, once and not for each tensor that has it."""
    plain_block, plain_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, tensors = {}, {}

    def init_block(self, element_ty, shape):
        sizes = tuple(getattr(shape, "values", shape))
        if sizes not in blocks:
            plain_block(self, element_ty, shape)
            blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, name = blocks[sizes]
        self.name = f"<{name}, {element_ty}>"

    def init_tensor(self, handle, type):
        shape = type.name if type.is_block() else None
        if shape not in tensors:
            plain_tensor(self, handle, type)
            tensors[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[shape]

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor


def broadcast_where_shapes_differ(semantic):
    """Let the language compare the sizes of two shapes only where they are not one and the same."""
    plain = semantic.broadcast_impl_value

    def broadcast(self, left, right):
        if left.type.is_block() and right.type.is_block() and left.type.shape is right.type.shape:
            return left, right
        return plain(self, left, right)

    semantic.broadcast_impl_value = broadcast
