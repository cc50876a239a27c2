"""Sparse autoencoders through sae-lens: loading them, and whether they fit a model.

An SAE is named by a local folder in sae-lens' format, or by `release/sae_id` of sae-lens' registry of public SAEs.
Latents of an SAE with unequal decoder norms are not comparable, so norms are folded into the encoder on loading
(`fold_norms`); afterwards a latent's value is the length of its contribution to the reconstruction.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from sts.data.prompts import render, start_ids
from sts.engine.models import LanguageModel, check_layer, first_line, sha256_of_file
from sts.errors import ROOT, StsError

#: Names of sites after a decoder layer: TransformerLens' and transformers'. "pre" and "in" are before it.
SITE = re.compile(r"(?:\w+\.)*(?:blocks|layers|h)\.(\d+)(?:\.(?:hook_)?(resid_post|resid_pre|in|out|input|output))?")


class SaeSpec(NamedTuple):
    """An SAE of the sweep: its site and size."""

    layer: int
    latents: int
    k: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"layer{self.layer}-latents{self.latents}-k{self.k}"


def sae_folder(name: str) -> Path | None:
    """The folder that a run's setting `sae` names; None if it names none."""
    # Paths in a profile are relative to the repository, so that any folder can run it.
    return next((folder for folder in (ROOT / name, Path(name).expanduser()) if (folder / "cfg.json").is_file()), None)


def sae_identity(name: str) -> str:
    """What identifies an SAE's weights: a digest of a local folder's files, or the registry's name; `StsError` if it is
    neither a folder with an SAE nor of the form release/sae_id."""
    if folder := sae_folder(name):
        weights = folder / "sae_weights.safetensors"
        if not weights.is_file():
            raise StsError(f"SAE folder {name!r} has a cfg.json but no sae_weights.safetensors, the file of sae-lens. "
                           "One saved by another library, such as sparsify, has to be converted to sae-lens' format.")
        return "sha256:" + sha256_of_file(weights)[:16] + "+" + sha256_of_file(folder / "cfg.json")[:8]
    # What begins with a folder that exists, such as data/, is a path and not a release of the registry.
    if "/" not in name or name.startswith((".", "/", "~")) or Path(name.partition("/")[0]).is_dir():
        raise StsError(f"SAE {name!r} is not known. Valid: a folder with cfg.json and sae_weights.safetensors, or "
                       "'release/sae_id' from sae-lens' registry, such as "
                       "'llama-3-8b-it-res-jh/blocks.25.hook_resid_post'.")
    return f"registry:{name}"


def load_sae(name: str, *, device: str = "cpu", dtype: str = "float32", fold_norms: bool = True):
    """Load an SAE (`sae_lens.SAE`) for inference, by what `sae_identity` takes; `fold_norms` scales latents so that
    every decoder row has norm 1. `StsError` for neither, another format, or a hub that cannot be reached."""
    sae_identity(name)
    from sae_lens import SAE

    folder = sae_folder(name)
    try:
        sae = SAE.load_from_disk(str(folder), device=device, dtype=dtype) if folder else \
            SAE.from_pretrained(*name.split("/", 1), device=device, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        what, way = ("is not in sae-lens' format", "Convert it, or train one with: sts stage sae") if folder else (
            "was asked from sae-lens' registry", "What works without a network: a folder in sae-lens' format.")
        raise StsError(f"SAE {name!r} {what}: {first_line(error).rstrip('.')}. {way}") from error
    if fold_norms:
        fold_decoder_norms(sae)
    return sae.eval().requires_grad_(False)


def fold_decoder_norms(sae) -> None:
    """Scale each latent by its decoder norm, in place; what the SAE reconstructs stays the same. A TopK SAE that ranks
    unscaled values would choose other latents afterwards, which sae-lens refuses: then norms must be one already."""
    rescales, norms = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False), sae.W_dec.norm(dim=-1)
    if rescales or not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        try:
            sae.fold_W_dec_norm()
        except NotImplementedError as error:
            raise StsError(f"This SAE's decoder norms cannot be folded ({first_line(error)}); "
                           "set fold_norms to false to use its latents as they are.") from error
    if rescales:  # it multiplies by the norms whenever it encodes; now that they are one, that is time for nothing
        sae.cfg.rescale_acts_by_decoder_norm = False


class Code:
    """What is read as an SAE is: `encode` makes latents, T x L, of residual streams, T x D, in float32."""

    dtype = torch.float32

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], latents: int, device: torch.device):
        self.encode, self.device, self.cfg = encode, device, SimpleNamespace(d_sae=latents)


def identity_sae(lm: LanguageModel) -> Code:
    """The residual stream's own dimensions as "latents". They are dense and have both signs: in `LatentStats` `fired`
    counts the tokens with a positive value, and `max` is the largest value but at least 0."""
    return Code(lambda residual_TD: residual_TD, int(lm.model.config.get_text_config().hidden_size), lm.device)


def random_code(sae, seed: int = 0) -> Code:
    """A code with random directions (unit vectors drawn evenly from the sphere), as sparse on every token as an SAE.

    Each latent is the projection of the residual stream less the SAE's decoder bias. On a token on which the SAE has n
    active latents, the n largest positive projections are kept."""
    directions_DL = torch.randn(sae.cfg.d_in, sae.cfg.d_sae, generator=torch.Generator().manual_seed(seed))
    directions_DL = (directions_DL / directions_DL.norm(dim=0)).to(sae.device)

    def encode(residual_TD: torch.Tensor) -> torch.Tensor:
        active_T = (sae.encode(residual_TD.to(sae.dtype)) > 0).sum(-1)
        value_TL = ((residual_TD - sae.b_dec.float()) @ directions_DL).relu()
        most = int(active_T.max()) if len(active_T) else 0
        top = value_TL.topk(most, dim=-1)
        kept_TK = torch.where(torch.arange(most, device=active_T.device) < active_T[:, None], top.values, 0)
        return torch.zeros_like(value_TL).scatter(-1, top.indices, kept_TK)

    return Code(encode, sae.cfg.d_sae, sae.device)


class SideBySide(Code):
    """Several SAEs of one site (name -> SAE), their latents side by side: one pass through the model serves all."""

    def __init__(self, parts: dict):
        self.parts, self.widths = parts, [sae.cfg.d_sae for sae in parts.values()]
        super().__init__(lambda residual_TD: torch.cat(
            [sae.encode(residual_TD.to(sae.dtype)).float() for sae in parts.values()], dim=-1),
            sum(self.widths), next(iter(parts.values())).device)

    def split(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Statistics by part: part/name -> tensor; what has no dimension of latents goes to every part."""
        return {f"{part}/{name}": (tensor.split(self.widths, dim=-1)[place] if name.endswith("L") else tensor).clone()
                for name, tensor in tensors.items() for place, part in enumerate(self.parts)}


def layer_of(hook: object) -> int | None:
    """The decoder layer after which an SAE of this hook reads, -1 before the first; None if no residual stream."""
    site = SITE.fullmatch(str(hook))  # before layer n is after layer n - 1
    return int(site[1]) - (site[2] in ("resid_pre", "in", "input")) if site else None


def check_fits(sae, lm: LanguageModel, layer: int) -> None:
    """Hold all that an SAE says of where and how it reads against the model and the layer: `StsError` for another
    width, site, layer, model, or scale of its input; a note in the log where it was trained on the base model of an
    instruct model, or behind a BOS that the prompts do not have."""
    check_layer(lm.model, layer)
    width, said = int(lm.model.config.get_text_config().hidden_size), sae.cfg.metadata
    note = logging.getLogger("sts").warning
    if sae.cfg.d_in != width:
        raise StsError(f"The SAE takes vectors of width {sae.cfg.d_in}; model {lm.name!r} has width {width}. "
                       "Choose an SAE trained on this model.")
    for hook in {said.hook_name, getattr(said, "hook_name_out", None)} - {None, ""}:
        if (after := layer_of(hook)) is None:
            raise StsError(f"The SAE was trained on {hook!r}, which is not the residual stream after a layer. Choose "
                           "one of a residual stream, such as 'blocks.12.hook_resid_post'.")
        if after != layer:
            raise StsError(f"The SAE was trained on the residual stream after layer {after} ({hook}); layer {layer} "
                           f"was asked for. Set layer to {after}, or choose another SAE.")
    own, theirs = (_family_name(name) for name in (lm.name, getattr(said, "model_name", None) or ""))
    if theirs[0] and theirs[0] != own[0]:
        theirs = _family_name(_official(said.model_name))
    if theirs[0] and theirs[0] != own[0]:
        raise StsError(f"The SAE was trained on another model, {said.model_name!r}, than {lm.name!r}. Choose an SAE of "
                       "this model; if a folder of another name holds the same one, rename the folder.")
    if theirs[0] and theirs[1] != own[1]:
        note("The SAE was trained on %s and reads %s: a base model's on its instruct model, or the reverse.",
             said.model_name, lm.name)
    if (getattr(said, "model_from_pretrained_kwargs", None) or {}).get("center_writing_weights"):
        raise StsError("The SAE was trained on a residual stream of centred weights (center_writing_weights), which "
                       "transformers' models do not have. Choose one trained with from_pretrained_no_processing.")
    if getattr(sae.cfg, "normalize_activations", "none") == "expected_average_only_in":
        raise StsError("The SAE's input has to be scaled (normalize_activations: expected_average_only_in) by a number "
                       "that its file does not hold. Fold it into the weights and save the SAE again.")
    tokenizer = lm.tokenizer
    if getattr(said, "prepend_bos", None) and tokenizer.bos_token and not (
            start_ids(tokenizer) or render(tokenizer, "?").startswith(str(tokenizer.bos_token))):
        note("The SAE was trained behind BOS (%s), which this model's prompts do not begin with.", tokenizer.bos_token)


def _official(name: str) -> str:
    """The hub's name of a model that TransformerLens calls by another."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError:
        return name


def _family_name(name: str) -> tuple[str, bool]:
    """A model's name without folder and the words that tell a base model from an instruct model; whether it has any."""
    words = re.split(r"[-_ ]+", name.rstrip("/").rpartition("/")[2].lower())
    kept = [word for word in words if word not in ("it", "instruct", "chat", "base", "pt", "hf", "meta")]
    return "-".join(kept), any(word in ("it", "instruct", "chat") for word in words)
