"""`python -m lorax_cli` is `lorax`."""

from lorax_cli.app import main

if __name__ == "__main__":
    main()
