"""A step of fixed shapes as one CUDA graph, so that a GPU does not wait for the launch of each of its operations."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

WARM_UP = 3  # steps before the graph is recorded, in which libraries choose their algorithms and Adam makes its moments

# Tensors -> tensors: the inputs and the outputs of a step.
Step = Callable[..., tuple[Tensor, ...]]
Record = Callable[[Step, list[Tensor]], tuple[Callable[[], None], tuple[Tensor, ...]]]


def record_graph(step: Step, inputs: list[Tensor]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record a step, which is not run: what runs it on the numbers that `inputs` hold then, and where outputs go."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)
    return graph.replay, outputs


def on_side_stream(step: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A step on a stream of its own, as PyTorch asks for those before a recording; on a CPU as it is."""
    if not any(x.is_cuda for x in inputs):
        return step(*inputs)
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        outputs = step(*inputs)
    current.wait_stream(side)
    return outputs


class GraphedStep:
    """A step on the device, replayed from a graph after WARM_UP steps; one of other shapes than the first is not.

    It waits for nothing and draws from PyTorch's generators alone, and what it updates stays where it is in memory.
    record: what makes the graph.
    """

    def __init__(self, step: Step, record: Record = record_graph):
        self.step, self.record = step, record
        self.n_run = 0
        self.inputs: list[Tensor] = []
        self.outputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None
        self.shapes: list[torch.Size] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step, its outputs in memory of their own."""
        shapes = [x.shape for x in inputs]
        self.shapes = self.shapes or shapes
        self.n_run += 1
        if shapes != self.shapes:
            return self.step(*inputs)
        if self.n_run <= WARM_UP:
            return on_side_stream(self.step, inputs)
        if self.replay is None:
            self.inputs = [x.clone() for x in inputs]
            self.replay, self.outputs = self.record(self.step, self.inputs)
        for held, x in zip(self.inputs, inputs, strict=True):
            held.copy_(x)
        self.replay()
        return tuple(output.clone() for output in self.outputs)


def graphed(step: Step, optimizers: Iterable[Optimizer]) -> GraphedStep:
    """A step that is replayed from a graph, and that uses these optimisers: their numbers do not change by it."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["capturable"] = True
    return GraphedStep(step)
