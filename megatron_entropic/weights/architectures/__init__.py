"""Model families, each a table of rows; a new dense family is one more table and one entry here."""

from megatron_entropic.weights.architectures.llama import LLAMA
from megatron_entropic.weights.architectures.qwen2 import QWEN2
from megatron_entropic.weights.architectures.qwen3 import QWEN3
from megatron_entropic.weights.architectures.table import Architecture, Row

ARCHITECTURES = {architecture.family: architecture for architecture in (QWEN3, QWEN2, LLAMA)}

__all__ = ["ARCHITECTURES", "Architecture", "Row"]
