"""The gated families' gradients from their open entries alone: one dense matrix product, the rest gathers.

Once L0 is far below d_sae, of the seven products of `GatedFamily.gradients` only u = (x - b_dec) W_encᵀ needs every
latent: where no gate is open every other term is zero, in the code as in the auxiliary path. The open entries are found
once a step, in two orders, by latent and by token; each remaining product is a weighted sum of rows or one dot product
an entry: Triton kernels on CUDA (`train/sae/sparse/gpu.py`), `embedding_bag` and its derivative elsewhere. Equal to the
dense form up to the order of sums. Unit decoders only: the gradient of a free one is dense.
"""

from jaxtyping import Float
from torch import Tensor

from train.sae.base import StepInputs, StepMetrics
from train.sae.gated import GatedFamily, GatedWeights
from train.sae.sparse.cpu import cpu_gradients
from train.sae.sparse.open import EntryRoom, Gradients, UnsummedGradient, has_kernels


def sparse_gradients(
    family: GatedFamily, w: GatedWeights, x: Float[Tensor, "batch d_in"], now: StepInputs
) -> tuple[GatedWeights, StepMetrics]:
    """What `family.gradients` gives."""
    if has_kernels(x.device.type, x.shape[1]):
        from train.sae.sparse.gpu import kernel_gradients

        rounded = w.W_enc.to(now.matmul), w.W_dec.to(now.matmul)
        unsummed, step = kernel_gradients(family, w, x, now, rounded, EntryRoom())
        return GatedWeights(**summed(unsummed)), step
    return cpu_gradients(family, w, x, now)


def summed(gradients: Gradients) -> dict[str, Tensor]:
    """Gradients whose sums are taken: what `kernel_gradients` leaves open."""
    if not any(isinstance(part, UnsummedGradient) for part in gradients.values()):
        return {name: part for name, part in gradients.items() if isinstance(part, Tensor)}
    from train.sae.sparse.kernels import sum_rows

    return {name: sum_rows(part) if isinstance(part, UnsummedGradient) else part for name, part in gradients.items()}
