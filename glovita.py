"""Run an experiment: python glovita.py specs/digits_resnet.toml [--override a.b=value ...]."""

import argparse
import os
import sys
from importlib import import_module

from glovita_lib.errors import UserError


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line (none: the process's own); a mistake in it exits with code 2."""
    parser = argparse.ArgumentParser(description="Train, evaluate and read out vision models.")
    add = parser.add_argument
    add(
        "specs",
        nargs="*",
        metavar="SPEC",
        help="TOML file of an experiment, or the name of a shipped one",
    )
    add("--override", nargs="+", action="extend", default=[], metavar="a.b=value",
        help="change keys of the spec: TOML or a bare string; none unsets")  # fmt: skip
    add("--check", action="store_true", help="only check the specs, all errors at once")
    add("--compare", action="store_true", help="table of the finished runs of several specs")
    add("--print", action="store_true", help="print the spec with all its defaults as TOML")
    add("--dry-run", action="store_true", help="one batch through everything; writes no run")
    add("--schema", action="store_true", help="print the JSON schema of a spec")
    add("--explain", metavar="KEY", help="print what a key or section accepts")
    add("--version", action="store_true", help="print the versions that a bug report needs")
    asked = parser.parse_args(argv)
    if not (asked.specs or asked.schema or asked.explain or asked.version):
        parser.error("name a spec in front of the options, e.g. specs/digits_resnet.toml")
    if asked.print and (asked.check or asked.compare):
        parser.error("--print checks the spec by itself; leave --check and --compare out")
    if len(asked.specs) > 1 and not asked.check and not asked.compare:
        parser.error("one spec a run; only --check and --compare take several")
    return asked


def information(asked: argparse.Namespace) -> str | None:
    """What is asked about specs in general; None if nothing is."""
    if asked.version:
        return import_module("glovita_lib.errors").version_text()
    if asked.schema:
        return import_module("glovita_lib.spec_help").schema_text()
    return import_module("glovita_lib.spec_help").explain(asked.explain) if asked.explain else None


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code is 2 after a mistake of the user's."""
    asked = arguments(argv)
    try:
        if text := information(asked):
            print(text)
            return 0
        from glovita_lib.spec_check import check_files, load_checked

        if asked.check:
            return check_files(asked.specs, asked.override)
        loaded, *others = [load_checked(path, asked.override) for path in asked.specs]
        if asked.print:
            print(import_module("glovita_lib.spec_help").spec_text(loaded))
            return 0
        if asked.compare:
            print(import_module("glovita_lib.results").compare_runs([loaded, *others]))
            return 0
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in huge pages of Linux
        import_module(f"glovita_lib.{loaded.root.handler}").run(loaded, dry_run=asked.dry_run)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
