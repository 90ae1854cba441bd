"""Commands that tell: ls, env."""

from rmtkd.cli.console import app, say


@app.command("ls")
def list_recipes() -> None:
    """The tasks that come with rmtkd.

    \b
    rmtkd ls
    """
    from rmtkd import recipes

    for name in recipes.names():
        say(f"{name:8} {recipes.get(name).describe}")


@app.command()
def env() -> None:
    """Versions and machine, to paste into a bug report.

    \b
    rmtkd env
    """
    from rmtkd.environment import machine, versions

    for name, value in {**versions(), **machine()}.items():
        say(f"- {name}: {value}")
