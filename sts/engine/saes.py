"""Sparse autoencoders through sae-lens: loading them, and whether they fit a model.

An SAE is named by a local folder in sae-lens' format, or by `release/sae_id` of sae-lens' registry of public SAEs.
Latents of an SAE with unequal decoder norms are not comparable, so norms are folded into the encoder on loading
(`fold_norms`); afterwards a latent's value is the length of its contribution to the reconstruction.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from sts.engine.models import LanguageModel, check_layer, first_line, sha256_of_file
from sts.errors import StsError
from sts.run.settings import ROOT


def sae_identity(name: str) -> str:
    """What identifies an SAE's weights: a digest of a local folder's file, or the registry's name.

    Raises:
        StsError: neither a folder with an SAE nor of the form release/sae_id.
    """
    folder = Path(name).expanduser()
    if (folder / "cfg.json").is_file():
        weights = folder / "sae_weights.safetensors"
        if not weights.is_file():
            raise StsError(f"SAE folder {name!r} has a cfg.json but no sae_weights.safetensors.")
        return "sha256:" + sha256_of_file(weights)[:16] + "+" + sha256_of_file(folder / "cfg.json")[:8]
    # What begins with a folder that exists, such as data/, is a path and not a release of the registry.
    local = name.startswith((".", "/", "~")) or Path(name.partition("/")[0]).is_dir()
    if folder.is_dir() or "/" not in name or local:
        raise StsError(f"SAE {name!r} is not known. Valid: a folder with cfg.json and sae_weights.safetensors, or "
                       "'release/sae_id' from sae-lens' registry, such as "
                       "'llama-3-8b-it-res-jh/blocks.25.hook_resid_post'.")
    return f"registry:{name}"


def sae_folder(name: str) -> Path | None:
    """The folder that a run's setting `sae` names; None if it names none."""
    # Paths in a profile are relative to the repository, so that any folder can run it.
    for folder in (ROOT / name, Path(name).expanduser()):
        if (folder / "cfg.json").is_file():
            return folder
    return None


def known_width(name: str) -> int | None:
    """How many latents an SAE has, if its folder says so; None for one of the registry, which would be fetched."""
    folder = sae_folder(name)
    try:
        width = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))["d_sae"] if folder else None
    except (ValueError, KeyError, TypeError):  # loading it will say what is wrong
        return None
    return width if isinstance(width, int) else None


def load_sae(name: str, *, device: str = "cpu", dtype: str = "float32", fold_norms: bool = True):
    """Load an SAE for inference.

    Args:
        name: folder with cfg.json and sae_weights.safetensors, or "release/sae_id" of sae-lens' registry.
        fold_norms: scale latents so that every decoder row has norm 1.

    Returns:
        sae_lens.SAE.

    Raises:
        StsError: neither folder nor registry entry, or the hub cannot be reached.
    """
    local = sae_identity(name).startswith("sha256:")
    from sae_lens import SAE

    if local:
        sae = SAE.load_from_disk(str(Path(name).expanduser()), device=device, dtype=dtype)
    else:
        release, _, sae_id = name.partition("/")
        try:
            sae = SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = first_line(error).rstrip(".")
            raise StsError(f"SAE {name!r} was asked from sae-lens' registry: {reason}. What works without a network: a "
                           "local folder with cfg.json and sae_weights.safetensors.") from error
    if fold_norms:
        fold_decoder_norms(sae)
    return sae.eval().requires_grad_(False)


def fold_decoder_norms(sae) -> None:
    """Scale each latent by its decoder norm, in place; what the SAE reconstructs stays the same.

    A TopK SAE that ranks unscaled values would choose other latents after folding, which sae-lens refuses: then the
    norms must already be equal to one.
    """
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # It multiplies by the norms whenever it encodes; once they are one, that is time for nothing.
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
        return
    norms = sae.W_dec.norm(dim=-1)
    if torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        return
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError as error:
        raise StsError(f"This SAE's decoder norms cannot be folded ({first_line(error)}); "
                       "set fold_norms to false to use its latents as they are.") from error


@dataclass
class IdentitySAE:
    """The residual stream's own dimensions as "latents", so that raw dimensions go through the code of an SAE.

    Every value is its own latent: `encode` and `decode` give back their input. Unlike an SAE's latents, raw dimensions
    are dense and have both signs. In `LatentStats` of raw dimensions `fired` therefore counts the tokens with a
    positive value, and `max` is the largest value but at least 0; sums and squared changes mean what they always do,
    and raw dimensions are ranked by squared change like latents.

    Attributes:
        cfg: d_in and d_sae, both the width; the rest of an SAE's configuration is absent.
    """

    width: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.cfg = SimpleNamespace(d_in=self.width, d_sae=self.width, metadata=SimpleNamespace(hook_name=None),
                                   architecture=lambda: "identity")

    def encode(self, residual_TD: torch.Tensor) -> torch.Tensor:
        """The input itself."""
        return residual_TD

    decode = __call__ = encode


def identity_sae(lm: LanguageModel) -> IdentitySAE:
    """The "SAE" whose latents are the raw dimensions of a model's residual stream, in float32 on its device."""
    return IdentitySAE(int(lm.model.config.get_text_config().hidden_size), lm.device)


@dataclass
class RandomCode:
    """A sparse code with random directions, as sparse on every token as an SAE: what sparsity alone would show.

    Each latent is the projection on a random unit vector of the residual stream less the SAE's decoder bias. On a
    token on which the SAE has n active latents, the n largest positive projections are kept.

    Attributes:
        sae: the SAE whose width and sparsity it has.
        directions_DL: unit columns.
    """

    sae: object
    directions_DL: torch.Tensor

    def __post_init__(self) -> None:
        self.cfg = SimpleNamespace(d_in=self.sae.cfg.d_in, d_sae=self.sae.cfg.d_sae,
                                   metadata=SimpleNamespace(hook_name=None), architecture=lambda: "random")
        self.device, self.dtype = self.sae.device, torch.float32

    def encode(self, residual_TD: torch.Tensor) -> torch.Tensor:
        """Latents, T x L, none below zero."""
        active_T = (self.sae.encode(residual_TD.to(self.sae.dtype)) > 0).sum(-1)
        value_TL = ((residual_TD.float() - self.sae.b_dec.float()) @ self.directions_DL).relu()
        most = int(active_T.max()) if len(active_T) else 0
        top = value_TL.topk(most, dim=-1)
        kept_TK = torch.where(torch.arange(most, device=active_T.device) < active_T[:, None], top.values, 0)
        return torch.zeros_like(value_TL).scatter(-1, top.indices, kept_TK)


def random_code(sae, seed: int = 0) -> RandomCode:
    """A `RandomCode` of an SAE's width and sparsity, its directions drawn evenly from the sphere."""
    directions_DL = torch.randn(sae.cfg.d_in, sae.cfg.d_sae, generator=torch.Generator().manual_seed(seed))
    return RandomCode(sae, (directions_DL / directions_DL.norm(dim=0)).to(sae.device))


@dataclass
class SideBySide:
    """Several SAEs of one site as one, their latents side by side, so that one pass through the model serves them all.

    Attributes:
        parts: name -> SAE; `split` undoes the concatenation of anything that ends in the latents' dimension.
    """

    parts: dict

    def __post_init__(self) -> None:
        first = next(iter(self.parts.values()))
        self.device, self.dtype = first.device, torch.float32
        self.cfg = SimpleNamespace(d_in=first.cfg.d_in, d_sae=sum(sae.cfg.d_sae for sae in self.parts.values()))

    def encode(self, residual_TD: torch.Tensor) -> torch.Tensor:
        """Latents of all parts, T x sum of their widths."""
        return torch.cat([sae.encode(residual_TD.to(sae.dtype)).float() for sae in self.parts.values()], dim=-1)

    def split(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Statistics by part: part/name -> tensor; what has no dimension of latents goes to every part."""
        widths = [sae.cfg.d_sae for sae in self.parts.values()]
        return {f"{part}/{name}": (tensor.split(widths, dim=-1)[place] if name.endswith("L") else tensor).clone()
                for name, tensor in tensors.items() for place, part in enumerate(self.parts)}


def check_fits(sae, lm: LanguageModel, layer: int) -> None:
    """Raise `StsError` unless the layer exists and the SAE's input width is the model's width."""
    check_layer(lm.model, layer)
    width = int(lm.model.config.get_text_config().hidden_size)
    if sae.cfg.d_in != width:
        raise StsError(f"The SAE takes vectors of width {sae.cfg.d_in}; model {lm.name!r} has width {width}. "
                       "Choose an SAE trained on this model.")
    site = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", str(sae.cfg.metadata.hook_name or ""))
    if site:
        after = int(site[1]) - (site[2] == "pre")  # before layer n is after layer n - 1
        if after != layer:
            raise StsError(f"The SAE was trained on the residual stream after layer {after} "
                           f"({sae.cfg.metadata.hook_name}); layer {layer} was asked for. Set layer to {after}, or "
                           "choose another SAE.")
