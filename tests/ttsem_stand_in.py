"""What ttsem, which compiles kernels for a GPU and executes them on a CPU, lacks of a GPU: a few lines to stand in.

ttsem lets every tensor say that it is on "cuda". Operators and questions that only a driver can answer are not there.
"""

import functools

import torch
from torch.overrides import _get_current_function_mode_stack


def complete_the_stand_in() -> None:
    torch.cuda.is_current_stream_capturing = lambda: False
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", _mm_in, "CPU")
    library.impl("addmm.dtype_out", _addmm_in, "CPU")
    complete_the_stand_in.library = library  # it works while it lives

    said, real = torch.Tensor.device.fget, torch._C.TensorBase.device.__get__
    torch.Tensor.device = property(lambda tensor: real(tensor) if tensor.is_meta else said(tensor))
    # Its mode, which lets them, is off in what torch calls by itself: backward, and custom operators.
    on_cuda = functools.partial(_under, _get_current_function_mode_stack()[-1])
    torch.autograd._engine_run_backward = on_cuda(torch.autograd._engine_run_backward)
    torch.library.custom_op = functools.partial(_custom_op, torch.library.custom_op, on_cuda)


def _custom_op(define, on_cuda, name, function=None, /, **options):
    if function is None:
        return functools.partial(_custom_op, define, on_cuda, name, **options)
    return define(name, on_cuda(function), **options)


def _under(mode, function):
    @functools.wraps(function)
    def call(*args, **options):
        if mode in _get_current_function_mode_stack():
            return function(*args, **options)
        with mode:
            return function(*args, **options)

    return call


def _mm_in(left, right, dtype, *, out):
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _addmm_in(total, left, right, dtype, *, beta=1, alpha=1, out):
    return out.copy_(torch.addmm(total, left.to(dtype), right.to(dtype), beta=beta, alpha=alpha))
