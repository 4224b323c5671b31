"""What a Hugging Face config.json says about a model, and the map between its tensors and Megatron parameters."""
