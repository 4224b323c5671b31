"""Ray: the processes of policy ranks and rollout engines, their places, and the driver's calls to them."""
