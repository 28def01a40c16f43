"""Style sheet of a study's report, on top of the reports'."""

from __future__ import annotations

from nnunet_fedharm.evaluation.report_style import REPORT_STYLE

STUDY_STYLE = (
    REPORT_STYLE
    + """
.questions{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px;margin-top:12px}
.question{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--c2);
border-radius:10px;padding:12px 16px}
.question.open{border-left-color:var(--c1)}
.question h2{font-size:14px;font-weight:600;color:var(--muted);margin:0 0 4px}
.question>p{margin:0 0 6px;font-size:17px;line-height:1.38;color:var(--ink);max-width:none}
.question ul{padding-left:18px}.question li{font-size:13.5px;line-height:1.4;color:var(--muted);margin:0 0 2px;max-width:none}
.question details.fold{margin-top:2px;font-size:13.5px;color:var(--muted)}.question details.fold>.inside{margin-top:3px}
.question .key{font-size:13px;margin:0}.question svg{margin:2px auto 8px 0}.armname{fill:var(--ink);font-size:13px}
.rule{stroke:var(--c1);stroke-width:1.6}.rule.zero{stroke:var(--c1)}.rule.control{stroke:var(--c1);stroke-dasharray:2 3}
.rule.oracle{stroke:var(--c4);stroke-dasharray:7 3}
.band{fill:var(--c2);fill-opacity:.12}.line.thin{stroke-width:1.3;fill:none}
.line.soft{stroke-dasharray:5 4}.line.thin.dashes-1{stroke-dasharray:9 4}.line.thin.dashes-2{stroke-dasharray:2 4}
.line.thin.dashes-3{stroke-dasharray:9 3 2 3}.key .dashes-1,.key .dashes-2,.key .dashes-3{width:26px}
.key .dashes-1{mask:repeating-linear-gradient(90deg,#000 0 8px,transparent 8px 11px)}
.key .dashes-2{mask:repeating-linear-gradient(90deg,#000 0 3px,transparent 3px 7px)}
.key .dashes-3{mask:repeating-linear-gradient(90deg,#000 0 8px,transparent 8px 10px,#000 10px 12px,transparent 12px 14px)}
.key .dash{display:inline-block;width:22px;height:0;border:0;border-top:2px dashed var(--c4);
background:none;border-radius:0;margin-right:6px}
.key .dash.control{border-top:2px dotted var(--c1)}
.strip{display:flex;gap:6px;overflow-x:auto;padding-bottom:4px}.strip figure{flex:1 1 0;min-width:96px;max-width:150px}
.strip img{width:100%;height:auto;display:block;border-radius:5px;background:#000}
.strip figcaption{font-weight:400;font-size:12.5px;line-height:1.25;color:var(--muted)}
.sitestrip{margin-top:12px}.sitestrip h3 small{font-weight:400;color:var(--muted);margin-left:8px;font-size:13px}
.good{color:var(--good)}.bad{color:var(--bad)}
:root{--good:#0a6e45;--bad:#a8310c}@media (prefers-color-scheme:dark){:root{--good:#4fd19b;--bad:#ff9a6c}}
pre{font-size:12.5px;line-height:1.4;overflow-x:auto;background:var(--bg);border:1px solid var(--line);
border-radius:6px;padding:10px}
.methods p{color:var(--ink)}.methods h3{margin-top:12px}
nav.toc{display:flex;flex-wrap:wrap;gap:4px 14px;margin:14px 2px 0}
.wide{overflow-x:auto}
@media (max-width:820px){.questions{grid-template-columns:minmax(0,1fr)}.wide svg{width:860px;max-width:none}}
@media print{main{max-width:none;padding:0}section,.question,figure,.sitestrip{break-inside:avoid}section.long{break-inside:auto}
nav.toc{display:none}.scroll,.strip{overflow:visible}.strip{flex-wrap:wrap}
:root{--bg:#fff;--card:#fff;--ink:#1a1d21;--muted:#4c545e;--line:#d5dae0}
.numbers{font-size:10.5px}.numbers td,.numbers th{padding:2px 4px}.question>p{font-size:14px}.question li{font-size:11.5px}}
@page{size:A4;margin:14mm}
"""
)
