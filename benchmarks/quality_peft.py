"""PEFT's LoRA on all linear layers, on the batches, heads and schedules that quality.py wrote.

Run after `quality.py`, in an environment with torch, transformers and peft (made with torch
2.13.0+cpu, transformers 5.23.0 and peft 0.21.2):

    python benchmarks/quality_peft.py [--methods peft-all torch-full]

Both sides have the same weights, head, order of batches, learning rates, schedule, weight decay,
clipping, rank, alpha and dropout probabilities. The factors and the dropout are drawn by each
side's own generator. The results go into the same file, and what is there is not run again.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft
import quality_runs as qr
import torch
import transformers


class Classifier(torch.nn.Module):
    """BERT, the mean over the tokens, dropout and a linear head, as jaxlora's."""

    def __init__(self, folder: str, head_kernel: np.ndarray, head_bias: np.ndarray) -> None:
        super().__init__()
        self.bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
        self.dropout = torch.nn.Dropout(self.bert.config.hidden_dropout_prob)
        self.classifier = torch.nn.Linear(*head_kernel.shape)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.from_numpy(head_kernel.T))
            self.classifier.bias.copy_(torch.from_numpy(head_bias))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, seq) to logits (batch, 2)."""
        mask = (ids != 0).long()
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)  # (batch, seq, 1)
        pooled = (hidden * weights).sum(1) / weights.sum(1)  # (batch, hidden)
        return self.classifier(self.dropout(pooled))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["peft-all"])
    parser.add_argument("--tasks", nargs="+", default=["movie", "sst2"])
    parser.add_argument("--rates", type=float, nargs="+", help="default: those of quality.py")
    parser.add_argument("--data", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/quality.jsonl"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = False
    for task in options.tasks:
        paths = sorted(options.data.glob(f"{task}-*.npz"), key=lambda p: int(p.stem.split("-")[1]))
        found = found or bool(paths)
        for method in options.methods if paths else ():
            run_missing(options, task, method, paths)
    if not found:
        raise SystemExit(f"{options.data} holds no batches: run benchmarks/quality.py first.")


def run_missing(options: argparse.Namespace, task: str, method: str, paths: list[Path]) -> None:
    settings = json.loads(str(np.load(paths[0])["settings"]))
    budget = {n: settings[n] for n in qr.BUDGET}
    lora = qr.METHODS[method].config is not None
    rates = options.rates or settings["rates" if lora else "full_rates"]
    while True:
        runs = [run for run in qr.load(options.results) if run["budget"] == budget]
        runs = qr.of(runs, task, method)
        left = qr.pending(runs, rates, min(settings["seeds"], len(paths)), settings["sweep_seeds"])
        if not left:
            return
        rate, seed = left[0]
        run = {"method": method, "task": task, "rate": rate, "seed": seed}
        run |= train(method, paths[seed], rate, seed)
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        qr.append(options.results, run | {"budget": budget, "versions": versions})
        print(
            f"{task} {method} rate {rate:g} seed {seed}: valid {run['valid']:.4f}, "
            f"test {run['test']:.4f}, {run['step_ms']:.0f} ms a step; "
            f"{len(left) - 1} or more to go",
            flush=True,
        )


def train(method: str, path: Path, rate: float, seed: int) -> dict[str, Any]:
    with np.load(path) as file:
        data = dict(file)
    settings = json.loads(str(data["settings"]))
    torch.manual_seed(seed)
    model: Any = Classifier(settings["model"], data["head_kernel"], data["head_bias"])
    changed = qr.METHODS[method].config
    if changed is not None:
        lora = settings["lora"] | changed
        config = peft.LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            target_modules=["query", "key", "value", "dense"],
            modules_to_save=[lora["modules_to_save"]],
        )
        model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=settings["weight_decay"])
    schedule, lengths = data["schedule"], data["train_lengths"]
    common, losses, times = statistics.mode(lengths.tolist()), [], []
    model.train()
    for n, length in enumerate(lengths):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = float(rate * schedule[n])
        logits = model(torch.from_numpy(data["train_ids"][n, :, :length]).long())
        labels = torch.from_numpy(data["train_labels"][n]).long()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings["max_norm"])
        optimizer.step()
        losses.append(loss.item())
        if length == common:
            times.append(time.perf_counter() - began)
    return {part: accuracy(model, data, part) for part in ("valid", "test")} | {
        "loss": statistics.mean(losses[-50:]),
        "steps": len(lengths),
        "step_ms": 1e3 * statistics.median(times),
        "trained": sum(p.numel() for p in trained),
        "checkpoint_bytes": saved_bytes(model),
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: dict[str, np.ndarray], part: str) -> float:
    model.eval()
    ids, labels, lengths = (data[f"{part}_{name}"] for name in ("ids", "labels", "lengths"))
    hits = 0
    for x, y, length in zip(ids, labels, lengths, strict=True):
        # Rows that only fill a batch up have no token, and a mean over none.
        real = y >= 0
        logits = model(torch.from_numpy(x[real, :length]).long())
        hits += int((logits.argmax(-1).numpy() == y[real]).sum())
    return hits / int((labels >= 0).sum())


def saved_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, peft.PeftModel):
            model.save_pretrained(folder)
        else:
            torch.save(model.state_dict(), Path(folder) / "model.pt")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
