"""`python -m drivetrain` is the command line."""

from drivetrain.trainer.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
