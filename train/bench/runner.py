"""Times training steps of another tool's Gated autoencoder, one per request.

peers.py starts this file by its path, with the interpreter of an environment that has the tool. It imports that tool,
torch and safetensors, and nothing of sagsae.

    python runner.py versions              prints {package: version, or null when it is not installed}
    python runner.py saelens SETTINGS      JSON: rows (a safetensors file with x), l0, precision, device, threads

It then answers every line of JSON on stdin with a line on stdout. {"d_sae": 4096} makes an autoencoder and returns the
L0 that its gates are set to; {"step": 0} does that step on all rows and returns the seconds. It ends when stdin ends.
"""

import gc
import json
import os
import sys
import time
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sae-lens", "dictionary-learning", "torch", "safetensors")
L1, LR = 0.1, 1e-12
"""The learning rate is nearly zero, so that the number of active latents does not change."""


class SAELensStep:
    """Runs SAETrainer.step, which `fit` calls: forward and backward pass, gradient clipping, Adam, firing counts."""

    def __init__(self, x: Any, d_sae: int, settings: dict[str, Any]) -> None:
        from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        batch, d_in = x.shape
        config = GatedTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1, device=settings["device"])
        sae = GatedTrainingSAE(config)
        asked = SAETrainerConfig(
            total_training_samples=10**6 * batch,
            train_batch_size_samples=batch,
            lr=LR,
            lr_end=LR,
            device=settings["device"],
            autocast=settings["precision"] == "bfloat16",
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(asked, sae, iter(()))
        self.l0 = set_gates(sae.b_gate, x[:64] @ sae.W_enc, settings["l0"])

    def step(self, number: int, x: Any) -> None:
        self.trainer.n_training_steps = number
        self.trainer.step(x)


class DictionaryLearningStep:
    """Runs GatedSAETrainer.update under the same autocast as `trainSAE`."""

    def __init__(self, x: Any, d_sae: int, settings: dict[str, Any]) -> None:
        import torch
        from dictionary_learning.trainers.gdm import GatedSAETrainer

        self.trainer = GatedSAETrainer(
            steps=10**6,
            activation_dim=x.shape[1],
            dict_size=d_sae,
            layer=0,
            lm_name="",
            lr=LR,
            l1_penalty=L1,
            warmup_steps=0,
            sparsity_warmup_steps=None,
            device=settings["device"],
        )
        self.low = torch.bfloat16 if settings["precision"] == "bfloat16" else None
        ae = self.trainer.ae
        self.l0 = set_gates(ae.gate_bias, (x[:64] - ae.decoder_bias) @ ae.encoder.weight.T, settings["l0"])

    def step(self, number: int, x: Any) -> None:
        import torch

        kind = x.device.type
        with nullcontext() if self.low is None else torch.autocast(device_type=kind, dtype=self.low):
            self.trainer.update(number, x if self.low is None else x.to(self.low))


TOOLS: dict[str, type[SAELensStep] | type[DictionaryLearningStep]] = {
    "saelens": SAELensStep,
    "dictionary_learning": DictionaryLearningStep,
}


def set_gates(bias: Any, pre: Any, l0: int) -> float:
    """Sets all gate biases to the value at which `l0` gates per row are open, given the pre-activations [rows, d_sae]
    without bias. Returns how many gates per row are then open."""
    values = pre.detach().flatten()
    threshold = values.kthvalue(max(1, len(values) - l0 * len(pre))).values
    bias.data.fill_(-threshold)
    return float((values > threshold).sum()) / len(pre)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def serve(name: str, settings: dict[str, Any], answers: Any) -> None:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device = torch.device(settings["device"])
    x = load_file(settings["rows"])["x"].to(device)
    tool: SAELensStep | DictionaryLearningStep | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "d_sae" in asked:
            tool = None  # frees the memory of the last one
            tool = TOOLS[name](x, asked["d_sae"], settings)
            answer = {"l0": tool.l0}
        else:
            assert tool is not None
            gc.collect()
            wait(device)
            started = time.perf_counter()
            tool.step(asked["step"], x)
            wait(device)
            answer = {"seconds": time.perf_counter() - started}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def wait(device: Any) -> None:
    """Waits until the device has finished all queued work."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def main() -> None:
    folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if place != folder]  # sagsae's modules must not hide the tool's
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the tools print goes to stderr
    if sys.argv[1] == "versions":
        answers.write(json.dumps(versions()) + "\n")
        answers.flush()
    else:
        serve(sys.argv[1], json.loads(sys.argv[2]), answers)


if __name__ == "__main__":
    main()
