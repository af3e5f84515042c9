"""Bring published GPT-2 weights in.

    python src/convert_checkpoint.py import gpt2                    (or gpt2-medium, gpt2-large, gpt2-xl: from the hub)
    python src/convert_checkpoint.py import path/to/hf_folder --output checkpoints/best_model.pt
"""

from argparse import Namespace
from pathlib import Path

from cli import Parser, printable_line, run
from errors import UserError, errors_at


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Import published GPT-2 weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="published weights -> a checkpoint to fine-tune from")
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

    with errors_at(f"{source}: no such folder, and fetching it from the Hugging Face hub failed", Exception):
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=["config.json", "*.safetensors"]))


def import_weights(source: str, output: Path) -> None:
    folder = fetch(source)
    from weights.checkpoint import save, size_of
    from weights.pretrained import load_folder

    config, weights = load_folder(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    save(output, {"step": 0, "val_losses": [], "template": None, "model_config": vars(config), "model": weights})
    print(f"wrote {printable_line(output)}: {size_of(weights) // 4:,} parameters, {config.n_layer} layers of width "
          f"{config.n_embd}")


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    if options.output.exists() and not options.force:
        raise UserError(f"{options.output}: exists; --force replaces it, --output writes elsewhere")
    import_weights(options.source, options.output)
    return 0


if __name__ == "__main__":
    run(main)
