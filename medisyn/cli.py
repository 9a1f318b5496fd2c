"""The `medisyn` command: parse, check, build, call.

- Every failure that the user can mend is one line on stderr and exit code 2; `MEDISYN_DEBUG=1` shows the traceback.
- Arguments are checked before a model is loaded, and nothing is written before everything is known to be right.
- torch is imported inside the commands, so that `medisyn --help` and a typing error answer at once.

    medisyn generate "brain MRI slice showing a glioma" --num-images 4 --out outputs/glioma
"""

import json
from typing import Annotated, Any

import typer

from . import __version__
from .commands import augment, demo, evaluate, generate, publish, segment, select, utility
from .commands.arguments import DEFAULT, check_names, load_model, model_name
from .console import OneLineErrors, quiet_progress_bars


class Commands(OneLineErrors):
    """Also commands of two words, such as `evaluate utility` beside `evaluate MODEL`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Take two words for one where they name a command together."""
        together = " ".join(args[:2])
        return super().resolve_command(ctx, [together, *args[2:]] if together in self.commands else args)


app = typer.Typer(
    name="medisyn",
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="medisyn")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medisyn {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Synthetic medical images by conditioned latent diffusion. Not for diagnosis."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


generate.register(app)


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Configuration file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="train.steps=10")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train; the same command again resumes the run."""
    from .config import config_to_dict, load_config

    resolved = load_config(config, overrides)
    if dry_run:
        import yaml

        typer.echo(yaml.safe_dump(config_to_dict(resolved), sort_keys=False), nl=False)
        return
    from .generation.output_folder import check_writable

    check_writable(resolved.output_dir)
    from .trainer import Trainer

    quiet_progress_bars()
    typer.echo(f"finished: {Trainer(resolved).fit()}")


evaluate.register(app)
utility.register(app)
augment.register(app)
select.register(app)
segment.register(app)
publish.register(app)
demo.register(app)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub name; without it, the embedded default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's components, conditions, training data, licence and hash; or what an adapter is."""
    check_names(model=model)
    from .info import adapter_place, describe, describe_adapter, format_adapter, format_description, hub_adapter

    facts: dict[str, Any] = {}
    adapter = None if model in (None, DEFAULT) else adapter_place(model)
    if adapter is None:
        try:
            facts = describe(load_model(model, device="cpu"), model_name(model))
        except (OSError, ValueError):
            adapter = hub_adapter(model)
            if adapter is None:
                raise
    if adapter is not None:
        facts = describe_adapter(adapter)
    text = format_description if adapter is None else format_adapter
    typer.echo(json.dumps(facts, indent=2) if as_json else text(facts))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, number formats and extras, and what will not work and why."""
    from .doctor import examine, format_findings

    findings = examine()
    typer.echo(json.dumps(findings, indent=2) if as_json else format_findings(findings))
