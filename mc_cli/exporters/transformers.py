"""A packed model that transformers loads with its own classes, through the mc_cli plug-in.

Without the plug-in transformers would skip an unknown quantization method with a log line and fill the experts with
random numbers. So config.json names a weights file that does not exist, and its name is the instruction what to do:
every loader that does not know the method stops there, and the plug-in removes the entry before files are looked up.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mc_cli import DISTRIBUTION
from mc_cli.artifacts.files import read_json, read_tensors, write_json, write_text
from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.pruning import Pruning
from mc_cli.exporters import ExportJob
from mc_cli.exporters.model_card import model_card
from mc_cli.exporters.reading import open_with_transformers
from mc_cli.exporters.shards import ShardWriter
from mc_cli.measuring.logit_source import LogitSource, Reading

NAME = "transformers"
CARRIES_POLICY = True
ENGINES = ("transformers", "vLLM")
KEEPS = "all: every expert's and projection's width, blocks, cuts, dropped and shared experts"
DESCRIPTION = f"packed weights for from_pretrained of the model's auto class, with {DISTRIBUTION} installed"

# Where config.json would name the file of the weights: without the plug-in, which clears it, every loader stops there
# instead of filling experts that it does not find with random numbers.
NOTICE = (
    f"these weights are packed: pip install {DISTRIBUTION}. Where it is installed and this is still shown, "
    "`import mc_cli` before from_pretrained, or pass trust_remote_code=True"
)
LOADER = "modeling_mc_cli"
# The import stands in a `try`: transformers tells people to pip install what stands outside by the name of its import,
# and a distribution of that name, with another purpose, is somebody else's.
LOADER_SOURCE = f'''\
"""Loads this directory through mc_cli (pip install {DISTRIBUTION}). Written by `mc-cli export`."""

try:
    from mc_cli import __version__ as mc_cli_version
    from mc_cli import set_pruning_rate  # noqa: F401  somebody else's mc_cli has none
except ImportError as error:
    raise ImportError("This model is packed, and read by mc_cli. Run `pip install {DISTRIBUTION}`.") from error

from transformers import AutoModelForCausalLM


class PackedModelForCausalLM:
    """Hands over to the native class of the model, which reads the packed format once mc_cli is imported."""

    mc_cli_version = mc_cli_version

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM"):
        """Nothing to register: the native class stays the one for this model type."""

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        """The packed model, an instance of its native class."""
        return AutoModelForCausalLM.from_pretrained(name, *args, **{{**kwargs, "trust_remote_code": False}})
'''
_OPENING = (
    "A Mixture-of-Experts language model whose weights are packed at mixed bit widths by mc-cli (the distribution "
    f"`{DISTRIBUTION}`): each routed expert at the width that its importance earned it."
)
_LOADING = f"""\
```sh
pip install {DISTRIBUTION}
```
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Nothing is imported by hand, so that `pipeline("text-generation", "PATH")`, `transformers serve PATH` and
`lm_eval --model hf --model_args pretrained=PATH` load it too. Under `python -S`, and where the package lies in a folder
on PYTHONPATH (`pip install --target`), put `import mc_cli` first, or pass `trust_remote_code=True`. Without
{DISTRIBUTION} loading stops with an error that names it: it never falls back to random weights. Layers stay packed in
memory."""

_LOADING_OWN_CODE = f"""\
```sh
pip install {DISTRIBUTION}
```
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)  # the model's own Python code, in PATH
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Without {DISTRIBUTION} loading stops with an error that names it: it never falls back to random weights. Layers
stay packed in memory."""

_PRUNING = """\
Tokens skip experts that they hardly need: the policy `{policy}` skips about {rate} of the expert calls, and a skipped
expert is not computed. It was fitted for {rates}, and rates between them.

```python
import mc_cli

model = AutoModelForCausalLM.from_pretrained("PATH", mc_pruning_rate=0)  # off; or another rate, such as 0.15
mc_cli.set_pruning_rate(model, None)  # while loaded: None is the exported rate, 0 is off
```"""


def export(job: ExportJob) -> None:
    """Writes config.json with the layout, sharded packed tensors under module-tree names, loader code and a card."""
    write_json(job.target / "config.json", packed_config(job))
    writer = ShardWriter(job.target, shard_bytes=job.shard_bytes)
    for path in sorted(job.packed_folder.glob("*.safetensors")):
        for name, tensor in read_tensors(path).items():
            writer.add(name, tensor)
        job.advance(path.name)
    for name, tensor in sorted(job.pruning[1].items() if job.pruning else ()):
        writer.add(name, tensor)
    writer.finish()
    own_code = "auto_map" in read_json(job.config_folder / "config.json")
    if not own_code:
        write_text(job.target / f"{LOADER}.py", job.in_words_of_the_class(LOADER_SOURCE))
    title = f"{job.card.base_model or job.card.model_type}, packed by mc-cli"
    how = job.in_words_of_the_class(_LOADING_OWN_CODE if own_code else _LOADING)
    loading = how if job.pruning is None else f"{how}\n\n{_pruning_words(job)}"
    write_text(job.target / "README.md", model_card(job.card, title=title, opening=_OPENING, loading=loading))


def open(directory: Path, reading: Reading) -> LogitSource:
    """The directory as `from_pretrained` loads it through the plug-in, or layer by layer where memory is short."""
    return open_with_transformers(directory, reading)


def _pruning_words(job: ExportJob) -> str:
    assert job.pruning is not None
    return job.in_words_of_the_class(_PRUNING).format(**_policy_words(job.pruning[0]))


def _policy_words(pruning: Pruning) -> dict[str, str]:
    rates = ", ".join(f"{100 * point.rate:.1f} %" for point in pruning.points)
    return {"policy": pruning.policy, "rate": f"{100 * pruning.at_rate(None).rate:.1f} %", "rates": rates}


def packed_config(job: ExportJob) -> dict[str, Any]:
    """config.json of the export: the native one, the layout, the notice, and the way in for trust_remote_code."""
    config = read_json(job.config_folder / "config.json", foreign=True)
    layout = read_layout(job.packed_folder)
    if job.pruning is not None:
        layout = replace(layout, pruning=job.pruning[0])
        config = {**config, "mc_pruning_rate": job.pruning[0].at_rate(None).rate or None}
    return {
        **_with_dtype(config, job.dtype),
        "quantization_config": layout.exported_json(),
        "transformers_weights": NOTICE,
        # Code of the model's own stays the way in to it.
        "auto_map": config.get("auto_map") or {job.auto_class: f"{LOADER}.Packed{job.auto_class.removeprefix('Auto')}"},
    }


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Without a dtype in config.json, transformers would take that of the first float tensor: the float16 scales'."""
    stated = config.get("dtype") or config.get("torch_dtype")
    return config if stated else {**config, "dtype": dtype}
