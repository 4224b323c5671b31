"""From the policy to the engines: what travels in which buckets, its checksums, by which way."""
