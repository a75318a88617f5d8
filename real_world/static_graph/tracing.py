"""One Python function with a side effect, a loop and a branch: eagerly, and as a graph."""

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from real_world.common import check, show
from real_world.static_graph.tf_setup import tf

INPUTS = (5.0, 0.5, -3.0, 5.0, 0.5, -3.0)
Value: TypeAlias = Any  # one number: a torch.Tensor, a tf.Tensor or a float


def data_dependent(x: Value) -> Value:
    """Halve x until it is in [-1, 1]; return its square if it is positive, otherwise its cube.

    The lesson's data_dependent(), with operators that both frameworks and Python's floats have.
    """
    print("Python runs")
    while abs(x) > 1:
        x = x / 2
    if x > 0:
        return x * x
    return x * x * x


class PythonControlFlow(nn.Module):
    """data_dependent() as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what data_dependent() returns."""
        return data_dependent(x)


class OperatorControlFlow(nn.Module):
    """data_dependent() with PyTorch's control flow operators, which torch.export can record."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what data_dependent() returns."""
        print("Python runs")
        (x,) = torch.while_loop(lambda x: x.abs() > 1, lambda x: (x / 2,), (x,))
        return torch.cond(x > 0, lambda x: x * x, lambda x: x * x * x, (x,))


def export(module: nn.Module) -> nn.Module:
    """Return a module's graph, recorded by torch.export, as a module."""
    with contextlib.redirect_stderr(io.StringIO()):  # if it fails, it prints the unfinished graph
        return torch.export.export(module, (torch.tensor(5.0),)).module()


def count_python_calls(
    function: Callable[[Any], Any], inputs: Iterable[Any]
) -> tuple[list[Any], int]:
    """Return the results for some inputs, and how often Python executed the function's print()."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        results = [function(x) for x in inputs]
    return results, output.getvalue().count("Python runs")


def traced_operations() -> list[str]:
    """Return the operations in the graph that @tf.function traces from data_dependent()."""
    trace = tf.function(data_dependent).get_concrete_function
    traced, _ = count_python_calls(trace, [tf.TensorSpec((), tf.float32)])
    operations = [operation.type for operation in traced[0].graph.get_operations()]
    return [name for name in operations if name not in ("Const", "Identity", "Placeholder")]


def compare_tracing() -> None:
    """Call data_dependent() in every mode; print how often Python runs, and how many graphs."""
    expected, _ = count_python_calls(data_dependent, INPUTS)
    torch_inputs = [torch.tensor(x) for x in INPUTS]
    tf_inputs = [tf.constant(x) for x in INPUTS]

    def report(mode: str, results: list[Value], calls: int, graphs: str) -> None:
        passed = [float(result) for result in results] == expected
        check(mode, f"{calls} of {len(INPUTS)}        {graphs}", passed)

    print(f"  {'':<32} Python runs   graphs")
    grad_inputs = [torch.tensor(x, requires_grad=True) for x in INPUTS]
    results, calls = count_python_calls(data_dependent, grad_inputs)
    graphs = sum(result.grad_fn is not None for result in results)
    values = [result.detach() for result in results]
    report("PyTorch, eager", values, calls, f"{graphs}, one per call")

    results, calls = count_python_calls(data_dependent, tf_inputs)
    report("TensorFlow, eager", results, calls, "none without GradientTape")

    traced = tf.function(data_dependent)
    results, calls = count_python_calls(traced, tf_inputs)
    report("@tf.function", results, calls, f"{traced.experimental_get_tracing_count()}")

    traced = tf.function(data_dependent)
    results, calls = count_python_calls(traced, INPUTS)
    graphs = traced.experimental_get_tracing_count()
    report("@tf.function, Python floats", results, calls, f"{graphs}, one per number")

    counter = CompileCounter()  # a backend that counts the graphs and runs them eagerly
    compiled = torch.compile(data_dependent, backend=counter)
    results, calls = count_python_calls(compiled, torch_inputs)
    report("torch.compile", results, calls, f"{counter.frame_count}, with graph breaks")
    explain = torch._dynamo.explain(data_dependent)
    explanations, _ = count_python_calls(explain, [torch.tensor(5.0)])
    breaks = [reason.user_stack[-1].line.rstrip(":") for reason in explanations[0].break_reasons]
    show("  graph breaks", ", ".join(dict.fromkeys(breaks)))

    try:
        count_python_calls(export, [PythonControlFlow()])
        error = "no error"
    except RuntimeError as e:
        error = str(e).split(" expression")[0]
    check("torch.export", error, error == "Could not guard on data-dependent")
    exported, trace_calls = count_python_calls(export, [OperatorControlFlow()])
    results, calls = count_python_calls(exported[0], torch_inputs)
    report("  with while_loop and cond", results, trace_calls + calls, "1")

    print("  AutoGraph rewrites the source code for @tf.function; while and if become")
    for line in tf.autograph.to_code(data_dependent).splitlines():
        if "_stmt(" in line:
            print("   ", textwrap.shorten(line, 76, placeholder=" ...)"))
