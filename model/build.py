"""``storm-kernels build``: a folder that transformers loads, out of a SigLIP tower's and a language model's."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .assembling import assemble, load_language, load_tokenizer, load_tower, new_folder, processor_of
from .command import add_reduction, say, told
from .configuration_storm import PROJECTOR_TYPES, StormConfig
from .loading import FLOATS
from .modeling_storm import StormForConditionalGeneration
from .pretrained_storm import random_notice
from .processing_storm import StormProcessor
from .video_processing_storm import REDUCTION


def cli(arguments: list[str], prog: str = "storm-kernels build") -> int:
    """Exit status: 0; 2 bad input, told in one line; 130 Ctrl-C."""
    options = _parser(prog).parse_args(arguments)
    return told(lambda: _build(options))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make a model's folder from published parts. Its projector is random and has to be trained.",
    )
    folder = {"required": True, "type": Path, "metavar": "DIR"}
    parser.add_argument("--vision", **folder, help="a SigLIP or SigLIP2 checkpoint's folder")
    parser.add_argument("--language", **folder, help="a causal language model's folder, with its tokenizer")
    parser.add_argument("--projector", required=True, choices=PROJECTOR_TYPES, help="storm mixes over time, vila not")
    add_out(parser)
    parser.add_argument(
        "--vision-layer",
        type=int,
        default=-2,
        metavar="N",
        help="the layer whose output the projector reads, from the end (-2, as NVILA; -1 is the last)",
    )
    parser.add_argument("--projector-layers", type=int, default=4, metavar="M", help="mixers of storm's projector (4)")
    add_reduction(parser, 1, "1; a call may choose another")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's random weights (0)")
    return parser


def add_out(parser: argparse.ArgumentParser) -> None:
    """What build and convert say of the folder they write."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write, new or empty")
    parser.add_argument("--dtype", choices=FLOATS, help="of the weights (default: the language model's)")


def write(model: StormForConditionalGeneration, processor: StormProcessor, folder: Path) -> str:
    """Write the folder; what it holds, in one line."""
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    say(f"writing {size / 1e9:.2f} GB ...")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    return (
        f"{config.projector_type} projector between {config.vision_config.num_hidden_layers} layers of vision and "
        f"{config.text_config.model_type}, {parameters / 1e9:.3g} B parameters, {dtype}"
    )


def _build(options: argparse.Namespace) -> int:
    fields = {name: getattr(options, name) for name in ("projector_layers", *REDUCTION)}
    fields["projector_type"] = options.projector
    StormConfig(**fields)  # what is wrong in them is said before gigabytes are read
    with new_folder(options.out) as folder:
        say(f"reading {options.vision} ...")
        tower = load_tower(options.vision, options.vision_layer)
        say(f"reading {options.language} ...")
        tokenizer = load_tokenizer(options.language)
        language = load_language(options.language, FLOATS.get(options.dtype, "auto"))
        torch.manual_seed(options.seed)
        model = assemble(tower, language, tokenizer, **fields)
        made = write(model, processor_of(model, tokenizer), folder)
    print(f"{options.out}: {made}")
    say(random_notice(model.config))
    return 0
