"""Everything that touches vLLM: sampling, scoring, receiving weights. vLLM is imported where it is used."""
