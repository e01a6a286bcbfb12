"""`reallm generate`: generate text and stream it to stdout."""

import sys
from typing import Annotated

import typer

from reallm.cli.shared_options import Adapter


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Compressed model, Hugging Face folder, hub id or GGUF file.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt; - reads it from stdin.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum number of new tokens.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="X", min=0, help="0: greedy decoding; above 0: sampling."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="X",
            min=0,
            max=1,
            help="Sample from the most likely tokens that reach this cumulative probability.",
        ),
    ] = 1.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty", metavar="X", min=0, help="Above 1 makes tokens that occurred before less likely."
        ),
    ] = 1.1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed for sampling.")] = 0,
    adapter: Adapter = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Apply the chat template, or use the prompt as is. Default: the template if the model has one.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message of the chat.")] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Device: auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="Compute dtype: auto, float32, bfloat16 or float16."),
    ] = "auto",
    mode: Annotated[
        str, typer.Option("--mode", metavar="NAME", help="decode_at_load, or decode_per_use (slower, less memory).")
    ] = "decode_at_load",
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Verify the checksums of a compressed model first."),
    ] = True,
) -> None:
    """Generate text from a prompt, printed as it is generated."""
    from reallm.evaluate.generation import generate_stream
    from reallm.evaluate.load_options import load_options
    from reallm.hf import load, load_tokenizer

    tokenizer = load_tokenizer(model)  # first: it is cheap, and loading a model takes minutes
    chunks = generate_stream(
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
    for chunk in chunks:
        print(chunk, end="", flush=True)
    print()
