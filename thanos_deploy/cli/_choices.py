"""The table that shows in a terminal which layers stay dense under a budget."""

from math import isnan

from rich.console import Console
from rich.table import Table

from thanos_deploy.pruning.budget import DECISION_COLUMNS, Choices, decision_cells, decision_rows


def show_choices(choices: Choices) -> None:
    """Print the decisions about the groups of layers, by kind of layer, and what they save."""
    table = Table(title="What pruning each group of layers saves and changes")
    for name in DECISION_COLUMNS:
        table.add_column(name, overflow="fold")
    for row in decision_rows(choices):
        table.add_row(*decision_cells(row))
    console = Console()
    console.print(table, markup=False)
    if any(isnan(group.costs) for group in choices.groups):
        console.print(
            f"The forecast for {choices.purpose} is at most {choices.fastest:.2f} times the speed "
            "of the dense model.",
            highlight=False,
            markup=False,
        )
    else:
        console.print(choices.sentence, highlight=False, markup=False)
