"""`medisyn publish`: a run or a folder as a repository of the Hub, or as a folder that shows what it would be.

medisyn publish runs/chest owner/chest --dry-run outputs/chest
"""

from typing import Annotated

import typer

from ..console import quiet_progress_bars
from .arguments import check_names


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(publish)


def publish(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, a folder of a pipeline or adapter, default.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    dry_run: Annotated[
        str | None, typer.Option("--dry-run", metavar="DIR", help="Write the repository here, upload nothing.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Publish without numbers, or under too loose a licence; the card says so.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(metavar="L", help="Of the weights; without it, that of the strictest source.")
    ] = None,
    card: Annotated[str | None, typer.Option(metavar="FILE", help="Hand-written sections (card.md of RUN).")] = None,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="report.json of an evaluation (that of RUN).")
    ] = None,
) -> None:
    """Publish a model or an adapter with its card; the same command again continues an upload."""
    check_names(run=run, repository=repository, dry_run=dry_run, license=license, card=card, report=report)
    from ..publishing import publish as publish_repository

    quiet_progress_bars()
    place = publish_repository(run, repository, dry_run, private, force, license, card, report)
    typer.echo(f"the repository is in {place}; nothing was uploaded" if dry_run else f"published: {place}")
