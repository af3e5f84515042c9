"""--compile: the whole transformer as one graph for training and one for evaluation.

A graph wants fixed sizes, so micro-batches are filled up to the same number of tokens, the longest document is that of
the context, only the number of documents changes, and the rows that are wanted are selected outside.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT, Documents, attend_packed, takes_packed


class Compiled:
    """Calls like the model. What cannot be compiled is computed without, which is said once."""

    def __init__(self, model: GPT, say: Callable[[str], None]) -> None:
        import torch._functorch.config as functorch

        def transform(tokens: Tensor, positions: Tensor, starts: Tensor, longest: int) -> Tensor:
            documents = Documents((), positions, starts, longest)
            return model.transformer(tokens, positions, attend_packed(documents), None)

        # the backward pass too, while its failure can be caught
        functorch.force_non_lazy_backward_lowering = True
        self._model, self._say, self._transform = model, say, torch.compile(transform, fullgraph=True)
        self._is_off, self._graphs = False, set[bool]()  # the graphs that worked: for training, for evaluation
        weight = model.get_parameter("transformer.h.0.attn.c_attn.weight")
        if not takes_packed(weight.device, weight.dtype, model.config.head_size):
            self._go_without("it needs the packed attention of GPUs with bf16, in bf16 or fp16")

    def __call__(self, tokens: Tensor, documents: Documents, rows: Tensor) -> Tensor:
        if not self._is_off:
            torch._dynamo.mark_dynamic(documents.starts, 0)
            try:
                hidden = self._transform(tokens, documents.positions, documents.starts, documents.longest)
                self._graphs.add(torch.is_grad_enabled())
                return hidden.index_select(0, rows)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) or torch.is_grad_enabled() in self._graphs:
                    raise
                self._go_without(str(getattr(error, "inner_exception", error)))
        return self._model(tokens, documents, rows)  # type: ignore[no-any-return]

    def _go_without(self, reason: str) -> None:
        self._is_off = True
        self._say(f"warning: --compile does not work here, going on without: {reason.strip().partition(chr(10))[0]}")
