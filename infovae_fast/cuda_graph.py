"""Work for a GPU that is recorded once and sent again as a whole (a CUDA graph): a model of many small kernels then
takes the time of its kernels, where it else takes that of the Python that launches them."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Out = TypeVar("Out")


class CudaGraph(Generic[Out]):
    """`run(*inputs)` on a GPU, as a CUDA graph: call it like `run`, from one thread at a time.

    The first `eager` calls run it, on a stream of its own, while libraries and lazy initialisations get ready; the next
    one records it. From then on the inputs are copied to where the recording reads, and it is replayed. Inputs of other
    shapes begin anew.

    The tensors that come out are overwritten by the next call. Side effects in Python are not repeated: let `run`
    return everything that is needed, gradients too (set to None before `backward()`, for the caller to put back in
    their places). Numbers of Python, such as a learning rate or a weight in the loss, keep the value that they had when
    it was recorded; what shall change must be in a tensor.
    Random numbers differ from call to call, as without a graph, and follow `torch.manual_seed`. `run` must not look at
    numbers (`item()`), and what comes out must not require a gradient, as that would keep the stream of an earlier
    call.

    Args:
        run: the work.
        device: the GPU; default: that of the inputs, or the current one.
        eager: calls before the recording.
        pool, stream: `torch.cuda.graph_pool_handle()` and a stream to record on, for graphs that share them: none may
            read what another left in the pool's memory.

    Raises:
        RuntimeError: `run` cannot be recorded.
    """

    def __init__(
        self,
        run: Callable[..., Out],
        *,
        device: torch.device | None = None,
        eager: int = 3,
        pool: Any = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.run, self.device, self.eager, self.pool, self.stream = run, device, eager, pool, stream
        self._kind: list[Any] | None = None

    def __call__(self, *inputs: Tensor) -> Out:
        device = self.device or (inputs[0].device if inputs else torch.device("cuda", torch.cuda.current_device()))
        kind = [(t.shape, t.dtype, t.device) for t in inputs] + [device]
        with torch.cuda.device(device):
            if kind != self._kind:
                self._kind, self._calls = kind, 0
                self._graph: torch.cuda.CUDAGraph | None = None
                self._stream = self.stream or torch.cuda.Stream()
            if self._calls < self.eager:
                self._calls += 1
                return self._eagerly(inputs)
            if self._graph is None:
                self._graph = self._recorded(inputs)
            for kept, given in zip(self._inputs, inputs, strict=True):
                kept.copy_(given.detach())
            self._graph.replay()
            return self._out

    def _eagerly(self, inputs: tuple[Tensor, ...]) -> Out:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            out = self.run(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return out

    def _recorded(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self._inputs = [t.detach().clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if self.eager:
            torch.cuda.empty_cache()  # what those calls held: the recording has memory of its own
        torch.clear_autocast_cache()  # weights that were cast before would stay as they were
        try:
            # `torch.cuda.graph` would collect garbage, which takes longer than most work.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    self._out = self.run(*self._inputs)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            raise RuntimeError(
                f"this cannot be recorded as a CUDA graph: {error}; run it without (in training: cuda_graph=False)"
            ) from error
        finally:
            torch.clear_autocast_cache()
        return graph
