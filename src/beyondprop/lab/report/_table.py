"""The results as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._run import Run
from beyondprop.lab.report._summary import RuleSummary, best_of, summary, warm_start

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def table(run: Run) -> Table:
    """Return the run's results as a rich table that fits a terminal of 80 columns.

    The best mean among the rules whose seeds all reached the end is bold and starred.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    summaries, metric, split = summary(run), run.metric, run.split
    accuracy = metric == "test_accuracy"
    with_range = any(s.final and s.final.n > 1 for s in summaries)
    title = words.title([run.config["data"]], [run.config["net"]], len(summaries), [s.seeds for s in summaries])
    result = Table(
        title=Text(title),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption=Text(_caption(run, summaries)),
        caption_justify="left",
    )
    result.add_column("rule", overflow="fold", min_width=8)
    headers = [f"{split}\nacc. %" if accuracy else f"{split}\nloss"]
    headers += ["range"] if with_range else []
    # One loss is enough beside an accuracy: 80 columns are spent. The report and the JSON have both.
    headers += [f"after {_epochs(summaries)}", f"{split}\nloss" if accuracy else "train\nloss"]
    headers += ["seconds", "work", "seeds"]
    for header in headers:
        result.add_column(Text(header), justify="right", no_wrap=True)

    best = best_of(summaries, lambda s: s.final and s.final.mean)
    first = best_of(summaries, lambda s: s.first and s.first.mean)
    for s in summaries:
        cells = [Text(s.title), _marked(s, metric, best, final=True)]
        cells += [Text(words.interval(metric, s.final))] if with_range else []
        cells += [_marked(s, metric, first, final=False)]
        cells += [Text(words.mean("test_loss", s.final_loss if accuracy else s.final_train_loss))]
        cells += [Text(words.amount(s.seconds)), Text(words.amount(s.work))]
        done = Text(f"{len(s.seeds_done)}/{s.seeds}")
        done.stylize("red" if s.seeds_failed else "yellow" if s.seeds_unfinished else "")
        result.add_row(*cells, done)
    return result


def _marked(s: RuleSummary, metric: str, best: float | None, *, final: bool) -> Text:
    from rich.text import Text

    spread = s.final if final else s.first
    text = words.mean(metric, spread)
    if final and spread is None and s.seeds_failed:
        return Text("failed", style="red")
    if spread is None or not s.comparable or spread.mean != best:
        return Text(text + ("†" if final and spread and not s.seeds_done else ""))
    return Text(("★ " if final else "") + text, style="bold green")


def _epochs(summaries: list[RuleSummary]) -> str:
    found = {s.first_epoch for s in summaries if s.first_epoch is not None}
    return f"\n{found.pop():.3g} epoch(s)".replace("1 epoch(s)", "1 epoch") if len(found) == 1 else "\nfirst"


def _caption(run: Run, summaries: list[RuleSummary]) -> str:
    spread = words.over_seeds(len(run.counted(s.name)) for s in summaries).capitalize()
    lines = [f"{spread}; seconds and work are medians. work: gradient-equivalents, 1 = one backpropagation step."]
    lines += [
        f"† {s.title}: no seed reached the end, values at epoch {s.epochs:.4g}."
        for s in summaries
        if s.final and not s.seeds_done
    ]
    said = words.warm_start(warm_start(run))
    lines += [said] if said else []
    counts = [(len(run.failures), "failure"), (len(run.warnings), "warning")]
    said = [words.plural(n, noun) for n, noun in counts if n]
    lines += [", ".join(said) + " recorded: " + _first_message(run)] if said else []
    return "\n".join([*lines, *run.notes])


def _first_message(run: Run) -> str:
    row = (run.failures or run.warnings)[0]
    seed = f", seed {row['seed']}" if "seed" in row else ""
    more = len(run.failures) + len(run.warnings) - 1
    return f"{run.title(row['rule']) if '=' in row['rule'] else row['rule']}{seed}: {row['message']}" + (
        f" (and {more} more)" if more else ""
    )
