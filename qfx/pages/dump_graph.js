// The drawing of a stage: dagre says where nodes and edges lie, this draws them, and moves the view.

const HEIGHT = 42, PADDING = 10, READABLE = 0.9;

const canvas = document.getElementById("graph");
const map = document.getElementById("map");
const layouts = new Map();

// Where everything lies; found once for each graph, with and without constants.
function layoutOf(view, constants) {
  const key = `${views.indexOf(view)} ${constants}`;
  if (layouts.has(key)) return layouts.get(key);
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "LR", nodesep: 16, edgesep: 10, ranksep: 34 });
  const shown = view.nodes.filter(node => constants || !node.constant);
  for (const node of shown) graph.setNode(node.name, labelOf(view, node));
  for (const [source, reader] of view.edges)
    if (graph.hasNode(source) && graph.hasNode(reader)) graph.setEdge(source, reader, {});
  dagre.layout(graph);
  const { width, height } = graph.graph();
  const made = {
    width, height,
    nodes: shown.map(node => ({ node, ...graph.node(node.name) })),
    edges: graph.edges().map(({ v, w }) => ({ source: v, reader: w, points: graph.edge(v, w).points })),
  };
  made.byName = new Map(made.nodes.map(box => [box.node.name, box]));
  layouts.set(key, made);
  return made;
}

function labelOf(view, node) {
  const title = clipped(operatorOf(view, node), 30), layer = clipped(shortLayer(node) || node.name, 30), badge = badgeOf(node);
  const badgeWidth = badge ? textWidth(badge, "650 10px") + 10 : 0;
  const text = Math.max(textWidth(title, "600 12px"), textWidth(layer, "11px") + (badge ? badgeWidth + 8 : 0));
  return { title, layer, badge, badgeWidth, width: Math.ceil(Math.max(56, text + 2 * PADDING)), height: HEIGHT };
}

// A smooth line through dagre's points: quadratic pieces between the middles of its segments.
function pathOf(points) {
  const at = p => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`;
  const middles = points.slice(1, -2).map((p, i) => ({ x: (p.x + points[i + 2].x) / 2, y: (p.y + points[i + 2].y) / 2 }));
  const ends = [...middles, points[points.length - 1]];
  return `M${at(points[0])}` + points.slice(1, -1).map((p, i) => `Q${at(p)} ${at(ends[i])}`).join("")
    + (points.length === 2 ? `L${at(points[1])}` : "");
}

class Drawing {
  constructor(choose) {
    this.choose = choose;
    this.place = { x: 0, y: 0, k: 1 };
    this.content = svg("g");
    this.frame = svg("rect", { class: "frame" });
    const arrow = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6.5, markerHeight: 6.5,
      orient: "auto", markerUnits: "userSpaceOnUse" }, svg("path", { d: "M0 .5L8 4 0 7.5z" }));
    canvas.append(svg("defs", {}, arrow), this.content);
    this.listen();
  }

  show(view, constants) {
    this.view = view;
    this.layout = layoutOf(view, constants);
    this.boxes = new Map();
    this.lines = this.layout.edges.map(edge => {
      const [source, reader] = [edge.source, edge.reader].map(name => view.byName.get(name));
      const inside = source.integer && reader.integer && source.region === reader.region;
      return { ...edge, drawn: svg("path", { class: `edge${inside ? " integer" : ""}`, d: pathOf(edge.points), "marker-end": "url(#arrow)" }) };
    });
    for (const box of this.layout.nodes) this.boxes.set(box.node.name, this.drawn(box));
    this.content.replaceChildren(svg("g", {}, ...this.lines.map(line => line.drawn)), svg("g", {}, ...this.boxes.values()));
    this.drawMap();
  }

  drawn({ node, x, y, width, height, title, layer, badge, badgeWidth }) {
    const bottom = height - 11, right = width - PADDING + 3;
    const made = svg("g", { class: `node ${classOf(node)}`, transform: `translate(${x - width / 2} ${y - height / 2})`, "data-name": node.name },
      svg("rect", { width, height, rx: node.op === "placeholder" || node.op === "output" ? height / 2 : 6 }),
      svg("text", { x: PADDING, y: 17 }, title),
      svg("text", { class: "layer", x: PADDING, y: bottom }, layer));
    if (badge) made.append(
      svg("rect", { class: "badge", x: right - badgeWidth, y: height - 21, width: badgeWidth, height: 14, rx: 4 }),
      svg("text", { class: "badge", x: right - badgeWidth / 2, y: bottom - 0.5 }, badge));
    made.append(svg("title", {}, [node.name, node.layer, node.kind].filter(Boolean).join("\n")));
    return made;
  }

  mark(selected, matches) {
    const near = new Set();
    for (const line of this.lines) {
      const touches = selected !== null && (line.source === selected || line.reader === selected);
      line.drawn.classList.toggle("near", touches);
      if (touches) near.add(line.source).add(line.reader);
    }
    for (const [name, drawn] of this.boxes) {
      drawn.classList.toggle("selected", name === selected);
      drawn.classList.toggle("near", near.has(name) && name !== selected);
      drawn.classList.toggle("match", matches?.has(name) ?? false);
    }
    canvas.classList.toggle("searching", matches !== null);
  }

  // --- the view ---

  get size() {
    const { width, height } = canvas.getBoundingClientRect();
    return { width: width || 1, height: height || 1 };
  }

  move(place) {
    this.place = { ...place, k: Math.min(3, Math.max(0.02, place.k)) };
    const { x, y, k } = this.place, { width, height } = this.size;
    this.content.setAttribute("transform", `translate(${x} ${y}) scale(${k})`);
    const { width: w, height: h } = this.layout, inside = (value, most) => Math.min(most, Math.max(0, value));
    const left = inside(-x / k, w), top = inside(-y / k, h), right = inside((width - x) / k, w), bottom = inside((height - y) / k, h);
    for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top }))
      this.frame.setAttribute(name, value * this.mapScale);
  }

  zoom(factor, at = { x: this.size.width / 2, y: this.size.height / 2 }) {
    const k = Math.min(3, Math.max(0.02, this.place.k * factor)), ratio = k / this.place.k;
    this.move({ k, x: at.x - (at.x - this.place.x) * ratio, y: at.y - (at.y - this.place.y) * ratio });
  }

  fit(least = 0) {
    const { width, height } = this.size, { width: w, height: h } = this.layout;
    const k = Math.max(least, Math.min(1.25, (width - 48) / w, (height - 120) / h));
    const x = w * k <= width - 48 ? (width - w * k) / 2 : 24;
    this.move({ k, x, y: (height - 30 - h * k) / 2 });
  }

  // The first node at a size that can be read; all of the graph where that can be.
  start() {
    this.fit(READABLE);
    const first = this.layout.nodes.find(box => box.node.op === "placeholder");
    if (first && this.layout.height * this.place.k > this.size.height - 90)
      this.move({ ...this.place, y: this.size.height / 2 - first.y * this.place.k });
  }

  reveal(name) {
    const box = this.layout.byName.get(name);
    if (!box) return;
    const { width, height } = this.size, k = Math.max(this.place.k, READABLE);
    const x = box.x * k + this.place.x, y = box.y * k + this.place.y;
    const seen = k === this.place.k && x > 90 && x < width - 90 && y > 60 && y < height - 100;
    if (!seen) this.move({ k, x: width / 2 - box.x * k, y: height / 2 - box.y * k });
  }

  // All of the graph in small, with a frame around what is to be seen.
  drawMap() {
    const { width: w, height: h } = this.layout, room = Math.max(80, this.size.width - 34);
    this.mapScale = Math.min(room / w, 56 / h, 0.2);
    const k = this.mapScale;
    map.setAttribute("width", Math.max(8, w * k));
    map.setAttribute("height", Math.max(8, h * k));
    map.replaceChildren(this.frame, ...this.layout.nodes.map(box => svg("g", { class: classOf(box.node) }, svg("rect", {
      x: (box.x - box.width / 2) * k, y: (box.y - box.height / 2) * k, width: Math.max(1, box.width * k),
      height: Math.max(1.5, box.height * k), style: `fill:var(--${classOf(box.node)}-line,var(--float-line));stroke:none`,
    }))));
    this.move(this.place);
  }

  listen() {
    let from = null, moved = false;
    canvas.addEventListener("pointerdown", event => {
      if (event.button !== 0) return;
      from = { x: event.clientX - this.place.x, y: event.clientY - this.place.y, at: [event.clientX, event.clientY] };
      moved = false;
    });
    canvas.addEventListener("pointermove", event => {
      if (!from) return;
      moved ||= Math.hypot(event.clientX - from.at[0], event.clientY - from.at[1]) > 4;
      if (!moved) return;
      if (!canvas.hasPointerCapture(event.pointerId)) canvas.setPointerCapture(event.pointerId);
      canvas.classList.add("dragged");
      this.move({ ...this.place, x: event.clientX - from.x, y: event.clientY - from.y });
    });
    for (const end of ["pointerup", "pointercancel"])
      canvas.addEventListener(end, () => { from = null; canvas.classList.remove("dragged"); });
    canvas.addEventListener("click", event => {
      if (!moved) this.choose(event.target.closest(".node")?.dataset.name ?? null);
    });
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      const { left, top } = canvas.getBoundingClientRect();
      const step = event.deltaMode ? 25 * event.deltaY : event.deltaY;
      this.zoom(Math.exp(-Math.max(-200, Math.min(200, step)) / 500), { x: event.clientX - left, y: event.clientY - top });
    }, { passive: false });
    const center = event => {
      const { left, top } = map.getBoundingClientRect(), { width, height } = this.size, k = this.place.k;
      this.move({ k, x: width / 2 - (event.clientX - left) / this.mapScale * k, y: height / 2 - (event.clientY - top) / this.mapScale * k });
    };
    map.addEventListener("pointerdown", event => { map.setPointerCapture(event.pointerId); center(event); });
    map.addEventListener("pointermove", event => { if (event.buttons) center(event); });
  }
}
