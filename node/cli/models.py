"""`pod model` and the table of models: what the pod should serve, and how that stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from node.cli import show
from node.cli.call import perform
from node.cli.options import AsJson
from node.errors import UserError
from node.models.quantization import QUANTIZED_DTYPES

model_app = typer.Typer(help="What the pod should serve.", no_args_is_help=True)


def models_table(rows: list[Any]) -> None:
    show.table(
        ("model", "weights", "layers", "context", "tokens/s", "predicted", "state", "route"),
        [
            (
                m["name"],
                m["weight_type"],
                m["num_layers"],
                m["max_context_tokens"],
                speed_text(m["tokens_per_s"]),
                speed_text(m["predicted_tokens_per_s"]),
                m["state"],
                m["route"] or m["reason"] or "-",
            )
            for m in rows
        ],
        right=frozenset({"layers", "context", "tokens/s", "predicted"}),
    )


def speed_text(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f}"


def models(as_json: AsJson = False) -> None:
    """The models every node of the pod answers for."""
    result: Any = perform("models", {})
    return show.print_json(result) if as_json else models_table(result["models"])


@model_app.command("add")
def model_add(
    ref: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m, a Hugging Face id, a directory with config + safetensors, or a .gguf file."
        ),
    ],
    split: Annotated[
        int | None,
        typer.Option(
            "--split", min=1, max=1000, help="Split into at least N stages (default: placement decides)."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto (packed GGUF weights as they are), bfloat16, float16, float32, int8 or int4.",
        ),
    ] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", help="Pack the weights when they are loaded: int4 or int8."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The name tools ask for (default: from REF).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have the pod serve a model."""
    dtype = chosen_dtype(dtype, quantize)
    if Path(ref).expanduser().exists():
        ref = str(Path(ref).expanduser().resolve())
    with show.LoadBars() as bars:
        result = perform("model_add", {"ref": ref, "split": split, "dtype": dtype, "name": name}, bars.update)
    if as_json:
        return show.print_json(result)
    return show.out.print(
        f"The pod serves [bold]{result['name']}[/] ({result['num_layers']} layers) as soon as nodes hold it."
    )


def chosen_dtype(dtype: str, quantize: str | None) -> str:
    if quantize is None:
        return dtype
    if quantize not in QUANTIZED_DTYPES:
        raise UserError(f"--quantize must be one of {', '.join(QUANTIZED_DTYPES)} (got {quantize!r})")
    if dtype not in ("auto", quantize):
        raise UserError(f"--quantize {quantize} and --dtype {dtype} exclude each other")
    return quantize


@model_app.command("ls")
def model_ls(as_json: AsJson = False) -> None:
    """The models the pod should serve."""
    models(as_json)


@model_app.command("rm")
def model_rm(name: Annotated[str, typer.Argument(help="The model's name.")], as_json: AsJson = False) -> None:
    """Stop serving a model."""
    result = perform("model_remove", {"name": name})
    return show.print_json(result) if as_json else show.out.print(f"{name} is no longer served.")
