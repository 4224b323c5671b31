"""Ray: where policy ranks and rollout engines run, and how the driver talks to them."""
