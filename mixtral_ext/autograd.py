"""What autograd does with the ops: never a gradient that is silently missing.

The kernels are for inference. A functional op whose input requires grad runs, and its backward raises; an op that
writes to its arguments raises at once. Tensors written to get a new version, so that a backward which needs the old
values raises too.
"""
import torch

_library = torch.library.Library("mixtral_ext", "IMPL")


def _kernel(op):
    """The op at the Autograd key, above the kernels of the devices."""
    name = op.name()
    written = [(i, a.name, a.kwarg_only) for i, a in enumerate(op._schema.arguments) if a.is_write]
    needs_detach = f"{name}: no gradient is defined; detach the inputs or call it under torch.no_grad()"

    def below(keyset, args, kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            return below(keyset, args, {})

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(needs_detach)

    def kernel(keyset, *args, **kwargs):
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            if written:
                raise RuntimeError(needs_detach)
            return NoBackward.apply(keyset, *args)
        result = below(keyset, args, kwargs)
        if written:
            tensors = [kwargs.get(key) if kwarg_only else args[i] for i, key, kwarg_only in written]
            torch.autograd.graph.increment_version([t for t in tensors if t is not None])
        return result

    return kernel


def register(ops):
    for op in ops:
        _library.impl(op.name(), _kernel(op), "Autograd", with_keyset=True)
