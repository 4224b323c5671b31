"""A model's description in its Hugging Face config.json, and the map between its tensors and Megatron parameters."""
