// Noise and time of every node in graph order, as bars above one another; a column of the two is one node.

const charts = document.getElementById("charts");
const CHARTS = [
  { title: "SQNR, dB", of: node => node.sqnr_db, shown: shownDb },
  { title: "Time, ms", of: node => node.milliseconds, shown: shownMs },
];

// The last graph of the part that was measured: times are those of the lowered one.
const measuredView = part => views.filter(view => view.graph === part)
  .findLast(view => view.nodes.some(node => node.sqnr_db !== null || node.milliseconds !== null));

function drawCharts(part, choose) {
  const view = measuredView(part);
  charts.hidden = !view;
  if (!view) return;
  const nodes = view.nodes.filter(node => !node.constant && CHARTS.some(chart => chart.of(node) !== null));
  const used = CHARTS.filter(chart => nodes.some(node => chart.of(node) !== null));
  const left = 38, head = 20, gap = 12, room = charts.clientWidth - 32, height = charts.clientHeight - 18;
  const tall = height / used.length - head - gap;
  const step = Math.max(3, Math.min(44, (room - left) / nodes.length)), width = Math.max(room, left + step * nodes.length);
  const told = svg("text", { class: "told", x: room, y: 11 });
  const columns = nodes.map((node, i) => svg("g", {
    class: `bar ${classOf(node)}`, "data-name": node.name, onclick: () => choose(view, node),
    onmouseenter: () => { told.textContent = toldOf(view, node); },
    onmouseleave: () => { told.textContent = ""; },
  }, svg("rect", { class: "hit", x: left + i * step, y: head - 4, width: step, height: height - head })));
  const axes = used.flatMap((chart, row) => {
    const top = row * (head + tall + gap) + head;
    const high = Math.max(...nodes.map(node => finite(chart.of(node)) ?? 0), 1e-9);
    const y = value => top + tall * (1 - Math.max(0, value) / high);
    nodes.forEach((node, i) => {
      const value = chart.of(node);
      if (value === null) return;
      const bar = y(value === "inf" ? high : finite(value) ?? 0), space = Math.min(6, step * 0.2);
      columns[i].append(svg("rect", {
        class: `value${value === "inf" ? " exact" : ""}`, x: left + i * step + space / 2, y: Math.min(bar, top + tall - 1),
        width: step - space, height: Math.max(1, top + tall - bar),
      }));
    });
    return [
      svg("text", { class: "title", x: 0, y: top - 9 }, chart.title + (row ? "" : ` (${view.stage}, in graph order)`)),
      ...ticksTo(high).flatMap(value => [
        svg("line", { class: "axis", x1: left, x2: left + step * nodes.length, y1: y(value), y2: y(value) }),
        svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value))]),
    ];
  });
  charts.replaceChildren(svg("svg", { width, height, role: "img", "aria-label": "SQNR and time of each node" }, ...axes, told, ...columns));
}

function toldOf(view, node) {
  const values = CHARTS.filter(chart => chart.of(node) !== null).map(chart => chart.shown(chart.of(node)));
  return `${operatorOf(view, node)}, ${node.layer || node.name}: ${values.join(", ")}`;
}

// From 0 on, two to five steps of 1, 2 or 5 times a power of ten.
function ticksTo(high) {
  const power = 10 ** Math.floor(Math.log10(high / 2)), step = [5, 2, 1].find(digit => digit * power <= high / 2) * power;
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => i * step);
}

function markCharts(part, selected, matches) {
  const view = measuredView(part);
  if (!view) return;
  charts.classList.toggle("searching", matches !== null);
  for (const column of charts.querySelectorAll(".bar")) {
    const node = view.byName.get(column.dataset.name);
    column.classList.toggle("selected", selected !== null && node === counterpart(view, selected));
    column.classList.toggle("match", matches?.(view, node) ?? false);
  }
}
