"""Bring published GPT-2 weights in.

    python src/convert_checkpoint.py import gpt2                    (or gpt2-medium, gpt2-large, gpt2-xl: from the hub)
    python src/convert_checkpoint.py import path/to/hf_folder --output checkpoints/best_model.pt
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import CheckpointError, Parser, UserError, printable_line, run

if TYPE_CHECKING:
    from torch import Tensor

# What a GPT-2 of transformers must be like to be the model that model.py computes.
_EXPECTED = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "n_inner": None,
             "layer_norm_epsilon": 1e-5}


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Import published GPT-2 weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", description="Published weights -> a checkpoint to fine-tune from.",
                                    help="published weights -> a checkpoint to fine-tune from")
    importing.add_argument("source", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with config.json and "
                                          "*.safetensors")
    importing.add_argument("--output", type=Path, default=Path("checkpoints/best_model.pt"),
                           help="the file to write (default: %(default)s)")
    importing.add_argument("--force", action="store_true", help="replace --output if it exists")
    return parser.parse_args(argv)


def fetch(source: str) -> Path:
    """The folder of the model: local, or downloaded from the hub. Raises UserError when it cannot be had."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source}: not a folder; name the folder that holds config.json and the .safetensors files")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # the hub client fails in as many ways as networks do
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"{source}: no such folder, and fetching it from the Hugging Face hub failed "
                        f"({type(error).__name__}: {reason})") from error


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors of a Hugging Face folder. Raises UserError or CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        wrong = [f"{key} {config[key]!r}" for key, value in _EXPECTED.items() if config.get(key, value) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/config.json: not readable as a model's configuration ({error})") from error
    if wrong:
        raise CheckpointError(f"{folder}: not a GPT-2 as published: {', '.join(wrong)}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file; save the model with save_pretrained(safe_serialization=True)")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    return config, weights


def import_weights(source: str, output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise UserError(f"{output}: exists; --force replaces it, --output writes elsewhere")
    folder = fetch(source)
    from checkpoint import config_of, normalize_weights, save

    sizes, found = read_folder(folder)
    weights = normalize_weights(found, folder)
    config = config_of(sizes, weights, folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    save(output, {"step": 0, "val_losses": [], "template": None, "model_config": vars(config), "model": weights})
    print(f"wrote {printable_line(output)}: {sum(tensor.numel() for tensor in weights.values()):,} parameters, "
          f"{config.n_layer} layers of width {config.n_embd}")


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    import_weights(options.source, options.output, options.force)
    return 0


if __name__ == "__main__":
    run(main)
