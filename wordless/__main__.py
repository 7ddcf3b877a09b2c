"""`python -m wordless`: the command line."""

from wordless.cli import entry_point

if __name__ == "__main__":
    entry_point()
