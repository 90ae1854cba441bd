"""Commands that tell: ls, env."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rmtkd.cli.console import app, say


@app.command("ls")
def list_recipes() -> None:
    """The tasks that come with rmtkd, what they run with by default, and what was measured on each, by which command.

    \b
    $ rmtkd ls
    digits   scikit-learn's 8 × 8 handwritten digits as 17 tokens: ...
             by default: --target 25%params --epochs 5 --lr 0.001
             measured: a BERT of three layers at 24.8% of the parameters, ...
             by: rmtkd compress digits --out runs/digits --control
    """
    from rmtkd import recipes

    for name in recipes.names():
        task = recipes.get(name)
        say(f"{name:11} {task.describe}")
        say(f"{'':11} by default: {defaults_of(task.options)}")
        if task.measured is None:
            say(f"{'':11} not measured")
        else:
            say(f"{'':11} measured: {task.measured.line()}")
            say(f"{'':11} by: {task.measured.command}")


def defaults_of(options: Mapping[str, Any]) -> str:
    """What a task runs with unless told otherwise, in words of `rmtkd compress`: size, length and rate of recovery, and
    whatever else is not as it is for all tasks."""
    from rmtkd.schedule import Options

    chosen, common = Options(**options), Options()
    told = {"target": chosen.target} if chosen.target else {"max_loss": f"{chosen.max_loss:g}"}
    told |= {"epochs": f"{chosen.epochs:g}", "lr": f"{chosen.recovery.lr:g}"}
    for mine, theirs in ((chosen, common), (chosen.recovery, common.recovery)):
        for name in (field.name for field in fields(mine)):
            differs = getattr(mine, name) != getattr(theirs, name)
            if differs and name not in (*told, "recovery", "weight_decay"):  # the last is no option of the command
                told[name] = str(getattr(mine, name))
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in told.items())


@app.command()
def env() -> None:
    """Versions, machine and extras as Markdown, to paste into a bug report.

    \b
    $ rmtkd env
    ### Environment
    - python: 3.11.7
    - torch: 2.13.0+cpu
    - bf16 matrix instructions: True
    ...
    | openvino | missing: nncf, openvino (`pip install 'rmtkd\\[openvino]'`) |
    """
    from rmtkd.environment import environment_report

    say(environment_report())
