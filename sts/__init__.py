"""sts: forecast which domains of a language model move when it is fine-tuned, from SAE latents alone.

`open_run("laptop")` gives a run; `run.get("scores")` computes a stage, or loads it if it is stored.
"""

import os
import warnings

# Libraries' own bars would pollute pages; tqdm and transformers read these when they are imported.
for _name, _value in {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error",
                      "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
                      "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}.items():
    os.environ.setdefault(_name, _value)
warnings.filterwarnings("ignore", message="IProgress not found")  # said in notebooks, although bars are off
for _category in (FutureWarning, DeprecationWarning):  # libraries' notes to their own developers
    warnings.filterwarnings("ignore", category=_category, module="(?!__main__)")

from sts.errors import StsError  # noqa: E402

__all__ = ["StsError", "forecast", "open_run"]
__version__ = "0.1.0"


def open_run(run="laptop", **overrides):
    """Open a run profile with overrides; see `sts.run.run.open_run`."""
    import sts.stages  # noqa: F401  (registers every stage)
    from sts.run.run import open_run as opened

    return opened(run, **overrides)


def forecast(*data, **options):
    """The forecast of one's own data; see `sts.book.forecast.Forecast`."""
    from sts.book.forecast import Forecast

    return Forecast(*data, **options)
