"""The style of the page: one sheet, light and dark, from narrow to wide."""

STYLE = """
:root {
  --paper: #fbfaf8; --sheet: #ffffff; --ink: #1d1f23; --soft: #5c6169; --line: #e2e0db;
  --accent: #2456a6; --good: #1a6b3c; --bad: #a8321f; --good-back: #e3f1e7; --bad-back: #fae6e1; --heat: 226 104 28;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --sheet: #1d2024; --ink: #e7e6e3; --soft: #a0a5ad; --line: #33373d;
    --accent: #86b0f5; --good: #7fce9c; --bad: #f09a86; --good-back: #1c3325; --bad-back: #40231d; --heat: 244 128 52;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 0 0 10px; font-weight: 600; overflow-wrap: anywhere; }
section { margin-top: 44px; }
section > p { color: var(--soft); margin: 0 0 14px; max-width: 760px; }
.eyebrow { margin: 0 0 4px; color: var(--accent); font-size: 0.85rem; font-weight: 600; }
.models { display: flex; flex-wrap: wrap; gap: 4px 32px; margin: 0; }
.models div { display: flex; gap: 8px; }
.models dt { color: var(--soft); }
.models dd { margin: 0; overflow-wrap: anywhere; }
.verdict { margin: 18px 0 0; padding: 10px 14px; border-radius: 8px; }
.verdict.good { background: var(--good-back); color: var(--good); }
.verdict.bad { background: var(--bad-back); color: var(--bad); }
.verdict ul { margin: 4px 0 0; padding-left: 20px; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.muted { color: var(--soft); opacity: 0.75; }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 14px;
  margin-top: 28px; }
.card { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card h2 { font-size: 0.92rem; color: var(--soft); font-weight: 600; }
.card p { margin: 0; font-size: 0.9rem; color: var(--soft); }
.card .value { font-size: 2rem; line-height: 1.25; color: var(--ink); font-variant-numeric: tabular-nums; }
.card .value small { font-size: 1rem; color: var(--soft); }
.card .notes { display: flex; flex-wrap: wrap; gap: 2px 18px; margin-top: 8px; font-variant-numeric: tabular-nums; }

figure { margin: 0; background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; padding: 12px;
  overflow-x: auto; }
svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
svg circle { fill: var(--accent); fill-opacity: 0.55; stroke: var(--accent); }
svg .axis { stroke: var(--soft); }
svg .mark { stroke: var(--line); stroke-width: 1.5; }
svg .limit { stroke: var(--bad); stroke-dasharray: 5 4; stroke-width: 1.5; }

.wide { overflow-x: auto; background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 8px 14px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
tr.more td:first-child { padding-left: 32px; color: var(--soft); }
td { overflow-wrap: anywhere; }
td ul { margin: 0; padding-left: 18px; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.92em; white-space: pre-wrap;
  background: rgb(var(--heat) / 0.12); padding: 1px 4px; border-radius: 4px; }
.bar { display: flex; align-items: center; gap: 8px; line-height: 1.35; }
.bar span { width: 120px; flex: none; }
.bar i { display: block; height: 8px; min-width: 2px; border-radius: 4px; background: var(--soft); opacity: 0.6; }
.bar.after i { background: var(--accent); opacity: 1; }
.bar b { font-weight: 400; font-size: 0.85rem; color: var(--soft); }
.bar.after b { color: var(--ink); }

.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 12px; margin: 44px 0 -24px; font-size: 0.85rem;
  color: var(--soft); }
.legend span span { padding: 2px 8px; color: var(--ink); }
.answer { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px;
  margin-bottom: 12px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 12px 28px; }
.side { min-width: 0; }
.who { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline; margin: 0 0 4px; font-size: 0.82rem;
  color: var(--soft); }
.who > :first-child { font-weight: 600; }
.kl { margin-left: auto; font-variant-numeric: tabular-nums; }
.tag { padding: 0 8px; border-radius: 9px; overflow-wrap: anywhere; }
.tag.plain { border: 1px solid var(--line); }
.tag.good { background: var(--good-back); }
.tag.bad { background: var(--bad-back); }
.said { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.end { font-size: 0.75rem; color: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 0 4px;
  margin-left: 6px; }
details summary { cursor: pointer; padding: 6px 0 12px; color: var(--accent); }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.k1 { background: rgb(var(--heat) / 0.08); }
.k2 { background: rgb(var(--heat) / 0.16); }
.k3 { background: rgb(var(--heat) / 0.26); }
.k4 { background: rgb(var(--heat) / 0.37); }
.k5 { background: rgb(var(--heat) / 0.49); }
.k6 { background: rgb(var(--heat) / 0.62); }
.k7 { background: rgb(var(--heat) / 0.78); }
footer { margin-top: 48px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--soft);
  font-size: 0.82rem; }
footer p { margin: 0 0 4px; overflow-wrap: anywhere; }

@media (max-width: 680px) {
  main { padding: 24px 14px 48px; }
  h1 { font-size: 1.5rem; }
  .sides { grid-template-columns: 1fr; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { padding: 12px; }
  .card .value { font-size: 1.5rem; }
  thead { display: none; }
  tr, td { display: block; }
  tr { padding: 8px 0; border-bottom: 1px solid var(--line); }
  tr:last-child { border-bottom: 0; }
  td { border: 0; padding: 2px 14px; }
  tr.more td { padding-left: 28px; }
  td:not(:first-child)::before { content: attr(data-name) "  "; color: var(--soft); font-size: 0.85rem; }
  td:first-child { font-weight: 600; }
}
@media print { .answer, .card { break-inside: avoid; } }
"""
