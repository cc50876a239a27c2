"""Training SAEs through sae-lens: activations stored in shards, its trainer on top of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sts.engine.extract import Rows
from sts.engine.models import LanguageModel, bf16_is_fast
from sts.engine.residuals import OUTLIER_NORM, Extractor
from sts.engine.work import Work
from sts.errors import StsError

# --- activations to train on --------------------------------------------------------------------------------------

def collect_activations(lm: LanguageModel, layer: int, pieces: list[list[int]], folder: Path, *,
                        tokens_per_batch: int = 8192, pieces_per_shard: int = 512,
                        report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> Path:
    """Store the residual stream of `pieces` as bf16 safetensors shards; a killed run goes on with the next shard.

    The first position of each piece and positions with outlier norms (attention sinks) are left out.

    Returns:
        `folder`, holding `shard-00000.safetensors` and so on, each with `activations_TD` and, row for row, the
        `piece_T` (index into `pieces`) and `position_T` that it came from.
    """
    collect_layers(lm, {layer: folder}, pieces, tokens_per_batch=tokens_per_batch, pieces_per_shard=pieces_per_shard,
                   report=report, work=work)
    return folder


def collect_layers(lm: LanguageModel, folders: Mapping[int, Path], pieces: list[list[int]], *,
                   tokens_per_batch: int = 8192, pieces_per_shard: int = 512,
                   report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> None:
    """`collect_activations` of several layers in one pass through the model.

    Args:
        folders: layer -> where its shards go. A layer's outlier norms are its own.
    """
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    extractor = Extractor(lm, tuple(folders), tokens_per_batch, work)
    rows = Rows(extractor, pieces, [(1, len(piece)) for piece in pieces])
    limits = rows.thresholds(OUTLIER_NORM)
    shards = math.ceil(len(pieces) / pieces_per_shard)
    for index in range(shards):
        paths = {layer: folder / f"shard-{index:05d}.safetensors" for layer, folder in folders.items()}
        if not all(path.is_file() for path in paths.values()):
            own = [place for place in range(len(pieces))[index * pieces_per_shard:(index + 1) * pieces_per_shard]
                   if len(pieces[place]) > 1]
            parts = [_content(torch.cat(rows.take([own[place] for place in batch])), limits,
                              [(own[place], len(pieces[own[place]])) for place in batch])
                     for batch in extractor.batches([len(pieces[place]) for place in own])]
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            for place, path in enumerate(paths.values()):
                columns = zip(*(part[place] for part in parts), strict=True)
                activations, piece, position = (torch.cat(column) for column in columns)
                partial = path.with_suffix(".partial")
                save_file({"activations_TD": activations, "piece_T": piece, "position_T": position}, partial)
                partial.rename(path)
        report((index + 1) / shards)


def _content(layers_TD: torch.Tensor, limits: list[float],
             batch: list[tuple[int, int]]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each layer: activations, piece and position of the tokens that are no sinks; `batch`: (piece, length)."""
    piece_T = torch.cat([torch.full((length - 1,), piece, dtype=torch.int32) for piece, length in batch])
    position_T = torch.cat([torch.arange(1, length, dtype=torch.int32) for _, length in batch])
    found = []
    for residual_TD, limit in zip(layers_TD.chunk(len(limits), dim=-1), limits, strict=True):
        keep_T = residual_TD.float().norm(dim=-1) <= limit
        # To pinned memory, without waiting for the copy; `collect_layers` waits before it writes.
        activations_TD = residual_TD[keep_T].to(torch.bfloat16).to("cpu", non_blocking=True)
        keep_T = keep_T.cpu()
        found.append((activations_TD, piece_T[keep_T], position_T[keep_T]))
    return found


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
