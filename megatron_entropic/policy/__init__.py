"""Everything that touches megatron-core: one policy rank, its model, its score and update steps."""
