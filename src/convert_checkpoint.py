"""Bring GPT-2 weights in, and take a fine-tuned model out.

    python src/convert_checkpoint.py import gpt2                    (or gpt2-medium, gpt2-large, gpt2-xl: from the hub)
    python src/convert_checkpoint.py import path/to/hf_folder --output checkpoints/best_model.pt
    python src/convert_checkpoint.py export checkpoints_instruct/best_model.pt my_model          (a Hugging Face folder)
    python src/convert_checkpoint.py export checkpoints_instruct/best_model.pt my_model.gguf     (llama.cpp, ollama)
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

from answering.settings import Settings
from cli import Parser, number, run, say
from errors import UserError, errors_at

GGUF = ".gguf"  # what an output of this kind ends with


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Import GPT-2 weights, export a fine-tuned model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    importing = commands.add_parser("import", help="weights from elsewhere -> a checkpoint to fine-tune from")
    importing.add_argument("source", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a local folder or file")
    importing.add_argument("--output", type=Path, default=Path("checkpoints/best_model.pt"), help="the file to write")
    importing.add_argument("--n_head", type=number(int, 1), default=0,
                           help="attention heads, where the weights do not say it (default: what they say)")
    exporting = commands.add_parser("export", help="a checkpoint -> a Hugging Face folder or a GGUF file")
    exporting.add_argument("source", metavar="checkpoint", help="a checkpoint, or what else import takes from here")
    exporting.add_argument("output", type=Path, help="the folder to write, or a file NAME.gguf")
    exporting.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "q8_0"),
                           help="of the weights; q8_0 (8 bits) is for GGUF only")
    for command in (importing, exporting):
        command.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(argv)


def fetch(source: str) -> Path:
    """Where the model is: a local path, or downloaded from the hub. Raises UserError when it cannot be had."""
    path = Path(source)
    if path.exists():
        return path
    absent = f"{source}: no such file or folder"
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors", GGUF):
        raise UserError(absent)
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries are reported once, below
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=[
            "*config.json", "vocab.json", "tokenizer.json", "*.safetensors*"]))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(source, allow_patterns=["config.json", "pytorch_model*.bin*"])
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError) as error:
        raise UserError(f"{absent}, and the Hugging Face hub has no public model of this name") from error
    except Exception as error:  # what the hub's library says is long, and for who calls it; the system's words help
        reason = f"{error.strerror}; " if isinstance(error, OSError) and error.strerror else ""
        raise UserError(f"{absent}, and fetching it from the Hugging Face hub failed: {reason}check the network, "
                        "or import a local file or folder") from error
    if not any(any(folder.glob(name)) for name in ("*.safetensors", "pytorch_model*", "adapter_config.json")):
        raise UserError(f"{source}: no weights for transformers in it, on the Hugging Face hub; download the file that "
                        "has the weights, and import that")
    return folder


def is_gguf(output: Path) -> bool:
    return output.name.lower().endswith(GGUF)


def check_output(output: Path, is_import: bool, is_forced: bool) -> None:
    """Raise UserError where something is that may not be replaced, and for a name that means something else."""
    if not is_import and output.suffix.lower() in (".pt", ".pth", ".bin", ".safetensors"):
        raise UserError(f"{output}: export writes a folder, or a file whose name ends in {GGUF}; name one of these")
    for path in (output, output.with_suffix(".Modelfile")) if is_gguf(output) else (output,):
        if path.exists():
            from weights.export import check_folder
            from weights.safe_load import check_is_file

            (check_is_file if is_import or is_gguf(output) else check_folder)(path)
            if not is_forced:
                raise UserError(f"{path}: exists; --force replaces it, another output leaves it")
    if is_import and output.suffix != ".pt":
        raise UserError(f"{output}: import writes a checkpoint; name it {output.with_suffix('.pt')}")


def import_weights(source: str, output: Path, n_head: int = 0) -> None:
    path = fetch(source)
    from weights.checkpoint import model_of, save
    from weights.pretrained import open_any, without_rows

    state = open_any(path, n_head)
    model, left_out = model_of(state, path), without_rows(state.pop("left_out"))
    save(output, state, say)
    sizes, count = model.config, sum(parameter.numel() for parameter in model.parameters())
    say(f"wrote {output}: {count:,} parameters, {sizes.n_layer} layers of {sizes.n_head} heads, width {sizes.n_embd}"
        + left_out)


def export_weights(source: Path, output: Path, dtype: str) -> None:
    from answering.opened import open_model
    from weights.export import export_folder, export_gguf

    os.umask(0o022)  # everybody may read what is exported: servers run as other users
    _, state = open_model(source)
    settings = Settings(max_new_tokens=Settings().room(state["model_config"]["context_length"]))
    (export_gguf if is_gguf(output) else export_folder)(state, output, dtype, settings._asdict())
    say(f"wrote {output}")


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    with errors_at(options.output):
        check_output(options.output, options.command == "import", options.force)
    if getattr(options, "dtype", "") == "q8_0" and not is_gguf(options.output):
        raise UserError(f"{options.output}: --dtype q8_0 is for GGUF; name a file that ends in {GGUF}")
    if options.command == "import":
        import_weights(options.source, options.output, options.n_head)
    else:
        export_weights(Path(options.source), options.output, options.dtype)
    return 0


if __name__ == "__main__":
    run(main)
