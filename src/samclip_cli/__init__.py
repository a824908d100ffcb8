"""The `samclip` command."""


def main(argv=None) -> int:
    from .photographs import main

    return main(argv)
