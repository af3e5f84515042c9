"""Attention over a packed buffer as one kernel, and the transformer compiled around it: on CPUs, where the operator of
GPUs and its gradient have a stand-in, which computes a document at a time and in fp32."""

from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.attention.varlen  # defines the operators
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters

import model
import training.compiled
from dataloader_instruct import InstructData
from helpers import open_data, write_random
from model import GPTConfig, takes_packed
from models import VOCAB, computed, learner_of, relative, small_model

CONFIG = GPTConfig(context_length=64, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=32)
FLAGS = ("--precision", "bf16", "--context_length", 64, "--mini_batch_size", 2, "--total_batch_size", 1024)
Computed = tuple[float, float, Tensor]


def _each(starts: Tensor, *parts: Tensor) -> list[list[Tensor]]:
    """The documents of flat buffers (n_tokens, n_head, head_size), as (1, n_head, n_tokens, head_size) in fp32."""
    lengths = starts.diff().tolist()
    return [list(each) for each in zip(*(part.float().transpose(0, 1)[None].split(lengths, dim=2) for part in parts))]


def _flat(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(torch.cat(parts, dim=2)[0].transpose(0, 1))


def _forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, longest_k: int,
             is_causal: bool = False, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert is_causal and torch.equal(starts, starts_k) and int(starts.diff().max()) <= longest == longest_k
    found = [F.scaled_dot_product_attention(*each, is_causal=True) for each in _each(starts, q, k, v)]
    return _flat(found, q), q.new_zeros(q.size(1), q.size(0), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
              *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for q1, k1, v1, wanted in _each(starts, q, k, v, gradient):  # by the formula: autograd has no part in here
        size = q1.size(-1)**-0.5
        hidden = torch.ones(q1.size(2), q1.size(2)).triu(1).bool()
        shares = (q1 @ k1.mT * size).masked_fill(hidden, -torch.inf).softmax(-1)
        of_shares = wanted @ v1.mT
        of_scores = size * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
        found.append((of_scores @ k1, of_scores.mT @ q1, shares.mT @ wanted))
    dq, dk, dv = (_flat(list(parts), like) for parts, like in zip(zip(*found), (q, k, v)))
    return dq, dk, dv


torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _forward)
torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", _backward)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, InstructData]:
    """Splits of at least 20 micro-batches."""
    data = open_data(write_random(tmp_path_factory.mktemp("data"), 80, 80, 64), 64)
    assert all(len(split.plan(range(80), 2 * 64, 1).micro_batches) >= 20 for split in data.values())
    return data


@pytest.fixture
def packed(monkeypatch) -> None:
    """Nothing is compiled yet."""
    for module in (model, training.compiled):
        monkeypatch.setattr(module, "takes_packed", lambda *_: True)
    torch._dynamo.reset()
    counters.clear()


def taken(data: dict[str, InstructData], *flags: object, say: Any = print, recompute: str = "gelu") -> Computed:
    """What a learner with these flags computes."""
    learner = learner_of(small_model(config=CONFIG), *FLAGS, *flags, say=say)
    learner.computing.transformer.recompute = recompute
    return computed(learner, data)


def assert_close(found: Computed, expected: Computed, of_losses: float = 1e-6, of_gradients: float = 5e-4) -> None:
    assert found[:2] == pytest.approx(expected[:2], rel=of_losses) and relative(found[2], expected[2]) < of_gradients


@pytest.mark.parametrize("device, dtype, head_size, capability, expected", [
    ("cuda:0", torch.bfloat16, 64, (8, 0), True), ("cuda:0", torch.float16, 64, (9, 0), True),
    ("cuda:0", torch.float16, 64, (7, 5), False), ("cuda:0", torch.float32, 64, (9, 0), False),
    ("cuda:0", torch.bfloat16, 256, (8, 6), True), ("cuda:0", torch.bfloat16, 264, (8, 6), False),
    ("cuda:0", torch.bfloat16, 12, (8, 6), False), ("cpu", torch.bfloat16, 64, (9, 0), False)])
def test_which_attention_is_one_kernel(monkeypatch, device, dtype, head_size, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert takes_packed(torch.device(device), dtype, head_size) is expected


def test_one_kernel_for_all_documents_equals_a_call_for_each(data, monkeypatch):
    """The kernel is called for each layer and micro-batch; its sums differ in their order only: the gradients, rounded
    to bf16 here and there, by 1.1e-4."""
    expected = taken(data)
    called = Mock(side_effect=torch.nn.attention.varlen.varlen_attn)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", called)
    monkeypatch.setattr(model, "takes_packed", lambda *_: True)
    assert_close(taken(data), expected)
    assert called.call_count >= 2 * CONFIG.n_layer * 20


@pytest.mark.parametrize("recompute", ["nothing", "gelu", "blocks"])
def test_compiled_there_are_two_graphs_however_the_micro_batches_differ(data, packed, monkeypatch, recompute):
    """One for training, one for evaluation, over 20 micro-batches of other lengths each, whatever is computed again in
    the backward pass, which the graph has to say. Captured whole, so that no part is left to Python."""
    expected, said, called = taken(data), list[str](), list[str]()

    def watched(graph: Any, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=watched))
    assert_close(taken(data, "--compile", say=said.append, recompute=recompute), expected)
    assert counters["stats"]["unique_graphs"] == 2 and not said and not counters["graph_break"]
    assert sum("checkpoint" in each for each in called) == (0 if recompute == "nothing" else CONFIG.n_layer)


@pytest.mark.slow
def test_a_transformer_compiled_in_earnest_computes_the_same(data, packed, capfd):
    """By Inductor and a C++ compiler. What it joins it does not round in between: losses 2e-5, gradients 1e-3 off."""
    expected = taken(data)
    assert_close(taken(data, "--compile"), expected, of_losses=1e-4, of_gradients=5e-3)
    assert counters["stats"]["unique_graphs"] == 2 and "going on without" not in capfd.readouterr().out


def refuse(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here\nand more about it")


def test_what_cannot_be_compiled_goes_on_without_and_says_so_once(data, packed, monkeypatch):
    expected, said = taken(data), list[str]()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))
    found = taken(data, "--compile", say=said.append)
    assert len(said) == 1 and "--compile" in said[0] and "no compiler here" in said[0] and "\n" not in said[0]
    assert_close(found, expected)


def test_without_the_kernel_nothing_is_compiled_which_is_one_line(data, caplog):
    """On a CPU, in fp32, on older GPUs: a call for each document would be a graph for each micro-batch."""
    expected, said = taken(data), list[str]()
    assert taken(data, "--compile", say=said.append)[:2] == expected[:2]
    assert len(said) == 1 and "--compile" in said[0] and "\n" not in said[0]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_out_of_memory_is_not_taken_for_a_failed_compilation(data, packed, monkeypatch):
    """It ends the run with its own advice."""
    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, inputs: full))
    with pytest.raises(torch.OutOfMemoryError):
        taken(data, "--compile")
