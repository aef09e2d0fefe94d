"""Measured answers in dispatch: their place between forced and default, neighbours, reasons, cost, the log."""

from __future__ import annotations

import subprocess
import sys
import timeit

import pytest
import torch

import dlkern
from dlkern import dispatch
from dlkern.functional import batch_norm_act
from dlkern.kernels.reference.batch_norm_act import Request
from dlkern.tuning import answers
from dlkern.tuning.answers import Answer, Key

REQUEST = Request("cpu", torch.float32, torch.float32, False, True, False, "relu")
LIMIT = 2.0  # us a call
X = torch.ones(4, 8, 16, 16)
TORCH = Answer("torch", 0.8, 0.7, 0.9, 1e-3, "cpu")


pytestmark = pytest.mark.usefixtures("own_answers")


def _key(*shape: int) -> Key:
    return Key("batch_norm_act", answers.in_words(REQUEST), shape)


def _chosen(x: torch.Tensor = X) -> dispatch.Choice:
    return dispatch.choose("batch_norm_act", REQUEST, x)


def test_a_measured_answer_stands_between_forced_and_default() -> None:
    assert _chosen() == ("cpu", "default", False)
    answers.put([(_key(4, 8, 16, 16, 0), TORCH)])
    assert _chosen() == ("torch", "measured: the fastest other, cpu, is 0.80x PyTorch on this shape", True)
    with dlkern.backend("cpu"):
        assert _chosen() == ("cpu", "forced", False)
    answers.put([(_key(4, 8, 16, 16, 0), Answer("cpu", 1.43))])
    assert _chosen() == ("cpu", "measured: 1.43x PyTorch on this shape", True)
    answers.clear()
    assert _chosen() == ("cpu", "default", False)


@pytest.mark.parametrize(
    ("shape", "near"),
    [
        ((4, 8, 16, 16), True),
        ((8, 8, 16, 16), True),
        ((2, 16, 8, 31), True),
        ((9, 8, 16, 16), False),
        ((4, 8, 16, 7), False),
    ],
)
def test_a_near_shape_uses_the_neighbours_answer(shape: tuple[int, ...], near: bool) -> None:
    answers.put([(_key(4, 8, 16, 16, 0), TORCH)])
    assert (_chosen(torch.ones(shape)).backend == "torch") is near


def test_the_nearest_neighbour_counts() -> None:
    answers.put([(_key(4, 8, 16, 16, 0), TORCH), (_key(16, 8, 16, 16, 0), Answer("cpu", 1.2))])
    assert _chosen(torch.ones(7, 8, 16, 16)).backend == "torch"
    assert _chosen(torch.ones(10, 8, 16, 16)) == ("cpu", "measured: 1.20x PyTorch on a near shape", True)


def test_what_wants_a_gradient_was_measured_as_such() -> None:
    answers.put([(_key(4, 8, 16, 16, 0), TORCH)])
    x = X.clone().requires_grad_()
    assert _chosen(x).backend == "cpu"
    with torch.no_grad():
        assert _chosen(x).backend == "torch"


def test_another_request_is_not_near() -> None:
    answers.put([(_key(4, 8, 16, 16, 0), TORCH)])
    assert dispatch.choose("batch_norm_act", REQUEST._replace(activation="silu"), X).backend == "cpu"


def test_an_answer_that_cannot_run_here_is_passed_over() -> None:
    answers.put([(_key(4, 8, 16, 16, 0), Answer("cuda", 3.0))])
    assert _chosen().backend == "cpu"
    assert not _chosen().measured


def test_without_sizes_an_answer_counts_where_all_agree() -> None:
    answers.put([(_key(4, 8, 16, 16, 0), TORCH)])
    assert dispatch.choose("batch_norm_act", REQUEST).backend == "torch"
    answers.put([(_key(64, 8, 16, 16, 0), Answer("cpu", 2.0))])
    assert dispatch.choose("batch_norm_act", REQUEST) == ("cpu", "default", False)


def test_a_trial_runs_pytorch_where_it_names_nothing() -> None:
    trial = answers.Trial({_key(4, 8, 16, 16, 0): "reference"}, decided=False)
    before = answers.attempt(trial)
    try:
        assert _chosen().backend == "reference"
        assert _chosen(torch.ones(1, 8, 2, 2)).backend == "torch"
        assert len(trial.reached) == 2
    finally:
        answers.attempt(before)
    assert _chosen() == ("cpu", "default", False)
    assert answers.epoch == 0


def test_a_compiled_graph_takes_new_answers() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(any("dlkern" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: batch_norm_act(x, None, None, training=True), fullgraph=True, backend=backend, dynamic=False
    )
    compiled(X)
    answers.put([(_key(4, 8, 16, 16, 0), TORCH)])  # activation="relu" is the default
    compiled(X)
    answers.clear()
    compiled(X)
    assert seen == [True, False] or seen == [True, False, True]
    torch._dynamo.reset()


def test_choosing_costs_two_microseconds_at_most() -> None:
    """The least of several: what the machine can do, whoever else runs on it."""
    weight = torch.ones(8, requires_grad=True)

    def least() -> float:
        timer = timeit.Timer(lambda: dispatch.choose("batch_norm_act", REQUEST, X, weight, None))
        timer.timeit(1)
        return min(timer.repeat(number=500, repeat=60)) / 500 * 1e6

    assert least() <= LIMIT
    answers.put([(_key(4, 8, 16, 16, 0, 8, 1, -1), TORCH)])
    assert dispatch.choose("batch_norm_act", REQUEST, X, weight, None).measured
    assert least() <= LIMIT


def test_the_log_has_each_decision_once() -> None:
    program = (
        "import torch, dlkern; from dlkern.functional import batch_norm_act\n"
        "for _ in range(3): batch_norm_act(torch.ones(2, 3, 4, 4), None, None, training=True)"
    )
    environment = {**__import__("os").environ, "DLKERN_LOG": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dlkern: ")]
    assert len(lines) == 1
    assert lines[0].startswith("dlkern: batch_norm_act -> cpu (default): device=cpu dtype=float32")
    environment["DLKERN_LOG"] = "0"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert "dlkern:" not in done.stderr
