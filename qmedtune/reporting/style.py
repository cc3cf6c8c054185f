"""The style sheet of report.html: one column, light and dark by the reader's setting, phone and paper included.

Colours are those of Okabe and Ito (2008), told apart with any kind of colour vision, lightened for dark pages.
Deliberately absent: fonts, scripts and images from anywhere.
"""

LIGHT = """--page: #f7f6f3; --card: #ffffff; --ink: #1c2430; --soft: #5c6675; --rule: #e3e0da; --faint: #efede8;
  --accent: #00705a; --accent-soft: #e2f1ec; --warn: #8a5300; --warn-soft: #fcf1dc; --bad: #a8321f;
  --bad-soft: #fbe9e5; --c0: #7d8794; --c1: #0b6fb0; --c2: #cf5a00; --c3: #00866a; --c4: #a8568a; --c5: #b38600;
  --c6: #2a8cc0; --c7: #6b5fb5; --c8: #7a6a55;"""
# A row as a block, each cell beside the name of its column: tables that are wider than their place.
STACKED = """  .KIND, .KIND tbody, .KIND tr { display: block; }
  .KIND thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .KIND tr { padding: 10px 0; border-top: 1px solid var(--rule); }
  .KIND tbody tr:first-child { border-top: 0; padding-top: 0; }
  .KIND tbody th, .KIND td { display: block; border: 0; padding: 2px 0; min-width: 0; white-space: normal; }
  .KIND tbody th { font-weight: 600; }
  .KIND td { display: flex; justify-content: space-between; gap: 16px; text-align: right; }
  .KIND td::before { content: attr(data-column); color: var(--soft); text-align: left; flex: none; }
  .KIND td.n + td:not(.n) { padding-left: 0; }
"""
MANY = STACKED.replace("KIND", "many")
LONG = STACKED.replace("KIND", "long")
CSS = (
    """
:root {
  color-scheme: light dark;
  LIGHT
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151a; --card: #191f26; --ink: #e7ebf0; --soft: #9aa6b4; --rule: #2c343e; --faint: #222932;
    --accent: #4fd1ae; --accent-soft: #17332c; --warn: #f0bd63; --warn-soft: #332915; --bad: #ff9a85;
    --bad-soft: #3a211c; --c0: #74808f; --c1: #5fb2ec; --c2: #ff9350; --c3: #3fcfa6; --c4: #dd94c2; --c5: #e6bb3c;
    --c6: #8ed0f2; --c7: #a89cf0; --c8: #bcaa90;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 ui-sans-serif, system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; -webkit-text-size-adjust: 100%;
}
main { max-width: 1040px; margin: 0 auto; padding: 56px 28px 72px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 6px 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 56px 0 6px; }
h3 { font-size: 16px; margin: 0 0 10px; }
p { margin: 0 0 14px; max-width: 72ch; }
a { color: inherit; text-decoration-color: var(--c0); text-underline-offset: 3px; }
.eyebrow { color: var(--soft); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; }
.status { display: inline-block; margin-left: 10px; padding: 1px 10px; border-radius: 99px; letter-spacing: 0;
  text-transform: none; background: var(--accent-soft); color: var(--accent); }
.status.failed { background: var(--bad-soft); color: var(--bad); }
.status.running, .status.stopped { background: var(--warn-soft); color: var(--warn); }
.outcome { font-size: 20px; line-height: 1.45; margin-bottom: 18px; }
.meta, .note { color: var(--soft); font-size: 14px; }
.meta span { white-space: nowrap; }
.meta span:not(:last-child)::after { content: "·"; margin: 0 4px 0 8px; }
.callout { background: var(--warn-soft); color: var(--warn); border-radius: 10px; padding: 12px 16px; margin: 20px 0 0;
  font-size: 15px; }
.callout ul { margin: 4px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); gap: 14px; margin: 14px 0 0; }
header > .tiles:first-of-type, .callout + .tiles { margin-top: 30px; }
header > details { margin-top: 14px; }
.contents { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 34px 0 0; padding: 14px 0; font-size: 14.5px;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; }
.tile { padding: 16px 18px 14px; }
.tile .name { color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
.tile .big { font-size: 24px; line-height: 1.2; letter-spacing: -.02em; font-weight: 650; margin: 4px 0 2px;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .from { color: var(--soft); font-weight: 400; }
.tile .small { color: var(--soft); font-size: 13.5px; }
.good { color: var(--accent); } .poor { color: var(--bad); } .quiet { color: var(--soft); }
.card { padding: 20px 22px; margin: 14px 0 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 0 14px; }
.pair > .card { min-width: 0; }
figure { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; color: var(--soft); font-size: 13.5px; margin-bottom: 14px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
.key.tick-key { width: 2px; height: 13px; border-radius: 0; vertical-align: -2px; margin-right: 8px; }
.plot { position: relative; height: 230px; margin: 4px 8px 24px 42px; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--rule); stroke-width: 1; }
.raw { stroke-width: 1; opacity: .5; }
.line { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { stroke-width: 7; stroke-linecap: round; }
.ys span, .xs span, .db-ticks span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.ys span { right: calc(100% + 10px); transform: translateY(-50%); }
.xs span { top: calc(100% + 10px); transform: translateX(-50%); }
.plot.square { height: auto; aspect-ratio: 1.25; max-width: 460px; }
.ideal { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 5 5; }
.bubble { position: absolute; border-radius: 50%; transform: translate(-50%, -50%); opacity: .85;
  box-shadow: 0 0 0 1.5px var(--card); }
.bubble.few { opacity: .35; }
.axes { display: flex; justify-content: space-between; color: var(--soft); font-size: 12.5px; }
.c0 { background: var(--c0); } .c1 { background: var(--c1); } .c2 { background: var(--c2); }
.c3 { background: var(--c3); } .c4 { background: var(--c4); } .c5 { background: var(--c5); }
.c6 { background: var(--c6); } .c7 { background: var(--c7); } .c8 { background: var(--c8); }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); } .s7 { stroke: var(--c7); }
.s8 { stroke: var(--c8); }
.db-row { display: grid; grid-template-columns: minmax(110px, 210px) 1fr 100px; gap: 16px;
  align-items: center; min-height: 34px; font-size: 14.5px; }
.bars { font-size: 14.5px; }
.db-label, .bar-label { overflow-wrap: anywhere; line-height: 1.3; }
.db-value, .bar-value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.db-track { position: relative; height: 34px; background: linear-gradient(var(--rule), var(--rule)) center/100% 1px
  no-repeat; }
.whisker { position: absolute; top: 16px; height: 2px; border-radius: 1px; min-width: 2px; }
.mark { position: absolute; top: 11px; width: 12px; height: 12px; border-radius: 50%; transform: translateX(-50%);
  box-shadow: 0 0 0 2px var(--card); z-index: 1; }
.mark.ring { top: 9px; width: 16px; height: 16px; background: none; border: 3px solid; box-shadow: none; z-index: 2; }
.ring.c0 { border-color: var(--c0); }
.tick { position: absolute; top: 8px; width: 2px; height: 18px; transform: translateX(-50%); }
.bars { display: grid; grid-template-columns: minmax(0, max-content) 1fr max-content; gap: 0 16px; }
.bars .bar-row { display: contents; }
.bars .bar-row > * { align-self: center; line-height: 30px; }
.db-axis { min-height: 18px; }
.db-ticks { position: relative; height: 14px; }
.db-ticks span { transform: translateX(-50%); }
.stack { display: flex; height: 22px; border-radius: 6px; overflow: hidden; gap: 2px; margin: 2px 0 12px; }
.bar-track { background: var(--faint); border-radius: 5px; height: 14px; overflow: hidden; }
.bar-track i { display: block; height: 100%; border-radius: 5px; min-width: 2px; }
.scroll { overflow-x: auto; margin: 0 -4px; padding: 0 4px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
thead th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; padding: 0 18px 8px 0;
  vertical-align: bottom; }
td, tbody th { border-top: 1px solid var(--rule); padding: 8px 18px 8px 0; vertical-align: top; text-align: left; }
tbody th { font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
td code, th code { font-size: 12.5px; word-break: break-all; }
td.s, tbody th.s { white-space: nowrap; }
tbody th.t { min-width: 170px; }
td.w, tbody th.w { min-width: 230px; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.n + td:not(.n), th.n + th:not(.n) { padding-left: 14px; }
.long td, .long th { padding-right: 13px; } .long td.w { min-width: 140px; } .long tbody th.t { min-width: 110px; }
.table-note { color: var(--soft); font-size: 13.5px; margin: 12px 0 0; max-width: 92ch; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { overflow-x: auto; margin: 12px 0 0; padding: 14px 16px; background: var(--faint); border-radius: 10px; }
details summary { cursor: pointer; font-weight: 600; font-size: 15px; }
details[open] > summary { margin-bottom: 8px; }
details.values { margin-top: 10px; }
details.values summary { font-weight: 400; font-size: 13px; color: var(--soft); }
:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
footer { margin-top: 64px; padding-top: 18px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 14px; }
.legend-list { list-style: none; margin: 0 0 18px; padding: 0; }
.legend-list li { margin: 6px 0; color: var(--soft); font-size: 15px; }
.legend-list b { color: var(--ink); font-weight: 600; }
.legend-list .status { font-size: 13px; margin: 0 6px 0 10px; }
@media screen and (max-width: 980px) {
LONG}
@media (max-width: 640px) {
  main { padding: 30px 16px 48px; }
  h1 { font-size: 27px; } .outcome { font-size: 18px; } h2 { margin-top: 44px; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; }
  .tile { padding: 12px 14px; } .tile .big { font-size: 19px; }
  .card { padding: 16px; } .plot { height: 200px; }
  .pair { grid-template-columns: minmax(0, 1fr); }
  .db-row { grid-template-columns: 1fr auto; gap: 0 12px; padding: 4px 0; }
  .db-track, .db-ticks { grid-column: 1 / -1; grid-row: 2; }
  .db-axis > span:not(.db-ticks) { display: none; }
  .db-track, .db-ticks { margin: 0 8px; }
STACKED  td.w, tbody th.w, tbody th.t { min-width: 90px; } td.s, td.n { white-space: normal; }
  td { overflow-wrap: anywhere; }
}
@media print {
  :root { color-scheme: light; LIGHT }
  :root { --page: #fff; --ink: #000; --soft: #444; --rule: #ccc; --faint: #f2f2f2; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); } .tile .big { font-size: 15pt; }
  .contents { display: none; } footer { margin-top: 24px; break-before: avoid; }
  .tile, figure, tr { break-inside: avoid; } h2, h3, .legend { break-after: avoid; } h2 { margin-top: 32px; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; } td, th { padding-right: 9px; }
  td.w, tbody th.w { min-width: 90px; } .pair table { font-size: 7.5pt; } .pair td, .pair th { padding-right: 5px; }
  .many td.n, .many thead th, .many tbody th { white-space: normal; min-width: 0; } .card { padding: 14px 16px; }
  .plot { height: 170px; } .pair { grid-template-columns: 1fr 1fr; } h2 { margin-top: 26px; }
  @page { margin: 14mm; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  details.values { display: none; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
""".replace("LIGHT", LIGHT)
    .replace("STACKED", MANY)
    .replace("LONG", LONG)
)
