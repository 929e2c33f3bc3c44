"""`python -m lorax_cli` runs `lorax`."""

from lorax_cli.app import main

if __name__ == "__main__":
    main()
