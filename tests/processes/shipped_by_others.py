"""What tests of adapters put into processes of environments: a class as TRL documents them, OpenEnv's own server."""

from __future__ import annotations

import importlib
import sys
from typing import Any


class Counter:
    """An environment for TRL's `environment_factory`: a number to bring to a goal."""

    def __init__(self) -> None:
        self._goal = self._value = 0

    def reset(self, **row: Any) -> str:
        self._goal, self._value = int(row["ground_truth"]), 0
        return f" The number is 0, the goal {self._goal}."

    def add(self, amount: int) -> str:
        """Add to the number.

        Args:
            amount: what is added.
        """
        self._value += amount
        return f"The number is {self._value}."

    async def halve(self) -> str:
        """Halve the number."""
        if self._value % 2:
            raise ValueError("the number is odd")
        self._value //= 2
        return f"The number is {self._value}."

    def get_reward(self) -> float:
        return float(self._value == self._goal)


def serve(folder: str) -> None:
    """Serve the environment that `openenv init echo` has written into `folder`, and say at which port."""
    import uvicorn
    from openenv.core.env_server.http_server import create_app

    sys.path.insert(0, folder)
    models = importlib.import_module("echo.models")
    environment = importlib.import_module("echo.server.echo_environment").EchoEnvironment
    app = create_app(environment, models.EchoAction, models.EchoObservation, max_concurrent_envs=64)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
    listening = config.bind_socket()
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    serve(sys.argv[1])
