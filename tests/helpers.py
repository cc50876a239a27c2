"""Things that several test modules make."""

import torch


def topk_sae(width: int, latents: int = 96, k: int = 8, seed: int = 0):
    """A TopK SAE with random weights."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    torch.manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=latents, k=k))
    sae.b_dec.data = torch.randn(width) * 0.1
    return sae.eval().requires_grad_(False)
