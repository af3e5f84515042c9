"""Small models made in no time, learners of them, the same models of transformers, and how results are compared."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dataloader_instruct import InstructData
from instruct_format import TEMPLATE
from model import GPT, GPTConfig
from training.options import parse_options
from training.processes import Processes
from training.step import Learner, evaluate, most_tokens, train_step
from weights import checkpoint

VOCAB = 1009  # a prime: real token ids modulo this keep the real lengths and masks
SMALL = GPTConfig(context_length=1024, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=32)
CPU = torch.device("cpu")


def small_model(seed: int = 0, config: GPTConfig = SMALL) -> GPT:
    """Random weights, norms and biases moved off their initial values, so that all of them count."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def loud_model() -> GPT:
    """Weights so large that the gradients overflow fp16 at the highest scale."""
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def write_checkpoint(path: Path, model: GPT | None = None, /, **changes: Any) -> Path:
    """A checkpoint of ours with this model, or a small one with GPT-2's vocabulary and a context of 64; changes replace
    entries of its state."""
    model = model or small_model(config=GPTConfig(64, 50257, 2, 2, 32))
    checkpoint.save(path, {"step": 3, "val_losses": [[0, 10.9], [3, 4.25]], "template": TEMPLATE,
                           "model_config": vars(model.config), "model": model.state_dict(), **changes})
    return path


def write_pretrained(path: Path, model: GPT) -> Path:
    return write_checkpoint(path, model, step=0, val_losses=[], template=None)


def options_of(*flags: object) -> Namespace:
    return parse_options([str(flag) for flag in flags])


def learner_of(model: GPT | None = None, *flags: object, device: torch.device = CPU,
               say: Callable[[str], None] = print) -> Learner:
    """Of one process, for small_model() without a model; gradients are not clipped unless the flags say so."""
    options = options_of("--grad_clip", 1e9, *flags)
    return Learner((model or small_model()).to(device), options, Processes(0, 1, device), say)


def gradients_of(learner: Learner) -> torch.Tensor:
    return torch.cat([learner.gradients[each].flatten().cpu() for each in learner.model.parameters()])


def computed(learner: Learner, data: dict[str, InstructData]) -> tuple[float, float, torch.Tensor]:
    """The val loss, then loss and gradients, in a row, of a step of all of the train split."""
    plans = [data[split].plan(range(len(data[split])), most_tokens(learner.options), 1) for split in ("val", "train")]
    val_loss = evaluate(learner, data["val"], plans[0])
    assert val_loss is not None
    return val_loss, train_step(learner, data["train"], plans[1], 1e-3).loss, gradients_of(learner)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The length of the difference, of the expected one's."""
    found, expected = (each.detach().double().cpu() for each in (found, expected))
    return float((found - expected).norm() / expected.norm())


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ours in transformers' layout, or theirs in ours."""
    return {name: tensor.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
            for name, tensor in tensors.items()}


def transformers_model(model: GPT) -> Any:
    """Their GPT2LMHeadModel, without dropout, with the weights of this one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, n_positions=config.context_length,
                                           n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                                           resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="eager"))
    missing, unexpected = reference.load_state_dict(transposed(model.state_dict()), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    reference.tie_weights()
    return reference.eval()


def reference_loss_sum(reference: Any, examples: Iterable[Iterable[Any]]) -> torch.Tensor:
    """The sum of the cross entropy of (tokens, loss mask) of each example by transformers: padded, one example a row,
    labels of -100 where nothing is trained."""
    pairs = [[torch.from_numpy(np.array(part, dtype=int)) for part in example] for example in examples]
    tokens = pad_sequence([ids for ids, _ in pairs], batch_first=True)
    present = pad_sequence([torch.ones_like(ids) for ids, _ in pairs], batch_first=True)
    labels = pad_sequence([torch.where(mask == 1, ids, -100) for ids, mask in pairs], True, padding_value=-100)
    logits = reference(tokens, attention_mask=present).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def same_state(one: object, other: object) -> bool:
    """Equal to the bit, tensors and plain values alike: 0.0 is not -0.0."""
    if isinstance(one, torch.Tensor):
        return (isinstance(other, torch.Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
                and torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other))))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(same_state, one, other))
    return one == other
