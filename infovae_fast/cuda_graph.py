"""Work for a GPU that is recorded once and sent again as a whole (a CUDA graph): a model of many small kernels then
takes the time of its kernels, where it else takes that of the Python that launches them."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Out = TypeVar("Out")


class CudaGraph(Generic[Out]):
    """`run(*inputs)` on a GPU, as a CUDA graph: call it like `run`.

    The first `eager` calls run it, on a stream of its own, while libraries and lazy initialisations get ready; the next
    one records it. From then on the inputs are copied to where the recording reads, and it is replayed. Inputs of other
    shapes begin anew.

    The tensors that come out are overwritten by the next call. Of what `run` leaves elsewhere only the memory stays:
    let it set gradients to None before `backward()` and return them, for the caller to put them back in their places.
    Random numbers differ from call to call, as without a graph, and follow `torch.manual_seed`. `run` must not look at
    numbers (`item()`), and what comes out must not require a gradient, as that would keep the stream of an earlier
    call.

    Args:
        run: the work.
        eager: calls before the recording.
        pool: of memory, `torch.cuda.graph_pool_handle()`, for graphs none of which reads what another left there.

    Raises:
        RuntimeError: `run` cannot be recorded.
    """

    def __init__(self, run: Callable[..., Out], *, eager: int = 3, pool: Any = None) -> None:
        self.run, self.eager, self.pool = run, eager, pool
        self._stream: torch.cuda.Stream | None = None
        self._begin(())

    def _begin(self, inputs: tuple[Tensor, ...]) -> None:
        self._kind, self._calls = _kind(inputs), 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Out:
        if _kind(inputs) != self._kind:
            self._begin(inputs)
        self._stream = self._stream or torch.cuda.Stream()
        if self._calls < self.eager:
            self._calls += 1
            return self._eagerly(self._stream, inputs)
        if self._graph is None:
            self._graph = self._recorded(self._stream, inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._out

    def _eagerly(self, stream: torch.cuda.Stream, inputs: tuple[Tensor, ...]) -> Out:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = self.run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return out

    def _recorded(self, stream: torch.cuda.Stream, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self._inputs = [t.clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.clear_autocast_cache()  # weights that were cast before would stay as they were
        with torch.cuda.stream(stream):  # `torch.cuda.graph` would collect garbage, which takes longer than most work
            graph.capture_begin(pool=self.pool)
            try:
                self._out = self.run(*self._inputs)
            finally:
                graph.capture_end()
                torch.clear_autocast_cache()
        return graph


def _kind(inputs: tuple[Tensor, ...]) -> list[Any]:
    return [(t.shape, t.dtype, t.device) for t in inputs]
