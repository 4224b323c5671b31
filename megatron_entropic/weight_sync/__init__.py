"""Transfer of weights from the policy to the engines: buckets, their checksums, and the ways they travel."""
