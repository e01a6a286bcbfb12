"""`reallm generate`: text from a model, as it comes."""

import sys
from typing import Annotated

import typer

from reallm.cli.options import Adapter


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Compressed model, Hugging Face folder, hub id or GGUF file.")
    ],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to answer or go on with; - reads it from stdin.")
    ],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Tokens at most.")] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", metavar="X", min=0, help="0 takes the most likely token; above 0 draws at random."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="X", min=0, max=1, help="Draw from the tokens that together reach this share."),
    ] = 1.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty", metavar="X", min=0, help="Above 1: tokens used before become less likely."
        ),
    ] = 1.1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The same seed draws the same text.")] = 0,
    adapter: Adapter = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="With the chat template, or the bare prompt. Default: the template if there is one."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message of the chat.")] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="What the model computes in: auto, float32, bfloat16 or float16."),
    ] = "auto",
    mode: Annotated[
        str, typer.Option("--mode", metavar="NAME", help="decode_at_load, or decode_per_use: slower, in less memory.")
    ] = "decode_at_load",
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare a compressed model's tensors with their checksums first."),
    ] = True,
) -> None:
    """Answer a prompt, printing the text as it is made."""
    from reallm.evaluate.generate import generate_stream
    from reallm.evaluate.loading import load_options
    from reallm.model import load, load_tokenizer

    tokenizer = load_tokenizer(model)  # first: it is cheap, and a model takes minutes
    pieces = generate_stream(
        load(model, mode=mode, verify=verify, adapter=adapter, **load_options(device, dtype)),
        tokenizer,
        sys.stdin.read() if prompt == "-" else prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        chat=chat,
        system=system,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
