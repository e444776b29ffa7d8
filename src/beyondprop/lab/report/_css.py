"""The report's style sheet: light and dark by the reader's preference; figures always on white."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c63; --line: #dcdce0; --page: #ffffff;
  --stripe: #f6f6f8; --bad: #b3261e; --bad-page: #fdeceb; --care: #8a5a00; --care-page: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececee; --soft: #a4a4ad; --line: #3a3a40;
  --page: #17171a; --stripe: #1f1f24; --bad: #ff8a80; --bad-page: #3a1c1a; --care: #ffcf70;
  --care-page: #352a12; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.under, .note, figcaption { color: var(--soft); font-size: .9rem; }
.under { margin: .3rem 0 0; }
.note { margin: .5rem 0 0; max-width: 85ch; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--line); }
th, td { padding: .35rem .9rem .35rem 0; }
td { border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.numbers td { white-space: nowrap; }
.numbers td:first-child { white-space: normal; min-width: 13rem; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em;
  box-shadow: 0 0 0 1px var(--line); }
.bad { color: var(--bad); font-weight: 600; }
.box { border-left: 4px solid; padding: .7rem 1rem; margin: 1.2rem 0 0; border-radius: 0 6px 6px 0; }
.box h2 { font-size: 1rem; margin: 0; }
.box ul { margin: .3rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.failure { border-color: var(--bad); background: var(--bad-page); }
.failure h2 { color: var(--bad); }
.warning { border-color: var(--care); background: var(--care-page); }
.warning h2 { color: var(--care); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem; }
figcaption { margin-top: .5rem; max-width: 95ch; }
pre { background: var(--stripe); border: 1px solid var(--line); border-radius: 6px; padding: .7rem 1rem;
  overflow-x: auto; font-size: .9rem; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
