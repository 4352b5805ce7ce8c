// The page: what is chosen (stage, part, node, words to find), and the controls that choose.

const byId = id => document.getElementById(id);
const state = { view: null, selected: null, words: "", place: -1 };
const drawing = new Drawing(select);

// --- choosing ---

function showStage(stage, part = state.view?.graph ?? partNames[0]) {
  const view = viewAt(stage, part) ?? views.find(other => other.stage === stage);
  const before = state.view, kept = state.selected;
  state.view = view;
  state.selected = kept ? counterpart(view, kept) ?? null : null;
  drawing.show(view, byId("constants").checked || (state.selected?.constant ?? false));
  if (before?.graph !== view.graph) drawCharts(view.graph, chooseBar);
  byId("part").value = view.graph;
  drawing.start();
  if (state.selected) drawing.reveal(state.selected.name);
  mark();
}

function select(name) {
  state.selected = name === null ? null : state.view.byName.get(name) ?? null;
  mark();
}

function go(name) {
  select(name);
  if (state.selected?.constant && !byId("constants").checked) setConstants(true);
  if (name !== null) drawing.reveal(name);
}

// A bar is a node of the stage that was measured: its counterpart here, or that stage.
function chooseBar(view, node) {
  const here = counterpart(state.view, node);
  if (here) return go(here.name);
  stageTabs(byId("stages").querySelector(`[data-stage="${view.stage}"]`));
  go(node.name);
}

function setConstants(shown) {
  byId("constants").checked = shown;
  const { selected } = state;
  if (selected?.constant && !shown) state.selected = null;
  drawing.show(state.view, shown);
  drawing.start();
  if (state.selected) drawing.reveal(state.selected.name);
  mark();
}

// --- finding ---

const matches = (view, node) =>
  [node.name, node.layer, operatorOf(view, node)].some(text => text.toLowerCase().includes(state.words));

function found() {
  return state.words ? drawing.layout.nodes.map(box => box.node).filter(node => matches(state.view, node)) : [];
}

function mark() {
  const searching = state.words !== "", hits = found();
  drawing.mark(state.selected?.name ?? null, searching ? new Set(hits.map(node => node.name)) : null);
  markCharts(state.view.graph, state.selected, searching ? matches : null);
  byId("found").value = searching ? `${hits.length} found` : "";
  showPanel(state.view, state.selected, go);
}

byId("search").addEventListener("input", event => {
  state.words = event.target.value.trim().toLowerCase();
  state.place = -1;
  mark();
});
byId("search").addEventListener("keydown", event => {
  if (event.key === "Escape") {
    event.target.value = state.words = "";
    mark();
  } else if (event.key === "Enter") {
    const hits = found();
    if (!hits.length) return;
    state.place = (state.place + (event.shiftKey ? -1 : 1) + hits.length) % hits.length;
    go(hits[state.place].name);
  }
});

// --- controls ---

for (const stage of stageNames)
  byId("stages").append(html("button", { role: "tab", "data-stage": stage, "aria-controls": "drawing" }, stage));
const stageTabs = tabs(byId("stages"), tab => showStage(tab.dataset.stage));

byId("part").append(...partNames.map(part => html("option", { value: part }, part || "the model")));
byId("part").hidden = partNames.length < 2;
byId("part").addEventListener("change", event => {
  state.selected = null;
  showStage(state.view.stage, event.target.value);
});

const pageTabs = tabs(byId("pages"), tab => {
  for (const page of document.querySelectorAll("main")) page.hidden = page.id !== tab.getAttribute("aria-controls");
});

byId("constants").addEventListener("change", event => setConstants(event.target.checked));
byId("zoom-in").addEventListener("click", () => drawing.zoom(1.3));
byId("zoom-out").addEventListener("click", () => drawing.zoom(1 / 1.3));
byId("fit").addEventListener("click", () => drawing.fit());
byId("start").addEventListener("click", () => drawing.start());

// Along the edges: to the first node that is read, to the first reader, and among those that share a reader or a source.
function walk(key) {
  const shown = name => drawing.layout.byName.has(name), { view, selected } = state;
  if (!selected) return go(drawing.layout.nodes[0]?.node.name ?? null);
  const reads = selected.reads.filter(shown), readers = view.readers.get(selected.name).filter(shown);
  const beside = (reads.length ? view.readers.get(reads[0]) : view.byName.get(readers[0])?.reads ?? []).filter(shown);
  const ordered = [...beside].sort((a, b) => drawing.layout.byName.get(a).y - drawing.layout.byName.get(b).y);
  const here = ordered.indexOf(selected.name);
  const next = { ArrowLeft: reads[0], ArrowRight: readers[0], ArrowUp: ordered[here - 1], ArrowDown: ordered[here + 1] }[key];
  if (next) go(next);
}

canvas.addEventListener("keydown", event => {
  const actions = { "+": () => drawing.zoom(1.3), "=": () => drawing.zoom(1.3), "-": () => drawing.zoom(1 / 1.3),
    0: () => drawing.fit(), 1: () => drawing.start(), Escape: () => select(null) };
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow")) walk(event.key);
  else if (event.key in actions) actions[event.key]();
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && !event.target.closest("input, select") && !byId("page-graph").hidden) {
    event.preventDefault();
    byId("search").focus();
  }
});

byId("rows")?.addEventListener("click", event => {
  const row = event.target.closest("[data-node]");
  if (!row) return;
  const wanted = { ...NOTHING, name: row.dataset.node, layer: row.dataset.layer };
  pageTabs(byId("tab-graph"));
  const view = counterpart(state.view, wanted) ? state.view : views.findLast(other => counterpart(other, wanted));
  if (!view) return;
  if (view !== state.view) {
    showStage(view.stage, view.graph);
    for (const tab of byId("stages").children) tab.setAttribute("aria-selected", tab.dataset.stage === view.stage);
  }
  go(counterpart(view, wanted).name);
});

for (const [kind, words] of [["integer", "in integers"], ["crossing", "crossing: quantize, dequantize"], ["float", "float"]])
  byId("legend").append(html("li", {}, html("i", { style: `background:var(--${kind});border-color:var(--${kind}-line)` }), words));

if (views.length) {
  stageTabs(byId("stages").lastElementChild);
  new ResizeObserver(() => {
    if (byId("page-graph").hidden) return;
    drawing.drawMap();
    drawCharts(state.view.graph, chooseBar);
    mark();
  }).observe(byId("drawing"));
}
