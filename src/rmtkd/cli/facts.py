"""Commands that tell: ls, env."""

from rmtkd.cli.console import app, say


@app.command("ls")
def list_recipes() -> None:
    """The tasks that come with rmtkd, and what was measured on each, by which command.

    \b
    $ rmtkd ls
    digits   scikit-learn's 8 × 8 handwritten digits as 17 tokens: ...
             measured: a BERT of three layers at 24.8% of the parameters, ...
             by: rmtkd compress digits --out runs/digits --control
    """
    from rmtkd import recipes

    for name in recipes.names():
        task = recipes.get(name)
        say(f"{name:11} {task.describe}")
        if task.measured is None:
            say(f"{'':11} not measured")
        else:
            say(f"{'':11} measured: {task.measured.line()}")
            say(f"{'':11} by: {task.measured.command}")


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
    | openvino | missing: nncf, openvino (`pip install 'rmtkd[openvino]'`) |
    """
    from rmtkd.environment import environment_report

    say(environment_report())
