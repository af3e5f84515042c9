"""The cross entropy of the output layer and its gradients, against PyTorch's over the whole table of scores."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import SRC, run_command
from models import relative
from training import cross_entropy
from training.cross_entropy import ROWS, output_loss, padded

VOCAB, WIDTH, SCALE = 1009, 32, 0.125  # a prime: no multiple of 64, so that copies have padding
SMALL_TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch) -> None:
    """As of GPT-2's vocabulary: four of columns."""
    monkeypatch.setattr(cross_entropy, "COLUMNS", 300)


def case(n_rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output matrix, targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_rows, WIDTH, generator=generator, dtype=torch.float64)
    weight = 0.3 * torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(VOCAB, (n_rows,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[float, Tensor, Tensor]:
    """In float64: the loss, and the gradients of scale times it."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (scale * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.item(), hidden.grad, weight.grad


def computed(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients, with products in this type."""
    gradient, copy = torch.zeros_like(weight), None if dtype == weight.dtype else padded(weight, dtype)
    loss, of_hidden = output_loss(hidden, weight, targets, copy, gradient, SCALE)
    assert of_hidden is not None
    return loss, of_hidden, gradient


@pytest.mark.parametrize("dtype, of_loss, of_gradients", [(torch.float64, 1e-12, 1e-12), (torch.float32, 2.4e-7, 1e-6)])
@pytest.mark.parametrize("n_rows", [1, ROWS, ROWS + 1, 3 * ROWS + 7])
@pytest.mark.parametrize("is_cuda", [False, True])
def test_loss_and_gradients_equal_pytorchs(monkeypatch, is_cuda, n_rows, dtype, of_loss, of_gradients):
    """However many chunks there are, also by the formulas for GPUs. The matrix's gradient is added to what is there."""
    monkeypatch.setattr(Tensor, "is_cuda", is_cuda)
    hidden, weight, targets = case(n_rows, dtype)
    before = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradient = before.clone()
    loss, of_hidden = output_loss(hidden, weight, targets, gradient=gradient, scale=SCALE)
    expected, of_hidden0, of_weight0 = reference(hidden, weight, targets, SCALE)
    assert loss.dtype == dtype and loss.item() == pytest.approx(expected, rel=of_loss)
    assert of_hidden is not None and relative(of_hidden, of_hidden0) < of_gradients
    assert relative(gradient, before.double() + of_weight0) < of_gradients
    assert output_loss(hidden, weight, targets)[0] == loss  # nor does evaluation differ
    assert output_loss(hidden, weight, targets)[1] is None


@pytest.mark.parametrize("dtype", SMALL_TYPES)
@pytest.mark.parametrize("n_rows", [1, 2 * ROWS, 2 * ROWS + 1, 5 * ROWS + 7])
def test_the_loss_of_small_types_is_summed_in_fp32(n_rows, dtype):
    """Against the same products in float64: the scores are what is rounded to 8 or 11 bits (0.2 % or 0.02 % of the
    loss of a single row, of which hundreds cancel), and sums are not. Gradients come out in the type of the products,
    at most 2^-8 or 2^-11 from the true ones."""
    hidden, weight, targets = case(n_rows, torch.float32)
    loss, *gradients = computed(hidden, weight, targets, dtype)
    scores = (hidden.to(dtype) @ padded(weight, dtype).t())[:, :VOCAB].double()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(scores, targets, reduction="sum").item(), rel=2.4e-7)
    expected, *gradients0 = reference(hidden.to(dtype), weight.to(dtype), targets, SCALE)
    if n_rows >= ROWS:
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert max(map(relative, gradients, gradients0)) < (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)
    assert {each.dtype for each in gradients} == {torch.float32}


@pytest.mark.parametrize("dtype", SMALL_TYPES)
def test_padding_gets_no_probability(dtype):
    """Its 15 scores would be 0, where those of the 1,009 real tokens are nearly that too: the loss would be 0.2 % more,
    and the gradient's sum 0.7 % of its values'."""
    _, weight, targets = case(ROWS, torch.float32)
    hidden, weight = torch.ones(ROWS, WIDTH), 0.1 * weight
    copy = padded(weight, dtype)
    assert copy.shape == (1024, WIDTH) and not copy[VOCAB:].any()
    loss, _, gradient = computed(hidden, weight, targets, dtype)
    assert loss.item() == pytest.approx(reference(hidden, weight.to(dtype), targets, SCALE)[0], rel=1e-4)
    assert float(gradient.sum()) == pytest.approx(0.0, abs=0.003 * float(gradient.abs().sum()))


@pytest.mark.parametrize("dtype, of_loss, of_gradients", [(torch.bfloat16, 1e-4, 0.006), (torch.float16, 2e-5, 0.001)])
def test_scores_far_from_zero_are_as_exact_as_others(dtype, of_loss, of_gradients):
    """Those of the published weights lie around -100, where bf16 has steps of 0.5."""
    hidden, weight, targets = case(5 * ROWS, torch.float32)
    hidden[:, 0] = 10.0
    found = []
    for offset in (0.0, -11.0):
        weight[:, 0] = offset
        loss, *gradients = computed(hidden, weight, targets, dtype)
        expected, *gradients0 = reference(hidden, weight, targets, SCALE)
        assert loss.item() == pytest.approx(expected, rel=of_loss)
        assert max(map(relative, gradients, gradients0)) < of_gradients
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=of_loss)


@pytest.mark.parametrize("dtype, of_loss, of_gradients", [
    (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-4, 0.15), (torch.float16, 2e-4, 0.05)])
def test_very_large_scores_do_not_overflow(dtype, of_loss, of_gradients):
    """exp of the scores themselves would be infinite from 89 on. Those of thousands are rounded to whole steps: the
    gradients' errors are measured, 8e-6, 0.07 and 0.02."""
    hidden, weight, targets = case(ROWS, torch.float32)
    hidden *= 1000  # scores up to about 9,000
    loss, *gradients = computed(hidden, weight, targets, dtype)
    expected, *gradients0 = reference(hidden.to(dtype), weight.to(dtype), targets, SCALE)
    assert loss.item() == pytest.approx(expected, rel=of_loss)
    assert all(each.isfinite().all() for each in gradients)
    assert max(map(relative, gradients, gradients0)) < of_gradients


def test_the_first_exponential_of_a_process_is_of_one_number():
    """So that no two threads make MKL's first call, which chooses its kernel, together (issue 188792 of PyTorch)."""
    program = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "exp" in str(function).partition(".")[2].partition(".")[0].split("_"):
            print(arguments[0].numel())
        return function(*arguments, **(options or {}))

with Watch():
    from training.cross_entropy import output_loss
    output_loss(torch.ones(600, 8), torch.ones(300, 8), torch.zeros(600, dtype=torch.long))
"""
    done = run_command(sys.executable, "-c", program, env={"PYTHONPATH": str(SRC)})
    assert done.stdout.split() == ["1", *18 * ["9600"], "7200"], done
