"""A model's embeddings and their norm in one native kernel."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.errors import FormularyError
from formulary.kernels import encoder

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class FusedEmbeddings:
    """Sums the embeddings of words, places and segments and norms them in one pass, by becoming the class of a BERT's embeddings.

    Ready embeddings, training, gradients, hooks on what is inside and other dtypes than float32 take the model's own forward.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether these are embeddings whose forward is that of transformers' BERT."""
        forward = type(module).forward
        return (forward.__module__, forward.__qualname__) == ("transformers.models.bert.modeling_bert", "BertEmbeddings.forward")

    @classmethod
    def attach(cls, model: nn.Module, name: str) -> nn.Module:
        """Swap the class of the embeddings `name`."""
        module = model.get_submodule(name)
        if not cls.fits(module):
            raise FormularyError(f"{name} ({type(module).__name__}) does not have the embeddings of a BERT as transformers makes them")
        module.__class__ = type(f"{cls.__name__}{type(module).__name__}", (cls, type(module)), {"__module__": cls.__module__})
        return module

    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        token_type_ids: Int[Tensor, "#B L"] | None = None,
        position_ids: Int[Tensor, "#B L"] | None = None,
        inputs_embeds: Float[Tensor, "B L D"] | None = None,
        cache_length: int = 0,
    ) -> Float[Tensor, "B L D"]:
        if input_ids is None or inputs_embeds is not None or not self._is_plain():
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, cache_length)
        if position_ids is None:
            position_ids = self.position_ids[:, cache_length : cache_length + input_ids.shape[1]]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        ids = (x.expand_as(input_ids) for x in (input_ids, position_ids, token_type_ids))
        tables = [getattr(self, name).weight for name in TABLES]
        return encoder.embed(tables, [*ids], self.LayerNorm.weight, self.LayerNorm.bias, self.LayerNorm.eps)

    def _is_plain(self) -> bool:
        tables = [getattr(self, name) for name in TABLES]
        if torch.compiler.is_compiling() or type(self.LayerNorm) is not nn.LayerNorm or self.LayerNorm.bias is None:
            return False
        if any(type(table) is not nn.Embedding or table.max_norm is not None for table in tables):
            return False
        if any(part.training or part._forward_hooks or part._forward_pre_hooks for part in self.children()):
            return False
        weights = [*(table.weight for table in tables), self.LayerNorm.weight, self.LayerNorm.bias]
        graded = torch.is_grad_enabled() and any(x.requires_grad for x in weights)
        return not graded and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in weights)
