"""One of 2 ranks: the examples of docs/output_head.md in order; writes how far each head's gradient of hidden states is
from that of the whole vocabulary, and this rank's part of the sum from it."""

from __future__ import annotations

import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PAGE = Path(__file__).resolve().parents[3] / "docs" / "output_head.md"


def main() -> None:
    """Run."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.manual_seed(1)  # the same random examples on every rank
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    hidden, weight = (names[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    logp = ((hidden @ weight.T)[:, :97] / 0.6).log_softmax(-1).gather(1, names["target"][:, None]).squeeze(1)
    (-(names["advantage"].double() * logp).sum() / 6).backward()
    assert hidden.grad is not None
    alone = names["hidden"].detach().requires_grad_()
    logprob, _ = names["logprob_and_entropy"](alone @ names["shard"].T, names["target"], **names["options"])
    (-(names["advantage"] * logprob).sum() / 6).backward()
    gradients = {name: names[name].grad for name in ("stored", "fused", "at_once")} | {"alone": alone.grad}
    report = {name: float((gradient - hidden.grad).abs().max()) for name, gradient in gradients.items()}
    sys.stdout.write(json.dumps(report) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
