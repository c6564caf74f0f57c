"""The command `pdl-kernels`: one file for each of its commands. They need the extra `cli`."""

import sys


def main() -> None:
    """Run the command line; without the packages it needs, say which."""
    try:
        from pdl_kernels.cli.commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"error: {missing} is not installed: pip install 'pdl-kernels[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="pdl-kernels")
