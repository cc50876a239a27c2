"""Training SAEs through sae-lens: activations stored in shards, its trainer on top of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sts.engine.models import LanguageModel, bf16_is_fast
from sts.engine.residuals import OUTLIER_NORM, Extractor, is_content
from sts.engine.work import Work
from sts.errors import StsError


def collect_activations(lm: LanguageModel, folders: Mapping[int, Path], pieces: list[list[int]], *,
                        tokens_per_batch: int = 8192, pieces_per_shard: int = 512,
                        report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> None:
    """Store the residual stream after layers (layer -> folder) as bf16 safetensors shards, in one pass through the
    model; a killed run goes on with the next shard.

    The first position of each piece and positions with outlier norms, by layer (attention sinks), are left out. Each
    `shard-00000.safetensors` and so on has `activations_TD` and, row for row, the `piece_T` (index into `pieces`) and
    `position_T` that it came from.
    """
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    extractor, sides = Extractor(lm, tuple(folders), tokens_per_batch, work), [(ids, (1, len(ids))) for ids in pieces]
    limits = extractor.sink_norms(sides, OUTLIER_NORM)
    for start in range(0, len(pieces), pieces_per_shard):
        paths = [folder / f"shard-{start // pieces_per_shard:05d}.safetensors" for folder in folders.values()]
        end = min(len(pieces), start + pieces_per_shard)
        if not all(path.is_file() for path in paths):
            parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in paths]
            for batch in extractor.batches([len(piece) for piece in pieces[start:end]]):
                own = [start + place for place in batch]
                residual_TD = extractor.tokens([sides[place] for place in own])
                piece_T, position_T = torch.tensor([(place, position) for place in own
                                                    for position in range(1, len(pieces[place]))], dtype=torch.int32).T
                for part, layer_TD, limit in zip(parts, residual_TD.chunk(len(paths), dim=-1), limits, strict=True):
                    keep_T = is_content(layer_TD, limit)
                    part.append((layer_TD[keep_T].bfloat16().cpu(), piece_T[keep_T.cpu()], position_T[keep_T.cpu()]))
            for path, part in zip(paths, parts, strict=True):
                activations_TD, piece_T, position_T = map(torch.cat, zip(*part, strict=True))
                save_file({"activations_TD": activations_TD, "piece_T": piece_T, "position_T": position_T},
                          path.with_suffix(".partial"))
                path.with_suffix(".partial").rename(path)
        report(end / len(pieces))


def shard_paths(folder: Path) -> list[Path]:
    """The activation shards of a folder, in order."""
    return sorted(Path(folder).glob("shard-*.safetensors"))


def count_activations(folder: Path) -> int:
    """How many activation vectors a folder of shards holds, without reading them."""
    return sum(len(safe_open(path, "pt").get_tensor("piece_T")) for path in shard_paths(folder))


def _epochs(paths: list[Path], seed: int) -> Iterator[torch.Tensor]:
    """Activations in float32, shard after shard in a new random order each epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(paths), generator=generator).tolist():
            activations_TD = load_file(paths[index])["activations_TD"]
            yield activations_TD[torch.randperm(len(activations_TD), generator=generator)].float()


#: Activations that are mixed before training takes them, and steps without firing after which a latent is dead.
BUFFER, DEAD_STEPS = 262_144, 200


def train_sae(activations: Path, d_sae: int, k: int, samples: int, *, model_name: str, layer: int, batch: int = 2048,
              lr: float = 4e-4, seed: int = 0, device: str = "cpu", log_every: int = 25,
              report: Callable[[float], None] = lambda fraction: None):
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

    paths, count = shard_paths(activations), count_activations(activations)
    if not count:
        raise StsError(f"No activations to train on in {str(activations)!r}.")
    sample_TD = load_file(paths[0])["activations_TD"].float()
    d_in = sample_TD.shape[1]
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(
        d_in=d_in, d_sae=d_sae, k=k, device=device, apply_b_dec_to_input=True,
        normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=True, decoder_init_norm=0.1))
    sae.cfg.metadata.model_name = model_name
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    sae.b_dec.data = (sample_TD.mean(0) * d_in**0.5 / sample_TD.norm(dim=-1).mean()).to(device)

    # The buffer must not outgrow the data, or sae-lens would yield nothing until it is full.
    provider = mixing_buffer(max(batch, min(BUFFER, count)), batch, _epochs(paths, seed))
    steps = max(1, samples // batch)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * batch, train_batch_size_samples=batch, lr=lr,
            lr_end=lr / 10, lr_warm_up_steps=min(100, steps // 10), lr_decay_steps=steps // 4,
            # Matrix products in bf16 where the hardware has them: three times as fast on a recent CPU.
            device=device, autocast=bf16_is_fast(device), dead_feature_window=DEAD_STEPS,
            feature_sampling_window=steps + 1, n_batches_for_norm_estimate=16,
            logger=LoggingConfig(log_to_wandb=False)),
        sae, provider)
    curve, step = [], trainer.step

    def recorded(batch):
        """The `step` that the trainer offers to coordinators, with a row of the curve now and then."""
        output = step(batch)
        if trainer.n_training_steps % log_every == 0 or trainer.n_training_steps == steps - 1:
            row = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
            curve.append({"samples": trainer.n_training_samples, "loss": row["losses/mse_loss"],
                          "explained_variance": row["metrics/explained_variance"],
                          "dead": row["sparsity/dead_features"]})
            report((trainer.n_training_steps + 1) / steps)
        return output

    trainer.step = recorded
    trainer.fit()
    return sae, curve


def save_sae(sae, folder: Path, *, dtype: str = "float32") -> None:
    """Save a trained SAE for inference in sae-lens' format, decoder norms folded; `dtype` bfloat16 halves the file."""
    from sae_lens import SAE

    sae.save_inference_model(str(folder))
    if dtype != "float32":
        SAE.load_from_disk(str(folder), device="cpu", dtype=dtype).save_model(str(folder))
