"""Model families, each a table of rows; a new family is one more table and one entry here."""

from megatron_entropic.models.deepseek_v3 import DEEPSEEK_V3
from megatron_entropic.models.llama import LLAMA
from megatron_entropic.models.mixtral import MIXTRAL
from megatron_entropic.models.qwen2 import QWEN2
from megatron_entropic.models.qwen3 import QWEN3
from megatron_entropic.models.qwen3_moe import QWEN3_MOE
from megatron_entropic.models.table import Architecture, ExpertKeys, Row

_ALL = (QWEN3, QWEN2, LLAMA, QWEN3_MOE, MIXTRAL, DEEPSEEK_V3)
ARCHITECTURES = {architecture.family: architecture for architecture in _ALL}

__all__ = ["ARCHITECTURES", "Architecture", "ExpertKeys", "Row"]
