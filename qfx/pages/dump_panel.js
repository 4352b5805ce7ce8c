// The side panel: all that is known of one node.

const panel = document.getElementById("panel");

function showPanel(view, node, choose) {
  if (!node) {
    panel.replaceChildren(html("h2", {}, `Stage ${view.stage}`),
      html("p", { class: "path" }, countsOf(view)),
      html("p", { class: "empty" }, "Select a node, a bar or a row of the report to see its scales, kernel, noise and values."));
    return;
  }
  panel.replaceChildren(...[
    html("h2", {}, operatorOf(view, node)),
    html("p", { class: "path" }, node.layer || "no layer of the model"),
    html("div", { class: "chips" }, ...chipsOf(node)),
    section("Node", pairs({
      name: node.name, value: node.kind, source: node.source && html("span", { title: node.source }, node.source.split("/").slice(-2).join("/")), kernel: node.kernel,
      covers: node.covers.join(", "), "fused with": node.fused.filter(name => name !== node.name).join(", "),
      "scale group": node.group,
    })),
    section("Measured", pairs({
      SQNR: node.sqnr_db === null ? "" : shownDb(node.sqnr_db),
      time: node.milliseconds === null ? "" : shownMs(node.milliseconds),
      MACs: node.macs ? node.macs.toLocaleString("en") : "",
      sensitivity: node.sensitivity === null ? "" : short(node.sensitivity),
    })),
    node.before && node.after && section("Values before and after", histogram(node.before, node.after)),
    section("Why", pairs({ reason: node.reason, refused: node.refusal, rule: node.rule })),
    ...node.inputs.map((known, i) => known && section(`Reads as integers: ${operandOf(view, node, i)}`, integers(known))),
    node.output && section("Gives as integers", integers(node.output)),
    section("Reads", links(view, node.reads, choose)),
    section("Read by", links(view, view.readers.get(node.name), choose)),
    section("As text", html("pre", {}, node.line + (node.facts ? `\n{${node.facts}}` : ""))),
  ].filter(Boolean));
  panel.scrollTop = 0;
}

function countsOf(view) {
  const seen = { integer: 0, crossing: 0, float: 0 };
  for (const node of view.nodes) if (classOf(node) in seen) seen[classOf(node)] += 1;
  const regions = new Set(view.nodes.map(node => node.region).filter(region => region !== null)).size;
  return `${view.nodes.length} nodes: ${seen.integer} in integers, ${seen.crossing} ${seen.crossing === 1 ? "crossing" : "crossings"}, ${seen.float} in float`
    + (regions ? `; ${regions} integer ${regions === 1 ? "region" : "regions"}` : "");
}

function chipsOf(node) {
  const words = { integer: "integer", crossing: "crossing", float: "float", constant: "constant", end: "end of the graph" };
  const kind = classOf(node), badge = badgeOf(node);
  return [
    html("span", { class: `chip ${kind}` }, words[kind]),
    badge ? html("span", { class: "chip" }, badge) : null,
    node.region === null ? null : html("span", { class: "chip" }, `region ${node.region}`),
  ].filter(Boolean);
}

function section(title, content) {
  return content && html("section", {}, html("h3", {}, title), content);
}

function pairs(values) {
  const told = Object.entries(values).filter(([, value]) => value !== "");
  return told.length ? html("dl", { class: "pairs" }, ...told.flatMap(([key, value]) => [html("dt", {}, key), html("dd", {}, value)])) : null;
}

function integers(known) {
  const range = ([low, high]) => (low === high ? short(low) : `${short(low)} to ${short(high)}`);
  return pairs({
    type: known.spec,
    bits: String(known.bits),
    [known.scales > 1 ? `${known.scales} scales` : "scale"]: known.scale ? range(known.scale) : "",
    [known.zero_point && known.zero_point[0] !== known.zero_point[1] ? "zero points" : "zero point"]: known.zero_point ? range(known.zero_point) : "",
  });
}

function links(view, names, choose) {
  return names.length ? html("div", { class: "links" }, ...names.map(name =>
    html("button", { title: view.byName.get(name).layer || null, onclick: () => choose(name) }, name))) : null;
}

// Both distributions over one range, counts on a logarithmic scale: rare large values are what quantization is about.
function histogram(before, after) {
  const [width, height, left, bottom, top] = [316, 150, 42, 30, 8];
  const high = Math.log10(1 + Math.max(...before.counts, ...after.counts)), inner = width - left - 6;
  const y = count => top + (height - bottom - top) * (1 - Math.log10(1 + count) / high);
  const x = value => left + inner * (value - before.low) / (before.high - before.low);
  const step = inner / before.counts.length;
  const bars = (counts, name, inset) => counts.map((count, i) => count && svg("rect", {
    class: name, x: left + i * step + inset, y: y(count), width: Math.max(0.5, step - 2 * inset), height: height - bottom - y(count),
  })).filter(Boolean);
  const powers = Array.from({ length: Math.floor(high) + 1 }, (_, i) => 10 ** i).filter((_, i, all) => all.length < 5 || i % 2 === 0);
  const ticks = [before.low, before.high];
  if (before.low < 0 && before.high > 0 && x(0) > left + 44 && x(0) < width - 50) ticks.push(0);
  const anchor = value => (value === before.low ? "start" : value === before.high ? "end" : "middle");
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Histogram of values before and after quantization" },
    ...powers.flatMap(count => [
      svg("line", { class: "axis", x1: left, x2: width - 6, y1: y(count), y2: y(count) }),
      svg("text", { x: left - 5, y: y(count) + 3, "text-anchor": "end" }, count >= 1000 ? `${count / 1000}k` : String(count))]),
    ...bars(before.counts, "before", 0), ...bars(after.counts, "after", step * 0.25),
    svg("line", { class: "axis", x1: left, x2: width - 6, y1: height - bottom, y2: height - bottom }),
    ...ticks.map(value => svg("text", { x: x(value), y: height - bottom + 12, "text-anchor": anchor(value) }, short(value))),
    svg("text", { x: left + inner / 2, y: height - 4, "text-anchor": "middle" }, "value"),
    svg("text", { x: 9, y: (height - bottom + top) / 2, "text-anchor": "middle", transform: `rotate(-90 9 ${(height - bottom + top) / 2})` }, "count"));
  return html("div", {}, html("div", { class: "key" },
    html("span", {}, html("i", { class: "was" }), "float"), html("span", {}, html("i", { class: "is" }), "quantized")), drawing);
}
