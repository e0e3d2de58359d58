"""The style sheet of the HTML report."""

from __future__ import annotations

STYLE = """
:root { --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff; --accent: #2563eb; --warm: #fef3c7; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; overflow-wrap: anywhere; }
h3 { font-size: 15px; margin: 20px 0 8px; }
h4 { font-size: 13px; margin: 0 0 6px; color: var(--soft); font-weight: 600; }
header p { margin: 0 0 16px; color: var(--soft); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 10px 12px; background: #f8fafc;
  border: 1px solid var(--line); border-radius: 6px; max-height: 420px; overflow-y: auto; }
pre.error { background: #fef2f2; border-color: #fecaca; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 16px 0; }
footer { color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: 13px; margin: 8px 0 14px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 10px; }
.facts div { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.facts b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 13px; }
.mark { background: #dbeafe; color: #1d4ed8; border-radius: 4px; padding: 1px 6px; font-size: 12px; font-weight: 600;
  white-space: nowrap; }
.warnings { background: var(--warm); border: 1px solid #fde68a; border-radius: 10px; margin: 16px 0;
  padding: 12px 16px 12px 34px; }
.scroll { overflow-x: auto; }
.scroll + .forest { margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: normal; vertical-align: bottom; }
th:last-child, td:last-child { padding-right: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
tr.total td { border-top: 2px solid var(--line); font-weight: 600; }
.forest { display: grid; grid-template-columns: minmax(70px, max-content) minmax(120px, 1fr) max-content;
  grid-auto-flow: dense; column-gap: 18px; align-items: center; margin-bottom: 18px; }
.forest .name { grid-column: 1; overflow-wrap: anywhere; font-size: 14px; }
.forest .value { grid-column: 3; font-size: 14px; text-align: right; font-variant-numeric: tabular-nums;
  white-space: pre; }
.forest .marked { font-weight: 650; }
.forest svg, .axis { grid-column: 2; }
.forest svg { width: 100%; height: 34px; overflow: visible; }
.forest .interval { stroke: #94a3b8; stroke-width: 3; stroke-linecap: round; }
.forest circle { fill: #64748b; }
.forest svg.marked .interval { stroke: #93c5fd; }
.forest svg.marked circle { fill: var(--accent); }
.grid { stroke: #eef2f7; stroke-width: 1; }
.reference { stroke: #94a3b8; stroke-width: 1.5; stroke-dasharray: 4 4; }
.axis { position: relative; height: 18px; font-size: 12px; color: var(--soft); }
.axis span { position: absolute; transform: translateX(-50%); }
.lines { margin: 14px 0 18px; }
.lines figcaption { font-size: 13px; color: var(--soft); font-weight: 600; margin-bottom: 8px;
  overflow-wrap: anywhere; }
.legend { font-weight: 400; }
.legend span { margin-left: 12px; white-space: nowrap; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
.plot { display: flex; height: 200px; }
.plot svg { flex: 1; min-width: 0; height: 100%; overflow: visible; }
.plot .y { position: relative; width: 44px; font-size: 12px; color: var(--soft); }
.plot .y span { position: absolute; right: 8px; transform: translateY(-50%); }
.plot polyline, .plot line { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round;
  stroke-linejoin: round; }
.lines .x { display: flex; justify-content: space-between; margin-left: 44px; font-size: 12px; color: var(--soft);
  padding-top: 4px; }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 18px 28px;
  margin-bottom: 12px; }
.bars { display: grid; grid-template-columns: minmax(60px, max-content) 1fr max-content; gap: 3px 10px; font-size: 13px;
  align-items: center; }
.bars .name { overflow-wrap: anywhere; max-width: 180px; }
.bars .value { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #f1f5f9; border-radius: 3px; height: 10px; }
.bar i { display: block; background: #93c5fd; border-radius: 3px; height: 10px; }
details { margin: 6px 0; }
summary { cursor: pointer; font-size: 14px; padding: 3px 0; overflow-wrap: anywhere; }
details > .scroll, details > dl, details > .turn { margin: 6px 0 10px; }
.turn b { font-size: 12px; color: var(--soft); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
.columns > div { min-width: 0; }
dl { margin: 0; font-size: 13px; }
dt { color: var(--soft); font-weight: 600; }
dd { margin: 0 0 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 16px 10px 40px; }
  section { padding: 14px 12px; }
  .forest { grid-template-columns: minmax(0, 1fr) max-content; }
  .forest .value { grid-column: 2; }
  .forest svg, .forest .axis { grid-column: 1 / -1; margin: 0 18px; width: calc(100% - 36px); }
  .columns { grid-template-columns: minmax(0, 1fr); }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
