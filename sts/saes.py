"""Sparse autoencoders: loading, training and quality, all through sae-lens.

An SAE is named by a local folder in sae-lens' format, or by `release/sae_id` of sae-lens' registry of public SAEs.
Latents of an SAE with unequal decoder norms are not comparable, so norms are folded into the encoder on loading
(`fold_norms`); afterwards a latent's value is the length of its contribution to the reconstruction.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sts.errors import StsError
from sts.models import (
    LanguageModel,
    check_layer,
    decoder_layers,
    first_line,
    resid_post,
    residual_stream,
    sha256_of_file,
)

#: A position whose residual norm exceeds this multiple of the median norm is an attention sink, not content.
OUTLIER_NORM = 10.0


# --- loading ------------------------------------------------------------------------------------------------------

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
    norms = sae.W_dec.norm(dim=-1)
    if torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        return
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError as error:
        raise StsError(f"This SAE's decoder norms cannot be folded ({first_line(error)}); "
                       "set fold_norms to false to use its latents as they are.") from error


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


# --- activations to train on --------------------------------------------------------------------------------------

def token_chunks(documents: Iterator[list[int]], context: int, limit: int) -> list[list[int]]:
    """Cut tokenised documents into pieces of at most `context` tokens until `limit` tokens are gathered."""
    pieces, total = [], 0
    for document in documents:
        for start in range(0, len(document), context):
            piece = document[start:start + context][: limit - total]
            if len(piece) > 8:
                pieces.append(piece)
                total += len(piece)
            if total >= limit:
                return pieces
    return pieces


def collect_activations(lm: LanguageModel, layer: int, pieces: list[list[int]], folder: Path, *,
                        tokens_per_batch: int = 8192, pieces_per_shard: int = 512,
                        report: Callable[[float], None] = lambda fraction: None) -> Path:
    """Store the residual stream of `pieces` as bf16 safetensors shards; a killed run goes on with the next shard.

    The first position of each piece and positions with outlier norms (attention sinks) are left out.

    Returns:
        `folder`, holding `shard-00000.safetensors` and so on, each with `activations_TD` and, row for row, the
        `piece_T` (index into `pieces`) and `position_T` that it came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = math.ceil(len(pieces) / pieces_per_shard)
    for index in range(shards):
        path = folder / f"shard-{index:05d}.safetensors"
        if not path.is_file():
            own = range(index * pieces_per_shard, min(len(pieces), (index + 1) * pieces_per_shard))
            parts = [_content_positions(lm, layer, pieces, batch)
                     for batch in length_batches(sorted(own, key=lambda i: len(pieces[i])), pieces, tokens_per_batch)]
            activations, piece, position = (torch.cat(column) for column in zip(*parts, strict=True))
            partial = path.with_suffix(".partial")
            save_file({"activations_TD": activations, "piece_T": piece, "position_T": position}, partial)
            partial.rename(path)
        report((index + 1) / shards)
    return folder


def length_batches(indices: list[int], pieces: list[list[int]], tokens_per_batch: int) -> Iterator[list[int]]:
    """Group indices, already sorted by their pieces' lengths, so that rows x longest row stays within the budget."""
    batch: list[int] = []
    for index in indices:
        if batch and (len(batch) + 1) * len(pieces[index]) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(pieces: list[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right and the mask of real tokens, both batch x positions."""
    longest = max(map(len, pieces))
    ids_BP = torch.zeros(len(pieces), longest, dtype=torch.long)
    mask_BP = torch.zeros(len(pieces), longest, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        ids_BP[row, :len(piece)] = torch.tensor(piece)
        mask_BP[row, :len(piece)] = True
    return ids_BP.to(device), mask_BP.to(device)


def content_mask(residual_BPD: torch.Tensor, mask_BP: torch.Tensor) -> torch.Tensor:
    """Which positions an SAE is for: real tokens, not the first of a text, without an outlier norm."""
    keep_BP = mask_BP.clone()
    keep_BP[:, 0] = False
    norms_BP = residual_BPD.float().norm(dim=-1)
    return keep_BP & (norms_BP <= OUTLIER_NORM * norms_BP[keep_BP].median())


def _content_positions(lm: LanguageModel, layer: int, pieces: list[list[int]],
                       batch: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids_BP, mask_BP = pad([pieces[index] for index in batch], lm.device)
    residual_BPD = residual_stream(lm.model, layer, ids_BP, attention_mask=mask_BP.long(), use_cache=False)
    if not torch.isfinite(residual_BPD[mask_BP]).all():
        raise StsError("The residual stream holds NaN or infinite values, so no SAE can be trained on it. Try dtype "
                       "float32; if that does not help, the model's weights are damaged.")
    keep_BP = content_mask(residual_BPD, mask_BP)
    row_T, position_T = keep_BP.nonzero(as_tuple=True)
    piece_T = torch.tensor(batch, device=lm.device)[row_T]
    return (residual_BPD[keep_BP].to(torch.bfloat16).cpu(), piece_T.to(torch.int32).cpu(),
            position_T.to(torch.int32).cpu())


def shard_paths(folder: Path) -> list[Path]:
    """The activation shards of a folder, in order."""
    return sorted(Path(folder).glob("shard-*.safetensors"))


def count_activations(folder: Path) -> int:
    """How many activation vectors a folder of shards holds, without reading them."""
    total = 0
    for path in shard_paths(folder):
        with safe_open(path, "pt") as shard:
            total += shard.get_slice("activations_TD").get_shape()[0]
    return total


def _epochs(paths: list[Path], seed: int) -> Iterator[torch.Tensor]:
    """Activations in float32, shard after shard in a new random order each epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(paths), generator=generator).tolist():
            with safe_open(paths[index], "pt") as shard:
                activations_TD = shard.get_tensor("activations_TD")
            yield activations_TD[torch.randperm(len(activations_TD), generator=generator)].float()


# --- training -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SaeTraining:
    """Settings of one SAE training run (TopK, sae-lens' `SAETrainer`)."""

    d_sae: int
    k: int
    samples: int
    batch: int = 2048
    lr: float = 4e-4
    seed: int = 0
    dead_after_steps: int = 200
    buffer: int = 262_144
    autocast: bool = True  # bf16 matrix products where the hardware has them: three times as fast on a recent CPU


def train_sae(activations: Path, settings: SaeTraining, *, model_name: str, layer: int, device: str = "cpu",
              log_every: int = 25, report: Callable[[float, dict], None] = lambda fraction, row: None):
    """Train a TopK SAE on stored activations.

    Inputs are scaled to an average norm of sqrt(width) (sae-lens' "expected_average_only_in", folded back into the
    weights afterwards) and the decoder bias starts at their mean, so the SAE explains what differs between tokens.
    Dead latents are revived by the auxiliary loss of Gao et al. (2024), as sae-lens implements it.

    Returns:
        (sae_lens TopKTrainingSAE, curve): `curve` is a list of {"samples", "loss", "explained_variance", "dead"}.
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.mixing_buffer import mixing_buffer
    from sae_lens.training.sae_trainer import SAETrainer

    paths = shard_paths(activations)
    if not paths or not count_activations(activations):
        raise StsError(f"No activations to train on in {str(activations)!r}.")
    with safe_open(paths[0], "pt") as shard:
        sample_TD = shard.get_tensor("activations_TD").float()
    d_in = sample_TD.shape[1]
    torch.manual_seed(settings.seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(
        d_in=d_in, d_sae=settings.d_sae, k=settings.k, device=device, apply_b_dec_to_input=True,
        normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=True, decoder_init_norm=0.1))
    sae.cfg.metadata.model_name = model_name
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    sae.b_dec.data = (sample_TD.mean(0) * d_in**0.5 / sample_TD.norm(dim=-1).mean()).to(device)

    # The buffer must not outgrow the data, or sae-lens would yield nothing until it is full.
    buffer = max(settings.batch, min(settings.buffer, count_activations(activations)))
    provider = mixing_buffer(buffer, settings.batch, _epochs(paths, settings.seed))
    steps = max(1, settings.samples // settings.batch)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * settings.batch, train_batch_size_samples=settings.batch, lr=settings.lr,
            lr_end=settings.lr / 10, lr_warm_up_steps=min(100, steps // 10), lr_decay_steps=steps // 4,
            device=device, autocast=settings.autocast and bf16_is_fast(device),
            dead_feature_window=settings.dead_after_steps, feature_sampling_window=steps + 1,
            n_batches_for_norm_estimate=16, logger=LoggingConfig(log_to_wandb=False)),
        sae, provider)
    curve = _record_curve(trainer, steps, log_every, report)
    trainer.fit()
    return sae, curve


def bf16_is_fast(device: str) -> bool:
    """Whether bf16 matrix products run on hardware here rather than emulated."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build of torch
    return bool(supported and supported())


def _record_curve(trainer, steps: int, log_every: int, report: Callable[[float, dict], None]) -> list[dict]:
    """Collect a loss curve from a `SAETrainer`, through the `step` method it offers to coordinators."""
    curve: list[dict] = []
    step = trainer.step

    def recorded(batch):
        output = step(batch)
        if trainer.n_training_steps % log_every == 0 or trainer.n_training_steps == steps - 1:
            row = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
            curve.append({"samples": trainer.n_training_samples, "loss": row["losses/mse_loss"],
                          "explained_variance": row["metrics/explained_variance"],
                          "dead": row["sparsity/dead_features"]})
            report((trainer.n_training_steps + 1) / steps, curve[-1])
        return output

    trainer.step = recorded
    return curve


def save_sae(sae, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Save a trained SAE for inference in sae-lens' format, decoder norms folded.

    `dtype` bfloat16 halves the file. `SAE.load_from_disk(folder)` then works in bfloat16 unless told otherwise.
    """
    sae.save_inference_model(str(folder))
    weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
    with safe_open(weights, "pt") as stored:
        tensors = {key: stored.get_tensor(key).to(dtype).contiguous() for key in stored.keys()}  # noqa: SIM118
    save_file(tensors, weights)
    config = json.loads(cfg.read_text())
    config["dtype"], config["device"] = str(dtype).removeprefix("torch."), "cpu"
    cfg.write_text(json.dumps(config, indent=1) + "\n")


# --- quality ------------------------------------------------------------------------------------------------------

def reconstruction_quality(sae, activations: Path) -> dict:
    """How well an SAE reconstructs stored activations.

    Returns:
        {"tokens", "fraction_of_variance_explained", "l0", "dead", "latents"}: explained variance is
        1 - sum ||x - x_hat||^2 / sum ||x - mean||^2; l0 the mean number of active latents a token; dead the number
        of latents that fire on none of the tokens.
    """
    count, l0 = 0, 0.0
    error = total = 0.0
    fired_L = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mean_D = activation_mean(activations)
    for path in shard_paths(activations):
        with safe_open(path, "pt") as shard:
            activations_TD = shard.get_tensor("activations_TD").float()
        for x_TD in activations_TD.split(2048):
            with torch.inference_mode():
                latents_TL = sae.encode(x_TD.to(sae.device, sae.dtype))
                error += (x_TD - sae.decode(latents_TL).float().cpu()).double().square().sum().item()
            total += (x_TD - mean_D).double().square().sum().item()
            active_TL = (latents_TL > 0).cpu()
            fired_L |= active_TL.any(0)
            l0 += active_TL.sum().item()
            count += len(x_TD)
    return {"tokens": count, "fraction_of_variance_explained": 1 - error / total, "l0": l0 / count,
            "dead": int((~fired_L).sum()), "latents": sae.cfg.d_sae}


def activation_mean(activations: Path) -> torch.Tensor:
    """Mean of all stored activation vectors."""
    total, count = 0, 0
    for path in shard_paths(activations):
        with safe_open(path, "pt") as shard:
            activations_TD = shard.get_tensor("activations_TD")
        total, count = total + activations_TD.double().sum(0), count + len(activations_TD)
    return (total / count).float()


def spliced_loss(lm: LanguageModel, sae, layer: int, pieces: list[list[int]], *, mean_D: torch.Tensor, tokens: int,
                 tokens_per_batch: int = 4096, report: Callable[[float], None] = lambda fraction: None) -> dict:
    """The model's next-token loss with the residual stream as it is, reconstructed by the SAE, and set to its mean.

    Args:
        mean_D: the mean activation (see `activation_mean`).
        tokens: about how many tokens to measure on.

    Only content positions are replaced (see `content_mask`); attention sinks stay as they are.

    Returns:
        {"tokens", "clean", "spliced", "mean_ablated"} in nats a token, and "recovered", the share of the damage of
        mean ablation that the reconstruction avoids.
    """
    chosen, total = [], 0
    for piece in pieces:
        if total >= tokens:
            break
        chosen.append(piece)
        total += len(piece) - 1
    batches = list(length_batches(sorted(range(len(chosen)), key=lambda i: len(chosen[i])), chosen, tokens_per_batch))
    layer_module = decoder_layers(lm.model)[layer]
    replacements = {"clean": None, "spliced": lambda x_TD: sae(x_TD),
                    "mean_ablated": lambda x_TD: mean_D.to(x_TD.device, x_TD.dtype).expand_as(x_TD)}
    sums = dict.fromkeys(replacements, 0.0)
    for done, batch in enumerate(batches, 1):
        ids_BP, mask_BP = pad([chosen[index] for index in batch], lm.device)
        for name, replace in replacements.items():
            handle = layer_module.register_forward_hook(_splice(sae, replace, mask_BP)) if replace else None
            try:
                with torch.inference_mode():
                    logits_BPV = lm.model(input_ids=ids_BP, attention_mask=mask_BP.long(), use_cache=False).logits
            finally:
                if handle:
                    handle.remove()
            kept_BP = mask_BP[:, 1:]
            sums[name] += torch.nn.functional.cross_entropy(
                logits_BPV[:, :-1][kept_BP].float(), ids_BP[:, 1:][kept_BP], reduction="sum").item()
        report(done / len(batches))
    losses = {name: value / total for name, value in sums.items()}
    harm = losses["mean_ablated"] - losses["clean"]
    return {"tokens": total, **losses,
            "recovered": (losses["mean_ablated"] - losses["spliced"]) / harm if harm else math.nan}


def _splice(sae, replace: Callable[[torch.Tensor], torch.Tensor], mask_BP: torch.Tensor):
    def hook(module, args, output):
        residual_BPD = resid_post(output).clone()
        keep_BP = content_mask(residual_BPD, mask_BP)
        residual_BPD[keep_BP] = replace(residual_BPD[keep_BP].to(sae.dtype)).to(residual_BPD.dtype)
        return residual_BPD if isinstance(output, torch.Tensor) else (residual_BPD, *output[1:])
    return hook
