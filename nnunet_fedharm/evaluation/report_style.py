"""Style sheet of the reports about sites and studies, on top of the other pages': light and dark, for telephones too."""

from __future__ import annotations

from nnunet_fedharm.evaluation.page_style import STYLE

# Sites: the colours of Okabe and Ito, which readers without red or green tell apart, darker on white and lighter on black.
_LIGHT = "--s1:#0072b2;--s2:#c65200;--s3:#00805d;--s4:#a8518a;--s5:#2b8fc7;--s6:#a87400;--s7:#4d545e;--s8:#7a6a00"
_DARK = "--s1:#5cb8f0;--s2:#ff9550;--s3:#3fcf9f;--s4:#eaa0cc;--s5:#9bd6f7;--s6:#f2b63c;--s7:#c3cad3;--s8:#e6da5c"
_SITES = "".join(
    f".mark.site-{n}{{fill:var(--s{n})}}.ridge.site-{n},.ellipse.site-{n}{{stroke:var(--s{n});fill:var(--s{n})}}"
    for n in range(1, 9)
)

REPORT_STYLE = (
    STYLE
    + ".cell{fill:var(--ink)}"
    + f":root{{{_LIGHT};--c3:#b3450a;--c4:#7a4fc0}}"
    + f"@media (prefers-color-scheme:dark){{:root{{{_DARK};--c3:#ff9a5c;--c4:#c0a2ff}}.cell.middle{{fill:var(--card)}}}}"
    + _SITES
    + """
body{font-size:16px;overflow-wrap:break-word}
main{padding:20px 16px 60px}
section{padding:16px 18px}section,.block,.first>*,figure,.figures>*{min-width:0}
h2{font-size:19px;line-height:1.3}h3{font-size:16px;margin:0 0 4px}h4{font-size:14px;margin:10px 0 4px;color:var(--muted)}
.lead{max-width:none}.answer{font-size:19px;line-height:1.42;margin:0 0 2px;max-width:74ch}
.answer p{margin:0 0 7px}.support{font-size:16px}.support p{margin:0 0 3px}
p,li{max-width:86ch}section p,section li{color:var(--muted)}
ul{margin:0;padding-left:20px}
.said p{color:var(--ink);margin:0 0 8px}
.tick{font-size:12.5px}.row{font-size:14px;font-weight:600}th small,td small{font-size:13px}
figcaption small,.ranked small,summary small{font-size:13px}
.first{grid-template-columns:minmax(0,1.3fr) minmax(0,1fr)}
.first>section>p{font-size:14px}
.sitegrid{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:14px 12px}
.first .sitegrid{row-gap:4px}.first .sitecard{display:grid;grid-template-rows:subgrid;align-content:start}
.sitecard{min-width:0}.sitecard h3{display:flex;align-items:center;gap:6px;margin:0}
.sitecard>span{display:block;font-size:13px;line-height:1.35;color:var(--muted)}
.sitecard figure{margin:0 0 7px}.sitecard figcaption{font-weight:400;font-size:13px;color:var(--muted);line-height:1.3}
.sitecard img,.slices img{width:100%;height:auto;display:block;border-radius:5px;background:#000}
.slices{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,240px));gap:18px}
.three-up{display:grid;grid-template-columns:repeat(3,1fr);gap:4px}
.icon{width:14px;height:14px;flex:none;display:inline-block;vertical-align:-2px;margin-right:6px}
.mark{stroke:var(--card);stroke-width:.8}.ellipse{fill-opacity:.07;stroke-width:1.8}
.ridge{fill-opacity:.3;stroke-width:1.5;stroke-linejoin:round}.median{stroke:var(--ink);stroke-width:2}
.halo{font-size:15px;font-weight:700;fill:var(--ink);stroke:var(--card);stroke-width:4;paint-order:stroke;stroke-linejoin:round}
.heat{fill:var(--c2)}.cell{font-size:14px;text-anchor:middle;font-variant-numeric:tabular-nums}
.cell.strong{fill:var(--card);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:18px 16px;align-items:start}
figcaption{font-size:14px;margin-bottom:3px}figcaption small{display:block;font-weight:400;color:var(--muted)}
.sets{display:grid;gap:14px 16px;grid-template-columns:repeat(auto-fill,minmax(min(240px,100%),1fr))}
.sets .figures{grid-template-columns:repeat(auto-fill,minmax(min(200px,100%),1fr));gap:8px 12px}
.sets.n2{grid-template-columns:repeat(auto-fill,minmax(min(450px,100%),1fr))}.sets.n3{grid-template-columns:minmax(0,1fr)}
.sets.n3 .figures{grid-template-columns:repeat(auto-fill,minmax(min(250px,100%),1fr))}
.sets h4{margin:0 0 2px;color:var(--ink)}.sets figcaption{font-weight:400;color:var(--muted)}.keep{white-space:nowrap}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr));gap:0 24px}
.block{border-top:1px solid var(--line);padding-top:12px;margin-top:14px}.block>p{font-size:14px}
@media (min-width:621px){.first .ranked{grid-template-columns:minmax(0,190px) minmax(0,1fr) 175px}}
.first .block{margin-top:18px}
.first .figures{grid-template-columns:repeat(auto-fill,minmax(min(200px,100%),1fr));align-items:end}
.said ul{margin:2px 0 8px}.said li{color:var(--ink)}.bare>.block{border:0;padding:0;margin:0}
.key{font-size:14px;align-items:center}.key span{display:inline-flex;align-items:center}
.key .series-3{background:var(--c3)}.key .series-4{background:var(--c4)}
.line.series-3{stroke:var(--c3)}.line.series-4{stroke:var(--c4)}.dot.series-3{fill:var(--c3)}.dot.series-4{fill:var(--c4)}
.dot{stroke:var(--card);stroke-width:1.2}.dot.series-2{stroke-width:1.2}
.ranked{display:grid;grid-template-columns:minmax(0,270px) minmax(0,1fr) 185px;gap:2px 14px;align-items:center;
padding:4px 0;border-top:1px solid var(--line);font-size:14px}
.ranked.head{border:0;padding:0}.ranked small{display:block;color:var(--muted);line-height:1.35}
.ranked .values span{display:block;font-size:13.5px;line-height:16px;font-variant-numeric:tabular-nums}
.track{height:auto;overflow:visible;width:100%}
.scroll{max-width:100%}.scroll:focus-visible{outline:2px solid var(--c2)}
.numbers{font-size:14px}.numbers th{font-weight:600}.numbers thead th{color:var(--muted);font-weight:500;line-height:1.3}
.numbers thead th[scope]{text-align:right;white-space:normal}
.numbers thead th[scope]:first-child,.numbers tbody th{text-align:left}.numbers tbody th{white-space:nowrap}
.numbers td{white-space:nowrap}.numbers .long{white-space:normal;display:block;min-width:190px;text-align:left}
.words td,.words thead th[scope]{text-align:left}.words td{white-space:normal;min-width:70px}.words thead tr th{border-top:0}
.settings td{overflow-wrap:anywhere}.settings tbody th[scope]{font-weight:500;white-space:normal}
details>summary{cursor:pointer}details.fold{margin-top:10px;font-size:14px}details.fold>.inside{margin-top:8px}
details.part{background:var(--card);border:1px solid var(--line);border-radius:10px;margin-top:10px}
details.part>summary{padding:12px 18px;line-height:1.4}
details.part>summary small{color:var(--muted);display:block;margin-left:18px}
details.part>.inside{padding:0 18px 18px}
.toc{font-size:14px}.toc tbody th[scope]{white-space:normal;min-width:150px;font-weight:500}
.toc a{color:var(--c2)}.classifier .said{font-size:14px}.classifier .said p{margin:6px 0 0}
a{color:var(--c2)}
@media (max-width:820px){.first{grid-template-columns:minmax(0,1fr)}}
@media (max-width:620px){main{padding:14px 10px 40px}section{padding:14px}h1{font-size:23px}.answer{font-size:17.5px}
details.part>summary,details.part>.inside{padding-left:14px;padding-right:14px}
.sitegrid{grid-template-columns:1fr 1fr}.slices{grid-template-columns:minmax(0,1fr)}
.ranked{grid-template-columns:minmax(0,1fr) auto}.ranked>span:first-child{grid-column:1}
.ranked>.values{grid-column:2;grid-row:1;text-align:right;align-self:start}.ranked>.track{grid-column:1/-1;grid-row:2}}
@media print{details:not([open])>.inside{display:block}body{background:#fff}}
"""
)
