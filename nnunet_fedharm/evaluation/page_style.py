"""Style sheet of the report page, light and dark."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1a1d21;--muted:#5c6470;--line:#dfe3e8;
--c1:#8a94a3;--c2:#1f6feb;--c3:#c2410c;--s1:#1f6feb;--s2:#c2410c;--s3:#0f8a5f}
@media (prefers-color-scheme:dark){:root{--bg:#0f1216;--card:#181c22;--ink:#e8ebef;--muted:#9aa4b1;--line:#2b313a;
--c1:#8e99a8;--c2:#6ea8ff;--c3:#ff9a5c;--s1:#6ea8ff;--s2:#ff9a5c;--s3:#4cc796}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 20px 60px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:17px;margin:0 0 6px}
.lead{margin:0 0 14px;color:var(--muted);max-width:90ch}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 18px;margin-top:14px}
section p{margin:0 0 8px;color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.card b{display:block;font-size:22px;line-height:1.25;font-variant-numeric:tabular-nums}
.card span{color:var(--muted);font-size:13px;line-height:1.35;display:block}
.next{margin-top:16px}.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:14px}
.two{display:grid;grid-template-columns:1fr 1fr;gap:8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse}
.first{display:grid;grid-template-columns:minmax(0,1.35fr) minmax(0,1fr);gap:14px}
.first section{min-width:0}@media (max-width:820px){.first{grid-template-columns:1fr}}
.pictures{width:100%;table-layout:fixed}.pictures th{font-weight:600;font-size:13px;padding:2px 6px;text-align:center}
.pictures th{vertical-align:middle;line-height:1.3}.pictures th:first-child{width:88px;text-align:left;padding-left:0}
.pictures td{padding:3px}.pictures img{width:100%;height:auto;display:block;border-radius:5px;background:#000}
th small,td small{display:block;font-weight:400;color:var(--muted);font-size:11.5px;line-height:1.3}
.numbers{width:100%;font-variant-numeric:tabular-nums;font-size:13px}
.numbers td,.numbers th{padding:3px 8px;border-top:1px solid var(--line);text-align:right;vertical-align:top}
.numbers tr:first-child th{border-top:0}.numbers th[colspan]{text-align:center}
.numbers .label,.numbers th[scope]{text-align:left;white-space:nowrap}.numbers small{white-space:nowrap}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:18px;align-items:start}
figure{margin:0}figcaption{font-weight:600;font-size:13px}
svg{width:100%;height:auto;display:block}
.grid{stroke:var(--line)}.tick{fill:var(--muted);font-size:11px}.row{fill:var(--ink);font-size:13px}
.mid{text-anchor:middle}.end{text-anchor:end}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.series-1{stroke:var(--c1)}.series-2{stroke:var(--c2)}.series-3{stroke:var(--c3)}
.site-1{stroke:var(--s1)}.site-2{stroke:var(--s2)}.site-3{stroke:var(--s3)}
.dot{stroke-width:0}.dot.series-1{fill:var(--c1)}.dot.series-2{fill:var(--c2)}.dot.series-3{fill:var(--c3)}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:0 0 6px}
.key i{display:inline-block;width:14px;height:10px;border-radius:3px;margin-right:6px}
.key .series-1{background:var(--c1)}.key .series-2{background:var(--c2)}.key .series-3{background:var(--c3)}
.key .site-1{background:var(--s1)}.key .site-2{background:var(--s2)}.key .site-3{background:var(--s3)}
.key .label-1{background:rgb(42,157,143)}.key .label-2{background:rgb(233,177,60)}
.key .label-3{background:rgb(214,84,84)}.key .label-4{background:rgb(122,104,190)}
.steps{width:100%;font-size:13px}.steps td{padding:4px 8px 4px 0;border-top:1px solid var(--line);vertical-align:top}
.steps tr:first-child td{border-top:0}.steps td:first-child{white-space:nowrap}
.steps .wide{color:var(--muted);width:60%}.steps .time{width:150px;font-variant-numeric:tabular-nums}
.bar{display:block;height:5px;border-radius:3px;background:var(--c2);margin-top:3px}
"""
