"""Makes peers.json: what SAELens, dictionary_learning and SAEBench themselves say of one made-up reconstruction.

    python -m venv ~/peers && ~/peers/bin/pip install torch numpy einops tqdm pandas pydantic jaxtyping \
        beartype simple-parsing safetensors pyyaml
    ~/peers/bin/pip install --no-deps sae-lens==6.54.12 dictionary-learning==0.1.0 sae-bench==0.6.0
    ~/peers/bin/python tests/golden/peers.py > tests/golden/peers.json

The numbers come out of the peers' own evaluation functions, unchanged. These get a stand-in for the language model, the
token source and the autoencoder, which hand out `inputs()`; packages that they import but that such an evaluation never
calls (their requirements exclude each other) are replaced by empty ones. Three batches, of unequal length, because two
of the definitions depend on batches.
"""

import json
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

HOOK = "blocks.0.hook_resid_post"
D_IN, D_SAE, CONTEXT = 12, 20, 16
CONTEXTS = (5, 9, 2)
"""In each batch."""


def inputs() -> list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """Batches of x [tokens, d_in], f [tokens, d_sae], x̂ [tokens, d_in]: activations far from zero, signed codes, a
    biased reconstruction. Latent 0 never fires, 1 and 3 are only ever negative, 2 fires twice and sums to zero."""
    random = np.random.RandomState(7)  # its stream is frozen, whatever the version of numpy
    batches = []
    for number, contexts in enumerate(CONTEXTS):
        n = contexts * CONTEXT
        x = random.standard_normal((n, D_IN)) * np.linspace(0.5, 2, D_IN) + np.linspace(-1, 3, D_IN)
        f = random.standard_normal((n, D_SAE))
        f[np.abs(f) < 1.3] = 0
        f[:, :4] = 0
        f[3, 1] = f[5, 3] = -0.7
        if number == 1:
            f[4, 2], f[9, 2] = 0.5, -0.5
        x_hat = x + 0.6 * random.standard_normal((n, D_IN)) + 0.3
        batches.append(tuple(part.astype(np.float32) for part in (x, f, x_hat)))
    return batches  # type: ignore[return-value]


class Nothing:
    """What an absent package is full of: can be derived from, called, and used as a decorator."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *given: Any, **_: Any) -> Any:
        return given[0] if given else self

    def __getattr__(self, _: str) -> Any:
        return Nothing()


class Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Nothing,), {})


class Absent(MetaPathFinder, Loader):
    """Stands in for every package that is not installed, after all other finders have failed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec:  # noqa: ARG002
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class StandIn:
    """Language model, token source and autoencoder at once: each call for tokens goes on to the next batch."""

    def __init__(self) -> None:
        import torch

        self.batches = [tuple(torch.from_numpy(part) for part in batch) for batch in inputs()]
        self.at = -1
        self.device = "cpu"
        metadata = SimpleNamespace(hook_name=HOOK, hook_head_index=None)
        self.cfg = SimpleNamespace(metadata=metadata, d_sae=D_SAE, hook_layer=0, **vars(metadata))
        self.dict_size, self.activation_dim = D_SAE, D_IN

    def get_batch_tokens(self, _: int) -> Any:
        import torch

        self.at += 1
        return torch.ones(CONTEXTS[self.at], CONTEXT, dtype=torch.long)

    def part(self, index: int) -> Any:
        rows = self.batches[self.at][index]
        return rows.reshape(-1, CONTEXT, *rows.shape[1:])

    def run_with_cache(self, *_: Any, **__: Any) -> tuple[None, dict[str, Any]]:
        return None, {HOOK: self.part(0)}

    def encode(self, _: Any) -> Any:
        return self.part(1)

    def decode(self, _: Any) -> Any:
        return self.part(2)

    def __iter__(self) -> Iterator[Any]:
        """dictionary_learning's batches of activations."""
        for self.at, batch in enumerate(self.batches):  # noqa: B020
            yield batch[0]

    def __call__(self, _: Any, output_features: bool) -> tuple[Any, Any]:
        """dictionary_learning's call of a dictionary."""
        assert output_features
        return self.batches[self.at][2], self.batches[self.at][1]


def sae_lens() -> dict[str, float]:
    import torch
    from sae_lens.evals import get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.sae_trainer import SAETrainer

    one = StandIn()
    metrics, features = get_sparsity_and_variance_metrics(
        one, one, one, ActivationScaler(), len(CONTEXTS), False, True, True, True, 1, {}
    )  # fmt: skip
    trainer = SimpleNamespace(feature_sparsity=torch.tensor(features["feature_density"]))
    logged = SAETrainer._build_sparsity_log_dict(trainer)
    return {
        "r2": metrics["explained_variance"],
        "r2_legacy": metrics["explained_variance_legacy"],
        "l0": metrics["l0"],
        "dead": logged["sparsity/below_1e-5"] / D_SAE,
    }


def dictionary_learning() -> dict[str, float]:
    from dictionary_learning.evaluation import evaluate

    one = StandIn()
    out = evaluate(one, iter(one), n_batches=len(CONTEXTS))
    return {"r2": out["frac_variance_explained"], "l0": out["l0"], "dead": 1 - out["frac_alive"]}


def sae_bench() -> dict[str, float]:
    from sae_bench.evals.core.main import calculate_misc_metrics, get_sparsity_and_variance_metrics

    one = StandIn()
    metrics, features = get_sparsity_and_variance_metrics(
        one, one, one, len(CONTEXTS), False, True, True, True, 1, {}
    )  # fmt: skip
    more = calculate_misc_metrics({**features, "max_encoder_cosine_sim": [0.0], "max_decoder_cosine_sim": [0.0]})
    return {
        "r2": metrics["explained_variance"],
        "r2_legacy": metrics["explained_variance_legacy"],
        "l0": metrics["l0"],
        "dead": 1 - more["frac_alive"],
    }


if __name__ == "__main__":
    import einops  # noqa: F401, whole, before anything absent is made up

    sys.meta_path.append(Absent())
    found = {"SAELens": sae_lens(), "dictionary_learning": dictionary_learning(), "SAEBench": sae_bench()}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
