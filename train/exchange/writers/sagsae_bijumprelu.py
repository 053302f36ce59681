"""Bi-JumpReLU as an architecture of SAELens, written by sagsae export. Import it before you load such a folder:

    import sagsae_bijumprelu
    from sae_lens import SAE

    sae = SAE.load_from_disk(FOLDER)

Latents carry a sign. With z = (x - b_dec) W_enc + b_enc and y = -slope_neg·z:

    f = z + offset_pos      where z > threshold_pos
        -(y + offset_neg)   where y > threshold_neg
        0                   elsewhere
"""

from dataclasses import dataclass

import torch
from sae_lens.registry import register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig
from torch import Tensor, nn

ARCHITECTURE = "bijumprelu"
ZEROS = ("b_enc", "threshold_pos", "threshold_neg", "offset_pos", "offset_neg")
"""Parameters [d_sae] that grow with the latents; slope_neg does not."""


@dataclass
class BiJumpReLUSAEConfig(SAEConfig):
    """SAELens' own settings, and no others."""

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class BiJumpReLUSAE(SAE[BiJumpReLUSAEConfig]):
    """An SAE with one threshold, offset and slope per latent and sign."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for name in ZEROS:
            setattr(self, name, nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)))
        self.slope_neg = nn.Parameter(torch.ones(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def encode(self, x: Tensor) -> Tensor:
        z = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        y = -self.slope_neg * z
        above = torch.where(z > self.threshold_pos, z + self.offset_pos, 0.0)
        below = torch.where(y > self.threshold_neg, y + self.offset_neg, 0.0)
        return self.hook_sae_acts_post(above - below)

    def decode(self, feature_acts: Tensor) -> Tensor:
        x_hat = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        norms = self.W_dec.norm(dim=1).clamp_min(1e-8)
        self.W_dec.data /= norms[:, None]
        self.W_enc.data *= norms
        for name in ZEROS:
            getattr(self, name).data.mul_(norms)


register_sae_class(ARCHITECTURE, BiJumpReLUSAE, BiJumpReLUSAEConfig)
