"""One declarative map between Hugging Face and Megatron weights, and its users: loading, publishing, export.

Works on names, shapes and tensors only; neither megatron-core nor vLLM is imported here.
"""
