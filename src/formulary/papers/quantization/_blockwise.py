"""The walk over a model's blocks, which stands in the contracts since other families take it too."""

from formulary.contracts.blockwise import Blockwise

__all__ = ["Blockwise"]
