"""Prompts and warm-start pairs: reading, tokenising, and an order that resumes anywhere."""

from megatron_entropic.data.dataset import TaskDataset
from megatron_entropic.data.prompts import PromptForm
from megatron_entropic.data.sft import WarmStartPairs
from megatron_entropic.data.tokenizer import load_checked_tokenizer, load_tokenizer

__all__ = ["PromptForm", "TaskDataset", "WarmStartPairs", "load_checked_tokenizer", "load_tokenizer"]
