"""The update step written out plainly over a transformers model in float64: loops, one sequence at a time, torch AdamW.

Nothing of the project is used here, so that an error in its formulas cannot cancel.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch


def load_model(hf_dir: Path, adapter_dir: Path | None = None) -> Any:
    """The model in float64, with peft's adapters, which alone are trained then."""
    import transformers

    # Experts one after the other: transformers' grouped product does not know float64.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, experts_implementation="eager"
    )
    if adapter_dir is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter_dir, is_trainable=True)
    return model.double().eval()


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Parameters that are trained by the names that a checkpoint has for them."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".default.", "."): parameter for name, parameter in found.items()}


def checkpoint_names(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name in memory, where experts of a layer are one tensor, as checkpoints hold them."""
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for full_name, tensor in tensors.items():
        name = full_name.replace(".mlp.", ".block_sparse_moe.") if mixtral else full_name
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, stacked in enumerate(tensor):
                found[f"{prefix}.{expert}.{gate}.weight"], found[f"{prefix}.{expert}.{up}.weight"] = stacked.chunk(2)
        elif last == "down_proj":
            found |= {f"{prefix}.{expert}.{down}.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def statistics(model: Any, sequences: list[dict], temperature: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(log-probs, entropies) [R] of what the policy wrote of every sequence, with gradient."""
    result = []
    for sequence in sequences:
        tokens, prompt = sequence["tokens"], sequence["prompt_length"]
        logits = model(torch.tensor([tokens])).logits[0, prompt - 1 : -1] / temperature
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(tokens[prompt:]).unsqueeze(-1)).squeeze(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        written = slice(None) if sequence["mask"] is None else sequence["mask"]
        result.append((chosen[written], entropies[written]))
    return result


def watch_routers(model: Any) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of every router, by name: logits [tokens, experts] and chosen experts, filled by each forward pass."""
    outputs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.setdefault(name, []).append((output[0], output[-1]))

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(keep(name))
    return outputs


def balance(
    outputs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]], per_token: int
) -> tuple[torch.Tensor, list[float]]:
    """Sum over layers of the load-balancing loss of all tokens; each layer's busiest expert over the mean of experts.

    Fedus et al. 2021, equation 4, with the choices of `per_token` experts counted: experts x sum of f_i P_i.
    """
    total, busiest = torch.zeros((), dtype=torch.float64), []
    for parts in outputs.values():
        layer, indices = (torch.cat(kind) for kind in zip(*parts, strict=True))
        chosen = torch.zeros_like(layer).scatter(1, indices, 1.0)
        share = chosen.mean(dim=0) / per_token
        total = total + layer.shape[1] * (share * layer.softmax(-1).mean(dim=0)).sum()
        busiest.append(float(share.max() * layer.shape[1]))
    return total, busiest


def mean_entropy(stats: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Token mean over all responses."""
    entropies = torch.cat([entropy.detach() for _, entropy in stats])
    return float(entropies.mean())


def loss_terms(stats: list[tuple[torch.Tensor, torch.Tensor]], sequences: list[dict], case: dict, alpha: float) -> dict:
    """policy, entropic and kl of the specification, each a scalar with gradient, and the counts behind the metrics."""
    n_tokens = sum(len(s["advantages"]) for s in sequences)
    n_high = sum(int((lp.exp() > case["tau"]).sum()) for lp, _ in stats)
    terms = {"policy": 0.0, "entropic": 0.0, "kl": 0.0}
    clipped = 0
    for (logprobs, _), sequence in zip(stats, sequences, strict=True):
        own_alpha = prompt_alpha(case, sequence, alpha)
        high_here = int((logprobs.exp() > case["tau"]).sum())
        for t, logprob in enumerate(logprobs):
            advantage = float(sequence["advantages"][t])
            old = float(sequence["old_logprobs"][t])
            correction = 1.0
            if case["importance_cap"]:
                correction = min(math.exp(old - float(sequence["rollout_logprobs"][t])), case["importance_cap"])
            ratio = torch.exp(logprob - old)
            bounded = ratio.clamp(1 - case["clip_low"], 1 + case["clip_high"])
            surrogate = torch.maximum(-advantage * ratio, -advantage * bounded)
            if advantage < 0:
                surrogate = torch.minimum(surrogate, torch.tensor(-advantage * case["dual_clip"], dtype=torch.float64))
            raw = ratio.item()
            used = -surrogate.item() / advantage if advantage else raw
            clipped += abs(used - raw) > 1e-12
            weight = _weight(case, len(logprobs), n_tokens, len(sequences))
            terms["policy"] = terms["policy"] + weight * correction * surrogate
            d = logprob - float(sequence["reference_logprobs"][t])
            terms["kl"] = terms["kl"] + case["kl"] * weight * (torch.exp(-d) - 1 + d)
            if logprob.exp() > case["tau"]:
                held = case["ratio_clip"] == "ppo" and abs(used - raw) > 1e-12
                adjusted = -abs(advantage) * (used if held else ratio)
                if case["denominator"] == "high_prob_tokens":
                    weight = _weight(case, high_here, n_high, len(sequences))
                terms["entropic"] = terms["entropic"] + own_alpha * weight * correction * adjusted
    return {**terms, "high_prob_fraction": n_high / n_tokens, "clip_fraction": clipped / n_tokens}


def prompt_alpha(case: dict, sequence: dict, alpha: float) -> float:
    """Alpha of a sequence: the step's, or of `unsolved` with gain 2 and limit 1, which denominator all_tokens has."""
    return alpha if case["controller"] == "pi" else -min(1.0, 2.0 * (1.0 - sequence["success"]))


def _weight(case: dict, own_tokens: int, all_tokens: int, n_sequences: int) -> float:
    return {
        "token-mean": 1 / all_tokens,
        "seq-mean-token-sum": 1 / n_sequences,
        "seq-mean-token-mean": 1 / (n_sequences * own_tokens),
        "seq-mean-token-sum-norm": 1 / (n_sequences * case["max_response_tokens"]),
    }[case["aggregation"]]


def gradients(hf_dir: Path, sequences: list[dict], case: dict) -> dict:
    """Loss, alpha and gradients by Hugging Face name of the first update."""
    model = load_model(hf_dir, case["adapter_dir"])
    routers = watch_routers(model)
    stats = statistics(model, sequences, case["temperature"])
    alpha = max(-1.0, min(1.0, case["kp"] * (mean_entropy(stats) - case["target"])))
    terms = loss_terms(stats, sequences, case, alpha)
    aux_loss, busiest = balance(routers, getattr(model.config, "num_experts_per_tok", 1))
    (terms["policy"] + terms["entropic"] + terms["kl"] + case["aux_loss"] * aux_loss).backward()
    values = {name: float(torch.as_tensor(value).detach()) for name, value in terms.items()}
    grads = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    # Of tokens with A != 0; the same number for all of them with one alpha.
    acting = [int((sequence["advantages"] != 0).sum()) for sequence in sequences]
    alphas = [prompt_alpha(case, sequence, alpha) for sequence in sequences]
    return {
        **values,
        "alpha": sum(a * n for a, n in zip(alphas, acting, strict=True)) / sum(acting),
        "entropy": mean_entropy(stats),
        "grad_norm": norm,
        "busiest": busiest,
        "gradients": checkpoint_names(model, grads),
    }


def train(hf_dir: Path, sequences: list[dict], case: dict, optimizer: dict, steps: int) -> dict:
    """Several updates with AdamW, decay on matrices only, clipping and a linear schedule with warm-up."""
    model = load_model(hf_dir, case["adapter_dir"])
    matrices = [p for p in trained(model).values() if p.dim() > 1]
    vectors = [p for p in trained(model).values() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        betas=(optimizer["beta1"], optimizer["beta2"]),
        eps=optimizer["epsilon"],
    )
    trace: dict[str, list[float]] = {"alpha": [], "grad_norm": [], "learning_rate": []}
    accumulated = 0.0
    for step in range(1, steps + 1):
        stats = statistics(model, sequences, case["temperature"])
        error = mean_entropy(stats) - case["target"]
        alpha = max(-1.0, min(1.0, case["kp"] * error + case["ki"] * accumulated))
        accumulated += error
        terms = loss_terms(stats, sequences, case, alpha)
        adam.zero_grad()
        (terms["policy"] + terms["entropic"] + terms["kl"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), optimizer["gradient_clip"])
        rate = _rate(step, optimizer)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        for name, value in (("alpha", alpha), ("grad_norm", float(norm)), ("learning_rate", rate)):
            trace[name].append(value)
    parameters = {name: p.detach().clone() for name, p in trained(model).items()}
    return {**trace, "parameters": checkpoint_names(model, parameters)}


def _rate(step: int, optimizer: dict) -> float:
    """Linear warm-up, then linear decay to the minimum at `total_steps`."""
    top, bottom, warmup = optimizer["learning_rate"], optimizer["min_learning_rate"], optimizer["warmup_steps"]
    if step <= warmup:
        return top * step / warmup
    return top + (bottom - top) * (step - warmup) / (optimizer["total_steps"] - warmup)
