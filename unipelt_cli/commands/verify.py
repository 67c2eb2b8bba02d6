"""The command `verify`: whether a run is whole and computes what it did."""

from unipelt_cli.commands.shared import options, run_argument, settings
from unipelt_cli.errors import CheckError, UnipeltError
from unipelt_cli.runs.opening import settle_run
from unipelt_cli.terminal import tables
from unipelt_cli.terminal.command_group import print_json


def verify(
    run: options.RunPath,
    source: options.SourceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Check a run: its files' hashes, its backbone, its tensors and logits, its rows.

    Example: unipelt verify runs/mrpc-k500-unipelt-apl-minilm-d111-s42
    """
    from unipelt_cli.system import network

    directory = run_argument.locate(run, offline)
    try:
        settle_run(directory, offline=offline, source=source, model=model)
    except UnipeltError:  # the checks will say what is wrong
        network.configure_network(offline=True, needed=False)
    from unipelt_cli.runs import verification

    checks = list(verification.verify(directory, settings.absolute(source), model))
    tables.check_table([(check.what, check.ok, check.outcome) for check in checks])
    failed = [check for check in checks if check.ok is False]
    if as_json:
        print_json(
            {
                "run": str(run),
                "ok": not failed,
                "checks": [
                    {"what": check.what, "passed": check.ok, "said": check.outcome}
                    for check in checks
                ],
            }
        )
    if failed:
        is_whole = all(check.what.split(",")[0].endswith(" rows") for check in failed)
        raise CheckError(
            f"{run}: {len(failed)} of {len(checks)} checks failed, the first: {failed[0].outcome}",
            "the run is whole, but its rows have changed since: restore them to check it on them"
            if is_whole
            else "do not use this run: restore it, or train it again",
        )
