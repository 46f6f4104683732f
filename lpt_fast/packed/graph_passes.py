"""Forward and backward of a module as two CUDA graphs, behind one node of autograd.

A graph reads and writes tensors that stay where they are, so nothing of it may be handed out:
what leaves is copied first. (`torch.cuda.make_graphed_callables` hands its own gradient buffers
out. A parameter without a gradient keeps what it is given, and the next replay would write over
what it has gathered.)
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

WARM_UP = 2  # runs before a capture: libraries and compilers set themselves up


class NoRoom(Exception):
    """A graph would take memory that the training may need."""


class Passes:
    """A module's two passes over tensors that stay where they are.

    Args:
        module: its forward takes `inputs` and gives one tensor [N, D].
        inputs: tensors (or None) that are filled anew before each forward.
        parameters: those of the module that train, by name.

    Subclasses set `out` and `flat` and write them in `replay_forward` and `replay_backward`.

    Attributes:
        out: [N, D].
        grad: [N, D], its gradient; zeros beyond the rows that were read.
        flat: [P], the gradients of all parameters, one after another.
    """

    out: Tensor
    grad: Tensor
    flat: Tensor

    def __init__(self, module: nn.Module, inputs: tuple, parameters: dict[str, Tensor]):
        self.module, self.inputs = module, inputs
        self.parameters = tuple(parameters.values())
        # Others over the same memory: hooks of the parameters are no part of a graph, and
        # autograd gives these no node that remembers the stream of the capture.
        self._aliases = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        self._filled = 0

    def run_forward(self) -> Tensor:
        """The module's output by its own code, with a graph of autograd."""
        with torch.enable_grad(), torch.autocast(self.inputs[0].device.type, enabled=False):
            return functional_call(self.module, self._aliases, self.inputs)

    def run_backward(self, out: Tensor) -> Tensor:
        """The gradients for `grad` at `out`, [P]."""
        with torch.autocast(out.device.type, enabled=False):
            grads = torch.autograd.grad(out, tuple(self._aliases.values()), self.grad)
        return torch.cat([g.flatten() for g in grads])

    def replay_forward(self) -> None:
        raise NotImplementedError

    def replay_backward(self) -> None:
        raise NotImplementedError

    def forward(self, count: int) -> Tensor:
        """The first rows of the output, [count, D]."""
        self.replay_forward()
        return self.out[:count].clone()

    def backward(self, grad: Tensor) -> list[Tensor]:
        """The parameters' gradients for one of the first rows of the output."""
        count = len(grad)
        self.grad[:count].copy_(grad)
        if count < self._filled:
            self.grad[count : self._filled].zero_()  # rows of an earlier batch
        self._filled = count
        self.replay_backward()
        parts = self.flat.clone().split([p.numel() for p in self.parameters])
        return [
            part.view(p.shape).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)
        ]


class Turn:
    """One forward by a graph. Until its backward is done, or nobody can ask for it any more (then
    this object is gone), the graph's memory is in use.
    """

    done = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, turn, count, *parameters):
        ctx.passes, ctx.turn = passes, turn
        return passes.forward(count)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.turn.done:
            raise RuntimeError(
                "A backward pass ran twice through layers that run as a CUDA graph, which keeps "
                "nothing for a second one, expected one a forward; add the losses up before, or "
                "train with cuda_graphs=False."
            )
        ctx.turn.done = True
        return None, None, None, *ctx.passes.backward(grad)


def replay(passes: Passes, turn: Turn, count: int) -> Tensor:
    """The first rows of the module's output, [count, D], with a gradient to its parameters.

    Raises:
        RuntimeError: in the second backward through it.
    """
    return _Replay.apply(passes, turn, count, *passes.parameters)


class CudaPasses(Passes):
    """Passes that are replayed by the GPU.

    Args:
        module, inputs, parameters: as of `Passes`; the inputs hold a batch.
        pool: memory of graphs that are never in use at the same time.
        stream: of all captures into that pool.

    Raises:
        NoRoom: for a module that keeps more for its backward than half of what is free.
    """

    def __init__(self, module, inputs, parameters, pool, stream: torch.cuda.Stream):
        super().__init__(module, inputs, parameters)
        device = inputs[0].device
        # (Dropout of the runs before the capture draws numbers. Replays draw theirs from the same
        # generator, as if they were no graph.)
        state = torch.cuda.get_rng_state(device)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        # Other threads read the cache meanwhile: "thread_local" lets them.
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for i in range(WARM_UP):
                    before = torch.cuda.memory_allocated(device)
                    out = self.run_forward()
                    if i == 0:
                        _check_room(torch.cuda.memory_allocated(device) - before, device)
                        self.grad = torch.zeros_like(out)
                    self.run_backward(out)
                del out
                with torch.cuda.graph(graphs[0], **how):
                    out = self.run_forward()
                with torch.cuda.graph(graphs[1], **how):
                    self.flat = self.run_backward(out)
                self.out = out.detach()
        except NoRoom:
            torch.cuda.set_rng_state(state, device)
            raise
        except Exception:
            _tidy(device, pool, state)
            raise
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.set_rng_state(state, device)
        self._graphs = graphs

    def replay_forward(self) -> None:
        self._graphs[0].replay()

    def replay_backward(self) -> None:
        self._graphs[1].replay()


def _check_room(kept: int, device) -> None:
    """kept: bytes that the forward has left for its backward."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if 2 * kept > free:
        raise NoRoom(
            f"{kept / 2**30:.1f} GiB are kept for a backward and {free / 2**30:.1f} GiB are free"
        )


def _tidy(device: torch.device, pool, state: Tensor) -> None:
    """After a capture that broke off: PyTorch's allocator and generator may believe that it still
    goes on, which the next dropout would end in an error.
    """
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    with suppress(Exception):
        own = torch.cuda.default_generators[device.index]
        own.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
        own.set_state(state)


class CudaCapture:
    """Captures passes of one device into one pool of memory."""

    def __init__(self):
        self._pool = self._stream = None

    def __call__(self, module: nn.Module, inputs: tuple, parameters: dict) -> CudaPasses:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(inputs[0].device)
        return CudaPasses(module, inputs, parameters, self._pool, self._stream)
